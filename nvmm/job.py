"""Make new data with or without a checkpoint: `nvmm job job=NAME output=DIR`.

It runs alone or under torchrun, at any tensor and pipeline parallel size; the data-parallel ranks
share the parts. The same command goes on with a job that was stopped, at any number of ranks.
"""

from __future__ import annotations

import sys
from typing import Any

from nvmm.config import compose, machine
from nvmm.config.compose import instantiate, refusals
from nvmm.parallel import environment


def main() -> None:
    """Compose, check, run. Exits with compose.BAD_CONFIG when the config is refused."""
    sys.argv[1:] = [compose.argument(text) for text in sys.argv[1:]]
    composed = compose.load("job")
    if composed is None:
        return
    keys = ("checkpoint.path", "base", "tokenizer.path")
    if problems := [*machine.missing_folders(composed.config, keys)]:
        compose.refuse("job", problems)
    with compose.failures("job"):
        from torch.distributed.elastic.multiprocessing.errors import record

        record(run)(composed)


def run(composed: compose.Job) -> dict[str, Any]:
    """Make the job's rows on all ranks; return the summary that is printed."""
    try:
        import nvmm.jobs.job  # noqa: F401
    except ImportError as error:
        compose.refuse("job", [f"{error}: jobs need pip install 'nvmm[jobs]'"])
    from nvmm.inference.restore import restore_from
    from nvmm.parallel import setup

    compose.log_to_stderr()
    config = composed.config
    with refusals("job"):
        job = instantiate(config["job"])
        if config["checkpoint"]["path"] is None:
            _refuse_without_checkpoint(config)
            setup.prepare_backend()
            instantiate(config["parallel"]).initialize(seed=0)  # nothing draws
            model = None
        else:
            model = restore_from(config, config["build"] | job.build)
        settings = {name: config[name] for name in ("job", "precision", "backend", "kernels")}
        summary = job.run(settings, model, config["output"])
    if environment.rank() == 0:
        print(f"{summary['folder']}: {summary['rows']} rows, {summary['written']} of them new")
        if summary["bad"]:
            print(f"{summary['bad']} rows have an error; the first: {summary['first_error']}")
        for name, value in summary["metrics"].items():
            print(f"{name:<32} {value:8.4f}")
        for name, value in summary.get("requests", {}).items():
            print(f"{name:<32} {value:8}")
    setup.shutdown()
    return summary


def _refuse_without_checkpoint(config: dict[str, Any]) -> None:
    """Raise ValueError for a key that changes a checkpoint, where none is given."""
    values = {"tokenizer": config["tokenizer"]["path"]}
    names = ("base", "sequence_length", "build", "precision", "backend", "kernels", "trust_config")
    values |= {name: config[name] for name in names}
    if given := [name for name, value in values.items() if value]:
        raise ValueError(f"{given[0]} is of a checkpoint; give checkpoint=DIR, or leave it out")


if __name__ == "__main__":
    main()
