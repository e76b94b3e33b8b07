"""Texts and pictures become vectors with an embedder, at any parallel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Sample
from nvmm.data.collate import collate
from nvmm.data.samples.images import decode_image
from nvmm.data.samples.retrieval import Content, RetrievalBuilder
from nvmm.inference.decoding import embed, gather, share

_BATCHES = 32
"""So many batches' texts are sorted by length, and their pictures are in memory together."""


class TextAndImage(NamedTuple):
    """What to embed: a text, which may be empty, and the file of a picture."""

    text: str
    image: Path | None = None


Embeddable = str | TextAndImage | Content
"""A text, or a text with a picture, in a file or in memory."""


@dataclass(frozen=True)
class TextEncoder:
    """An embedder ready to encode texts, and pictures where its builder has `tokens_per_tile`.

    model: this rank's one chunk, in eval mode. builder: the `RetrievalBuilder` that trained it.
    batch_size: texts of a forward pass.
    """

    model: Sequence[Module]
    builder: RetrievalBuilder
    batch_size: int = 32

    @property
    def size(self) -> int:
        """The numbers of a vector."""
        config: Any = self.model[0].config
        return int(config.hidden_size)

    def __call__(self, items: Sequence[Embeddable], instruction: str | None = None) -> Tensor:
        """Return unit vectors, fp32 [items, h] on the CPU, the same on every rank; collective.

        instruction: the task's instruction, put before every item; None for documents.

        Raises ValueError naming a picture that cannot be read.
        """
        from megatron.core import parallel_state

        size = parallel_state.get_data_parallel_world_size()
        numbers = share(len(items), parallel_state.get_data_parallel_rank(), size)
        local = self.local([items[number] for number in numbers], instruction)
        return torch.stack(gather(list(local), len(items)))

    def local(
        self,
        items: Sequence[Embeddable],
        instruction: str | None = None,
        errors: dict[int, str] | None = None,
    ) -> Tensor:
        """Return unit vectors as above, of items that this model-parallel group alone encodes.

        errors: takes number and fault of each item that cannot be embedded, whose vector is NaN;
            None: the first one is raised.
        """
        result = torch.full((len(items), self.size), torch.nan)
        device = next(self.model[0].parameters()).device
        window = self.batch_size * _BATCHES
        for first in range(0, len(items), window):
            samples: dict[int, Sample] = {}
            for number, item in enumerate(items[first : first + window], first):
                try:
                    samples[number] = self._sample(item, instruction)
                except ValueError as error:  # BadSample too
                    if errors is None:
                        raise
                    errors[number] = str(error)
            # Texts of like length share a batch.
            order = sorted(samples, key=lambda number: samples[number].num_tokens)
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = collate([samples[i] for i in chosen], pad_id=self.builder.tokenizer.pad_id)
                result[chosen] = embed(self.model, [batch.to(device)]).cpu()
        return result

    def _sample(self, item: Embeddable, instruction: str | None) -> Sample:
        if isinstance(item, str) or item.image is None:
            text = item if isinstance(item, str) else item.text
            return self.builder.text(text, instruction)
        if self.builder.tokens_per_tile is None:
            raise ValueError(f"{item.image}: the checkpoint embeds texts alone, no pictures")
        if isinstance(item, Content):
            return self.builder.text(item, instruction)
        try:
            data = item.image.read_bytes()
        except OSError as error:
            raise ValueError(f"{item.image} cannot be read ({error.strerror})") from error
        limit = self.builder.limits.max_pixels
        image = decode_image(data, source=str(item.image), max_pixels=limit)
        return self.builder.text(Content(item.text, image), instruction)
