"""Monotonic alignment search: the package with Glow-TTS's Cython, and the same loop for Numba.

    pip install --no-deps monotonic-alignment-search numba llvmlite

Each returns the matrix of zeros and ones (B, text, frames).
"""

import functools

import numpy as np
import torch


def cython(scores, mask):
    """Sums in float32, one thread unless built with OpenMP."""
    from monotonic_alignment_search import maximum_path

    return maximum_path(scores, mask, implementation="cython")


def numpy(scores, mask):
    """The same package without Cython."""
    from monotonic_alignment_search import maximum_path

    return maximum_path(scores, mask, implementation="numpy")


@functools.cache
def _compiled():
    import numba

    @numba.njit(parallel=True)
    def search(scores, path):
        batch, rows, columns = scores.shape
        for b in numba.prange(batch):
            best = np.full((rows, columns), -np.inf, dtype=scores.dtype)
            for j in range(columns):
                for i in range(max(0, rows + j - columns), min(rows, j + 1)):
                    before = 0.0 if j == 0 else -np.inf
                    if j > i:
                        before = best[i, j - 1]
                    if i > 0:
                        before = max(before, best[i - 1, j - 1])
                    best[i, j] = scores[b, i, j] + before
            i = rows - 1
            for j in range(columns - 1, -1, -1):
                path[b, i, j] = 1
                if i > 0 and (i == j or best[i, j - 1] < best[i - 1, j - 1]):
                    i -= 1

    return search


def numba(scores, mask):
    """Sums in the scores' dtype, a thread an item."""
    path = torch.zeros_like(scores)
    _compiled()(scores.numpy(), path.numpy())
    return path
