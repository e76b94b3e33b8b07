"""A micro-batch for a person to read: text and loss mask, labels, tiles, borders, positions."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import torch
from PIL import Image
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, Batch, Media
from nvmm.data.samples.drawn_sounds import spectrogram_png
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.report.style import STYLE

_COLORS = {"target": "\033[1;32m", "media": "\033[36m", "text": "\033[2m"}
_RESET = "\033[0m"
_TABLE = "  {:>5} {:>5}  {:24} {:24} {:>6}"
_HTML_STYLE = """
.tokens { font-family: ui-monospace, monospace; white-space: pre-wrap; padding: 14px 16px; }
.text { color: var(--quiet); }
.target { color: var(--good); font-weight: 600; text-decoration: underline; }
.media { color: var(--s0); }
.images { display: flex; flex-wrap: wrap; gap: 14px; margin: 16px 0; }
.images figure { margin: 0; }
.images .sound { width: auto; max-width: 100%; }
.images audio { width: 100%; }
.images img { width: 128px; image-rendering: pixelated; border: 1px solid var(--rule); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 2px 12px; text-align: left; font-weight: normal; white-space: pre; }
"""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind: text, target (supervised) or media (one tile).

    start, stop: columns of the row. text: the tokens, decoded.
    """

    kind: str
    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class Line:
    """One column of a row: its position id, its token and the label that it predicts."""

    column: int
    position: int
    token: str
    label: str
    weight: float


@dataclass(frozen=True)
class Tile:
    """One tile: its image in the sample, its place (0: thumbnail), tag, placeholders, pixels.

    keys: number of keys of a tile that cross-attention reads; start .. stop is then its tag.
    modality: "image" for tiles that can be drawn.
    """

    image: int
    place: int
    tag: str
    start: int
    stop: int
    pixels: Tensor
    keys: int = 0
    modality: str = "image"


@dataclass(frozen=True)
class Segment:
    """A text in its row (padded) or between its pack borders (packed)."""

    sample_id: int
    source: str
    row: int
    start: int
    stop: int
    first_position: int
    stretches: list[Stretch]
    lines: list[Line]
    tiles: list[Tile]

    @property
    def num_targets(self) -> int:
        """The number of supervised tokens."""
        return sum(line.weight != 0 for line in self.lines)


def segments(
    batch: Batch, tokenizer: Tokenizer, sources: Sequence[str], *, image_start: str = "<Image>"
) -> list[Segment]:
    """Return the texts of a micro-batch, decoded.

    Args:
        sources: shard and key of each sample.
        image_start: text that opens an image; a tile's tag stands behind it or the last tile.
    """
    if batch.cu_seqlens is None:
        places = [(row, 0, int(length)) for row, length in enumerate(batch.lengths)]
    else:
        # A segment may end in padding of its own, which its length leaves out.
        bounds = zip(batch.cu_seqlens.tolist(), batch.lengths.tolist(), strict=False)
        places = [(0, start, start + length) for start, length in bounds]
    texts = []
    ids = batch.sample_ids.tolist()
    owners = batch.owners.tolist()
    for text, (row, start, stop) in enumerate(places[: len(owners)]):  # The rest is padding.
        tiles = _tiles(batch, tokenizer, text, start, image_start)
        texts.append(
            Segment(
                sample_id=ids[owners[text]],
                source=sources[owners[text]],
                row=row,
                start=start,
                stop=stop,
                first_position=int(batch.position_ids[row, start]),
                stretches=list(_stretches(batch, tokenizer, row, start, stop, tiles)),
                lines=_lines(batch, tokenizer, row, start, stop),
                tiles=tiles,
            )
        )
    return texts


def _tiles(
    batch: Batch, tokenizer: Tokenizer, text: int, first: int, image_start: str
) -> list[Tile]:
    """Return the tiles of one text, which begins at column `first`."""
    tiles: list[Tile] = []
    for kind, media in batch.media.items():
        for index in (media.texts == text).nonzero().flatten().tolist():
            if media.ends is not None:
                tile = _attended_tile(batch, tokenizer, media, index)
                tiles.append(replace(tile, modality=kind.modality))
                continue
            tile = _tile(batch, tokenizer, media, index, first, image_start)
            tile = replace(tile, modality=kind.modality)
            first = tile.stop
            tiles.append(tile)
    return tiles


def _attended_tile(batch: Batch, tokenizer: Tokenizer, media: Media, index: int) -> Tile:
    assert media.ends is not None and media.tag_ids is not None
    start, stop = int(media.positions[index]), int(media.ends[index])
    # A tag stands in the text (NVLM-X), or its ids go with the tile's keys (NVLM-H).
    key_ids = [i for i in media.tag_ids[index].tolist() if i >= 0]
    ids = batch.tokens[int(media.rows[index]), start:stop].tolist() or key_ids
    return Tile(
        image=int(media.items[index]),
        place=int(media.tiles[index]),
        tag=tokenizer.decode(ids, skip_special_tokens=False) if ids else "",
        start=start,
        stop=stop,
        pixels=media.values[index],
        keys=media.tokens_per_item + len(key_ids),
    )


def _tile(
    batch: Batch, tokenizer: Tokenizer, media: Media, index: int, after: int, image_start: str
) -> Tile:
    """Return a tile in the sequence; its tag is the text behind the last tile or image's start."""
    row, start = int(media.rows[index]), int(media.positions[index])
    before = tokenizer.decode(batch.tokens[row, after:start].tolist(), skip_special_tokens=False)
    return Tile(
        image=int(media.items[index]),
        place=int(media.tiles[index]),
        tag=before.rpartition(image_start)[2].strip(),
        start=start,
        stop=start + int(media.num_features[index]),
        pixels=media.values[index],
    )


def _stretches(
    batch: Batch, tokenizer: Tokenizer, row: int, start: int, stop: int, tiles: Sequence[Tile]
) -> Iterator[Stretch]:
    """Yield the stretches of a text in order."""
    tiles = [replace(t, stop=t.start) if t.keys else t for t in tiles]
    kinds: list[tuple[str, int]] = []
    for column in range(start, stop):
        tile = next((i for i, t in enumerate(tiles) if t.start <= column < t.stop), -1)
        # A token is trained as the label of the position before it.
        target = column > start and float(batch.loss_mask[row, column - 1]) != 0
        kinds.append(("media", tile) if tile >= 0 else ("target" if target else "text", -1))
    first = 0
    for at in range(1, len(kinds) + 1):
        if at < len(kinds) and kinds[at] == kinds[first]:
            continue
        ids = batch.tokens[row, start + first : start + at].tolist()
        yield Stretch(
            kinds[first][0],
            start + first,
            start + at,
            tokenizer.decode(ids, skip_special_tokens=False),
        )
        first = at


def _lines(batch: Batch, tokenizer: Tokenizer, row: int, start: int, stop: int) -> list[Line]:
    """Return a line for each column of a text."""

    def name(token: int) -> str:
        if token == IGNORE_INDEX:
            return "-"
        return f"{token} {tokenizer.decode([token], skip_special_tokens=False)!r}"

    return [
        Line(
            column,
            int(batch.position_ids[row, column]),
            name(int(batch.tokens[row, column])),
            name(int(batch.labels[row, column])),
            float(batch.loss_mask[row, column]),
        )
        for column in range(start, stop)
    ]


def to_text(
    batch: Batch, texts: Sequence[Segment], *, color: bool = True, every: bool = False
) -> str:
    """Return the micro-batch as text for a terminal.

    texts: the batch's `segments`.
    color: supervised text green, media cyan, the rest dim; without, supervised text stands in
        [[double brackets]] and media in {braces}.
    every: list every position, not only those next to a supervised one.
    """
    blocks = [_summary(batch)]
    for segment in texts:
        text = "".join(_shown(stretch, segment, color) for stretch in segment.stretches)
        lines = [_heading(segment), text]
        lines += [
            f"  {_tile_name(tile):20} tag {tile.tag or 'none':26} {_where(tile)}"
            f"  {tile.pixels.shape[-1]} x {tile.pixels.shape[-2]} {_unit(tile)}, mean"
            f" {tile.pixels.float().mean():.1f}"
            for tile in segment.tiles
        ]
        lines += [_TABLE.format("col", "pos", "token", "label", "weight")]
        lines += _table(segment, every)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _summary(batch: Batch) -> str:
    rows, width = batch.tokens.shape
    used = int(batch.lengths.sum())
    layout = f"{rows} padded rows" if batch.cu_seqlens is None else "1 packed row"
    borders = (
        ""
        if batch.cu_seqlens is None
        else f"\npack borders (cu_seqlens) {batch.cu_seqlens.tolist()}"
    )
    tiles = sum(len(media.values) for media in batch.media.values())
    return (
        f"{layout} of {width}: {used} tokens, {rows * width - used} padding, {batch.num_tokens}"
        f" supervised, {tiles} tiles{borders}"
    )


def _heading(segment: Segment) -> str:
    return (
        f"sample {segment.sample_id} ({segment.source}): row {segment.row}, columns"
        f" {segment.start}..{segment.stop - 1}, positions from {segment.first_position},"
        f" {segment.num_targets} supervised"
    )


def _tile_name(tile: Tile) -> str:
    if tile.modality == "audio":
        return f"sound {tile.image} window {tile.place}"
    place = f"tile {tile.place}" if tile.place else "thumbnail"
    return f"image {tile.image} {place}"


def _unit(tile: Tile) -> str:
    return "frames and bins" if tile.modality == "audio" else "pixels"


def _shown(stretch: Stretch, segment: Segment, color: bool) -> str:
    """Return a stretch for a terminal; a tile's placeholders are one note."""
    text = stretch.text
    if stretch.kind == "media":
        tile = next(t for t in segment.tiles if t.start == stretch.start and not t.keys)
        text = f"{{{_tile_name(tile)}: {stretch.stop - stretch.start} placeholders}}"
    if color:
        return f"{_COLORS[stretch.kind]}{text}{_RESET}"
    return f"[[{text}]]" if stretch.kind == "target" else text


def _where(tile: Tile) -> str:
    """Return a tile's columns, or its keys."""
    if not tile.keys:
        return f"columns {tile.start}..{tile.stop - 1}"
    if tile.start == tile.stop:
        return f"{tile.keys} keys from column {tile.start} on"
    return f"{tile.keys} keys, tag at columns {tile.start}..{tile.stop - 1}"


def _table(segment: Segment, every: bool) -> list[str]:
    """Return the rows of a text's table; gaps between supervised columns are one row."""
    weights = [line.weight for line in segment.lines]
    rows, skipped = [], False
    for index, line in enumerate(segment.lines):
        near = any(weights[max(0, index - 1) : index + 2])
        if every or near or index == 0:
            rows.append(
                _TABLE.format(
                    line.column, line.position, line.token, line.label, f"{line.weight:g}"
                )
            )
            skipped = False
        elif not skipped:
            rows.append("    ...")
            skipped = True
    return rows


@dataclass(frozen=True)
class Sounds:
    """What the tiles do not say of sounds.

    hop: frames from the start of a window to that of the next. players: sample id -> WAV files of
    its sounds, in their order.
    """

    hop: float
    players: Mapping[int, Sequence[bytes]]


def to_html(
    batch: Batch, texts: Sequence[Segment], title: str, sounds: Sounds | None = None
) -> str:
    """Return the micro-batch as one self-contained page, images and sounds included.

    sounds: without them windows stand side by side, and there is no player.
    """
    body = "".join(_html(segment, sounds) for segment in texts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}{_HTML_STYLE}</style></head><body><main>"
        f"<header><p class=eyebrow>nvmm batch</p><h1>{escape(title)}</h1>"
        f"<p class=quiet>{escape(_summary(batch))}. <span class=target>Supervised</span>,"
        " <span class=media>media</span>, <span class=text>context</span>.</p></header>"
        f"{body}</main></body></html>\n"
    )


def _html(segment: Segment, sounds: Sounds | None) -> str:
    """Return the section of one text: itself, its tiles, and a table of its columns."""
    text = "".join(
        f'<span class="{stretch.kind}">'
        f"{escape(_shown(stretch, segment, False).removeprefix('[[').removesuffix(']]'))}</span>"
        for stretch in segment.stretches
    )
    images = "".join(
        f'<figure><img alt="{_tile_name(tile)}" src="data:image/png;base64,{_png(tile.pixels)}">'
        f"<figcaption>{_tile_name(tile)}<br>{escape(tile.tag or 'no tag')}<br>"
        f"{_where(tile)}</figcaption></figure>"
        for tile in segment.tiles
        if tile.modality == "image"
    )
    images += "".join(_sounds(segment, sounds))
    rows = "".join(
        f"<tr><td>{line.column}<td>{line.position}<td>{escape(line.token)}"
        f'<td class="{"target" if line.weight else "text"}">{escape(line.label)}'
        f"<td>{line.weight:g}"
        for line in segment.lines
    )
    return (
        f"<section><h2>Sample {segment.sample_id}</h2>"
        f"<p class=quiet>{escape(_heading(segment))}</p>"
        f"<div class='panel tokens'>{text}</div><div class=images>{images}</div>"
        "<details><summary>Every position</summary><table><tr><th>column<th>position<th>token"
        f"<th>label<th>weight{rows}</table></details></section>"
    )


def _sounds(segment: Segment, sounds: Sounds | None) -> Iterator[str]:
    """Yield a figure of each sound of a text: its windows in one spectrogram, and a player."""
    heard: dict[int, list[Tile]] = {}
    for tile in segment.tiles:
        if tile.modality == "audio":
            heard.setdefault(tile.image, []).append(tile)
    players = () if sounds is None else sounds.players.get(segment.sample_id, ())
    for number, tiles in heard.items():
        windows = torch.stack([tile.pixels for tile in tiles])
        picture = spectrogram_png(windows, None if sounds is None else sounds.hop)
        player = ""
        if number < len(players):
            source = base64.b64encode(players[number]).decode()
            player = f'<audio controls src="data:audio/wav;base64,{source}"></audio><br>'
        yield (
            f'<figure><img class=sound alt="sound {number}" src="data:image/png;base64,'
            f'{base64.b64encode(picture).decode()}"><br>{player}'
            f"<figcaption>sound {number}: {len(tiles)} windows, {_where(tiles[0])}</figcaption>"
            "</figure>"
        )


def _png(pixels: Tensor) -> str:
    """Encode uint8 [3, height, width] as base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
