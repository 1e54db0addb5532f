"""TOKCORE_ISA: the instruction set that is asked for is the one that runs."""

import json
import os
import subprocess
import sys

import pytest

import tokcore

LEVELS = ("avx512", "avx2", "baseline")
AVAILABLE = tokcore.build_info()["isas_available"]

# Calls one operator and prints which level says that it was called, and what build_info says.
PROGRAM = """
import ctypes, json, torch, tokcore
from tokcore import _library
calls = _library._handles[_library.CPU].tokcore_cpu_isa_calls
calls.restype, calls.argtypes = ctypes.c_int64, [ctypes.c_char_p]
before = {level: calls(level.encode()) for level in LEVELS}
logits = torch.linspace(-3, 3, 4 * 1001).reshape(4, 1001)
result = tokcore.ops.token_logprob(logits, torch.arange(4))
after = {level: calls(level.encode()) for level in LEVELS}
truth = logits.double().log_softmax(-1)[range(4), range(4)]
print(json.dumps({
    "isa": tokcore.build_info()["isa"],
    "called": [level for level in LEVELS if after[level] > before[level]],
    "error": (result - truth).abs().max().item(),
}))
"""


def run(level: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TOKCORE_ISA"}
    if level is not None:
        environment["TOKCORE_ISA"] = level
    command = [sys.executable, "-c", f"LEVELS = {LEVELS}\n{PROGRAM}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_asked_for_is_the_one_that_runs(level):
    result = run(level)
    if level not in AVAILABLE:
        assert result.returncode != 0, "a level that this CPU cannot run must be refused"
        assert level in result.stderr
        return
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["isa"] == level
    assert seen["called"] == [level]
    assert seen["error"] < 1e-5


def test_the_best_level_is_the_default():
    result = run(None)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    best = next(level for level in LEVELS if level in AVAILABLE)
    assert (seen["isa"], seen["called"]) == (best, [best])


def test_an_unknown_level_is_an_error_that_names_the_known_ones():
    result = run("sse9")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "TOKCORE_ISA" in last
    assert "sse9" in last
    assert all(level in last for level in LEVELS)
