"""Score a checkpoint: `nvmm evaluate checkpoint=DIR benchmark=NAME`.

It runs alone or under torchrun, at any tensor and pipeline parallel size, whatever the checkpoint
was trained with. The data-parallel ranks share the questions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nvmm.config import compose, machine
from nvmm.config.compose import instantiate, refusals
from nvmm.parallel import environment


def main() -> None:
    """Compose, check, evaluate. Exits with compose.BAD_CONFIG when the config is refused."""
    sys.argv[1:] = [compose.argument(text) for text in sys.argv[1:]]
    job = compose.load("evaluate")
    if job is None:
        return
    keys = ("checkpoint.path", "base", "tokenizer.path", "benchmark.folder")
    shards = job.config["benchmark"].get("shards")
    problems = [*machine.missing_folders(job.config, keys)]
    problems += machine.unmatched("benchmark.shards", shards)
    if problems:
        compose.refuse("evaluate", problems)
    with compose.failures("evaluate"):
        from torch.distributed.elastic.multiprocessing.errors import record

        record(evaluate)(job)


def evaluate(job: compose.Job) -> dict[str, Any]:
    """Run one benchmark on all ranks; return the summary that metrics.json holds."""
    from nvmm.evaluation.benchmark import Settings
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import restore_from
    from nvmm.parallel import setup
    from nvmm.report.page import write_report
    from nvmm.training.summary import update_summary

    compose.log_to_stderr()
    config = job.config
    with refusals("evaluate"):
        benchmark = made(config["benchmark"])
        settings = Settings(
            **{field.name: config[field.name] for field in fields(Settings) if field.name in config}
        )
        restored = restore_from(config, benchmark.changes)
        folder = output_folder(config["output"], restored.path, benchmark.name)
        journal = Journal(folder, config, restored.path)
        result = benchmark.run(restored, settings, journal)
    summary = {"benchmark": benchmark.name, "checkpoint": str(restored.path), **result.summary}
    # Rank 0 writes the results, and adds them to the run that the checkpoint belongs to.
    if environment.rank() == 0:
        journal.finish(summary, result.images())
        run_dir = restored.path.parent.parent
        if (run_dir / "summary.json").exists():
            update_summary(run_dir, **result.scores)
            write_report(run_dir)
        print(f"{result.text}\n{folder}")
    setup.shutdown()
    return summary


def made(section: Mapping[str, Any]) -> Any:
    """Return the benchmark of a config's section.

    `builder` stays as it is written, constructors too: it is laid over the checkpoint's own.
    """
    own = {key: value for key, value in section.items() if key != "builder"}
    builder = {"builder": section["builder"]} if "builder" in section else {}
    return instantiate({**own, "_partial_": True})(**builder)


def output_folder(output: str | None, checkpoint: Path, name: str) -> Path:
    """Return the folder of the results: `output`, else one beside the run's checkpoints."""
    if output is not None:
        return Path(output).expanduser()
    in_run = checkpoint.parent.name == "checkpoints"
    run = checkpoint.parent.parent if in_run else Path("runs")
    return run / "evaluation" / name / checkpoint.name


if __name__ == "__main__":
    main()
