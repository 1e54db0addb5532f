"""The fused operators, one file each."""

from tokcore.ops.dtw import DTW, dtw
from tokcore.ops.edit_align import EditAlign, edit_align
from tokcore.ops.group_advantage import GroupAdvantage, group_advantage
from tokcore.ops.kv_append import kv_append
from tokcore.ops.kv_compact import kv_compact
from tokcore.ops.monotonic_align import MonotonicAlignment, monotonic_align
from tokcore.ops.monotonic_search import MonotonicSearch, maximum_path, monotonic_search
from tokcore.ops.policy_loss import policy_loss
from tokcore.ops.policy_loss_rules import PolicyLoss
from tokcore.ops.prompt_window_scores import prompt_window_scores
from tokcore.ops.segment_attention import SegmentAttention, segment_attention
from tokcore.ops.sequential_kl import SequentialKL, sequential_kl
from tokcore.ops.sparse_decode_attention import SparseDecode, sparse_decode_attention
from tokcore.ops.sparse_window_attention import sparse_window_attention
from tokcore.ops.token_logprob import token_logprob
from tokcore.ops.window_scores_update import window_scores_update
from tokcore.ops.window_select import WindowSelection, window_select

__all__ = [
    "DTW",
    "EditAlign",
    "GroupAdvantage",
    "MonotonicAlignment",
    "MonotonicSearch",
    "PolicyLoss",
    "SegmentAttention",
    "SequentialKL",
    "SparseDecode",
    "WindowSelection",
    "dtw",
    "edit_align",
    "group_advantage",
    "kv_append",
    "kv_compact",
    "maximum_path",
    "monotonic_align",
    "monotonic_search",
    "policy_loss",
    "prompt_window_scores",
    "segment_attention",
    "sequential_kl",
    "sparse_decode_attention",
    "sparse_window_attention",
    "token_logprob",
    "window_scores_update",
    "window_select",
]
