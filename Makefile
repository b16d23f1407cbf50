# Nothing but Python >= 3.11, pip and make is needed: each target makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	$(BIN)/certipatch demo --out demo-out

test: .venv/installed-dev
	$(BIN)/pytest

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-out .pytest_cache .mypy_cache .ruff_cache
