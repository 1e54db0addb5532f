"""The alignments that are timed beside tokcore's are alignments, and of the same thing."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed tokcore

from benchmarks import bars, floors, measure, report, run  # noqa: E402
from benchmarks.baselines import dtw as dtw_baselines  # noqa: E402
from benchmarks.baselines import edits as edit_baselines  # noqa: E402
from benchmarks.baselines import monotonic_align as align_baselines  # noqa: E402
from benchmarks.baselines import monotonic_search as search_baselines  # noqa: E402
from benchmarks.baselines.peers import installed  # noqa: E402
from benchmarks.ops.bench_dtw import PEERS  # noqa: E402
from benchmarks.suite import (  # noqa: E402
    BACKWARD,
    FORWARD,
    MATRICES,
    ONE_THREAD,
    SHAPES,
    Call,
    on_one_thread,
    suites,
)
from tokcore.ops import dtw, edit_align, monotonic_align, monotonic_search  # noqa: E402
from tokcore.text import corpus_ter  # noqa: E402

GOLDEN = np.load(Path(__file__).with_name("golden") / "songmass_dp.npz")
CPU = torch.device("cpu")
SUITES = suites()

needs_compiler = pytest.mark.skipif(
    shutil.which(floors.compiler()) is None, reason="the loop is compiled on the spot"
)


def needs(package):
    return pytest.mark.skipif(not installed(package), reason=f"{package} is not installed")


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(len(GOLDEN["names"])), ids=GOLDEN["names"].tolist())
def test_authors_alignment_golden(k):
    scores = torch.from_numpy(GOLDEN[f"S_{k}"]).unsqueeze(0)
    ((score, groups),) = align_baselines.authors(scores, GOLDEN[f"len_pen_{k}"].item())
    assert score == GOLDEN[f"score_{k}"]
    assert np.array_equal(groups, GOLDEN[f"groups_{k}"])


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 6), (3, 6, 1), (5, 9, 13), (2, 31, 17)])
@pytest.mark.parametrize("levels", [4, 1 << 40])
def test_plain_loop(size, levels):
    """Against tokcore on random scores, and on dyadic ones with ties."""
    generator = torch.Generator().manual_seed(sum(size))
    scores = torch.randint(levels, size, generator=generator).double() / levels
    score, groups, counts = align_baselines.plain_loop(scores)
    expected = monotonic_align(scores)
    assert torch.equal(groups, expected.groups)
    assert torch.equal(counts, expected.group_count)
    torch.testing.assert_close(score, expected.score, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_dtw_peer(name):
    """Paths of the least cost, to the rounding of float32."""
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    suite = SUITES["dtw"]
    inputs = suite.inputs(suite.tiny, torch.float64, CPU)
    found = dtw(inputs[0])
    for cost, total, path in zip(inputs[0], found.cost, PEERS[name](*inputs), strict=True):
        cells = torch.from_numpy(dtw_baselines.cells(path).copy())
        assert cells[0].tolist() == [0, 0]
        assert cells[-1].tolist() == [cost.shape[0] - 1, cost.shape[1] - 1]
        steps = {tuple(step) for step in cells.diff(dim=0).tolist()}
        assert steps <= {(1, 0), (0, 1), (1, 1)}
        sum_along = cost[cells[:, 0], cells[:, 1]].sum()
        torch.testing.assert_close(sum_along, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(search_baselines.cython, marks=needs("monotonic_alignment_search")),
        pytest.param(search_baselines.numpy, marks=needs("monotonic_alignment_search")),
        pytest.param(search_baselines.numba, marks=needs("numba")),
    ],
)
def test_search_peer(function):
    suite = SUITES["monotonic_search"]
    for shape in (suite.tiny, SHAPES["1x30x30"]):
        inputs = suite.inputs(shape, torch.float32, CPU)
        path = function(*(value.clone() for value in inputs))
        assert torch.equal(path.sum(1), torch.ones_like(path[:, 0]))
        assert torch.equal(path.argmax(1), monotonic_search(inputs[0]).rows.long())


@pytest.mark.parametrize("name", ["segment_attention", "sparse_window_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_mask(dtype, name):
    """All against each other but what takes minutes to compile, and the gradients of all inputs."""
    suite = SUITES[name]
    inputs = suite.inputs(suite.tiny, dtype, CPU)
    variants = [v for v in suite.variants(dtype, CPU) if v.kind != "compile"]
    assert len(variants) >= 3
    forward, backward = (
        [Call(variant, suite, inputs, pass_name)() for variant in variants]
        for pass_name in (FORWARD, BACKWARD)
    )
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    assert forward[0].shape == inputs[0].shape[1:]
    for output, (gradient,) in zip(forward[1:], backward[1:], strict=True):
        assert gradient.shape == inputs[0].shape
        torch.testing.assert_close(output, forward[0], **tolerance)
        torch.testing.assert_close(gradient, backward[0][0], **tolerance)


@pytest.mark.parametrize(
    "name",
    [
        *("sparse_decode_attention", "sparse_decode_attention_packed"),
        *("sparse_decode_attention_listed", "prompt_window_scores"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cached_attention_variants(name, dtype):
    suite = SUITES[name]
    inputs = suite.inputs(suite.tiny, dtype, CPU)
    first, *others = (Call(v, suite, inputs, FORWARD)() for v in suite.variants(dtype, CPU))
    wanted = first if isinstance(first, tuple) else (first,)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for other in others:
        found = other if isinstance(other, tuple) else (other,)
        for a, b in zip(found, wanted, strict=False):  # torch's attention gives the output alone
            torch.testing.assert_close(
                a.float().view(b.shape), b.float(), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("size", ["tiny", "64x30x30", "1x60x80"])
def test_edit_distances(size):
    """As many operations as tokcore's, whose tie rule is another."""
    suite = SUITES["edit_align"]
    hypothesis, reference, *others = suite.inputs(suite.shape(size), torch.int64, CPU)
    distance = edit_align(hypothesis, reference).distance.tolist()
    if installed("rapidfuzz"):
        assert [len(found) for found in edit_baselines.rapidfuzz(*others[:2])] == distance
        assert edit_baselines.rapidfuzz_distance(*others[:2]).tolist() == distance
    if installed("jiwer"):
        found = edit_baselines.jiwer(*others[2:])
        assert found.substitutions + found.insertions + found.deletions == sum(distance)


@needs("sacrebleu")
@pytest.mark.parametrize("size", ["tiny", "64x30x30"])
def test_ter_of_the_same_sentences(size):
    suite = SUITES["ter"]
    ids, reference_ids, *texts = suite.inputs(suite.shape(size), torch.int64, CPU)
    ours, theirs = corpus_ter(*texts), edit_baselines.sacrebleu(*texts)
    assert (ours.edits, ours.reference_length) == (theirs.num_edits, theirs.ref_length)
    found = [variant.function(ids, reference_ids, *texts) for variant in suite.variants(None, CPU)]
    assert found[0].alignment == found[1].alignment == found[2].alignment
    assert sum(map(len, found[0].shifts)) >= len(ids)
    assert found[3] == ours


# --- the harness ----------------------------------------------------------------------------------


def test_matrices():
    """As many as there is time for: B M L (M + L) up to 10^10."""
    assert len(MATRICES) == 12
    assert {"1x8x8", "4096x60x80", "64x200x200", "1x500x2000"} <= set(MATRICES)
    assert SHAPES["64x60x80"].steps == 64 * 60 * 80 * 140
    groups = SUITES["dtw"].groups(["llama3", "64x60x80", "tiny"], ["float32", "float64"])
    assert groups == [(shape, "float64", FORWARD) for shape in ("64x60x80", "tiny")]
    assert SUITES["dtw"].shape("tiny") is SUITES["dtw"].tiny


@pytest.mark.parametrize("error", [False, True])
def test_on_one_thread(error):
    threads, seen = torch.get_num_threads(), []

    def function(value):
        seen.append(torch.get_num_threads())
        return 1 / value

    torch.set_num_threads(2)
    if error:
        with pytest.raises(ZeroDivisionError):
            on_one_thread(function)(0)
    else:
        assert on_one_thread(function)(4) == 0.25
    assert (seen, torch.get_num_threads()) == ([1], 2)
    torch.set_num_threads(threads)


@needs_compiler
def test_warm_clock(monkeypatch):
    """Times the second call, unless the first one takes long enough."""
    clock, calls = measure.clock("cpu", warm=True), []
    peak, seconds = clock.peak(lambda: calls.append(torch.ones(1 << 20)))
    assert len(calls) == 2
    assert peak == pytest.approx(2 * calls[0].nbytes, rel=0.05)  # counted in pages
    assert seconds > 0
    monkeypatch.setattr(clock, "LONG", 0.0)
    clock.time(lambda: calls.append(None))
    assert len(calls) == 3


@needs_compiler
def test_too_slow_is_said():
    suite = SUITES["monotonic_align"]
    clock = measure.clock("cpu", suite.warm)
    group = run.run_group(clock, suite, SHAPES["64x30x30"], torch.float64, FORWARD, run.QUICK)
    assert group["variants"]["authors' NumPy"]["error"] == "not measured: a call takes minutes"
    assert "not measured" in report.group_table(group)


def group(rows, columns, peak_mb=1.0, **ms):
    kinds = {"tokcore": "tokcore", ONE_THREAD: "tokcore", "plain loop": "loop", "NumPy": "authors"}
    variants = {
        name: {"kind": kinds.get(name, "peer"), "exact": True, "ms": value, "peak_mb": peak_mb}
        for name, value in ms.items()
    }
    return {"rows": rows, "vocabulary": columns, "noise": {}, "variants": variants}


def documents():
    align = {
        "1x60x80": group(60, 80, **{"tokcore": 0.3, ONE_THREAD: 0.4, "plain loop": 0.5}),
        "64x60x80": group(3840, 80, **{"tokcore": 10, ONE_THREAD: 19, "NumPy": 1900.0}),
    }
    dtw = {
        "64x8x8": group(512, 8, **{"tokcore": 2, ONE_THREAD: 3, "librosa": 4, "tslearn": 1.0}),
        "1x500x2000": group(500, 2000, **{"tokcore": 2, ONE_THREAD: 3}),
        "tiny": group(24, 13, **{"tokcore": 2, ONE_THREAD: 3, "librosa": 1.0}),
    }
    ter = {"64x30x30": group(1920, 30, **{"tokcore": 1, ONE_THREAD: 2, "sacrebleu": 250.0})}
    return [
        {
            "suite": name,
            "runs": {"default": {"groups": {f"{k} {dtype} forward": groups[k] for k in groups}}},
        }
        for name, dtype, groups in (
            ("monotonic_align", "float64", align),
            ("dtw", "float64", dtw),
            ("ter", "int64", ter),
        )
    ]


def test_bars_of_alignments():
    found = bars.evaluate(documents())
    assert [(bar.rule, bar.value, bar.limit, bar.passed) for bar in found] == [
        ("ms on one thread", 0.4, 0.5, True),
        ("one thread, over the plain loop", 1.25, 1.5, False),
        ("all threads, over one", 1.9, 1.8, True),
        ("faster than every package", 0.5, 1.0, False),
        ("peak a cell, bytes", 1.0, 4.0, True),
        ("one thread, over sacrebleu", 125.0, 100.0, True),
    ]


def test_matrix_table():
    lines = report.matrix_table(documents(), MATRICES).splitlines()
    assert len(lines) == 2 + 5
    assert lines[3] == (
        "| monotonic_align | 64 of 60 x 80 | float64 | forward | 10.0 | 19.0 | 1.90 |  | 100.0x "
        "|  |  | 1.0 |"
    )
    assert "| 0.5x | tslearn | 1.0 |" in lines[4]
    assert report.tables(documents(), MATRICES) == "\n".join(lines)
