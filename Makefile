# One command per step. `make train` and `make test` create or update the environment if needed.
#
#   make train ARGS="mode=pt2e data=fashion_mnist"
#   make test ARGS="-k schedule"
#   make test WORKERS=0                          # in one process, where a debugger works
#   make env PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu    # torch without CUDA
#   make test-torch TORCH=2.15.0                 # another torch, in its own environment
#   make gpu ARGS="--parts tests step"
#   make test-torch TORCH=2.15.0 PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# The environment is valid if it contains the stamp of the present lock file. The stamp is written last, so an interrupted
# installation is repeated.
LOCK_STAMP := $(VENV)/.lock-$(firstword $(shell cksum < requirements.lock))
PACKAGE_STAMP := $(VENV)/.package-$(firstword $(shell cksum < pyproject.toml))

# Tests of a file share fixtures, so each file runs in one process. A crashed process ends the run and names its test;
# restarting it would block the other process.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Another torch with matching packages: those in requirements-torch/TORCH.txt, if it was tested.
TORCH ?=
TORCH_PYTHON := $(shell $(PYTHON) -c 'import sys; print("py%d.%d" % sys.version_info[:2])' 2>/dev/null)
TORCH_VENV := .venv-torch-$(TORCH)-$(TORCH_PYTHON)
TORCH_PINS := requirements-torch/$(TORCH).txt
TORCH_STAMP := $(TORCH_VENV)/.made-$(firstword $(shell cat pyproject.toml $(wildcard $(TORCH_PINS)) | cksum))

# The site is built in its own environment without torch: the reference is read from the sources, and the tutorials contain
# their outputs (make tutorials).
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.lock-$(firstword $(shell cksum < requirements-docs.lock))

.PHONY: help env train test test-torch slow nightly gpu lint format types browser docs tutorials package clean

help:
	@echo "make train | test | test-torch | slow | nightly | gpu | lint | format | types | browser | docs | tutorials | package | env | clean"
	@echo "options: ARGS, WORKERS, PYTHON, VENV, TORCH_INDEX, TORCH"

env: $(PACKAGE_STAMP)

$(LOCK_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "requirements.lock needs Python 3.11 or later, and $(PYTHON) is older: say make PYTHON=python3.11"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--requirement requirements.lock
	@touch $@

# setuptools, the build backend, is in the lock: nothing is downloaded here
$(PACKAGE_STAMP): $(LOCK_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@rm -f $(VENV)/.package-* && touch $@

train: env
	$(BIN)/python train.py $(ARGS)

test: env
	$(PYTEST) $(ARGS)

# Uses the ranges of pyproject.toml instead of the lock file, which is for one torch; torch may be outside its range.
$(TORCH_STAMP):
	@test -n "$(TORCH)" || { echo "say which torch: make test-torch TORCH=2.15.0"; exit 1; }
	rm -rf $(TORCH_VENV)
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(TORCH_VENV)/bin/python requirements-torch/others.py $(wildcard $(TORCH_PINS)) > $(TORCH_VENV)/others.txt
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "torch==$(TORCH)" \
		$(if $(wildcard $(TORCH_PINS)),--requirement $(TORCH_PINS)) --requirement $(TORCH_VENV)/others.txt
	@touch $@

test-torch: BIN := $(TORCH_VENV)/bin
test-torch: $(TORCH_STAMP)
	$(PYTEST) $(ARGS)

slow: env
	$(PYTEST) -m "slow and not nightly" $(ARGS)

# Variations of the slow tests, which CI runs once a night.
nightly: env
	$(PYTEST) -m nightly $(ARGS)

# On a machine with an NVIDIA GPU: tests, training steps, memory and TensorRT, in 15 minutes; writes gpu.md and gpu.json.
gpu: env
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: env
	$(BIN)/mypy

# Chromium and its driver, for tests of the comparison page, which are skipped without them.
# Debian's package is used if it can be installed.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
browser:
	@if ! command -v chromedriver >/dev/null; then \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver; fi
	@command -v chromedriver >/dev/null || \
		{ echo "there is no Chromium: install it and its chromedriver, and put both on the PATH"; exit 1; }

$(DOCS_STAMP):
	rm -rf $(DOCS_VENV)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.lock
	@touch $@

# Builds site/. Warnings, such as broken links, are errors.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict $(ARGS)

# Runs the notebooks and stores their outputs.
tutorials: env
	$(BIN)/python docs/tutorials/execute.py $(if $(ARGS),$(ARGS),docs/tutorials/*.ipynb)

# Builds wheel and sdist in dist/, checks them, and tests the installed wheel in an environment without the checkout.
package: env $(DOCS_STAMP)
	rm -rf dist
	$(DOCS_VENV)/bin/python -m build --outdir dist
	$(DOCS_VENV)/bin/twine check --strict dist/*
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/test_packaging.py

clean:
	rm -rf $(VENV) .venv-torch-* $(DOCS_VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
