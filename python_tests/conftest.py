"""One fixture for all operator tests: the CPU kernels, the CUDA kernels emulated, the CUDA kernels.

TOKCORE_TEST_BACKENDS ("cpu,emulated,cuda" or some of them) says which must be there; without it
the tests run on all that are. TOKCORE_TEST_SEED orders the emulated blocks and threads.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tokcore import _library

# An emulated thread is a fiber: about a thousand times slower than the CUDA thread it stands for.
EMULATED_ELEMENTS = 40_000


def _available() -> list[str]:
    libraries = _library.build_info()["libraries"]
    found = {
        "cpu": True,
        "emulated": Path(libraries[_library.EMULATED]["path"]).is_file(),
        "cuda": libraries[_library.CUDA]["loaded"] and torch.cuda.is_available(),
    }
    wanted = os.environ.get("TOKCORE_TEST_BACKENDS")
    if wanted is None:
        return [name for name in found if found[name]]
    missing = [name for name in wanted.split(",") if not found.get(name)]
    if missing:
        raise pytest.UsageError(f"TOKCORE_TEST_BACKENDS asks for {missing}, not there: {libraries}")
    return wanted.split(",")


@dataclass(frozen=True)
class Backend:
    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def checks_values(self) -> bool:
        """Whether a wrong value (a label out of range) raises; elsewhere its row is NaN."""
        return self.name == "cpu"

    def place(self, arguments: dict) -> dict:
        """Arguments of a call with the tensors of the CPU on this device."""
        on_cpu = {name: x for name, x in arguments.items() if getattr(x, "is_cpu", False)}
        return arguments | {name: x.to(self.device) for name, x in on_cpu.items()}

    def skip_above(self, elements: int, *, emulated: int = EMULATED_ELEMENTS) -> None:
        if self.name == "emulated" and elements > emulated:
            pytest.skip(f"{elements} elements are too many to emulate")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _available(), indirect=True)


@pytest.fixture
def backend(request):
    if request.param == "emulated":
        with _library.use("emulated", seed=int(os.environ.get("TOKCORE_TEST_SEED", "1"))):
            yield Backend("emulated")
    else:
        yield Backend(request.param)
