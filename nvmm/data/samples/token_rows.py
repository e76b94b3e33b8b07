"""Rows of tokens that are cut already, as `nvmm shard long` writes them, become samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nvmm.batch import Sample, Text
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.record import Fields, Record, check_fields
from nvmm.data.samples.tokenizer import Tokenizer

BEGINS = 32
"""Of so many tokens at its beginning a row gives the text, to be compared with the tokenizer's."""
_NAMES = ("tokens", "spans", "begins")


class TokenRows(Builder):
    """A builder of rows {"tokens", "spans": [{"source", "start", "end"}], "begins"}, all trained.

    separate_documents: false, the whole row attends to itself, over the ends of documents, as
        continued pretraining for long contexts has it. True: every document, with the separator
        behind it, is a text of its own, which attends to itself alone and whose positions begin at
        0; with data.pack=true they share a row as before. Context parallelism pads each of them,
        so that such a row is a little longer than `sequence_length`.
    fields, unread: see `Builder`.
    """

    def __init__(
        self,
        separate_documents: bool = False,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        super().__init__(
            fields, unread=unread, tokenizer=tokenizer, sequence_length=sequence_length
        )
        check_fields(self.fields, _NAMES, unread)
        self.separate_documents = separate_documents

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return a row.

        Raises BadSample for a row that is longer than `sequence_length`, was cut by another
        tokenizer, or whose spans are not in order.
        """
        record = self.record(members)
        ids = record.sequence("tokens")
        if len(ids) > self.sequence_length:
            raise record.bad(
                f"a row of {len(ids)} tokens, and data.sequence_length={self.sequence_length}"
            )
        if not all(type(number) is int for number in ids):
            raise record.bad("tokens must be whole numbers")
        text = self.tokenizer.decode(ids[:BEGINS])
        if text != record.get("begins"):
            raise record.bad(
                f"its tokens are of another tokenizer: here they begin with {text!r}, there with"
                f" {record.get('begins')!r}"
            )
        tokens = torch.tensor(ids)
        cuts = (
            self._starts(record.sequence("spans"), len(ids), record)
            if self.separate_documents
            else [0]
        )
        parts = torch.tensor_split(tokens, cuts[1:])
        texts = tuple(Text(part, torch.ones(len(part))) for part in parts)
        return Sample(texts, source=record.source)

    def _starts(self, spans: Sequence[Any], size: int, record: Record) -> list[int]:
        """Return where documents begin; a separator is of the one before it."""
        starts = [span.get("start", -1) if isinstance(span, Mapping) else -1 for span in spans]
        ascending = all(type(start) is int for start in starts) and sorted(set(starts)) == starts
        if not ascending or starts[0] < 0 or starts[-1] >= size:
            raise record.bad(f"spans must have ascending starts in the row, got {starts[:20]}")
        return [0, *starts[1:]]
