#!/usr/bin/env bash
# One node: launchers/torchrun.sh [key=value ...]
# Several:  NNODES=4 NODE_RANK=0 HEAD=host:29400 RUN_ID=name launchers/torchrun.sh [key=value ...]
# NPROC: ranks on this node (default: its GPUs, else 1). ENTRY: train, evaluate or generate.
# GRACE: seconds that ranks have to save at a signal.
set -euo pipefail

if [[ -z "${NPROC:-}" ]]; then
    NPROC=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    ((NPROC > 0)) || NPROC=1
fi
# torchrun would set one thread a rank; a CPU rank should use its share of the cores.
threads=$(($(nproc) / NPROC))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

if ((${NNODES:-1} > 1)); then
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --rdzv-backend c10d
        --rdzv-endpoint "${HEAD:?}" --rdzv-id "${RUN_ID:?}")
else
    where=(--standalone)
fi
# Ranks save and leave at SIGTERM and SIGUSR1: pass both on, and wait for the checkpoint.
where+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${GRACE:-300}")
exec python -m nvmm torchrun "${where[@]}" --nproc-per-node "$NPROC" -m nvmm "${ENTRY:-train}" "$@"
