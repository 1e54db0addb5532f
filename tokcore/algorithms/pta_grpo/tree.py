"""The z continuations of a plan behind one copy of their prefix, prompt and plan, in one row.

A row of the packed batch, for one plan with two continuations (p prompt, t plan, a and b the
continuations), and what each token sees:

    input_ids       p p t t a a a b b
    position_ids    0 1 2 3 4 5 6 4 5
    target            t t a . . . . .      the last t predicts the first a and the first b: two
                          b                targets at one position; the last a and b predict nothing

    attention       p  x . . . . . . . .
                    p  x x . . . . . . .
                    t  x x x . . . . . .
                    t  x x x x . . . . .
                    a  x x x x x . . . .
                    a  x x x x x x . . .
                    a  x x x x x x x . .
                    b  x x x x . . . x .
                    b  x x x x . . . x x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokcore.masking import pad_rows
from tokcore.ops import token_logprob

Ids = Sequence[int] | Tensor
_IGNORED = -100


class PlanTree(NamedTuple):
    """B trees in rows of L tokens, and where the tokens of their N responses are in them.

    The responses are those of the first tree, then those of the second, ...; a response is the
    tokens of its plan and of its continuation. T is the length of the longest, K the most
    continuations of a tree.
    """

    input_ids: Tensor  # (B, L) int64
    position_ids: Tensor  # (B, L) int64: every continuation goes on where the prefix ends
    attention_mask: Tensor  # (B, 1, L, L) bool, True = the row's token sees the column's
    target: Tensor  # (B, L, K) int64, of token_logprob; -100 where nothing is predicted
    index: Tensor  # (N, T) int64, into the flattened (B, L, K)
    mask: Tensor  # (N, T) bool, True = a token of the response
    tokens: int  # that go through the model, without padding
    tokens_saved: int  # that would as well, if each response had a copy of its prefix

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """The attention mask as a float to add to the scores: 0, or the least finite number.

        transformers hands a 4-D mask on as it is: "sdpa" attention takes a bool one, but "eager"
        adds it, and would add True as 1.
        """
        zeros = torch.zeros_like(self.attention_mask, dtype=dtype)
        return zeros.masked_fill(~self.attention_mask, torch.finfo(dtype).min)

    def to(self, device: torch.device | str) -> PlanTree:
        return PlanTree(*(f.to(device) if isinstance(f, Tensor) else f for f in self))


def pack_tree(
    prompts: Sequence[Ids],
    plans: Sequence[Ids],
    continuations: Sequence[Sequence[Ids]],
    *,
    pad_id: int = 0,
) -> PlanTree:
    """Pack plans with their continuations, each plan behind one copy of its prompt.

    Equivalent, for loss and gradients, to one row ``[*prompt, *plan, *continuation]`` for each
    continuation, for any model whose attention takes a 4-D mask and whose positions are
    ``position_ids``: a token sees its prefix and its own continuation only, at the same positions.
    One copy of the prefix saves (z - 1) (prompt + plan) tokens of every tree.

    Args:
        prompts: B sequences of ids, each of one token at least: what the first token of a plan (or
            of a continuation) is predicted from.
        plans: B sequences of ids, their closing tag included. An empty plan leaves plain GRPO with
            a shared prompt.
        continuations: for each plan the ids of its z >= 1 continuations, each of one token at
            least. z may differ from plan to plan.
        pad_id: what fills up the shorter rows; no token of a tree sees it, nothing is predicted
            from it.
    Returns:
        PlanTree, on the CPU. Feed a model of transformers with ``model(input_ids=tree.input_ids,
        attention_mask=tree.additive_mask(model.dtype), position_ids=tree.position_ids,
        use_cache=False)`` and give its logits to ``tree_logprob``.
    Raises:
        ValueError: a named error for lists of different lengths, an empty prompt or continuation,
            a plan without continuations.

    >>> tree = pack_tree([[1, 2]], [[3, 4]], [[[5, 6, 7], [8, 9]]])
    >>> tree.input_ids, tree.position_ids
    (tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5]]))
    >>> tree.tokens, tree.tokens_saved
    (9, 4)

    Source: arXiv 2510.01833, section 3.2 (z continuations of each plan); the packing is ours.
    """
    _check("pack_tree", prompts, plans, continuations)
    trees = list(zip(prompts, plans, continuations, strict=True))
    prefixes = [len(prompt) + len(plan) for prompt, plan, _ in trees]
    tokens = [p + sum(map(len, tree[2])) for p, tree in zip(prefixes, trees, strict=True)]
    shape, targets = (len(trees), max(tokens)), max(map(len, continuations))
    input_ids, position_ids = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    # 0 in the prefix, then the number of the continuation. Padding, at the end, counts as prefix:
    # nothing comes after it to see it, and its own rows of the mask are not empty.
    branch = torch.zeros_like(input_ids)
    target = torch.full((*shape, targets), _IGNORED)
    places = torch.arange(target.numel()).view(target.shape)
    rows = []
    for b, (prompt, plan, several) in enumerate(trees):
        prefix, ids = prefixes[b], torch.cat([_ids(prompt), _ids(plan)])
        input_ids[b, :prefix], position_ids[b, :prefix] = ids, torch.arange(prefix)
        target[b, len(prompt) - 1 : prefix - 1, 0] = ids[len(prompt) :]
        of_plan = places[b, len(prompt) - 1 : prefix - 1, 0]
        start = prefix
        for k, one in enumerate(several):
            end, ids = start + len(one), _ids(one)
            input_ids[b, start:end] = ids
            position_ids[b, start:end] = torch.arange(prefix, prefix + len(one))
            branch[b, start:end] = k + 1
            target[b, prefix - 1, k], target[b, start : end - 1, 0] = ids[0], ids[1:]
            first, others = places[b, prefix - 1, k], places[b, start : end - 1, 0]
            rows.append(torch.cat([of_plan, first[None], others]))
            start = end
    sees = (branch.unsqueeze(1) == branch.unsqueeze(2)) | (branch.unsqueeze(1) == 0)
    index = pad_rows(rows, -1)
    return PlanTree(
        input_ids,
        position_ids,
        sees.tril().unsqueeze(1),
        target,
        index.clamp(min=0),
        index >= 0,
        tokens=sum(tokens),
        tokens_saved=sum(p * (len(tree[2]) - 1) for p, tree in zip(prefixes, trees, strict=True)),
    )


def tree_logprob(
    logits: Tensor,
    tree: PlanTree,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probabilities of the responses' tokens, from the logits of their trees.

    Equivalent to ``token_logprob`` of z rows that repeat the prefix, cut to the responses; those of
    a plan stand in z rows, the same numbers. The loss takes them z times because a plan has z
    advantages: the ratio of a plan token is one, but where the clip cuts it depends on the sign of
    each advantage, so that the z clipped terms are summed, and not the advantages before one clip.
    The gradients of the z copies are added up where they were gathered.

    The last token of a prefix predicts the first token of every continuation. It is given these z
    targets at once (K targets a row in ``token_logprob``), so that the vocabulary of each position
    is read once, and no row of the logits is copied.

    Args:
        logits: (B, L, V) of the model on the tree. Differentiable.
        tree: of ``pack_tree``, on the device of the logits.
        temperature: that of the sampling. Default 1, the paper's.
        inplace_backward: overwrite logits with their gradient; saves one (B, L, V) tensor.
    Returns:
        (N, T), float32 (float64 for double), 0 outside tree.mask: row n holds the plan and the
        continuation of response n, for ``pta_grpo_loss_from_tokens(..., tree.mask, advantages)``.
        Responses of a rollout, padded on the right, lie in the same way.
    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    >>> tree = pack_tree([[1]], [[2]], [[[3], [4, 5]]])
    >>> logprob = tree_logprob(torch.zeros(1, 5, 8), tree)  # -ln 8, of two and of three tokens
    >>> logprob
    tensor([[-2.0794, -2.0794,  0.0000],
            [-2.0794, -2.0794, -2.0794]])
    """
    if logits.dim() != 3 or logits.shape[:-1] != tree.input_ids.shape:
        raise ValueError(
            f"tree_logprob: logits must be (B, L, V) with (B, L) = {tuple(tree.input_ids.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    logprob = token_logprob(
        logits,
        tree.target,
        temperature=temperature,
        ignore_index=_IGNORED,
        inplace_backward=inplace_backward,
    )
    return torch.where(tree.mask, logprob.flatten()[tree.index], 0.0)


def _ids(ids: Ids) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64, device="cpu")


def _check(name: str, prompts, plans, continuations) -> None:
    if not 0 < len(prompts) == len(plans) == len(continuations):
        raise ValueError(
            f"{name}: prompts, plans and continuations must be of one number, positive, got "
            f"{len(prompts)}, {len(plans)} and {len(continuations)}"
        )
    for b, (prompt, several) in enumerate(zip(prompts, continuations, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"{name}: prompts[{b}] must hold one token at least, got none")
        if len(several) == 0:
            raise ValueError(f"{name}: continuations[{b}] must be one at least, got none")
        for k, one in enumerate(several):
            if len(one) == 0:
                raise ValueError(
                    f"{name}: continuations[{b}][{k}] must hold one token at least, got none"
                )
