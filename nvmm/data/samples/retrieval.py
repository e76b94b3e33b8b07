"""Contrastive samples: a query, its positive and hard negatives as texts of one `Sample`.

The member `json` holds

- `query`, `positive`, `negatives` (a list, in order of preference);
- optionally `instruction` (the task's, put before the query), `symmetric` (true: before the
  documents too, as NV-Embed does for similarity tasks), `in_batch_negatives` (else the builder's),
  `positive_id` and `negative_ids` (else a document is known by its text), `positive_ids` (every
  document that answers the query, so that none is its negative), `scores` (another model's for
  positive and negatives).

Ids are compared over all datasets of a blend: let each of them begin with its set's name, as
`retrieval_sets.beir` does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from nvmm.batch import NEGATIVE, POSITIVE, QUERY, Sample, Text
from nvmm.config.choices import require
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.record import Fields, Record, check_fields
from nvmm.data.samples.tokenizer import Tokenizer

TEMPLATE = "Instruct: {instruction}\nQuery: "
"""NV-Embed's prefix of a text; a text without an instruction has none."""

FIELDS = (
    *("query", "positive", "negatives", "instruction", "symmetric", "in_batch_negatives"),
    *("positive_id", "negative_ids", "positive_ids", "scores"),
)
Masking = Literal["sentence_transformers", "nv_embed", "mm_embed", "none"]


class RetrievalBuilder(Builder):
    """A builder of samples of 2 + num_negatives texts, each [BOS] instruction text EOS.

    num_negatives: hard negatives of a sample; a record with more gives some of them, drawn by its
        key, one with fewer gives those.
    in_batch_negatives: whether other samples' documents are negatives where a record does not say.
    instruction: the instruction of records that have none; None: no instruction.
    num_answers: ids of `positive_ids` that are kept beside `positive_id`, the first ones of more.
    masking: tokens of an instruction that are not pooled, though all are attended to:
        "sentence_transformers": BOS and the whole prefix, as that library does;
        "nv_embed": as many tokens as the prefix has without BOS, so that its last one is pooled;
        "mm_embed": BOS, the instruction's line and one token more;
        "none": none, every token is pooled. All of a text without an instruction is pooled.
    fields, unread: see `Builder`.
    sequence_length: longest text with BOS and EOS; longer ones lose their end, never EOS.
    """

    extras = frozenset(
        {"role", "document_id", "text_hash", "answers", "in_batch", "teacher", "pool_from"}
    )

    def __init__(
        self,
        num_negatives: int,
        in_batch_negatives: bool,
        instruction: str | None = None,
        masking: Masking = "sentence_transformers",
        num_answers: int = 16,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("masking", masking, Masking)
        if num_negatives < 0 or num_answers < 1:
            raise ValueError(
                f"num_negatives={num_negatives} must be at least 0, num_answers={num_answers} 1"
            )
        super().__init__(
            fields, unread=unread, tokenizer=tokenizer, sequence_length=sequence_length
        )
        check_fields(self.fields, FIELDS, unread)
        self.num_negatives = num_negatives
        self.num_answers = num_answers
        self.in_batch_negatives = in_batch_negatives
        self.instruction = instruction
        self.masking = masking

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training sample: a query, its positive and hard negatives.

        Raises BadSample naming shard and key for a record that lacks a field, has an empty text,
        or more or fewer ids or scores than documents.
        """
        # 1. Read query, documents, and what may come with each document.
        record = self.record(members)
        query = record.text("query")
        if record.get("negatives") is None:
            raise record.missing("negatives")
        negatives = _list(record, "negatives")
        negatives = [record.checked_text("a negative", text) for text in negatives]
        documents = [record.text("positive"), *negatives]
        names = _list(record, "negative_ids") or [None] * len(documents[1:])
        ids = [record.get("positive_id"), *names]
        scores = _list(record, "scores") or [float("nan")] * len(documents)
        if not len(documents) == len(ids) == len(scores):
            raise record.bad(f"{len(documents)} documents, {len(ids)} ids, {len(scores)} scores")
        if not all(isinstance(score, int | float) for score in scores):
            raise record.bad(f"scores must be numbers, got {scores}")
        # 2. Choose negatives: all of them, or as many as fit, drawn by the sample's key.
        negative_numbers = list(range(1, len(documents)))
        if len(negative_numbers) > self.num_negatives:
            draw = random.Random(record.source)
            negative_numbers = sorted(draw.sample(negative_numbers, self.num_negatives))
        chosen = [0, *negative_numbers]
        instruction = self._instruction(record)
        document_instruction = instruction if record.get("symmetric") else None
        in_batch = record.get("in_batch_negatives")
        in_batch = self.in_batch_negatives if in_batch is None else bool(in_batch)
        # 3. List the answers of the query, so that none is its negative in another sample. A
        # document without an id is known by its text.
        known = [text if name is None else name for name, text in zip(ids, documents, strict=True)]
        others = [name for name in _list(record, "positive_ids") if name != known[0]]
        others = others[: self.num_answers]
        answers = torch.full((1 + len(chosen), self.num_answers), _hash(str(known[0])))
        answers[0, : len(others)] = torch.tensor([_hash(str(name)) for name in others])
        # 4. Put query and documents together, in the order that the objective expects.
        roles = [QUERY, POSITIVE] + [NEGATIVE] * (len(chosen) - 1)
        texts = [query, *(documents[i] for i in chosen)]
        names = [query, *(known[i] for i in chosen)]
        teacher = [float("nan"), *(float(scores[i]) for i in chosen)]
        return Sample(
            tuple(
                self._text(
                    *self.encode(text, document_instruction if number else instruction),
                    role=torch.tensor(roles[number]),
                    document_id=torch.tensor(_hash(str(names[number]))),
                    text_hash=torch.tensor(_hash(text)),
                    answers=answers[number],
                    in_batch=torch.tensor(in_batch),
                    teacher=torch.tensor(teacher[number]),
                )
                for number, text in enumerate(texts)
            ),
            source=record.source,
        )

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample's query alone; raise ValueError for a suffix."""
        if suffix:
            raise ValueError(f"a query to embed takes no suffix, got {suffix!r}")
        record = self.record(members)
        return self.text(record.text("query"), self._instruction(record))

    def text(self, text: str, instruction: str | None = None) -> Sample:
        """Return one text to embed, behind an instruction if there is one."""
        return Sample((self._text(*self.encode(text, instruction)),))

    def reads(self, member: str) -> bool:
        """Return whether it is the record's member, or one that `fields` names."""
        return super().reads(member) and member in self.named()

    def blank(self, sample_id: int) -> Sample:
        """Return the sample that stands for a missing one; its negative id keeps it out of the
        loss."""
        text = self._text(
            [self.tokenizer.eos_id],
            0,
            role=torch.tensor(QUERY),
            document_id=torch.tensor(0),
            text_hash=torch.tensor(0),
            answers=torch.zeros(self.num_answers, dtype=torch.long),
            in_batch=torch.tensor(False),
            teacher=torch.tensor(float("nan")),
        )
        return Sample((replace(text, weights=torch.zeros(1)),), sample_id, "blank")

    def measure(self, members: Mapping[str, Any]) -> tuple[int, int]:
        """Return the tokens of all texts, and no tiles."""
        return self(members).num_tokens, 0

    def _instruction(self, record: Record) -> str | None:
        """Return the record's instruction, else the builder's."""
        instruction = record.get("instruction")
        if instruction is None:
            return self.instruction
        if not isinstance(instruction, str):
            raise record.bad(f"instruction must be text, got {instruction!r}")
        return instruction

    def _text(self, ids: list[int], pool_from: int, **extras: torch.Tensor) -> Text:
        tokens = torch.tensor(ids)
        extras["pool_from"] = torch.tensor(pool_from)
        return Text(tokens, torch.ones(len(tokens)), extras=extras)

    def encode(self, text: str, instruction: str | None) -> tuple[list[int], int]:
        """Return token ids with EOS, and BOS where the tokenizer has one; and the position of the
        first pooled token."""
        prefix = TEMPLATE.format(instruction=instruction) if instruction else ""
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = [*begin, *self.tokenizer.encode(prefix + text)][: self.sequence_length - 1]
        ids.append(self.tokenizer.eos_id)
        start = 0
        if instruction and self.masking != "none":
            start = len(self.tokenizer.encode(prefix))
            if self.masking == "sentence_transformers":
                start += len(begin)
            elif self.masking == "mm_embed":
                line = prefix.removesuffix("\nQuery: ")
                start = len(begin) + len(self.tokenizer.encode(line)) + 1
        return ids, min(start, len(ids) - 1)


def _list(record: Record, name: str) -> list[Any]:
    """Return a list of a record, empty where it has none."""
    values = record.get(name)
    if values is not None and not isinstance(values, list):
        raise record.bad(f"{name} must be a list, got {values!r}")
    return values or []


def _hash(text: str) -> int:
    """Return an int64 that stands for a text, since tensors hold no text."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
