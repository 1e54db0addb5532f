"""Runs an example over several seeds and keeps what each ended with: results/<device>/study_x.json.

    python -m benchmarks.study tdpo --seeds 0 1 2 3 4 -- --alpha 0.1 0.3 0.5 0.7
    python -m benchmarks.study tdpo --table        # no run: the table of docs/algorithms/tdpo.md

The example's settings are its defaults and what stands behind `--`: chosen before the first seed is
run, and the same for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import machine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_seed(example, seed, flags):
    """Of one seed: what was measured before training, and method -> what it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLES / f"{example}.py"), "--seed", str(seed)]
        command += ["--output", folder, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "metrics.json").read_text())
    print(f"seed {seed} is done", flush=True)
    run = result if "methods" in result else result["runs"][str(seed)]
    before = {key: value for key, value in run.items() if isinstance(value, float)}
    methods = {
        name: found["history"][-1] | {key: found[key] for key in found if key != "history"}
        for name, found in run["methods"].items()
    }
    return {"seed": seed, **before, "methods": methods}


def table(runs):
    """Mean and standard deviation over the seeds, a row a method."""
    methods = runs[0]["methods"]
    keys = [key for key in next(iter(methods.values())) if key != "step"]
    lines = ["| | " + " | ".join(keys) + " |", "|" + " --- |" * (len(keys) + 1)]
    for name in methods:
        cells = []
        for key in keys:
            values = [run["methods"][name][key] for run in runs]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("example", help="its name under examples/, without .py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--table", action="store_true", help="do not run, print")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.epilog = "What stands behind -- goes to the example."
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or machine.results_folder(device) / f"study_{options.example}.json"
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(
                pool.map(lambda seed: run_seed(options.example, seed, flags), options.seeds)
            )
        document = {"example": options.example, "flags": flags, "runs": runs}
        document["environment"] = machine.environment(device)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(json.loads(out.read_text())["runs"]))


if __name__ == "__main__":
    main()
