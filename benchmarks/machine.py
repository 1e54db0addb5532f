"""The machine under a number: what it is, and how quiet it was meanwhile."""

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

import torch

import tokcore

RESULTS = Path(__file__).parent / "results"

# Cores kept busy by other processes, or taken by the hypervisor, from which a median is not to be
# trusted: on two cores one twentieth of the machine.
NOISY_CORES = 0.10

# Whose versions belong to a result, as they are called on PyPI.
PACKAGES = (
    *("liger_kernel", "trl", "triton"),
    *("dtaidistance", "librosa", "monotonic_alignment_search", "numba", "openai-whisper"),
    *("jiwer", "rapidfuzz", "sacrebleu", "tslearn"),
)


def cpu_flags():
    """Model and instruction sets, as the kernel tells them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model", "flags"))}))
    return " ".join(os.uname())


def cpu_name():
    for line in cpu_flags().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def last_level_cache_bytes():
    """32 MB where the kernel does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := file.read_text().strip())[-1] in units
    ]
    return max(sizes, default=32 << 20)


def results_folder(device):
    """One for each GPU, and for each processor with the instruction set that ran."""
    if device == "cuda":
        name = torch.cuda.get_device_name(0)
    else:
        name = f"{cpu_name()} {tokcore.build_info()['isa']}"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device):
    """What has to stand beside every number: device, threads, instruction set, versions, date."""
    info = tokcore.build_info()
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_mb": last_level_cache_bytes() / 1e6,
        # Without the libraries' paths, which mean nothing elsewhere.
        "build_info": {name: value for name, value in info.items() if name != "libraries"},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[package] = importlib.metadata.version(package)
    return result


@contextlib.contextmanager
def noise():
    """Yields a dict, filled at the end with what others took meanwhile. Empty outside of Linux."""
    report, before = {}, _cpu_times()
    yield report
    after = _cpu_times()
    if before and after:
        wall, busy, stolen, own = (b - a for a, b in zip(before, after, strict=True))
        report["seconds"] = round(wall, 2)
        report["other_cores"] = round(max(0.0, busy - own) / wall, 3)
        report["stolen_cores"] = round(stolen / wall, 3)
        report["load"] = round(os.getloadavg()[0], 2)
        report["noisy"] = report["other_cores"] + report["stolen_cores"] > NOISY_CORES


def _cpu_times():
    """(wall, busy on all cores, stolen, this process) in seconds."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    user, nice, system, _idle, _wait, interrupt, soft_interrupt, stolen = seconds
    busy = user + nice + system + interrupt + soft_interrupt
    return time.perf_counter(), busy, stolen, sum(os.times()[:4])
