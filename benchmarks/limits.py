"""Where a kernel's time goes: memory, exponentials, or the rest. The profile behind a missed bar.

    python -m benchmarks.limits --perf
    python -m benchmarks.limits --only sequential_kl --dtypes bfloat16 --perf

For each shape, dtype and pass, milliseconds of
    floor        the same bytes read (and written) by loops that do nothing else
    exponentials as many as the operator must take (rewards: none), from the first-level cache on
                 all threads
    resident     the operator on rows that stay in the last-level cache, by one thread, scaled to
                 all rows and threads: its arithmetic and its instructions, without memory and
                 without the wait for a second thread, which would be most of so short a call. What
                 a call costs beside its rows is scaled with them: no lower bound
    cold         the operator itself, in place where there is a gradient, caches empty
Where `resident` is near `cold`, instructions are the limit and not memory; where it is near
`exponentials` as well, only a cheaper exponential helps. --perf samples the operator, there with a
fresh gradient, by the CPU clock of `perf` and names the functions that took the time.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import bars, machine, measure
from benchmarks.run import floor_runs
from benchmarks.suite import DTYPES, FORWARD, MODELS, SHAPES, Call, Shape, suites

ROUNDS = 9
PERF_SECONDS = 4


def _calls(suite, shape, dtype, pass_name, clock):
    """(prepare, run) of the operator, in place for a gradient: no allocator in the picture."""
    name = bars.TOKCORE if pass_name == FORWARD else bars.IN_PLACE
    inputs = suite.inputs(shape, dtype, clock.device)
    variant = next(v for v in suite.variants(dtype, clock.device) if v.name == name)
    return inputs, Call(variant, suite, inputs, pass_name)


def _resident_shape(shape, suite, dtype):
    """As many rows as fill a quarter of the last-level cache, at least one."""
    row = shape.vocabulary * dtype.itemsize * suite.streams
    rows = max(1, machine.last_level_cache_bytes() // 4 // row)
    return Shape(shape.name, min(rows, shape.rows), shape.vocabulary, 1)


def profile(clock, suite, shape, dtype, pass_name):
    """Milliseconds of the four, medians."""
    inputs, call = _calls(suite, shape, dtype, pass_name, clock)
    floor = next(iter(floor_runs(clock, suite, inputs, pass_name).values()))[1]
    runs = {"floor": (lambda: None, floor), "cold": (call.prepare, call)}
    with machine.noise() as noise:
        samples = measure.interleave(clock, runs, dict.fromkeys(runs, ROUNDS))
        small = _resident_shape(shape, suite, dtype)
        _, call = _calls(suite, small, dtype, pass_name, clock)
        samples["resident"] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(ROUNDS):
            call.prepare()
            samples["resident"].append(clock.time(call) * shape.rows / small.rows / threads)
        torch.set_num_threads(threads)
    row = {name: measure.summary(seconds)["ms"] for name, seconds in samples.items()}
    sweeps = 1 if pass_name == FORWARD else 2
    count = sweeps * suite.streams * inputs[0].numel() * (shape.vocabulary > 1)
    row["exponentials"] = round(1e3 * count / clock.floors.exponentials_per_second(), 4)
    return row | {"noisy": noise.get("noisy", False)}


def sample(name, shape, dtype, pass_name):
    """The functions that `perf` finds the operator in, with their share of the samples."""
    loop = [sys.executable, "-m", "benchmarks.limits", "--loop", name, shape, dtype, pass_name]
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        with subprocess.Popen(loop, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # attached when all is ready: no import, no inputs in it
            record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "997", "-o", data]
            record += ["-p", str(process.pid), "--", "sleep", str(PERF_SECONDS)]
            subprocess.run(record, check=True, capture_output=True)
            process.terminate()
        report = ["perf", "report", "-i", data, "--stdio", "--no-children", "--percent-limit", "2"]
        report += ["--sort", "dso,symbol"]
        text = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+([\d.]+)%\s+(\S+)\s+\[[.k]\]\s+(.*?)[\s-]*$", text, re.MULTILINE)
    return [{"percent": float(p), "library": dso, "function": name} for p, dso, name in found]


def loop(name, shape, dtype, pass_name):
    """What `perf` watches: the operator, with a fresh gradient, until it is ended."""
    suite = suites()[name]
    inputs = suite.inputs(SHAPES[shape], DTYPES[dtype], torch.device("cpu"))
    variant = next(
        v for v in suite.variants(DTYPES[dtype], inputs[0].device) if v.kind == "tokcore"
    )
    call = Call(variant, suite, inputs, pass_name)
    call()
    print("ready", flush=True)
    while True:
        call()


def table(rows):
    names = ("floor", "exponentials", "resident", "cold")
    lines = ["| operator, shape, dtype, pass | " + " | ".join(names) + " |"]
    lines.append("|" + " --- |" * (len(names) + 1))
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" for name in names)
        lines.append(f"| {row['what']}{' (noisy)' if row['noisy'] else ''} | {cells} |")
    for row in rows:
        for i, function in enumerate(row.get("functions", [])):
            lines += ["", row["what"]] * (i == 0)
            lines.append("{percent:6.1f} %  {function}  ({library})".format(**function))
    return "\n".join(lines)


def parse(arguments):
    names = ["token_logprob", "sequential_kl", *bars.ADVANTAGES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=[*MODELS, "1e7"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--perf", action="store_true", help="name the functions")
    parser.add_argument("--out", type=Path, help="limits.json of the device")
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.loop:
        loop(*options.loop)
    if options.perf and not shutil.which("perf"):
        sys.exit("limits: no perf on this machine (Debian: apt-get install linux-perf)")
    clock, rows = measure.CpuClock(), []
    for name in options.only:
        suite = suites()[name]
        for shape, dtype, pass_name in suite.groups(options.shapes, options.dtypes):
            row = {"what": f"{name}, {shape}, {dtype}, {pass_name}"}
            row |= profile(clock, suite, SHAPES[shape], DTYPES[dtype], pass_name)
            if options.perf:
                row["functions"] = sample(name, shape, dtype, pass_name)
            rows.append(row)
    out = options.out or machine.results_folder("cpu") / "limits.json"
    document = {"environment": machine.environment("cpu"), "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
