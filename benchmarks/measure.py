"""How a call is measured: cold, or warm if short; interleaved; its peak memory to the page."""

import ctypes
import gc
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks.floors import Floors
from benchmarks.machine import last_level_cache_bytes

MB = 1e6


class CpuClock:
    """Wall time and peak resident memory."""

    device = torch.device("cpu")

    def __init__(self):
        self.floors = Floors()
        # Twice the cache: nothing of what it held survives, whatever its replacement policy.
        self._flush = torch.ones(2 * last_level_cache_bytes() // 4)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: 0)

    def cool(self):
        """Neither data nor pages are at hand for the next call.

        What one variant freed may stay mapped in the heap and spare the next one the page faults
        that it would meet alone; so all free memory goes back to the kernel, then the caches are
        filled with something else.
        """
        self._trim(0)
        self.floors.read([self._flush])

    def time(self, run):
        """Seconds of one call. Its result is released after the clock stops."""
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    def peak(self, run):
        """(peak bytes above what was resident before one call, its seconds).

        Pages are counted by the kernel, and cool() has unmapped the free ones, so the figure is
        that of a process which makes this call alone.
        """
        gc.collect()
        self.cool()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = self._resident("VmRSS")
        seconds = self.time(run)  # the high-water mark stays when the result is released
        return max(0, self._resident("VmHWM") - before), seconds

    @staticmethod
    def _resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class WarmCpuClock(CpuClock):
    """Times a call that follows another of its kind; the first where code and data are no matter.

    What takes less than a millisecond would, cold, be mostly the fetching of its code.
    """

    LONG = 0.1  # seconds

    def time(self, run):
        seconds = super().time(run)
        return seconds if seconds > self.LONG else super().time(run)


class CudaClock:
    """Event time and the caching allocator's peak."""

    device = torch.device("cuda")

    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")

    def cool(self):
        self._flush.zero_()

    def time(self, run):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3

    def peak(self, run):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = self.time(run)
        return torch.cuda.max_memory_allocated() - before, seconds


def clock(device, warm=False):
    if device == "cuda":
        return CudaClock()
    return WarmCpuClock() if warm else CpuClock()


def interleave(timer, runs, rounds, seed=0):
    """name -> seconds of `rounds[name]` cold calls of each (prepare, run) in `runs`.

    One pass over all variants in a new random order is one round, so that a slow phase of the
    machine, its clock or its neighbours, falls on all of them. A variant with fewer rounds than the
    others is spread over the whole time.
    """
    order, total = random.Random(seed), max(rounds.values())
    samples = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for i in range(total):
            due = [n for n in runs if (i + 1) * rounds[n] // total > i * rounds[n] // total]
            order.shuffle(due)
            for name in due:
                prepare, run = runs[name]
                prepare()
                timer.cool()
                samples[name].append(timer.time(run))
    finally:
        gc.enable()
    return samples


def summary(seconds):
    """Median, minimum and quartiles in milliseconds, and how many rounds they come from."""
    ordered = sorted(seconds)
    low, _, high = statistics.quantiles(ordered * 2 if len(ordered) == 1 else ordered, n=4)
    values = {"ms": statistics.median(ordered), "min_ms": ordered[0], "q1_ms": low, "q3_ms": high}
    return {name: round(1e3 * value, 4) for name, value in values.items()} | {
        "rounds": len(ordered)
    }
