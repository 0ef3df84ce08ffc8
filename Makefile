# Everything is set up by the first target that needs it: `make demo` on a fresh machine is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A test run starts hundreds of Pythons, each of which would compile our modules again: 0.3 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ci test-all test-documents test-llama-cpp chaos fuzz lint format slurm-shell clean

demo: $(READY)
	$(BIN)/distlora demo

# Each file in one process, which keeps its world of four ranks, its GPU's kernels, its runs that are compared with. Three at a
# time on two cores: a third of their time waits for something (SLURM, a save, a process that starts).
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile

# A real SLURM, whole processes, and the cells of tables that `make test` leaves out.
test-ci: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m ci

# Everything, with what takes minutes each. Not in CI.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

# The README's first hour, each command as a user types it, its output held to what is promised: a quarter of an hour, of which
# DISTLORA_CACHE=~/.cache/distlora, where the demo has been, saves half. Not in CI.
test-documents: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_first_hour.py

# GGUF files in llama.cpp itself, built from source: about three minutes the first time on two quiet cores. Not in CI.
test-llama-cpp: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[llama-cpp]'
	$(BIN)/python -m pytest -m llama_cpp

# 50 kills at random moments of two-rank runs, each then resumed; ends with what each kind cost (20 minutes when quiet).
chaos: $(READY)
	$(BIN)/python tests/chaos.py --kills 50

# A real SLURM of two nodes on this machine, as the tests have one, and a shell in which it answers. Needs root.
slurm-shell: $(READY)
	$(BIN)/python tests/slurm_cluster.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Damaged inputs with new seeds each time, ten times as many as in `make test`: about ten minutes.
fuzz: $(READY)
	DISTLORA_FUZZ_EXAMPLES=$(or $(EXAMPLES),10) $(BIN)/python -m pytest -n 2 --dist load tests/test_fuzz*.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "installing distlora and its dependencies into $(VENV) (some minutes the first time) ..."
	@# setuptools warns of every editable install whose folders do not lie as their import names do.
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
