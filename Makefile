# Every target sets up what it needs in .venv; it takes Python >= 3.10 (tested: 3.11), make and git.

PYTHON ?= python3.11
BIN := .venv/bin
JOBS ?= auto
TORCH := $(shell grep '^torch==' constraints.txt)
READY := .venv/.ready
SOURCES := amct_lightning tests examples docs/docstrings.py docs/search_words.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpu bench bench-compare lint format types check docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Train, quantize, retrain, export and verify a small CNN on real digits (FP32, INT8, INT4)
	@echo "A CNN learns 1,797 digits in float, then on in float, as INT8 and as INT4, and is verified: 2 to 3 minutes, 6 on a slow machine."
	$(BIN)/python examples/digits.py

test: $(READY) ## Run the whole test suite, a file at a time on every core (JOBS=1 for one after another)
	@echo "The whole suite, 10,500 tests: 14 minutes on two fast cores, 40 on slow ones; each dot is a test."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-cpu: $(READY) ## Run the numeric tests as on CPUs with other vector instructions (CPU=default, avx2 or native for one)
	$(BIN)/python -m tests.capabilities $(CPU)

bench: $(READY) ## Measure training steps beside float ones and other packages (ARGS="--networks vit --rounds 5"), 20 minutes
	$(BIN)/python -m tests.benchmarks.bench $(ARGS)

bench-compare: $(READY) ## Measure training steps of two commits in turns (BASE=main HEAD=.; "." is the working tree)
	$(BIN)/python -m tests.benchmarks.bench.compare $(or $(BASE),HEAD) $(or $(HEAD),.) $(ARGS)

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
	@echo "Setting up .venv, once: PyTorch (200 MB), then Lightning, the tools of the tests and of the documentation (500 MB)."
	@echo "1 to 5 minutes with a fast connection; what pip prints shows how far it is."
	@[ -x $(BIN)/pip ] && $(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,examples,docs]'
	@touch $@
