"""What the binaries ask of the machine: torch's stable ABI of 2.11, and no new C library."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokcore import _library

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(_library._folder().glob("libtokcore*.so"))

# Shims of torch 2.12 and later. A library that needs one does not load on 2.11.
TOO_NEW = re.compile(
    r"torch_library_def_with_tags|torch_tag_\w*|torch_new_stable_ivalue|torch_delete_stable_ivalue"
    r"|torch_exception_get_what\w*|torch_stream_native_handle|torch_library_set_python_module"
    r"|torch_\w*generator\w*"
)
# Debian 12 and RHEL 9: what wheels tagged manylinux_2_34 may ask for.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def undefined(library: Path) -> list[str]:
    text = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    return [line.split()[-1] for line in text.splitlines()]


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_only_the_stable_abi(library):
    symbols = [name.split("@")[0] for name in undefined(library)]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols), "nothing of torch?"
    assert [name for name in symbols if TOO_NEW.fullmatch(name)] == []
    # mangled names that mention the namespaces at:: or c10:: ("2at", "3c10")
    assert [name for name in symbols if re.match(r"_Z\w*?N?K?(2at|3c10)", name)] == []


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_old_enough_c_libraries(library, record_property):
    versions = {}
    for name in undefined(library):
        if match := re.search(r"@+(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", name):
            version = tuple(int(part) for part in match[2].split("."))
            versions[match[1]] = max(versions.get(match[1], ()), version)
    for name, version in versions.items():
        record_property(name, ".".join(map(str, version)))
        print(f"{library.name} needs {name} {'.'.join(map(str, version))}")
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36):
        pytest.skip("built against a newer C library than wheels are released with")
    for name, version in versions.items():
        assert version <= NEWEST[name], f"{library.name} does not load where {name} is older"


@needs_nm
@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline"])
def test_rows_share_no_code_between_levels(level):
    """A weak symbol is merged by the linker: one level's copy would run on every CPU."""
    objects = [
        path
        for path in ROOT.glob(f"build/**/tokcore_rows_{level}.dir/**/*.o")
        if "sanitize" not in str(path)  # sanitizers add weak symbols of their own
    ]
    if not objects:
        pytest.skip(f"no build folder beside these tests holds objects of tokcore_rows_{level}")
    text = subprocess.check_output(["nm", "-A", *objects], text=True)
    assert [line for line in text.splitlines() if re.search(r" [WuV] ", line)] == []
