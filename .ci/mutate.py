"""Mutation proof: is the loss of a barrier, a mask or a bound in csrc/cuda noticed by a test?

Removes or weakens one synchronisation, mask, bound, guard or reduction step at a time in a scratch
copy of csrc, rebuilds libtokcore_emulated.so and runs the operator tests on it. A mutation that no
test notices must be explained in .ci/mutation_survivors.md; an unexplained one fails the run.

    python .ci/mutate.py --list                    what would be tried
    python .ci/mutate.py --all --jobs 2            everything (about an hour)
    python .ci/mutate.py --all --unexplained       all but those that the table explains already
    python .ci/mutate.py --sample 12 --seed 3      a sample, as CI does
    python .ci/mutate.py --changed main            only files that differ from a commit
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
SURVIVORS = ROOT / ".ci" / "mutation_survivors.md"
LIBRARY = "libtokcore_emulated.so"
QUIET = {"capture_output": True, "text": True}
PYTHON = sys.executable
# opcheck and torch.compile, half of the time, look at the schemas; the kernels run everywhere else
TESTS = ["python_tests/ops", "--ignore-glob=*contracts.py"]
SANITIZE = "-fsanitize=address,bounds -fno-sanitize-recover=bounds"
SEEDS = (1, 2, 3)  # orders of blocks and threads
ORDERED = {"barrier", "mask", "shuffle"}  # kinds that another order may tell from the original


@dataclass(frozen=True)
class Mutation:
    path: str  # relative to the repository
    line: int  # from 0
    kind: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Its name in the table of survivors: no line number, so that edits elsewhere keep it."""
        return self.path, self.kind, self.before.strip(), self.after.strip()

    def __str__(self) -> str:
        after = self.after.strip() or "(nothing)"
        return f"{self.path}:{self.line + 1} [{self.kind}] {self.before.strip()}  =>  {after}"


def _swap(pattern: str, *replacements: str):
    """Each match of `pattern` gives one mutation per replacement."""
    compiled = re.compile(pattern)

    def rule(code: str) -> Iterator[str]:
        for match in compiled.finditer(code):
            for replacement in replacements:
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                if changed != code:
                    yield changed

    return rule


def _conditions(code: str) -> Iterator[str]:
    """An `if` that always holds; one that only leaves (return, continue, break) never holds."""
    match = re.search(r"\bif (?:constexpr )?\(", code)
    if match is None or "constexpr" in match.group():
        return
    depth, end = 1, match.end()
    while end < len(code) and depth:
        depth += {"(": 1, ")": -1}.get(code[end], 0)
        end += 1
    if depth:
        return  # the condition goes on in the next line
    leaves = re.match(r"\s*(return|continue|break)\b", code[end:])
    yield code[: match.end()] + ("false" if leaves else "true") + code[end - 1 :]


# Comparisons are recognised by clang-format's blanks: template brackets have none.
RULES = {
    "barrier": [_swap(r"\b__sync(?:threads|warp)\([^()]*\);", ";")],
    "mask": [
        _swap(r"\b(kWholeWarp|kFullMask)\b(?! =)", r"(\1 >> 16)"),
        _swap(r"\b0xffffffffu?\b", "0x0000ffffu"),
        _swap(r"\b__activemask\(\)", "(__activemask() >> 1)"),
    ],
    "shuffle": [
        _swap(r"\b__shfl_xor_sync\(", "__shfl_down_sync("),
        _swap(r"\b__shfl_down_sync\(", "__shfl_up_sync("),
        _swap(r"\b__shfl_up_sync\(", "__shfl_down_sync("),
        _swap(r"= (\w+) / 2;", r"= \1 / 4;"),
        _swap(r"\b(offset|delta|lanes) > 0;", r"\1 > 1;"),
        _swap(r"(>>|<<)= 1\b", r"\1= 2"),
        _swap(r"/= 2\b", r"/= 4"),
    ],
    "bound": [
        _swap(r" < ", " <= "),
        _swap(r" <= ", " < "),
        _swap(r" > ", " >= "),
        _swap(r" >= ", " > "),
        _swap(r"(?<=[\w)\]]) - 1(?![.\w])", ""),
        _swap(r"(?<=[\w)\]]) \+ 1(?![.\w])", ""),
        _swap(r"\b(\w+) / (\w+) \* \2\b", r"\1"),
        _swap(r"\b(\w+) % [\w:]+(?:<\w+>)?(?:::\w+)?", r"\1"),
    ],
    "guard": [
        _conditions,
        _swap(r"\b(threadIdx\.x|lane|warp|thread)(?:\(\))? == 0\b", r"\1 == 1"),
        _swap(r" && ", " || "),
        _swap(r" \|\| ", " && "),
    ],
    "reduction": [
        _swap(r"^(\s*)[\w.\[\]]+ [+|^]= [^;]+;", r"\1;"),
        _swap(r"\b(?:max|min|fmaxf?|fminf?)\((\w[\w.\[\]]*), ", r"keep_first(\1, "),
        _swap(r"^(\s*)[\w.\[\]]+ = (?:merge|combine|\w*[rR]educe\w*)\(.*;", r"\1;"),
        _swap(r"\+= (blockDim\.x|kThreads|kWarpThreads)\b", r"+= 2 * \1"),
    ],
}
# keep_first(a, b) is replaced afterwards: it takes the bracket that closes the call.
_KEEP_FIRST = re.compile(r"keep_first\(([^,]+), ")


def _code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that the emulated build compiles, without comments: not what only nvcc sees."""
    hidden: list[bool] = []
    continued = False
    for number, line in enumerate(text.split("\n")):
        stripped = line.strip()
        if stripped.startswith("#") or continued:
            continued = stripped.endswith("\\")
            if re.match(r"#\s*if", stripped):
                hidden.append("__CUDA" in stripped and "!" not in stripped)
                nvcc_next = "__CUDA" not in stripped and "TOKCORE_EMULATED" in stripped
            elif re.match(r"#\s*(else|elif)", stripped):
                hidden[-1] = nvcc_next
            elif re.match(r"#\s*endif", stripped):
                hidden.pop()
            continue
        code = line.split("//")[0].rstrip()
        if any(hidden) or not code.strip():
            continue
        if re.match(r"\s*(template <|static_assert|using |STABLE_TORCH|TOKCORE_LIBRARY)", code):
            continue
        yield number, code


def mutations(path: Path) -> list[Mutation]:
    """Every mutation of one file, in file order, each different from the others."""
    found: dict[tuple[int, str], Mutation] = {}
    name = str(path.relative_to(ROOT))
    for number, code in _code_lines(path.read_text()):
        quoted = [match.span() for match in re.finditer(r'"(?:[^"\\]|\\.)*"', code)]
        for kind, rules in RULES.items():
            for rule in rules:
                for changed in rule(code):
                    pairs = enumerate(zip(code, changed, strict=False))
                    at = next((i for i, (a, b) in pairs if a != b), len(changed))
                    if any(start <= at < end for start, end in quoted):
                        continue
                    changed = _keep_first(changed)
                    found.setdefault((number, changed), Mutation(name, number, kind, code, changed))
    return sorted(found.values(), key=lambda m: m.line)


def _keep_first(code: str) -> str:
    match = _KEEP_FIRST.search(code)
    if match is None:
        return code
    depth, end = 1, match.end()
    while end < len(code) and depth:
        depth += {"(": 1, ")": -1}.get(code[end], 0)
        end += 1
    return code[: match.start()] + match.group(1) + code[end:]


def operators_of(path: str) -> set[str]:
    """The operators whose kernels are in this file or include it."""

    def includes(file: Path) -> set[Path]:
        names = re.findall(r'#include "(cuda/[^"]+)"', file.read_text())
        return {file}.union(*(includes(ROOT / "csrc" / name) for name in names))

    return {file.stem for file in KERNELS.glob("*.cu") if ROOT / path in includes(file)}


def explained() -> dict[tuple[str, str, str, str], str]:
    """The table of survivors: | file | kind | `before` | `after` | why |."""
    table = {}
    if SURVIVORS.exists():
        for row in SURVIVORS.read_text().splitlines():
            match = re.fullmatch(r"\| (\S+) \| (\w+) \| `(.*?)` \| `(.*?)` \| (.+) \|", row)
            if match:
                path, kind, before, after, why = match.groups()
                table[path, kind, _unescape(before), _unescape(after)] = why
    return table


def _escape(code: str) -> str:
    return code.replace("|", "\\|") or " "


def _unescape(cell: str) -> str:
    return cell.replace("\\|", "|").strip()


class Build:
    """libtokcore_emulated.so from a scratch copy of the sources, and the operator tests on it."""

    def __init__(
        self, sources: Path, name: str, sanitize: str, options: argparse.Namespace
    ) -> None:
        self.folder = sources / name
        self.arguments = options.pytest
        self.environment = {
            **os.environ,
            "TOKCORE_LIBRARY_DIR": str(self.folder / "lib"),
            "TOKCORE_TEST_BACKENDS": "emulated",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        if sanitize:
            # libstdc++ too: without it in the preload the first C++ exception ends the process
            names = ["libasan.so", "libstdc++.so.6"]
            found = [["gcc", f"-print-file-name={name}"] for name in names]
            paths = [subprocess.check_output(command, text=True).strip() for command in found]
            self.environment.update(LD_PRELOAD=" ".join(paths), ASAN_OPTIONS="detect_leaks=0")
        configure = ["cmake", "-S", str(sources), "-B", str(self.folder), "-G", "Ninja"]
        # unoptimised: a mutant waits for the compiler more than for the tests
        configure += ["-DTOKCORE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"]
        configure += [f"-DCMAKE_CXX_FLAGS_DEBUG=-O0 {sanitize}", f"-DPython_EXECUTABLE={PYTHON}"]
        subprocess.run(configure, check=True, **QUIET)
        if not self.compiles():
            sys.exit("mutate: the unchanged kernels do not compile")
        # the CPU library as it is; the mutated one beside it
        built = Path(os.environ.get("TOKCORE_LIBRARY_DIR", ROOT / "tokcore")) / "libtokcore.so"
        if not built.exists():
            sys.exit(f"mutate: {built} is missing; run `make build` first")
        (self.folder / "lib").mkdir()
        (self.folder / "lib" / built.name).symlink_to(built.absolute())
        (self.folder / "lib" / LIBRARY).symlink_to(self.folder / LIBRARY)
        self.limits: dict[str, float] = {}

    def compiles(self) -> bool:
        command = ["cmake", "--build", str(self.folder), "--target", "tokcore_emulated"]
        return subprocess.run(command, **QUIET).returncode == 0

    def prepare(self, path: str) -> None:
        """Times the tests of `path` on unchanged kernels: they must pass, and a mutated loop may
        never end.
        """
        if path not in self.limits:
            self.compiles()
            start = time.monotonic()
            if failure := self.failure(1, path):
                sys.exit(f"mutate: the tests fail on the unchanged kernels\n{failure}")
            self.limits[path] = 5 * (time.monotonic() - start) + 60

    def failure(self, seed: int, path: str) -> str | None:
        """None when every test passes, else the end of what pytest said. Tests that name operators
        without this file are left out; those of the operators with it are the likeliest to notice.
        """
        own = operators_of(path)
        others = {file.stem for file in KERNELS.glob("*.cu")} - own
        first = [file for o in own for file in (ROOT / "python_tests/ops").glob(f"test_{o}*.py")]
        tests = [str(file) for file in sorted(first) if not file.stem.endswith("contracts")] + TESTS
        chosen = " and not ".join(["emulated", *sorted(others)])
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", chosen]
        try:
            result = subprocess.run(
                [PYTHON, "-m", "pytest", *options, *tests, *self.arguments],
                cwd=ROOT,
                env={**self.environment, "TOKCORE_TEST_SEED": str(seed)},
                capture_output=True,
                text=True,
                timeout=self.limits.get(path),
            )
        except subprocess.TimeoutExpired:
            return "timed out"
        if result.returncode == 0:
            return None
        # A sanitizer ends the process with its text still in pytest's capture: nothing is printed.
        return f"exit status {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"


class Worker:
    """A scratch copy of the sources, in which one mutation at a time is tried."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        self.plain = Build(folder, "plain", "", options)

    @cached_property
    def sanitized(self) -> Build:
        return Build(self.folder, "sanitized", SANITIZE, self.options)

    def try_one(self, mutation: Mutation) -> str:
        path = self.folder / mutation.path
        original = path.read_text()
        lines = original.split("\n")
        assert lines[mutation.line].split("//")[0].rstrip() == mutation.before
        self.plain.prepare(mutation.path)
        lines[mutation.line] = mutation.after
        path.write_text("\n".join(lines))
        try:
            if not self.plain.compiles():
                return "does not compile"
            ordered = mutation.kind in ORDERED or "threadIdx" in mutation.before
            seeds = SEEDS if ordered else SEEDS[:1]
            if any(self.plain.failure(seed, mutation.path) for seed in seeds):
                return "killed"
            # Past the end of something it may read or write without a trace: CI runs the same tests
            # under the sanitizers.
            path.write_text(original)
            sanitized = self.sanitized
            sanitized.prepare(mutation.path)
            path.write_text("\n".join(lines))
            sanitized.compiles()
            found = sanitized.failure(1, mutation.path)
            return "killed by a sanitizer" if found else "survived"
        finally:
            path.write_text(original)


def select(options: argparse.Namespace) -> list[Mutation]:
    paths = sorted(p for p in KERNELS.rglob("*") if p.suffix in {".cu", ".cuh", ".h"})
    if options.changed:
        command = ["git", "diff", "--name-only", options.changed, "--", "csrc/cuda"]
        changed = subprocess.check_output(command, cwd=ROOT, text=True).split()
        paths = [p for p in paths if str(p.relative_to(ROOT)) in changed]
    chosen = [m for path in paths for m in mutations(path) if options.only in str(m)]
    if options.unexplained:
        known = explained()
        chosen = [m for m in chosen if m.key not in known]
    if options.sample is not None and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every mutation (the default)")
    which.add_argument("--changed", metavar="BASE", help="of files that differ from commit BASE")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="whose line contains TEXT")
    parser.add_argument("--unexplained", action="store_true", help="leave explained survivors out")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "mutate")
    parser.add_argument("pytest", nargs="*", help="after --: further arguments for pytest")
    options = parser.parse_args()

    chosen = select(options)
    if options.list:
        print(*chosen, sep="\n")
        print(f"{len(chosen)} mutations")
        return 0

    reasons = explained()
    workers: queue.Queue[Worker] = queue.Queue()
    for i in range(min(options.jobs, max(1, len(chosen)))):
        workers.put(Worker(options.scratch / str(i), options))

    def attempt(mutation: Mutation) -> tuple[Mutation, str]:
        worker = workers.get()
        try:
            return mutation, worker.try_one(mutation)
        finally:
            workers.put(worker)

    outcomes = ["killed", "killed by a sanitizer", "survived", "does not compile"]
    count = dict.fromkeys(outcomes, 0)
    unexplained = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, outcome in pool.map(attempt, chosen):
            count[outcome] += 1
            reason = reasons.get(mutation.key)
            note = f" ({reason})" if outcome == "survived" and reason else ""
            print(f"{outcome}: {mutation}{note}", flush=True)
            if outcome == "survived" and reason is None:
                unexplained.append(mutation)
    print(", ".join(f"{n} {outcome}" for outcome, n in count.items()))
    if unexplained:
        print(f"\n{len(unexplained)} survivors without an explanation in {SURVIVORS.name}:")
        for m in unexplained:
            path, kind, before, after = m.key
            print(f"| {path} | {kind} | `{_escape(before)}` | `{_escape(after)}` | why |")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
