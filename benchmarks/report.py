"""Runs every suite under both allocators and prints one table, and which bars are met.

    python -m benchmarks.report                        # everything; results/<device>/*.json
    python -m benchmarks.report --only sequential_kl   # one suite
    python -m benchmarks.report --resume               # only what is missing, or was noisy
    python -m benchmarks.report --table llama3         # no measurement: the table, for one model
    python -m benchmarks.report --quick                # tiny, into a temporary folder: for CI

Other packages are measured where they are installed; the files of baselines/ say how.

Allocators: "default" is glibc's, "huge pages" the same with THP_MEM_ALLOC_ENABLE=1, torch's switch
to 2 MB pages. On Linux with 4 KB pages most of plain torch's time goes into page faults of its
temporaries, so that one setting alone would show the allocator and not the arithmetic.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import bars, machine, run, suite

COLUMNS = (
    ("operator", "model", "dtype", "pass"),
    ("ms", "GB/s", "x floor", "vs compile", "vs torch"),
    ("MB", "MB compile", "MB torch"),
)
# Of operators on batches of matrices: loop and authors beside one thread, packages beside all.
MATRIX_COLUMNS = (
    *("operator", "batch", "dtype", "pass", "ms", "ms, one thread", "x threads"),
    *("vs loop", "vs authors", "vs package", "which", "MB"),
)


def measure_all(options, folder):
    """One process per suite and allocator. -> names of those that failed."""
    failed = []
    for allocator in options.allocators:
        environment = dict(os.environ)
        environment.pop("THP_MEM_ALLOC_ENABLE", None)
        if allocator == bars.HUGE:
            environment["THP_MEM_ALLOC_ENABLE"] = "1"
        for name in options.only:
            command = [sys.executable, "-m", "benchmarks.run", name, "--device", options.device]
            command += ["--out", str(folder / f"{name}.json"), "--allocator", allocator]
            command += ["--shapes", *options.shapes, "--dtypes", *options.dtypes]
            command += ["--resume"] * options.resume + ["--quick"] * options.quick
            print(f"--- {name}, {allocator} allocator", flush=True)
            result = subprocess.run(command, env=environment, cwd=machine.RESULTS.parents[1])
            if result.returncode:
                failed.append(f"{name}, {allocator}")
    return failed


# --- tables --------------------------------------------------------------------------------


def _fastest(group, kind):
    rows = [r for r in group["variants"].values() if r["kind"] == kind and "ms" in r and r["exact"]]
    return min(rows, key=lambda row: row["ms"], default=None)


def _ms(value, places):
    """Four places for what takes microseconds."""
    return f"{value:.{places if value >= 1 else 4}f}"


def _speed_cells(group, name):
    """ms, GB/s, ratio to the floor, how many times faster than torch.compile and plain torch."""
    row = (group or {"variants": {}})["variants"].get(name)
    if row is None:
        return [""] * len(COLUMNS[1])
    cells = [_ms(row["ms"], 1), f"{row['gb_s']:.0f}", f"{row['floor_ratio']:.2f}"]
    for kind in ("compile", "eager"):
        other = _fastest(group, kind)
        cells.append(f"{other['ms'] / row['ms']:.1f}x" if other else "")
    return cells


def _peak_cells(group, name):
    rows = [group["variants"][name], _fastest(group, "compile"), _fastest(group, "eager")]
    return [f"{row['peak_mb']:.{1 if row['peak_mb'] < 10 else 0}f}" if row else "" for row in rows]


def summary_table(documents, shapes):
    """One row for an operator, model, dtype and pass; both allocators side by side."""
    allocators = [a for a in run.ALLOCATORS if any(a in d["runs"] for d in documents)]
    titles = list(COLUMNS[0])
    for allocator in allocators:
        mark = "" if allocator == bars.DEFAULT else " (2 MB)"
        titles += [title + mark for title in COLUMNS[1]]
    lines = [titles + list(COLUMNS[2])]
    for document in documents:
        runs = [document["runs"].get(allocator, {"groups": {}}) for allocator in allocators]
        for key in dict.fromkeys(key for one in runs for key in one["groups"]):
            shape, dtype, pass_name = key.split()
            if shape not in shapes:
                continue
            groups = [one["groups"].get(key) for one in runs]
            first = next(group for group in groups if group)
            if suite.ONE_THREAD in first["variants"]:
                continue
            for name in (bars.TOKCORE, bars.IN_PLACE):
                if name in first["variants"]:
                    in_place = ", in place" if name == bars.IN_PLACE else ""
                    line = [document["suite"], suite.SHAPES[shape].name, dtype]
                    line.append(pass_name.replace("+", " + ") + in_place)
                    for group in groups:
                        line += _speed_cells(group, name)
                    lines.append(line + _peak_cells(first, name))
    return _markdown(lines)


def matrix_table(documents, shapes):
    """One row for an operator, batch and dtype, from the first allocator that was measured."""
    lines = [MATRIX_COLUMNS]
    for document in documents:
        for key, group in next(iter(document["runs"].values()))["groups"].items():
            shape, dtype, pass_name = key.split()
            if shape not in shapes or suite.ONE_THREAD not in group["variants"]:
                continue
            ours, one = (group["variants"][name] for name in (bars.TOKCORE, suite.ONE_THREAD))
            line = [document["suite"], suite.SHAPES[shape].name, dtype, pass_name]
            line += [_ms(ours["ms"], 1), _ms(one["ms"], 1), f"{one['ms'] / ours['ms']:.2f}"]
            for kind, beside in (("loop", one), ("authors", one), ("peer", ours)):
                other = _fastest(group, kind)
                line.append(f"{other['ms'] / beside['ms']:.1f}x" if other else "")
            peer = _fastest(group, "peer")
            names = [name for name, row in group["variants"].items() if row is peer]
            lines.append([*line, *(names or [""]), f"{ours['peak_mb']:.1f}"])
    return _markdown(lines)


def tables(documents, shapes):
    """Those that have a row."""
    found = [table(documents, shapes) for table in (summary_table, matrix_table)]
    return "\n\n".join(table for table in found if table.count("\n") > 1)


def group_table(group):
    """Every variant of one group."""
    lines = [["variant", "ms", "min", "quartiles", "GB/s", "x floor", "peak MB", "first call s"]]
    for name, row in group["variants"].items():
        if "error" in row:
            lines.append([name, row["error"]] + [""] * 6)
            continue
        peak, first = row.get("peak_mb"), row.get("first_call_s")
        median, least, low, high = (_ms(row[k], 2) for k in ("ms", "min_ms", "q1_ms", "q3_ms"))
        cells = [median, least, f"{low} - {high} ({row['rounds']})"]
        cells += [f"{row['gb_s']:.1f}", f"{row['floor_ratio']:.2f}"]
        cells.append("" if peak is None else f"{peak:.1f}")
        cells.append("" if first is None else f"{first:.1f}" + " (cached)" * row["code_cached"])
        exact = "" if row.get("exact", True) else " *"
        lines.append([name + exact, *cells])
    return _markdown(lines)


def _markdown(lines):
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *rows])


# --- text --------------------------------------------------------------------------------


def device_line(documents):
    """The sentence that belongs above every table."""
    environment = next(iter(documents[0]["runs"].values()))["environment"]
    info = environment["build_info"]
    words = [environment["device"], f"{environment['threads']} threads", f"ISA {info['isa']}"]
    words += [f"torch {info['torch']}", f"tokcore {info['tokcore']}"]
    return ", ".join([*words, *_versions(documents), environment["date"]])


def _versions(documents):
    """Of the packages that were there in any run."""
    runs = [run["environment"] for document in documents for run in document["runs"].values()]
    found = {name: one[name] for one in runs for name in machine.PACKAGES if name in one}
    return [f"{name} {version}" for name, version in found.items()]


def bar_lines(found):
    """A line for each missed bar, and the count; figures of the met ones are in bars.json."""
    missed = [bar for bar in found if not bar.passed]
    met = len(found) - len(missed)
    lines = [f"{met} of {len(found)} bars met; on a CPU they are set for two AVX-512 cores"]
    for bar in missed:
        where = f"{bar.suite}, {bar.group}, {bar.allocator} allocator"
        noisy = " (noisy run)" if bar.noisy else ""
        lines.append(
            f"- MISS {bar.rule}: {bar.value} not {bar.relation} {bar.limit}: {where}{noisy}"
        )
    return "\n".join(lines)


def full_text(documents, found):
    """results/<device>/README.md."""
    shapes = list(suite.SHAPES)
    parts = ["# Measured", device_line(documents) + ".", __doc__.split("\n\n")[-1].strip()]
    parts.append(
        "x floor: time over that of reading (and writing) the same bytes. vs: how many times "
        "faster than the best variant of the same accuracy. Medians of cold calls; of batches of "
        "matrices, warm ones, loop and authors beside one thread, packages beside all."
    )
    parts += [tables(documents, shapes), "## Bars", bar_lines(found)]
    for document in documents:
        for allocator, one in document["runs"].items():
            for key, group in one["groups"].items():
                noise = group["noise"]
                parts.append(f"### {document['suite']}, {key}, {allocator} allocator")
                if noise.get("noisy"):
                    parts.append(f"Noisy: {noise['other_cores']} cores were busy with other work.")
                parts.append(group_table(group))
    parts.append(
        "\\* computed in the logits' dtype: not of the same accuracy, and in no comparison."
    )
    return "\n\n".join(parts) + "\n"


def load(folder):
    files = [folder / f"{name}.json" for name in suite.suites()]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def parse(arguments):
    names = list(suite.suites())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SUITE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--allocators", nargs="+", choices=run.ALLOCATORS)
    parser.add_argument("--shapes", nargs="+", choices=list(suite.SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(suite.DTYPES))
    parser.add_argument("--resume", action="store_true", help="keep results that were not noisy")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--table", nargs="*", choices=list(suite.SHAPES), help="do not measure")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (["tiny"] if options.quick else suite.MEASURED)
    options.dtypes = options.dtypes or list(suite.DTYPES)
    # The caching allocator of CUDA maps its memory once: the switch concerns the CPU alone.
    one = options.quick or options.device == "cuda"
    options.allocators = options.allocators or ((bars.DEFAULT,) if one else run.ALLOCATORS)
    if options.out is None:
        options.out = machine.results_folder(options.device)
        if options.quick:
            options.out = Path(tempfile.gettempdir()) / "tokcore-benchmarks" / options.out.name
    return options


def main(arguments=None):
    options = parse(arguments)
    failed = [] if options.table is not None else measure_all(options, options.out)
    documents = load(options.out)
    if not documents:
        sys.exit(f"no results in {options.out}")
    found = bars.evaluate(documents)
    rows = [vars(bar) | {"passed": bar.passed} for bar in found]
    (options.out / "bars.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "README.md").write_text(full_text(documents, found))
    print(f"\n{device_line(documents)}\n")
    print(tables(documents, options.table or options.shapes))
    print(f"\n{bar_lines(found)}\nwritten to {options.out}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
