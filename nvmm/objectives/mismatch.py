"""Prompts with answers to other prompts: from their log-probabilities KTO estimates a divergence.

The samples of the global batch are taken in the order of their ids, and the texts of a sample get
the answers of the next one's; so the pairing is the same on any layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor

from nvmm.batch import Batch, Media, Sample, Text
from nvmm.data.collate import collate
from nvmm.parallel.collectives import gather


@dataclass(frozen=True)
class _Answer:
    """An answer's tokens and weights; longest: the tokens of its text with the prompt."""

    sample_id: int
    tokens: list[int]
    weights: list[float]
    longest: int


def mismatched(batches: Sequence[Batch]) -> list[Batch]:
    """Return the micro-batches with each real sample's answers replaced by the next sample's.

    An answer is what begins with a text's first supervised token. One that would make its text
    longer than the longest of the global batch is cut at the end. Nothing is to be compared where
    the global batch has less than two real samples: then the list is empty.

    It is collective over data-parallel ranks.
    """
    # 1. The answers of all ranks, sample by sample.
    texts = [_texts(batch) for batch in batches]
    mine = [
        _Answer(number, answer.tokens.tolist(), answer.weights.tolist(), len(text.tokens))
        for batch, listed in zip(batches, texts, strict=True)
        for number, text in zip(batch.sample_ids[batch.owners].tolist(), listed, strict=True)
        if number >= 0
        for answer in [_split(text)[1]]
    ]
    answers = sorted(
        (answer for rank in _ranks(mine) for answer in rank), key=lambda answer: answer.sample_id
    )
    by_sample = [list(some) for _, some in groupby(answers, key=lambda answer: answer.sample_id)]
    if len(by_sample) < 2:
        return []
    following = {
        some[0].sample_id: by_sample[(place + 1) % len(by_sample)]
        for place, some in enumerate(by_sample)
    }
    longest = max(answer.longest for answer in answers)
    # 2. Their texts, padded as the batches are.
    row, segment = _multiples(batches)
    return [
        _replaced(batch, listed, following, longest, row, segment)
        for batch, listed in zip(batches, texts, strict=True)
    ]


def _ranks(mine: list[_Answer]) -> list[list[_Answer]]:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return [mine]
    return gather(mine, parallel_state.get_data_parallel_group())


def _starts(batch: Batch) -> list[tuple[int, int]]:
    """Return the row and first column of each text."""
    count = batch.owners.numel()
    if batch.cu_seqlens is None:
        return [(row, 0) for row in range(count)]
    return [(0, start) for start in batch.cu_seqlens.tolist()[:count]]


def _texts(batch: Batch) -> list[Text]:
    """Return the texts of a micro-batch, without media; weights are of tokens as targets."""
    tokens, mask = batch.tokens.cpu(), batch.loss_mask.cpu()
    texts = []
    for (row, start), length in zip(_starts(batch), batch.lengths.tolist(), strict=False):
        weights = torch.zeros(length)
        weights[1:] = mask[row, start : start + length - 1]
        texts.append(Text(tokens[row, start : start + length], weights))
    return texts


def _split(text: Text) -> tuple[Text, Text]:
    """Return the prompt and the answer of a text."""
    first = int((text.weights != 0).int().argmax())
    parts = (slice(first), slice(first, None))
    prompt, answer = (Text(text.tokens[part], text.weights[part]) for part in parts)
    return prompt, answer


def _multiples(batches: Sequence[Batch]) -> tuple[int, int]:
    """Return multiples of the lengths of rows and segments, which are ones of the layout's too."""
    row = math.gcd(*(batch.tokens.shape[1] for batch in batches))
    packed = [batch.cu_seqlens for batch in batches if batch.cu_seqlens is not None]
    sizes = [stop - start for ends in packed for start, stop in pairwise(ends.tolist())]
    return row, math.gcd(*sizes) or 1


def _replaced(
    batch: Batch,
    texts: Sequence[Text],
    following: dict[int, list[_Answer]],
    longest: int,
    row: int,
    segment: int,
) -> Batch:
    """Return a micro-batch whose texts have the answers of `following`, at most `longest` long."""
    samples = []
    owned = groupby(zip(batch.owners.tolist(), texts, strict=True), key=lambda pair: pair[0])
    for owner, listed in owned:
        number = int(batch.sample_ids[owner])
        others = following.get(number, [])
        changed = []
        for place, (_, text) in enumerate(listed):
            if others:
                prompt, other = _split(text)[0], others[min(place, len(others) - 1)]
                tokens, weights = torch.tensor(other.tokens), torch.tensor(other.weights)
                text = Text(
                    torch.cat([prompt.tokens, tokens])[:longest],
                    torch.cat([prompt.weights, weights])[:longest],
                )
            changed.append(text)
        samples.append(Sample(tuple(changed), number))
    made = collate(
        samples,
        pad_id=0,  # Padding stands behind all that is read.
        pad_multiple=row,
        segment_multiple=segment,
        packed=batch.cu_seqlens is not None,
    ).to(batch.tokens.device)
    # Pictures stand in the prompts, which have moved where the row is packed.
    moved = [new[1] - old[1] for new, old in zip(_starts(made), _starts(batch), strict=True)]
    shift = torch.tensor(moved, device=batch.tokens.device)
    media = {kind: _shifted(each, shift) for kind, each in batch.media.items()}
    return made.replace(media=media, extras=batch.extras)


def _shifted(media: Media, shift: Tensor) -> Media:
    """Return media moved by as many columns as their texts have; shift: [texts]."""
    by = shift[media.texts]
    ends = None if media.ends is None else media.ends + by
    return replace(media, positions=media.positions + by, ends=ends)
