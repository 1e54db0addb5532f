"""Edit alignments by hand, against every script there is, and against the cells one by one."""

import os
import subprocess
import sys
from importlib import import_module
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokcore.ops import EditAlign, edit_align

_reference = import_module("tokcore.ops.edit_align")._reference
M, S, I, D = range(4)  # noqa: E741 (the letters of tercom)


def ids(backend, *values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=backend.device)


def expected(operations, columns: int, rows: int) -> EditAlign:
    """What one pair gets, from its operations."""
    tags = [operation for operation in operations if operation != D]
    gaps = [0]
    for operation in operations:
        if operation == D:
            gaps[-1] += 1
        else:
            gaps.append(0)
    return EditAlign(
        sum(operation != M for operation in operations),
        [*operations, *[-1] * (columns + rows - len(operations))],
        len(operations),
        [*tags, *[-1] * (columns - len(tags))],
        [*gaps, *[-1] * (columns + 1 - len(gaps))],
    )


def assert_pair(result: EditAlign, pair: int, operations, columns: int, rows: int) -> None:
    want = expected(operations, columns, rows)
    for name, got, value in zip(EditAlign._fields, result, want, strict=True):
        assert got[pair].tolist() == value, (name, pair)


def assert_cells(hypothesis, reference, hypothesis_lengths=None, reference_lengths=None):
    result = edit_align(hypothesis, reference, hypothesis_lengths, reference_lengths)
    columns, rows = hypothesis.shape[-1], reference.shape[-1]
    for pair in range(len(hypothesis)):
        lengths = [
            size if given_ is None else int(given_[pair])
            for size, given_ in ((columns, hypothesis_lengths), (rows, reference_lengths))
        ]
        operations = _reference(hypothesis[pair].cpu(), reference[pair].cpu(), *lengths)
        assert_pair(result, pair, operations, columns, rows)
    return result


# ---- by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypothesis", "reference", "operations"),
    [
        ([], [], []),
        ([], [7, 8], [D, D]),
        ([7, 8], [], [I, I]),
        ([7], [7], [M]),
        ([7], [8], [S]),
        ([1, 2, 3], [1, 2, 3], [M, M, M]),
        ([1, 2, 3], [1, 3], [M, I, M]),
        ([1, 3], [1, 2, 3], [M, D, M]),
        # one of two equal words is extra: read from the end, the last one is aligned
        ([5, 5], [5], [I, M]),
        ([5], [5, 5], [D, M]),
        # swapped: two substitutions rather than an insertion and a deletion
        ([1, 2], [2, 1], [S, S]),
        # 9 is extra or stands for 3: aligned first, so 4 | 9
        ([1, 2, 9, 3], [1, 3, 4], [M, I, S, S]),
        ([1, 2, 3, 4, 5], [6, 1, 2, 4, 5, 7], [D, M, M, I, M, M, D]),
        ([3, 1], [1, 2, 3], [D, S, S]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_by_hand(backend, hypothesis, reference, operations, dtype):
    result = edit_align(ids(backend, hypothesis, dtype=dtype), ids(backend, reference, dtype=dtype))
    assert_pair(result, 0, operations, len(hypothesis), len(reference))
    assert [value.dtype for value in result] == [
        torch.int32,
        torch.int8,
        torch.int32,
        torch.int8,
        torch.int32,
    ]


def test_lengths_cut_what_is_padding(backend):
    hypothesis, reference = ids(backend, [1, 2, 0, 0], [4, 0, 0, 0]), ids(backend, [1, 0], [4, 0])
    result = edit_align(hypothesis, reference, ids(backend, 2, 0), ids(backend, 1, 2))
    assert_pair(result, 0, [M, I], 4, 2)
    assert_pair(result, 1, [D, D], 4, 2)


def test_any_integers_are_ids(backend):
    least, most = -(2**63), 2**63 - 1
    hypothesis = ids(backend, [least, -1, 0, most, 2**32])
    reference = ids(backend, [least, 0, most, 0])
    assert_pair(edit_align(hypothesis, reference), 0, [M, I, M, M, S], 5, 4)


def test_ids_of_both_widths_mix(backend):
    wide, narrow = ids(backend, [1, 2**32 + 2, -3]), ids(backend, [1, 2, -3], dtype=torch.int32)
    assert_pair(edit_align(wide, narrow), 0, [M, S, M], 3, 3)
    assert_pair(edit_align(narrow, wide), 0, [M, S, M], 3, 3)


# ---- every script ---------------------------------------------------------------------------


def scripts(hypothesis, reference):
    """All of them, as lists of operations from the start."""
    if not hypothesis and not reference:
        yield []
    if hypothesis and reference:
        last = M if hypothesis[-1] == reference[-1] else S
        yield from ([*s, last] for s in scripts(hypothesis[:-1], reference[:-1]))
    if hypothesis:
        yield from ([*s, I] for s in scripts(hypothesis[:-1], reference))
    if reference:
        yield from ([*s, D] for s in scripts(hypothesis, reference[:-1]))


def test_the_least_script_and_among_equals_the_first_from_the_end(backend):
    """Aligned before extra before missing: the operation numbers in this order, read backwards."""
    most = 3 if backend.name == "emulated" else 4
    pairs, want = [], []
    for columns, rows in product(range(most + 1), repeat=2):
        for tokens in product(range(2), repeat=columns + rows):
            hypothesis, reference = tokens[:columns], tokens[columns:]
            everything = list(scripts(hypothesis, reference))

            def rank(script):
                return sum(o != M for o in script), [max(o, S) for o in reversed(script)]

            pairs.append((hypothesis, reference))
            want.append(min(everything, key=rank))

    def padded(sequences):
        return ids(backend, *[[*s, *[0] * (most - len(s))] for s in sequences])

    hypotheses, references = zip(*pairs, strict=True)
    lengths = [ids(backend, *map(len, sequences)) for sequences in (hypotheses, references)]
    result = edit_align(padded(hypotheses), padded(references), *lengths)
    for pair, operations in enumerate(want):
        assert_pair(result, pair, operations, most, most)


# ---- against the cells ----------------------------------------------------------------------


@st.composite
def batches(draw):
    size = st.integers(0, 12)
    pairs, columns, rows = draw(st.integers(0, 5)), draw(size), draw(size)
    token = st.integers(-1, draw(st.integers(0, 3)))
    take = [draw(st.lists(st.integers(0, most), min_size=pairs, max_size=pairs))
            for most in (columns, rows)]  # fmt: skip
    ids_ = [
        [draw(st.lists(token, min_size=width, max_size=width)) for _ in range(pairs)]
        for width in (columns, rows)
    ]
    return ids_, take, (columns, rows)


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batches(), st.booleans(), st.booleans())
def test_ragged_batches(backend, batch, narrow, cut):
    tokens, lengths, widths = batch
    dtype = torch.int32 if narrow else torch.int64
    sequences = [
        torch.tensor(t, dtype=dtype, device=backend.device).reshape(len(lengths[0]), width)
        for t, width in zip(tokens, widths, strict=True)
    ]
    taken = [torch.tensor(t, dtype=dtype, device=backend.device) for t in lengths]
    assert_cells(*sequences, *(taken if cut else ()))


@pytest.mark.parametrize(
    ("columns", "rows"),
    [(1, 1), (5, 31), (5, 32), (5, 33), (6, 63), (6, 64), (6, 65), (70, 3), (33, 34), (3, 129),
     (40, 70)],
)  # fmt: skip
@pytest.mark.parametrize("vocabulary", [2, 30])
def test_sizes_around_words_of_bits(backend, columns, rows, vocabulary):
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    sequences = [
        torch.randint(vocabulary, (2, size), generator=generator).to(backend.device)
        for size in (columns, rows)
    ]
    assert_cells(*sequences)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 1100])
def test_more_rows_than_a_warp_holds(backend, rows):
    """32 lanes of 32 rows: beyond, the carries of a stripe go through memory to the next."""
    generator = torch.Generator().manual_seed(rows)
    sequences = [torch.randint(3, (1, size), generator=generator) for size in (3, rows)]
    assert_cells(*[sequence.to(backend.device) for sequence in sequences])


def test_carries_go_both_ways_between_stripes(backend):
    """A prefix far down in the reference: falling carries across row 1024."""
    reference = torch.arange(1060)
    hypothesis = torch.cat([reference[1000:1040], reference[:2]])
    assert_cells(hypothesis[None].to(backend.device), reference[None].to(backend.device))


def test_long_sequences(backend):
    backend.skip_above(2 * 500)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(5, (1, 300), generator=generator)
    hypothesis = torch.cat([reference[:, 40:], reference[:, :60]], 1)
    assert_cells(hypothesis.to(backend.device), reference.to(backend.device))


def test_hundreds_of_tokens_that_share_their_upper_bits(backend):
    """What a table of tokens would confuse: multiples of a large power of two."""
    reference = (torch.arange(60) << 56)[None]
    hypothesis = torch.cat([reference[:, 1::2], reference[:, ::3] + 1], 1)
    assert_cells(hypothesis.to(backend.device), reference.to(backend.device))


def test_pairs_do_not_see_each_other(backend):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(3, (9, 8), generator=generator).to(backend.device) for _ in range(2))
    lengths = torch.arange(9, device=backend.device) % 9
    together = edit_align(a, b, lengths, lengths.flip(0))
    for pair in range(9):
        alone = edit_align(a[pair], b[pair], lengths[pair], lengths.flip(0)[pair])
        assert all(torch.equal(x[pair], y) for x, y in zip(together, alone, strict=True))


def test_leading_dimensions_and_strides(backend):
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(3, (4, 3, 2, 5), generator=generator).to(backend.device)
    b = torch.randint(3, (2, 3, 7), generator=generator).to(backend.device)
    got = edit_align(a[:, :, 1].permute(1, 0, 2)[:, ::2], b.transpose(0, 1)[..., 1:])
    want = edit_align(a[::2, :, 1].transpose(0, 1).contiguous(), b[..., 1:].transpose(0, 1).clone())
    assert got.distance.shape == (3, 2)
    assert got.gap_counts.shape == (3, 2, 6)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_empty(backend, shape):
    pairs, columns, rows = shape
    result = edit_align(
        torch.zeros(pairs, columns, dtype=torch.int64, device=backend.device),
        torch.ones(pairs, rows, dtype=torch.int64, device=backend.device),
    )
    assert [tuple(value.shape) for value in result] == [
        (pairs,), (pairs, columns + rows), (pairs,), (pairs, columns), (pairs, columns + 1)
    ]  # fmt: skip
    for pair in range(pairs):
        assert_pair(result, pair, [I] * columns or [D] * rows, columns, rows)


def test_threads_do_not_matter():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(4, (37, 30), generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(edit_align(a, b))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- lengths that are wrong -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 4, 2**40, -(2**62)])
@pytest.mark.parametrize("which", ["hypothesis_lengths", "reference_lengths"])
def test_a_length_out_of_range(backend, which, bad):
    """Raises where a look costs nothing; elsewhere that pair is -1 and the others are right."""
    a = ids(backend, [1, 2, 3], [1, 2, 3], [4, 4, 4])
    lengths = {which: ids(backend, 3, bad, 2)}
    if backend.checks_values:
        text = rf"^edit_align: {which} must lie in \[0, 3\], got {bad} for pair 1"
        with pytest.raises(RuntimeError, match=text):
            edit_align(a, a, **lengths)
        return
    result = edit_align(a, a, **lengths)
    assert_pair(result, 0, [M] * 3, 3, 3)
    assert_pair(result, 2, [I, M, M] if which == "reference_lengths" else [D, M, M], 3, 3)
    assert all((value[1] == -1).all() for value in result)


def test_a_length_out_of_range_raises_in_debug_mode(backend):
    program = f"""
import torch
from tokcore import _library
from tokcore.ops import edit_align
_library.use({"emulated" if backend.name == "emulated" else "native"!r})
a = torch.zeros(1, 3, dtype=torch.int64, device={backend.device!r})
edit_align(a, a, reference_lengths=torch.tensor([4], device={backend.device!r}))
"""
    environment = dict(os.environ, TOKCORE_DEBUG="1")
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "edit_align: reference_lengths must lie in [0, 3], got 4" in result.stderr
