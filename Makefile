# every target makes .venv by itself and leaves the user's own environment alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test slow fuzz interop kernels check check-rest format lint types contracts coverage bench bench-smoke clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and by itself: a range would let pip choose a build of several gigabytes
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lora_core needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.demo  ## teach the shipped digit model a style and draw it, in lora-core-demo/
	$(BIN)/python -m lora_core demo --force

test: $(VENV)/.test  ## the tests but the slow ones, doctests of docstrings and Markdown included
	$(BIN)/python -m coverage run -m pytest -m "not slow"

slow: $(VENV)/.test  ## the tests that take seconds each: processes, kills, benchmarks, the demo
	$(BIN)/python -m coverage run -m pytest -m slow

fuzz: $(VENV)/.test  ## 20,000 damaged files, each loaded whole or refused whole; takes minutes
	$(BIN)/python -m tests.fuzz --files 20000 --minutes 10

interop: $(VENV)/.test $(VENV)/.interop  ## the tests against real models of other libraries
	$(BIN)/python -m pytest tests/interop

kernels: $(VENV)/.test $(VENV)/.kernels  ## the GPU kernels, interpreted and compiled; needs no GPU
	$(BIN)/python -m pytest tests/kernels

check: test check-rest  ## everything that must hold before a change lands

check-rest: slow format lint types contracts kernels coverage bench-smoke interop  ## what `check` does after the tests

format: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

coverage: $(VENV)/.dev  ## branch coverage of the last `make test`
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

bench: $(VENV)/.bench  ## adapted layers against the frozen layer and other libraries, on one CPU thread
	$(BIN)/python -m benchmarks.fused --json build/fused-cpu.json --plot build/fused.png
	$(BIN)/python -m benchmarks.lifecycle --json build/lifecycle.json
	$(BIN)/python -m benchmarks.models --json build/models.json

bench-smoke: $(VENV)/.dev
	$(BIN)/python -m benchmarks.parameter_count --ranks 1 4
	$(BIN)/python -m benchmarks.fused --quick --without-peers
	$(BIN)/python -m benchmarks.lifecycle --quick --without-peers
	$(BIN)/python -m benchmarks.models --quick --without-peers
	$(BIN)/python -m benchmarks.algebra --quick

clean:  ## remove what the targets made
	rm -rf $(VENV) .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache lora-core-demo
