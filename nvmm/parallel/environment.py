"""The launcher's variables of this process: ranks, sizes, job ids. This imports no torch."""

from __future__ import annotations

import os
import re


def rank() -> int:
    """Return this process's rank as torchrun or srun gives it, else 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size() -> int:
    """Return the world size as torchrun or srun gives it, else 1."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def local_rank() -> int:
    """Return this process's number on its machine as torchrun or srun gives it, else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def has_rendezvous() -> bool:
    """Return True when a launcher gives the address where the ranks meet."""
    return "MASTER_ADDR" in os.environ


def requeued_id() -> str | None:
    """Return the job id that survives a requeue: Slurm's, or the --rdzv-id of torchrun."""
    return os.environ.get("SLURM_JOB_ID") or _rendezvous_id(generated=False)


def generated_id() -> str | None:
    """Return the id torchrun made up for this launch; it survives --max-restarts alone."""
    return _rendezvous_id(generated=True)


def _rendezvous_id(*, generated: bool) -> str | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # On one machine torchrun puts a random UUID4 in the place of whatever --rdzv-id was given.
    random = re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", run_id)
    return run_id if run_id != "none" and bool(random) == generated else None
