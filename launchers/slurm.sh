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

export HEAD NNODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID" NVMM_COMMAND
# All names are read: a reader that leaves early would kill scontrol, and pipefail this script.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD="${hosts[0]:?scontrol names no host}:${PORT:-29400}"
# Slurm runs a copy of this script, which has no folder beside it: torchrun.sh is the package's.
launchers="$(python -c 'from nvmm.commands.doctor import beside; print(beside("launchers"))')"
launcher="$launchers/torchrun.sh"
# What a run says to go on with is the command that submitted it.
printf -v NVMM_COMMAND '%q ' sbatch --nodes "$NNODES" "$launchers/slurm.sh" "$@"
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' "$launcher" "$@"
