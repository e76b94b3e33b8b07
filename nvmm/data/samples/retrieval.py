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
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from nvmm.batch import NEGATIVE, POSITIVE, QUERY, Sample
from nvmm.choices import require
from nvmm.data.samples.tokenizer import Tokenizer

TEMPLATE = "Instruct: {instruction}\nQuery: "
"""NV-Embed's; a text without an instruction has nothing before it."""

Masking = Literal["sentence_transformers", "nv_embed", "mm_embed", "none"]


class RetrievalBuilder:
    """Builds samples of 2 + num_negatives texts, each [BOS] instruction text EOS.

    num_negatives: hard negatives of a sample; a record with more gives some of them, drawn by its
        key, one with fewer gives those.
    in_batch_negatives: whether other samples' documents are negatives where a record does not say.
    instruction: where a record brings none; None: no instruction.
    num_answers: ids of `positive_ids` that are kept beside `positive_id`; of more, the first ones.
    masking: which of an instruction's tokens are not pooled (all are attended to):
        "sentence_transformers": BOS and the whole prefix, as that library does;
        "nv_embed": as many tokens as the prefix has without BOS, so that its last one is pooled;
        "mm_embed": BOS, the instruction's line and one token more;
        "none": every token is pooled. Texts without an instruction are pooled whole.
    sequence_length: longest text with BOS and EOS; longer ones lose their end, never EOS.
    """

    def __init__(
        self,
        num_negatives: int,
        in_batch_negatives: bool,
        instruction: str | None = None,
        masking: Masking = "sentence_transformers",
        num_answers: int = 16,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("masking", masking, Masking)
        if num_negatives < 0 or num_answers < 1:
            raise ValueError(
                f"num_negatives={num_negatives} must be at least 0, num_answers={num_answers} 1"
            )
        self.num_negatives = num_negatives
        self.num_answers = num_answers
        self.in_batch_negatives = in_batch_negatives
        self.instruction = instruction
        self.masking = masking
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """One training sample. Raises ValueError naming shard and key for a record that lacks a
        field, has an empty text, or more or fewer ids or scores than documents."""
        source, record = _source(members), _record(members)
        documents = [record["positive"], *record["negatives"]]
        ids = [record.get("positive_id"), *(record["negative_ids"] or [None] * len(documents[1:]))]
        scores = record["scores"] or [float("nan")] * len(documents)
        if not len(documents) == len(ids) == len(scores):
            raise ValueError(
                f"{source}: {len(documents)} documents, {len(ids)} ids, {len(scores)} scores"
            )
        chosen = [0, *self._choose(len(documents) - 1, source)]
        texts = [record["query"], *(documents[i] for i in chosen)]
        roles = [QUERY, POSITIVE] + [NEGATIVE] * (len(chosen) - 1)
        instruction = record.get("instruction", self.instruction)
        both = instruction if record.get("symmetric") else None
        encoded = [self.encode(text, both if i else instruction) for i, text in enumerate(texts)]
        in_batch = bool(record.get("in_batch_negatives", self.in_batch_negatives))
        known = [text if name is None else name for name, text in zip(ids, documents, strict=True)]
        names = [record["query"], *(known[i] for i in chosen)]
        others = [name for name in record["positive_ids"] if name != known[0]][: self.num_answers]
        answers = torch.full((len(texts), self.num_answers), _hash(str(known[0])))
        answers[0, : len(others)] = torch.tensor([_hash(str(name)) for name in others])
        return _sample(
            encoded,
            source,
            {
                "role": torch.tensor(roles),
                "document_id": torch.tensor([_hash(str(name)) for name in names]),
                "text_hash": torch.tensor([_hash(text) for text in texts]),
                "answers": answers,
                "in_batch": torch.full((len(texts),), in_batch),
                "teacher": torch.tensor([float("nan"), *(float(scores[i]) for i in chosen)]),
            },
        )

    def prompt(self, members: Mapping[str, Any]) -> Sample:
        """The sample's query alone."""
        record = _record(members)
        return self.text(record["query"], record.get("instruction", self.instruction))

    def text(self, text: str, instruction: str | None = None) -> Sample:
        """One text to embed, after an instruction where it is given."""
        return _sample([self.encode(text, instruction)], "", {})

    def blank(self, sample_id: int) -> Sample:
        """What stands for a missing sample; its negative id keeps it out of the loss."""
        unknown = {name: torch.tensor([0]) for name in ("document_id", "text_hash")}
        extras = {
            "role": torch.tensor([QUERY]),
            **unknown,
            "answers": torch.zeros(1, self.num_answers, dtype=torch.long),
            "in_batch": torch.tensor([False]),
            "teacher": torch.tensor([float("nan")]),
        }
        sample = _sample([([self.tokenizer.eos_id], 0)], "blank", extras)
        return replace(sample, sample_id=sample_id, loss_mask=torch.zeros(1))

    def encode(self, text: str, instruction: str | None) -> tuple[list[int], int]:
        """Token ids with BOS (where the tokenizer has one) and EOS, and the first pooled place."""
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

    def _choose(self, available: int, source: str) -> list[int]:
        """Places of the chosen negatives among the documents."""
        places = list(range(1, available + 1))
        if available > self.num_negatives:
            places = sorted(random.Random(source).sample(places, self.num_negatives))
        return places


def _sample(
    encoded: Sequence[tuple[list[int], int]], source: str, extras: dict[str, torch.Tensor]
) -> Sample:
    tokens = torch.tensor([token for ids, _ in encoded for token in ids])
    return Sample(
        tokens=tokens,
        loss_mask=torch.ones(len(tokens)),
        media={},
        sample_id=0,
        source=source,
        segments=tuple(len(ids) for ids, _ in encoded),
        extras=extras | {"pool_from": torch.tensor([start for _, start in encoded])},
    )


def _source(members: Mapping[str, Any]) -> str:
    return f"{members.get('__url__', '')}:{members.get('__key__', '')}"


def _record(members: Mapping[str, Any]) -> dict[str, Any]:
    source = _source(members)
    try:
        record = json.loads(members["json"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: no readable member json ({error!r})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{source}: must be an object, got {type(record).__name__}")
    for name in ("negatives", "negative_ids", "positive_ids", "scores"):
        value = record.get(name)
        if value is None and name != "negatives":
            record[name] = []
        elif not isinstance(value, list):
            raise ValueError(f"{source}: {name} must be a list, got {value!r}")
    texts = [record.get("query"), record.get("positive"), *record["negatives"]]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{source}: query, positive and negatives must be texts that are not empty"
        )
    if not all(isinstance(score, int | float) for score in record["scores"]):
        raise ValueError(f"{source}: scores must be numbers, got {record['scores']}")
    return record


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
