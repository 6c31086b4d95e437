# `make demo` and `make test` set everything up by themselves; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
RANKS ?= 2
MINUTES ?= 30
# Processes that share the test suite, each with warm ranks of its own; a file's tests stay together.
WORKERS ?= 2
# Byte code is kept whatever the environment says: hundreds of processes begin in the suite.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ARGS ?=
ARMS ?=
# One target per recipe: a test holds recipes/ and the registry to the same names.
PHASES := $(patsubst recipes/%.py,%,$(wildcard recipes/*.py))

# Everything a run writes stays in this folder.
export ALIGN_KIT_CACHE ?= $(CURDIR)/runs/.cache
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/runs/.extensions

.PHONY: help setup demo compare doctor test check lint bench soak wheel clean $(PHASES)

help: ## list the targets
	@echo "targets (ARGS='--key value …' is passed on, RANKS=$(RANKS) sets the ranks of a phase):"
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  \1\t\2/' | expand -t 14
	@for phase in $(PHASES); do sed -n '1s/^"""\(.*\)$$/  '$$phase'\t\1/p' recipes/$$phase.py; done | expand -t 14

setup: $(VENV)/.ready ## make the virtual environment once; a second call only looks

# torch first: DeepSpeed's build looks for it, and an unpinned one pulls gigabytes.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or give PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,wandb,tensorboard,qlora]'
	@touch $@

demo: setup ## every phase on the embedded data, two ranks, with a table of what each brought (ARMS='dpo ppo' for some)
	@$(BIN)/align-kit demo $(if $(ARMS),--arms $(ARMS)) $(ARGS)

compare: setup ## LoRA against full fine-tuning on the embedded data, as an experiment with intervals: ten minutes
	@$(BIN)/align-kit compare --ranks $(RANKS) $(ARGS)

doctor: setup ## is this machine fit to train on (ARGS=--fix removes stale locks)
	@$(BIN)/align-kit doctor $(ARGS)

test: setup ## the whole test suite
	@$(BIN)/ruff check .
	@$(PYTEST) $(ARGS)

check: setup lint ## lint, types, floors and the fast tests
	@$(PYTEST) -m 'not slow' $(ARGS)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup ## one training step against stock TRL's, by lengths, models and ranks (ARGS='--models 4M' for some)
	@$(BIN)/python -m benchmarks.preference_step $(ARGS)

soak: setup ## faults at random for MINUTES=30: ranks killed, bytes flipped, disks filled, and what came of it
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(ARGS)

wheel: setup ## build dist/*.whl
	@$(BIN)/python -m build --wheel --no-isolation -q .

clean: ## remove the environment, runs and builds
	rm -rf $(VENV) runs build dist *.egg-info

$(PHASES): setup
	@$(BIN)/align-kit launch --nproc_per_node $(RANKS) $@ $(ARGS)
