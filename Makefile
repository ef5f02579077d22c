# `make demo` and `make test` need nothing but Python 3.11 or later: both set up .venv first.
#
# Another Python, and another PyTorch, get an environment of their own beside it:
#   make test PYTHON=python3.13                  .venv-3.13
#   make test PYTHON=python3.13 TORCH=2.15.0     .venv-3.13-torch-2.15.0
#   make test CONSTRAINTS=constraints-oldest.txt .venv-oldest

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
TORCH ?=

version = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter file,$(origin PYTHON)),,-$(version))$(addprefix -torch-,$(TORCH))$(patsubst constraints%,%,$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready

# Some containers set it. Then each of the many programs that the tests start compiles aiostage anew, for two seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-simgpu test-cuda gpu test-matrix test-oldest lint bench bench-all bench-compare bench-pipeline bench-distributed orchestrator docs clean

demo: $(DEMO_READY)
	$(BIN)/python examples/async_trainer.py demo.svg

# A file's tests stay together, because they share servers and processes. A worker that was killed is not replaced: the
# one that replaces it is never given the rest of its file, and the run would wait for that for ever. The order is that of
# tests/conftest.py: the longest files first, and not those with the most tests.
IN_PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Threads of PyTorch that have nothing to do would spin, beside the other worker's, and take a tenth of the processors.
test test-all test-simgpu: export OMP_WAIT_POLICY := passive

test: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL)
	$(MAKE) test-simgpu

# On a PyTorch device without hardware, which changes torch.accelerator for all of its process. The first time it is
# built, into the user's cache; where there is no C++ compiler the reason is printed.
test-simgpu: $(READY)
	$(BIN)/python -m aiostage.testing.simgpu --if-possible $(BIN)/python -m pytest $(IN_PARALLEL) tests/simgpu tests/device

# tests/gpu without a GPU, on a stand-in for CUDA's runtime, under a CUDA build of PyTorch. That takes 5.5 GB, outside of
# the checkout: CUDA_VENV is a virtual environment that has it and the packages of the tests.
CUDA_VENV ?= $(HOME)/.cache/aiostage/cuda-venv
CUDA_BUILD ?= $(HOME)/.cache/aiostage/cuda-stand-in
test-cuda: $(CUDA_BUILD)/libfakecuda_ops.so
	FAKECUDA_COPY_US=200 FAKECUDA_KERNEL_US=100 FAKECUDA_JITTER_PERCENT=80 PYTHONPATH=$(CURDIR) \
	    tests/cuda_stand_in/with_cuda.sh $(CUDA_BUILD) $(CUDA_VENV)/bin/python -m pytest tests/gpu

$(CUDA_BUILD)/libfakecuda_ops.so: $(wildcard tests/cuda_stand_in/*.cpp tests/cuda_stand_in/*.hpp)
	tests/cuda_stand_in/build.sh $(CUDA_VENV) $(CUDA_BUILD)

# Everything that only a GPU can show, in one run: its tests and its benchmark, with results in one folder.
GPU_RESULTS ?= gpu-results
gpu: SHELL := /bin/bash -o pipefail
gpu: $(READY)
	mkdir -p $(GPU_RESULTS)
	$(BIN)/python -m pytest tests/gpu --junitxml=$(GPU_RESULTS)/tests.xml | tee $(GPU_RESULTS)/tests.txt; tests=$$?; \
	    $(BIN)/python benchmarks/gpu.py --json $(GPU_RESULTS)/figures.json | tee $(GPU_RESULTS)/figures.txt && exit $$tests

# With the tests of four processes, which take some minutes more.
test-all: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m ""

# Every Python that this machine has, one line each. TORCH=2.15.0 pins PyTorch for all of them.
test-matrix:
	.ci/matrix $(TORCH)

# The oldest allowed release of everything that aiostage depends on.
test-oldest:
	$(MAKE) test CONSTRAINTS=constraints-oldest.txt

# Random trees, changes, disturbed stagings and cancellations by the ten thousand; takes some twenty minutes.
fuzz: $(READY)
	$(BIN)/python -X faulthandler -m tests.fuzz
	AIOSTAGE_SCHEDULES=5000 $(BIN)/python -m aiostage.testing.simgpu --if-possible $(BIN)/python -m pytest tests/simgpu/test_schedules.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict aiostage aiostage_command.py

# JSON, tables and a picture of staging, in one folder.
BENCH_RESULTS ?= bench-results
bench: SHELL := /bin/bash -o pipefail
bench: $(READY)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[bench]"
	mkdir -p $(BENCH_RESULTS)
	$(BIN)/python benchmarks/staging.py --json $(BENCH_RESULTS)/staging.json | tee $(BENCH_RESULTS)/staging.md
	$(BIN)/python benchmarks/plot.py $(BENCH_RESULTS)/staging.json $(BENCH_RESULTS)/staging.svg

# Every benchmark once; then docs/ has its tables and pictures. An hour and 20 GiB.
bench-all: $(READY)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/everything.py --results $(BENCH_RESULTS) --publish

# What the working tree does faster or slower than another commit: make bench-compare OLD=v0.1.0
bench-compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(OLD)

# Saves and loads of 1, 2, 4 and 8 processes beside plain DCP.
bench-distributed: $(READY)
	$(BIN)/python benchmarks/distributed.py

orchestrator: $(READY)
	$(BIN)/python examples/orchestrator

bench-pipeline: $(READY)
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/pipeline.py

# Runs every block of Python in the documents, and builds the site into site/.
docs: $(READY)
	$(BIN)/python -m pytest tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# What pip is held to: the constraints, with another PyTorch in them if one was asked for.
$(VENV)/constraints.txt: $(CONSTRAINTS) | $(BIN)/python
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' $< > $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aiostage needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

# Less than the tests need, so that the demonstration begins sooner.
$(DEMO_READY): pyproject.toml $(VENV)/constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[demo]"
	touch $@

$(READY): pyproject.toml $(VENV)/constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[test]"
	touch $@ $(DEMO_READY)
