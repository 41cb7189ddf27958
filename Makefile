# setup makes .venv; every other target does so first where it is missing or its inputs changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HASH := $(shell { cat requirements.lock pyproject.toml .ci/setup.sh; pwd; } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.done-$(HASH)

.PHONY: setup demo test test-fast check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP):
	@PYTHON="$(PYTHON)" bash .ci/setup.sh "$(VENV)" "$(STAMP)"

demo: setup
	@$(BIN)/python -m examples.demo

test: setup
	@$(BIN)/python -m pytest -q

test-fast: setup
	@$(BIN)/python -m pytest -q -m "not slow and not vllm and not ray"

check: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
