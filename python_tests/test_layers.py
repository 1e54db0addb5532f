"""Who may import and include what: the layers of the repository, read from its sources."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth; ``from a import b`` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def python_layer(path: Path) -> set[str] | None:
    """What a file of the package may import; None where anything goes."""
    parts = path.relative_to(ROOT / "tokcore").with_suffix("").parts
    if parts == ("__init__",):
        return {"tokcore.ops", "tokcore._library.build_info"}
    if parts == ("_library",):
        return {"torch", "tokcore"}  # itself, for its version
    if parts in [("_checks",), ("masking",)]:
        return {"torch", "numpy"}
    if parts == ("text",):
        return {"numpy", "tokcore._host"}
    if parts[0] == "ops":
        own = {"tokcore.ops"} if parts[1] == "__init__" else {f"tokcore.ops.{parts[1]}_rules"}
        return {"torch", "tokcore._library", "tokcore._checks"} | own
    if parts[0] == "algorithms":
        own = {f"tokcore.algorithms.{parts[1]}"}
        return {"torch", "numpy", "tokcore.ops", "tokcore.masking", "tokcore._host"} | own
    if parts[0] == "integrations":
        return {"torch", "numpy", "tokcore", parts[1]}
    return None


PACKAGE = sorted((ROOT / "tokcore").rglob("*.py"))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_imports_downwards_only(path):
    allowed = python_layer(path)
    assert allowed is not None, f"{path}: which layer is this?"
    assert {name for name in imports(path) if not within(name, allowed)} == set()


def test_operators_are_reached_through_tokcore_ops():
    """An algorithm names the function, never the module behind it; an operator's rules are data."""
    for path in (ROOT / "tokcore" / "algorithms").rglob("*.py"):
        for name in imports(path):
            if not re.fullmatch(r"tokcore\.ops\.\w+_rules\.[A-Z]\w*", name):
                assert name.count(".") <= 2 or not name.startswith("tokcore.ops."), (path, name)


def test_the_rules_of_an_operator_compute_nothing():
    """Or they would be an operator without kernels."""
    for path in (ROOT / "tokcore" / "ops").glob("*_rules.py"):
        assert imports(path) == {"tokcore._checks"}, path


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_examples_and_benchmarks_use_the_public_interface(folder):
    for path in (ROOT / folder).rglob("*.py"):
        private = {name for name in imports(path) if re.match(r"tokcore(\.\w+)*\._(?!_)", name)}
        assert private == set(), path


# ---- csrc -----------------------------------------------------------------------------------

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
TOOLKIT = re.compile(r"^(cuda|cub|cooperative_groups|math_constants|vector_types|device_)")


def code(path: Path) -> str:
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def includes(text: str) -> set[str]:
    return set(re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', text))


def outside_nvcc(text: str) -> str:
    """The text without the branches under #if[def] __CUDACC__."""
    kept, hidden = [], []  # one entry for each open #if: whether only nvcc sees its branch
    for line in text.splitlines():
        directive = re.match(r"\s*#\s*(if|el|endif)", line)
        if directive is None:
            if not any(hidden):
                kept.append(line)
        elif directive[1] == "if":
            hidden.append(bool(re.search(r"\bif(def\s+|\s+defined\W+)__CUDACC__", line)))
        elif directive[1] == "el":
            hidden[-1] = False
        else:
            hidden.pop()
    return "\n".join(kept)


def cpp_layer(path: Path) -> set[str]:
    """Prefixes of what a file may include beside the standard library."""
    top, *rest = path.relative_to(CSRC).parts
    stable, headers = "torch/csrc/stable/", "torch/headeronly/"
    if top == "registration.cpp":
        return {stable + "library.h", "common/namespace.h"}
    if top == "common":
        return {"common/", headers} | ({stable} if rest == ["check.h"] else set())
    if top == "host":
        return {"host/", "pybind11/", "common/edit_align.h"}  # one tie rule, two users
    if top == "emulation":
        return {"emulation/", "cuda/primitives/device.h"}
    if rest[0] == "primitives":
        # parallel.h is where torch's threads come in; it stands with its kind all the same
        torch = {stable} if rest == ["primitives", "parallel.h"] else set()
        vocabulary = {"emulation/"} if top == "cuda" else set()
        # two operators share a launch
        launch = {"cuda/launch.h"} if rest == ["primitives", "lattice.cuh"] else set()
        return {"common/", f"{top}/primitives/", headers} | torch | vocabulary | launch
    own = {f"{top}/primitives/", stable, headers, "common/"}
    if top == "cuda":
        own |= {"cuda/launch.h"} | ({"emulation/launch.h"} if rest == ["launch.h"] else set())
    return own


@every_source
def test_includes_go_downwards_only(path):
    ours = {name for name in includes(code(path)) if "/" in name and name != "sys/mman.h"}
    ours = {name for name in ours if not name.startswith("sanitizer/")}
    allowed = cpp_layer(path)
    assert {name for name in ours if not name.startswith(tuple(allowed))} == set()


@every_source
def test_only_the_stable_abi(path):
    """No ATen or c10 header, in a project whose binaries serve every torch from 2.11 on."""
    unstable = re.compile(
        r"^(ATen/|c10/|caffe2/|pybind11|Python\.h|"
        r"torch/(torch|extension|library|script|all)\.h|torch/csrc/(?!stable/|inductor/aoti_torch/c/))"
    )
    allowed = {"host"} if path.relative_to(CSRC).parts[0] == "host" else set()
    found = {name for name in includes(code(path)) if unstable.match(name)}
    assert {name for name in found if not (allowed and name.startswith("pybind11"))} == set()


@every_source
def test_cuda_headers_are_for_nvcc_alone(path):
    """In emulation they would redefine dim3, the stream type and much else."""
    assert {
        n for n in includes(outside_nvcc(code(path))) if TOOLKIT.match(n) and "/" not in n
    } == set()


@every_source
def test_intrinsics_stand_in_one_file(path):
    if path == CSRC / "cpu" / "primitives" / "simd.h":
        return
    assert re.findall(r"\w*mmintrin\.h|\b_mm\d*_\w+|\b__m(?:64|128|256|512)\w*", code(path)) == []


@pytest.mark.parametrize("path", sorted(CSRC.glob("cuda/*.cu")), ids=lambda p: p.name)
def test_kernels_are_written_in_the_device_vocabulary(path):
    """What the emulation does not know, a kernel does not say; primitives/ may."""
    text = code(path)
    assert re.findall(r"<<<|\bcub::|\b__shared__\b|\basm\b", text) == []


def test_no_flags_that_break_infinities():
    text = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    flags = re.sub(r"#[^\n]*", "", text)
    assert "fast-math" not in flags
    assert "fast_math" not in flags
    assert "associative-math" not in flags
