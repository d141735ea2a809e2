# make demo and make test need nothing but Python 3.11 or newer and a network for pip: all set-up is done here.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check docs clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: ## reconstruct the packaged photos with the packaged weights: runs/demo/
	@PYTHON="$(PYTHON)" scripts/with-venv base demo $(BIN)/monobath demo --out runs/demo $(ARGS)

test: ## run the tests (ARGS="-k NAME" chooses)
	@PYTHON="$(PYTHON)" HF_HUB_OFFLINE=1 scripts/with-venv dev test $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: ## lint, format and types
	@PYTHON="$(PYTHON)" scripts/with-venv dev check scripts/check

docs: ## the documentation site: build/docs/index.html
	@PYTHON="$(PYTHON)" HF_HUB_OFFLINE=1 scripts/with-venv dev docs $(BIN)/python scripts/docs.py

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist runs/demo src/monobath.egg-info .pytest_cache .ruff_cache .mypy_cache
