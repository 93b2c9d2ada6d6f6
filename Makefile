# The same words everywhere: make demo, make test, make check, make bench.
.DEFAULT_GOAL := help
.PHONY: help demo test check bench protos format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PATH := $(CURDIR)/$(BIN):$(PATH)
# On a shared machine OpenMP's default spinning makes small models many times slower (docs/performance.md).
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is asked for by itself first: its version in constraints.txt is the CPU build where an index offers one.
$(VENV)/.runtime: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable ".[local]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --editable ".[dev]"
	@touch $@

demo: $(VENV)/.runtime  ## words to a picture through all four services: leaves cat.png
	$(BIN)/safelight generate "a cat face" --seed 7 --output cat.png

test: $(VENV)/.dev  ## every test that needs no GPU and no network
	$(BIN)/python -m pytest -q

check: $(VENV)/.dev  ## format, lint, types, import direction, proto lint, stale stubs
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	buf lint protos
	buf format --diff --exit-code protos
	$(MAKE) --no-print-directory protos
	@git diff --exit-code --stat -- clients/python/safelight/v1 || { echo "the stubs were stale: commit what 'make protos' wrote"; exit 1; }

bench: $(VENV)/.dev  ## the figures of the README, measured side by side with diffusers
	$(BIN)/python -m bench

protos: $(VENV)/.dev  ## regenerate the checked-in stubs
	$(BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=clients/python --grpc_python_out=clients/python \
	  --mypy_out=clients/python --mypy_grpc_out=only_async:clients/python \
	  protos/safelight/v1/*.proto

format: $(VENV)/.dev  ## rewrite the code in the house format
	ruff format .
	ruff check --fix .
	buf format --write protos

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
