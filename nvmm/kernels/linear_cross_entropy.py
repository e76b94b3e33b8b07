"""Compute the cross-entropy of a linear layer's outputs without the logits in memory.

The vocabulary is walked in chunks: torch multiplies a chunk's logits, a kernel takes their
maximum, sum and label (forward, an online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867)
or turns them into their gradient (backward, which multiplies them again), and torch multiplies the
gradients of hidden states and weight. Kernels: csrc/linear_cross_entropy/
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvmm.kernels import library
from nvmm.kernels.weight_gradient import accumulate, add_product, placeholder

CHUNK = 2048
"""Columns of the vocabulary at a time. Measured forward and backward in fp32, 512 rows x 896 x
152,064, one thread of a 2-core AMD EPYC (Zen 3): 1024, 2048, 4096, 8192, 16384 columns take 7.5,
7.1, 7.3, 7.5, 7.9 s; their logits 2, 4, 8, 16, 32 MiB."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    into_main_grad: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """Return -log softmax(hidden @ weight.T)[label] of each row, float32 [rows].

    Args:
        hidden: [rows, width], the same on every rank of `group`. Its gradient is this rank's part,
            to be summed over the group by the caller.
        weight: [columns, width], this rank's equal share of the vocabulary, in order of the ranks.
        labels: int64 [rows], ids of the whole vocabulary. Rows of `ignore_index` have loss 0 and
            send nothing back.
        vocab_size: ids that are real; rows of the weight behind them take no part. None: all.
        group: ranks that share the vocabulary.
        into_main_grad: add the weight's gradient to `weight.main_grad` in place, as mcore's
            linears do with `gradient_accumulation_fusion`; else it is returned.
        chunk: columns at a time; extra memory is that of `rows * chunk` logits and one float32
            copy of the hidden states.

    Raises ValueError for a label that is neither in the vocabulary nor `ignore_index` (on CPU).
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    columns = weight.shape[0]
    vocab_size = columns * size if vocab_size is None else vocab_size
    values = type(labels) is Tensor and labels.device.type == "cpu"  # not a fake's or a GPU's
    if values and not torch.compiler.is_compiling():
        real = labels[labels != ignore_index]
        if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < vocab_size:
            raise ValueError(
                f"labels from {int(real.min())} to {int(real.max())} must be in [0,"
                f" {vocab_size}) or {ignore_index}"
            )
    first = rank * columns
    valid = min(max(vocab_size - first, 0), columns)
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, first, valid, ignore_index, group, into_main_grad, chunk
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        valid: int,
        ignore_index: int,
        group: dist.ProcessGroup | None,
        into_main_grad: bool,
        chunk: int,
    ) -> Tensor:
        labels = labels.contiguous()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        maximum = hidden.new_full((hidden.shape[0],), float("-inf"), dtype=dtype)
        total, picked = torch.zeros_like(maximum), torch.zeros_like(maximum)
        reduce, _ = _chunk_operations(hidden, weight)
        buffer = hidden.new_empty(hidden.shape[0] * min(chunk, valid))
        for begin, end in _chunks(valid, chunk):
            logits = _logits(hidden, weight[begin:end], buffer)
            reduce(logits, labels, first + begin, end - begin, maximum, total, picked)
        if group is not None:
            local = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
            total *= torch.exp(local - maximum)
            both = torch.stack([total, picked])
            dist.all_reduce(both, group=group)
            total, picked = both.unbind()
        logsumexp = maximum + total.log()
        counted = labels != ignore_index
        ctx.save_for_backward(hidden, weight, labels, logsumexp, counted)
        ctx.arguments = (first, valid, chunk)
        ctx.into_main_grad = into_main_grad
        return torch.where(counted, logsumexp - picked, torch.zeros_like(picked))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, weight, labels, logsumexp, counted = ctx.saved_tensors
        first, valid, chunk = ctx.arguments
        scale = torch.where(counted, gradients[0], torch.zeros_like(logsumexp))
        _, gradient = _chunk_operations(hidden, weight)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.zeros_like(hidden, dtype=logsumexp.dtype) if needs_hidden else None
        dweight = None
        if needs_weight:
            dweight = placeholder(weight) if ctx.into_main_grad else torch.zeros_like(weight)
        buffer = hidden.new_empty(hidden.shape[0] * min(chunk, valid))
        for begin, end in _chunks(valid, chunk):
            logits = _logits(hidden, weight[begin:end], buffer)
            gradient(logits, labels, logsumexp, scale, first + begin, end - begin)
            if dhidden is not None:
                add_product(dhidden, logits, weight[begin:end])
            if needs_weight and ctx.into_main_grad:
                accumulate(hidden, logits, weight.main_grad[begin:end])
            elif dweight is not None:
                torch.mm(logits.t(), hidden, out=dweight[begin:end])
        dhidden = None if dhidden is None else dhidden.to(hidden.dtype)
        return dhidden, dweight, None, None, None, None, None, None, None


def _chunks(valid: int, chunk: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + chunk, valid)) for begin in range(0, valid, chunk)]


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Compute hidden @ weight.T in the buffer: new memory for every chunk would be touched anew."""
    shape = (hidden.shape[0], weight.shape[0])
    return torch.mm(hidden, weight.t(), out=buffer[: shape[0] * shape[1]].view(shape))


def _chunk_operations(hidden: Tensor, weight: Tensor) -> Any:
    if library.fused("linear_cross_entropy", hidden, weight):
        return torch.ops.nvmm.logits_reduce, torch.ops.nvmm.logits_gradient
    return eager_logits_reduce, eager_logits_gradient


def eager_logits_reduce(
    logits: Tensor,
    labels: Tensor,
    first: int,
    valid: int,
    maximum: Tensor,
    total: Tensor,
    picked: Tensor,
) -> None:
    """Take logits [rows, columns] into the rows' running statistics, all in place.

    They are the maximum, the sum of exp(logit - maximum), and the labels' logits in `picked`.
    Column c is id `first` + c.
    """
    logits = logits[:, :valid].to(maximum.dtype)
    top = torch.maximum(maximum, logits.amax(-1))
    total.mul_(torch.exp(maximum - top)).add_(torch.exp(logits - top.unsqueeze(-1)).sum(-1))
    maximum.copy_(top)
    column = labels - first
    here = (column >= 0) & (column < valid)
    of_labels = logits.gather(1, column.clamp(0, valid - 1).unsqueeze(1)).squeeze(1)
    picked.copy_(torch.where(here, of_labels, picked))


def eager_logits_gradient(
    logits: Tensor, labels: Tensor, logsumexp: Tensor, scale: Tensor, first: int, valid: int
) -> None:
    """Turn logits into (softmax - one_hot(label)) * scale in place; 0 from column `valid` on."""
    probabilities = torch.exp(logits.to(logsumexp.dtype) - logsumexp.unsqueeze(-1))
    columns = torch.arange(logits.shape[1], device=logits.device)
    probabilities -= (columns == (labels - first).unsqueeze(-1)).to(probabilities.dtype)
    probabilities *= scale.unsqueeze(-1)
    logits.copy_(torch.where(columns < valid, probabilities, torch.zeros_like(probabilities)))


def _fake_reduce(*_: Any) -> None:
    return None


if library.MISSING is None:
    torch.library.register_fake("nvmm::logits_reduce", _fake_reduce)
    torch.library.register_fake("nvmm::logits_gradient", _fake_reduce)
