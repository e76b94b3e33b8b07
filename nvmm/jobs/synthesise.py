"""Synthetic data: a pipeline of steps, each of which makes records of those before it.

A step is a job: its rows lie in parts in the folder `steps/NAME` of the output, so that a pipeline
that was killed goes on, and one with another step is refused. All ranks work on a part together.
Answers are in the cache besides, so that a part which was half done asks nothing twice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch.distributed as dist

from nvmm.io import files
from nvmm.jobs import job as jobs
from nvmm.jobs.job import Job, Work
from nvmm.jobs.parts import Parts
from nvmm.jobs.synthesis.asking import Asking, Source, on_first_rank
from nvmm.jobs.synthesis.cache import Cache
from nvmm.jobs.synthesis.records import Answer, Failed, Made, Record, Request, canonical, digest
from nvmm.jobs.synthesis.step import Desk, Step

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "records": pa.list_(pa.string()),
        "dropped": pa.list_(pa.string()),
        "answers": pa.list_(
            pa.struct(
                {
                    "key": pa.string(),
                    "generator": pa.string(),
                    "input_tokens": pa.int64(),
                    "output_tokens": pa.int64(),
                }
            )
        ),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class Synthesise:
    """A pipeline.

    Args:
        steps: name -> step, in their order. A step takes the records of the one before it, or of
            those that its `after` names.
        generators: name -> who answers: an Endpoint, the command's Checkpoint, a RewardCheckpoint.
        prompts: name -> jinja2 template.
        seed: of what steps draw.
        max_attempts: answers that are asked for until one is the JSON that a step wants.
        cache: folder of the answers; null: `cache` in the output. Pipelines may share one.
    """

    steps: Mapping[str, Step]
    generators: Mapping[str, Source]
    prompts: Mapping[str, str]
    seed: int = 1234
    max_attempts: int = 3
    cache: str | None = None
    name: str = "synthesise"
    build: Mapping[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.steps or self.max_attempts < 1:
            raise ValueError(
                f"job.steps must name at least one step, and max_attempts={self.max_attempts} be at"
                " least 1"
            )
        earlier: list[str] = []
        for name, step in self.steps.items():
            if Path(name).name != name or name.startswith("."):
                raise ValueError(f"job.steps.{name}: the name must be one of a folder")
            for what, wanted, known in (
                ("after", step.after or (), earlier),
                ("generator", step.generators, self.generators),
                ("prompt", step.asks, self.prompts),
            ):
                for one in wanted:
                    if one not in known:
                        there = ", ".join(known) or "none"
                        raise ValueError(f"job.steps.{name}: no {what} {one!r}; there are {there}")
            earlier.append(name)
        # A generator that nobody asks is a mistake in a name.
        used = {name for step in self.steps.values() for name in step.generators}
        unused = sorted(self.generators.keys() - used)
        if unused:
            raise ValueError(f"job.generators.{unused[0]}: no step asks it; take it out")

    def run(
        self, settings: Mapping[str, Any], model: Restored | None, output: str | Path
    ) -> dict[str, Any]:
        """Run the steps that are not whole, and write the shards; collective.

        Returns the summary of `nvmm.jobs.job.run`, over all steps; summary.json has the counts of
        every step. `requests` is what this command did, and stands in no file.

        settings: what of the command answers of a checkpoint depend on, besides it.

        Raises ValueError where the folder belongs to another pipeline, or another process works in
        it; OSError where an endpoint gives no answer for now.
        """
        folder = Path(output).expanduser()
        settings = {key: value for key, value in settings.items() if key != "job"}
        asking = self._asking(folder, settings, model)
        made: dict[str, list[Record]] = {}
        counts: dict[str, dict[str, Any]] = {}
        tables: list[pa.Table] = []
        written, bad, first_error = 0, 0, None
        with _alone(folder):
            for number, (name, step) in enumerate(self.steps.items()):
                before = list(self.steps)[number - 1 : number] if step.after is None else step.after
                records = [record for one in before for record in made[one]]
                desk = Desk(name, self.prompts, self.seed)
                rows = _Rows(name, step, desk, records, asking)
                if not rows.items:
                    raise ValueError(f"job.steps.{name} has nothing to work on: no record is left")
                in_process = any(self.generators[one].in_process for one in step.generators)
                summary = jobs.run(
                    rows,
                    self._settings(step, asking, settings if in_process else {}),
                    model if in_process else None,
                    folder / "steps" / name,
                )
                table = Parts(folder / "steps" / name).read(verify=False)
                made[name] = [
                    json.loads(text) for texts in table["records"].to_pylist() for text in texts
                ]
                tables.append(table)
                counts[name] = {
                    "items": len(table),
                    "records": len(made[name]),
                    "dropped": sum(map(len, table["dropped"].to_pylist())),
                    "errors": summary["bad"],
                    **self._usage([table]),
                }
                written += summary["written"]
                bad += summary["bad"]
                first_error = first_error or summary["first_error"]
                paths = on_first_rank(partial(step.finish, made[name], folder))
                counts[name] |= {"files": [str(path.relative_to(folder)) for path in paths]}
            total = self._usage(tables)
            if dist.get_rank() == 0:
                files.write(
                    folder / "summary.json",
                    json.dumps({"steps": counts, "total": total}, indent=2) + "\n",
                )
        return {
            "folder": str(folder),
            "rows": sum(count["items"] for count in counts.values()),
            "written": written,
            "bad": bad,
            "first_error": first_error,
            "metrics": {
                **{
                    f"{name} {what}": count[what]
                    for name, count in counts.items()
                    for what in ("records", "dropped", "errors")
                    if what == "records" or count[what]
                },
                **total,
            },
            "requests": dict(asking.counts),
        }

    def _asking(self, folder: Path, settings: Mapping[str, Any], model: Restored | None) -> Asking:
        """Return the generators behind the cache."""
        if model is not None and not any(one.in_process for one in self.generators.values()):
            raise ValueError("no generator is a checkpoint; leave checkpoint= out")
        asked = {}
        for name, source in self.generators.items():
            asked[name] = dict(source.identity)
            if source.in_process:
                if model is None:
                    raise ValueError(
                        f"job.generators.{name} is {type(source).__name__}: give checkpoint=DIR"
                    )
                asked[name] |= {"checkpoint": digest([jobs.identity(model), dict(settings)])}
        cache = folder / "cache" if self.cache is None else Path(self.cache).expanduser()
        return Asking(self.generators, Cache(cache, asked), self.max_attempts, model)

    def _settings(self, step: Step, asking: Asking, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a step's rows depend on besides its items: keys of its manifest."""
        identities = asking.cache.identities
        whole = {
            "step": step.settings() | {"part_size": None},
            "prompts": {name: self.prompts[name] for name in step.asks},
            "generators": {name: identities[name] for name in step.generators},
            "seed": self.seed,
            "max_attempts": self.max_attempts if step.generators else None,
            "command": dict(settings),
        }
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain

    def _usage(self, tables: list[pa.Table]) -> dict[str, Any]:
        """Return how many answers rows have used, their tokens and their cost; equal ones once."""
        seen = {
            answer["key"]: answer
            for table in tables
            for answers in table["answers"].to_pylist()
            for answer in answers
        }
        cost = 0.0
        for answer in seen.values():
            prices = self.generators[answer["generator"]].prices
            cost += answer["input_tokens"] * prices[0] + answer["output_tokens"] * prices[1]
        return {
            "answers": len(seen),
            "input_tokens": sum(answer["input_tokens"] for answer in seen.values()),
            "output_tokens": sum(answer["output_tokens"] for answer in seen.values()),
            "cost": round(cost / 1e6, 6),
        }


class _Rows(Job):
    """A step as a job: a row an item, with the records that it became."""

    def __init__(
        self, name: str, step: Step, desk: Desk, records: list[Record], asking: Asking
    ) -> None:
        self.name, self.part_size = name, step.part_size
        self.step, self.desk, self.asking = step, desk, asking
        self.items = step.items(records, desk)

    def prepare(self, model: Restored | None) -> Work:
        """Return the work on all items, which all ranks do together."""
        return Work(len(self.items), digest(self.items), self._rows, together=True)

    def _rows(self, numbers: range) -> pa.Table:
        """Work on items in rounds: what they all ask now is asked together."""
        rows: dict[int, dict[str, Any]] = {
            number: {"key": str(number), "records": [], "dropped": [], "answers": []}
            for number in numbers
        }
        running = {number: self.step.make(self.items[number], self.desk) for number in numbers}
        told: dict[int, list[Answer] | None] = dict.fromkeys(numbers)
        while running:
            asked: dict[int, list[Request]] = {}
            for number, work in list(running.items()):
                try:
                    answers = told[number]
                    asked[number] = next(work) if answers is None else work.send(answers)
                except StopIteration as stop:
                    made: Made = stop.value
                    rows[number]["records"] = list(map(canonical, made.records))
                    rows[number]["dropped"] = made.dropped
                    del running[number]
                except Failed as failure:
                    rows[number]["error"] = str(failure)
                    del running[number]
            answers_of = self._asked(asked)
            for number, answers in answers_of.items():
                told[number] = answers
                rows[number]["answers"] += [use for answer in answers for use in answer.used]
        return pa.Table.from_pylist([rows[number] for number in numbers], _SCHEMA)

    def _asked(self, asked: Mapping[int, list[Request]]) -> dict[int, list[Answer]]:
        """Ask the requests of all items at once; return the answers of each."""
        flat = [request for requests in asked.values() for request in requests]
        answers = iter(self.asking(flat) if flat else [])
        return {number: [next(answers) for _ in requests] for number, requests in asked.items()}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other pipelines out of a folder; every rank raises ValueError where one works in it."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(jobs.alone(folder))

        on_first_rank(enter)
        yield
