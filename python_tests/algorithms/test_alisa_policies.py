"""The relatives of ALISA on the same state, against their authors' code; amounts; bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tokcore.algorithms.alisa import (
    LayerState,
    Policy,
    alisa,
    dense,
    h2o,
    local_window,
    state,
    streaming_llm,
    strided,
    tova,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INPUTS = dict(np.load(GOLDEN / "alisa_cmp_h2o_official.npz"))
PROMPT = int(INPUTS["prefill_len"])


def load(name):
    return dict(np.load(GOLDEN / f"alisa_cmp_{name}_official.npz"))


def steps(layer, dtype=torch.float64):
    """The peers' common inputs: 32 prompt tokens, 20 steps; yields step number and output."""
    q, k, v = (torch.from_numpy(INPUTS[x]).to(dtype) for x in "qkv")
    layer.attend(*(x[:, :, :PROMPT] for x in (q, k, v)))
    for t in range(PROMPT, q.shape[2]):
        yield t - PROMPT, layer.attend(*(x[:, :, t : t + 1] for x in (q, k, v)))


def read(layer, s=0, b=0):
    """Positions that the last step read."""
    slots = layer.index[b, s, : layer.selected[b, s]].long()
    return layer.position[b, s, slots].tolist()


# A peer's kept_after[i] is what it holds after the prompt and i steps: what step i reads, but for
# its own token, which is appended first.


@pytest.mark.parametrize("slack", [1, 64])
def test_h2o_reads_what_the_official_cache_holds(slack, monkeypatch):
    monkeypatch.setattr(state, "SLACK", slack)
    golden = load("h2o")
    layer = LayerState(h2o(int(golden["hh_size"]), int(golden["recent_size"])), shared=False)
    for i, out in steps(layer):
        for s in range(4):
            assert read(layer, s)[:-1] == sorted(golden["kept_after"][i, s].tolist())
        # theirs is float32 throughout: D products and 17 terms of size max |v| are rounded
        rounding = (16 + 17) * np.finfo(np.float32).eps * np.abs(INPUTS["v"]).max()
        np.testing.assert_allclose(out[0, :, 0].numpy(), golden["out"][i], rtol=0, atol=rounding)
    assert int(layer.count.max()) <= 17 + slack


@pytest.mark.parametrize("slack", [1, 64])
def test_tova_reads_what_the_official_cache_holds(slack, monkeypatch):
    monkeypatch.setattr(state, "SLACK", slack)
    golden = load("tova")
    layer = LayerState(tova(int(golden["cache_size"])))
    for i, _ in steps(layer):
        assert read(layer)[:-1] == sorted(golden["kept_after"][i].tolist())


def test_streaming_llm_reads_what_the_official_cache_holds():
    golden = load("streamingllm")
    policy = streaming_llm(int(golden["start_size"]), int(golden["recent_size"]))
    layer = LayerState(policy)
    for i, _ in steps(layer):
        assert read(layer)[:-1] == golden["kept_after"][i].tolist()


def test_local_window_reads_the_latest():
    for policy, last in ((local_window(0.25), None), (local_window(budget=7), 7)):
        layer = LayerState(policy)
        for i, _ in steps(layer):
            n = PROMPT + i + 1
            assert read(layer) == list(range(n - (last or (n + 2) // 4), n))


def test_strided_reads_fixed_columns_and_the_latest():
    layer = LayerState(strided(0.5))  # every third token, and a quarter of n
    for i, _ in steps(layer):
        n = PROMPT + i + 1
        local = (n + 2) // 4
        assert read(layer) == [p for p in range(n) if p >= n - local or p % 3 == 0]


def test_dense_reads_everything():
    layer = LayerState(dense())
    q, k, v = (torch.from_numpy(INPUTS[x]).double() for x in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for i, out in steps(layer):
        torch.testing.assert_close(out[:, :, 0], want[:, :, PROMPT + i], rtol=0, atol=1e-14)


# ---- amounts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_alisa_reads_twice_k_tokens(ratio):
    n = torch.arange(1, 400, dtype=torch.int32)
    local, top = alisa(ratio).amounts(n)
    k = [max(1, int(np.floor(m * ratio / 2 + 0.5))) for m in n.tolist()]
    assert local.tolist() == [min(x, m) for x, m in zip(k, n.tolist(), strict=True)]
    assert (local + top).tolist() == [min(2 * x, m) for x, m in zip(k, n.tolist(), strict=True)]


def test_amounts_of_the_knobs():
    n = torch.tensor([5, 100], dtype=torch.int32)
    cases = [
        (alisa(budget=20), [5, 10], [0, 10]),
        (alisa(budget=20, local_fraction=0.25, sinks=4), [5, 5], [0, 11]),
        (alisa(0.2, local_fraction=1.0), [1, 20], [0, 0]),
        (alisa(0.2, local_fraction=0.0), [1, 1], [1, 20]),
        (alisa(0.2, sinks=4), [1, 10], [0, 6]),
        (alisa(1.0, local_fraction=0), [1, 1], [4, 99]),
    ]
    for policy, local, top in cases:
        assert [x.tolist() for x in policy.amounts(n)] == [local, top], policy


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("local_fraction", [0.3, 0.5, 1.0])
def test_the_local_tokens_were_local_before(ratio, local_fraction):
    """Or a step would want tokens that were dropped when they fell out of the window."""
    n = torch.arange(1, 2000, dtype=torch.int32)
    local, _ = alisa(ratio, local_fraction=local_fraction).amounts(n)
    assert bool((torch.diff(n - local) >= 0).all())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: alisa(0.0), ValueError, r"alisa: ratio must lie in \(0, 1\], got 0.0"),
        (lambda: alisa(1.5), ValueError, r"ratio must lie in \(0, 1\], got 1.5"),
        (lambda: alisa(-0.1), ValueError, "ratio must lie"),
        (lambda: alisa(float("nan")), ValueError, "ratio must lie"),
        (lambda: alisa("half"), TypeError, "ratio must be a number, got 'half'"),
        (lambda: alisa(True), TypeError, "ratio must be a number"),
        (lambda: alisa(), ValueError, "give ratio or budget, got None and None"),
        (lambda: alisa(0.2, budget=3), ValueError, "give ratio or budget"),
        (lambda: alisa(budget=0), ValueError, "budget must be at least 1, got 0"),
        (lambda: alisa(budget=2.0), TypeError, "budget must be an int, got 2.0"),
        (lambda: alisa(0.2, window=0), ValueError, "window must be at least 1, got 0"),
        (lambda: alisa(0.2, sinks=-1), ValueError, "sinks must be at least 0, got -1"),
        (lambda: alisa(0.2, reselect_every=0), ValueError, "reselect_every must be at least 1"),
        (lambda: alisa(0.2, local_fraction=2), ValueError, r"local_fraction must lie in \[0, 1\]"),
        (lambda: h2o(-1, 2), ValueError, "h2o: heavy must be at least 0"),
        (lambda: tova(0), ValueError, "tova: size must be at least 1"),
        (lambda: streaming_llm(4, 1.5), TypeError, "streaming_llm: recent must be an int"),
        (lambda: strided(0), ValueError, "strided: ratio must lie"),
        (lambda: local_window(), ValueError, "local_window: give ratio or budget"),
        (lambda: LayerState(h2o(2, 2), evict=False), ValueError, "evict must be True"),
    ],
)
def test_bad_policies(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_policies_are_values():
    assert alisa(0.2) == alisa(0.2)
    assert len({alisa(0.2), alisa(0.2), alisa(0.3)}) == 2
    assert isinstance(tova(3), Policy)
