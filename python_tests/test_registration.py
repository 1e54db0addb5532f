"""Every schema of csrc/registration.cpp is complete in every namespace.

The headers of torch 2.11 swallow errors of a registration, and a kernel registered under a
misspelt name is never reported: the operator is just not there.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch

import tokcore
from tokcore import _library, ops

SOURCE = (Path(__file__).parents[1] / "csrc" / "registration.cpp").read_text()
# The text of one m.def(...): adjacent string literals, joined.
SCHEMAS = [
    "".join(re.findall(r'"([^"]*)"', definition))
    for definition in re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\s*\)", SOURCE)
]
NAMES = [schema.partition("(")[0] for schema in SCHEMAS]
PUBLIC = [name for name in NAMES if not re.search(r"_backward_?$", name)]
NOT_DIFFERENTIABLE = {
    *("dtw", "edit_align", "group_advantage", "monotonic_align", "monotonic_search"),
    *("prompt_window_scores", "sparse_decode_attention"),
    *("kv_append", "kv_compact", "window_scores_update", "window_select"),  # written or integers
}


def namespaces() -> list[str]:
    if Path(tokcore.build_info()["libraries"][_library.EMULATED]["path"]).is_file():
        with _library.use("emulated"):
            pass
    return list(_library.NAMESPACES)


NAMESPACES = namespaces()
every_namespace = pytest.mark.parametrize("namespace", NAMESPACES)


def has_kernel(namespace: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


def test_the_parser_reads_every_definition():
    assert len(SCHEMAS) == SOURCE.count("m.def(") > 0
    assert len(set(NAMES)) == len(NAMES)


@every_namespace
@pytest.mark.parametrize("schema", SCHEMAS, ids=NAMES)
def test_the_dispatcher_has_the_schema_as_written(namespace, schema):
    name = schema.partition("(")[0]
    known = str(getattr(getattr(torch.ops, namespace), name).default._schema)
    assert known.removeprefix(f"{namespace}::") == str(torch._C.parse_schema(schema))


@every_namespace
@pytest.mark.parametrize("name", NAMES)
def test_kernels(namespace, name):
    keys = ["CPU", "Autograd", "FuncTorchBatched"]
    if namespace == "tokcore" and tokcore.build_info()["libraries"][_library.CUDA]["loaded"]:
        keys.append("CUDA")
    assert [key for key in keys if not has_kernel(namespace, name, key)] == []
    entry = torch._library.simple_registry.singleton.find(f"{namespace}::{name}")
    assert entry.fake_impl.kernel is not None


@pytest.mark.parametrize("schema", SCHEMAS, ids=NAMES)
def test_argument_types_that_cross_the_stable_abi_safely(schema):
    """No str: each call with one would leak it."""
    types = [argument.type for argument in torch._C.parse_schema(schema).arguments]
    allowed = {"Tensor", "Optional[Tensor]", "int", "float", "bool"}
    assert {str(type_) for type_ in types} <= allowed


@pytest.mark.parametrize("name", PUBLIC)
def test_each_operator_has_its_files_and_its_function(name):
    root = Path(__file__).parents[1]
    function = getattr(ops, name)
    assert function.__module__ == f"tokcore.ops.{name}"
    assert name in ops.__all__
    assert len(function.__doc__.splitlines()) > 10
    for file in (f"csrc/cpu/{name}.cpp", f"csrc/cuda/{name}.cu", f"tokcore/ops/{name}.py"):
        assert (root / file).is_file(), file
    inplace = "inplace_backward" in inspect.signature(function).parameters
    assert (f"{name}_backward" in NAMES) == (name not in NOT_DIFFERENTIABLE)
    assert (f"{name}_backward_" in NAMES) == inplace


def test_each_file_of_ops_is_an_operator_or_the_rules_of_one():
    files = {path.stem for path in Path(ops.__file__).parent.glob("*.py")} - {"__init__"}
    operators = {name for name in files if not name.endswith("_rules")}
    assert operators == set(PUBLIC)
    assert {name.removesuffix("_rules") for name in files} == operators


def test_nothing_is_registered_beside_the_schemas():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tokcore::")
    }
    assert registered == set(NAMES)
