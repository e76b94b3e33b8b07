"""Texts and pictures become vectors with an embedder, at any parallel size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from nvmm.batch import POSITIVE, Sample
from nvmm.data.collate import collate
from nvmm.data.samples.images import decode_image
from nvmm.data.samples.retrieval import Content, RetrievalBuilder
from nvmm.inference.decoding import embed, gather, share

_BATCHES = 32
"""So many batches' texts are sorted by length together."""
_BYTES = 256 * 1024 * 1024
"""Fewer are where their pictures' tiles reach this size, which are in memory together."""


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

    def __call__(
        self,
        items: Sequence[Embeddable],
        instruction: str | None = None,
        role: int = POSITIVE,
    ) -> Tensor:
        """Return vectors, fp32 [items, h] on the CPU, the same on every rank; collective.

        They have the length 1 unless the model has `normalize: false`.

        instruction: the task's instruction, put before every item; None for documents.
        role: QUERY for queries, POSITIVE for documents, which may have prefixes, and of which each
            may have a tower of its own.

        Raises ValueError naming a picture that cannot be read.
        """
        from megatron.core import parallel_state

        size = parallel_state.get_data_parallel_world_size()
        numbers = share(len(items), parallel_state.get_data_parallel_rank(), size)
        local = self.local([items[number] for number in numbers], instruction, role)
        # Rows of arrays travel alone; each row of a tensor is pickled with the whole tensor.
        return torch.from_numpy(np.stack(gather(list(local.numpy()), len(items))))

    def local(
        self,
        items: Sequence[Embeddable],
        instruction: str | None = None,
        role: int = POSITIVE,
        errors: dict[int, str] | None = None,
    ) -> Tensor:
        """Return vectors as above, of items that this model-parallel group alone encodes.

        errors: takes number and fault of each item that cannot be embedded, whose vector is NaN;
            None: the first one is raised.
        """
        result = torch.full((len(items), self.size), torch.nan)
        samples: dict[int, Sample] = {}
        held = 0
        for number, item in enumerate(items):
            try:
                samples[number] = sample = self._sample(item, instruction, role)
            except ValueError as error:  # BadSample too
                if errors is None:
                    raise
                errors[number] = str(error)
                continue
            held += sum(media.values.nbytes for media in sample.texts[0].media.values())
            batches, rest = divmod(len(samples), self.batch_size)
            if not rest and (batches == _BATCHES or held >= _BYTES):
                self._embed(samples, result)
                samples, held = {}, 0
        self._embed(samples, result)
        return result

    def _embed(self, samples: Mapping[int, Sample], result: Tensor) -> None:
        """Write the samples' vectors to the rows of their numbers; texts of like length share a
        batch."""
        device = next(self.model[0].parameters()).device
        order = sorted(samples, key=lambda number: samples[number].num_tokens)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = collate([samples[i] for i in chosen], pad_id=self.builder.tokenizer.pad_id)
            result[chosen] = embed(self.model, [batch.to(device)]).cpu()

    def _sample(self, item: Embeddable, instruction: str | None, role: int) -> Sample:
        if isinstance(item, str) or item.image is None:
            text = item if isinstance(item, str) else item.text
            return self.builder.text(text, instruction, role)
        if self.builder.tokens_per_tile is None:
            raise ValueError(f"{item.image}: the checkpoint embeds texts alone, no pictures")
        if isinstance(item, Content):
            return self.builder.text(item, instruction, role)
        try:
            data = item.image.read_bytes()
        except OSError as error:
            raise ValueError(f"{item.image} cannot be read ({error.strerror})") from error
        limit = self.builder.limits.max_pixels
        image = decode_image(data, source=str(item.image), max_pixels=limit)
        return self.builder.text(Content(item.text, image), instruction, role)
