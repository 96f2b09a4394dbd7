# Everything that a newcomer or a machine runs. `make demo` and `make test` need nothing but Python and network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Documents with generated blocks. Each is a job of its own, two at a time.
DOCUMENTS := README.md CONTRIBUTING.md $(wildcard docs/*.md)
COG := printf '%s\n' $(DOCUMENTS) | PATH="$(CURDIR)/$(BIN):$$PATH" xargs -P 2 -n 1 cog -P -I tests/support
READY := $(VENV)/.ready
# The build of torch that development and CI use; pyproject.toml has the range that the package supports.
TORCH := torch==2.13.0

.PHONY: demo test lint check bench fuzz samples format readme clean

demo: $(READY)            ## the lesson's steps, on copies of the sample checkpoints
	PATH="$(CURDIR)/$(BIN):$$PATH" sample_checkpoints/demo.sh

test: $(READY)            ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(READY)            ## style, types, layers, and the generated blocks of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(COG) --check --diff

check: lint test          ## what CI runs

bench: $(READY)           ## ratios against torch, safetensors and a command that does nothing, in one run
	PYTHONDONTWRITEBYTECODE= $(BIN)/python tests/benchmarks/bench.py

fuzz: $(READY)            ## 20,000 mutations of each sample; every fault of every edit; edits side by side
	$(BIN)/python tests/support/fuzz.py --mutations 20000
	$(BIN)/python tests/support/fuzz_faults.py
	$(BIN)/python tests/support/side_by_side.py

samples: $(READY)         ## write the sample checkpoints again
	$(BIN)/python sample_checkpoints/generate.py

format: $(READY)          ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(READY)          ## run the examples of README.md and docs/ and write their output into them
	$(COG) -r

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
