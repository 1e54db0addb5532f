"""GRAO without queries, tokens or samples, and the errors of every function by name."""

import pytest
import torch

from tokcore.algorithms import grao


@pytest.mark.parametrize("group", [9, torch.zeros(0, dtype=torch.int64)])
def test_no_queries_give_a_loss_of_zero(group):
    for convention in ("samples", "samples_plus_reference"):
        advantages = grao.grao_advantages(torch.zeros(0), group, convention=convention)
        assert advantages.shape == grao.grao_weights(advantages, group).shape == (0,)
    leaves = torch.zeros(0, 4, 7).requires_grad_(), torch.zeros(0, 7).requires_grad_()
    ends = torch.zeros(1, dtype=torch.int64)
    labels = torch.zeros(0, 4, dtype=torch.int64)
    for leaf, target, packing in ((leaves[0], labels, None), (leaves[1], labels[:, 0], ends)):
        loss, metrics = grao.grao_loss(leaf, target, advantages, group, cu_seqlens=packing)
        loss.backward()
        assert loss == 0
        assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_give_a_loss_of_zero(packed):
    logits = torch.zeros((0, 5) if packed else (3, 0, 5)).requires_grad_()
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    ends = torch.zeros(4, dtype=torch.int64) if packed else None
    loss, metrics = grao.grao_loss(logits, labels, torch.ones(3), 3, cu_seqlens=ends)
    loss.backward()
    assert loss == metrics["logps_train/samples"] == metrics["logps_train/references"] == 0


def test_a_query_without_samples_is_nan_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ids = torch.tensor([0, 0, 1, 2, 2])
    advantages = grao.grao_advantages(torch.tensor([1.0, 0, 0, -1, 0]), ids)
    weights = grao.grao_weights(advantages, ids)
    assert weights.isnan().tolist() == [False, False, True, False, False]


ROWS = torch.zeros(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 1}, "size of at least 2, .* got 1"),
        ({"group": 0}, "size of at least 2, .* got 0"),
        ({"group": 4}, "divides the 6 rows, got 4"),
        ({"group": True}, "got True"),
        ({"group": 3.0}, r"got 3\.0"),
        ({"group": torch.zeros(6)}, r"int64 or int32, \(6,\) on cpu, got torch.float32"),
        ({"group": torch.zeros(5, dtype=torch.int64)}, r"got torch.int64, \(5,\) on cpu"),
        ({"group": torch.tensor([0, 0, 0, 4, 5, 5])}, "at least 1 sample .* 1 row of id 4"),
        ({"group": torch.tensor([7, 5, 5, 5, 5, 5])}, "at least 1 sample .* 1 row of id 7"),
        ({"rows": torch.zeros(2, 3)}, r"must be \(N,\), floating point .* got \(2, 3\)"),
        ({"rows": torch.zeros(6, dtype=torch.int64)}, "floating point .* torch.int64"),
        ({"rows": torch.zeros(6).requires_grad_()}, "without gradient"),
    ],
)
def test_the_layout_is_checked_by_every_function_under_its_name(change, message):
    arguments = {"rows": ROWS, "group": 3} | change
    rows, group = arguments["rows"], arguments["group"]
    with pytest.raises((ValueError, TypeError), match=f"grao_advantages: .*{message}"):
        grao.grao_advantages(rows, group)
    with pytest.raises((ValueError, TypeError), match=f"grao_weights: .*{message}"):
        grao.grao_weights(rows, group)
    with pytest.raises((ValueError, TypeError), match=f"grao_loss_from_tokens: .*{message}"):
        grao.grao_loss_from_tokens(torch.zeros(6, 2), rows, group)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, r"beta must be a number, finite and >= 0, got -0\.1"),
        ({"beta": float("nan")}, "beta must be a number, .* got nan"),
        ({"beta": "0.5"}, "beta must be a number, .* got '0.5'"),
        ({"beta": True}, "beta must be a number, .* got True"),
        ({"lambda_": -1}, "lambda_ must be a number, .* got -1"),
        ({"lambda_": float("inf")}, "lambda_ must be a number, .* got inf"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=f"grao_weights: {message}"):
        grao.grao_weights(ROWS, 3, **options)
    with pytest.raises(ValueError, match=message):
        grao.grao_loss(torch.zeros(6, 2, 5), torch.zeros(6, 2).long(), ROWS, 3, **options)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("advantages", (ROWS, 3, {"convention": "both"}), "convention must be one of .* 'both'"),
        ("loss_from_tokens", (torch.zeros(5, 2), ROWS, 3), r"one a row, \(5,\), got \(6,\)"),
        ("loss_from_tokens", (torch.tensor(1.0), ROWS, 3), r"one a row, \(\), got \(6,\)"),
        # 6 tokens of 3 rows: advantages of tokens, which policy_loss would take.
        (
            "loss_from_tokens",
            (ROWS, ROWS, 3, {"cu_seqlens": torch.tensor([0, 2, 4, 6])}),
            r"one a row, \(3,\), got \(6,\)",
        ),
        ("loss", (torch.zeros(6, 5), torch.zeros(6).long(), ROWS, 3), r"\(6, 5\) and \(6,\)"),
        ("loss", (torch.zeros(6, 2, 5), torch.zeros(6, 1).long(), ROWS, 3), "not shifted"),
        (
            "loss",
            (torch.zeros(6, 2, 5), torch.zeros(6, 2).long(), ROWS, 3, {"cu_seqlens": ROWS.long()}),
            r"with cu_seqlens, got \(6, 2, 5\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_named(function, arguments, message):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    arguments = [a for a in arguments if not isinstance(a, dict)]
    with pytest.raises(ValueError, match=f"grao_{function}: .*{message}"):
        getattr(grao, f"grao_{function}")(*arguments, **options)


def test_malformed_row_ends_are_an_error_before_anything_is_read_past_the_end():
    ends = torch.tensor([0, 9, 4, 6])
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 6 packed tokens"):
        grao.grao_loss(torch.zeros(6, 5), torch.zeros(6).long(), ROWS[:3], 3, cu_seqlens=ends)
