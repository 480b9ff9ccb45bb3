# `make help` lists the targets. Everything happens in .venv, which `make` creates.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help env env-dev demo test nbtest pytest bench export clean-nbs readme step-check clean-env

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
# The first Python that is new enough; `make PYTHON=/path/to/python ...` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
# A hung test must not hang a build; not every system has `timeout`.
LIMIT := $(shell command -v timeout >/dev/null && echo timeout -k 30)
DEMO ?=
BENCH ?=
PYTEST ?=

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: env ## Train three arms on a small budget, evaluate, write the report (DEMO="--steps 10" passes options)
	@$(BIN)/fg-dapo demo $(DEMO)

test: nbtest pytest ## Run every notebook and every test

env: $(VENV)/.local-done ## Create .venv with what training needs

env-dev: $(VENV)/.dev-done ## Add what notebooks, tests and this Makefile need

bench: env-dev ## Measure speed and memory, against vLLM too, and print a table (some 10 minutes; BENCH="--no-verl" is shorter)
	@OMP_NUM_THREADS=1 $(BIN)/python -m fg_dapo.bench $(BENCH)

nbtest: env-dev ## Run every notebook
	@echo "notebooks"
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(LIMIT),$(LIMIT) 900) $(BIN)/nbdev_test --n_workers 2 --do_print

pytest: env-dev ## Run the tests (PYTEST="-k cli" passes options)
	@OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(LIMIT),$(LIMIT) 3600) $(BIN)/python -m pytest -q tests $(PYTEST)

export: env-dev ## Write fg_dapo/ from the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_export

clean-nbs: env-dev ## Remove what should not be committed from the notebooks
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

readme: env-dev ## Write README.md from nbs/index.ipynb, with its stored outputs
	@$(BIN)/python tools/readme.py

step-check: env-dev ## Check that package, notebooks and README are in step; changes nothing
	@$(BIN)/python tools/in_step.py

clean-env: ## Remove .venv
	rm -rf $(VENV)

$(VENV)/.made:
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12 demo" >&2; exit 1; fi
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "error: $(PYTHON) is not a Python 3.11 or newer; make PYTHON=/path/to/python3.12 demo names another" >&2; exit 1; fi
	echo "creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	touch $@

$(VENV)/.torch-done: $(VENV)/.made constraints.txt
	@echo "installing torch (minutes, on a slow line)"
	bash tools/install_torch.sh $(BIN)/python constraints.txt
	touch $@

$(VENV)/.local-done: $(VENV)/.torch-done settings.ini setup.py constraints.txt
	@echo "installing fg_dapo and its packages"
	$(PIP) -c constraints.txt -e '.[local]'
	touch $@

# The tests run the verl engine for real: Ray, vLLM's CPU build and FSDP on this machine.
$(VENV)/.dev-done: $(VENV)/.local-done tools/install_verl.sh tools/install_bfcl.sh
	@echo "installing what tests need"
	$(PIP) -c constraints.txt -e '.[dev]'
	echo "installing the verl engine for the CPU (3 GB)"
	bash tools/install_verl.sh $(BIN)/python constraints.txt
	bash tools/install_bfcl.sh $(BIN)/python constraints.txt
	touch $@
