"""The DTW packages, a matrix at a time: none takes a batch. Each returns a list of paths.

    pip install --no-deps librosa dtaidistance tslearn openai-whisper

with numba, scipy, scikit-learn and what else they import. A path is as its package has it, from the
end or from the start, (cells, 2) or (2, cells).
"""

import numpy as np


def whisper(cost, rows, columns):
    """Sums in float32; on ties not always the cheapest path."""
    from whisper.timing import dtw_cpu

    return [dtw_cpu(matrix) for matrix in cost.numpy()]


def librosa(cost, rows, columns):
    from librosa.sequence import dtw

    return [dtw(C=matrix)[1] for matrix in cost.numpy()]


def tslearn(cost, rows, columns):
    from tslearn.metrics import dtw_path_from_metric

    return [dtw_path_from_metric(matrix, metric="precomputed")[0] for matrix in cost.numpy()]


def dtaidistance(cost, rows, columns):
    """Takes no costs: squared differences of the series, which it computes on its way, in C."""
    from dtaidistance.dtw import warping_path_fast

    pairs = zip(rows.numpy(), columns.numpy(), strict=True)
    return [warping_path_fast(row, column) for row, column in pairs]


def cells(path):
    """(cells, 2) from the first to the last, of any of these."""
    path = np.array(path)
    path = path.T if path.shape[0] == 2 and path.shape[1] != 2 else path
    return path if tuple(path[0]) == (0, 0) else path[::-1]
