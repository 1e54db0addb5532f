"""Each mistake is an error that names the operator, the argument, the rule and the value."""

import re

import numpy as np
import pytest
import torch

from tokcore import _library
from tokcore.ops import sequential_kl, token_logprob

NAN, INF = float("nan"), float("inf")
X, Y, TARGET = torch.zeros(2, 3, 5), torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)


# The operators with every argument in order; each case below replaces one of them.
RIGHT = {
    token_logprob: {"logits": X, "target": TARGET},
    sequential_kl: {"policy_logits": X, "reference_logits": Y, "target": TARGET},
}
every_operator = pytest.mark.parametrize("operator", RIGHT, ids=lambda f: f.__name__)


def on(device, arguments):
    """Tensors moved to the device, but for those that are meant to lie elsewhere."""
    return {
        name: value.to(device) if getattr(value, "is_cpu", False) else value
        for name, value in arguments.items()
    }


# Under the key 0: the first argument, whatever its name.
BOTH = [
    # logits
    ({0: X.long()}, TypeError, "must be float32.*got torch.int64"),
    ({0: X.bool()}, TypeError, "must be float32.*got torch.bool"),
    ({0: X.to(torch.complex64)}, TypeError, "must be float32.*complex64"),
    ({0: X.tolist()}, TypeError, "must be a torch.Tensor, got list"),
    ({0: torch.tensor(1.0)}, ValueError, r"V >= 1, got \(\)"),
    ({0: X[..., :0]}, ValueError, r"V >= 1, got \(2, 3, 0\)"),
    ({0: X.to_sparse()}, TypeError, "must be a dense tensor, got torch.sparse_coo"),
    # target
    ({"target": TARGET.float()}, TypeError, "target must be int64 or int32, got torch.float32"),
    ({"target": TARGET.bool()}, TypeError, "target must be int64 or int32, got torch.bool"),
    ({"target": TARGET.to(torch.int16)}, TypeError, "target must be int64 or int32.*int16"),
    ({"target": X[..., 0].clone().requires_grad_()}, ValueError, "target must not require grad"),
    ({"target": [0, 1]}, TypeError, "target must be a torch.Tensor, got list"),
    ({"target": TARGET[:1]}, ValueError, r"target must have shape .*broadcast.*got \(1, 3\)"),
    ({"target": TARGET[:, :1]}, ValueError, r"target must have shape .*got \(2, 1\)"),
    ({"target": TARGET[0]}, ValueError, r"target must have shape .*got \(3,\)"),
    ({"target": TARGET[0, 0]}, ValueError, r"target must have shape .*got \(\)"),
    ({"target": TARGET[None]}, ValueError, r"target must have shape .*got \(1, 2, 3\)"),
    ({"target": TARGET.to("meta")}, ValueError, "target must be on the device .*cpu, got meta"),
    # temperature
    ({"temperature": 0.0}, ValueError, "temperature must be in .1e-30, 1e.30., got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be in .1e-30, 1e.30., got -1"),
    ({"temperature": NAN}, ValueError, "temperature must be in .1e-30, 1e.30., got nan"),
    ({"temperature": INF}, ValueError, "temperature must be in .1e-30, 1e.30., got inf"),
    ({"temperature": 1e300}, ValueError, "temperature must be in .1e-30, 1e.30., got 1e.300"),
    ({"temperature": 1e-40}, ValueError, "temperature must be in .1e-30, 1e.30., got 1e-40"),
    ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    ({"temperature": True}, TypeError, "temperature must be a number, got True"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
    ({"temperature": torch.tensor(1.0)}, ValueError, r"temperature must have the shape.*got \(\)"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must have the shape.*got \(3,\)"),
    ({"temperature": torch.ones(2, 3).long()}, TypeError, "temperature must be floating.*int64"),
    ({"temperature": torch.ones(2, 3).requires_grad_()}, ValueError, "temperature .*require grad"),
    ({"temperature": torch.ones(2, 3).to("meta")}, ValueError, "temperature .*cpu, got meta"),
    # ignore_index
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must fit into 64 bits, got 9223372036854"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
]
LOGPROB = [
    ({"softcap": 0.0}, ValueError, "softcap must be in .1e-30, 1e.30., got 0.0"),
    ({"softcap": -5.0}, ValueError, "softcap must be in .1e-30, 1e.30., got -5.0"),
    ({"softcap": INF}, ValueError, "softcap must be in .1e-30, 1e.30., got inf"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
    ({"target": TARGET[:, :2, None]}, ValueError, r"target must have shape .*got \(2, 2, 1\)"),
]
KL = [
    (
        {"reference_logits": Y.bfloat16()},
        TypeError,
        "one dtype, got torch.float32 and torch.bfloat16",
    ),
    (
        {"reference_logits": Y.long()},
        TypeError,
        "reference_logits must be float32.*got torch.int64",
    ),
    (
        {"reference_logits": torch.ones(2, 3, 8)},
        ValueError,
        "vocabularies.*V=5 and V=8; a padded vocab",
    ),
    (
        {"reference_logits": Y[:1]},
        ValueError,
        r"reference_logits must have the shape.*got \(1, 3, 5\)",
    ),
    ({"reference_logits": Y[0]}, ValueError, r"reference_logits must have the shape.*got \(3, 5\)"),
    (
        {"reference_logits": Y.to("meta")},
        ValueError,
        "reference_logits must be on the device .*got meta",
    ),
    (
        {"reference_logits": None},
        TypeError,
        "reference_logits must be a torch.Tensor, got NoneType",
    ),
    ({"target": TARGET[..., None]}, ValueError, r"target must have shape .*got \(2, 3, 1\)"),
    ({"direction": "backward"}, ValueError, "direction must be one of forward, reverse, both"),
    ({"direction": 1}, ValueError, "direction must be one of .*got 1"),
    (
        {"mask": torch.ones(2, 3)},
        TypeError,
        r"mask must be bool \(True = keep\), got torch.float32",
    ),
    ({"mask": torch.ones(3).bool()}, ValueError, r"mask must have the shape .*got \(3,\)"),
    ({"mask": torch.ones(2, 1).bool()}, ValueError, r"mask must have the shape .*got \(2, 1\)"),
    ({"mask": [True]}, TypeError, "mask must be a torch.Tensor, got list"),
    ({"mask": torch.ones(2, 3).bool().to("meta")}, ValueError, "mask .*cpu, got meta"),
]
CASES = [(token_logprob, *case) for case in BOTH + LOGPROB] + [
    (sequential_kl, *case) for case in BOTH + KL
]


@pytest.mark.parametrize(("operator", "wrong", "error", "text"), CASES)
def test_named_errors(backend, operator, wrong, error, text):
    arguments = dict(RIGHT[operator])
    for name, value in wrong.items():
        arguments[next(iter(arguments)) if name == 0 else name] = value
    text = text.replace("cpu", str(torch.zeros(0, device=backend.device).device))
    with pytest.raises(error, match=f"^{operator.__name__}: .*{text}"):
        operator(**on(backend.device, arguments))


@every_operator
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, 2.0**100])
def test_values_of_a_temperature_tensor(backend, operator, bad, monkeypatch):
    """Looked at where it costs nothing, and under TOKCORE_DEBUG=1 everywhere."""
    monkeypatch.setenv("TOKCORE_DEBUG", "1")
    arguments = RIGHT[operator] | {"temperature": torch.tensor([[1.0, 1.0, bad]] * 2)}
    text = f"temperature must be in [1e-30, 1e+30] in every row, got {bad}"
    with pytest.raises(ValueError, match=re.escape(text)):
        operator(**on(backend.device, arguments))


@every_operator
def test_mixed_devices(backend, operator):
    if backend.name != "cuda":
        pytest.skip("needs a second device")
    for name in RIGHT[operator]:
        arguments = on("cuda", RIGHT[operator]) | {name: RIGHT[operator][name]}
        with pytest.raises(ValueError, match="must be on the device of the logits"):
            operator(**arguments)


@every_operator
def test_numbers_of_other_kinds_are_numbers(backend, operator):
    arguments = on(backend.device, RIGHT[operator])
    want = operator(**arguments)[0]
    for temperature in (1, np.float32(1.0), np.float64(1.0)):
        assert torch.equal(operator(**arguments, temperature=temperature)[0], want)
    assert torch.equal(operator(**arguments, ignore_index=np.int64(-100))[0], want)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_temperature_tensors_are_used_as_float32(backend, operator, dtype):
    arguments = on(backend.device, RIGHT[operator])
    temperature = torch.full((2, 3), 0.75, device=backend.device)
    want = operator(**arguments, temperature=temperature)[0]
    assert torch.equal(operator(**arguments, temperature=temperature.to(dtype))[0], want)


@pytest.mark.parametrize("direction", [0, 4, -1])
def test_a_direction_that_the_native_operator_does_not_know(backend, direction):
    x = torch.zeros(2, 5, device=backend.device)
    with pytest.raises(RuntimeError, match=f"direction must be 1 .*got {direction}"):
        _library.native().sequential_kl(x, x, None, None, None, 1.0, -100, direction, False, False)
