"""mcore's pipeline schedules over this rank's micro-batches, forward only or with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads as mcore_finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from nvmm.batch import Batch
from nvmm.parallel.gradients import sum_replicated_gradients

ForwardStep = Callable[[Iterator[Batch], Module], tuple[Tensor, Any]]
"""A function that runs a chunk's next micro-batch; returns its output and its loss function."""


def run_schedule(
    models: Sequence[Module],
    batches: Sequence[Batch],
    forward_step: ForwardStep,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run mcore's schedule over `batches`; every chunk gets its own iterator over all of them.

    Args:
        models: this rank's chunks, wrapped or not.
        forward_only: leave out the backward passes.
        collect: the second of what `forward_step` returns gives outputs, not a loss.

    Returns: the last stage's result for each micro-batch, an empty list elsewhere.
    """
    lengths = {batch.tokens.shape[1] for batch in batches}
    config: Any = models[0].config
    if len(lengths) > 1 and config.pipeline_model_parallel_size > 1:
        if not config.variable_seq_lengths:
            raise ValueError(
                f"parallel.variable_seq_lengths=false needs micro-batches of one length, got"
                f" {sorted(lengths)}"
            )
    iterators = [iter(batches) for _ in models]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(models),
        num_microbatches=len(batches),
        seq_length=max(lengths),
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def outputs(
    models: Sequence[Module],
    batches: Sequence[Batch],
    forward: Callable[[Module, Batch], Tensor],
    keep: Callable[[Tensor], Tensor] = lambda output: output,
) -> list[Tensor]:
    """Return outputs of a forward-only pass, one a micro-batch on the last stage, else none.

    keep: the part of an output that is kept.
    """

    def step(iterator: Iterator[Batch], model: Module) -> tuple[Tensor, Any]:
        return forward(model, next(iterator)), lambda output, non_loss_data: keep(output)

    with torch.no_grad():
        return run_schedule(models, batches, step, forward_only=True, collect=True)


def finalize_model_grads(
    models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any
) -> None:
    """Do mcore's reductions, then sum gradients of replicated encoders over TP.

    mcore decides by flags of the language model's config, which know nothing of an encoder whose
    tiles were dealt over the tensor-parallel ranks.
    """
    mcore_finalize_model_grads(models, num_tokens, **kwargs)
    sum_replicated_gradients(models)
