"""Measures one suite in this process and writes its JSON after every group.

    python -m benchmarks.run token_logprob --out results.json

report.py starts it once for each suite and allocator: the environment chooses the allocator, and a
suite that fails leaves the others' results alone.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine, measure
from benchmarks.suite import BACKWARD, DTYPES, FORWARD, MEASURED, SHAPES, Call, suites

ALLOCATORS = ("default", "huge pages")  # what THP_MEM_ALLOC_ENABLE was; see report.py


@dataclasses.dataclass(frozen=True)
class Effort:
    """Rounds of a variant: as many as fit into `seconds`, within the bounds.

    The call that its peak was taken from is one more sample.
    """

    seconds: float
    least: int
    most: int

    def rounds(self, seconds):
        return min(self.most, max(self.least, int(self.seconds / seconds)))


FULL, QUICK = Effort(0.8, 2, 11), Effort(0.0, 1, 1)


def floor_runs(clock, suite, inputs, pass_name):
    """name -> (bytes it moves, run). Ratios refer to the first.

    CPU: the reads of a sweep; for the gradient the same again beside its write, with non-temporal
    stores into memory that exists. "fresh" writes to new pages, which the kernel clears first.
    CUDA: a device copy, whose bandwidth is what a kernel can hope for.
    """
    logits, streams = inputs[0], inputs[: suite.streams]
    if clock.device.type == "cuda":
        destination = torch.empty_like(logits)
        return {"device copy": (2 * logits.nbytes, lambda: destination.copy_(logits))}
    kept, traffic = int(suite.kept * logits.nbytes), suite.traffic(inputs, pass_name)

    def read():
        for nbytes, equally_long in itertools.groupby(streams, lambda stream: stream.nbytes):
            clock.floors.read(list(equally_long), int(suite.kept * nbytes))

    def read_and_write(gradient):
        read()
        clock.floors.write(streams, gradient, kept)
        if kept < gradient.nbytes:
            clock.floors.write([], gradient.view(-1)[kept // gradient.element_size() :])
        return gradient

    if pass_name == FORWARD:
        return {"floor": (traffic, read)}
    gradient = torch.zeros_like(logits)
    return {
        "floor": (traffic, lambda: read_and_write(gradient)),
        "floor, fresh gradient": (traffic, lambda: read_and_write(torch.empty_like(logits))),
    }


@dataclasses.dataclass
class Entry:
    """One row of a group, and how to get its samples."""

    row: dict
    moved: int  # bytes
    run: Callable
    rounds: int
    prepare: Callable = lambda: None
    seconds: list = dataclasses.field(default_factory=list)


def run_group(clock, suite, shape, dtype, pass_name, effort):
    """Measures every variant on one shape, dtype and pass. -> the group, as it is in the JSON."""
    torch._dynamo.reset()
    inputs = suite.inputs(shape, dtype, clock.device)
    floors = floor_runs(clock, suite, inputs, pass_name).items()
    entries = {n: Entry({"kind": "floor"}, moved, run, effort.most) for n, (moved, run) in floors}
    reference = next(iter(entries.values()))
    for variant in suite.variants(dtype, clock.device):
        if shape.steps > variant.most:
            row = {"kind": variant.kind, "error": "not measured: a call takes minutes"}
            entries[variant.name] = Entry(row, 0, None, 0)
        # The forward of the in-place form is the forward.
        elif pass_name == BACKWARD or not variant.overwrites or variant.kind != "tokcore":
            entries[variant.name] = _enter(clock, suite, variant, inputs, pass_name, effort)
    runs = {name: (entry.prepare, entry.run) for name, entry in entries.items() if entry.rounds}
    with machine.noise() as noise:
        samples = measure.interleave(clock, runs, {name: entries[name].rounds for name in runs})
    for name, seconds in samples.items():
        entry = entries[name]
        entry.row |= measure.summary([*entry.seconds, *seconds])
        bandwidth = entry.moved / entry.row["ms"] / 1e6
        entry.row["gb_s"] = round(bandwidth, 3)
        # Of bandwidths, because a device copy does not move the operator's bytes. The reference is
        # the first entry, so it is summarised by now.
        best = reference.moved / reference.row["ms"] / 1e6
        entry.row["floor_ratio"] = round(best / bandwidth, 3)
    return {
        "rows": shape.rows,
        "vocabulary": shape.vocabulary,
        "traffic_mb": suite.traffic(inputs, pass_name) / measure.MB,
        "gradient_mb": 0.0 if pass_name == FORWARD else inputs[0].nbytes / measure.MB,
        "float32_logits_mb": 4 * inputs[0].numel() / measure.MB,
        "noise": noise,
        "variants": {name: entry.row for name, entry in entries.items()},
    }


def _enter(clock, suite, variant, inputs, pass_name, effort):
    """Compiles or warms up, takes the peak memory of a call, and sets the rounds by its time."""
    row = {"kind": variant.kind, "exact": variant.exact, "overwrites": variant.overwrites}
    call = Call(variant, suite, inputs, pass_name)
    entry = Entry(row, suite.traffic(inputs, pass_name), call, 0, call.prepare)
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        # Plain torch is warm from the tiny shape: its full-size calls are too slow to waste one.
        if variant.kind != "eager":
            call.prepare()
            start = time.perf_counter()
            call()
            if variant.kind == "compile":
                row["first_call_s"] = round(time.perf_counter() - start, 2)
                # Where the code was on disk already the first call only loaded it.
                row["code_cached"] = counters["inductor"]["fxgraph_cache_hit"] > 0
        call.prepare()
        peak, seconds = clock.peak(call)
    except Exception as error:  # a peer that cannot run here must not end the others' run
        if variant.kind == "tokcore":
            raise
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return entry
    row["peak_mb"] = round(peak / measure.MB, 3)
    entry.seconds.append(seconds)
    # The bars hang on tokcore's own figures and on the floor's.
    ours = variant.kind in ("tokcore", "yardstick")
    entry.rounds = effort.most if ours else effort.rounds(seconds)
    return entry


def _warm_up(clock, suite):
    """Pages in the libraries and starts the threads, on inputs that cost nothing."""
    for _, dtype, pass_name in suite.groups(["tiny"], DTYPES):
        inputs = suite.inputs(suite.tiny, DTYPES[dtype], clock.device)
        for variant in suite.variants(DTYPES[dtype], clock.device):
            if variant.kind == "eager":
                call = Call(variant, suite, inputs, pass_name)
                call.prepare()
                call()


def _progress(key, suite, group):
    """One line: the fastest of each kind."""
    fastest = {}
    for row in group["variants"].values():
        if "ms" in row:
            fastest[row["kind"]] = min(row["ms"], fastest.get(row["kind"], row["ms"]))
    times = ", ".join(f"{kind} {ms:.1f}" for kind, ms in fastest.items())
    flag = "  NOISY" if group["noise"].get("noisy") else ""
    print(f"{suite.name} {key}: {times} ms{flag}", flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=list(suites()))
    parser.add_argument("--out", type=Path, required=True, help="JSON file, kept up to date")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="default", help="a label here")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=MEASURED)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="two rounds each: does it run at all")
    parser.add_argument("--resume", action="store_true", help="keep the groups that are not noisy")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # never eager in compile's name
    suite = suites()[options.suite]
    clock = measure.clock(options.device, suite.warm)
    document = {"suite": suite.name, "runs": {}}
    if options.out.exists():
        document = json.loads(options.out.read_text())
    run = document["runs"].setdefault(options.allocator, {"groups": {}})
    if not options.resume:
        run["groups"] = {}
    run["environment"] = machine.environment(options.device)
    _warm_up(clock, suite)
    for shape, dtype, pass_name in suite.groups(options.shapes, options.dtypes):
        key = f"{shape} {dtype} {pass_name}"
        if key in run["groups"] and not run["groups"][key]["noise"].get("noisy"):
            continue
        effort = QUICK if options.quick else FULL
        group = run_group(clock, suite, suite.shape(shape), DTYPES[dtype], pass_name, effort)
        run["groups"][key] = group
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        _progress(key, suite, group)


if __name__ == "__main__":
    main()
