"""What the four operators on a sparse key-value cache owe to torch."""

import shutil

import pytest
import torch
from kv_calls import FUNCTIONS, HEADS, IN_PLACE, B, C, M, arguments, public, state_of
from kv_states import State, assert_states
from torch.library import opcheck

from tokcore import _library
from tokcore.ops import window_scores_update

# torch deprecates what its own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
every_operator = pytest.mark.parametrize("name", FUNCTIONS)
every_form = pytest.mark.parametrize(
    ("lists", "quantized", "listed"), [(1, False, True), (HEADS, True, False)]
)


@every_operator
@every_form
@pytest.mark.parametrize(("batch", "slots"), [(B, C), (0, C), (B, 0)])
def test_opcheck(backend, name, lists, quantized, listed, batch, slots):
    if (name, slots) == ("kv_append", 0):
        pytest.skip("no room")
    state = state_of(backend.device, lists=lists, quantized=quantized, batch=batch, slots=slots)
    given = arguments(name, state, listed=listed)
    opcheck(getattr(_library.native(), name).default, tuple(given.values()))


def step(state: State, given: dict) -> torch.Tensor:
    """Tokens come, slots are chosen and scored, others go: one step of a cache."""
    public("kv_append", given["kv_append"])
    chosen = public("window_select", given["window_select"])
    rows = torch.rand_like(chosen.index, dtype=torch.float32) * 0 + 0.25
    update = given["window_scores_update"]
    window_scores_update(
        state.score,
        state.ring,
        state.last_selected,
        state.oldest,
        rows.unsqueeze(2),
        chosen.index,
        chosen.selected,
        update["step"],
        update["window"],
    )
    public("kv_compact", given["kv_compact"])
    return state.key.gt(1).sum() + chosen.index.sum()


@every_form
@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True)])
def test_compiled_steps_leave_the_same_state(backend, lists, quantized, listed, compiler, dynamic):
    """Functionalised and put back in place, with no break in the graph."""
    torch._dynamo.reset()
    states = [state_of(backend.device, lists=lists, quantized=quantized) for _ in range(2)]
    functions = [step, torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)]
    results = []
    for state, function in zip(states, functions, strict=True):
        given = {name: arguments(name, state, listed=listed) for name in FUNCTIONS}
        results.append(function(state, given))
    assert torch.equal(*results)
    assert_states(*states)
    assert not torch.equal(states[0].position, state_of(lists=lists).position.to(backend.device))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles")
def test_inductor_writes_in_place():
    """Once, as it takes its time: what it copies back, and what it need not copy."""
    torch._dynamo.reset()
    states = [state_of(lists=HEADS) for _ in range(2)]
    addresses = [value.data_ptr() for value in states[1].tensors().values()]
    given = [{name: arguments(name, state) for name in FUNCTIONS} for state in states]
    want = step(states[0], given[0])
    got = torch.compile(step, fullgraph=True)(states[1], given[1])
    assert torch.equal(got, want)
    assert_states(*states)
    assert [value.data_ptr() for value in states[1].tensors().values()] == addresses


@every_operator
def test_meta_tensors(name):
    state = state_of().to("meta")
    result = public(name, arguments(name, state))
    if name == "window_select":
        assert [tuple(value.shape) for value in result] == [(B, 1, M), (B, 1)]
    else:
        assert result is None


@pytest.mark.parametrize("name", IN_PLACE)
def test_versions_rise_of_what_is_written(backend, name):
    given = arguments(name, state_of(backend.device, quantized=True))
    before = {key: v._version for key, v in given.items() if isinstance(v, torch.Tensor)}
    public(name, given)
    schema = getattr(_library.native(), name).default._schema
    for argument in schema.arguments:
        if argument.name in before:
            written = argument.alias_info is not None
            assert given[argument.name]._version == before[argument.name] + written, argument.name


@pytest.mark.parametrize("name", IN_PLACE)
def test_no_derivative(backend, name):
    """Neither of what is read nor of what is written; without grad mode nobody asks."""
    state = state_of(backend.device)
    inputs = {"kv_append": "new_value", "kv_compact": "key", "window_scores_update": "rows"}
    given = arguments(name, state)
    given[inputs[name]].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name}: writes its state in place and has no"):
        public(name, given)
    assert_states(state, state_of(backend.device))
    with torch.no_grad():
        public(name, given)


@every_operator
def test_inference_mode(backend, name):
    want = state_of(backend.device)
    public(name, arguments(name, want))
    with torch.inference_mode():
        got = state_of(backend.device)
        given = arguments(name, got)
        public(name, given)
    assert_states(got, want)


@every_operator
def test_no_vmap(backend, name):
    given = arguments(name, state_of(backend.device))
    first = next(iter(given))

    def call(x):
        public(name, given | {first: x})

    with pytest.raises(NotImplementedError, match=f"{name}: cannot be batched by torch.vmap"):
        torch.vmap(call)(given[first].expand(3, *given[first].shape).contiguous())


@every_operator
@every_form
def test_the_same_bits_on_every_number_of_threads_and_from_run_to_run(
    backend, name, lists, quantized, listed
):
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        state = state_of(backend.device, lists=lists, quantized=quantized, slots=400)
        result = public(name, arguments(name, state, listed=listed))
        results.append((state, result))
    torch.set_num_threads(threads)
    for state, result in results[1:]:
        assert_states(state, results[0][0])
        if result is not None:
            assert all(map(torch.equal, result, results[0][1]))


@every_operator
def test_autocast_changes_nothing(backend, name):
    states = [state_of(backend.device) for _ in range(2)]
    results = [public(name, arguments(name, states[0]))]
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        results.append(public(name, arguments(name, states[1])))
    assert_states(*states)
    assert results[0] is None or all(map(torch.equal, *results))
