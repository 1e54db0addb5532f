"""Edit alignment of integer sequences, with ties resolved as tercom does."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokcore import _checks, _library


class EditAlign(NamedTuple):
    """distance (...), operations (..., H + R), count (...), hypothesis_tags (..., H) and
    gap_counts (..., H + 1); -1 where there is nothing.
    """

    distance: Tensor
    operations: Tensor
    count: Tensor
    hypothesis_tags: Tensor
    gap_counts: Tensor


def edit_align(
    hypothesis: Tensor,
    reference: Tensor,
    hypothesis_lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
) -> EditAlign:
    r"""The fewest insertions, deletions and substitutions between pairs of sequences, and which.

    Equivalent to filling, for each pair, with i tokens of the reference and j of the hypothesis,

    .. math::
        S_{ij} = \min(S_{i-1,j-1} + [r_i \ne h_j],\; S_{i,j-1} + 1,\; S_{i-1,j} + 1)

    and walking back from the end, where several of the three are least the first of them: tokens
    are aligned, else the hypothesis' token is extra, else the reference's token is missing. This is
    the tie rule of tercom, on which the OK/BAD tags of machine translation rest; without shifts and
    without its beam (`tokcore.text.ter` has both), which changes nothing up to a distance of 20 and
    beyond has been seen to matter only where the lengths differ by more than 20. An instruction
    fills 32 or 64 cells; 2 bits are kept of each.

    Args:
        hypothesis: (..., H) int64 or int32 ids: any integers, negative ones too.
        reference: (..., R), the same leading dimensions; int64 or int32.
        hypothesis_lengths, reference_lengths: (...) int64 or int32 in [0, H] and [0, R]: how many
            ids of each sequence count. Default: all.

    Returns:
        EditAlign of

        - distance (...) int32;
        - operations (..., H + R) int8, from the start: 0 match, 1 substitution, 2 insertion (an
          extra token of the hypothesis), 3 deletion (a missing token of the reference); then -1;
        - count (...) int32, how many operations there are;
        - hypothesis_tags (..., H) int8, the operation of each token of the hypothesis: 0, 1 or 2;
        - gap_counts (..., H + 1) int32, how many tokens are missing before each token of the
          hypothesis, and after its last one at position hypothesis_length.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device.
        RuntimeError: on the CPU, a length out of range. On CUDA all outputs of that pair are -1.

    Not differentiable. On CUDA one launch, int64 lengths given.

    >>> a, b = torch.tensor([[1, 2, 9, 3]]), torch.tensor([[1, 3, 4]])  # 2 for 3, 9 for 4, 3 extra
    >>> result = edit_align(a, b)
    >>> result.distance, result.operations
    (tensor([3], dtype=torch.int32), tensor([[ 0,  2,  1,  1, -1, -1, -1]], dtype=torch.int8))
    >>> edit_align(torch.tensor([5, 6]), torch.tensor([4, 5, 7, 6])).gap_counts
    tensor([1, 1, 0], dtype=torch.int32)

    Source: jhclark/tercom:src/ter/core/TerScorer.java (the tie rule); M. Snover et al., A Study of
    Translation Edit Rate with Targeted Human Annotation, AMTA 2006; H. Hyyrö, A Bit-Vector
    Algorithm for Computing Levenshtein and Damerau Edit Distances, 2003.
    """
    op = "edit_align"
    for name, value in (("hypothesis", hypothesis), ("reference", reference)):
        _checks.integers(op, name, value)
        if value.dim() == 0:
            raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")
    pairs = hypothesis.shape[:-1]
    if reference.shape[:-1] != pairs or reference.device != hypothesis.device:
        raise ValueError(
            f"{op}: reference must have shape ({', '.join(map(str, (*pairs, 'R')))}) on "
            f"{hypothesis.device} (nothing is broadcast), got {tuple(reference.shape)} on "
            f"{reference.device}"
        )
    if hypothesis_lengths is not None:
        _lengths(op, "hypothesis_lengths", hypothesis_lengths, hypothesis)
    if reference_lengths is not None:
        _lengths(op, "reference_lengths", reference_lengths, reference)
    arguments = (hypothesis, reference, hypothesis_lengths, reference_lengths)
    return EditAlign(*_library.call_constant("edit_align", *arguments))


def _lengths(op: str, name: str, value: Tensor, like: Tensor) -> None:
    _checks.lengths(op, name, value, like, batch=like.dim() - 1, most=like.shape[-1])


def _reference(
    hypothesis: Tensor, reference: Tensor, hypothesis_length: int, reference_length: int
) -> list[int]:
    """The operations of one pair, cell by cell."""
    h = hypothesis[:hypothesis_length].tolist()
    r = reference[:reference_length].tolist()
    cost = [[i + j for j in range(len(h) + 1)] for i in range(len(r) + 1)]
    for i in range(1, len(r) + 1):
        for j in range(1, len(h) + 1):
            aligned = cost[i - 1][j - 1] + (r[i - 1] != h[j - 1])
            cost[i][j] = min(aligned, cost[i][j - 1] + 1, cost[i - 1][j] + 1)
    i, j, operations = len(r), len(h), []
    while i > 0 or j > 0:
        same = i > 0 and j > 0 and r[i - 1] == h[j - 1]
        if i > 0 and j > 0 and cost[i][j] == cost[i - 1][j - 1] + (not same):
            operations.append(0 if same else 1)
            i, j = i - 1, j - 1
        elif j > 0 and cost[i][j] == cost[i][j - 1] + 1:
            operations.append(2)
            j -= 1
        else:
            operations.append(3)
            i -= 1
    return operations[::-1]


def _fake(hypothesis, reference, hypothesis_lengths, reference_lengths):
    pairs, columns = hypothesis.shape[:-1], hypothesis.shape[-1]

    def new(*shape, dtype):
        return hypothesis.new_empty((*pairs, *shape), dtype=dtype)

    return (
        new(dtype=torch.int32),
        new(columns + reference.shape[-1], dtype=torch.int8),
        new(dtype=torch.int32),
        new(columns, dtype=torch.int8),
        new(columns + 1, dtype=torch.int32),
    )


_library.register_operator("edit_align", fake=_fake)
