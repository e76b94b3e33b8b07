"""FP8 in a model: which linears multiply in it, and what their scales remember from step to step.

Native backend: a `Quantizer` for each linear of the transformer blocks. Transformer Engine: its
modules have their own; what is theirs here is the exclusions, the padding and the checkpoint.
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

from nvmm.modules.encoders.base import EncoderTower
from nvmm.modules.linear import (
    INPUT,
    TENSORS,
    WEIGHT,
    ColumnParallelLinear,
    Quantizer,
    RowParallelLinear,
)
from nvmm.parallel.collectives import gather
from nvmm.parallel.fp8_recipe import Fp8
from nvmm.parallel.parameters import match, sharded_parameters, unmatched


class Scaling:
    """The FP8 scales of this rank's linears. Without FP8 it holds nothing and does nothing.

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
        found = {name: place for model in models for name, place in _linears(model).items()}
        _refuse_unmatched(fp8, found)
        frozen = _frozen_towers(models)
        for name, (linear, block, layer) in found.items():
            excluded = any(match(pattern, name) for pattern in fp8.exclude)
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                if excluded or fp8.keeps_precision(layer, block.config.num_layers):
                    continue
                _check_features(name, linear.weight, fp8, gathered=False)
                linear.quantizer = Quantizer(
                    fp8,
                    linear.tp_group,
                    _sharers(linear, block),
                    linear.weight.device,
                    has_gradient=id(block) not in frozen,
                )
                self.linears[name] = linear.quantizer
            elif excluded:
                linear.forward = _in_high_precision(linear.forward)  # type: ignore[method-assign]
                continue
            else:
                if not fp8.keeps_precision(layer, block.config.num_layers):
                    column = getattr(linear, "parallel_mode", None) == "column"
                    gathered = column and block.config.sequence_parallel
                    _check_features(name, linear.weight, fp8, gathered)
                self.linears[name] = _EngineScales(linear, block.config)
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
        """The weights have changed otherwise (loaded, merged)."""
        for quantizer in self._emulated():
            quantizer.forget_weight()

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """Scale and history of each tensor, float32 [1 + amax_history_len], whole on every rank.

        Keys are `fp8.<linear>.<input | weight | gradient>`; only delayed scaling has any.
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
                f"fp8.{name}.{tensor}", kept, replica_id=replica
            )
            for name, linear in self.linears.items()
            for tensor, kept in linear.state().items()
        }

    def load(self, loaded: dict[str, Tensor]) -> None:
        """Take over values of `sharded_state_dict`'s keys, of some of them or all."""
        self.forget_weights()
        for name, linear in self.linears.items():
            prefix = f"fp8.{name}."
            own = {key: kept for key, kept in loaded.items() if key.startswith(prefix)}
            linear.load({key.removeprefix(prefix): kept for key, kept in own.items()})

    def _emulated(self) -> list[Quantizer]:
        return [linear for linear in self.linears.values() if isinstance(linear, Quantizer)]


def _linears(model: Module) -> dict[str, tuple[Any, Any, int]]:
    """Global name -> (linear, its transformer block, layer from 0): what Transformer Engine's
    autocast covers, modules of a transformer block's layers with a weight matrix."""
    names = {id(found.parameter): found.name for found in sharded_parameters(model)}
    found = {}
    for block in model.modules():
        if not isinstance(block, TransformerBlock):
            continue
        for layer in block.layers:
            for module in layer.modules():
                weight: Any = getattr(module, "weight", None)
                name = names.get(id(weight))
                if name is not None and weight.dim() == 2:
                    found[name.removesuffix(".weight")] = (module, block, layer.layer_number - 1)
    return found


def _sharers(linear: Any, block: Any) -> dist.ProcessGroup:
    if block.config.context_parallel_size > 1:
        group: dist.ProcessGroup = parallel_state.get_tensor_and_context_parallel_group()
        return group
    return linear.tp_group  # type: ignore[no-any-return]


def _frozen_towers(models: Sequence[Module]) -> set[int]:
    """Identities of the blocks of encoders that train nothing, and so send no gradient back."""
    return {
        id(tower.decoder)
        for model in models
        for tower in model.modules()
        if isinstance(tower, EncoderTower)
        and not any(parameter.requires_grad for parameter in tower.parameters())
    }


def _refuse_unmatched(fp8: Fp8, found: dict[str, Any]) -> None:
    names = sorted({name for rank in gather(dict.fromkeys(found)) for name in rank})
    lost = unmatched(fp8.exclude, names)
    if lost:
        raise ValueError(
            f"precision.fp8.exclude: {lost} matches no linear; there are {', '.join(names[:3])} ..."
        )


def _check_features(name: str, weight: Tensor, fp8: Fp8, gathered: bool) -> None:
    """gathered: Transformer Engine gathers its input, and asserts that blocks are whole."""
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
    """A Transformer Engine module's forward outside of FP8. Not run: it needs a GPU."""
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
        """As Quantizer's."""
        return {
            tensor: torch.cat([meta.scale[column, None], meta.amax_history[:, column]])
            for tensor, (meta, column) in self._places().items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """As Quantizer's."""
        for tensor, kept in state.items():
            meta, column = self._places()[tensor]
            meta.scale[column] = kept[0]
            meta.amax_history[:, column] = kept[1:].to(meta.amax_history.device)

    def _places(self) -> dict[str, tuple[Any, int]]:
        if "scaling_fwd" not in self.module.fp8_meta:
            from megatron.core.fp8_utils import get_fp8_recipe

            self.module.fp8_meta.setdefault("num_gemms", 1)  # the first forward would
            self.module.fp8_meta["recipe"] = get_fp8_recipe(self.config)
            self.module.init_fp8_meta_tensors(self.module.fp8_meta["recipe"])
        forward, backward = (self.module.fp8_meta[f"scaling_{way}"] for way in ("fwd", "bwd"))
        places = ((forward, INPUT), (forward, WEIGHT), (backward, 0))
        return dict(zip(TENSORS, places, strict=True))
