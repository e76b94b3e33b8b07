"""The texts of clips as a template and an augmentation write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from nvmm.data.samples.augmentation import Augmentations, draw
from nvmm.data.samples.record import Record

Interleaved = Literal["similar", "random"]
"""How earlier clips were chosen: they sound like the one that is asked about, or were drawn."""


class Sentences(Protocol):
    """What `written_words` reads of a `ListeningTemplate`."""

    @property
    def few_shot(self) -> str: ...

    @property
    def task(self) -> str: ...

    def written(self, text: str) -> str: ...


@dataclass(frozen=True)
class Clip:
    """A sound (None: text alone), from its second `start` on, its prompt and answer."""

    sound: Any
    start: Any
    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Wording:
    """How the texts of a record are written; see `SoundBuilder`."""

    template: Sentences
    augmentations: Augmentations
    task_probability: float


@dataclass(frozen=True)
class Words:
    """The texts of a sample as they are written.

    few_shot: in front of several clips. task: in front of all. clips: prompt and answer of each;
        the last one of a prompt has no answer.
    """

    few_shot: str
    task: str
    clips: Sequence[tuple[str, str | None]]


def texts(record: Record, name: str) -> list[str]:
    """Return a list of texts of a record; empty where it has none."""
    if record.get(name) is None:
        return []
    return [record.checked_text(name, text) for text in record.sequence(name)]


def written_words(
    record: Record, clips: Sequence[Clip], wording: Wording, suffix: str | None = None
) -> Words:
    """Return the texts of a training example, or of a prompt where there is a suffix.

    Raises BadSample for a record that its template or augmentation cannot write.
    """
    template, ways = wording.template, wording.augmentations
    options = [template.written(label) for label in texts(record, "options")]
    written: list[tuple[str, str | None]] = []
    for place, clip in enumerate(clips, 1):
        key = (record.passing, record.key, str(place))
        way = ways.drawn(*key) if suffix is None else ways.likeliest
        prompt = template.written(clip.prompt)
        answer = None if clip.answer is None else template.written(clip.answer)
        try:
            text = way.prompted(prompt, answer)
            if place == len(clips):
                text += way.choices(options, answer)
        except ValueError as error:
            raise record.bad(str(error)) from error
        if place == len(clips) and suffix is not None:
            written.append((text + template.written(suffix), None))
        else:
            written.append((text, None if answer is None else way.answered(answer, *key)))
    return Words(_few_shot(record, template), _task(record, wording, suffix is not None), written)


def _few_shot(record: Record, template: Sentences) -> str:
    chosen = record.get("interleaved")
    if chosen is None:
        return ""
    if chosen not in get_args(Interleaved):
        listed = ", ".join(get_args(Interleaved))
        raise record.bad(f"interleaved must be one of {listed}, got {chosen!r}")
    return template.few_shot.replace("{interleaved}", chosen)


def _task(record: Record, wording: Wording, is_prompt: bool) -> str:
    """Return the sentence that tells the task, drawn for a training example, or the prefix."""
    prefix, task = record.get("prefix"), record.get("task")
    for name, value in (("prefix", prefix), ("task", task)):
        if value is not None and not isinstance(value, str):
            raise record.bad(f"{name} must be text, got {value!r}")
    if not task:
        return prefix or ""
    if prefix:
        raise record.bad("it has a prefix and a task, whose sentence would be a second one")
    share = wording.task_probability
    told = share > 0 if is_prompt else draw(record.passing, record.key, "task") < share
    return wording.template.task.replace("{task}", task) if told else ""
