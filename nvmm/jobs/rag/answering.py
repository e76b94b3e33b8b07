"""Answers to questions behind the contexts that were chosen for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from nvmm.data.samples.forms import Form
from nvmm.data.samples.record import members_of
from nvmm.inference.prefix import saved_tokens
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest
from nvmm.jobs.prompts import asking, batches, build
from nvmm.jobs.rag.questions import Question


@dataclass(frozen=True)
class Shown:
    """What stands before a question. ids: of chunks or a document. error: why nothing can."""

    ids: Sequence[str]
    texts: Sequence[str]
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Answer(Job):
    """Ask a checkpoint every question, greedily.

    A row has `key` (the question's id), `contexts` (ids, in the order of the prompt), `prompt` as
    the checkpoint got it, `text` (its answer), `prompt_tokens`, those of them that a shared prefix
    saved (`saved_tokens`), and `error` (why it has no answer, else null).

    shown: the contexts of each question.
    """

    questions: Sequence[Question]
    shown: Sequence[Shown]
    form: Form
    max_new_tokens: int
    share_prefixes: bool
    batch_size: int
    part_size: int
    name: str = "answer"

    def prepare(self, model: Restored | None) -> Work:
        """Make the prompts' builder; ValueError for an embedder."""
        model = self.require(model)
        asks = asking(model, self.form, self.max_new_tokens)
        room = model.max_sequence_length - self.max_new_tokens
        share = self.share_prefixes

        def members(number: int) -> dict[str, Any]:
            question, shown = self.questions[number], self.shown[number]
            if shown.error is not None:
                raise ValueError(f"{question.id}: {shown.error}")
            contexts = {"contexts": list(shown.texts)} if shown.texts else {}
            return dict(members_of(question.record(**contexts), source=question.id))

        def rows(numbers: range) -> pa.Table:
            prompts, errors = build(members, numbers, asks.prompt, room)
            texts: dict[int, str] = {}
            saved: dict[int, int] = {}
            for chosen in batches(prompts, self.batch_size, share_prefix=share):
                some = [prompts[number] for number in chosen]
                answers = model.generate(some, self.max_new_tokens, share_prefix=share)
                texts |= dict(zip(chosen, answers, strict=True))
                if share:
                    saved |= dict(zip(chosen, saved_tokens(some), strict=True))
            records = []
            for number in numbers:
                prompt = prompts.get(number)
                ids = [] if prompt is None else prompt.text.tokens.tolist()
                records.append(
                    {
                        "key": self.questions[number].id,
                        "contexts": list(self.shown[number].ids),
                        "prompt": model.tokenizer.decode(ids, skip_special_tokens=False),
                        "text": texts.get(number),
                        "prompt_tokens": len(ids),
                        "saved_tokens": saved.get(number, 0),
                        "error": errors.get(number),
                    }
                )
            return pa.Table.from_pylist(records, _SCHEMA)

        asked = [question.record() for question in self.questions]
        contexts = [[list(shown.ids), list(shown.texts), shown.error] for shown in self.shown]
        inputs = {"questions": digest(asked), "contexts": digest(contexts)}
        return Work(len(self.questions), inputs, rows)


_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "contexts": pa.list_(pa.string()),
        "prompt": pa.string(),
        "text": pa.string(),
        "prompt_tokens": pa.int64(),
        "saved_tokens": pa.int64(),
        "error": pa.string(),
    }
)
