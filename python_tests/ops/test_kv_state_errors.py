"""What the operators on a sparse key-value cache say to a wrong call, and do to its list."""

from itertools import product

import pytest
import torch
from kv_calls import FUNCTIONS, HEADS, B, C, M, Q, R, arguments, public, state_of
from kv_states import State, assert_states, int32

from tokcore import _library

every_operator = pytest.mark.parametrize("name", FUNCTIONS)

# ---- facts about tensors --------------------------------------------------------------------


GIVEN = {name: arguments(name, state_of(quantized=name == "kv_compact")) for name in FUNCTIONS}
PAIRS = GIVEN["kv_compact"]["key_quantization"]
STATE = r"is written in place and must be contiguous, got strides"
ERRORS = [
    ("window_select", "score", lambda x: x.tolist(), TypeError, "must be a torch.Tensor, got list"),
    ("window_select", "score", lambda x: x.int(), TypeError, "must be torch.int64, got"),
    ("window_select", "score", lambda x: x[0], ValueError, r"must have shape \(B, Hs, C\), got"),
    ("window_select", "score", lambda x: x[:, :0], ValueError, r"must have shape \(B, Hs, C\)"),
    ("window_select", "count", lambda x: x[:1], ValueError, r"must have shape \(2, 1\) on cpu"),
    (
        "window_select",
        "count",
        lambda x: x.long(),
        TypeError,
        "must be torch.int32, got torch.int64",
    ),
    ("window_select", "local", lambda x: x[:1], ValueError, r"must have shape \(2,\) .*got \(1,\)"),
    ("window_select", "top", lambda x: x.to("meta"), ValueError, r"must have .*on cpu .* on meta"),
    ("window_select", "top", lambda x: 3, TypeError, "must be a torch.Tensor, got int"),
    ("window_select", "size", lambda x: -1, ValueError, "must be at least 0, got -1"),
    ("window_select", "size", lambda x: 2.0, TypeError, "must be an int, got 2.0"),
    ("window_select", "sinks", lambda x: -2, ValueError, "must be at least 0, got -2"),
    ("window_scores_update", "score", lambda x: x[0], ValueError, r"must have shape \(B, Hs, C\)"),
    ("window_scores_update", "score", lambda x: x.float(), TypeError, "must be torch.int64"),
    (
        "window_scores_update",
        "ring",
        lambda x: x[0],
        ValueError,
        r"must have shape \(B, Hs, R, C\)",
    ),
    (
        "window_scores_update",
        "ring",
        lambda x: x[..., :4],
        ValueError,
        r"must have .*\(2, 1, 3, 9\)",
    ),
    ("window_scores_update", "ring", lambda x: x.half(), TypeError, "must be torch.float32"),
    ("window_scores_update", "ring", lambda x: x.mT.contiguous().mT, ValueError, STATE),
    ("window_scores_update", "last_selected", lambda x: x.long(), TypeError, "must be torch.int32"),
    ("window_scores_update", "oldest", lambda x: x[:1], ValueError, r"must have shape \(2,\)"),
    (
        "window_scores_update",
        "rows",
        lambda x: x[0],
        ValueError,
        r"must have shape \(B, Hs, Q, M\)",
    ),
    ("window_scores_update", "rows", lambda x: x.double(), TypeError, "must be torch.float32"),
    ("window_scores_update", "index", lambda x: x.long(), TypeError, "must be torch.int32"),
    ("window_scores_update", "index", lambda x: x[..., :2], ValueError, r"must have .*\(2, 1, 5\)"),
    ("window_scores_update", "count", lambda x: x[0], ValueError, r"must have shape \(2, 1\)"),
    ("window_scores_update", "step", lambda x: x.long(), TypeError, "must be torch.int32"),
    (
        "window_scores_update",
        "window",
        lambda x: x.unsqueeze(1),
        ValueError,
        r"must have shape \(2,\)",
    ),
    (
        "kv_append",
        "key",
        lambda x: x.long(),
        TypeError,
        "must be float32, .* or uint8, got torch.i",
    ),
    ("kv_append", "key", lambda x: x[0], ValueError, r"must have shape \(B, Hkv, C, D\), got"),
    ("kv_append", "key", lambda x: x.mT.contiguous().mT, ValueError, STATE),
    (
        "kv_append",
        "value",
        lambda x: x.half(),
        TypeError,
        "must be torch.float32, got torch.float16",
    ),
    ("kv_append", "value", lambda x: x[:, :1], ValueError, r"must have shape \(2, 2, 9, 4\)"),
    ("kv_append", "position", lambda x: x[0], ValueError, "must have .*Hs = 1 or Hkv = 2, got"),
    ("kv_append", "position", lambda x: x.repeat(1, 3, 1), ValueError, "must have .*Hs = 1 or Hkv"),
    ("kv_append", "count", lambda x: x.float(), TypeError, "must be torch.int32"),
    ("kv_append", "new_key", lambda x: x[0], ValueError, r"must have shape \(B, Hkv, Q, D\)"),
    ("kv_append", "new_key", lambda x: x.half(), TypeError, "must be torch.float32"),
    (
        "kv_append",
        "new_value",
        lambda x: x[:, :, :1],
        ValueError,
        r"must have shape \(2, 2, 2, 4\)",
    ),
    ("kv_append", "length", lambda x: x.long(), TypeError, "must be torch.int32"),
    ("kv_append", "valid", lambda x: x[:1], ValueError, r"must have shape \(2,\)"),
    (
        "kv_append",
        "key_quantization",
        lambda x: PAIRS,
        ValueError,
        "goes with uint8 keys and values",
    ),
    ("kv_compact", "value_quantization", lambda x: None, ValueError, "goes with uint8 .*got none"),
    ("kv_compact", "key_quantization", lambda x: x[0], ValueError, "must have .* dividing D = 4"),
    ("kv_compact", "key_quantization", lambda x: x.half(), TypeError, "must be torch.float32"),
    (
        "kv_compact",
        "key_quantization",
        lambda x: x[:, :1],
        ValueError,
        r"must have .*\(2, 2, 9, 2, 2\)",
    ),
    ("kv_compact", "score", lambda x: x.int(), TypeError, "must be torch.int64"),
    ("kv_compact", "ring", lambda x: x[0], ValueError, r"must have shape \(B, Hs, R, C\)"),
    ("kv_compact", "since", lambda x: x.long(), TypeError, "must be torch.int32"),
    ("kv_compact", "local", lambda x: x[0], ValueError, r"must have shape \(2,\)"),
    ("kv_compact", "sinks", lambda x: -1, ValueError, "must be at least 0, got -1"),
    ("kv_compact", "sinks", lambda x: True, TypeError, "must be an int, got True"),
]


def on(device, value):
    """Where a test wants it, but for what is wrong by being elsewhere."""
    return value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value


@pytest.mark.parametrize(("name", "argument", "wrong", "error", "text"), ERRORS)
def test_named_errors(backend, name, argument, wrong, error, text):
    given = GIVEN[name] | {argument: wrong(GIVEN[name][argument])}
    given = {key: on(backend.device, value) for key, value in given.items()}
    text = text.replace("cpu", backend.device)
    with pytest.raises(error, match=f"^{name}: {argument} {text}"):
        public(name, given)


def test_a_whole_row_needs_no_index(backend):
    given = arguments("window_scores_update", state_of(backend.device)) | {"index": None}
    with pytest.raises(ValueError, match=r"^window_scores_update: rows must weigh all 9 slots .*5"):
        public("window_scores_update", given)


def test_the_dtype_of_tokens_to_quantise(backend):
    given = arguments("kv_append", state_of(backend.device, quantized=True))
    for new in ("new_key", "new_value"):
        given[new] = given[new].double()
    with pytest.raises(TypeError, match=r"^kv_append: new_key must be float32, .* or bfloat16"):
        public("kv_append", given)


@every_operator
def test_the_native_operator_checks_once_more(backend, name):
    """Each tensor for its dtype and shape; each written one for being where it is written."""
    state = state_of(backend.device, quantized=name == "kv_append")
    given = arguments(name, state)
    operator = getattr(_library.native(), name)
    schema = {argument.name: argument for argument in operator.default._schema.arguments}
    for argument, value in given.items():
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value.to(torch.int16), value[:1], value.unsqueeze(0)]
        if schema[argument].alias_info is not None and value.dim() > 1:
            wrong.append(value.repeat_interleave(2, -1)[..., ::2])
        for bad in wrong:
            with pytest.raises(RuntimeError, match=f"{name}: .*(must|uint8).*got"):
                operator(*(given | {argument: bad}).values())
    for argument, value in (("size", -1), ("size", 2**31), ("sinks", -1)):
        if argument in given:
            with pytest.raises(RuntimeError, match=f"{name}: {argument} must .*got {value}"):
                operator(*(given | {argument: value}).values())


# ---- facts about values ---------------------------------------------------------------------

S = 1  # the list, and b = 1 the row, of what is wrong


def put(argument, *at, to):
    def change(given):
        given[argument][at] = to

    return change


# What is wrong, its text on the CPU, and whether all lists of the row suffer or list S alone.
WRONG_VALUES = [
    (
        "window_select",
        put("count", 1, S, to=-1),
        r"count must lie in \[0, 9\], got -1 in list 1",
        False,
    ),
    (
        "window_select",
        put("count", 1, S, to=C + 1),
        "count must lie .*got 10 in list 1 of row 1",
        False,
    ),
    ("window_select", put("local", 1, to=-1), "local must be at least 0, got -1 in row 1", True),
    ("window_select", put("top", 1, to=-3), "top must be at least 0, got -3 in row 1", True),
    (
        "window_select",
        put("top", 1, to=M),
        r"size must hold local \+ top \+ sinks = 6 in row 1",
        True,
    ),
    (
        "window_select",
        put("top", 1, to=2**31 - 1),
        "size must hold .* 2147483648 in row 1, got 5",
        True,
    ),
    (
        "window_scores_update",
        put("count", 1, S, to=M + 1),
        r"count must lie in \[0, 5\], got 6",
        False,
    ),
    (
        "window_scores_update",
        put("index", 1, S, 1, to=0),
        "index must hold ascending .*got 0 at",
        False,
    ),
    (
        "window_scores_update",
        put("index", 1, S, 0, to=-1),
        "index must hold .*got -1 at entry 0",
        False,
    ),
    (
        "window_scores_update",
        put("index", 1, S, 4, to=C),
        "index must hold .*got 9 at entry 4",
        False,
    ),
    (
        "window_scores_update",
        put("step", 1, to=-2),
        "step must be at least -1, got -2 in row 1",
        True,
    ),
    (
        "window_scores_update",
        put("window", 1, to=R + 1),
        r"window must lie in \[0, R = 3\], got 4",
        True,
    ),
    (
        "window_scores_update",
        put("window", 1, to=-1),
        r"window must lie in \[0, R = 3\], got -1",
        True,
    ),
    (
        "window_scores_update",
        put("oldest", 1, to=9),
        r"oldest must lie in \[0, step \+ 1 = 8\]",
        True,
    ),
    ("window_scores_update", put("oldest", 1, to=-1), "oldest must lie .*got -1 in row 1", True),
    (
        "kv_append",
        put("count", 1, S, to=-1),
        r"count must lie in \[0, 9\], got -1 in list 1",
        False,
    ),
    (
        "kv_append",
        put("count", 1, S, to=C),
        "row 1 has no room: count 9 and 1 tokens of Q = 2 exceed C = 9 slots",
        False,
    ),
    (
        "kv_append",
        put("valid", 1, to=Q + 1),
        r"valid must lie in \[0, Q = 2\], got 3 in row 1",
        True,
    ),
    ("kv_append", put("valid", 1, to=-1), "valid must lie .*got -1 in row 1", True),
    ("kv_append", put("length", 1, to=-1), "length must be at least 0, got -1 in row 1", True),
    (
        "kv_append",
        put("length", 1, to=2**31 - 1),
        "length \\+ valid must be at most 2147483647",
        True,
    ),
    (
        "kv_append",
        put("position", 1, S, to=1600),
        "length must exceed the position .*got 1500 in row 1 after position 1600",
        False,
    ),
    ("kv_compact", put("count", 1, S, to=C + 1), r"count must lie in \[0, 9\], got 10", False),
    ("kv_compact", put("count", 1, S, to=-1), r"count must lie in \[0, 9\], got -1", False),
    ("kv_compact", put("local", 1, to=-1), "local must be at least 0, got -1 in row 1", True),
]


def own_lists(name, device):
    """A state whose heads have slots of their own, all lists with some in use; the arguments."""
    state = state_of(device, lists=HEADS)
    state.count.copy_(int32([[6, 7], [5, 6]]))
    given = arguments(name, state)
    if name == "window_scores_update":
        given["count"].fill_(M)
    return state, given


def assert_list(got: State, want: State, b: int, s: int) -> None:
    for name in ("key", "value", "position", "score", "ring", "last_selected"):
        assert getattr(got, name)[b, s].equal(getattr(want, name)[b, s]), name


@pytest.mark.parametrize(("name", "change", "text", "whole_row"), WRONG_VALUES)
def test_wrong_values(backend, name, change, text, whole_row):
    """An error where they can be read, before anything is written; elsewhere -1 in that list."""
    state, given = own_lists(name, backend.device)
    good, right = own_lists(name, backend.device)
    change(given)
    before = state.clone()
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=f"{name}: {text}"):
            public(name, given)
        assert_states(state, before)
        return
    result, expected = public(name, given), public(name, right)
    for b, s in product(range(B), range(HEADS)):
        wrong = b == 1 and (whole_row or s == S)
        if name == "window_select":
            for got, want in zip(result, expected, strict=True):
                assert got[b, s].eq(-1).all() if wrong else got[b, s].equal(want[b, s])
        elif name == "window_scores_update" and wrong:
            assert state.score[b, s].eq(-1).all()
            assert state.last_selected[b, s].eq(-1).all()
            assert state.ring[b, s].isnan().all()
        else:
            assert_list(state, before if wrong else good, b, s)
            if name != "window_scores_update":
                assert state.count[b, s] == (-1 if wrong else good.count[b, s])
    if name == "window_scores_update":
        assert state.oldest[0] == good.oldest[0]
        assert state.oldest[1] == (-1 if whole_row else good.oldest[1])


@pytest.mark.parametrize(("name", "change", "text", "whole_row"), WRONG_VALUES)
def test_wrong_values_raise_under_debug(backend, monkeypatch, name, change, text, whole_row):
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    _, given = own_lists(name, backend.device)
    public(name, given)
    state, given = own_lists(name, backend.device)
    change(given)
    before = state.clone()
    with pytest.raises(ValueError, match=f"^{name}: .* must .*got -?[0-9]"):
        public(name, given)
    assert_states(state, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2049.0, -1e30])
@pytest.mark.parametrize("listed", [False, True])
def test_weights_out_of_range(backend, monkeypatch, value, listed):
    """Where they count: -1 in the score of that slot, and the weight in the ring as it is."""
    state = state_of(backend.device)
    good = state.clone()
    given, right = (arguments("window_scores_update", x, listed=listed) for x in (state, good))
    for call in (given, right):
        call["count"].fill_(3)
    given["rows"][1, 0, Q - 1, 2] = value
    given["rows"][0, 0, 0, 3] = value  # does not count
    public("window_scores_update", right)
    before = state.clone()
    text = "rows must be finite and at most 2048 in size"
    if backend.checks_values:
        with pytest.raises(RuntimeError, match=f"window_scores_update: {text}, got .* of row 1"):
            public("window_scores_update", given)
        assert_states(state, before)
    else:
        public("window_scores_update", given)
        step = int(given["step"][1])
        good.score[1, 0, 2] = -1
        good.ring[1, 0, step % R, 2] = value
        torch.testing.assert_close(state.ring, good.ring, rtol=0, atol=0, equal_nan=True)
        state.ring.copy_(good.ring)
        state.ring[1, 0, step % R, 2] = good.ring[1, 0, step % R, 2] = 0
        assert_states(state, good)
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    given = arguments("window_scores_update", before, listed=listed) | {"rows": given["rows"]}
    given["count"].fill_(3)
    with pytest.raises(ValueError, match=f"^window_scores_update: {text}, got "):
        public("window_scores_update", given)
