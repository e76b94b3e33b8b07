"""Contrastive samples: a query, its positive and hard negatives as texts of one `Sample`.

The member `json` holds

- `query`, `positive`, `negatives` (a list, in order of preference);
- of a builder with `dialogue`, `messages` instead of `query`: turns, the last one the user's;
- optionally `instruction` (the task's, put before the query), `symmetric` (true: before the
  documents too, as NV-Embed does for similarity tasks), `in_batch_negatives` (else the builder's),
  `positive_id` and `negative_ids` (else a document is known by its text), `positive_ids` (every
  document that answers the query, so that none is its negative), `scores` (another model's for
  positive and negatives);
- of a builder with `tokens_per_tile`, `query_image`, `positive_image` and `negative_images` (a list
  as long as `negatives`): names of members, such as `query.jpg`, or null. A query or document with
  a picture may have an empty text, or null.

Ids are compared over all datasets of a blend: let each of them begin with its set's name, as
`retrieval_sets.beir` does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from nvmm.batch import IMAGE, NEGATIVE, POSITIVE, QUERY, MediaKind, Sample, Text, TextMedia
from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.dialogue import Dialogue
from nvmm.data.samples.images import Tiles, tile_image
from nvmm.data.samples.record import Fields, Record, check_fields, is_picture
from nvmm.data.samples.tokenizer import Tokenizer

TEMPLATE = "Instruct: {instruction}\nQuery: "
"""NV-Embed's prefix of a text; a text without an instruction has none."""

FIELDS = (
    *(
        "query",
        "messages",
        "positive",
        "negatives",
        "instruction",
        "symmetric",
        "in_batch_negatives",
    ),
    *("positive_id", "negative_ids", "positive_ids", "scores"),
    *("query_image", "positive_image", "negative_images"),
)
Masking = Literal["sentence_transformers", "nv_embed", "mm_embed", "none"]


@dataclass(frozen=True)
class Content:
    """A query or document: a text, a picture, or both.

    key: stands for the picture's bytes, so that two contents of one picture are known as one.
    """

    text: str
    image: Image.Image | None = None
    key: str = ""

    @property
    def name(self) -> str:
        """A text that only this content has."""
        return f"{self.text}\0{self.key}" if self.key else self.text


class RetrievalBuilder(Builder):
    """A builder of samples of 2 + num_negatives texts, each [BOS] instruction [picture] text EOS.

    A picture's places come before the text and a line break (MM-Embed), after the instruction.

    num_negatives: hard negatives of a sample; a record with more gives some of them, drawn by its
        key, one with fewer gives those. 0: a record with negatives is bad.
    in_batch_negatives: whether other samples' documents are negatives where a record does not say.
    instruction: the instruction of records that have none; None: no instruction.
    query_prefix, document_prefix: plain text before every query, and before every document (E5:
        "query: ", "passage: "). It stands behind an instruction and is pooled with the text.
    dialogue: the form of queries that are dialogues, `nvmm.data.samples.dialogue.Dialogue`: of
        `messages`, or rendered before as `query` or a text to embed; None: queries are plain texts.
    num_answers: most ids of `positive_ids` beside `positive_id`; a record with more is bad, as an
        answer would be a negative.
    masking: tokens of an instruction that are not pooled, though all are attended to:
        "sentence_transformers": BOS and the whole prefix, as that library does;
        "nv_embed": as many tokens as the prefix has without BOS, so that its last one is pooled;
        "mm_embed": BOS, the instruction's line and one token more;
        "none": none, every token is pooled. All of a text without an instruction is pooled.
    tokens_per_tile: places of a tile of a picture; None: the samples have no pictures.
    tile_size, max_tiles, use_thumbnail: as InstructBuilder's. 1 tile: a plain resize to a square.
    fields, unread: see `Builder`.
    sequence_length: longest text with BOS and EOS; longer ones lose their end, never EOS, and never
        a part of a picture.
    """

    extras = frozenset(
        {"role", "document_id", "text_hash", "answers", "in_batch", "teacher", "pool_from"}
    )

    query_prefix = ""
    document_prefix = ""
    dialogue: Dialogue | None = None
    tokens_per_tile: int | None = None
    tile_size: int
    max_tiles: int
    use_thumbnail: bool

    def __init__(
        self,
        num_negatives: int,
        in_batch_negatives: bool,
        instruction: str | None = None,
        masking: Masking = "sentence_transformers",
        num_answers: int = 16,
        tokens_per_tile: int | None = None,
        tile_size: int = 336,
        max_tiles: int = 1,
        use_thumbnail: bool = True,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        query_prefix: str = "",
        document_prefix: str = "",
        dialogue: Dialogue | None = None,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("masking", masking, Masking)
        if num_negatives < 0 or num_answers < 1:
            raise ValueError(
                f"num_negatives={num_negatives} must be at least 0, num_answers={num_answers} 1"
            )
        if tokens_per_tile is not None and min(tokens_per_tile, tile_size, max_tiles) < 1:
            raise ValueError(
                f"tokens_per_tile={tokens_per_tile}, tile_size={tile_size}, max_tiles={max_tiles}:"
                " all must be at least 1"
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
        # Attributes that are always there would change the digest of token counts.
        if query_prefix:
            self.query_prefix = query_prefix
        if document_prefix:
            self.document_prefix = document_prefix
        if dialogue is not None:
            self.dialogue = dialogue
        elif "messages" in self.fields:
            raise ValueError("build.fields.messages is read with build.dialogue alone; give both")
        if tokens_per_tile is not None:
            self.tokens_per_tile = tokens_per_tile
            self.tile_size = tile_size
            self.max_tiles = max_tiles
            self.use_thumbnail = use_thumbnail

    @property
    def media(self) -> frozenset[MediaKind]:
        """Images in the sequence, where `tokens_per_tile` is given."""
        return frozenset() if self.tokens_per_tile is None else frozenset({IMAGE})

    @property
    def most_texts(self) -> int:
        """Query, positive and negatives."""
        return 2 + self.num_negatives

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training sample: a query, its positive and hard negatives.

        Raises BadSample naming shard and key for a record that lacks a field, has an empty text,
        or more or fewer ids or scores than documents.
        """
        # 1. Read query, documents, and what may come with each document.
        record = self.record(members)
        if record.get("negatives") is None and self.num_negatives:
            raise record.missing("negatives")
        negatives = _list(record, "negatives")
        if negatives and not self.num_negatives:
            raise record.bad(
                f"{len(negatives)} negatives, of which data.train.build.num_negatives=0 uses none;"
                " to leave them out, list negatives, negative_ids and negative_images in"
                " data.train.build.unread"
            )
        images = _list(record, "negative_images") or [None] * len(negatives)
        if len(images) != len(negatives):
            raise record.bad(f"{len(negatives)} negatives, {len(images)} negative_images")
        query = self._query(record)
        documents = [
            self._content(record, "positive", record.get("positive"), record.get("positive_image")),
            *(
                self._content(record, "a negative", text, image)
                for text, image in zip(negatives, images, strict=True)
            ),
        ]
        self._refuse_unnamed(record)
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
        known = [
            doc.name if name is None else name for name, doc in zip(ids, documents, strict=True)
        ]
        others = [name for name in _list(record, "positive_ids") if name != known[0]]
        if len(others) > self.num_answers:
            raise record.bad(
                f"{len(others)} positive_ids beside its positive, which"
                f" data.train.build.num_answers={self.num_answers} cannot all hold"
            )
        answers = torch.full((1 + len(chosen), self.num_answers), _hash(str(known[0])))
        answers[0, : len(others)] = torch.tensor([_hash(str(name)) for name in others])
        # 4. Put query and documents together, in the order that the objective expects.
        roles = [QUERY, POSITIVE] + [NEGATIVE] * (len(chosen) - 1)
        contents = [query, *(documents[i] for i in chosen)]
        names = [query.name, *(known[i] for i in chosen)]
        teacher = [float("nan"), *(float(scores[i]) for i in chosen)]
        return Sample(
            tuple(
                self._text(
                    content,
                    document_instruction if number else instruction,
                    record.source,
                    roles[number],
                    document_id=torch.tensor(_hash(str(names[number]))),
                    text_hash=torch.tensor(_hash(content.name)),
                    answers=answers[number],
                    in_batch=torch.tensor(in_batch),
                    teacher=torch.tensor(teacher[number]),
                )
                for number, content in enumerate(contents)
            ),
            source=record.source,
        )

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample's query alone; raise ValueError for a suffix."""
        if suffix:
            raise ValueError(f"a query to embed takes no suffix, got {suffix!r}")
        record = self.record(members)
        query = self._query(record)
        text = self._text(query, self._instruction(record), record.source, QUERY)
        return Sample((text,), source=record.source)

    def text(
        self, content: str | Content, instruction: str | None = None, role: int = POSITIVE
    ) -> Sample:
        """Return one text, picture or both to embed, behind an instruction if there is one.

        role: QUERY, or POSITIVE for a document, each of which may have a prefix.
        """
        content = Content(content) if isinstance(content, str) else content
        return Sample((self._text(content, instruction, "a text to embed", role),))

    def reads(self, member: str) -> bool:
        """Return whether it is the record's, one that `fields` names, or a picture."""
        return super().reads(member) and (is_picture(member) or member in self.named())

    def blank(self, sample_id: int) -> Sample:
        """Return the sample that stands for a missing one; its negative id keeps it out of the
        loss."""
        text = Text(
            torch.tensor([self.tokenizer.eos_id]),
            torch.zeros(1),
            extras={
                "pool_from": torch.tensor(0),
                "role": torch.tensor(QUERY),
                "document_id": torch.tensor(0),
                "text_hash": torch.tensor(0),
                "answers": torch.zeros(self.num_answers, dtype=torch.long),
                "in_batch": torch.tensor(False),
                "teacher": torch.tensor(float("nan")),
            },
        )
        return Sample((text,), sample_id, "blank")

    def _instruction(self, record: Record) -> str | None:
        """Return the record's instruction, else the builder's."""
        instruction = record.get("instruction")
        if instruction is None:
            return self.instruction
        if not isinstance(instruction, str):
            raise record.bad(f"instruction must be text, got {instruction!r}")
        return instruction

    def _query(self, record: Record) -> Content:
        """Return the record's query, a dialogue's turns as one text."""
        messages = None if self.dialogue is None else record.get("messages")
        if self.dialogue is None or messages is None:
            return self._content(record, "query", record.get("query"), record.get("query_image"))
        for name in ("query", "query_image"):
            if record.get(name) is not None:
                raise record.bad(f"it has messages and {name}; leave one out by build.unread")
        try:
            return Content(self.dialogue.render(messages))
        except ValueError as error:
            raise record.bad(str(error)) from error

    def _content(self, record: Record, name: str, text: Any, member: Any) -> Content:
        """Return a text and its picture, either of which may be missing."""
        if member is None:
            if text is None:
                raise record.missing(name)
            return Content(record.checked_text(name, text))
        if self.tokens_per_tile is None:
            raise record.bad(f"{name} has a picture; data.train.build.tokens_per_tile is not given")
        if not isinstance(text, str | None):
            raise record.bad(f"{name} must be text, got {text!r}")
        image, data = record.picture(name, member)
        return Content(text or "", image, hashlib.blake2b(data, digest_size=16).hexdigest())

    def _refuse_unnamed(self, record: Record) -> None:
        """Raise BadSample for a picture that the record names nowhere."""
        names = {record.get("query_image"), record.get("positive_image")}
        names |= set(_list(record, "negative_images"))
        if unnamed := sorted(set(filter(is_picture, record.members)) - names):
            raise record.bad(f"no field names the picture {unnamed[0]}")

    def _text(
        self,
        content: Content,
        instruction: str | None,
        source: str,
        role: int,
        **extras: torch.Tensor,
    ) -> Text:
        """Return a text with its picture. Raises BadSample where the picture does not fit."""
        tiles = None if content.image is None else self._tiles(content.image)
        count = 0 if tiles is None else len(tiles.tiles)
        text = content.text
        if role == QUERY and self.dialogue is not None:
            text = self.dialogue.cut(text, lambda part: self._fits(part, instruction))
        before = self.query_prefix if role == QUERY else self.document_prefix
        ids, pool_from = self.encode(before + text, instruction, count, source)
        media = {}
        if tiles is not None and self.tokens_per_tile is not None:
            first = ids.index(self.tokenizer.image_id)
            media[IMAGE] = TextMedia(
                values=tiles.values,
                positions=first + self.tokens_per_tile * torch.arange(count),
                items=torch.zeros(count, dtype=torch.int64),
                tiles=tiles.tiles,
                placeholder_id=self.tokenizer.image_id,
                tokens_per_item=self.tokens_per_tile,
            )
        extras |= {"role": torch.tensor(role), "pool_from": torch.tensor(pool_from)}
        return Text(torch.tensor(ids), torch.ones(len(ids)), media, extras)

    def _fits(self, query: str, instruction: str | None) -> bool:
        """Return whether a query without a picture loses nothing to the sequence length."""
        prefix = TEMPLATE.format(instruction=instruction) if instruction else ""
        ids = self.tokenizer.encode(prefix + self.query_prefix + query)
        return len(ids) + 1 + (self.tokenizer.bos_id is not None) <= self.sequence_length

    def _tiles(self, image: Image.Image) -> Tiles:
        return tile_image(
            image,
            max_tiles=self.max_tiles,
            tile_size=self.tile_size,
            use_thumbnail=self.use_thumbnail,
        )

    def encode(
        self, text: str, instruction: str | None, num_tiles: int = 0, source: str = ""
    ) -> tuple[list[int], int]:
        """Return token ids with EOS, and BOS where the tokenizer has one; and the position of the
        first pooled token.

        num_tiles: tiles of a picture, whose places stand before the text.

        Raises BadSample where the places of a picture do not fit into the sequence length, and
        where the text has the placeholder itself: beside a picture, of its own or of another text
        of the batch, the model refuses it. Where there are no pictures it is a word, if one of the
        vocabulary.
        """
        prefix = TEMPLATE.format(instruction=instruction) if instruction else ""
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        places = num_tiles * (self.tokens_per_tile or 0)
        if places:
            before = [*begin, *self.tokenizer.encode(prefix)]
            rest = self.tokenizer.encode(f"\n{text}")
            if len(before) + places > self.sequence_length - 1:
                raise BadSample(
                    source,
                    f"a picture of {places} tokens behind {len(before)} and before EOS does not fit"
                    f" into data.sequence_length={self.sequence_length}",
                )
            ids = [*before, *[self.tokenizer.image_id] * places, *rest]
        else:
            ids = [*begin, *self.tokenizer.encode(prefix + text)]
        ids = ids[: self.sequence_length - 1]
        ids.append(self.tokenizer.eos_id)
        is_word = self.tokens_per_tile is None and not self.tokenizer.image_is_extra
        if not is_word and ids.count(self.tokenizer.image_id) != places:
            raise BadSample(source, f"the text has the placeholder {self.tokenizer.image_token}")
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
