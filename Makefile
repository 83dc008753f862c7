# make demo      set up, then run the whole pipeline at toy scale (a few minutes)
# make test      set up, then run the tests
# make test-all  the slow tests too
# make lint      ruff and mypy
# make demo-seeds, make bench-cpu   regenerate the rows under benchmarks/results/

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint demo-seeds bench-cpu

$(READY): setup.py pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints/cpu.txt -e ".[test]"
	touch $(READY)

demo: $(READY)
	$(BIN)/lopd demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo-seeds: $(READY)
	$(BIN)/python -m benchmarks.demo_seeds --out benchmarks/results

bench-cpu: $(READY)
	$(BIN)/python -m benchmarks.fused_loss --out benchmarks/results
