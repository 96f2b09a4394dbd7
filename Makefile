# Everything that a newcomer or a machine runs. `make demo` and `make test` need nothing but Python and network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The build of torch that development and CI use; pyproject.toml has the range that the package supports.
TORCH := torch==2.13.0

.PHONY: demo test lint check bench fuzz samples format readme clean

demo: $(READY)            ## the lesson's steps, on copies of the sample checkpoints
	PATH="$(CURDIR)/$(BIN):$$PATH" sample_checkpoints/demo.sh

test: $(READY)            ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(READY)            ## style, types, layers, and the README's generated blocks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cog -P --check --diff -I tests README.md

check: lint test          ## what CI runs

bench: $(READY)           ## ratios against torch, safetensors and a command that does nothing, in one run
	PYTHONDONTWRITEBYTECODE= $(BIN)/python tests/benchmarks/bench.py

fuzz: $(READY)            ## 20,000 mutations of each sample; every fault of every edit; edits side by side
	$(BIN)/python tests/fuzz.py --mutations 20000
	$(BIN)/python tests/fuzz_faults.py
	$(BIN)/python tests/side_by_side.py

samples: $(READY)         ## write the sample checkpoints anew
	$(BIN)/python sample_checkpoints/generate.py

format: $(READY)          ## lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(READY)          ## run the README's examples and put their output into it
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cog -P -r -I tests README.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Compiled ahead, as an installed package is: some environments forbid Python to do so when it runs.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m compileall -q ckpt_cli
	touch $@
