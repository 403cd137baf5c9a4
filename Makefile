# every target makes .venv by itself and leaves the user's own environment alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# one process per core, each of half a gigabyte; the examples of a page and the fixtures of a module stay in one of them
TEST := $(BIN)/python -m pytest
EVERY_CORE := --numprocesses logical --maxprocesses 8 --dist loadfile
# the tests that compare bits of what torch computed, by the kernels that it chose
BITS = tests/laws $(filter-out $(patsubst %,tests/test_%.py,cli% formats% guarding imports injection safety targets), \
	$(shell grep -lE 'torch\.equal|same_bits|assert_bits' tests/test_*.py))

.PHONY: help demo test slow avx2 fuzz interop kernels check format lint types contracts coverage bench bench-smoke clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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
	$(TEST) $(EVERY_CORE) -m "not slow"

slow: $(VENV)/.test  ## the tests that take seconds each: processes, kills, benchmarks, the demo
	$(TEST) $(EVERY_CORE) -m slow

avx2: $(VENV)/.test  ## the tests that compare bits, as on a processor without AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(TEST) $(EVERY_CORE) -m "not slow" $(BITS)

fuzz: $(VENV)/.test  ## 20,000 damaged files, each loaded whole or refused whole; takes minutes
	$(BIN)/python -m tests.fuzz --files 20000 --minutes 10

interop: $(VENV)/.test $(VENV)/.interop  ## the tests against real models of other libraries
	$(TEST) $(EVERY_CORE) tests/interop

kernels: $(VENV)/.test $(VENV)/.kernels  ## the GPU kernels, interpreted and compiled; needs no GPU
	$(TEST) tests/kernels

check: format lint types contracts coverage avx2 kernels bench-smoke interop  ## everything that must hold before a change lands

format: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

coverage: $(VENV)/.test  ## all the tests, the slow ones too, under branch coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(EVERY_CORE)
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
