"""Bridge from setuptools to CMake, which is the one description of the build.

The environment variables in OPTIONS are handed to CMake under the same names. torch has to be
installed already: `pip install --no-build-isolation .`
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = (
    "TOKCORE_CUDA",
    "TOKCORE_CUDA_ARCHS",
    "TOKCORE_EMULATION",
    "TOKCORE_SANITIZE",
    "TOKCORE_WERROR",
)


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries and installs them beside the package."""

    def run(self):
        # Kept between builds, so that a change recompiles one file.
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
        configure = ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", *options]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(tree)], check=True)
        # Editable installs import the package from the source tree, wheels from build_lib.
        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        subprocess.run(["cmake", "--install", str(tree), "--prefix", str(prefix)], check=True)

    # setuptools would look for one file an Extension; CMake has installed them all.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    # The name only marks the wheel as platform-specific; the libraries are CMake's.
    ext_modules=[Extension("tokcore._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
