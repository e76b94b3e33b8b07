"""Turns as tokens, and what writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nvmm.data.samples.tokenizer import Tokenizer


@dataclass(frozen=True)
class AttendedTile:
    """A tile outside the sequence.

    start, stop: its tag is tokens start .. stop - 1 of the text. tag_ids: its tag where that stands
    in front of its keys instead, and not in the text.
    """

    start: int
    stop: int
    tag_ids: Sequence[int] = ()


@dataclass
class Rendered:
    """Turns as tokens.

    weights: the weight of each token as a target. positions: the first placeholder of every tile in
    the sequence. attended: the tiles outside of it. Both are in the order of the tiles.
    tiles: the number of tiles of each image.
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    attended: list[AttendedTile] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)


class Writer:
    """A writer collects text until a boundary forces tokenisation.

    Neighbouring pieces become tokens as one text, so that ids are those of the whole conversation.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.out = Rendered()
        self.pending: list[tuple[str, float]] = []

    def text(self, text: str, weight: float = 0.0) -> None:
        if text:
            self.pending.append((text, weight))

    def flush(self) -> None:
        if self.pending:
            texts, weights = zip(*self.pending, strict=True)
            ids, places = self.tokenizer.encode_pieces(texts, continued=bool(self.out.tokens))
            self.out.tokens.extend(ids)
            self.out.weights.extend(weights[place] for place in places)
            self.pending = []

    def ids(self, ids: Sequence[int], weight: float) -> None:
        self.out.tokens.extend(ids)
        self.out.weights.extend([weight] * len(ids))

    def alone(self, text: str, weight: float) -> None:
        """Write a text that is tokenised apart from its neighbours."""
        self.flush()
        self.text(text, weight)
        self.flush()

    def tile(self, tag: str, num_tokens: int, alone: bool) -> None:
        if alone:
            self.flush()
        self.text(tag)
        self.flush()
        self.out.positions.append(len(self.out.tokens))
        self.ids([self.tokenizer.image_id] * num_tokens, 0.0)

    def attended(self, tag: str, in_text: bool) -> None:
        """Write a tile outside the sequence; its tag stands in the text or in front of its keys."""
        self.flush()
        start = len(self.out.tokens)
        if in_text:
            self.alone(tag, 0.0)
        ids = [] if in_text or not tag else self.tokenizer.encode_pieces([tag], continued=True)[0]
        self.out.attended.append(AttendedTile(start, len(self.out.tokens), ids))


def without_late_images(rendered: Rendered, tokens_per_tile: int, length: int) -> Rendered:
    """Cut a text to `length` tokens, and before the first image that does not fit whole."""
    first, kept = 0, 0
    for count in rendered.tiles:
        if rendered.positions[first + count - 1] + tokens_per_tile > length:
            length = min(length, rendered.positions[first])
            break
        first, kept = first + count, kept + 1
    return replace(
        rendered,
        tokens=rendered.tokens[:length],
        weights=rendered.weights[:length],
        positions=rendered.positions[:first],
        tiles=rendered.tiles[:kept],
    )
