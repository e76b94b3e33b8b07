"""mcore's parallel linears with products in FP8 where a `Quantizer` is attached.

    y = Q(x) Q(W)^T        dx = Q(dy) Q(W)        dW = Q(dy)^T Q(x)

Each product sees its operands quantised along the axis that it sums over: by rows and by columns,
which for one scale a tensor are the same numbers. Products of dequantised values are ordinary
matmuls in float32 (float64 for float64 inputs); results have the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

from nvmm.kernels.weight_gradient import accumulate, placeholder
from nvmm.modules.fp8_quantize import E4M3, E5M2, Quantized, amax, quantize, quantize_mx, scale_of
from nvmm.parallel.fp8_recipe import Fp8

TENSORS = ("input", "weight", "gradient")
INPUT, WEIGHT, GRADIENT = range(3)
Pair = tuple[Quantized, Quantized | None]


class Quantizer:
    """The quantiser of one linear's input, weight and output gradient, with its scales' history.

    Args:
        fp8: the recipe.
        group: tensor-parallel ranks of the linear.
        sharers: ranks that hold parts of one tensor, which has one scale: those, and of the
            language model's tokens context-parallel ranks too.
        device: of the linear.
        has_gradient: False where no gradient ever arrives (a frozen encoder): nothing is kept
            for one.

    amax: float32 [tensors], largest magnitudes since the last `roll`; history: [tensors,
    amax_history_len], position 0 the newest while it is open, the others oldest first; scale:
    [tensors]. Empty where the recipe is not delayed scaling.
    """

    def __init__(
        self,
        fp8: Fp8,
        group: dist.ProcessGroup,
        sharers: dist.ProcessGroup,
        device: torch.device,
        has_gradient: bool = True,
    ) -> None:
        self.fp8 = fp8
        self.group = group
        self.sharers = sharers
        self.dtypes = [E4M3, E4M3, E5M2 if fp8.gradients_in_e5m2 else E4M3][: 2 + has_gradient]
        count = len(self.dtypes) if fp8.recipe == "delayed" else 0
        self.amax = torch.zeros(count, device=device)
        self.history = torch.zeros(count, fp8.amax_history_len, device=device)
        self.scale = torch.ones(count, device=device)
        self._weight: dict[str, Quantized] = {}

    def __call__(self, x: Tensor, tensor: int, *, columns: bool, record: bool) -> Pair:
        """Quantise x [rows, columns] for products over its last axis, and for its first if asked.

        record: take its largest magnitude into `amax`.
        """
        dtype = self.dtypes[tensor]
        if self.fp8.recipe == "mxfp8":
            across = quantize_mx(x, dtype, (32, 1)) if columns else None
            return quantize_mx(x, dtype, (1, 32)), across
        if self.fp8.recipe == "blockwise":
            if tensor == WEIGHT:
                return (_in_blocks(x, dtype, (128, 128)),) * 2
            across = _in_blocks(x, dtype, (128, 1)) if columns else None
            return _in_blocks(x, dtype, (1, 128)), across
        largest = amax(x, None)
        if self.fp8.recipe == "delayed":
            if record:
                self.amax[tensor] = torch.maximum(self.amax[tensor], largest.float().view(()))
            scale = self.scale[tensor].to(largest.dtype).view(1, 1)
        else:
            if self.sharers.size() > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.sharers)
            scale = scale_of(largest, dtype)
        return (quantize(x, dtype, scale),) * 2

    def weight(self, weight: Tensor, direction: str, *, keep: bool) -> Quantized:
        """Return the weight for products over its "rows" or "columns".

        keep: it does not change until `forget_weight`; record it, and quantise it once.
        """
        if direction not in self._weight:
            options = {"columns": direction == "columns", "record": keep}
            rows, columns = self(weight, WEIGHT, **options)
            quantized = {"rows": rows} | ({} if columns is None else {"columns": columns})
            if not keep:
                return quantized[direction]
            self._weight |= quantized
        return self._weight[direction]

    def forget_weight(self) -> None:
        """Drop the quantised weight: the weight has changed."""
        self._weight = {}

    def roll(self, amax: Tensor) -> None:
        """Close a step: put `amax` [tensors], of all ranks, into the history; set the next scale.

        A tensor that no rank has seen keeps history and scale; one whose largest magnitude is not
        finite keeps its scale (Transformer Engine's rules).
        """
        seen = amax > 0
        history = self.history.clone()
        history[:, 0] = amax
        window = history.amax(1) if self.fp8.amax_compute_algo == "max" else amax
        limits = torch.tensor([torch.finfo(d).max for d in self.dtypes], device=amax.device)
        scale = (limits / window / 2**self.fp8.margin).clamp(max=torch.finfo(torch.float32).max)
        history = history.roll(-1, 1)
        history[:, 0] = 0
        self.scale = torch.where(seen & window.isfinite(), scale, self.scale)
        self.history = torch.where(seen[:, None], history, self.history)
        self.amax.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return each tensor's scale, then its history, for a checkpoint: [1 + length]."""
        rows = torch.cat([self.scale[:, None], self.history], dim=1)
        return dict(zip(TENSORS, rows, strict=False))

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back rows that `state` returned, of some of the tensors or all."""
        for name, values in state.items():
            tensor = TENSORS.index(name)
            self.scale[tensor], self.history[tensor] = values[0], values[1:]


def _in_blocks(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantized:
    scale = scale_of(amax(x, block), dtype, power_of_two=True)
    return quantize(x, dtype, scale, block)


@dataclass(frozen=True)
class _LinearMode:
    """The communication and bookkeeping of one call of a linear.

    gather_input: the input's tokens are split over the group and gathered. reduce_grad: the input's
    gradient is summed over the group. training: amaxes are recorded, and the quantised weight is
    cached, since it stays the same for a step. into_main_grad: the weight's gradient is added to
    `weight.main_grad`.
    """

    gather_input: bool
    reduce_grad: bool
    training: bool
    into_main_grad: bool


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantizer: Quantizer, mode: _LinearMode
    ) -> Tensor:
        needs_columns = ctx.needs_input_grad[1]
        # 1. The input [tokens, in] is quantised before it is gathered, so that FP8 bytes travel.
        flat = x.flatten(0, -2)
        rows, columns = quantizer(flat, INPUT, columns=needs_columns, record=mode.training)
        if mode.gather_input:
            rows = rows.gathered(quantizer.group)
        # 2. The product [tokens, out] is one of dequantised values.
        dtype = torch.promote_types(x.dtype, torch.float32)
        product = quantizer.weight(weight, "rows", keep=mode.training).dequantize(dtype).t()
        y = (rows.dequantize(dtype) @ product).to(x.dtype)
        # 3. Backward needs the input by columns, for the weight's gradient alone.
        if needs_columns and columns is not None:
            ctx.save_for_backward(weight, columns.data, columns.inverse)
            ctx.block = columns.block
        else:
            ctx.save_for_backward(weight)
        ctx.quantizer, ctx.mode, ctx.dtype = quantizer, mode, x.dtype
        return y.view(-1, *x.shape[1:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, *saved = ctx.saved_tensors
        quantizer, mode = ctx.quantizer, ctx.mode
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        flat = gradients[0].flatten(0, -2)
        rows, columns = quantizer(flat, GRADIENT, columns=needs_weight, record=mode.training)
        dx = dweight = None
        if needs_input:
            product = quantizer.weight(weight, "columns", keep=mode.training).dequantize(dtype)
            dx = (rows.dequantize(dtype) @ product).to(ctx.dtype)
            dx = _reduced(dx.view(*gradients[0].shape[:-1], -1), quantizer.group, mode)
        if needs_weight:
            data, inverse = saved
            x = Quantized(data, inverse, ctx.block)
            x = x.gathered(quantizer.group) if mode.gather_input else x
            operands = x.dequantize(dtype), columns.dequantize(dtype)
            if mode.into_main_grad:
                accumulate(*operands, weight.main_grad)
                dweight = placeholder(weight)
            else:
                dweight = (operands[1].t() @ operands[0]).to(weight.dtype)
        return dx, dweight, None, None


def _reduced(dx: Tensor, group: dist.ProcessGroup, mode: _LinearMode) -> Tensor:
    """Sum dx over ranks that hold other output features; return that of this rank's tokens."""
    if mode.gather_input:
        local_dx = dx.new_empty(dx.shape[0] // group.size(), *dx.shape[1:])
        dist.reduce_scatter_tensor(local_dx, dx.contiguous(), group=group)
        return local_dx
    if mode.reduce_grad:
        dist.all_reduce(dx, group=group)
    return dx


class _MaybeFp8:
    """A mixin that overrides the method in which mcore's linears multiply."""

    quantizer: Quantizer | None = None
    training: bool

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.quantizer is None:
            return super()._forward_impl(input, weight, *args, **options)  # type: ignore[misc,no-any-return]
        mode = _LinearMode(
            gather_input=options["sequence_parallel"],
            reduce_grad=options["allreduce_dgrad"],
            training=self.training,
            into_main_grad=options["gradient_accumulation_fusion"] and hasattr(weight, "main_grad"),
        )
        y: Tensor = _Linear.apply(input, weight, self.quantizer, mode)
        return y if options["bias"] is None else y + options["bias"]


class ColumnParallelLinear(_MaybeFp8, layers.ColumnParallelLinear):
    """mcore's linear with its output split over TP.

    In FP8 under sequence parallelism the input is quantised before it is gathered, forward and for
    the weight's gradient; its gradient is reduced in the input's dtype.
    """


class RowParallelLinear(_MaybeFp8, layers.RowParallelLinear):
    """mcore's linear with its input split over TP.

    In FP8 its output is reduced in the input's dtype. Under sequence parallelism the output's
    gradient is quantised after it is gathered; Transformer Engine does it before, with the same
    numbers.
    """
