PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo test test-all faults lint format wheel bench bench-quick clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pdistill needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python distill.py experiment=demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m 'slow or not slow' --cov --cov-report=term

faults: $(READY)  # kills, full disks, dead processes and so on, counted: docs/reliability.md
	$(BIN)/python -m pytest tests/faults -m 'slow or not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)  # without build/, which would bring back files that were deleted or moved
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

bench: $(READY)
	$(BIN)/python benchmarks/speed.py

bench-quick: $(READY)
	$(BIN)/python benchmarks/speed.py --quick

clean:
	rm -rf .venv outputs build dist *.egg-info .coverage .coverage.*
