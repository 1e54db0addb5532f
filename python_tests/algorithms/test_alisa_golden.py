"""Sparse window attention against its float64 reference, on the golden files' inputs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tokcore.algorithms.alisa import LayerState, alisa

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = [
    "alisa_mha_shared_r20",
    "alisa_gqa_shared_r50",
    "alisa_gqa_window2_r40",
    "alisa_gqa_leftpad_r30",
    "alisa_prefill_swa_r40",
]
F32 = torch.finfo(torch.float32).eps


def load(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def policy_of(data, **knobs):
    window = int(data["window"])
    return alisa(float(data["ratio"]), window=None if window < 0 else window, **knobs)


def run(data, state, dtype=torch.float64):
    """Feeds prompt and decode steps; yields (step, output, state) after each decode step."""
    q, k, v = (torch.from_numpy(data[x]).to(dtype) for x in "qkv")
    prompt, scale = int(data["prefill_len"]), float(data["scale"])
    pad = torch.from_numpy(data["pad"])
    if str(data["prefill"]) == "dense":
        valid = (prompt - pad).int() if pad.any() else None
        first = [x[:, :, :prompt] for x in (q, k, v)]
        yield -1, state.attend(*first, valid=valid, scale=scale)
        start = prompt
    else:
        start = 0
    for t in range(start, q.shape[2]):
        step = [x[:, :, t : t + 1] for x in (q, k, v)]
        yield t - prompt, state.attend(*step, scale=scale)


def kept_columns(data, state, b, s):
    """Columns of the golden arrays that the last step read."""
    slots = state.index[b, s, : state.selected[b, s]].long()
    return (state.position[b, s, slots] + int(data["pad"][b])).tolist()


# Rows are float32: each weight is off by F32 / 2 at most, a score by that times the heads of a list
# and the rows. No golden margin is near it, so every set is compared.
@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_golden_selections_and_outputs(name, evict):
    data = load(name)
    state = LayerState(policy_of(data), evict=evict)
    batch, lists = data["kept"].shape[1:3]
    assert data["margin"].min() > data["q"].shape[1] * data["q"].shape[2] * F32
    for step, out in run(data, state):
        if step == -1 and "out_prefill" in data and out.shape[2] > 1:
            np.testing.assert_allclose(out.numpy(), data["out_prefill"], rtol=0, atol=1e-13)
        if step < 0:  # in one file the prompt too is read step by step
            if "kept_prefill" in data:
                want = np.flatnonzero(data["kept_prefill"][0, 0, step + int(data["prefill_len"])])
                assert kept_columns(data, state, 0, 0) == want.tolist()
            continue
        np.testing.assert_allclose(out[:, :, 0].numpy(), data["out"][step], rtol=0, atol=1e-13)
        for b in range(batch):
            for s in range(lists):
                want = np.flatnonzero(data["kept"][step, b, s]).tolist()
                assert kept_columns(data, state, b, s) == want


@pytest.mark.parametrize("name", FILES)
def test_golden_live_sets(name):
    """What stays after each step: what has a score in the next, or is local there."""
    data = load(name)
    state = LayerState(policy_of(data))
    for step, _ in run(data, state):
        if step < 0:
            continue
        dropped = copy.deepcopy(state)
        dropped.compact()
        for b, s in np.ndindex(data["kept"].shape[1:3]):
            live = dropped.position[b, s, : dropped.count[b, s]] + int(data["pad"][b])
            assert live.tolist() == np.flatnonzero(data["live_after"][step, b, s]).tolist()
