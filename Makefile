# Every target sets up what it needs in .venv; it takes Python >= 3.10 (tested: 3.11), make and git.

PYTHON ?= python3.11
BIN := .venv/bin
JOBS ?= auto
TORCH := $(shell grep '^torch==' constraints.txt)
READY := .venv/.ready
SOURCES := amct_lightning tests examples docs/docstrings.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types check docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Train, quantize and retrain a small CNN on real digits (FP32, INT8, INT4)
	$(BIN)/python examples/digits.py

test: $(READY) ## Run the whole test suite, a file at a time on every core (JOBS=1 for one after another)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(READY) ## Check style and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(READY) ## Put the code into the project's format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(READY) ## Check the types of the package
	$(BIN)/mypy

check: lint types test ## All of the above checks

docs: $(READY) ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html"

clean: ## Remove the virtual environment, caches, demo results and the built documentation
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist runs site

# torch goes first and alone: with its version fixed, nothing later replaces it by another build.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name another with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10; name another with: make PYTHON=..."; exit 1; }
	@echo "Setting up .venv (once; downloads PyTorch and Lightning) ..."
	@[ -x $(BIN)/pip ] && $(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,examples,docs]'
	@touch $@
