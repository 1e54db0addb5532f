"""The wheel, installed where there is no compiler, runs the operator tests."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="there is no source tree to build a wheel from"
)


def run(command: list, **more) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-8000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    # cmake of this environment, as in `make build`: another one would compile everything again
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run([*pip, "--wheel-dir", folder, ROOT], env=dict(os.environ, PATH=path))
    return next(folder.glob("tokcore-*.whl"))


def test_the_wheel_holds_the_libraries_and_no_sources(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "tokcore/libtokcore.so" in names
    assert any(name.startswith("tokcore/_host.") for name in names)
    if shutil.which("nvcc") and os.environ.get("TOKCORE_CUDA", "AUTO") != "OFF":
        assert "tokcore/libtokcore_cuda.so" in names
    outside = [name for name in names if not name.startswith(("tokcore/", "tokcore-"))]
    assert outside == []


def test_operator_tests_pass_on_the_installed_wheel(wheel, tmp_path):
    """A clean environment that sees this torch and pytest, but no source tree and no compiler."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    # searched last; .pth files inside that folder (editable installs) are not read
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    run([sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", wheel])

    elsewhere = tmp_path / "elsewhere"
    tests = shutil.copytree(ROOT / "python_tests", elsewhere / "python_tests")
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TOKCORE_", "PY"))
    }
    environment["PATH"] = str(python.parent)
    where = "import tokcore; print(tokcore.__file__)"
    found = run([python, "-c", where], cwd=elsewhere, env=environment).strip()
    assert Path(found).is_relative_to(packages), found
    # The emulated kernels have run, and schemas and derivatives been checked, often enough: what is
    # in question here is the wheel. And inductor needs the compiler that is not to be here.
    chosen = "not emulated and not opcheck and not gradcheck and not inductor"
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    run([*test, tests / "ops"], cwd=elsewhere, env=environment)
