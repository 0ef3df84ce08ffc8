# The first target that needs the virtual environment sets it up: `make demo` on a fresh machine is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A test run starts hundreds of Python processes; without .pyc files each compiles our modules for 0.3 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ci test-all test-documents test-examples test-llama-cpp test-servers dist chaos fuzz audit lint format slurm-shell gpu-wheels gpu-dry-run clean

demo: $(READY)
	$(BIN)/distlora demo

# One process per file, since a file's tests share ranks and trained runs; three at a time on two cores, since a third of the time
# is spent waiting for processes.
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile

# A real SLURM, whole processes, and the cells of tables that `make test` leaves out.
test-ci: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m 'ci and not slow'

# All tests, including those that take minutes, but the examples and servers. Not in CI.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not examples and not servers'

# Every command of docs/tutorial.md, with its output: about ten minutes. Set DISTLORA_CACHE=~/.cache/distlora after a demo to use its
# model. Not in CI.
test-documents: $(READY)
	$(BIN)/python -m pytest -m 'slow and not examples' tests/docs/test_shown_output.py

# Every command of examples/, with its output: half an hour. Not in CI, nor in test-all. The demo's model as above.
test-examples: $(READY)
	$(BIN)/python -m pytest -m examples tests/docs/test_shown_output.py

# GGUF files loaded by llama.cpp, which is built from source (three minutes the first time). Not in CI.
test-llama-cpp: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[llama-cpp]'
	$(BIN)/python -m pytest -m llama_cpp

# A real vLLM on this CPU serves our exports and samples for GRPO. It has an environment of its own (3 GB, some minutes). Not in CI.
SERVERS := .servers
test-servers: $(READY) $(SERVERS)/.ready
	$(BIN)/python -m pytest -m servers tests/post/test_servers.py

$(SERVERS)/.ready: tests/tools/vllm_environment.sh
	rm -rf $(SERVERS)
	bash $< $(PYTHON) $(SERVERS)
	touch $@

# What a release uploads, in dist/, checked. The wheel and its dependencies are installed into an empty environment, in which the
# commands of docs/pypi.md are typed (3 GB, some minutes). Not in CI.
INSTALLED := .installed
dist: $(READY)
	rm -rf build dist $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(INSTALLED)
	$(INSTALLED)/bin/pip install --quiet --disable-pip-version-check "$$(echo dist/*.whl)[demo]"
	DISTLORA_BIN=$(abspath $(INSTALLED)/bin) $(BIN)/python -m pytest -m slow tests/docs/test_shown_output.py -k pypi

# 50 kills of two-rank runs and merges at random moments, each resumed and compared with the uninterrupted run (30 minutes).
chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/tools/chaos.py --kills 50

# A shell with a real SLURM of two nodes on this machine. Needs root.
slurm-shell: $(READY)
	$(BIN)/python tests/support/slurm_cluster.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# The packages that a GPU machine without a network lacks, into .gpu (tests/tools/first_gpu.py says what to run there).
gpu-wheels: $(READY)
	$(BIN)/python tests/tools/gpu_packages.py .gpu

# tests/tools/first_gpu.py with tiny shapes on the CPU, in an environment with the oldest supported versions and no optional package.
BARE ?= .bare
gpu-dry-run: $(BARE)/.ready gpu-wheels
	$(BARE)/bin/python tests/tools/first_gpu.py --dry --work $(BARE)/work --seconds 10800

$(BARE)/.ready:
	$(PYTHON) -m venv $(BARE)
	$(BARE)/bin/pip install --quiet --disable-pip-version-check torch==2.11.0 triton==3.6.0 transformers==5.17.0 'numpy==2.3.*' \
	    safetensors peft accelerate rich markdown-it-py pyyaml jinja2 matplotlib psutil setuptools pytest pytest-xdist hypothesis
	touch $@

# Damaged inputs with new seeds, ten times as many as in `make test` (ten minutes).
fuzz: $(READY)
	DISTLORA_FUZZ_EXAMPLES=$(or $(EXAMPLES),10) $(BIN)/python -m pytest -m '' -n 2 --dist load tests/*/test_fuzz*.py

# All of SECURITY.md with a new seed: 60 combinations beside transformers and PEFT, 2,000 damaged inputs and more, what commands
# reach, and 50 kills. An hour and a half; `make audit SEED=1` repeats one.
SEED ?= $(shell date +%Y%m%d)
audit: $(READY)
	DISTLORA_AUDIT_SEED=$(SEED) $(BIN)/python -m pytest -m '' -sq $(addprefix tests/,training/test_audit.py launcher/test_confined.py parallel/test_network.py)
	DISTLORA_FUZZ_EXAMPLES=2 $(BIN)/python -m pytest -m '' -q --hypothesis-seed=$(SEED) tests/*/test_fuzz*.py
	PYTHONPATH=tests $(BIN)/python tests/tools/chaos.py --kills 50 --seed $(SEED)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Of pip's output: every twentieth package, each download of 50 MB or more, and the installation.
PROGRESS = awk '/^Collecting/ && ++n % 20 == 0 { print "  " n " packages found, the last", $$2 } \
    /Downloading.* MB\)/ && substr($$(NF-1), 2) + 0 >= 50 { print "  downloading", $$(NF-2), $$(NF-1), $$NF } \
    /^Installing collected/ { print "  installing", NF - 3, "packages (about a minute)" } { fflush() }'

$(READY): SHELL := /bin/bash
$(READY): .SHELLFLAGS := -o pipefail -c
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "installing distlora and its dependencies into $(VENV) (some minutes the first time)"
	@# setuptools warns about editable installs whose folders are not named like their packages.
	@PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore $(BIN)/pip install --disable-pip-version-check --progress-bar off -e '.[dev]' | $(PROGRESS)
	touch $(READY)

clean:
	rm -rf $(VENV) $(SERVERS) $(INSTALLED) .gpu .bare build dist *.egg-info
