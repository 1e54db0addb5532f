"""The loops of floor.cpp: what this machine needs for the bytes, or the exponentials, alone.

Compiled on the spot with the system compiler (-O3 -march=native -fopenmp) into a temporary folder
that is kept between runs, and called through ctypes: a floor has to use everything this machine
has, which no distributed binary can.
"""

import ctypes
import getpass
import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch  # first: the loops then share its OpenMP threads, and no two pools spin on one core

from benchmarks.machine import cpu_flags

SOURCE = Path(__file__).with_name("floor.cpp")
# Without the last two flags a vector exponential becomes a call per element.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),
)


def compiler():
    return os.environ.get("CXX", "c++")


class Floors:
    def __init__(self):
        self._library = compiled(SOURCE, FLAGS)
        self._library.floor_read.restype = ctypes.c_uint64
        self._library.floor_exp.restype = ctypes.c_float

    def read(self, tensors, nbytes=None):
        """Reads the first `nbytes` (default: all) of equally long tensors, side by side."""
        nbytes = tensors[0].nbytes if nbytes is None else nbytes
        self._library.floor_read(
            _pointers(tensors), len(tensors), ctypes.c_size_t(nbytes), torch.get_num_threads()
        )

    def write(self, tensors, destination, nbytes=None):
        """Reads the tensors and writes `destination` beside, with stores that bypass the caches."""
        nbytes = destination.nbytes if nbytes is None else nbytes
        self._library.floor_write(
            _pointers(tensors),
            len(tensors),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(destination.data_ptr()),
            torch.get_num_threads(),
        )

    def exponentials_per_second(self, seconds=0.3):
        """Rate of a vector exponential and its sum on every thread, fed from the first cache."""
        block, threads, repeats = -10 * torch.rand(2048), torch.get_num_threads(), 64
        while True:
            pointer, count = ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(repeats)
            start = time.perf_counter()
            self._library.floor_exp(pointer, block.numel(), count, threads)
            elapsed = time.perf_counter() - start
            if elapsed > seconds:
                return block.numel() * repeats * threads / elapsed
            repeats *= 4


def _pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def compiled(source, flags):
    """The library that the system compiler makes of one file."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    # With the processor: -march=native makes another library elsewhere, and folders are shared.
    key = "\n".join([source.read_text(), version.stdout, " ".join(flags), cpu_flags()])
    folder = Path(tempfile.gettempdir()) / f"tokcore-floor-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), *flags, str(source), "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return ctypes.CDLL(str(library))
