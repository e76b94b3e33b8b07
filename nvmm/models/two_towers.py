"""Two encoders with weights of their own, for queries and for documents: Dragon, E5, DPR.

Every text of a batch runs through the tower of its role, and no other: queries through `query`,
positives and negatives through `context`. A batch is divided by rows, or by segments of a packed
row, so that two towers compute as much as one would. Padded rows keep the batch's width; a packed
row's two parts may each need some columns of padding (`Parallel.sequence_multiple`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, QUERY, Batch, MediaKind
from nvmm.modules.pooling import text_of
from nvmm.parallel.setup import Chunk


class TwoTowers(MegatronModule):
    """A query tower and a context tower of one architecture (Dragon, arXiv:2302.07452).

    Global names begin with `query.` and `context.`. Both towers take the layout's pipeline stages.

    Args:
        language: partial of an embedder of texts (`EmbeddingModel` or `BidirectionalEncoder`),
            still without its chunk; each tower is one.
        chunk: which part of the model this rank builds.

    Attributes:
        extras: the tower's, and `role`, by which texts are dealt.
        reads: no media.
    """

    extras: frozenset[str] = frozenset({"role"})
    reads: frozenset[MediaKind] = frozenset()

    def __init__(self, language: Callable[..., Any], *, chunk: Chunk) -> None:
        query = language(chunk=chunk)
        super().__init__(config=query.config)
        self.query = query
        self.context = language(chunk=chunk)
        if query.reads:
            raise ValueError("model.language of two towers must be an embedder of texts alone")
        self.extras = self.extras | query.extras
        self.row_multiple = chunk.precision.sequence_multiple(chunk.parallel)
        self.variable_seq_lengths = chunk.parallel.variable_seq_lengths
        # mcore's schedules and gradient finalisation read these from a model.
        self.model_type = query.model_type
        self.pre_process = query.pre_process
        self.post_process = query.post_process
        self.vp_stage = query.vp_stage
        self.share_embeddings_and_output_weights = False
        self._arrived: Tensor | None = None

    @property
    def max_sequence_length(self) -> int:
        """The longest text that a tower takes."""
        return int(self.query.max_sequence_length)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Receive what this model's previous stage gave."""
        [self._arrived] = input_tensor if isinstance(input_tensor, list) else [input_tensor]

    def forward(self, batch: Batch, *, output: str = "embedding") -> Tensor:
        """Run this chunk of both towers.

        batch: texts with `extras["role"]`, in any order, and what the towers read.
        output: "embedding" alone.

        Returns: on the last stage fp32 [texts, h], in the order of the texts. Else hidden states
            for the next one, the query tower's before the context tower's: [s, texts, h] of padded
            rows, [s of both, 1, h] of packed ones; s is this rank's part with sequence parallelism.

        Raises ValueError for another output, and for a batch that does not say its texts' roles.
        """
        if output != "embedding":
            raise ValueError(f"two towers give output=embedding, not {output}")
        batch.require(self.reads, f"model._target_={type(self).__name__}")
        parts = self._parts(batch)
        # 1. Each tower takes its texts, and what its own previous stage made of them.
        for part, hidden in zip(parts, self._divide(parts, batch), strict=True):
            part.tower.set_input_tensor([hidden])
        joined = torch.cat(
            [part.tower(part.batch) for part in parts],
            dim=0 if self.post_process or batch.cu_seqlens is not None else 1,
        )
        # 2. A tower without a text here takes part in the backward pass all the same.
        for tower in (self.query, self.context):
            if all(part.tower is not tower for part in parts) and _learns(tower):
                joined = joined + 0 * self._idle(tower, batch)
        if not self.post_process:
            return joined
        # 3. The last stage puts the vectors in the order of the texts.
        return joined[torch.cat([part.texts for part in parts]).argsort()]

    def flops(self, batch: Batch) -> dict[str, float]:
        """Count model FLOPs of a micro-batch, {"language": those of both towers' own texts}."""
        parts = self._parts(batch)
        return {"language": sum(part.tower.flops(part.batch)["language"] for part in parts)}

    def _parts(self, batch: Batch) -> list[_Part]:
        """Deal the texts to the towers; a tower without texts has no part."""
        role = batch.extras.get("role")
        if role is None:
            raise ValueError("two towers need extras role, which says what is a query")
        parts = []
        for tower, mask in ((self.query, role == QUERY), (self.context, role != QUERY)):
            texts = mask.nonzero()[:, 0]
            if len(texts):
                parts.append(_Part(tower, texts, self._take(batch, texts)))
        return parts

    def _take(self, batch: Batch, texts: Tensor) -> Batch:
        return take(batch, texts, multiple=self.row_multiple, extras=self.query.extras)

    def _divide(self, parts: list[_Part], batch: Batch) -> list[Tensor | None]:
        """Return the hidden states of each part among those that arrived; None on the first stage.

        Raises ValueError where stages that exchange no shapes cannot send packed rows.
        """
        if batch.cu_seqlens is not None and not self.variable_seq_lengths:
            if not (self.pre_process and self.post_process):
                raise ValueError(
                    "parallel.variable_seq_lengths=false must be true for packed rows of two"
                    " towers, whose parts are padded each"
                )
        if self.pre_process or self._arrived is None:
            return [None] * len(parts)
        arrived, self._arrived = self._arrived, None
        if batch.cu_seqlens is None:
            return list(arrived.split([len(part.texts) for part in parts], dim=1))
        return list(arrived.split([self._rows(part.batch) for part in parts]))

    def _rows(self, batch: Batch) -> int:
        """Return the positions of a batch's hidden states that this rank has."""
        split = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return int(batch.tokens.shape[1]) // split

    def _idle(self, tower: Any, batch: Batch) -> Tensor:
        """Return a number with a path to every parameter of this stage of a tower.

        With overlap_grad_reduce mcore waits for a gradient of each in the last micro-batch: a text
        of the other tower, or zeros behind the first stage, gives them one, times 0.
        """
        blank = self._take(batch, batch.owners.new_zeros(1))
        if not self.pre_process:
            shape = (self._rows(blank), 1, self.config.hidden_size)
            like = {"dtype": self.config.params_dtype, "device": batch.tokens.device}
            tower.set_input_tensor([torch.zeros(shape, **like)])
        # In eval mode it draws no random numbers, and no FP8 history records it.
        tower.eval()
        result = tower(blank).sum()
        tower.train()
        return result


@dataclass(frozen=True)
class _Part:
    """A tower, its texts' numbers in the batch, int64 [n], and the batch of them alone."""

    tower: Any
    texts: Tensor
    batch: Batch


def _learns(tower: torch.nn.Module) -> bool:
    if not (tower.training and torch.is_grad_enabled()):
        return False
    return any(parameter.requires_grad for parameter in tower.parameters())


def take(batch: Batch, texts: Tensor, *, multiple: int, extras: Iterable[str]) -> Batch:
    """Return the batch of some texts alone, padded rows or packed as before, without media.

    texts: ascending numbers of texts, int64 [n].
    multiple: a packed row is padded to it anew; padded rows keep their width.
    extras: names of the extras that are kept, where the batch has them.
    """
    kept = {name: batch.extras[name][texts] for name in extras if name in batch.extras}
    fields: dict[str, Any] = {
        "lengths": batch.lengths[texts],
        "owners": batch.owners[texts],
        "extras": kept,
        "media": {},
    }
    names = ("tokens", "labels", "loss_mask", "position_ids")
    if batch.cu_seqlens is None:
        return batch.replace(**fields, **{name: getattr(batch, name)[texts] for name in names})
    columns = torch.isin(text_of(batch)[0], texts).nonzero()[:, 0]
    bounds = torch.diff(batch.cu_seqlens)[texts].cumsum(0)
    missing = -len(columns) % multiple
    filling = {"labels": IGNORE_INDEX}
    for name in names:
        row = getattr(batch, name)[:, columns]
        fields[name] = F.pad(row, (0, missing), value=filling.get(name, 0))
    if missing:
        # The padding is a segment of its own, of length 0, with positions from 0 on.
        fields["position_ids"][0, -missing:] = torch.arange(missing, device=columns.device)
        fields["lengths"] = F.pad(fields["lengths"], (0, 1))
        bounds = F.pad(bounds, (0, 1), value=len(columns) + missing)
    return batch.replace(**fields, cu_seqlens=F.pad(bounds, (1, 0)).to(batch.cu_seqlens.dtype))
