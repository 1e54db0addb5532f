"""Verdicts to rewards, and the two scores of GRAO."""

import pytest
import torch

from tokcore.algorithms.grao import grao_rewards, grao_score


def judge_of(*verdicts):
    """A judge that answers in turn, and the list of what it was asked."""
    answers, asked = iter(verdicts), []

    def judge(*texts):
        asked.append(texts)
        return next(answers)

    return judge, asked


TEXTS = ["q", "r", "s"], ["a", "b", "c"], ["x", "y", "z"]


@pytest.mark.parametrize(
    "spelling",
    ["1 {} 2", "1{}2", " 1 {} 2\n", "\t1  {}\n2 "],
    ids=["as asked", "tight", "ends", "wide"],
)
def test_the_three_verdicts(spelling):
    judge, asked = judge_of(*(spelling.format(sign) for sign in ">=<"))
    rewards = grao_rewards(judge, *TEXTS)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1, 0, -1]
    assert asked == [("q", "a", "x"), ("r", "b", "y"), ("s", "c", "z")]


@pytest.mark.parametrize("first", "<=>")
@pytest.mark.parametrize("swapped", "<=>")
def test_both_orders_must_agree_on_a_winner(first, swapped):
    judge, asked = judge_of(f"1 {first} 2", f"1 {swapped} 2")
    (reward,) = grao_rewards(judge, ["q"], ["a"], ["x"], both_orders=True).tolist()
    assert asked == [("q", "a", "x"), ("q", "x", "a")]
    assert reward == {(">", "<"): 1, ("<", ">"): -1}.get((first, swapped), 0)


@pytest.mark.parametrize("position", ["1 > 2", "1 < 2"])
def test_a_judge_that_looks_at_positions_alone_gives_only_ties(position):
    assert (grao_rewards(lambda *texts: position, *TEXTS, both_orders=True) == 0).all()
    assert (grao_rewards(lambda *texts: position, *TEXTS) != 0).all()


@pytest.mark.parametrize(
    "verdict",
    [
        "",
        "1 > 2.",
        "1 >= 2",
        "1 == 2",
        "2 > 1",
        "1 > 22",
        "11 > 2",
        "Verdict: 1 > 2",
        "1 > 2 because it is longer",
        "1 > 2\n1 < 2",
        '"1 > 2"',
        "I cannot judge this",
        None,
        1,
    ],
)
def test_anything_else_is_an_error_that_shows_it(verdict):
    judge, _ = judge_of("1 > 2", verdict)
    with pytest.raises(ValueError, match="grao_rewards: a verdict must be") as error:
        grao_rewards(judge, *TEXTS)
    assert f"got {verdict!r} for row 1" in str(error.value)
    judge, _ = judge_of("1 = 2", verdict)
    with pytest.raises(ValueError, match="for row 0"):
        grao_rewards(judge, *TEXTS, both_orders=True)


def test_unequal_numbers_of_texts_are_an_error_and_none_is_none():
    judge, asked = judge_of()
    with pytest.raises(ValueError, match=r"grao_rewards: .* of one number, got \(3, 3, 2\)"):
        grao_rewards(judge, *TEXTS[:2], TEXTS[2][:2])
    assert grao_rewards(judge, [], [], []).shape == (0,)
    assert asked == []


def test_scores():
    rewards, base = torch.tensor([1, 1, 0, -1, -1]), torch.tensor([0, 1, 1, 0, -1])
    score = {name: value.item() for name, value in grao_score(rewards, base).items()}
    assert score == {"ras_wins": 0.4, "ras_wins_and_ties": 0.6, "nag": pytest.approx(-0.2)}
    assert grao_score(base, rewards)["nag"] == -grao_score(rewards, base)["nag"]
    same = grao_score(rewards.bfloat16(), rewards.bfloat16())
    assert same["nag"] == 0
    worst = grao_score(torch.full((4,), -1.0), torch.zeros(4))
    assert (worst["ras_wins"], worst["ras_wins_and_ties"], worst["nag"]) == (0, 0, -1)


@pytest.mark.parametrize(("rewards", "base"), [(3, 2), (0, 0), ((2, 2), (2, 2)), ((), ())], ids=str)
def test_scores_name_the_error(rewards, base):
    with pytest.raises(ValueError, match=r"grao_score: .* \(B,\) of one B >= 1, got"):
        grao_score(torch.zeros(rewards), torch.zeros(base))
