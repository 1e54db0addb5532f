"""Argument checks that the operators share.

Every text names the operator, the argument, the rule and the value found. The native operators
check their tensors once more before they allocate; here is what they cannot see (Python values,
requires_grad, aliasing) and what a user should read before a compiler puts words around it.
"""

import math
import numbers
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of a temperature or a softcap: beyond, it or its inverse leaves the range of float32.
_LEAST, _MOST = 1e-30, 1e30


def logits(operator: str, name: str, value: Tensor) -> None:
    tensor(operator, name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{operator}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}"
        )
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(
            f"{operator}: {name} must have shape (..., V) with V >= 1, got {_shape(value)}"
        )
    no_functional_derivative(operator, name, value)


def same_vocabulary(operator: str, policy: Tensor, reference: Tensor) -> None:
    _same_device(operator, "reference_logits", reference, policy)
    if reference.dtype != policy.dtype:
        raise TypeError(
            f"{operator}: policy_logits and reference_logits must have one dtype, got "
            f"{policy.dtype} and {reference.dtype}"
        )
    if reference.shape[-1] != policy.shape[-1]:
        raise ValueError(
            f"{operator}: the vocabularies of policy_logits and reference_logits differ: "
            f"V={policy.shape[-1]} and V={reference.shape[-1]}; a padded vocabulary? Slice or pad "
            "one of them"
        )
    if reference.shape != policy.shape:
        raise ValueError(
            f"{operator}: reference_logits must have the shape of policy_logits, "
            f"{_shape(policy)} (nothing is broadcast), got {_shape(reference)}"
        )


def target(operator: str, value: Tensor, like: Tensor, ignore_index: int, *, several: bool) -> None:
    tensor(operator, "target", value)
    if value.requires_grad:
        raise ValueError(
            f"{operator}: target must not require grad: it holds token ids, got {value.dtype}"
        )
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{operator}: target must be int64 or int32, got {value.dtype}")
    _same_device(operator, "target", value, like)
    rows = like.shape[:-1]
    if value.shape != rows and not (
        several and value.dim() == like.dim() and value.shape[:-1] == rows
    ):
        rule = "(...) or (..., K)" if several else "(...)"
        raise ValueError(
            f"{operator}: target must have shape {rule} for logits (..., V) = {_shape(like)} "
            f"(nothing is broadcast), got {_shape(value)}"
        )
    if debugged(value):
        _labels_in_range(operator, value, like.shape[-1], ignore_index)


def mask(operator: str, value: Tensor, like: Tensor) -> None:
    tensor(operator, "mask", value)
    if value.dtype != torch.bool:
        raise TypeError(f"{operator}: mask must be bool (True = keep), got {value.dtype}")
    _same_device(operator, "mask", value, like)
    _rows(operator, "mask", value, like)


def integers(operator: str, name: str, value: Tensor) -> None:
    tensor(operator, name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{operator}: {name} must be int64 or int32, got {value.dtype}")


def typed(
    operator: str,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """Of this very dtype and shape, where ``like`` is."""
    tensor(operator, name, value)
    if value.dtype != dtype:
        raise TypeError(f"{operator}: {name} must be {dtype}, got {value.dtype}")
    if value.shape != shape or value.device != like.device:
        raise ValueError(
            f"{operator}: {name} must have shape {tuple(shape)} on {like.device} (nothing is "
            f"broadcast), got {_shape(value)} on {value.device}"
        )


def state(
    operator: str,
    name: str,
    value: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """The same, written where it lies: a copy would be of no use."""
    typed(operator, name, value, dtype, shape, like)
    if not value.is_contiguous():
        raise ValueError(
            f"{operator}: {name} is written in place and must be contiguous, got strides "
            f"{value.stride()} for shape {_shape(value)}"
        )


def kv_store(
    operator: str,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    last_selected: Tensor,
    count: Tensor,
    key_quantization: Tensor | None,
    value_quantization: Tensor | None,
) -> None:
    """Keys and values of a sparse key-value cache with the slots of its lists, all written."""
    tensor(operator, "key", key)
    if key.dtype not in (*_FLOATS, torch.uint8):
        raise TypeError(
            f"{operator}: key must be float32, float64, float16, bfloat16 or uint8, got {key.dtype}"
        )
    if key.dim() != 4 or key.shape[1] < 1 or key.shape[3] < 1:
        raise ValueError(f"{operator}: key must have shape (B, Hkv, C, D), got {tuple(key.shape)}")
    batch, heads, slots, dim = key.shape
    state(operator, "key", key, key.dtype, key.shape, key)
    state(operator, "value", value, key.dtype, key.shape, key)
    tensor(operator, "position", position)
    lists = position.shape[1] if position.dim() == 3 else 0
    if lists not in (1, heads):
        raise ValueError(
            f"{operator}: position must have shape (B, Hs, C) with Hs = 1 or Hkv = {heads}, got "
            f"{tuple(position.shape)}"
        )
    state(operator, "position", position, torch.int32, (batch, lists, slots), key)
    state(operator, "last_selected", last_selected, torch.int32, (batch, lists, slots), key)
    state(operator, "count", count, torch.int32, (batch, lists), key)
    for name, quantization in (
        ("key_quantization", key_quantization),
        ("value_quantization", value_quantization),
    ):
        if (quantization is not None) != (key.dtype == torch.uint8):
            raise ValueError(
                f"{operator}: {name} goes with uint8 keys and values, got "
                f"{'none' if quantization is None else 'one'} with {key.dtype}"
            )
        if quantization is not None:
            tensor(operator, name, quantization)
            groups = quantization.shape[3] if quantization.dim() == 5 else 0
            if groups < 1 or dim % groups != 0:
                raise ValueError(
                    f"{operator}: {name} must have shape (B, Hkv, C, Z, 2) with Z dividing "
                    f"D = {dim}, got {tuple(quantization.shape)}"
                )
            shape = (batch, heads, slots, groups, 2)
            state(operator, name, quantization, torch.float32, shape, key)


def debugged(value: Tensor) -> bool:
    """Whether facts about values are to be looked at in Python."""
    return _debug() and readable(value)


def holds(operator: str, name: str, value: Tensor, right: Tensor, rule: str) -> None:
    """Raises for the first element that is not ``right``: a fact about values, in a debug run."""
    if not bool(right.all()):
        at = tuple((~right).nonzero()[0].tolist())
        raise ValueError(f"{operator}: {name} must {rule}, got {value[at].tolist()} at {at}")


def lengths(
    operator: str, name: str, value: Tensor, like: Tensor, *, batch: int, most: int
) -> None:
    """How much of each item of ``like``, whose first ``batch`` dimensions number them, counts."""
    integers(operator, name, value)
    shape = tuple(like.shape[:batch])
    if value.shape != shape or value.device != like.device:
        raise ValueError(
            f"{operator}: {name} must have shape {shape} on {like.device}, got {_shape(value)} on "
            f"{value.device}"
        )
    if debugged(value):
        bad = value[(value < 0) | (value > most)]
        if bad.numel() > 0:
            raise ValueError(f"{operator}: {name} must lie in [0, {most}], got {bad[0].item()}")


def temperature(operator: str, value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """The scalar and the per-row temperature that the native operators take; the tensor wins."""
    if not isinstance(value, Tensor):
        return _positive(operator, "temperature", value), None
    if value.requires_grad:
        raise ValueError(f"{operator}: temperature must not require grad: it is not differentiated")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{operator}: temperature must be floating point, got {value.dtype}")
    _same_device(operator, "temperature", value, like)
    _rows(operator, "temperature", value, like)
    rows = value.to(torch.float32)
    if readable(rows) and (rows.device.type == "cpu" or _debug()):
        bad = rows[~((rows >= _LEAST) & (rows <= _MOST))]
        if bad.numel() > 0:
            raise ValueError(
                f"{operator}: temperature must be in [{_LEAST}, {_MOST}] in every row, got "
                f"{bad[0].item()}"
            )
    return 1.0, rows


def softcap(operator: str, value: float | None) -> float:
    """The softcap as the native operators take it: 0 is none."""
    return 0.0 if value is None else _positive(operator, "softcap", value)


def floating(operator: str, name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{operator}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}"
        )


def constant(operator: str, name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{operator}: {name} must not require grad: it is a constant; detach it")


def number(operator: str, name: str, value: float, *, least: float, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{operator}: {name} must be a number, got {value!r}")
    # By comparisons alone: under torch.compile a number that changed is a symbol.
    if not (least <= value <= most and -math.inf < value < math.inf):
        raise ValueError(f"{operator}: {name} must be in [{least}, {most}], finite, got {value}")


def lattice(
    operator: str,
    name: str,
    value: Tensor,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """A batch of matrices of unequal sizes as the native alignment operators take it; last whether
    they sum in float64.
    """
    tensor(operator, name, value)
    floating(operator, name, value)
    constant(operator, name, value)
    no_functional_derivative(operator, name, value)
    if value.dim() != 3:
        raise ValueError(f"{operator}: {name} must have shape (B, M, L), got {_shape(value)}")
    if dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{operator}: dtype must be torch.float64 or torch.float32, got {dtype!r}")
    if value.dtype == torch.float64 and dtype == torch.float32:
        raise TypeError(f"{operator}: dtype float32 would round {name}, got {value.dtype}")
    sizes = {"row_lengths": (row_lengths, 1), "column_lengths": (column_lengths, 2)}
    counts: list[Tensor | None] = []
    for which, (given, dim) in sizes.items():
        if given is not None:
            lengths(operator, which, given, value, batch=1, most=value.shape[dim])
        counts.append(None if given is None else given.long())
    wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return wide, *counts, dtype == torch.float64


def cached(
    operator: str,
    query: Tensor,
    key: Tensor,
    count: Tensor,
    key_quantization: Tensor | None,
    *,
    dims: int,
) -> None:
    """A cache (B, Hkv, C, D), how much of its lists is in use, and who attends to it."""
    tensor(operator, "query", query)
    floating(operator, "query", query)
    no_functional_derivative(operator, "query", query)
    rule = "(B, Hq, Q, D)" if dims == 4 else "(B, Hq, D)"
    if query.dim() != dims or query.shape[1] < 1 or not 1 <= query.shape[-1] <= 256:
        raise ValueError(
            f"{operator}: query must have shape {rule} with Hq >= 1 and 1 <= D <= 256, got "
            f"{_shape(query)}"
        )
    cache_tensor(operator, "key", key, key_quantization, query)
    heads, batch = key.shape[1], query.shape[0]
    if heads < 1 or query.shape[1] % heads != 0:
        raise ValueError(
            f"{operator}: key must have Hkv heads, a divisor of Hq = {query.shape[1]}, got {heads}"
        )
    tensor(operator, "count", count)
    if count.dtype != torch.int32:
        raise TypeError(f"{operator}: count must be int32, got {count.dtype}")
    if count.dim() != 2 or count.shape[0] != batch or count.shape[1] not in (1, heads):
        raise ValueError(
            f"{operator}: count must have shape ({batch}, Hs) with Hs = 1 or {heads}, got "
            f"{_shape(count)}"
        )
    on_device_of_query(operator, "count", count, query)


def cache_tensor(
    operator: str, name: str, value: Tensor, quantization: Tensor | None, query: Tensor
) -> None:
    tensor(operator, name, value)
    no_functional_derivative(operator, name, value)
    if value.dim() != 4 or (value.shape[0], value.shape[3]) != (query.shape[0], query.shape[-1]):
        raise ValueError(
            f"{operator}: {name} must have shape ({query.shape[0]}, Hkv, C, {query.shape[-1]}) "
            f"for query {_shape(query)}, got {_shape(value)}"
        )
    on_device_of_query(operator, name, value, query)
    if quantization is None:
        if value.dtype != query.dtype:
            raise TypeError(
                f"{operator}: {name} must have the dtype of query, {query.dtype}, or be uint8 with "
                f"{name}_quantization, got {value.dtype}"
            )
        return
    if value.dtype != torch.uint8:
        raise TypeError(
            f"{operator}: {name} must be uint8 with {name}_quantization, got {value.dtype}"
        )
    if query.dtype == torch.float64:
        raise TypeError(
            f"{operator}: query must be float32, float16 or bfloat16 with {name}_quantization, got "
            f"{query.dtype}"
        )
    tensor(operator, f"{name}_quantization", quantization)
    if quantization.dtype != torch.float32:
        raise TypeError(
            f"{operator}: {name}_quantization must be float32, got {quantization.dtype}"
        )
    shape = _shape(quantization)
    if (
        len(shape) != 5
        or (*shape[:3], shape[4]) != (*value.shape[:3], 2)
        or shape[3] < 1
        or value.shape[3] % shape[3] != 0
    ):
        raise ValueError(
            f"{operator}: {name}_quantization must have shape {(*value.shape[:3], 'Z', 2)} with Z "
            f"a divisor of D = {value.shape[3]}, got {shape}"
        )
    on_device_of_query(operator, f"{name}_quantization", quantization, query)


def slots_in_use(operator: str, count: Tensor, index: Tensor | None, capacity: int) -> None:
    """Facts about values, where the native operator only marks an item that is wrong (CUDA)."""
    if not debugged(count):
        return
    most = capacity if index is None else index.shape[2]
    bad = count[(count < 0) | (count > most)]
    if bad.numel() > 0:
        raise ValueError(f"{operator}: count must lie in [0, {most}], got {bad[0].item()}")
    if index is None or most == 0:
        return
    listed = torch.arange(most, device=index.device) < count.unsqueeze(2)
    wrong = (index < 0) | (index >= capacity)
    wrong[..., 1:] |= index[..., 1:] <= index[..., :-1]
    if bool((wrong & listed).any()):
        raise ValueError(
            f"{operator}: index must hold ascending slots in [0, {capacity}), got "
            f"{index[wrong & listed][0].item()} where it does not"
        )


def like_query(operator: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Of attention whose key has the right shape: the rest of what key and value must be."""
    if value.shape != key.shape:
        raise ValueError(
            f"{operator}: value must have the shape of key, {_shape(key)}, got {_shape(value)}"
        )
    for name, given in (("key", key), ("value", value)):
        if given.dtype != query.dtype:
            raise TypeError(
                f"{operator}: {name} must have the dtype of query, {query.dtype}, got {given.dtype}"
            )
        on_device_of_query(operator, name, given, query)


def on_device_of_query(operator: str, name: str, value: Tensor, query: Tensor) -> None:
    if value.device != query.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of query, {query.device}, got {value.device}"
        )


def lattice_results(operator: str, name: str, sums: Tensor) -> None:
    """Where the native operator has only marked an item that is wrong (CUDA)."""
    if debugged(sums) and bool(sums.isnan().any()):
        item = int(sums.isnan().nonzero()[0])
        raise ValueError(
            f"{operator}: {name} must be finite or the infinity that forbids a cell (and have no "
            f"more rows than columns in monotonic_search), got otherwise in item {item}"
        )


def integer(operator: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{operator}: {name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{operator}: {name} must fit into 64 bits, got {value}")
    return int(value)


def choice(operator: str, name: str, value: str, choices: dict[str, int]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{operator}: {name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def inplace_backward(operator: str, name: str, value: Tensor) -> bool:
    """Whether the backward may write over ``value``: False where there is no backward at all, an
    error where it would do harm.
    """
    if not torch.is_grad_enabled():
        return False
    # What torch.vmap hands over does not say whether it requires grad.
    if value.requires_grad if torch.compiler.is_compiling() else _is_transformed(value):
        raise ValueError(
            f"{operator}: inplace_backward cannot be traced or transformed (torch.compile, "
            "torch.func): a compiler decides itself what it overwrites; leave it False there"
        )
    if not value.requires_grad:
        return False
    # A view of a leaf shares the leaf's memory.
    owner = value if value._base is None else value._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{operator}: inplace_backward would destroy {name}, a leaf that requires grad (or a "
            "view of one)"
        )
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{operator}: inplace_backward needs the last dimension of {name} contiguous, got "
            f"strides {value.stride()}"
        )
    if _may_overlap(value):
        raise ValueError(
            f"{operator}: inplace_backward needs {name} whose elements do not share memory (an "
            f"expanded view?), got strides {value.stride()} for shape {_shape(value)}"
        )
    return True


def separate(operator: str, name: str, other: Tensor, written: Tensor) -> None:
    """``other`` is still to be read when ``written`` is written over."""
    if other.requires_grad:
        raise ValueError(f"{operator}: inplace_backward cannot also differentiate {name}")
    if other.untyped_storage()._cdata == written.untyped_storage()._cdata:
        raise ValueError(f"{operator}: inplace_backward would write over the storage of {name}")


def no_create_graph(operator: str) -> None:
    """In a backward formula: grad mode is on exactly under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: inplace_backward and create_graph=True exclude each other: the graph "
            "would need the logits that this backward writes over"
        )


def _positive(operator: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{operator}: {name} must be a number, got {value!r}")
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{operator}: {name} must be in [{_LEAST}, {_MOST}], got {value}")
    return float(value)


def _labels_in_range(operator: str, value: Tensor, size: int, ignore_index: int) -> None:
    bad = value[((value < 0) | (value >= size)) & (value != ignore_index)]
    if bad.numel() > 0:
        raise ValueError(
            f"{operator}: target must be in [0, {size}) or ignore_index ({ignore_index}), got "
            f"{bad[0].item()}"
        )


def tensor(operator: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{operator}: {name} must be a dense tensor, got {value.layout}")


def _same_device(operator: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of the logits, {like.device}, got "
            f"{value.device}"
        )


def no_functional_derivative(operator: str, name: str, value: Tensor) -> None:
    """Forward mode would get a tangent of zero, in silence; torch.func.grad an obscure error."""
    if torch.compiler.is_compiling():
        return
    inner = value
    while _is_transformed(inner):
        if torch._C._functorch.is_gradtrackingtensor(inner):
            break
        inner = torch._C._functorch.get_unwrapped(inner)
    if _is_transformed(inner) or forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{operator}: {name} cannot be differentiated by torch.func or in forward mode; use "
            "backward() or torch.autograd.grad (torch.vmap works)"
        )


def _rows(operator: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape[:-1]:
        raise ValueError(
            f"{operator}: {name} must have the shape of the rows, {tuple(like.shape[:-1])} "
            f"(nothing is broadcast), got {_shape(value)}"
        )


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _debug() -> bool:
    """TOKCORE_DEBUG=1: facts about values raise on every device; that synchronises."""
    return os.environ.get("TOKCORE_DEBUG", "0") not in ("", "0")


def readable(value: Tensor) -> bool:
    """Whether Python may look at the values: not in a trace, in torch.func or on meta."""
    return not (
        torch.compiler.is_compiling()
        or type(value) is not Tensor
        or value.device.type == "meta"
        or _is_transformed(value)
    )


def _is_transformed(value: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _may_overlap(value: Tensor) -> bool:
    """False only where, by rising stride, each dimension steps over what the finer ones cover."""
    covered = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < covered:
                return True
            covered += stride * (size - 1)
    return False
