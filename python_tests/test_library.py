"""Loading the native libraries: what is reported, what is refused, which instruction set runs."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokcore
from tokcore import _library

FOLDER = Path(_library.build_info()["libraries"][_library.CPU]["path"]).parent
PACKAGE = Path(tokcore.__file__).parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """``code`` in a fresh interpreter, which imports the same tokcore."""
    path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def import_error(**environment: str) -> str:
    result = run("import tokcore", **environment)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: tokcore: "), result.stderr
    return message


def test_build_info_says_what_is_there():
    info = tokcore.build_info()
    assert info["tokcore"] == tokcore.__version__
    assert info["torch"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert info["threads"] == torch.get_num_threads()
    assert info["isa"] in info["isas_available"]
    assert "baseline" in info["isas_available"]
    assert info["transparent_hugepage"] in {"always", "madvise", "never", None}
    assert all(len(name) >= 2 for name in info["cuda_architectures"])
    for name, library in info["libraries"].items():
        assert Path(library["path"]).name == name
        assert (library["reason"] is None) == library["loaded"], library
    assert info["libraries"][_library.CPU]["loaded"]
    assert json.dumps(info)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_why_the_cuda_library_is_not_loaded_without_cuda():
    assert "CPU-only" in tokcore.build_info()["libraries"][_library.CUDA]["reason"]


def test_a_missing_library_is_one_clear_error(tmp_path):
    message = import_error(TOKCORE_LIBRARY_DIR=str(tmp_path))
    for part in (str(tmp_path / _library.CPU), "no such file", "Linux on x86-64", "pip install"):
        assert part in message


def test_a_broken_library_gives_the_loaders_reason(tmp_path):
    (tmp_path / _library.CPU).write_bytes(b"\x7fELF this is none")
    message = import_error(TOKCORE_LIBRARY_DIR=str(tmp_path))
    assert str(tmp_path / _library.CPU) in message
    assert "file too short" in message or "invalid ELF header" in message


PRETEND_CUDA = "import torch; torch.version.cuda = '13.0'; "
with_cuda = pytest.mark.skipif(
    not tokcore.build_info()["cuda_architectures"], reason="this build has no CUDA library"
)


@with_cuda
def test_a_cuda_library_that_was_built_has_to_load(tmp_path):
    """A torch with CUDA and no libtokcore_cuda.so: an error, not a slow CPU."""
    shutil.copy(FOLDER / _library.CPU, tmp_path)
    result = run(PRETEND_CUDA + "import tokcore", TOKCORE_LIBRARY_DIR=str(tmp_path))
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: tokcore: ")
    assert str(tmp_path / _library.CUDA) in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@with_cuda
def test_the_cuda_library_needs_torch_with_cuda():
    """Its undefined symbols are looked for at once, never when a kernel is first called."""
    result = run(PRETEND_CUDA + "import tokcore", TOKCORE_LIBRARY_DIR=str(FOLDER))
    assert "ImportError: tokcore: " in result.stderr
    assert "undefined symbol" in result.stderr


@pytest.mark.skipif(
    bool(tokcore.build_info()["cuda_architectures"]), reason="this build has a CUDA library"
)
def test_a_build_without_cuda_says_so():
    code = f"import tokcore; print(tokcore.build_info()['libraries']['{_library.CUDA}'])"
    result = run(PRETEND_CUDA + code, TOKCORE_LIBRARY_DIR=str(FOLDER))
    assert "built without CUDA" in result.stdout, result.stderr


def test_use_selects_and_restores():
    with pytest.raises(ValueError, match="which must be one of"):
        _library.use("cuda")
    with pytest.raises(ValueError, match="seed"):
        _library.use("native", seed=1)
    before = _library.native()
    with _library.use("native"):
        assert _library.native() is torch.ops.tokcore
    assert _library.native() is before


@pytest.mark.skipif(not (FOLDER / _library.EMULATED).is_file(), reason="not built")
def test_the_emulated_operators_live_beside_the_native_ones():
    with _library.use("emulated", seed=3):
        assert _library.native() is torch.ops.tokcore_emulated
        assert _library.NAMESPACES == ["tokcore", "tokcore_emulated"]
        assert tokcore.build_info()["libraries"][_library.EMULATED]["loaded"]
    assert _library.native() is torch.ops.tokcore


def test_an_emulated_library_that_is_not_there_is_an_error(tmp_path):
    for name in (_library.CPU, _library.CUDA):  # the second is wanted where torch has CUDA
        if (FOLDER / name).is_file():
            shutil.copy(FOLDER / name, tmp_path)
    code = "from tokcore import _library; _library.use('emulated')"
    result = run(code, TOKCORE_LIBRARY_DIR=str(tmp_path))
    assert "ImportError: tokcore: " in result.stderr
    assert _library.EMULATED in result.stderr


EXECUTED = """
import ctypes, json, torch
from tokcore import _library
from tokcore.ops import sequential_kl, token_logprob
calls = _library._handles[_library.CPU].tokcore_cpu_isa_calls
calls.restype = ctypes.c_int64
x, y = torch.randn(2, 3, 9001, requires_grad=True).unbind()
counts = []
def count():
    counts.append([calls(name) for name in (b"baseline", b"avx2", b"avx512")])
count()
for step in (lambda: token_logprob(x, torch.arange(3)), lambda: sequential_kl(x, y).kl):
    value = step()
    count()
    value.sum().backward()
    count()
print(json.dumps(counts))
"""


@pytest.mark.parametrize("level", _library.build_info()["isas_available"])
def test_each_forward_and_backward_runs_at_the_chosen_level(level):
    """Counted inside the rows themselves."""
    result = run(EXECUTED, TOKCORE_ISA=level)
    assert result.returncode == 0, result.stderr
    chosen = ["baseline", "avx2", "avx512"].index(level)
    counts = json.loads(result.stdout)
    for before, after in itertools.pairwise(counts):
        assert after[chosen] > before[chosen]
    assert [i for i, number in enumerate(counts[-1]) if number] == [chosen]


def test_import_is_quiet_and_brings_in_nothing_optional():
    code = (
        "import sys, tokcore, tokcore.algorithms; "
        "print([m for m in ('transformers', 'trl', 'matplotlib') if m in sys.modules])"
    )
    result = run(code)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""
