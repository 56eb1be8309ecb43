# One command a step. `make train` and `make test` make the environment themselves when it is missing or out of date.
#
#   make train ARGS="mode=pt2e data=fashion_mnist"
#   make test ARGS="-k schedule"
#   make test WORKERS=0                          # in one process, where a debugger works
#   make env PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu    # torch without CUDA

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# The environment is right when it holds the stamp of this very lock file. The stamp is written last: an install that
# was interrupted leaves none, and is done again from the start.
LOCK_STAMP := $(VENV)/.lock-$(firstword $(shell cksum < requirements.lock))
PACKAGE_STAMP := $(VENV)/.package-$(firstword $(shell cksum < pyproject.toml))

# The tests of a file share what they made once, so that a file stays in one process. A process that dies ends the run
# and names its test: started again, it would leave the other one waiting.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help env train test slow lint format types browser clean

help:
	@echo "make train | test | slow | lint | format | types | browser | env | clean"
	@echo "options: ARGS, WORKERS, PYTHON, VENV, TORCH_INDEX"

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

slow: env
	$(PYTEST) -m slow $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: env
	$(BIN)/mypy

# Chromium and its driver, in which tests open the page of a comparison; without them these tests are skipped.
# Debian's package is taken where we may install it.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
browser:
	@if ! command -v chromedriver >/dev/null; then \
		$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver; fi
	@command -v chromedriver >/dev/null || \
		{ echo "there is no Chromium: install it and its chromedriver, and put both on the PATH"; exit 1; }

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
