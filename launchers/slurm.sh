#!/usr/bin/env bash
# sbatch --nodes 8 launchers/slurm.sh experiment=NAME [key=value ...]
# One torchrun a node. The job id is the run's id: a requeued job goes on in the same directory.
#SBATCH --job-name=nvmm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --output=slurm-%j.out
set -euo pipefail

export HEAD NNODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${PORT:-29400}"
launcher="${SLURM_SUBMIT_DIR:-$PWD}/launchers/torchrun.sh"
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' "$launcher" "$@"
