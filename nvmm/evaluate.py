"""Score a checkpoint: `python -m nvmm.evaluate checkpoint=DIR benchmark=NAME`.

Alone or under torchrun. Any tensor and pipeline parallel size serves, whatever the checkpoint was
trained with; what is left of the world is data parallel and shares the questions.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm.config import compose
from nvmm.config.compose import instantiate, refusals
from nvmm.inference.restore import Restored, restore
from nvmm.parallel import environment

if TYPE_CHECKING:
    from nvmm.evaluation.benchmark import Benchmark, Prediction

_LINE_SECONDS = 10.0


def main() -> None:
    """Compose, check, evaluate. Exits with compose.BAD_CONFIG when the config is refused."""
    sys.argv[1:] = [compose.argument(text) for text in sys.argv[1:]]
    job = compose.load("evaluate")
    if job is None:
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(evaluate)(job)


def evaluate(job: compose.Job) -> dict[str, Any]:
    """Answer and score one benchmark on all ranks; returns the summary that metrics.json holds."""
    from nvmm.data.shards.dataset import Dataset
    from nvmm.evaluation.benchmark import summarize, table
    from nvmm.parallel import setup
    from nvmm.report.page import write_report
    from nvmm.training.summary import update_summary

    compose.log_to_stderr()
    config = job.config
    with refusals("evaluate"):
        benchmark = instantiate(config["benchmark"])
        if config["max_new_tokens"] is not None:
            benchmark = replace(benchmark, max_new_tokens=config["max_new_tokens"])
        restored = restore(config, benchmark.builder)
        dataset = Dataset(benchmark.shards, restored.builder)
        num_samples = len(dataset)
        if config["num_samples"] is not None:
            num_samples = min(num_samples, config["num_samples"])
    predictions = answer(restored, benchmark, dataset, num_samples, config)
    summary = {
        "benchmark": benchmark.name,
        "checkpoint": str(restored.path),
        **summarize(predictions),
    }
    if environment.rank() == 0:
        folder = output_folder(config["output"], restored.path, benchmark.name)
        _write(folder, predictions, summary, _pictures(restored, dataset, predictions))
        run_dir = restored.path.parent.parent
        if (run_dir / "summary.json").exists():
            kinds = {kind: part["score"] for kind, part in summary["kinds"].items()}
            scores = {"overall": summary["score"], **kinds}
            update_summary(run_dir, **{f"{benchmark.name}_{benchmark.metric_name}": scores})
            write_report(run_dir)
        print(f"{table(summary, benchmark.name)}\n{folder}")
    setup.shutdown()
    return summary


def answer(
    restored: Restored,
    benchmark: Benchmark,
    dataset: Any,
    num_samples: int,
    config: Mapping[str, Any],
) -> list[Prediction]:
    """The first `num_samples` questions answered by all ranks together, in order on every rank."""
    from megatron.core import parallel_state

    from nvmm.evaluation.benchmark import Prediction
    from nvmm.inference.decoding import deal, gather

    mine = deal(
        num_samples,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    found: list[Prediction] = []
    say = _Progress(len(mine))
    for start in range(0, len(mine), config["batch_size"]):
        numbers = mine[start : start + config["batch_size"]]
        examples = [benchmark.ask(dataset.members(number)) for number in numbers]
        prompts = [
            replace(restored.builder.prompt(example.members), sample_id=number)
            for example, number in zip(examples, numbers, strict=True)
        ]
        texts = restored.texts(prompts, benchmark.max_new_tokens, config)
        for prompt, example, text in zip(prompts, examples, texts, strict=True):
            answers = restored.builder.references(example.members)
            found.append(
                Prediction(
                    sample_id=prompt.sample_id,
                    source=prompt.source,
                    kind=example.kind,
                    question=example.question,
                    answers=answers,
                    prediction=text,
                    score=benchmark.score(text, answers, example.kind),
                )
            )
        say(len(found))
    return gather(found, num_samples)


def output_folder(given: str | None, checkpoint: Path, name: str) -> Path:
    """Where results go: `given`, else beside the run's checkpoints."""
    if given is not None:
        return Path(given).expanduser()
    inside = checkpoint.parent.name == "checkpoints"
    run = checkpoint.parent.parent if inside else Path("runs")
    return run / "evaluation" / name / checkpoint.name


def _pictures(
    restored: Restored, dataset: Any, predictions: Sequence[Prediction]
) -> dict[int, dict[str, Any]]:
    """Pictures and tiles of the first few samples that have any, for the report."""
    import torch

    from nvmm.batch import ATTENDED
    from nvmm.report.page import MAX_PICTURES, picture_fields

    fields = {}
    for prediction in predictions[:MAX_PICTURES]:
        members = dataset.members(prediction.sample_id)
        # Tiles may be in the sequence or outside of it; a thumbnail comes after its tiles.
        media = restored.builder.prompt(members).text.media
        kinds = [kind for kind in media if kind.modality == "image"]
        kinds.sort(key=lambda kind: kind.placement != ATTENDED)
        parts = [media[kind] for kind in kinds]
        if parts:
            names = ("values", "items", "tiles")
            whole: dict[str, Any] = {
                name: torch.cat([getattr(part, name) for part in parts]) for name in names
            }
            fields[prediction.sample_id] = picture_fields(members, replace(parts[0], **whole))
    return fields


def _write(
    folder: Path,
    predictions: Sequence[Prediction],
    summary: Mapping[str, Any],
    pictures: Mapping[int, Mapping[str, Any]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in predictions:
            line = asdict(prediction) | dict(pictures.get(prediction.sample_id, {}))
            file.write(json.dumps(line) + "\n")
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


class _Progress:
    """Says how far rank 0 is, at most every ten seconds and at the end."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.started = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if environment.rank() or (now - self.last < _LINE_SECONDS and done < self.total):
            return
        self.last = now
        left = (now - self.started) / done * (self.total - done)
        print(f"evaluate: {done}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
