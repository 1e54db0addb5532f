"""Labels, masks, packing and the authors' pair tokenisation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcore import masking

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_shift_labels_moves_one_step_and_ends_ignored(dtype):
    labels = torch.tensor([[9, 1, -100, 3], [4, 5, 6, 7]], dtype=dtype)
    expected = torch.tensor([[1, -100, 3, -100], [5, 6, 7, -100]], dtype=dtype)
    assert torch.equal(masking.shift_labels(labels), expected)
    assert masking.shift_labels(labels, ignore_index=-1)[:, -1].tolist() == [-1, -1]
    assert masking.shift_labels(labels[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)])
def test_shift_labels_refuses_what_is_no_label(labels):
    with pytest.raises(TypeError, match="shift_labels: labels must be integers"):
        masking.shift_labels(labels)


def test_shift_labels_refuses_a_scalar():
    with pytest.raises(ValueError, match="at least one dimension"):
        masking.shift_labels(torch.tensor(3))


def test_row_sum_ignores_nan_and_infinity_at_masked_positions_in_value_and_gradient():
    values = torch.tensor([[1.0, float("nan")], [float("inf"), float("-inf")]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    sums = masking.row_sum(values, mask)
    assert sums.tolist() == [1.0, 0.0]
    sums.sum().backward()
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_packed_rows_do_not_poison_each_other():
    values = torch.tensor([float("nan"), 1.0, 2.0], requires_grad=True)
    sums = masking.row_sum(values, torch.tensor([0, 1, 3]))
    assert sums[0].isnan()
    assert sums[1] == 3.0
    sums[1].backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([torch.int32, torch.int64])
)
def test_packed_row_sum_equals_the_sum_of_slices(lengths, dtype):
    values = torch.randn(sum(lengths), dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    expected = torch.stack([part.sum() for part in values.split(lengths)])
    torch.testing.assert_close(masking.row_sum(values, cu_seqlens), expected)


@pytest.mark.parametrize("ends", [[1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0, -1, 3], [3, 3]])
def test_malformed_cu_seqlens_raise_with_their_value(ends):
    with pytest.raises(ValueError, match="row_sum: cu_seqlens must rise from 0 to the 3 packed"):
        masking.row_sum(torch.ones(3), torch.tensor(ends))


def test_compiled_row_sum_gives_nan_in_the_malformed_rows_only():
    compiled = torch.compile(masking.row_sum, fullgraph=True, backend="eager")
    assert compiled(torch.ones(4), torch.tensor([0, 2, 4])).tolist() == [2.0, 2.0]
    sums = compiled(torch.ones(4), torch.tensor([0, 1, 9]))
    assert sums[0] == 1.0
    assert sums[1].isnan()
    sums = compiled(torch.ones(4), torch.tensor([1, 2, 4]))
    assert sums[0].isnan()
    assert sums[1] == 2.0


@pytest.mark.parametrize(
    ("values", "index", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), TypeError, "must be bool, got torch.float32"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bool), ValueError, r"\(3,\) and \(2, 3\)"),
        (torch.ones(3), torch.ones(3, dtype=torch.bool), TypeError, "int32 or int64"),
        (torch.ones(3), torch.tensor([], dtype=torch.int64), ValueError, r"shape \(rows \+ 1,\)"),
        (torch.ones(3), torch.tensor([[0, 3]]), ValueError, r"shape \(rows \+ 1,\)"),
        (torch.ones(1, 1, 1), torch.tensor([0, 1]), ValueError, "values must be"),
    ],
)
def test_row_sum_names_the_error(values, index, error, message):
    with pytest.raises(error, match=message):
        masking.row_sum(values, index)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_are_tokenised_and_collated_as_the_authors_do(mode):
    golden = np.load(GOLDEN / "tdpo_tokenize.npz")
    examples = [
        masking.encode_pair(
            *([ord(character) for character in text] for text in case),
            eos=1,
            max_length=int(golden["max_length"]),
            max_prompt_length=int(golden["max_prompt_length"]),
            keep=mode.removeprefix("keep_"),
        )
        for case in golden["cases"]
    ]
    found = {
        f"ex{i}/{key}": value
        for i, example in enumerate(examples)
        for key, value in example.items()
    }
    collated = masking.collate_pairs(examples, pad=1)
    found |= {f"collated/{key}": value for key, value in collated.items()}
    expected = {
        key.removeprefix(f"{mode}/"): golden[key] for key in golden.files if key.startswith(mode)
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key].numpy(), value, err_msg=key)


def test_join_pairs_pads_to_the_longer_side_with_the_authors_fillers():
    examples = [
        masking.encode_pair([5, 6], [7], [8, 9, 10], eos=1),
        masking.encode_pair([5], [6], [7], eos=1),
    ]
    joined = masking.join_pairs(masking.collate_pairs(examples, pad=3))
    assert joined["input_ids"].tolist() == [
        [5, 6, 7, 1, 0, 0],
        [5, 6, 1, 3, 0, 0],  # collation fills with pad, joining with 0: neither is attended to
        [5, 6, 8, 9, 10, 1],
        [5, 7, 1, 3, 3, 3],
    ]
    assert joined["attention_mask"].sum(1).tolist() == [4, 3, 6, 3]
    assert (joined["labels"] != -100).sum(1).tolist() == [2, 2, 4, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": "middle"}, "keep must be 'start' or 'end', got 'middle'"),
        ({"max_length": 4, "max_prompt_length": 4}, "below max_length, got 4 and 4"),
        ({"max_prompt_length": 0}, "must be positive"),
        ({"eos": 7}, "chosen must not contain the eos token 7"),
    ],
)
def test_encode_pair_names_the_error(change, message):
    with pytest.raises(ValueError, match=f"encode_pair: .*{message}"):
        masking.encode_pair([5], [7], [8], **({"eos": 1} | change))
