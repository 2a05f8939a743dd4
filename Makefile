# The commands of the README and of CONTRIBUTING, and what CI runs.

PYTHON ?= python3
SEED ?=
BIN := .venv/bin

.PHONY: demo native test test-all test-card quick lint types docs check clean

# Compiled decoders of quantised weights; needs a C++ compiler.
native: .venv/installed
	$(BIN)/offload native build

demo: .venv/installed
	$(BIN)/offload generate demo --prompt "And the king said" --max-new-tokens 60 --device cpu --cpu-memory 6MiB

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not every_case and not slow" --cover 1 --sample 1 --seed "$(SEED)"

# Every combination of parameters and what is slow, where `test` has a case of each test: others with another SEED.
test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

# Everything in tests/gpu on a pretended CUDA card (tests/pretended), and the script for a real one; skipped without g++.
test-card: .venv/installed-dev
	$(BIN)/python -m pytest -p tests.pretended.plugin -n 2 --dist worksteal -m gpu tests/pretended tests/gpu tests/mutations
	benchmarks/gpu.sh --dry figures kv

quick: .venv/installed-dev
	$(BIN)/python -m pytest tests/scheduler tests/storage

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m benchmarks.house

types: .venv/installed-dev
	$(BIN)/mypy

# The documents as pages, in site/; a broken link or an unknown name is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: lint types test

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build site *.egg-info
