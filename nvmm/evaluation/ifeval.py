"""IFEval: whether answers follow the verifiable instructions of their prompts.

Zhou et al. 2023, arXiv:2311.07911. `nvmm.evaluation.instruction_following` says where its verifiers
differ from the authors'.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm.data.prepare.records import read_lines
from nvmm.data.samples.record import plain_question
from nvmm.evaluation.benchmark import (
    Benchmark,
    Example,
    Prediction,
    Questions,
    Result,
    Settings,
    Skipped,
    counted,
)
from nvmm.evaluation.instruction_following import accuracies, follows, follows_loosely

if TYPE_CHECKING:
    from nvmm.data.samples.builder import Builder
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored


@dataclass(frozen=True)
class IFEval(Benchmark):
    """Prompts with verifiable instructions; answered and kept as those of other benchmarks are.

    The scores are the shares of prompts whose instructions are all followed and of instructions
    that are, strictly and loosely; the first one, prompt-level strict, is also a line's score.

    Args:
        path: a .jsonl file in the published layout: prompt, instruction_id_list, kwargs, key.
        max_new_tokens: tokens of the longest answer.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    path: str
    max_new_tokens: int = 1024
    name: str = "ifeval"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Answer the prompts and verify the answers; ranks share the prompts."""
        asked = _Prompts(
            name=self.name,
            shards=self.path,
            metric=all_followed,
            max_new_tokens=self.max_new_tokens,
            builder=self.builder,
        )
        return asked.run(model, settings, journal)


def all_followed(*, prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where every instruction is followed strictly; they are JSON, [id, arguments]."""
    return float(all(follows(prediction, *json.loads(rule)) for rule in answers))


@dataclass(frozen=True)
class Prompts:
    """The records of a file.

    Raises ValueError naming the line of a record without a prompt, or with an instruction that is
    unknown or lacks its arguments.
    """

    path: str

    def __post_init__(self) -> None:
        try:
            lines = list(read_lines(Path(self.path).expanduser()))
        except OSError as error:
            raise ValueError(f"benchmark.path={self.path} cannot be read ({error})") from error
        if not lines:
            raise ValueError(f"benchmark.path={self.path} has no prompts")
        for number, line in enumerate(lines, 1):
            where = f"benchmark.path={self.path}: record {number}"
            names, arguments = line.get("instruction_id_list"), line.get("kwargs")
            if not isinstance(line.get("prompt"), str):
                raise ValueError(f"{where} has no text prompt")
            if not isinstance(names, list) or not names:
                raise ValueError(f"{where} has no instruction_id_list")
            if not isinstance(arguments, list) or len(arguments) != len(names):
                raise ValueError(f"{where}: kwargs must be a list of {len(names)} objects")
            for rule in zip(names, arguments, strict=True):
                try:
                    follows("x", *rule)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
        object.__setattr__(self, "lines", lines)

    lines: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def fingerprint(self) -> list[Any]:
        """What tells these prompts from others."""
        text = json.dumps(self.lines, sort_keys=True)
        return [len(self.lines), hashlib.sha256(text.encode()).hexdigest()]

    def members(self, number: int) -> dict[str, Any]:
        """Return a prompt as the members of a sample."""
        line = self.lines[number]
        rules = zip(line["instruction_id_list"], line["kwargs"], strict=True)
        members = plain_question(line["prompt"], [], self.path)
        key = str(line.get("key", number))
        return {**members, "__url__": self.path, "__key__": key, "rules": list(map(list, rules))}


class _Prompts(Questions):
    """The prompts as questions; the accepted answers of one are its instructions."""

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.path={self.shards}"

    def data(self, model: Restored) -> Prompts:
        """Return the records of the file."""
        return Prompts(str(self.shards))

    def ask(self, members: Mapping[str, Any], builder: Builder) -> Example:
        """Return a prompt."""
        plain = {key: value for key, value in members.items() if key != "rules"}
        rules = [json.dumps(rule) for rule in members["rules"]]
        return Example(builder.prompt(plain), builder.question(plain), rules, "all")

    def result(
        self,
        model: Restored,
        dataset: Any,
        predictions: list[Prediction],
        skipped: list[Skipped],
        settings: Settings,
    ) -> Result:
        """Return the four accuracies, and the strict one of each kind of instruction."""
        strict, loose = [], []
        kinds = defaultdict(list)
        for line in predictions:
            rules = [json.loads(rule) for rule in line.answers]
            strict.append([follows(line.prediction, *rule) for rule in rules])
            loose.append([follows_loosely(line.prediction, *rule) for rule in rules])
            for (name, _), followed in zip(rules, strict[-1], strict=True):
                kinds[name].append(followed)
        scores = dict(
            zip(
                (
                    *("prompt_level_strict", "instruction_level_strict"),
                    *("prompt_level_loose", "instruction_level_loose"),
                ),
                (*accuracies(strict), *accuracies(loose)),
                strict=True,
            )
        )
        each = {name: sum(values) / len(values) for name, values in sorted(kinds.items())}
        text = "\n".join(f"{name:<44} {value:8.4f}" for name, value in {**scores, **each}.items())
        if skipped:
            text += f"\nleft out: {len(skipped)} bad (skipped.jsonl)"
        summary = {"num_samples": len(predictions)} | counted(skipped) | scores
        return Result(summary | {"instructions": each}, {f"{self.name}_accuracy": scores}, text)
