"""What is timed beside the operators on a key-value cache leaves the same state."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind an installed tokcore

from benchmarks import bars  # noqa: E402
from benchmarks.suite import suites  # noqa: E402

CPU = torch.device("cpu")
SUITES = suites()


def results(name, dtype=torch.float32, keep=lambda inputs: None):
    """variant -> what it returned, and what `keep` takes of its own inputs afterwards."""
    suite, found = SUITES[name], {}
    for variant in suite.variants(dtype, CPU):
        inputs = suite.inputs(suite.tiny, dtype, CPU)
        for _ in range(3):  # what a call leaves must not change what the next one does
            output = variant.function(*inputs)
        found[variant.name] = output, keep(inputs)
    return found


@pytest.mark.parametrize("name", ["window_select", "window_select_heads"])
def test_selections(name):
    """Ties are possible at 0 alone, which is below what is taken."""
    found = results(name)
    want = found.pop("tokcore")[0]
    assert want.shape[-1] == 20
    for index, _ in found.values():
        assert torch.equal(index.int(), want)


def test_sums():
    """Sums of weights, the ring, and the last step; a running sum has residues."""
    found = results("window_scores_update", keep=lambda inputs: (inputs[1], inputs[2]))
    score, (ring, last) = found.pop("tokcore")
    want = score.double() / 2.0**40
    assert torch.equal(want, (ring.double() * 2.0**40).round().sum(2) / 2.0**40)
    del found["tokcore, one thread"]
    assert len(found) == 2
    for weights, (other_ring, other_last) in found.values():
        torch.testing.assert_close(weights.double(), want, rtol=1e-4, atol=1e-6)
        assert torch.equal(other_ring, ring)
        assert torch.equal(other_last, last)


@pytest.mark.parametrize("name", ["kv_append", "kv_append_prompt", "kv_append_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_appended(name, dtype):
    found = results(name, dtype, keep=lambda inputs: (*inputs[2:4], inputs[7]))
    want, (position, last, pairs) = found.pop("tokcore")
    del found["tokcore, one thread"]
    for variant, (stored, (other_position, other_last, other_pairs)) in found.items():
        if variant == "torch cat":
            assert torch.equal(torch.stack(stored), want)
            continue
        assert torch.equal(other_position, position)
        assert torch.equal(other_last, last)
        if pairs is None:
            assert torch.equal(stored, want)
        else:
            torch.testing.assert_close(other_pairs, pairs)
            assert (stored.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compacted(dtype):
    """The first call: later ones find moved keys under the same marks."""
    suite = SUITES["kv_compact"]
    inputs, others = (suite.inputs(suite.tiny, dtype, CPU) for _ in range(2))
    names = [variant.name for variant in suite.variants(dtype, CPU)]
    tokcore, _, gather = (variant.function for variant in suite.variants(dtype, CPU))
    assert names[0] == "tokcore"
    assert names[2] == "torch gather"
    moved = gather(*others)
    stored = tokcore(*inputs)
    _, position, score, ring, last, *_ = inputs
    n = moved[0].shape[2]
    assert n == 30
    for got, want in zip((*stored, position, score, last), moved[:-1], strict=True):
        kept = got[:, :, :n] if got.dim() == 4 else got[..., :n]
        assert torch.equal(kept, want)
    assert torch.equal(ring[..., :n], moved[-1])


def test_bars_of_a_cache():
    """A share of the read stream, for the suites that have a bar and where the floor was run."""

    def document(suite, dtype, **row):
        group = {"variants": {"tokcore": {"ms": 1.0, **row}}, "noise": {}}
        key = f"1x4096x1024 {dtype} forward"
        return {"suite": suite, "runs": {"default": {"groups": {key: group}}}}

    found = bars.evaluate(
        [
            document("sparse_decode_attention", "float32", floor_ratio=1.25),
            document("sparse_decode_attention_packed", "bfloat16", floor_ratio=2.0),
            document("sparse_decode_attention_listed", "float32", floor_ratio=2.0),
            document("sparse_decode_attention", "float16", floor_ratio=2.0),
            document("sparse_decode_attention", "bfloat16"),
        ]
    )
    assert [(bar.rule, bar.value, bar.limit, bar.passed) for bar in found] == [
        ("share of the read stream", 0.8, 0.7, True),
        ("share of the read stream", 0.5, 0.6, False),
    ]
