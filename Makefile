PYTHON ?= python3.11
BIN := .venv/bin
# Processes that share the tests: one for each core, at most four (tests/conftest.py)
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --dist worksteal
READY := .venv/ready

.PHONY: setup demo docs test test-all faults lint format wheel bench bench-quick gpu clean

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
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow' --cov --cov-report=term

faults: $(READY)  # kills, full disks, dead processes and so on, counted: docs/reliability.md
	$(BIN)/python -m pytest tests/faults -m 'slow or not slow'

docs: $(READY)  # the documentation site, in build/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

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

# On a machine with a GPU, again until all is done: docs/gpu.md. Without .venv it takes PYTHON and what lies in .gpu/.
OUT ?= outputs/gpu
DATA ?= $(wildcard .gpu/cifar10_jpeg.tar.xz)
GPU_PATH = $(CURDIR)/src:$(CURDIR)/.gpu/site$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu:
	PYTHONPATH=$(GPU_PATH) $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py --output $(OUT) \
		$(if $(DATA),--data $(DATA)) $(GPU)

clean:
	rm -rf .venv outputs build dist *.egg-info .coverage .coverage.*
