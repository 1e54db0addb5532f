"""Whether exact eviction leaves ALISA's phases II and III anything to do: alisa_schedule.json.

    python -m benchmarks.alisa_schedule
    python -m benchmarks.alisa_schedule --only drift_w64 --steps 100 --out some.json
    python -m benchmarks.alisa_schedule --table        # no run: the tables of the documentation

One layer decodes over drifting queries: each head's query is an autoregressive walk over random
keys, so that what matters changes slowly. Algorithm 1 selects, once, on all tokens; every way to
keep them then replays its selections, a step of each in turn, and must give the same output:
    one tier      everything on the device
    phase II      the rest on the host, fetched at every step, as the paper has it; and with reuse
    three phases  the same with reuse, on a host tier too small, so that the oldest are deleted
    eviction      tokens not selected in the last W steps and outside the next local window are
                  dropped for good, and the others moved together, at every step or every 64
The two with phases get the memory on the device that eviction takes once W steps have passed, and
the plan that the solver finds for it from a profile made here. Both tiers are in RAM on the CPU.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import machine
from tokcore.algorithms.alisa import (
    Machine,
    Plan,
    Shape,
    TwoTierStore,
    costs,
    half_budget,
    memory,
    place_all,
    profile,
    solve,
    steps,
)

HEADS, DIM = 8, 64  # multi-head attention, as in the paper's models: E = Hkv D
WIDTH = HEADS * DIM
SHAPE = Shape(batch=1, layers=1, kv_heads=HEADS, head_dim=DIM, input_dim=WIDTH, itemsize=4)
DRIFT, SHARPNESS = 0.95, 2.0  # of one step's query with the last; standard deviation of the logits
PAPER_LINK = 20e9  # bytes a second between CPU and GPU: arXiv 2403.17312, section VI.A
# Layers and KV of a 7B model with multi-head attention in 16 bits, for times on that link.
PAPER_SHAPE = Shape(batch=1, layers=32, kv_heads=32, head_dim=128, input_dim=4096)


class Case(NamedTuple):
    prompt: int
    steps: int
    ratio: float
    window: int | None  # W; None: k, as Algorithm 1 has it


CASES = {
    "drift_wk": Case(256, 700, 0.2, None),
    "drift_w64": Case(256, 700, 0.2, 64),
    "16k_w64": Case(16384 - 700, 700, 0.2, 64),
}


class Data(NamedTuple):
    """Of one layer and n tokens."""

    inputs: torch.Tensor  # (n, E)
    weight: torch.Tensor  # (E, 2 * Hkv * D): of keys and values
    key: torch.Tensor  # (Hkv, n, D)
    value: torch.Tensor
    query: torch.Tensor  # (n, Hkv, D)

    def recompute(self, inputs, _positions):
        return (inputs @ self.weight).view(-1, 2, HEADS, DIM).unbind(1)


def drifting(length, seed=0):
    """Random inputs, keys and values projected from them, queries that drift."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(length, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, 2 * WIDTH, generator=generator) * WIDTH**-0.5
    key, value = (inputs @ weight).view(length, 2, HEADS, DIM).permute(1, 2, 0, 3)
    query = torch.randn(length, HEADS, DIM, generator=generator)
    for t in range(1, length):
        query[t] = DRIFT * query[t - 1] + (1 - DRIFT**2) ** 0.5 * query[t]
    return Data(inputs, weight, key.contiguous(), value.contiguous(), SHARPNESS * query)


def weights(query, key):
    """Softmax weights (Hkv, ...) of one query (Hkv, D) over packed keys (Hkv, M, D)."""
    return (key @ query.unsqueeze(-1)).squeeze(-1).mul(DIM**-0.5).softmax(-1)


def attend(query, key, value):
    return (weights(query, key).unsqueeze(1) @ value).squeeze(1)


class Selection(NamedTuple):
    chosen: np.ndarray  # positions, ascending
    live: np.ndarray  # positions that a later step may still choose, after this one


def select(case, data):
    """Algorithm 1 over a cache that holds everything: what each step chooses, and what lives on."""
    found, last = [], np.full(len(data.inputs), case.prompt - 1)
    ring = torch.zeros(case.window or half_budget(len(last), case.ratio).local, len(last))
    for t in range(max(0, case.prompt - len(ring)), case.prompt):
        ring[t % len(ring), : t + 1] = weights(data.query[t], data.key[:, : t + 1]).sum(0)
    for t in range(case.prompt, case.prompt + case.steps):
        n = t + 1
        local, top = half_budget(n, case.ratio)
        window = case.window or local
        rows = torch.arange(max(0, t - window), t) % len(ring)
        score = ring[rows, : n - local].double().sum(0)
        best = score.sort(descending=True, stable=True).indices[:top].sort().values.numpy()
        chosen = np.concatenate([best, np.arange(n - local, n)])
        ring[t % len(ring)] = 0
        ring[t % len(ring), chosen] = weights(data.query[t], data.key[:, chosen]).sum(0)
        last[chosen] = t
        # The next step sums the rows of steps t - W + 1 .. t, and its window starts at n + 1 - k.
        after = half_budget(n + 1, case.ratio).local
        since = t - (case.window or after) + 1
        alive = (last[:n] >= since) | (np.arange(n) >= n + 1 - after)
        found.append(Selection(chosen, np.flatnonzero(alive)))
    return found


class LiveSet:
    """One tier of which dead tokens are dropped: records of tokens, ascending and packed."""

    def __init__(self, room, every):
        self.records = torch.zeros(room, HEADS, 2, DIM)
        self.positions = np.zeros(0, np.int64)
        self.every, self.moved = every, 0
        self.sizes = []  # tokens in each step, before any is dropped; the prompt's first

    def append(self, key, value):
        """(1, Hkv, Q, D), of the next positions."""
        new = torch.stack([key[0], value[0]], 2).transpose(0, 1)
        end = len(self.positions)
        self.records[end : end + len(new)] = new
        first = self.positions[-1] + 1 if end else 0
        self.positions = np.append(self.positions, np.arange(first, first + len(new)))
        self.sizes.append(len(self.positions))

    def gather(self, chosen):
        slots = np.searchsorted(self.positions, chosen)
        found = self.records.index_select(0, torch.from_numpy(slots)).transpose(0, 1)
        return found[:, :, 0], found[:, :, 1]

    def evict(self, live):
        if (len(self.sizes) - 1) % self.every:
            return
        kept = np.flatnonzero(np.isin(self.positions, live, assume_unique=True))
        # What stands before the first gap stays where it is.
        first = int(np.argmin(kept == np.arange(len(kept)))) if len(kept) else 0
        if len(kept) < len(self.positions):
            moving = torch.from_numpy(kept[first:])
            self.records[first : len(kept)] = self.records.index_select(0, moving)
            self.moved += (len(kept) - first) * SHAPE.token_bytes
            self.positions = self.positions[kept]


def plans_of(case, chosen, profiled):
    """Memory that eviction takes in steady state, and the solver's plans for it."""
    ahead = steps(case.prompt, case.steps, lambda n: half_budget(n, case.ratio))
    settled = chosen[min(len(chosen) - 1, case.window or 2 * int(ahead.local[0])) :]
    room = (max(len(s.live) for s in settled) + 1) * SHAPE.token_bytes
    link = Machine(room, 1 << 60, profiled.to_host, profiled.to_device)
    two = solve(ahead, SHAPE, link, profiled).plan
    two = two if two.beta == 0 else two._replace(beta=0.0)
    host = memory(two, ahead, SHAPE).host_bytes
    three = solve(ahead, SHAPE, link._replace(host_bytes=host * 3 // 4), profiled).plan
    return (
        ahead,
        link,
        {
            "one tier": (Plan(), True),
            "phase II, fetched at every step": (two, False),
            "phase II": (two, True),
            "three phases": (three, True),
        },
    )


def replay(case, data, chosen, plans, dies):
    """Every way, a step of each in turn.

    -> name -> (store, seconds of each step, error, traffic of the first `dies` steps)
    """
    prompt, total = case.prompt, case.prompt + case.steps
    budget = lambda n: half_budget(n, case.ratio)  # noqa: E731
    ways = {
        name: TwoTierStore(
            plan,
            [prompt],
            case.steps,
            budget,
            kv_heads=HEADS,
            head_dim=DIM,
            reuse=reuse,
            recompute=data.recompute,
            input_dim=WIDTH,
        )
        for name, (plan, reuse) in plans.items()
    }
    ways |= {f"eviction, every {e}": LiveSet(total, e) for e in (1, 64)}
    seconds, error = {name: [] for name in ways}, dict.fromkeys(ways, 0.0)
    early = {}  # traffic until the prompt's rows have left the window
    for t in range(prompt - 1, total):
        # The prompt's own attention is dense and no business of the store.
        first = 0 if t < prompt else t
        new = (data.key[None, :, first : t + 1], data.value[None, :, first : t + 1])
        inputs, query = data.inputs[None, first : t + 1], data.query[t]
        truth = None
        for name, store in ways.items():
            start = time.perf_counter()
            tiered = isinstance(store, TwoTierStore)
            store.append(*new, inputs) if tiered else store.append(*new)
            if t < prompt:
                continue
            now = chosen[t - prompt]
            if tiered:
                index = torch.from_numpy(now.chosen).view(1, 1, -1)
                key, value = store.gather(index, torch.tensor([[len(now.chosen)]]))
                output = attend(query, key[0], value[0])
            else:
                output = attend(query, *store.gather(now.chosen))
                store.evict(now.live)
            seconds[name].append(time.perf_counter() - start)
            if tiered and t - prompt < dies:
                early[name] = store.traffic
            truth = output if truth is None else truth
            error[name] = max(error[name], float((output - truth).abs().max()))
    return {name: (ways[name], seconds[name], error[name], early.get(name)) for name in ways}


def run(case):
    """One case, as it is in the JSON."""
    data = drifting(case.prompt + case.steps)
    chosen = select(case, data)
    count = len(chosen[-1].chosen)
    # The store's own way to a step's tokens, out of more than the caches hold.
    records = torch.randn(max(case.prompt + case.steps, 1 << 14), HEADS, 2, DIM)

    def gather_and_attend(key, _value):
        slots = torch.randperm(len(records))[: key.shape[2]].sort().values
        key, value = records.index_select(0, slots).transpose(0, 1).unbind(2)
        return attend(data.query[0], key, value)

    profiled = profile(
        gather_and_attend,
        data.recompute,
        SHAPE,
        attended=sorted({max(1, count // 4), count // 2, count}),
        recomputed=[1, 8, 64, 512],
        dtype=torch.float32,
    )
    dies = next(j for j, s in enumerate(chosen, 1) if len(s.live) < case.prompt)
    ahead, link, plans = plans_of(case, chosen, profiled)
    with machine.noise() as noise:
        found = replay(case, data, chosen, plans, dies)
    rows = {}
    for name, (store, seconds, error, early) in found.items():
        row = {"ms_a_step": round(1e3 * float(np.median(seconds)), 3)}
        row |= {"least_ms": round(1e3 * min(seconds), 3), "output_error": error}
        if isinstance(store, TwoTierStore):
            row |= tiered_row(case, store, early, dies, *plans[name], ahead, link, profiled)
            _, deleted, host = (int(x[-1]) for x in place_all(plans[name][0], ahead))
            live = chosen[-1].live
            row |= {"host_tokens_at_the_end": host - deleted, "deleted_at_the_end": deleted}
            row |= {"of_them_live": int(((live >= deleted) & (live < host)).sum())}
            row |= {"of_the_deleted_live": int((live < deleted).sum())}
        else:
            row |= {"device_mb": mb(max(store.sizes) * SHAPE.token_bytes)}
            settled = max(store.sizes[min(dies + store.every, case.steps) :])
            row |= {"settled_device_mb": mb(settled * SHAPE.token_bytes), "host_mb": 0.0}
            row |= {"down_mb": 0.0, "up_mb": 0.0, "recomputed_tokens": 0}
            row |= {"moved_on_device_mb": mb(store.moved)}
        rows[name] = row
    return {
        **case._asdict(),
        "kept_at_the_end": count,
        "live_at_the_end": len(chosen[-1].live),
        "live_over_kept_second_half": round(
            float(np.mean([len(s.live) / len(s.chosen) for s in chosen[len(chosen) // 2 :]])), 3
        ),
        "steps_until_the_prompt_dies": dies,
        "profile": profiled._asdict(),
        "noise": noise,
        "ways": rows,
    }


def tiered_row(case, store, early, dies, plan, reuse, ahead, link, profiled):
    """What moved, and what the model says of it with the share of reuse that was found."""
    moved = store.traffic
    needed = costs(plan, ahead, SHAPE, link, profiled)
    asked = float((needed.fetched + needed.recomputed).sum())
    came = moved.fetched + moved.recomputed
    kept = max(0.0, 1 - came / asked) if reuse and asked else 0.0
    modelled = costs(plan, ahead, SHAPE, link, profiled, reuse=kept)
    scale = PAPER_SHAPE.token_bytes / SHAPE.token_bytes
    late = sum(moved[3:]) - sum(early[3:])  # bytes, both ways
    link_ms = scale * 1e3 / PAPER_LINK
    return {
        "plan": plan._asdict(),
        "device_mb": mb(store.device_bytes),
        "settled_device_mb": mb(store.device_bytes),
        "host_mb": mb(store.host_bytes),
        "down_mb": mb(moved.bytes_to_host),
        "up_mb": mb(moved.bytes_to_device),
        "recomputed_tokens": moved.recomputed,
        "reuse": round(kept, 4),
        "modelled_up_mb": mb(float(modelled.bytes_to_device.sum())),
        "modelled_ms_a_step": round(1e3 * float(np.median(modelled.seconds[1:])), 3),
        "early_down_mb": mb(early.bytes_to_host),
        "early_up_mb": mb(early.bytes_to_device),
        "late_kb_a_step": round(late / (case.steps - dies) / 1e3, 3),
        "late_ms_a_step_on_paper_link": round(late / (case.steps - dies) * link_ms, 4),
        "early_ms_on_paper_link": round(sum(early[3:]) * link_ms, 1),
    }


def mb(count):
    return round(count / 1e6, 3)


def table(document):
    names = ("device_mb", "settled_device_mb", "host_mb", "down_mb", "up_mb", "recomputed_tokens")
    names += ("ms_a_step", "modelled_ms_a_step", "late_kb_a_step", "late_ms_a_step_on_paper_link")
    lines = []
    for name, case in document["cases"].items():
        lines += [f"{name}: live {case['live_at_the_end']} of kept {case['kept_at_the_end']}", ""]
        lines += ["| | " + " | ".join(n.replace("_", " ") for n in names) + " |"]
        lines += ["|" + " --- |" * (len(names) + 1)]
        for way, row in case["ways"].items():
            lines.append(f"| {way} | " + " | ".join(str(row.get(n, "")) for n in names) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, help="fewer than the case has")
    parser.add_argument("--table", action="store_true", help="do not run, print")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    out = options.out or machine.results_folder("cpu") / "alisa_schedule.json"
    if not options.table:
        document = {"environment": machine.environment("cpu"), "cases": {}}
        for name in options.only:
            case = CASES[name]
            case = case._replace(steps=min(options.steps or case.steps, case.steps))
            document["cases"][name] = run(case)
            print(f"{name} is done", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(json.loads(out.read_text())))


if __name__ == "__main__":
    main()
