"""ALISA, sparse window attention (arXiv 2403.17312, ISCA 2024), and its relatives on one state.

A policy says which tokens a decode step reads (policy); the state of a layer holds keys, values and
scores, and drops what can never be read again (state). `tokcore.integrations.transformers` puts
them under `generate`.

The paper's three-phase schedule over two tiers of memory stands apart: where a token lies
(schedule), what that costs (cost), which plan is best (solve), and a store that keeps it (tiers).
"""

from tokcore.algorithms.alisa.cost import (
    Costs,
    Machine,
    Memory,
    Profile,
    Shape,
    costs,
    memory,
    profile,
)
from tokcore.algorithms.alisa.policy import (
    Policy,
    alisa,
    dense,
    h2o,
    local_window,
    streaming_llm,
    strided,
    tova,
)
from tokcore.algorithms.alisa.schedule import (
    NEVER,
    Budget,
    Capacity,
    Loaded,
    Placement,
    Plan,
    RowSchedule,
    Steps,
    Stored,
    capacity,
    half_budget,
    place,
    place_all,
    steps,
)
from tokcore.algorithms.alisa.solve import Solution, analytic_plan, solve, solve_exhaustively
from tokcore.algorithms.alisa.state import LayerState
from tokcore.algorithms.alisa.tiers import Gathered, Traffic, TwoTierStore

__all__ = [
    "NEVER",
    "Budget",
    "Capacity",
    "Costs",
    "Gathered",
    "LayerState",
    "Loaded",
    "Machine",
    "Memory",
    "Placement",
    "Plan",
    "Policy",
    "Profile",
    "RowSchedule",
    "Shape",
    "Solution",
    "Steps",
    "Stored",
    "Traffic",
    "TwoTierStore",
    "alisa",
    "analytic_plan",
    "capacity",
    "costs",
    "dense",
    "h2o",
    "half_budget",
    "local_window",
    "memory",
    "place",
    "place_all",
    "profile",
    "solve",
    "solve_exhaustively",
    "steps",
    "streaming_llm",
    "strided",
    "tova",
]
