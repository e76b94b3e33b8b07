"""Log-probabilities of given continuations, and whether greedy decoding would give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.inference.limits import longest
from nvmm.parallel import schedule


def likelihoods(
    model: Sequence[Module], rows: Sequence[tuple[Sequence[int], int]], pad_id: int
) -> list[tuple[float, bool]]:
    """Return of each row the log-probability of its last tokens, and whether each is the likeliest.

    It is one forward pass, and collective over a model-parallel group, which gets the result.

    rows: (token ids, how many of them at the end are scored, at least 1). What stands before them
        is what they follow, so that one token at least must be left. The last token is a target
        alone and takes no place in the model's longest sequence.

    Raises ValueError for a row without a token before its last ones, or that is too long.
    """
    if model[0].training:
        raise ValueError("likelihoods needs the model in eval mode")
    limit = longest(model)
    for tokens, count in rows:
        if not 0 < count < len(tokens):
            raise ValueError(f"{count} tokens to score of {len(tokens)}: one must come before them")
        if len(tokens) - 1 > limit:
            raise ValueError(f"{len(tokens)} tokens are more than max_sequence_length={limit} + 1")
    device = next(model[0].parameters()).device
    batch = _batch(rows, pad_id).to(device)
    # The last stage makes its table where the logits are, so that they are not kept.
    tables = schedule.outputs(
        model,
        [batch],
        lambda chunk, batch: chunk(batch, output="logits"),
        keep=lambda logits: _table(logits, batch),
    )
    table = tables[0] if tables else torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    group = parallel_state.get_model_parallel_group()
    dist.broadcast(table, dist.get_process_group_ranks(group)[-1], group=group)
    return [(total, wrong == 0) for total, wrong in table.tolist()]


def _batch(rows: Sequence[tuple[Sequence[int], int]], pad_id: int) -> Batch:
    """Collate rows without the column of the longest row's last token, which nothing follows."""
    samples = []
    for number, (tokens, count) in enumerate(rows):
        weights = torch.zeros(len(tokens))
        weights[-count:] = 1.0
        samples.append(Sample((Text(torch.tensor(tokens), weights),), number))
    batch = collate(samples, pad_id=pad_id)
    width = batch.tokens.shape[1] - 1
    return replace(
        batch,
        tokens=batch.tokens[:, :width],
        labels=batch.labels[:, :width],
        loss_mask=batch.loss_mask[:, :width],
        position_ids=batch.position_ids[:, :width],
        lengths=batch.lengths.clamp(max=width),
    )


def _table(logits: Tensor, batch: Batch) -> Tensor:
    """Return fp64 [rows, 2]: sum of log-probabilities, number of targets that are not likeliest."""
    places = batch.loss_mask != 0
    targets = batch.labels[places]
    chosen = logits[places]
    logs = torch.log_softmax(chosen if chosen.dtype == torch.float64 else chosen.float(), -1)
    values = torch.stack(
        [logs.gather(-1, targets[:, None])[:, 0].double(), (chosen.argmax(-1) != targets).double()],
        1,
    )
    rows = places.nonzero()[:, 0]
    table = torch.zeros(len(places), 2, dtype=torch.float64, device=logits.device)
    return table.index_add_(0, rows, values)
