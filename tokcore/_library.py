"""Loads the native libraries. The one module that knows about binaries.

libtokcore.so (schemas and CPU kernels) is loaded on import, libtokcore_cuda.so with it where torch
has CUDA, and libtokcore_emulated.so (the CUDA kernels on CPU tensors, in a namespace of their own)
when a test asks for it. What should be there and does not load is an ImportError, never a silent
fallback: slow is a bug that nobody reports.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
CPU, CUDA, EMULATED = (f"libtokcore{part}{_SUFFIX}" for part in ("", "_cuda", "_emulated"))
SUPPORTED = (
    "Linux on x86-64 is tested; macOS and aarch64 build from the portable path; Windows is not "
    "supported yet"
)

# The dispatcher namespaces that hold tokcore's operators, in the order in which they were loaded.
NAMESPACES: list[str] = []

_operators = None  # the torch.ops namespace in use
_registrations: list[Callable[[str], None]] = []
_handles: dict[str, ctypes.CDLL] = {}
_reasons: dict[str, str] = {}  # why a library is not loaded
_implementations: list[torch.library.Library] = []  # a registration lives as long as its Library


def native():
    """The torch.ops namespace in use: torch.ops.tokcore, or torch.ops.tokcore_emulated in tests."""
    return _operators


def call_constant(name: str, *arguments):
    """Calls the native operator ``name`` on what does not require grad: autograd's turn would take
    as long as a small call does.
    """
    operator = getattr(_operators, name)
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class use:
    """Selects the "native" or the "emulated" operators, for good or for a ``with`` block.

    ``seed`` orders the emulated blocks and threads. The emulated library is loaded on first use.
    """

    def __init__(self, which: str, *, seed: int | None = None) -> None:
        global _operators
        namespaces = {"native": "tokcore", "emulated": "tokcore_emulated"}
        if which not in namespaces:
            raise ValueError(f"use: which must be one of {sorted(namespaces)}, got {which!r}")
        namespace = namespaces[which]
        if namespace not in NAMESPACES:
            _load(EMULATED)
            _open(namespace)
        if seed is not None:
            if which != "emulated":
                raise ValueError(
                    "use: seed orders the emulated threads; the native operators have none"
                )
            _handles[EMULATED].tokcore_emulation_set_seed(ctypes.c_uint64(seed))
        self._previous = _operators
        _operators = getattr(torch.ops, namespace)

    def __enter__(self) -> "use":
        return self

    def __exit__(self, *exception) -> None:
        global _operators
        _operators = self._previous


def register_operator(
    name: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    fake_backward: Callable | None = None,
    written: int | None = None,
    over_rows: bool = True,
) -> None:
    """Registers all that is not native of ``name``, ``name_backward`` and ``name_backward_``.

    ``backward(operators, ctx, *grads)`` is the formula, with the operators of its namespace, or
    None where nothing is differentiable; ``written`` is the position of the argument that
    ``name_backward_`` writes over, None without one; ``over_rows``: all tensors begin with the
    rows, so that vmap is one dimension more. Runs for each namespace, loaded already or later.
    """

    def register(namespace: str) -> None:
        forward = f"{namespace}::{name}"
        vmap = _register_vmap_over_rows if over_rows else _refuse_vmap
        torch.library.register_fake(forward, fake)
        vmap(namespace, name)
        if backward is None:
            _refuse_double_backward(namespace, name)
            return
        formula = partial(backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(forward, formula, setup_context=setup_context)
        torch.library.register_fake(f"{forward}_backward", fake_backward)
        _refuse_double_backward(namespace, f"{name}_backward")
        vmap(namespace, f"{name}_backward")
        if written is not None:
            torch.library.register_fake(f"{forward}_backward_", lambda *arguments: None)
            _register_mutation(namespace, f"{name}_backward_", [written], _no_double_backward)

    _registrations.append(register)
    for namespace in NAMESPACES:
        register(namespace)


def register_state_operator(name: str) -> None:
    """Registers all that is not native of ``name``, which writes the arguments that its schema
    marks and returns nothing: no derivative, no vmap. Runs for each namespace, as above.
    """

    def register(namespace: str) -> None:
        torch.library.register_fake(f"{namespace}::{name}", lambda *arguments: None)
        arguments = getattr(getattr(torch.ops, namespace), name).default._schema.arguments
        written = [
            i for i, argument in enumerate(arguments) if getattr(argument.alias_info, "is_write", 0)
        ]
        _register_mutation(namespace, name, written, _no_derivative)

    _registrations.append(register)
    for namespace in NAMESPACES:
        register(namespace)


def build_info() -> dict:
    """What is installed, loaded and in use: versions, libraries, instruction set, threads.

    >>> import tokcore
    >>> tokcore.build_info()["isa"] in tokcore.build_info()["isas_available"]
    True
    """
    import tokcore

    return {
        "tokcore": tokcore.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {
            name: {
                "path": str(_folder() / name),
                "loaded": name in _handles,
                "reason": _reasons.get(name),
            }
            for name in (CPU, CUDA, EMULATED)
        },
        "cuda_architectures": _text("tokcore_cuda_architectures").replace(";", " ").split(),
        "isa": _text("tokcore_cpu_isa"),
        "isas_available": _text("tokcore_cpu_isas").split(),
        "threads": torch.get_num_threads(),
        "transparent_hugepage": _transparent_hugepage(),
    }


def _refuse_double_backward(namespace: str, name: str) -> None:
    """A formula that raises: without one, a second derivative would be wrong in silence."""

    def raise_error(ctx, *grads):
        raise _no_double_backward(name)

    torch.library.register_autograd(f"{namespace}::{name}", raise_error)


def _register_mutation(
    namespace: str, name: str, written: list[int], refusal: Callable[[str], NotImplementedError]
) -> None:
    """Autograd kernel of an operator that writes over arguments: no derivative, and the versions of
    those at the positions ``written`` go up.

    torch.library.register_autograd takes functional operators only.
    """
    operator = getattr(getattr(torch.ops, namespace), name).default

    def mutate(keyset, *args):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
            raise refusal(name)
        for position in written:
            if args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library = torch.library.Library(namespace, "IMPL")
    library.impl(name, mutate, "Autograd", with_keyset=True)
    _refuse_vmap(namespace, name)
    _implementations.append(library)


def _refuse_vmap(namespace: str, name: str) -> None:
    def refuse(info, in_dims, *args):
        raise NotImplementedError(
            f"{name}: cannot be batched by torch.vmap (it writes over its input, or ties its rows "
            "to each other)"
        )

    torch.library.register_vmap(f"{namespace}::{name}", refuse)


def _register_vmap_over_rows(namespace: str, name: str) -> None:
    """vmap where all tensors begin with the rows "(...)": the batch is one more such dimension."""
    operator = getattr(getattr(torch.ops, namespace), name)

    def absent(tensor) -> bool:  # an output that was not asked for
        return tensor.shape == (0,)

    def batched(info, in_dims, *args):
        moved = list(args)
        for i, (value, dim) in enumerate(zip(args, in_dims, strict=True)):
            if dim is not None:
                moved[i] = value.movedim(dim, 0)
            elif isinstance(value, torch.Tensor) and not absent(value):
                moved[i] = value.expand(info.batch_size, *value.shape)
        outputs = operator(*moved)
        if isinstance(outputs, torch.Tensor):
            return outputs, 0
        return outputs, tuple(None if absent(output) else 0 for output in outputs)

    torch.library.register_vmap(f"{namespace}::{name}", batched)


def _no_double_backward(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: has no derivative of its own (double backward); compute second derivatives from "
        "plain torch"
    )


def _no_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: writes its state in place and has no derivative; call it under torch.no_grad(), "
        "or detach what it is given"
    )


def _folder() -> Path:
    """Beside this file, or where a sanitizer or development build put the libraries."""
    return Path(os.environ.get("TOKCORE_LIBRARY_DIR") or Path(__file__).parent).absolute()


def _load(name: str) -> None:
    path = _folder() / name
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file: it was not built or not installed")
        torch.ops.load_library(str(path))
    except Exception as error:
        # torch's own text says only that it failed; the loader's reason is the cause
        _reasons[name] = str(error.__cause__ or error)
        raise ImportError(
            f"tokcore: the native library {path} cannot be loaded: {_reasons[name]}. This is torch "
            f"{torch.__version__} on {platform.system()} {platform.machine()}; {SUPPORTED}. "
            "Build it with `pip install --no-build-isolation .` in a clone, or name its folder "
            "in TOKCORE_LIBRARY_DIR.",
            name="tokcore",
            path=str(path),
        ) from None
    _reasons.pop(name, None)
    _handles[name] = ctypes.CDLL(str(path))  # the same handle again, for the plain C functions


def _open(namespace: str) -> None:
    NAMESPACES.append(namespace)
    for function in _registrations:
        function(namespace)


def _text(function: str) -> str:
    """What ``extern "C" const char* function()`` of libtokcore.so says."""
    call = getattr(_handles[CPU], function)
    call.restype = ctypes.c_char_p
    return call().decode()


def _transparent_hugepage() -> str | None:
    """always, madvise or never; with never, large gradients are faulted in by small pages."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text[text.find("[") + 1 : text.find("]")]


def _start() -> None:
    global _operators
    _load(CPU)
    isa = _text("tokcore_cpu_isa")
    if isa.startswith("tokcore:"):  # TOKCORE_ISA names what this processor or nobody has
        raise ImportError(isa, name="tokcore")
    if torch.version.cuda is None:
        _reasons[CUDA] = f"torch {torch.__version__} is a CPU-only build"
    elif not _text("tokcore_cuda_architectures"):
        _reasons[CUDA] = "tokcore was built without CUDA (TOKCORE_CUDA=OFF, or no nvcc)"
    else:
        _load(CUDA)
    _reasons[EMULATED] = "loaded on request, by tests"
    _open("tokcore")
    _operators = torch.ops.tokcore


_start()
