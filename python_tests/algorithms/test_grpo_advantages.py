"""Advantages against numbers from TRL's own trainers, and where we differ from them.

grpo_trl_advantages.npz: GRPOTrainer's and RLOOTrainer's scoring (TRL 1.10.0.dev0 at f2cd577).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokcore.ops import group_advantage

GOLDEN = Path(__file__).parents[1] / "golden"
ADVANTAGES = np.load(GOLDEN / "grpo_trl_advantages.npz")
ADVANTAGE_CASES = {case["name"]: case for case in json.loads(str(ADVANTAGES["cases_json"]))}
HAZARDS = ("all_equal_1.2", "tiny_spread", "one_group_equal")  # where TRL's float32 is off


def advantage_options(case: dict) -> dict:
    if case["trainer"] == "RLOO":
        return {"center": "leave_one_out", "scale": "none"}
    scale = {"group": "std", "batch": "batch_std", "none": "none"}[case["scale_rewards"]]
    return {"scale": scale, "combine": case["agg"], "weights": case["weights"]}


@pytest.mark.parametrize("name", ADVANTAGE_CASES)
def test_advantages_are_those_of_trl(backend, name):
    case = ADVANTAGE_CASES[name]
    rewards = torch.from_numpy(ADVANTAGES[f"{name}/rewards_per_func"]).to(backend.device)
    expected = ADVANTAGES[f"{name}/advantages"]
    options = advantage_options(case)
    if case.get("clip"):
        rewards = rewards.clamp(*case["clip"])
    found = group_advantage(rewards, case["G"], **options)
    if case.get("normalize"):  # TRL's RLOO whitens over the batch what has another to compare with
        scored = ~rewards.isnan().all(1).view(-1, case["G"])
        compared = (scored & (scored.sum(1, keepdim=True) > 1)).flatten()
        found = group_advantage(torch.where(compared, found, torch.nan), len(found))
    if case["kind"] not in HAZARDS:
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-6, atol=1e-6)
    ids = torch.arange(len(rewards), device=rewards.device) // case["G"]
    if not case.get("normalize"):
        assert torch.equal(group_advantage(rewards, ids, **options), found)
    if case["trainer"] == "GRPO":
        trl = group_advantage(rewards, case["G"], compat="trl", **options).cpu().numpy()
        np.testing.assert_allclose(trl, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, c in ADVANTAGE_CASES.items() if "1.2" in c["kind"]])
def test_equal_rewards_are_exactly_zero_where_trl_has_0_0012(name):
    case = ADVANTAGE_CASES[name]
    rewards = torch.from_numpy(ADVANTAGES[f"{name}/rewards_per_func"])
    assert (group_advantage(rewards, case["G"], **advantage_options(case)) == 0).all()


@pytest.mark.parametrize("name", [n for n, c in ADVANTAGE_CASES.items() if "tiny" in c["kind"]])
def test_tiny_spreads_keep_their_digits(name):
    case = ADVANTAGE_CASES[name]
    rewards = torch.from_numpy(ADVANTAGES[f"{name}/rewards_per_func"])
    options = advantage_options(case)
    found = group_advantage(rewards, case["G"], **options)
    exact = rewards.double().view(-1, case["G"])
    centered = exact - exact.mean(1, keepdim=True)
    if options["scale"] == "batch_std":
        centered = centered / (exact.std() + 1e-4)
    elif options["scale"] == "std":
        centered = centered / (exact.std(1, keepdim=True) + 1e-4)
    if options["combine"] == "normalize_then_sum":
        centered = (centered - centered.mean()) / (centered.std() + 1e-4)
    np.testing.assert_allclose(found.double(), centered.flatten(), rtol=2**-22, atol=1e-12)
