"""Rewards from a pairwise judge, and the paper's two scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_VERDICT = re.compile(r"\s*1\s*([<=>])\s*2\s*")
_REWARD = {">": 1.0, "=": 0.0, "<": -1.0}


def grao_rewards(
    judge: Callable[[str, str, str], str],
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    both_orders: bool = False,
) -> Tensor:
    """Rewards +1, 0, -1 of responses against references, from the verdicts of a pairwise judge.

    Args:
        judge: called as judge(prompt, text_1, text_2), text_1 the response; returns "1 > 2",
            "1 = 2" or "1 < 2", with any white space, and nothing else: a verdict with a reason, or
            a refusal, is an error and not a tie.
        prompts, responses, references: one of each a row.
        both_orders: ask again with the texts swapped; a text wins only where it wins both times,
            all else is a tie (arXiv 2306.05685, section 3.4). Against the judge's preference for a
            position, for twice the calls; the paper asks once.
    Returns:
        (rows,) float32.
    Raises:
        ValueError: unequal numbers of texts; a verdict that does not parse.

    >>> judge = lambda prompt, text_1, text_2: "1 > 2" if text_1 >= text_2 else "1 < 2"
    >>> texts = ["q", "q", "q"], ["a", "b", "c"], ["b", "b", "b"]
    >>> grao_rewards(judge, *texts), grao_rewards(judge, *texts, both_orders=True)
    (tensor([-1.,  1.,  1.]), tensor([-1.,  0.,  1.]))

    Source: arXiv 2508.07750, its reward; the judge's prompts are in its appendix.
    """
    sizes = (len(prompts), len(responses), len(references))
    if len(set(sizes)) > 1:
        raise ValueError(
            f"grao_rewards: prompts, responses and references must be of one number, got {sizes}"
        )
    rewards = []
    for row, prompt in enumerate(prompts):
        response, reference = responses[row], references[row]
        reward = _reward(judge(prompt, response, reference), row)
        if both_orders and _reward(judge(prompt, reference, response), row) != -reward:
            reward = 0.0
        rewards.append(reward)
    return torch.tensor(rewards, dtype=torch.float32)


def grao_score(rewards: Tensor, base_rewards: Tensor) -> dict[str, Tensor]:
    """RAS, how often responses beat their references, and NAG, how much more often the base's.

    Equivalent to ``(rewards > 0).mean()``, ``(rewards >= 0).mean()`` and
    ``(rewards - base_rewards).sign().mean()``, the rate of wins over the base model minus that of
    losses.

    Args:
        rewards, base_rewards: (B,), B >= 1, of the responses of the trained model and of the base
            model, against the same references.
    Returns:
        ras_wins, ras_wins_and_ties, nag: scalars, float64. The paper's formula of RAS is the first,
        its appendix says that the second is reported; its formula of NAG counts wins alone, but
        its table has negative values.

    >>> score = grao_score(torch.tensor([1.0, 1, 0, -1]), torch.tensor([0.0, -1, 1, -1]))
    >>> {key: value.item() for key, value in score.items()}
    {'ras_wins': 0.5, 'ras_wins_and_ties': 0.75, 'nag': 0.25}

    Source: arXiv 2508.07750, its metrics, Table 1 and appendix.
    """
    if rewards.shape != base_rewards.shape or rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(
            "grao_score: rewards and base_rewards must be (B,) of one B >= 1, got "
            f"{tuple(rewards.shape)} and {tuple(base_rewards.shape)}"
        )
    wide, base = rewards.double(), base_rewards.double()
    return {
        "ras_wins": (wide > 0).double().mean(),
        "ras_wins_and_ties": (wide >= 0).double().mean(),
        "nag": (wide - base).sign().mean(),
    }


def _reward(verdict: str, row: int) -> float:
    match = _VERDICT.fullmatch(verdict) if isinstance(verdict, str) else None
    if match is None:
        raise ValueError(
            "grao_rewards: a verdict must be '1 > 2', '1 = 2' or '1 < 2' and nothing else, got "
            f"{verdict!r} for row {row}"
        )
    return _REWARD[match[1]]
