"""Time and peak memory of alternatives that do the same work, measured in turn in one process."""

import ctypes
import re
import statistics
import time
from pathlib import Path

import torch


def side_by_side(title, runs, rounds):
    """Prints a line, and returns {name: {"ms": median, "mb": peak above what was held}}."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):  # in turn, so that a slow moment of the machine falls on all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    found = {
        name: {"ms": 1e3 * statistics.median(seconds[name]), "mb": _peak(run) / 1e6}
        for name, run in runs.items()
    }
    cells = [f"{name} {cell['ms']:7.1f} ms {cell['mb']:6.1f} MB" for name, cell in found.items()]
    print(f"{title:32}", *cells, sep="  ")
    return found


def _peak(run):
    """Peak bytes of the CUDA allocator, or of the resident set on Linux; NaN elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed counts again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    except (OSError, AttributeError):
        return float("nan")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])
