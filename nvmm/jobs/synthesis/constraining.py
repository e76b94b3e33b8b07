"""Steps that add instructions which can be verified."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2.sandbox

from nvmm.config.choices import require
from nvmm.evaluation.instruction_following import follows
from nvmm.jobs.synthesis.records import Made, child, conversation_of
from nvmm.jobs.synthesis.step import Desk, Local

Binding = Literal["answer", "all"]
_KEYS = {"text", "arguments", "alone"}


@dataclass(frozen=True, kw_only=True)
class Constrain(Local):
    """Prompts with verifiable instructions.

    The record gets `prompt` and, as IFEval's files have them, `instruction_id_list` and `kwargs`.
    Where its `messages` end with an answer, the instructions are a turn behind them that asks to
    revise that answer, and the record has `messages` instead.

    Args:
        instructions: id (of `nvmm.evaluation.instruction_following`) -> {text: how a user says it,
            a template of the arguments; arguments: {name: values to draw from, templates of the
            record}; alone: true where it goes with no other}.
        most: a record gets between 1 and so many, of different groups (what is before the colon).
        binding: what they are about: the next `answer`, or `all` answers of the dialogue.
        prompt: joins a prompt and the instructions. revise: asks to revise an answer.
    """

    instructions: Mapping[str, Mapping[str, Any]]
    most: int = 2
    binding: Binding = "answer"
    prompt: str = "constrained"
    revise: str = "revise"

    def __post_init__(self) -> None:
        require("binding", self.binding, Binding)
        if self.most < 1 or not self.instructions:
            raise ValueError(f"most={self.most} must be at least 1, and instructions not empty")
        for name, said in self.instructions.items():
            if "text" not in said or not said.keys() <= _KEYS:
                raise ValueError(
                    f"instructions.{name} has {sorted(said)}; it must have text, and may have"
                    " arguments and alone"
                )
            draw = random.Random(0)
            # A wrong id or argument is noticed now, and not by an answer that was paid for.
            follows("x", name, {key: draw.choice(list(values)) for key, values in _choices(said)})

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.prompt, self.revise]

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the record with instructions that are drawn for it."""
        draw = desk.draw(item["id"])
        chosen = self._drawn(draw)
        sandbox = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)
        texts, arguments = [], []
        for name in chosen:
            values = {
                key: _rendered(sandbox, draw.choice(list(choices)), item, desk)
                for key, choices in _choices(self.instructions[name])
            }
            arguments.append(values)
            texts.append(_rendered(sandbox, self.instructions[name]["text"], values, desk))
        fields: dict[str, Any] = {
            "instruction_id_list": chosen,
            "kwargs": arguments,
            "binding": self.binding,
        }
        messages = item.get("messages")
        if messages and messages[-1]["role"] == "assistant":
            text = desk.write(self.revise, {"instructions": texts})
            fields["messages"] = [*messages, {"role": "user", "content": text}]
        else:
            values = {**item, "instructions": texts, "binding": self.binding}
            turns = conversation_of(item)
            values["prompt"] = turns[-1]["content"]
            turns[-1] = {"role": "user", "content": desk.write(self.prompt, values)}
            if messages:
                fields["messages"] = turns
            else:
                fields["prompt"] = turns[0]["content"]
        return Made([child(desk.step, [item], fields, instructions=chosen)])

    def _drawn(self, draw: random.Random) -> list[str]:
        """Return one to `most` ids, of different groups."""
        names = list(self.instructions)
        draw.shuffle(names)
        wanted = draw.randint(1, self.most)
        if self.instructions[names[0]].get("alone"):
            return names[:1]
        chosen: dict[str, str] = {}
        for name in names:
            if not self.instructions[name].get("alone") and len(chosen) < wanted:
                chosen.setdefault(name.partition(":")[0], name)
        return list(chosen.values())


def _choices(said: Mapping[str, Any]) -> list[tuple[str, Sequence[Any]]]:
    return list((said.get("arguments") or {}).items())


def _rendered(
    sandbox: jinja2.Environment, value: Any, values: Mapping[str, Any], desk: Desk
) -> Any:
    """Return a value in which every text, also of a list, is rendered."""
    if isinstance(value, list | tuple):
        return [_rendered(sandbox, one, values, desk) for one in value]
    if not isinstance(value, str):
        return value
    try:
        return sandbox.from_string(value).render(values)
    except jinja2.TemplateError as error:
        raise ValueError(f"job.steps.{desk.step}.instructions: {value!r}: {error}") from error
