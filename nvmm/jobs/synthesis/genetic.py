"""Genetic Instruct: a population of tasks with solutions that grows by creation and mutation.

The operators are those that Nemotron-4's report names (arXiv:2406.11704, 3.3): creation as in
Self-Instruct, mutation as in WizardCoder, a fitness check by a model, and colonies apart from each
other. Their numbers here are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from nvmm.jobs.synthesis.records import Made, Making, Record, child, source, text_of
from nvmm.jobs.synthesis.step import FORMAT, Desk, Step


class Fitness(BaseModel):
    """Whether a task and its solution may join the population."""

    model_config = ConfigDict(extra="forbid")
    correct: bool
    quality: int


@dataclass(frozen=True, kw_only=True)
class Genetic(Step):
    """Colonies that grow from seeds: records with a `prompt`, and its solution as `answers`.

    In every generation a colony makes `offspring` tasks, has them solved, and takes those that are
    fit. The seeds themselves are no output.

    Args:
        generator, judge: the names of who writes and solves, and who checks.
        colonies, generations, offspring: their numbers.
        seeds: records that a colony begins with, drawn.
        mutation: share of the offspring that mutate one member; the others are created of
            `examples` members.
        mutations: how a task may be changed; one of them is drawn.
        min_quality: the least quality, of 1 to 5, of a fit one.
        create, mutate, solve, judge_prompt: the prompts.
    """

    generator: str
    judge: str
    mutations: Sequence[str]
    colonies: int = 2
    generations: int = 2
    offspring: int = 8
    seeds: int = 8
    mutation: float = 0.5
    examples: int = 3
    min_quality: int = 4
    create: str = "create_task"
    mutate: str = "mutate_task"
    solve: str = "solve_task"
    judge_prompt: str = "fitness"

    def __post_init__(self) -> None:
        for name in ("colonies", "generations", "offspring", "seeds", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.mutation <= 1 or not self.mutations:
            raise ValueError(
                f"mutation={self.mutation} must be 0 to 1, and mutations name at least one"
            )

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.generator, self.judge]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.create, self.mutate, self.solve, self.judge_prompt, FORMAT]

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return (number, seeds) of each colony."""
        if not records:
            return []
        return [
            [number, desk.draw("seeds", number).sample(records, min(self.seeds, len(records)))]
            for number in range(self.colonies)
        ]

    def make(self, item: Any, desk: Desk) -> Making:
        """Let a colony grow."""
        colony, population = item[0], list(item[1])
        records: list[Record] = []
        dropped: list[str] = []
        for generation in range(self.generations):
            draw = desk.draw("generation", colony, generation)
            # 1. New tasks of members of the colony.
            parents, requests = [], []
            for number in range(self.offspring):
                sample = (colony * self.generations + generation) * self.offspring + number
                if draw.random() < self.mutation:
                    chosen = [draw.choice(population)]
                    values: dict[str, Any] = {
                        "task": text_of(chosen[0], "prompt"),
                        "mutation": draw.choice(list(self.mutations)),
                    }
                    request = desk.ask(self.generator, self.mutate, values, sample=sample)
                else:
                    chosen = draw.sample(population, min(self.examples, len(population)))
                    values = {"tasks": [text_of(one, "prompt") for one in chosen]}
                    request = desk.ask(self.generator, self.create, values, sample=sample)
                parents.append(chosen)
                requests.append(request)
            tasks = yield requests
            # 2. Their solutions, and whether both are fit.
            alive = [place for place, task in enumerate(tasks) if task.error is None]
            dropped += [str(task.error) for task in tasks if task.error is not None]
            solutions = yield [
                desk.ask(self.generator, self.solve, {"task": tasks[place].reply.text})
                for place in alive
            ]
            dropped += [str(one.error) for one in solutions if one.error is not None]
            solved = [
                (place, solution)
                for place, solution in zip(alive, solutions, strict=True)
                if solution.error is None
            ]
            checks = yield [
                desk.ask(
                    self.judge,
                    self.judge_prompt,
                    {"task": tasks[place].reply.text, "solution": solution.reply.text},
                    Fitness,
                )
                for place, solution in solved
            ]
            # 3. The fit ones join the colony.
            for (place, solution), check in zip(solved, checks, strict=True):
                task = tasks[place].reply.text
                if check.error is not None:
                    dropped.append(check.error)
                elif not check.value.correct or check.value.quality < self.min_quality:
                    dropped.append(
                        f"unfit: correct={check.value.correct} quality={check.value.quality}"
                    )
                elif any(member["prompt"] == task for member in population):
                    dropped.append(f"twice in a colony: {task[:80]!r}")
                else:
                    fields = {
                        "prompt": task,
                        "answers": [
                            {
                                "text": solution.reply.text,
                                "generator": self.generator,
                                "sample": 0,
                                "scores": {"fitness": float(check.value.quality)},
                            }
                        ],
                    }
                    born = child(
                        desk.step,
                        parents[place],
                        fields,
                        colony=colony,
                        generation=generation,
                        task=source(tasks[place]),
                        solution=source(solution),
                        fitness=source(check),
                    )
                    records.append(born)
                    population.append(born)
        return Made(records, dropped)
