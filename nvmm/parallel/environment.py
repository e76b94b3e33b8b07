"""The launcher's variables of this process: ranks, sizes, job ids. This imports no torch."""

from __future__ import annotations

import os
import re

_RANKS = {
    "rank": ("RANK", "SLURM_PROCID"),
    "world size": ("WORLD_SIZE", "SLURM_NTASKS"),
    "local rank": ("LOCAL_RANK", "SLURM_LOCALID"),
}
"""The variables of torchrun (or of whatever sets torch's), and those of srun."""


SWEEP_JOB = "NVMM_SWEEP_JOB"
"""The variable that tells a job of --multirun its number."""


def sweep_job() -> str | None:
    """Return the number of this job in a sweep (--multirun), None outside one."""
    return os.environ.get(SWEEP_JOB)


def rank() -> int:
    """Return this process's rank as torchrun or srun gives it, else 0."""
    return _number("rank", 0)


def world_size() -> int:
    """Return the world size as torchrun or srun gives it, else 1."""
    return _number("world size", 1)


def local_rank() -> int:
    """Return this process's number on its machine as torchrun or srun gives it, else 0."""
    return _number("local rank", 0)


def launch_problem() -> str | None:
    """Return what is wrong with the launcher's variables and what to do; None when nothing is."""
    for names in (*_RANKS.values(), ("MASTER_PORT",)):
        for name in names:
            text = os.environ.get(name, "")
            if text and not text.isdecimal():
                return f"{name}={text} in the environment must be a whole number; unset it"
    rank_name, size_name = (_name(what) for what in ("rank", "world size"))
    if rank() >= world_size():
        return (
            f"{rank_name}={rank()} must be below {size_name}={world_size()}: these variables of the"
            " environment are of no launcher that starts nvmm; use torchrun, or unset them"
        )
    if world_size() == 1 or has_rendezvous():
        return None
    if size_name == "WORLD_SIZE":
        return (
            f"WORLD_SIZE={world_size()} needs MASTER_ADDR and MASTER_PORT, where the ranks meet:"
            " start them with torchrun, or unset WORLD_SIZE for a single process"
        )
    return (
        f"Slurm says that this command has {world_size()} tasks (SLURM_NTASKS), and not where they"
        " meet: submit launchers/slurm.sh, or start torchrun once a node (launchers/torchrun.sh);"
        " tasks that srun starts without it need MASTER_ADDR and MASTER_PORT; for a single process,"
        " `unset SLURM_NTASKS SLURM_PROCID SLURM_LOCALID`"
    )


def launcher_command() -> str | None:
    """Return the command that a launcher of ours was given, None where it was another's."""
    return os.environ.get("NVMM_COMMAND")


def under_torchrun() -> bool:
    """Return True when torchrun's agent started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent_store() -> bool:
    """Return True when the ranks meet in a store of torchrun's, which outlives a restart."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def has_rendezvous() -> bool:
    """Return True when a launcher gives the address where the ranks meet."""
    return bool(os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"))


def requeued_id() -> str | None:
    """Return the job id that survives a requeue: Slurm's, or the --rdzv-id of torchrun."""
    return os.environ.get("SLURM_JOB_ID") or _rendezvous_id(generated=False)


def generated_id() -> str | None:
    """Return the id torchrun made up for this launch; it survives --max-restarts alone."""
    return _rendezvous_id(generated=True)


def _number(what: str, default: int) -> int:
    for name in _RANKS[what]:
        text = os.environ.get(name, "")
        if text.isdecimal():  # anything else is refused by `launch_problem`
            return int(text)
    return default


def _name(what: str) -> str:
    """Return the variable that says the rank or the world size, torch's where none does."""
    return next((name for name in _RANKS[what] if os.environ.get(name)), _RANKS[what][0])


def _rendezvous_id(*, generated: bool) -> str | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # On one machine torchrun puts a random UUID4 in the place of whatever --rdzv-id was given.
    random = re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", run_id)
    return run_id if run_id != "none" and bool(random) == generated else None
