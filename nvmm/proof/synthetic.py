"""Batches of random tokens and tiles, as uneven as real ones, for comparisons of layouts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch

from nvmm.batch import ATTENDED, ATTENDED_IMAGE, IMAGE, Batch, MediaKind, Sample, Text, TextMedia
from nvmm.config.compose import instantiate
from nvmm.data.collate import collate
from nvmm.parallel.setup import Parallel

PLACEHOLDER = 508


@dataclass(frozen=True)
class SyntheticTokenizer:
    """The tokenizer of a run without text, which has a digest alone."""

    digest: str = "synthetic"

    def is_of(self, digest: str) -> bool:
        """Return whether a run that saved `digest` had this tokenizer."""
        return digest == self.digest


class SyntheticData:
    """A few steps of synthetic micro-batches behind the loader's interface."""

    log_samples = False
    template_digests: ClassVar[dict[str, str]] = {}

    def __init__(self, steps: list[list[Batch]]) -> None:
        self.steps = steps
        self.tokenizer = SyntheticTokenizer()
        rows = [batch.tokens.shape[1] for step in steps for batch in step]
        self.sequence_length = max(rows, default=1)

    def batches(self, *, rank: int, size: int, start: int, **kwargs: Any) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of every step, dealt as the loader deals them."""
        for step in self.steps[start:]:
            yield step[rank::size]

    def num_batches(self, split: str, global_batch_size: int) -> int:
        """Return the number of steps, the same of any split."""
        return len(self.steps)

    def position(self, step: int) -> dict[str, int]:
        """Return the data's position before a step."""
        return {"step": step}

    def counter_names(self, modalities: Collection[str]) -> list[str]:
        """Return no names: there are no datasets."""
        return []

    def count(self, batches: list[Batch], modalities: Collection[str]) -> dict[str, float]:
        """Return no counts: there are no datasets."""
        return {}

    def check_bad(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """Accept all: no sample is bad."""


def synthetic_steps(
    config: dict[str, Any],
    num_steps: int,
    num_micro_batches: int,
    *,
    packed: bool = False,
    merge: int = 1,
) -> list[list[Batch]]:
    """Make micro-batches with images unevenly spread, ragged rows and an odd vocabulary.

    `config["attended"]` names the tiles that have no placeholders but are for cross-attention.
    `config["interleaved"]` makes every tile an image of its own, with some words between two.

    A model that hears gets windows of sound, attended where it has cross-attention, else in the
    sequence with silence at the end of the last one.

    Every second micro-batch of odd steps has no image at all, so with two data-parallel ranks one
    sees none in the whole step; of even steps the last micro-batch has none. Every `merge` of them
    become one (all: no gradient accumulation). Rows and packed segments are padded as
    `config["parallel"]` needs, rows to a multiple of `config["row_multiple"]` at least; the tokens
    are the same at any layout.

    For an embedder a micro-batch is two samples of a query, its positive and a hard negative, for
    preferences two pairs of answers; texts whose attributes are learned have some of the labels.
    """
    # 1. Padding as the layout needs it; the texts below do not depend on it.
    parallel = Parallel(**config.get("parallel", {}))
    multiple = math.lcm(4, parallel.sequence_multiple, config.get("row_multiple", 1))
    segment = parallel.segment_multiple if packed else 1
    is_embedder = "pooling" in config["model"].get("language", config["model"])
    has_images, has_sounds = "vision" in config["model"], bool(config["model"].get("encoders"))
    # What the objective reads of a text says which samples it takes.
    extras = instantiate(config["objective"]).extras if "objective" in config else frozenset()
    extras |= {"role"} if is_embedder else frozenset()
    per_batch = 6 if is_embedder else 4 if "chosen" in extras else 2
    # 2. Texts of each micro-batch, from one generator: their order fixes their values.
    generator = torch.Generator().manual_seed(11)
    steps = []
    for step in range(num_steps):
        groups: list[list[Text]] = []
        for index in range(num_micro_batches):
            bare = index % 2 == 1 if step % 2 == 0 else index == num_micro_batches - 1
            model = config["model"] if (has_images or has_sounds) and not bare else None
            least = [max(0, 1 - i * (index % 2 == 0)) for i in range(per_batch)]
            if has_sounds:
                groups.append([_heard(generator, model, n, 2 + i % 2) for i, n in enumerate(least)])
                continue
            groups.append(
                [
                    _text(
                        generator,
                        model,
                        least_tiles=least[i],
                        num_unsupervised=2 + i % 2,
                        attended=config.get("attended", "none"),
                        interleaved=config.get("interleaved", False),
                    )
                    for i in range(per_batch)
                ]
            )
        groups = [list(chain(*groups[i : i + merge])) for i in range(0, len(groups), merge)]
        # 3. Every `merge` groups become one micro-batch of the objective's samples.
        steps.append(
            [
                collate(
                    _samples(texts, 100 * step + 10 * number, config, extras),
                    pad_id=0,
                    pad_multiple=multiple,
                    segment_multiple=segment,
                    packed=packed,
                )
                for number, texts in enumerate(groups)
            ]
        )
    return steps


def _samples(
    texts: list[Text], first_id: int, config: dict[str, Any], extras: Collection[str]
) -> list[Sample]:
    """Make samples of the texts, with the extras that the objective reads."""
    if "role" in extras:
        return _retrieval_samples(texts, first_id)
    if "chosen" in extras:
        return _pairs(texts, first_id)
    if "attributes" in extras:
        texts = [_labelled(text, len(config["objective"]["attributes"])) for text in texts]
    return [Sample((text,), first_id + i) for i, text in enumerate(texts)]


def _pairs(texts: list[Text], first_id: int) -> list[Sample]:
    """Make samples of a chosen and a rejected answer, in either order, behind all media."""
    described = []
    for number, text in enumerate(texts):
        first = int(texts[number // 2 * 2].tokens[0])
        weights = text.weights.clone()
        weights[: _media_end(text)] = 0
        extras = {
            "chosen": torch.tensor((number + first) % 2),
            "reward": torch.tensor(len(text.tokens) / 4),
        }
        described.append(replace(text, weights=weights, extras=extras))
    return [Sample(tuple(described[i : i + 2]), first_id + i) for i in range(0, len(described), 2)]


def _media_end(text: Text) -> int:
    """Return where a text's media end."""
    ends = [
        media.positions + media.num_features if media.ends is None else media.ends
        for media in text.media.values()
    ]
    return max((int(each.max()) for each in ends), default=0)


def _labelled(text: Text, count: int) -> Text:
    """Give a text labels from 0 to 4; some are missing, another number of them in each text."""
    labels = (text.tokens[:1] * 7 + 3 * torch.arange(count)) % 5
    missing = (text.tokens[:1] + torch.arange(count)) % 3 == 0
    return replace(text, extras={"attributes": labels.float().masked_fill(missing, torch.nan)})


def _retrieval_samples(texts: list[Text], first_id: int) -> list[Sample]:
    """Make samples of a query, its positive and a hard negative; some masked, some alike."""
    described = []
    for number, text in enumerate(texts):
        first, role = text.tokens[0], number % 3
        extras = {
            "role": torch.tensor(role),
            "pool_from": torch.tensor(3 if role == 0 else 0),
            # Some documents are alike, also across micro-batches: false negatives.
            "document_id": first % 17,
            "text_hash": first,
            "answers": (first + torch.tensor([3, 6])) % 17,
            "in_batch": first % 5 != 0,
            "teacher": torch.tensor(len(text.tokens) / 10),
        }
        described.append(replace(text, extras=extras))
    return [Sample(tuple(described[i : i + 3]), first_id + i) for i in range(0, len(described), 3)]


def _text(
    generator: torch.Generator,
    model: dict[str, Any] | None,
    *,
    least_tiles: int,
    num_unsupervised: int,
    attended: str,
    interleaved: bool = False,
) -> Text:
    """Draw random tokens and tiles, like a row of NVLM-D, -X or -H.

    In the sequence are all tiles (D), none (X) or the first one (H).

    num_unsupervised: tokens at the beginning that are no targets; placeholders never are.
    interleaved: every tile is an image of its own, three words from the next, not a word.
    """
    # 1. The number of tiles, and of those in the sequence.
    count, size, per_tile = 0, 0, 0
    if model is not None:
        size = model["vision"]["image_size"]
        patches = size // model["vision"]["patch_size"]
        grid = -(-patches // model["connector"].get("downsample", 2))  # an odd grid is padded
        per_tile = grid * grid
        count = int(torch.randint(least_tiles, 4, (), generator=generator))
    placed = {"none": count, "regular": min(count, 1), "all": 0}[attended]
    # 2. Words, with a run of placeholders for each of them, some words apart.
    pitch = per_tile + (3 if interleaved else 1)
    length = int(torch.randint(9, 14, (), generator=generator)) + placed * pitch
    tokens = torch.randint(0, PLACEHOLDER, (length,), generator=generator)
    starts = 2 + torch.arange(placed) * pitch
    for start in starts.tolist():
        tokens[start : start + per_tile] = PLACEHOLDER
    weights = (tokens != PLACEHOLDER).float()
    weights[:num_unsupervised] = 0
    # 3. Pixels, and the media of either placement.
    shape = (count, 3, size, size)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    media = {}
    if placed:
        media[IMAGE] = TextMedia(
            values=tiles[:placed],
            positions=starts,
            items=torch.arange(placed) * interleaved,
            tiles=torch.arange(placed) * (not interleaved),
            placeholder_id=PLACEHOLDER,
            tokens_per_item=per_tile,
        )
    if count > placed:
        # Two tiles an image; their tags stand in the text (X), or in front of their keys (H).
        numbers = torch.arange(count - placed)
        in_text = attended == "all"
        tags = torch.randint(
            0, PLACEHOLDER, (len(numbers), 0 if in_text else 2), generator=generator
        )
        tags[1::2, 1:] = -1  # tags of two lengths
        media[ATTENDED_IMAGE] = TextMedia(
            values=tiles[placed:],
            positions=1 + 2 * numbers if in_text else torch.ones_like(numbers),
            items=numbers // 2,
            tiles=numbers % 2 + 1,
            placeholder_id=-1,
            tokens_per_item=per_tile,
            ends=3 + 2 * numbers if in_text else torch.ones_like(numbers),
            tag_ids=tags,
        )
    return Text(tokens, weights, media)


def _heard(
    generator: torch.Generator, model: dict[str, Any] | None, least: int, num_unsupervised: int
) -> Text:
    """Draw random words and windows of sound, like a row of Audio Flamingo 1 or 3.

    least: windows at least; at most three, two of them of one sound.
    """
    count = 0 if model is None else int(torch.randint(least, 4, (), generator=generator))
    length = int(torch.randint(9, 14, (), generator=generator))
    words = torch.randint(0, PLACEHOLDER, (length,), generator=generator)
    weights = torch.ones(length)
    weights[:num_unsupervised] = 0
    if model is None or not count:
        return Text(words, weights)
    encoder = model["encoders"]["audio"]["encoder"]
    bins, positions = encoder["num_mel_bins"], encoder.get("max_source_positions")
    frames = encoder["picture"] ** 2 // bins if positions is None else 2 * positions
    values = torch.randn(count, bins, frames, generator=generator)
    numbers = torch.arange(count)
    items, tiles = numbers // 2, numbers % 2 + 1
    if "cross_attention" in model:
        starts = 1 + 2 * items
        tags = torch.zeros(count, 0, dtype=torch.int64)
        media = TextMedia(values, starts, items, tiles, -1, 1, ends=starts, tag_ids=tags)
        return Text(words, weights, {MediaKind("audio", ATTENDED): media})
    pool = encoder.get("pool", 1)
    extents = torch.full((count,), frames)
    extents[-1] = int(torch.randint(1, frames + 1, (), generator=generator))
    counts = (extents + 1) // 2 // pool
    sound = torch.full((int(counts.sum()),), PLACEHOLDER)
    media = TextMedia(
        values=values,
        positions=2 + counts.cumsum(0) - counts,
        items=items,
        tiles=tiles,
        placeholder_id=PLACEHOLDER,
        tokens_per_item=positions // pool,
        extents=extents,
        counts=counts,
    )
    return Text(
        torch.cat([words[:2], sound, words[2:]]),
        torch.cat([weights[:2], torch.zeros(len(sound)), weights[2:]]),
        {MediaKind("audio"): media},
    )
