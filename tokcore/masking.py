"""Labels, masks, padding and row sums: the bookkeeping that token-level algorithms share.

Rows are sequences. A mask is bool, True = keep. What is masked is selected away, never multiplied
by zero, so NaN or infinity at a masked position is harmless. Packed rows are described by
cu_seqlens, the running row ends with a 0 in front: row i of N ends at cu_seqlens[i + 1], where row
i + 1 starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def shift_labels(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Move labels one step left, so that position t holds the label its logits predict, t + 1.

    Equivalent to ``labels[:, 1:]`` beside ``logits[:, :-1]``, but leaves the logits whole: the
    gradient of a sliced view is written twice, once for the slice and once more into a padded copy.

    Args:
        labels: (..., T) integer.
        ignore_index: what the last position, which predicts nothing, is given.
    Returns:
        (..., T), dtype of labels.

    >>> shift_labels(torch.tensor([[-100, 5, 6, 7]]))
    tensor([[   5,    6,    7, -100]])
    """
    if labels.dim() == 0:
        raise ValueError("shift_labels: labels must have at least one dimension, got a scalar")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"shift_labels: labels must be integers, got {labels.dtype}")
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)


def row_sum(values: Tensor, mask_or_cu_seqlens: Tensor) -> Tensor:
    """Sum each row's kept values; a row that keeps nothing sums to exactly 0.

    Equivalent to ``torch.where(mask, values, 0).sum(-1)`` for padded rows and to one ``sum`` per
    slice for packed ones.

    Args:
        values: (N, T) padded rows, or (total,) packed rows.
        mask_or_cu_seqlens: (N, T) bool, True = keep; or (N + 1,) int32/int64, from 0 to total,
            never falling.
    Returns:
        (N,), dtype of values.

    Malformed cu_seqlens raise on CPU. Elsewhere looking would stall the device: the rows concerned
    become NaN, nothing is read out of bounds, and TOKCORE_DEBUG=1 makes them raise.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> row_sum(torch.tensor([[1., 2.], [3., float("nan")]]), mask)
    tensor([3., 3.])
    >>> row_sum(torch.tensor([1., 2., 3.]), torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 3.])
    """
    index = mask_or_cu_seqlens
    if values.dim() == 2:
        if index.dtype != torch.bool:
            raise TypeError(f"row_sum: the mask of padded rows must be bool, got {index.dtype}")
        if index.shape != values.shape:
            shapes = f"{tuple(index.shape)} and {tuple(values.shape)}"
            raise ValueError(f"row_sum: mask and values must have one shape, got {shapes}")
        return torch.where(index, values, 0.0).sum(-1)
    if values.dim() != 1:
        raise ValueError(
            "row_sum: values must be (N, T) with a mask or (total,) with cu_seqlens, "
            f"got shape {tuple(values.shape)}"
        )
    return _packed_row_sum(values, index)


def _packed_row_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"row_sum: the cu_seqlens of packed rows must be int32 or int64, got {cu_seqlens.dtype}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"row_sum: cu_seqlens must have shape (rows + 1,), got {tuple(cu_seqlens.shape)}"
        )
    total = values.shape[0]
    ends = cu_seqlens.long()
    # The nearest well-formed row ends: a kernel that follows them stays inside values whatever it
    # was given.
    safe = ends.clamp(0, total).cummax(0).values
    wrong = ends != safe
    wrong = torch.cat([wrong[:1] | (ends[:1] != 0), wrong[1:]])
    wrong = torch.cat([wrong[:-1], wrong[-1:] | (ends[-1:] != total)])
    if may_look(values) and bool(wrong.any()):
        raise ValueError(
            f"row_sum: cu_seqlens must rise from 0 to the {total} packed values without falling, "
            f"got {ends.tolist()}"
        )
    # segment_reduce adds in a fixed order; index_add would use float atomics on a GPU.
    sums = torch.segment_reduce(values, "sum", offsets=safe, initial=0.0, unsafe=True)
    return sums.masked_fill(wrong[1:] | wrong[:-1], float("nan"))


def may_look(values: Tensor) -> bool:
    """Whether values may be looked at in order to refuse them: on the CPU, and under
    TOKCORE_DEBUG=1. Elsewhere looking would stall the device, and under torch.compile it cannot be.
    """
    debug = os.environ.get("TOKCORE_DEBUG", "0") not in ("", "0")
    return (values.device.type == "cpu" or debug) and not torch.compiler.is_compiling()


def pad_rows(rows: Sequence[Tensor], value: int, *, left: bool = False) -> Tensor:
    """Stack rows of different lengths into one tensor, filling up with value.

    Args:
        rows: N tensors of shape (T_i,), one dtype.
        value: the filler.
        left: fill on the left (prompts to generate from) and not on the right.
    Returns:
        (N, max T_i), dtype of the rows.

    >>> pad_rows([torch.tensor([1, 2]), torch.tensor([3])], 0, left=True)
    tensor([[1, 2],
            [0, 3]])
    """
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(rows), True, value, padding_side=side)


def encode_pair(
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    eos: int,
    max_length: int = 512,
    max_prompt_length: int = 256,
    keep: str = "start",
) -> dict[str, Tensor]:
    """Build one preference example from three token lists, as TDPO's and DPO's authors do.

    eos is appended to both responses. If prompt and longer response exceed max_length together, the
    prompt is cut to max_prompt_length; if they still do, both responses are cut to max_length -
    max_prompt_length, and may lose the eos.

    Args:
        prompt, chosen, rejected: token ids without special tokens; eos may occur in none of them.
        keep: which end of a prompt survives the cut, "start" or "end" (dialogues).
    Returns:
        {chosen,rejected,prompt}_{input_ids,attention_mask} and {chosen,rejected}_labels, each (T,)
        int64; labels are the ids with -100 at the prompt, so the eos is scored.

    Source: Vance0124/Token-level-Direct-Preference-Optimization:preference_datasets.py,
    tokenize_batch_element.

    >>> encode_pair([5, 6], [7], [8, 9], eos=1)["rejected_labels"]
    tensor([-100, -100,    8,    9,    1])
    """
    if keep not in ("start", "end"):
        raise ValueError(f"encode_pair: keep must be 'start' or 'end', got {keep!r}")
    if not 0 < max_prompt_length < max_length:
        raise ValueError(
            "encode_pair: max_prompt_length must be positive and below max_length, "
            f"got {max_prompt_length} and {max_length}"
        )
    for name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if eos in ids:
            raise ValueError(f"encode_pair: {name} must not contain the eos token {eos}")
    prompt, chosen, rejected = list(prompt), [*chosen, eos], [*rejected, eos]
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest > max_length:
        prompt = prompt[:max_prompt_length] if keep == "start" else prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
        chosen = chosen[: max_length - max_prompt_length]
        rejected = rejected[: max_length - max_prompt_length]
    example = {}
    for name, response in (("chosen", chosen), ("rejected", rejected), ("prompt", [])):
        ids = torch.tensor(prompt + response, dtype=torch.int64)
        example[f"{name}_input_ids"] = ids
        example[f"{name}_attention_mask"] = torch.ones_like(ids)
        if response:
            labels = ids.clone()
            labels[: len(prompt)] = -100
            example[f"{name}_labels"] = labels
    return example


def collate_pairs(examples: Sequence[dict[str, Tensor]], *, pad: int) -> dict[str, Tensor]:
    """Batch examples of encode_pair: prompts padded on the left, the rest on the right.

    Args:
        pad: the filler of input_ids (the authors take eos where a tokenizer has none); masks get 0,
            labels -100.
    Returns:
        The keys of the examples, each (B, T); chosen, rejected and prompt have a T each.

    Source: Vance0124/Token-level-Direct-Preference-Optimization:preference_datasets.py,
    get_collate_fn.
    """
    fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
    return {
        key: pad_rows(
            [example[key] for example in examples],
            fill[key.split("_", 1)[1]],
            left=key.startswith("prompt_"),
        )
        for key in examples[0]
    }


def join_pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put chosen rows above rejected rows, so that one forward pass of a model serves both.

    Args:
        batch: chosen_x and rejected_x, each (B, T_x), for x of input_ids, attention_mask, labels
            (of collate_pairs).
    Returns:
        input_ids, attention_mask, labels: (2B, T), T the longer of the two; filled up with 0, 0 and
            -100.

    Source: Vance0124/Token-level-Direct-Preference-Optimization:trainers.py,
    concatenated_inputs.

    >>> pair = collate_pairs([encode_pair([5], [6], [7, 8], eos=1)], pad=1)
    >>> join_pairs(pair)["labels"]
    tensor([[-100,    6,    1, -100],
            [-100,    7,    8,    1]])
    """
    joined = {}
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = [*batch[f"chosen_{name}"], *batch[f"rejected_{name}"]]
        joined[name] = pad_rows(rows, value)
    return joined
