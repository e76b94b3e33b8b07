"""Texts become vectors with an embedder, at any tensor, pipeline and data parallel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nvmm.data.collate import collate
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.inference.decoding import embed, gather, share


@dataclass(frozen=True)
class TextEncoder:
    """An embedder ready to encode texts.

    model: this rank's one chunk, in eval mode. builder: the `RetrievalBuilder` that trained it.
    batch_size: texts of a forward pass.
    """

    model: Sequence[Module]
    builder: RetrievalBuilder
    batch_size: int = 32

    def __call__(self, texts: Sequence[str], instruction: str | None = None) -> Tensor:
        """Return unit vectors, fp32 [texts, h] on the CPU, the same on every rank; collective.

        instruction: the task's instruction, put before every text; None for documents.
        """
        from megatron.core import parallel_state

        size = parallel_state.get_data_parallel_world_size()
        numbers = share(len(texts), parallel_state.get_data_parallel_rank(), size)
        local = self.local([texts[number] for number in numbers], instruction)
        return torch.stack(gather(list(local), len(texts)))

    def local(self, texts: Sequence[str], instruction: str | None = None) -> Tensor:
        """Return unit vectors as above, of texts that this model-parallel group alone encodes."""
        samples = [self.builder.text(text, instruction) for text in texts]
        # Texts of like length share a batch.
        order = sorted(range(len(samples)), key=lambda i: samples[i].num_tokens)
        config: Any = self.model[0].config
        result = torch.empty(len(samples), config.hidden_size)
        device = next(self.model[0].parameters()).device
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = collate([samples[i] for i in chosen], pad_id=self.builder.tokenizer.pad_id)
            vectors = embed(self.model, [batch.to(device)]).cpu()
            result[chosen] = vectors
        return result
