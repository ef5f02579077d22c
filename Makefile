# `make demo` and `make test` need nothing but Python 3.11 or later: both set up .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready

.PHONY: demo test test-all lint bench bench-pipeline bench-distributed orchestrator docs clean

demo: $(DEMO_READY)
	$(BIN)/python examples/async_trainer.py

# A file's tests stay together, because they share servers and processes.
IN_PARALLEL := --numprocesses 2 --dist loadfile

test: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL)

# With the tests of four processes, which take some minutes more.
test-all: $(READY)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p aiostage

bench: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/staging.py

# Saves and loads of 1, 2, 4 and 8 processes beside plain DCP.
bench-distributed: $(READY)
	$(BIN)/python benchmarks/distributed.py

orchestrator: $(READY)
	$(BIN)/python examples/orchestrator

bench-pipeline: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/pipeline.py

docs: $(READY)
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aiostage needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

# Less than the tests need, so that the demonstration begins sooner.
$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ $(DEMO_READY)
