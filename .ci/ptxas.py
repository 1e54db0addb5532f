"""Reads what nvcc -Xptxas=-v printed, writes one line per kernel, and fails on a register spill.

python .ci/ptxas.py build/ci/build.log build/ptxas.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

COMPILED = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def main(log: str, report: str) -> int:
    kernels: list[dict] = []
    for line in Path(log).read_text().splitlines():
        if match := COMPILED.search(line):
            empty = dict.fromkeys(["registers", "shared", "stack", "spill"], 0)
            kernels.append({"name": match[1], "arch": match[2], **empty})
        elif match := STACK.search(line):
            # once for the kernel and once for each function in it that was not inlined
            kernels[-1]["stack"] += int(match[1])
            kernels[-1]["spill"] += int(match[2]) + int(match[3])
        elif match := USED.search(line):
            kernels[-1]["registers"] = int(match[1])
            kernels[-1]["shared"] = int(shared[1]) if (shared := SHARED.search(line)) else 0
    if not kernels:
        sys.exit(f"ptxas: {log} reports no kernel; was it compiled with -Xptxas=-v?")

    names = "\n".join(kernel["name"] for kernel in kernels)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    for kernel, name in zip(kernels, demangled.stdout.splitlines(), strict=True):
        kernel["name"] = name
    kernels.sort(key=lambda k: (k["arch"], k["name"]))
    row = "{arch:>6} {registers:>9} {shared:>6} {stack:>5} {spill:>5}  {name}"
    lines = ["  arch registers shared stack spill  kernel"] + [row.format(**k) for k in kernels]
    Path(report).write_text("\n".join([*lines, ""]))

    spilling = [row.format(**k) for k in kernels if k["spill"]]
    most = max(k["registers"] for k in kernels)
    print(f"{len(kernels)} kernels, at most {most} registers, {len(spilling)} spill; see {report}")
    print(*spilling, sep="\n", end="\n" if spilling else "")
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
