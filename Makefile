# Everything runs in .venv at the root: `make setup` makes it, every other target asks for it.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# OpenMP threads spin: torch processes side by side (engine, scorer, tests) take one thread each.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --reruns 1
PYTEST_ARGS ?=
BENCH_ARGS ?= --quick

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 14

setup: $(VENV)/.stamp  ## the environment: vLLM and torch for CPUs, both packages, all tools (3.5 GB)

$(VENV)/.stamp: requirements/cpu.txt pyproject.toml integrations/langchain/pyproject.toml
	@test -n "$(PYTHON)" || { echo "gnuq-serve needs Python 3.11 or newer, and no python3 is here." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gnuq-serve needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." \
	       "Name another one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing requirements/cpu.txt (3.5 GB when new; some minutes)"
	@# The CPU build of torch is not on the usual package index; some mirrors have it.
	@$(PIP) --no-deps -r requirements/cpu.txt || { \
	  echo "That did not work; once more, with PyTorch's index of CPU builds"; \
	  $(PIP) --no-deps -r requirements/cpu.txt --extra-index-url $(TORCH_CPU_INDEX); }
	@$(PIP) --no-deps --no-build-isolation -e . -e integrations/langchain
	@touch $@

demo: setup  ## serve a small model, score its answers, let a chatbot route them
	@$(BIN)/python examples/demo.py

test: setup  ## all tests (PYTEST_ARGS="-m 'not slow'" for the quick ones)
	@# What starts real servers runs by itself: on two cores, other tests beside it would only slow it down. What fails
	@# gets a second try, and is listed as such: on a loaded machine an answer may come after its deadline.
	@status=0; \
	$(PYTEST) tests/unit tests/integration $(PYTEST_ARGS) || status=$$?; \
	$(PYTEST) tests/e2e $(PYTEST_ARGS) || { code=$$?; test $$code -eq 5 || status=$$code; }; \
	exit $$status

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## exactness, speed, modes and serving, half an hour (BENCH_ARGS= for all of it, two hours and more)
	@set -e; for name in exactness scoring modes serving; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(BENCH_ARGS); done

clean:  ## remove caches and build outputs (the environment stays; rm -rf .venv removes it)
	rm -rf .pytest_cache .mypy_cache .ruff_cache dist build
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
