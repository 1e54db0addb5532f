# `make demo`, `make test`, `make bench`, `make lint`: each sets up .venv on first use, builds the
# native libraries and runs.
#
#   PYTHON=python3.12          the interpreter that .venv is made from (3.10 or newer)
#   TORCH="torch==2.13.0"      the torch requirement; pip options may stand in front of it:
#                              TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0"
#   DEMO_FLAGS, TEST_FLAGS, BENCH_FLAGS      passed on to what runs
#   TOKCORE_CUDA=ON|OFF|AUTO and the other build options go through the environment

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_FLAGS ?=
TEST_FLAGS ?=
BENCH_FLAGS ?=

export TOKCORE_EMULATION ?= ON
# Absolute, because pip runs the build in another folder; in front, so that .venv's cmake is found.
export PATH := $(abspath $(VENV))/bin:$(PATH)

python := $(abspath $(VENV))/bin/python
pip := $(python) -m pip
# Holds every later pip call to the torch that is there: no dependency may replace it.
constraints := $(VENV)/constraints.txt
tools := "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.13"
sources := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
# Another $(TORCH), or other build options, name another stamp and so install or build again.
stamp = $(VENV)/.$(1)-$(shell printf '%s' '$(2)' | cksum | cut -d ' ' -f 1)
torch_stamp := $(call stamp,torch,$(TORCH))
build_stamp := $(call stamp,build,$(TORCH) $(foreach v,CUDA CUDA_ARCHS EMULATION SANITIZE,$(TOKCORE_$(v))))

.PHONY: demo test bench lint build
.DELETE_ON_ERROR:

demo: build
	$(python) examples/tdpo.py $(DEMO_FLAGS)

test: build
	OMP_WAIT_POLICY=passive $(python) -m pytest -n auto --maxprocesses 4 --dist worksteal $(TEST_FLAGS)

bench: build
	$(python) -m benchmarks.report $(BENCH_FLAGS)

lint: build
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(abspath $(VENV))/bin/clang-format --dry-run -Werror

build: $(build_stamp)

$(torch_stamp):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tokcore needs Python 3.10 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(pip) install --upgrade pip
	$(pip) install $(TORCH)
	$(python) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(constraints)
	rm -f $(VENV)/.torch-* $(VENV)/.build-*
	touch $@

$(build_stamp): $(torch_stamp) $(sources)
	$(pip) install --constraint $(constraints) $(tools)
	$(pip) install --constraint $(constraints) --no-build-isolation --editable '.[examples,test,bench,lint]'
	rm -f $(VENV)/.build-*
	touch $@
