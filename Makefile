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
# Environments with other dependencies, and the tests to run there. The first has no torch; the second borrows all but typer
# from $(VENV). Not with the newest typer: what is imported at the start, and the layout of help.
OLDEST := .venv-oldest
NEWEST := .venv-newest-typer
MOTO := .venv-moto
CONTAINERS := .venv-containers
ORACLES := .venv-oracles
# DeepSpeed from its source, which is not built.
FRAMEWORKS := .venv-frameworks
DEEPSPEED := 0.19.8
WITHOUT_TORCH := tests/cli/test_without_torch.py tests/cli/test_typer_parts.py tests/arrays/test_indexing.py \
	tests/files/test_journal.py tests/formats/test_npy.py tests/pickles/test_machine.py
COMMAND_LINE := tests/cli --ignore tests/cli/test_startup.py

.PHONY: demo test lint check system environments oracles hostile bench bench-remote peers fuzz samples format readme clean

demo: $(READY)            ## the lesson's steps, on copies of the sample checkpoints
	PATH="$(CURDIR)/$(BIN):$$PATH" sample_checkpoints/demo.sh

test: $(READY)            ## every test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(READY)            ## style, types, layers, and the generated blocks of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(COG) --check --diff

check: lint test          ## style and every test, before each commit

system:                   ## install the system programs that tests use, where root on Debian; else name those that are missing
	PYTHON=$(PYTHON) tests/environments/system.sh

environments: $(OLDEST)/.ready $(NEWEST)/.ready $(MOTO)/.ready $(FRAMEWORKS)/.ready $(CONTAINERS)/.ready    ## chosen tests with the oldest dependencies without torch, with the newest typer, against moto's S3, DeepSpeed, and the libraries of other containers
	$(BIN)/python tests/environments/answers.py > $(OLDEST)/answers-of-development
	$(OLDEST)/bin/python tests/environments/answers.py > $(OLDEST)/answers
	diff -u $(OLDEST)/answers-of-development $(OLDEST)/answers
	$(OLDEST)/bin/python -m pytest -q -p no:cacheprovider $(WITHOUT_TORCH)
	$(NEWEST)/bin/python -m pytest -q -p no:cacheprovider $(COMMAND_LINE)
	$(BIN)/python tests/environments/exact_store.py $(MOTO)/bin/moto_server
	$(CONTAINERS)/bin/python tests/environments/containers.py
	PYTHONPATH=$(FRAMEWORKS)/deepspeed-$(DEEPSPEED) DS_ACCELERATOR=cpu \
		$(FRAMEWORKS)/bin/python -W ignore tests/environments/rank_files.py

oracles: $(ORACLES)/.ready    ## the libraries whose results ckpt computes too: mergekit, PEFT, and those that dequantize
	rm -rf $(ORACLES)/lora $(ORACLES)/mergekit $(ORACLES)/quantized
	$(ORACLES)/bin/python -W ignore tests/oracles/quantized.py $(ORACLES)/quantized
	QUANTIZED_SAMPLES=$(CURDIR)/$(ORACLES)/quantized $(BIN)/python -m pytest -q -p no:cacheprovider tests/edits/test_dequantize.py
	$(ORACLES)/bin/python -W ignore tests/oracles/mergekit_merges.py $(ORACLES)/mergekit 1
	MERGEKIT_SAMPLES=$(CURDIR)/$(ORACLES)/mergekit $(BIN)/python -m pytest -q -p no:cacheprovider tests/edits/test_mergekit.py
	$(ORACLES)/bin/python -W ignore tests/oracles/lora_samples.py $(ORACLES)/lora
	LORA_SAMPLES=$(CURDIR)/$(ORACLES)/lora $(BIN)/python -m pytest -q -p no:cacheprovider tests/edits/test_lora_merge.py -k peft

hostile: $(READY)         ## the files made to harm at their full size, under the limits that users have
	HOSTILE_SCALE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/formats/test_hostile_files.py

bench: $(READY)           ## ratios against torch, safetensors and a command that does nothing, in one run
	PYTHONDONTWRITEBYTECODE= $(BIN)/python tests/benchmarks/bench.py

bench-remote: $(READY)    ## heavy commands over a URL against the same on the disk, with nginx on loopback
	PYTHONDONTWRITEBYTECODE= $(BIN)/python tests/benchmarks/remote.py

peers: $(READY)           ## other scanners, each in an environment of its own, on the same files as ckpt scan
	$(BIN)/python tests/peers/scanners.py

fuzz: $(READY)            ## mutations of each sample; every fault of every edit; random numbers and every name for scan; every command on each hostile file
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest -n 2 --dist worksteal -q -m hypothesis
	$(BIN)/python tests/support/fuzz.py --mutations 20000
	$(BIN)/python tests/support/fuzz_faults.py
	$(BIN)/python tests/support/numbers_scanned.py --blocks 1000000
	$(BIN)/python tests/support/side_by_side.py
	$(BIN)/python tests/support/name_walk.py
	$(BIN)/python tests/support/every_command.py

samples: $(READY)         ## write the sample checkpoints again
	$(BIN)/python sample_checkpoints/generate.py

format: $(READY)          ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(READY)          ## run the examples of README.md and docs/ and write their output into them
	$(COG) -r

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(MOTO) $(FRAMEWORKS) $(ORACLES) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Compiled ahead, as an installed package is: some environments forbid Python to do so when it runs.
$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m compileall -q ckpt_cli
	touch $@

# Exactly the lower bounds of pyproject.toml, without torch.
$(OLDEST)/.ready: pyproject.toml Makefile
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	sed -n '/^dependencies/,/^]/s/^ *"\([A-Za-z0-9_]*\)>=\([0-9.]*\)",.*/\1==\2/p' pyproject.toml | grep -v '^torch=' \
		> $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt pytest hypothesis
	echo '$(CURDIR)' > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clone.pth"
	$(OLDEST)/bin/python -m pip list --disable-pip-version-check
	touch $@

$(NEWEST)/.ready: $(READY)
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check typer
	folder() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(folder $(CURDIR)/$(VENV))')" > "$$(folder $(NEWEST))/development.pth"
	$(NEWEST)/bin/python -c 'import typer; print("typer", typer.__version__)'
	touch $@

# A server of S3 that knows If-Match and unfinished uploads, which the one of `make test` does not; 290 MB.
$(MOTO)/.ready: $(READY)
	rm -rf $(MOTO)
	$(PYTHON) -m venv $(MOTO)
	$(MOTO)/bin/python -m pip install --quiet --disable-pip-version-check 'moto[server]>=5'
	touch $@

# The libraries whose containers are read, beside what is borrowed from $(VENV); 700 MB.
$(CONTAINERS)/.ready: $(READY)
	rm -rf $(CONTAINERS)
	$(PYTHON) -m venv $(CONTAINERS)
	folder() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(folder $(CURDIR)/$(VENV))')" > "$$(folder $(CONTAINERS))/development.pth"
	$(CONTAINERS)/bin/python -m pip install --quiet --disable-pip-version-check stable-baselines3 flax onnx h5py
	touch $@

# The libraries that compute what ckpt computes, at the versions that wrote the samples of the tests; 1.5 GB.
$(ORACLES)/.ready: $(READY) tests/oracles/requirements.txt
	rm -rf $(ORACLES)
	$(PYTHON) -m venv $(ORACLES)
	$(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oracles/requirements.txt
	DISABLE_QIGEN=1 BUILD_CUDA_EXT=0 $(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation -r tests/oracles/unbuilt.txt
	touch $@

$(FRAMEWORKS)/.ready: $(READY)
	rm -rf $(FRAMEWORKS)
	$(PYTHON) -m venv $(FRAMEWORKS)
	folder() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(folder $(CURDIR)/$(VENV))')" > "$$(folder $(FRAMEWORKS))/development.pth"
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		einops hjson msgpack ninja packaging psutil py-cpuinfo pydantic pyyaml tqdm
	$(FRAMEWORKS)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
		deepspeed==$(DEEPSPEED) -d $(FRAMEWORKS)
	tar -xzf $(FRAMEWORKS)/deepspeed-$(DEEPSPEED).tar.gz -C $(FRAMEWORKS)
	touch $@
