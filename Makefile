# Two commands for a user, each doing all set-up by itself: `make demo`, `make test`.
# A plain `torch` brings the CUDA build (several GB). Elsewhere, say which one: make demo TORCH=torch==2.13.0+cpu
TORCH ?= torch
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow network lint types check clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "grounding needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": say PYTHON=python3.12 (or newer)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python scripts/ground.py --caption "man in red jacket"

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not network" -n 2

slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not network"

network: $(STAMP)
	$(BIN)/python -m pytest -m network

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: test slow lint types

clean:
	rm -rf $(VENV) build dist outputs
