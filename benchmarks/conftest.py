"""pytest-benchmark over the suites: `pytest benchmarks --benchmark-only`.

Small by default; --bench-shapes llama2 llama3 (or TOKCORE_BENCH_SHAPES="llama2 llama3") selects the
models' shapes. Cold calls, grouped by shape, dtype and pass. report.py is the authority: it also
interleaves the variants, and pytest-benchmark runs them one after the other.
"""

import functools
import os

import pytest
import torch

from benchmarks import measure
from benchmarks.run import floor_runs
from benchmarks.suite import DTYPES, FORWARD, SHAPES, Call

ROUNDS = 5


def pytest_addoption(parser):
    default = os.environ.get("TOKCORE_BENCH_SHAPES", "tiny").split()
    parser.addoption("--bench-shapes", nargs="+", choices=list(SHAPES), default=default)
    parser.addoption("--bench-device", choices=["cpu", "cuda"], default="cpu")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items):
    for item in items:  # what torch.compile warns of is not ours to fix
        item.add_marker(pytest.mark.filterwarnings("default"))


@functools.cache
def _clock(device):
    return measure.clock(device)


@functools.lru_cache(maxsize=1)  # cases of one group follow each other and share their inputs
def _inputs(suite, shape, dtype, device):
    return suite.inputs(suite.shape(shape), DTYPES[dtype], _clock(device).device)


class Case:
    def __init__(self, suite, shape, dtype, pass_name, device, name):
        self._suite, self._pass, self._name = suite, pass_name, name
        self._inputs, self._clock = (suite, shape, dtype, device), device
        self.group = f"{suite.name} {shape} {dtype} {pass_name}"
        self.id = f"{suite.name}-{shape}-{dtype}-{pass_name}-{name}"

    def run(self, benchmark):
        torch._dynamo.reset()  # or the shapes of all cases together reach its recompile limit
        suite, _, dtype, _ = self._inputs
        clock, inputs = _clock(self._clock), _inputs(*self._inputs)
        variants = {v.name: v for v in suite.variants(DTYPES[dtype], clock.device)}
        if self._name in variants:
            call = Call(variants[self._name], suite, inputs, self._pass)
            call.prepare()
            call()  # compiles, pages in
            call.prepare()
            benchmark.extra_info["peak_mb"] = round(clock.peak(call)[0] / measure.MB, 3)
            prepare = call.prepare
        else:
            _, call = floor_runs(clock, suite, inputs, self._pass)[self._name]
            prepare = lambda: None  # noqa: E731
        benchmark.group = self.group

        def setup():
            prepare()
            clock.cool()
            if suite.warm:
                call()

        benchmark.pedantic(call, setup=setup, rounds=ROUNDS)


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("--bench-device")
    cases = []
    for suite in metafunc.module.SUITES:
        shapes = metafunc.config.getoption("--bench-shapes")
        for shape, dtype, pass_name in suite.groups(shapes, DTYPES):
            names = ["floor" if device == "cpu" else "device copy"]
            for variant in suite.variants(DTYPES[dtype], _clock(device).device):
                if not (variant.overwrites and pass_name == FORWARD):
                    names.append(variant.name)
            cases += [Case(suite, shape, dtype, pass_name, device, name) for name in names]
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])
