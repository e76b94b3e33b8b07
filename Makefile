# Every target sets up what it needs. VENV=PATH uses another virtual environment.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart check test test-slow golden bench bench-convert bench-packing bench-index bench-data clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

venv: $(STAMP) ## .venv with the pinned dependencies and this checkout

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "nvmm needs Python 3.11 or newer (apt-get install python3.11 python3.11-venv)"; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) \
		|| { echo "python cannot make a virtual environment (apt-get install python3-venv)"; exit 1; }
	@echo 'installing the pinned dependencies into $(VENV) (some minutes)'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,test,quickstart]'
	@touch $@

quickstart: venv ## build a dataset, train, evaluate, generate and report on a CPU (11 minutes)
	PATH="$(abspath $(BIN)):$$PATH" launchers/quickstart.sh

check: venv ## format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy nvmm
	$(BIN)/codespell

test: venv ## the tests that need neither a GPU nor patience
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=20

test-slow: venv ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=20

golden: venv ## write the golden losses and names anew (look at the diff)
	$(BIN)/python -m pytest -m "not gpu" -k golden --golden

bench: venv ## times of the commands and steps
	$(BIN)/python tools/bench_entry.py

bench-convert: venv ## speed and memory of conversions (writes 10 GB to build/)
	$(BIN)/python tools/bench_convert.py --to build/bench_convert

bench-packing: venv ## tokens/s of padded, packed and planned rows, and of Transformers' collator
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_packing.py

bench-index: venv ## speed and memory of the index and the order up to 10^7 samples (1 GB in build/)
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_index.py --to build/bench_index

bench-data: venv ## samples/s, memory and restore against megatron-energon and webdataset (300 MB in build/)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench,quickstart]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_data.py --data build/bench_data

clean: ## remove caches and build products; keeps .venv, data and runs
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
