"""FP8 in a model: the linears that multiply in it, and the scales they keep from step to step.

The native backend gives each linear of the transformer blocks a `Quantizer`. Transformer Engine's
modules have their own scales; here they get the exclusions, the padding and the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn import Module

from nvmm.modules.encoders.base import Encoder
from nvmm.modules.linear import (
    INPUT,
    TENSORS,
    WEIGHT,
    ColumnParallelLinear,
    Quantizer,
    RowParallelLinear,
)
from nvmm.parallel.fp8_recipe import Fp8
from nvmm.parallel.parameters import match, refuse_unmatched, sharded_parameters


class Scaling:
    """The FP8 scales of this rank's linears. Without FP8 this holds nothing and does nothing.

    A step's amaxes are reduced over the ranks that share a linear (tensor, context and data
    parallel) and enter the histories once, when the weights have changed: every micro-batch of a
    step, and the recomputation of its activations, sees the same scales at any layout.

    Args:
        models: this rank's chunks, built, frozen and with their adapters. Collective.
        fp8: the recipe, None for none.

    Raises ValueError for a pattern of `exclude` that matches no linear, and for features that do
    not divide as FP8 needs.
    """

    def __init__(self, models: Sequence[Module], fp8: Fp8 | None) -> None:
        self.fp8 = fp8
        self.linears: dict[str, Quantizer | _EngineScales] = {}
        if fp8 is None:
            return
        linears = {name: entry for model in models for name, entry in _linears(model).items()}
        refuse_unmatched("precision.fp8.exclude", fp8.exclude, linears, "no linear")
        # Encoders that train nothing send no gradient back, so none is scaled in their blocks.
        frozen_blocks = {
            id(module.decoder)
            for model in models
            for module in model.modules()
            if isinstance(module, Encoder)
            and not any(parameter.requires_grad for parameter in module.parameters())
        }
        for name, (linear, block, layer) in linears.items():
            excluded = any(match(pattern, name) for pattern in fp8.exclude)
            # 1. A native linear, which multiplies in FP8 only where it has a quantizer.
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                if excluded or fp8.keeps_precision(layer, block.config.num_layers):
                    continue
                _check_features(name, linear.weight, fp8, gathered=False)
                linear.quantizer = Quantizer(
                    fp8,
                    linear.tp_group,
                    # Context-parallel ranks hold other tokens of the tensors of a decoder's linear.
                    linear.tp_group
                    if block.config.context_parallel_size == 1
                    else parallel_state.get_tensor_and_context_parallel_group(),
                    linear.weight.device,
                    has_gradient=id(block) not in frozen_blocks,
                )
                self.linears[name] = linear.quantizer
            # 2. Transformer Engine's, which mcore runs in FP8 unless it is told otherwise.
            elif excluded:
                linear.forward = _in_high_precision(linear.forward)  # type: ignore[method-assign]
                continue
            else:
                if not fp8.keeps_precision(layer, block.config.num_layers):
                    column = getattr(linear, "parallel_mode", None) == "column"
                    gathered = column and block.config.sequence_parallel
                    _check_features(name, linear.weight, fp8, gathered)
                self.linears[name] = _EngineScales(linear, block.config)
            # 3. Tokens that do not divide are padded; under sequence parallelism rows do divide.
            if not block.config.sequence_parallel:
                align_tokens(linear, fp8.row_multiple(gathered=False))

    def update(self) -> None:
        """Close a step after the weights have changed; collective."""
        emulated = self._emulated()
        amaxes = [quantizer.amax for quantizer in emulated]
        if any(amax.numel() for amax in amaxes):
            reduced = torch.cat(amaxes)
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group)
            for quantizer, amax in zip(
                emulated, reduced.split([a.numel() for a in amaxes]), strict=True
            ):
                quantizer.roll(amax)
        self.forget_weights()

    def discard(self) -> None:
        """Close a step that was not applied: as if it had not been."""
        for quantizer in self._emulated():
            quantizer.amax.zero_()
            quantizer.forget_weight()  # the next step's first use records its amax

    def forget_weights(self) -> None:
        """Drop quantised weights after the weights have changed otherwise (loaded, merged)."""
        for quantizer in self._emulated():
            quantizer.forget_weight()

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """Return each tensor's scale and history, float32 [1 + amax_history_len].

        They are whole on every rank. Keys are `fp8.<linear>.<input | weight | gradient>`; only
        delayed scaling has any.
        """
        if self.fp8 is None or self.fp8.recipe != "delayed":
            return {}
        replica = (
            0,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return {
            f"fp8.{name}.{tensor}": ShardedTensor.from_rank_offsets(
                f"fp8.{name}.{tensor}", state, replica_id=replica
            )
            for name, linear in self.linears.items()
            for tensor, state in linear.state().items()
        }

    def load(self, loaded: dict[str, Tensor]) -> None:
        """Take over values of `sharded_state_dict`'s keys, of some of them or all."""
        self.forget_weights()
        for name, linear in self.linears.items():
            keys = {f"fp8.{name}.{tensor}": tensor for tensor in TENSORS}
            linear.load({keys[key]: state for key, state in loaded.items() if key in keys})

    def _emulated(self) -> list[Quantizer]:
        return [linear for linear in self.linears.values() if isinstance(linear, Quantizer)]


def _linears(model: Module) -> dict[str, tuple[Any, Any, int]]:
    """Return global name -> (linear, its transformer block, layer from 0).

    They are the modules with a weight matrix in the layers of transformer blocks, which Transformer
    Engine's autocast covers.
    """
    names = {id(sharded.parameter): sharded.name for sharded in sharded_parameters(model)}
    by_name = {}
    for block in model.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for layer in block.layers:
            for module in layer.modules():
                weight: Any = getattr(module, "weight", None)
                name = names.get(id(weight))
                if name is not None and weight.dim() == 2:
                    by_name[name.removesuffix(".weight")] = (module, block, layer.layer_number - 1)
    return by_name


def _check_features(name: str, weight: Tensor, fp8: Fp8, gathered: bool) -> None:
    """Refuse features that FP8's blocks do not divide.

    gathered: Transformer Engine gathers the input, and asserts that blocks are whole.
    """
    multiples = fp8.feature_multiple, fp8.row_multiple(gathered)
    for size, what, multiple in zip(weight.shape, ("output", "input"), multiples, strict=True):
        if size % multiple:
            raise ValueError(
                f"precision.fp8.recipe={fp8.recipe}: {name} has {size} {what} features on a rank,"
                f" which must be divisible by {multiple}; leave it out with"
                " precision.fp8.exclude"
            )


def align_tokens(linear: Module, multiple: int) -> None:
    """Give a linear rows of zeros up to a multiple of tokens, and take their outputs away again.

    FP8 products want whole groups of tokens; a tile has 1025, packed and decoded rows any number.
    """

    shape = torch.Size()

    def pad(module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        x, *others = inputs
        shape = x.shape[:-1]
        missing = -shape.numel() % multiple
        if missing:
            x = F.pad(x.flatten(0, -2), (0, 0, 0, missing)).unsqueeze(1)
        return (x, *others)

    def cut(module: Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y, *others = output
        if y.shape[:-1] != shape:
            y = y.flatten(0, -2)[: shape.numel()].view(*shape, -1)
        return (y, *others)

    linear.register_forward_pre_hook(pad)
    linear.register_forward_hook(cut)


def _in_high_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a Transformer Engine module's forward outside of FP8. It needs a GPU: not run yet."""
    from transformer_engine.pytorch import fp8_autocast

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **kwargs)

    return wrapper


class _EngineScales:
    """Delayed scaling's state of a Transformer Engine module as tensors, not as its pickled bytes.

    From its source (2.11), not run: it needs a GPU. Columns of its forward state are input, weight
    and output, of its backward state the output's and the input's gradient.
    """

    def __init__(self, module: Any, config: Any) -> None:
        self.module, self.config = module, config

    def state(self) -> dict[str, Tensor]:
        """Return the state as `Quantizer.state` does."""
        return {
            tensor: torch.cat([meta.scale[column, None], meta.amax_history[:, column]])
            for tensor, (meta, column) in self._columns().items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Load a state as `Quantizer.load` does."""
        for tensor, values in state.items():
            meta, column = self._columns()[tensor]
            meta.scale[column] = values[0]
            meta.amax_history[:, column] = values[1:].to(meta.amax_history.device)

    def _columns(self) -> dict[str, tuple[Any, int]]:
        if "scaling_fwd" not in self.module.fp8_meta:
            from megatron.core.fp8_utils import get_fp8_recipe

            self.module.fp8_meta.setdefault("num_gemms", 1)  # the first forward would
            self.module.fp8_meta["recipe"] = get_fp8_recipe(self.config)
            self.module.init_fp8_meta_tensors(self.module.fp8_meta["recipe"])
        forward, backward = (self.module.fp8_meta[f"scaling_{way}"] for way in ("fwd", "bwd"))
        columns = ((forward, INPUT), (forward, WEIGHT), (backward, 0))
        return dict(zip(TENSORS, columns, strict=True))
