"""The replay of ALISA's schedules beside exact eviction, and whole decode steps, on small cases."""

import pytest
import torch

from benchmarks import alisa_decode, alisa_schedule


def test_every_way_gives_the_output_of_one_tier():
    found = alisa_schedule.run(alisa_schedule.Case(prompt=40, steps=60, ratio=0.3, window=8))
    assert found["steps_until_the_prompt_dies"] == 8
    ways = found["ways"]
    one = ways["one tier"]
    assert (one["down_mb"], one["up_mb"], one["host_mb"]) == (0, 0, 0)
    # A recomputed token is a matrix product of another number of rows: E sums, of the order of 1.
    rounding = alisa_schedule.WIDTH * torch.finfo(torch.float32).eps
    for name, row in ways.items():
        assert row["output_error"] <= (rounding if row["recomputed_tokens"] else 0), name
        if name not in ("one tier", "eviction, every 64"):  # 64 steps do not come
            assert row["settled_device_mb"] < one["device_mb"]
    assert ways["phase II, fetched at every step"]["up_mb"] > ways["phase II"]["up_mb"] > 0
    assert ways["three phases"]["deleted_at_the_end"] > 0
    assert "| eviction, every 64 | " in alisa_schedule.table({"cases": {"small": found}})


def test_selection_by_hand():
    """The worked example of the golden files' notes: what has left the window competes for two
    places, and of the rest only what was chosen in the last W steps, or will be local, lives on.
    """
    data = alisa_schedule.drifting(30)
    case = alisa_schedule.Case(prompt=20, steps=10, ratio=0.4, window=2)
    chosen = alisa_schedule.select(case, data)
    for t, (now, live) in enumerate(chosen, 20):
        local = max(1, int((t + 1) * 0.2 + 0.5))
        assert now[-local:].tolist() == list(range(t + 1 - local, t + 1))
        assert len(now) == 2 * local
        before = chosen[t - 21].chosen if t > 20 else range(t)
        assert set(live) == set(now) | set(before)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_whole_decode_steps():
    """Every cache decodes the same prompt; those that drop tokens are smaller."""
    found = alisa_decode.decode(tokens=512, steps=2, warm=66)
    caches = found["caches"]
    kept = caches["tokcore ratio 0.2"]["cache_mb"], caches["composed, 0.2 kept"]["cache_mb"]
    assert max(kept) < min(caches[n]["cache_mb"] for n in ("DynamicCache, SDPA", "tokcore dense"))
    assert found["selected"] == 2 * round((512 + 66 + 2) * 0.1)
    assert found["slots"] <= found["selected"] + alisa_decode.WINDOW + 64


def test_live_set_of_queries_that_aim_at_change():
    found = alisa_decode.live_set("aimed", prompt=100, steps=200)
    assert found["picks_changed_a_step"] > 0.1
    assert 1 < found["live_over_selected"] < found["most_live_over_selected"]
    assert found["most_slots_beyond_selected"] <= alisa_decode.WINDOW + 64
