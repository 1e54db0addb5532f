"""SongMASS's alignment as its authors compute it, and as a plain loop in C++. No package has it."""

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch

from benchmarks.floors import compiled

PENALTY = 0.5
SOURCE = Path(__file__).with_suffix(".cpp")
# What a compiler does to plain code anywhere; contracted sums would break ties in another way.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=off")


def authors(scores, penalty=PENALTY):
    """The mean of each candidate by NumPy, one matrix after the other. -> [(score, groups)]."""
    return [_authors(matrix, penalty) for matrix in scores.double().numpy()]


def _authors(scores, penalty):
    rows, columns = scores.shape
    best = np.full((rows + 1, columns + 1), -np.inf)
    best[0, 0] = 0
    moves = np.zeros((rows, columns), dtype=int)
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            found = -np.inf
            for k in range(i):
                mean = np.mean(scores[k:i, j - 1])
                value = best[k, j - 1] + mean - penalty * (i - k) / rows
                if value > found:
                    found, moves[i - 1, j - 1] = value, i - k
            for k in range(j):
                mean = np.mean(scores[i - 1, k:j])
                value = best[i - 1, k] + mean - penalty * (j - k) / columns
                if value > found:
                    found, moves[i - 1, j - 1] = value, k - j
            best[i, j] = found
    i, j, groups = rows, columns, []
    while i > 0:
        move = moves[i - 1, j - 1]
        start = (i - max(move, 1), j - max(-move, 1))
        groups.append((start[0], i, start[1], j))
        i, j = start
    return best[rows, columns], groups[::-1]


@functools.cache
def _library():
    return compiled(SOURCE, FLAGS)


def plain_loop(scores, penalty=PENALTY):
    """Of contiguous float64 scores: (score, groups, counts), as `monotonic_align` has them."""
    batch, rows, columns = scores.shape
    score = torch.empty(batch, dtype=torch.float64)
    groups = torch.empty(batch, rows + columns - 1, 4, dtype=torch.int32)
    counts = torch.empty(batch, dtype=torch.int32)
    pointers = [ctypes.c_void_p(value.data_ptr()) for value in (scores, score, groups, counts)]
    sizes = [ctypes.c_int64(size) for size in scores.shape]
    _library().align(pointers[0], *sizes, ctypes.c_double(penalty), *pointers[1:])
    return score, groups, counts
