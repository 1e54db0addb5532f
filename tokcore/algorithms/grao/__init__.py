"""GRAO, group relative alignment optimisation (arXiv 2508.07750): samples beside a reference.

For each of Q queries there are G samples o_i and one reference answer y. With l(o) the mean
log-probability of a row's tokens and A the advantages, the paper maximises (Eq. 3)

    J = 1/G sum_i [ A_i l(o_i)  +  beta A_y l(y)  +  lambda A_i (l(o_i) - l(y)) ]
                    exploration    imitation         alignment regulariser

which is one weighted sum over the rows, and computed as that; there is no ratio, clip or KL:

    J = sum_i w_i l(o_i) + w_y l(y),   w_i = (1 + lambda) A_i / G
                                       w_y = beta A_y - lambda sum_i A_i / G

The rows of a query stand together, its samples first and its reference last: N rows in all.
``group`` is a size, the G + 1 rows of every query, or for queries of any sizes the id of each row's
query, (N,) int64 or int32: every run of one id is a query.

docs/algorithms/grao.md says where the paper contradicts itself. Its authors published no code.
"""

from tokcore.algorithms.grao.judge import grao_rewards, grao_score
from tokcore.algorithms.grao.loss import (
    grao_advantages,
    grao_loss,
    grao_loss_from_tokens,
    grao_weights,
)

__all__ = [
    "grao_advantages",
    "grao_loss",
    "grao_loss_from_tokens",
    "grao_rewards",
    "grao_score",
    "grao_weights",
]
