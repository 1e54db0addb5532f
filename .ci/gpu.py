"""What only a GPU can show. On a machine with a CUDA torch: build, test, sanitize, measure.

    python .ci/gpu.py                        everything; writes benchmarks/results/<device>/
    python .ci/gpu.py --wheels ./wheels      no network: pip takes what is missing from this folder
    python .ci/gpu.py --only tests           one step (build, tests, sanitizer, benchmarks)
    python .ci/gpu.py --dry-run              print the commands, run nothing; needs no GPU

Uses the Python that runs it, and its torch: installs whatever else is missing, never a torch.
Builds in place for the GPU that is there; without nvcc it takes the libraries that lie in tokcore/
already. Exit status 1 when a step fails; the others still run, and gpu.json holds each outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "tests", "sanitizer", "benchmarks")
PEERS = ("liger_kernel", "trl", "triton")  # measured against when they can be imported
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def machine(dry_run: bool) -> dict:
    import torch

    if dry_run:
        return {"device": "dry-run", "architecture": "90", "torch": torch.__version__}
    if torch.version.cuda is None or not torch.cuda.is_available():
        sys.exit(f"gpu: torch {torch.__version__} sees no GPU; install a CUDA build of torch first")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return {
        "device": torch.cuda.get_device_name(),
        "architecture": "{}{}".format(*torch.cuda.get_device_capability()),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def commands(step: str, facts: dict, wheels: Path | None, results: Path) -> list[dict]:
    """The commands of one step: {"run": [...], "environment": {...}}."""
    if step == "build":
        return build(facts, wheels)
    if step == "tests":
        return [{"run": PYTEST}]
    if step == "sanitizer":
        if shutil.which("compute-sanitizer") is None:
            print("gpu: SKIPPED sanitizer: compute-sanitizer (CUDA toolkit) is not on PATH")
            return []
        # without torch's caching allocator each tensor is an allocation whose ends are checked
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        test = [*PYTEST, "-x", "python_tests/ops", "-k", "cuda and not compile"]
        return [
            {
                "run": ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *test],
                "environment": environment,
            }
            for tool in ("memcheck", "racecheck", "synccheck")
        ]
    report = ["-m", "benchmarks.report", "--device", "cuda", "--out", str(results)]
    return [{"run": [sys.executable, *report]}]


def build(facts: dict, wheels: Path | None) -> list[dict]:
    if shutil.which("nvcc") is None:
        missing = [n for n in ("", "_cuda") if not (ROOT / f"tokcore/libtokcore{n}.so").exists()]
        if missing:
            sys.exit("gpu: no nvcc on PATH, and no built libraries in tokcore/ to take instead")
        print("gpu: no nvcc on PATH; taking the libraries that lie in tokcore/")
    pip = [sys.executable, "-m", "pip", "install"]
    if wheels is not None:
        pip += ["--no-index", "--find-links", str(wheels)]
    constraints = Path(tempfile.gettempdir()) / "tokcore-constraints.txt"
    constraints.write_text(f"torch=={facts['torch']}\n")
    pip += ["--constraint", str(constraints)]
    tools = ["setuptools>=77", "wheel", "cmake>=3.22", "ninja", "pybind11>=2.13"]
    tools += ["pytest", "hypothesis", "expecttest", "pytest-benchmark", "numpy"]
    steps = [{"run": [*pip, *tools]}]
    if shutil.which("nvcc"):
        options = {"TOKCORE_CUDA": "ON", "TOKCORE_CUDA_ARCHS": facts["architecture"]}
        install = [*pip, "--no-build-isolation", "--no-deps", "--editable", "."]
        steps.append({"run": install, "environment": options})
    return steps


def run(command: dict, log: Path) -> int:
    environment = command.get("environment", {})
    text = " ".join([*(f"{k}={v}" for k, v in environment.items()), *command["run"]])
    print(f"+ {text}", flush=True)
    with log.open("a") as out:
        out.write(f"+ {text}\n")
        process = subprocess.Popen(
            command["run"],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT), **environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            sys.stdout.write(line)
            out.write(line)
    return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder with wheels, for a machine offline")
    parser.add_argument("--only", choices=STEPS, action="append", help="a step; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args()

    facts = machine(options.dry_run)
    folder = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    results = ROOT / "benchmarks" / "results" / folder
    outcome = {}
    for step in options.only or STEPS:
        todo = commands(step, facts, options.wheels, results)
        if options.dry_run:
            for command in todo:
                environment = [f"{k}={v}" for k, v in command.get("environment", {}).items()]
                print(f"{step}:", *environment, *command["run"])
            continue
        results.mkdir(parents=True, exist_ok=True)
        log = ROOT / "build" / "gpu" / f"{step}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        start = time.monotonic()
        codes = [run(command, log) for command in todo]
        last = log.read_text().rstrip().rsplit("\n", 1)[-1] if log.exists() else ""
        outcome[step] = {
            "ok": not any(codes) if codes else None,
            "seconds": round(time.monotonic() - start),
            "last_line": last,
        }
    if not options.dry_run:
        from importlib.util import find_spec

        facts["peers"] = [name for name in PEERS if find_spec(name)]
        report = json.dumps({**facts, "steps": outcome}, indent=2)
        (results / "gpu.json").write_text(report + "\n")
        print(report)
    return any(result["ok"] is False for result in outcome.values())


if __name__ == "__main__":
    sys.exit(main())
