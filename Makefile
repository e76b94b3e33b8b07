# Every target sets up what it needs. VENV=PATH uses another virtual environment.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help venv quickstart check test test-slow golden bench bench-convert bench-packing bench-embed ablate-pooling clean

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

test-slow: venv ## the slow tests (installs the embed extra)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[embed]'
	$(BIN)/python -m pytest -m "slow and not gpu" --durations=20

golden: venv ## write the golden losses and names anew (look at the diff)
	$(BIN)/python -m pytest -m "not gpu" -k golden --golden

bench: venv ## times of the commands and steps
	$(BIN)/python tools/bench_entry.py

bench-convert: venv ## speed and memory of conversions (writes 10 GB to build/)
	$(BIN)/python tools/bench_convert.py --to build/bench_convert

bench-packing: venv ## tokens/s of padded, packed and planned rows, and of Transformers' collator
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_packing.py

bench-embed: venv ## time and memory of a contrastive step, against sentence-transformers
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[embed]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_embed.py

ablate-pooling: venv ## poolings and masks on WordNet's glosses, 3 seeds (hours; downloads 6 MB)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/ablate_pooling.py

clean: ## remove caches and build products; keeps .venv, data and runs
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
