#!/usr/bin/env bash
# The quickstart: build a dataset of handwritten digits, train NVLM-D in three chained stages on two
# ranks (tensor parallel 2), evaluate on held-out pictures, answer a few of them, write a report.
# RUN=DIR moves the run directory; a second call goes on where the first stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
RUN=${RUN:-runs/quickstart}
DATA=data/quickstart
train() { torchrun --standalone --nproc-per-node 2 -m nvmm.train "$@"; }

python tools/quickstart_data.py --to "$DATA"
train experiment=nvlm_d/quickstart_text run.dir="$RUN/text"
train experiment=nvlm_d/quickstart_align run.dir="$RUN/align" init_from="$RUN/text"
train experiment=nvlm_d/quickstart run.dir="$RUN" init_from="$RUN/align"
torchrun --standalone --nproc-per-node 2 -m nvmm.evaluate checkpoint="$RUN" benchmark=heldout \
  benchmark.shards="$DATA/strings/test-*.tar" batch_size=64 max_new_tokens=10 \
  parallel.tensor_model_parallel_size=2

TEST="$DATA/strings/test-00000.tar"
mkdir -p "$RUN/pictures"
tar -tf "$TEST" | awk '/png$/ && n++ < 3' | tar -xf "$TEST" -C "$RUN/pictures" -T -
for picture in "$RUN"/pictures/*.png; do
  echo "$picture: Read the number."
  python -m nvmm.generate checkpoint="$RUN" image="$picture" prompt="Read the number."
done
python -m nvmm.report "$RUN"
