# Set-up lives in .venv inside the checkout; every target prepares what it needs and stops at the first failing step.
# On a machine without a GPU, PyTorch's CPU index keeps the download small:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
SHELL := /bin/bash -euo pipefail
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
OLDEST := .oldest
# Where PyTorch does not bring its own, as its builds for GPUs do: tests run its interpreter.
TRITON := 3.9.0
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DELETE_ON_ERROR:
.PHONY: demo test test-oldest test-slow lint docs clean

demo: .venv/ready
	.venv/bin/foregate demo

test: .venv/ready .venv/ready-test
	.venv/bin/python -m pytest -n $(WORKERS) tests

# The families again on the oldest transformers that Foregate supports, laid over the same environment.
test-oldest: .venv/ready-test $(OLDEST)/ready
	PYTHONPATH=$(OLDEST) .venv/bin/python -m pytest -n $(WORKERS) tests/test_families.py tests/model/test_interfaces.py

# What takes minutes or a large package: lm-eval, the server under load and under schemathesis, its page in the system's
# Chromium (skipped where there is none).
test-slow: .venv/ready-test
	$(PIP) 'lm_eval[api]' schemathesis playwright
	.venv/bin/python -m pytest -m slow tests

lint: .venv/ready-test
	.venv/bin/ruff check src tests examples benchmarks
	.venv/bin/ruff format --check src tests examples benchmarks

# docs/cli.md is written by the commands themselves.
docs: .venv/ready
	.venv/bin/python -m foregate.cli.docs > docs/cli.md

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/foregate/native/*.cpp src/foregate/native/*.h*)
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Foregate needs Python 3.11 to 3.13")'
	$(PYTHON) -m venv .venv
	$(PIP) torch  # first and pinned: a bare requirement may pull another build
	$(PIP) -e .
	touch $@

.venv/ready-test: .venv/ready
	.venv/bin/python -c 'import triton' 2>/dev/null || $(PIP) triton==$(TRITON)
	$(PIP) -e '.[test]'
	touch $@

$(OLDEST)/ready: .venv/ready
	rm -rf $(OLDEST)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --target $(OLDEST) transformers==5.17.0
	touch $@

clean:
	rm -rf .venv $(OLDEST) build
