# `make run` trains a small language model, `make test` checks everything; each makes its own environment.

VENV  ?= .venv
# The exact version keeps a looser requirement from choosing another build. Where the default index serves a
# build that does not fit the machine, say which one: make run TORCH='torch==2.13.0 --index-url URL'
TORCH ?= torch==2.13.0
ARGS  ?=
# Tests run beside each other, for they wait as much as they compute: a worker for each processor, up to eight.
WORKERS ?= logical

FIND_PYTHON = for python in python3.11 python3.12 python3.13 python3 python; do \
	if $$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	python=; done; \
	if [ -z "$$python" ]; then echo 'make: no Python 3.11 or newer (with venv) on the PATH' >&2; exit 1; fi
# Tools that torch and deepspeed look for on the PATH (ninja) are in the environment.
WITH_VENV = PATH="$(abspath $(VENV))/bin:$$PATH"

SOURCES = trainsys parallel checkpoint offload faulttol launch tests
PARTIAL = $(VENV)/.partial
RUN_READY  = $(VENV)/.run-ready
TEST_READY = $(VENV)/.test-ready

.PHONY: help run test lint style types pytest format clean
.DEFAULT_GOAL := help

help:  ## Print this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'ARGS="…" is added to the command: make run ARGS="--steps=50", make test ARGS="-k mesh".'
	@echo 'WORKERS=0 runs tests one after another, in one process.'

run: $(RUN_READY)  ## Train the default recipe on this machine: trainsys launch tiny.
	$(WITH_VENV) trainsys launch tiny $(ARGS)

test: lint pytest  ## Run everything that CI runs: lint, then the whole test suite.

lint: style types  ## Check style and types.

style: $(TEST_READY)  ## Check style alone.
	$(WITH_VENV) ruff check $(SOURCES)
	$(WITH_VENV) ruff format --check $(SOURCES)

types: $(TEST_READY)  ## Check types alone.
	$(WITH_VENV) mypy

# Tests start some hundred processes: where Python is told to keep no bytecode, each would compile all of this anew.
pytest: $(TEST_READY)  ## Run the tests alone.
	@$(VENV)/bin/python -m compileall -q $(SOURCES)
	$(WITH_VENV) python -m pytest -n $(WORKERS) --maxprocesses 8 $(ARGS)

format: $(TEST_READY)  ## Rewrite the sources in the project's style.
	$(WITH_VENV) ruff check --fix $(SOURCES)
	$(WITH_VENV) ruff format $(SOURCES)

clean:  ## Remove the environment, caches and built files; runs/ stays.
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# An install that was killed leaves $(PARTIAL) behind: its environment is not trusted but made anew.
# One that pip itself gave up (no network) leaves the environment as it was.
define install
	@echo "pip install $(1)"
	@$(VENV)/bin/python -m pip install --quiet --no-input --disable-pip-version-check $(1) || \
		{ code=$$?; [ $$code -ge 128 ] || rm -f $(PARTIAL); exit $$code; }
endef

# Compiling takes most of an install, and pip does it on one processor. What fails is not for this version of Python.
$(RUN_READY): pyproject.toml constraints.txt
	@if [ -e $(PARTIAL) ]; then echo 'The last install did not finish: starting over.'; rm -rf $(VENV); fi
	@$(FIND_PYTHON); echo "Installing into $(VENV) with $$($$python --version): once, some minutes"; \
		mkdir -p $(VENV) && touch $(PARTIAL) && $$python -m venv $(VENV)
	$(call install,'pip>=25.1')
	$(call install,--no-compile $(TORCH))
	$(call install,--no-compile --constraint constraints.txt --editable '.[all]')
	@$(VENV)/bin/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	@echo "Building the recorder's part in C++: once, half a minute"
	@$(VENV)/bin/python -m faulttol build || echo 'Collectives on the CPU are recorded from Python, then.'
	@rm $(PARTIAL)
	@touch $@

$(TEST_READY): $(RUN_READY)
	@touch $(PARTIAL)
	$(call install,--constraint constraints.txt --group dev)
	@rm $(PARTIAL)
	@touch $@
