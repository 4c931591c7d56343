# Every target works on a fresh clone. PYTHON=/path/to/python3 chooses the interpreter that .venv is made with.

BIN := .venv/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test check simulate format bench bench-devices docs clean

help:  ## show what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready  ## make .venv with the package and what its demo and tests need

.venv/.ready: pyproject.toml .ci/setup
	@.ci/setup

demo: setup  ## train one model in four processes (DEMO_FLAGS=--short for a quick one)
	@$(BIN)/python examples/demo.py $(DEMO_FLAGS)

test: setup  ## run the tests, print their coverage (TEST_FLAGS="-k ring" goes to pytest)
	@.ci/test $(TEST_FLAGS)

check: setup  ## everything that a reviewer would ask for: format, lint, types, docs, tests
	@echo "check: format" && $(BIN)/ruff format --check --quiet .
	@echo "check: lint" && $(BIN)/ruff check --quiet .
	@echo "check: types" && $(BIN)/python .ci/typecheck.py
	@echo "check: docs" && $(BIN)/python .ci/check_docs.py
	@echo "check: tests" && .ci/test $(TEST_FLAGS)

SEEDS ?= 1000
simulate: setup  ## run simulated worlds under faults: SEEDS=1000 fixed ones, and some that nobody has run
	@$(BIN)/python -m simulations --seeds $(SEEDS)
	@$(BIN)/python -m simulations --world nodes --seeds 40
	@$(BIN)/python -m simulations --seeds 200 --first-seed $$(date +%s)
	@$(BIN)/python -m simulations --world nodes --seeds 20 --first-seed $$(date +%s)

format: setup  ## format the code, and repair what lint can repair
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

bench: setup .venv/.bench  ## measure all_reduce beside gloo (BENCH_FLAGS="--ranks 2 --sizes 4MiB")
	@$(BIN)/python benchmarks/all_reduce.py --against gloo $(BENCH_FLAGS)

.venv/.bench: .venv/.ready
	@echo "bench: installing PyTorch, the peer to measure beside"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' && touch $@

bench-devices: setup .venv/.bench-devices  ## measure kernels on devices beside NumPy, numexpr and numba (BENCH_FLAGS=--quick)
	@$(BIN)/python benchmarks/devices.py $(BENCH_FLAGS)

.venv/.bench-devices: .venv/.ready
	@echo "bench: installing numexpr and numba, the peers to measure beside"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench-devices]' && touch $@

docs: setup  ## check the documentation: links lead somewhere, code compiles, commands exist
	@$(BIN)/python .ci/check_docs.py

clean:  ## remove all that the other targets made
	@rm -rf .venv build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
