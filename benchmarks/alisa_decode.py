"""Whole decode steps under four caches, one layer alone, how the live set grows: alisa_decode.json.

    python -m benchmarks.alisa_decode
    python -m benchmarks.alisa_decode --tokens 4096 --steps 8 --out some.json
    python -m benchmarks.alisa_decode --table          # no run: the tables of the documentation

One model of two layers, random weights, reads the same prompt with each cache, then decodes a token
with each in turn. The first steps, in which all of the prompt is alive, are not timed. Then one
layer alone decodes over random keys with queries that stay, drift, are drawn anew at each step, or
are aimed at what has just left the local window, so that what is selected keeps changing.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import machine, measure
from benchmarks.baselines.composed_cache import NAME, composed_cache
from benchmarks.baselines.sparse_decode_attention import grouped_attention
from tokcore.algorithms.alisa import LayerState, alisa, dense
from tokcore.algorithms.alisa.slots import Slots
from tokcore.integrations.transformers import SparseWindowCache, enable
from tokcore.ops import (
    kv_append,
    sparse_decode_attention,
    window_scores_update,
    window_select,
)

RATIO, WINDOW = 0.2, 64
INTERVAL = 512  # kvpress' DecodingPress drops tokens that often
SIZES = {  # heads of 128, as many of them in keys and values; 8 kB of K and V a token and layer
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}
HEADS, DIM, SHARPNESS = 8, 64, 2.0  # of the live set's layer; standard deviation of its logits


class Decoder:
    """One cache, and the model as it attends with it."""

    def __init__(self, model, attention, cache, prompt):
        self.model, self.attention, self.cache = model, attention, cache
        model.set_attn_implementation(attention)
        self.token = prompt[:, -1:]
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)

    def step(self):
        self.model.set_attn_implementation(self.attention)
        start = time.perf_counter()
        self.model(self.token, past_key_values=self.cache)
        return time.perf_counter() - start

    def bytes(self):
        if isinstance(self.cache, SparseWindowCache):
            return self.cache.nbytes
        return sum(x.keys.nbytes + x.values.nbytes for x in self.cache.layers)


@torch.no_grad()
def decode(tokens, steps, warm=2 * WINDOW + 8):
    """One length, as it is in the JSON."""
    torch.manual_seed(0)
    limit = tokens + warm + steps + 8
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=limit)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(SIZES["vocab_size"], (1, tokens))
    enable(model)
    ours = model.config._attn_implementation
    composed = composed_cache(model, int(RATIO * tokens), INTERVAL)
    policies = {"tokcore dense": dense(), f"tokcore ratio {RATIO}": alisa(RATIO, window=WINDOW)}
    decoders = {
        "DynamicCache, SDPA": Decoder(
            model, "sdpa", transformers.DynamicCache(config=config), prompt
        ),
        f"composed, {RATIO} kept": Decoder(model, NAME, composed, prompt),
    }
    for name, policy in policies.items():
        cache = SparseWindowCache(config, policy=policy)
        decoders[name] = Decoder(model, ours, cache, prompt)
    # The composed cache drops tokens every INTERVAL steps: its first drop is brought forward.
    for layer in composed.layers:
        layer.steps = INTERVAL - warm // 2
    seconds = {name: [] for name in decoders}
    with machine.noise() as noise:
        for step in range(warm + steps):
            for name, decoder in decoders.items():
                took = decoder.step()
                if step >= warm:
                    seconds[name].append(took)
    clock, rows = measure.CpuClock(), {}
    for name, decoder in decoders.items():
        peak, _ = clock.peak(decoder.step)
        rows[name] = {
            "ms_a_step": round(1e3 * float(np.median(seconds[name])), 2),
            "least_ms": round(1e3 * min(seconds[name]), 2),
            "cache_mb": round(decoder.bytes() / 1e6, 2),
            "peak_mb_of_a_step": round(peak / 1e6, 2),
        }
    state = decoders[f"tokcore ratio {RATIO}"].cache.layers[0].state
    return {
        "tokens": tokens,
        "steps": steps,
        "selected": int(state.selected.max()),
        "slots": int(state.count.max()),
        "noise": noise,
        "caches": rows,
    }


@torch.no_grad()
def layer(tokens, dtype, ratio, rounds=15):
    """A decode step of one layer, 32 query heads on 8 of keys and values, cold: what selecting
    adds, beside all tokens and beside torch over the same tokens already moved together."""
    heads, queries, dim = 8, 32, 128
    half = int(ratio * tokens / 2 + 0.5)
    slots = 2 * half + WINDOW + 64  # what exact eviction leaves, at most
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    state = Slots(shared=True, int8=False)
    state.append(random(1, heads, slots - 1, dim), random(1, heads, slots - 1, dim), rows=WINDOW)
    state.score.random_(0, 1 << 40, generator=generator)
    full = [random(1, heads, tokens, dim) for _ in range(2)]
    query, new = random(1, queries, dim), [random(1, heads, 1, dim) for _ in range(2)]
    number = functools.partial(torch.tensor, dtype=torch.int32)
    k, window, seen = number([half]), number([WINDOW]), number([[tokens]])
    kept = [x[:, :, : 2 * half].contiguous() for x in (state.key, state.value)]

    def append():
        state.count.fill_(slots - 1)
        state.length.fill_(slots - 1)
        one = number([1])
        kv_append(
            state.key,
            state.value,
            state.position,
            state.last_selected,
            state.count,
            *new,
            state.length,
            one,
        )

    def select():
        return window_select(state.score, state.count, k, k, size=2 * half)

    def attend(index, count):
        return sparse_decode_attention(query, state.key, state.value, index, count)

    def update(row, index, count):
        window_scores_update(
            state.score,
            state.ring,
            state.last_selected,
            state.oldest,
            row.unsqueeze(2),
            index,
            count,
            state.length,
            window,
        )

    def step():
        append()
        index, count = select()
        _, row, _ = attend(index, count)
        update(row, index, count)

    def selecting():
        index, count = chosen
        select()
        update(row, index, count)

    step()
    chosen = select()
    row = attend(*chosen).weight_row
    runs = {
        "step": step,
        "select and update": selecting,
        "attention alone": lambda: attend(*chosen),
        "all tokens": lambda: sparse_decode_attention(query, *full, None, seen),
        "torch, kept tokens packed": lambda: grouped_attention(query, *kept, None),
        "torch, all tokens": lambda: grouped_attention(query, *full, None),
    }
    clock, seconds = measure.CpuClock(), {name: [] for name in runs}
    with machine.noise() as noise:
        for _ in range(rounds):
            for name, run in runs.items():
                clock.cool()
                seconds[name].append(clock.time(run))
    ms = {name: round(1e3 * float(np.median(x)), 3) for name, x in seconds.items()}
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": ratio,
        "ms": ms,
        "selecting_share": round(ms["select and update"] / ms["step"], 3),
        "faster_than_all_tokens": round(ms["all tokens"] / ms["step"], 2),
        "faster_than_torch_packed": round(ms["torch, kept tokens packed"] / ms["step"], 2),
        "faster_than_torch": round(ms["torch, all tokens"] / ms["step"], 2),
        "noise": noise,
    }


def walk(kind, length, generator):
    """Queries (length, H, D) of one kind."""
    query = torch.randn(length, HEADS, DIM, generator=generator)
    keep = {"fixed": 1.0, "drifting": 0.95}.get(kind, 0.0)
    for t in range(1, length):
        query[t] = keep * query[t - 1] + (1 - keep**2) ** 0.5 * query[t]
    return SHARPNESS * query


@torch.no_grad()
def live_set(kind, prompt=1024, steps=768):
    """How many tokens of one layer are alive, step by step; dead ones are dropped every 64."""
    generator = torch.Generator().manual_seed(0)
    length = prompt + steps
    key, value = torch.randn(2, 1, HEADS, length, DIM, generator=generator)
    query = walk(kind, length, generator).transpose(0, 1).unsqueeze(0)
    if kind == "aimed":  # at what left the local window last, so that it takes another's place
        for t in range(prompt, length):
            left = t - int(RATIO * (t + 1) / 2 + 0.5)
            query[0, :, t] = 4 * key[0, :, left - 8 : left].mean(1) * DIM**0.5
    state = LayerState(alisa(RATIO, window=WINDOW))
    state.attend(*(x[:, :, :prompt].contiguous() for x in (query, key, value)))
    late = slice(2 * WINDOW, None)  # the prompt's rows have left the window, what died is dropped
    alive, slots, selected, changed, before = [], [], [], [], set()
    for t in range(prompt, length):
        state.attend(*(x[:, :, t : t + 1] for x in (query, key, value)))
        selected.append(int(state.selected.max()))
        index = state.index[0, 0, : selected[-1]].long()
        now = set(state.position[0, 0, index].tolist())
        changed.append(len(now - before) - 1)  # the new token is no change
        before = now
        local = int(state.policy.amounts(t + 2)[0]) - 1
        live = state.last_selected[0, 0, : int(state.count)] >= t - WINDOW + 1
        live[max(0, len(live) - local) :] = True
        alive.append(int(live.sum()))
        slots.append(int(state.count))
    ratio = np.array(alive[late]) / np.array(selected[late])
    beyond = np.array(slots[late]) - np.array(selected[late])
    return {
        "prompt": prompt,
        "steps": steps,
        "selected_at_the_end": selected[-1],
        "live_at_the_end": alive[-1],
        "picks_changed_a_step": round(float(np.mean(changed[late])), 3),
        "live_over_selected": round(float(ratio.mean()), 3),
        "most_live_over_selected": round(float(ratio.max()), 3),
        "slots_beyond_selected": round(float(beyond.mean()), 1),
        "most_slots_beyond_selected": int(beyond.max()),
        "live": alive[:: max(1, steps // 24)],
    }


def table(document):
    lines = []
    for case in document["decode"]:
        lines += [
            f"{case['tokens']} tokens",
            "",
            "| cache | ms a step (least) | cache MB | peak MB |",
        ]
        lines += ["| --- | --- | --- | --- |"]
        for name, row in case["caches"].items():
            ms = f"{row['ms_a_step']} ({row['least_ms']})"
            lines.append(f"| {name} | {ms} | {row['cache_mb']} | {row['peak_mb_of_a_step']} |")
        lines.append("")
    columns = ("selecting_share", "faster_than_all_tokens", "faster_than_torch_packed")
    columns += ("faster_than_torch",)
    names = list(document["layer"][0]["ms"])
    lines += ["| tokens, dtype, ratio | " + " | ".join([*names, *columns]).replace("_", " ") + " |"]
    lines += ["|" + " --- |" * (1 + len(names) + len(columns))]
    for row in document["layer"]:
        cells = [row["ms"][name] for name in names] + [row[name] for name in columns]
        case = f"{row['tokens']}, {row['dtype']}, {row['ratio']}"
        lines.append(f"| {case} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| queries | picks changed a step | live / 2k, mean (most) | slots beyond 2k |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, row in document["live_set"].items():
        live = f"{row['live_over_selected']} ({row['most_live_over_selected']})"
        slots = f"{row['slots_beyond_selected']} ({row['most_slots_beyond_selected']})"
        lines.append(f"| {name} | {row['picks_changed_a_step']} | {live} | {slots} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--steps", type=int, default=48, help="timed, of each cache")
    parser.add_argument("--table", action="store_true", help="do not run, print")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    out = options.out or machine.results_folder("cpu") / "alisa_decode.json"
    if not options.table:
        document = {
            "environment": machine.environment("cpu"),
            "decode": [decode(tokens, options.steps) for tokens in options.tokens],
            "layer": [
                layer(max(options.tokens), dtype, ratio)
                for dtype in (torch.float32, torch.bfloat16)
                for ratio in (0.5, 0.2, 0.1)
            ],
            "live_set": {kind: live_set(kind) for kind in ("fixed", "drifting", "fresh", "aimed")},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(json.loads(out.read_text())))


if __name__ == "__main__":
    main()
