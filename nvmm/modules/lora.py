"""LoRA (2106.09685): trained low-rank updates beside frozen parallel linears.

A linear with weight W [out, in] that has an adapter computes

    x W^T + alpha / rank * dropout(x) A^T B^T

A fused linear (QKV, gate and up) stands for several members, each of which is a module of its own
in PEFT and has an A of its own here: A is [members * rank, in], member by member. B [out, rank]
has W's rows in W's order, and a row multiplies its member's A. So any set of PEFT's per-module
adapters is one of ours, and the other way round.

The base model is left as it is: an adapter is a module beside its linear (`linear_qkv_lora`) that a
forward hook calls; its parameters are named after the linear (`...linear_qkv.lora_a`, `.lora_b`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

from nvmm.parallel.parameters import match, refuse_unmatched, sharded_parameters
from nvmm.parallel.setup import Normal

FACTORS = (".lora_a", ".lora_b")
"""The endings of the global names of an adapter's two parameters, after the linear's name."""
_SUFFIX = "_lora"


@dataclass(frozen=True)
class Lora:
    """The linears that get an adapter, and the other parameters that are trained.

    Patterns are shell patterns of global names, of linears (without `.weight`) or parameters; one
    that matches nothing is an error.

    Args:
        targets: linears, `language.*.linear_qkv` for the decoder's q, k and v.
        rank, alpha: of the update; it is scaled by alpha / rank.
        dropout: of the adapter's input, in training.
        train: parameters of the base that are trained whole (`connector.*`); all others are frozen.
    """

    targets: Sequence[str]
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    train: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")

    def attach(self, models: Sequence[Module]) -> None:
        """Give this rank's targets their adapters, before weights are drawn. Collective.

        A starts as N(0, 1 / (3 in)), which has the variance of PEFT's Kaiming-uniform, drawn from
        the seed and the global name like every weight; B starts as zeros.
        """
        candidates = linears(models)
        refuse_unmatched("lora.targets", self.targets, candidates, "no linear")
        for name, linear in candidates.items():
            if any(match(pattern, name) for pattern in self.targets):
                linear.attach(self)
        for sharded in sharded_parameters(models):
            if sharded.name.endswith(FACTORS[0]):
                Normal((3 * sharded.global_shape[-1]) ** -0.5)(sharded.parameter)

    def freeze(self, models: Sequence[Module]) -> None:
        """Freeze all but the adapters and what `train` names; frozen parameters stay frozen.

        Collective. `optim.freeze` does not reach adapters.
        """
        base = []
        for sharded in sharded_parameters(models):
            if sharded.name.endswith(FACTORS):
                sharded.parameter.requires_grad_(True)
            else:
                base.append(sharded)
        trainable = [sharded.name for sharded in base if sharded.parameter.requires_grad]
        refuse_unmatched("lora.train", self.train, trainable, "no parameter that is not frozen")
        for sharded in base:
            if not any(match(pattern, sharded.name) for pattern in self.train):
                sharded.parameter.requires_grad_(False)


@dataclass(frozen=True)
class Linear:
    """A parallel linear of this rank that may get an adapter.

    parent, child: the module that holds it, and its name there. runs, first: as `members` takes
    them, for this rank's rows.
    """

    parent: Module
    child: str
    module: Any
    runs: tuple[int, ...]
    first: int = 0

    def mask(self) -> Tensor:
        """Return fp32 [rows, members]: 1 at each row's member, else 0."""
        ids = members(self.runs, self.module.weight.shape[0], self.first)
        return (ids[:, None] == torch.arange(len(self.runs), device="cpu")).float()

    def attach(self, lora: Lora) -> None:
        """Put an adapter beside the linear, which a forward hook adds to its output."""
        adapter = Adapter(self, lora)
        self.parent.add_module(self.child + _SUFFIX, adapter)

        def add(linear: Any, inputs: Any, options: dict[str, Any], output: Any) -> Any:
            x = inputs[0] if inputs else options["input_"]
            gathered = options.get("runtime_gather_output")
            if gathered is None:
                gathered = getattr(linear, "gather_output", False)
            return output[0] + adapter(x, gathered), output[1]

        self.module.register_forward_hook(add, with_kwargs=True)


def linears(models: Sequence[Module]) -> dict[str, Linear]:
    """Return this rank's linears by global name without `.weight`, but expert and tied ones."""
    names = {id(sharded.parameter): sharded.name for sharded in sharded_parameters(models)}
    by_name = {}
    for model in models:
        for parent in model.modules():
            for child, module in parent.named_children():
                if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    continue
                name = names.get(id(module.weight), "").removesuffix(".weight")
                if not module.is_expert and name.rpartition(".")[2] == child:
                    by_name[name] = Linear(parent, child, module, *_rows(parent, child, module))
    return by_name


def _rows(parent: Module, child: str, linear: Any) -> tuple[tuple[int, ...], int]:
    rows = linear.weight.shape[0]
    if isinstance(parent, SelfAttention) and child == "linear_qkv":
        config = parent.config
        if getattr(config, "attention_output_gate", False):
            raise ValueError("lora.targets: linear_qkv with attention_output_gate is not supported")
        width = parent.hidden_size_per_attention_head
        queries = config.num_attention_heads // config.num_query_groups * width
        return (queries, width, width), linear.tp_group.rank() * rows
    if isinstance(parent, MLP) and child == "linear_fc1" and parent.config.gated_linear_unit:
        return (rows // 2, rows // 2), 0
    return (rows,), 0


def members(runs: Sequence[int], count: int, first: int = 0) -> Tensor:
    """Return the member of a fused linear that each of its rows belongs to.

    runs: rows of each member, in the period that repeats along the rows (q, k and v of a group).
    first: index of the first row; count: how many.

    Returns: int64 [count].
    """
    ends = torch.tensor(list(runs), device="cpu").cumsum(0)
    rows = torch.arange(first, first + count, device="cpu") % int(ends[-1])
    return torch.bucketize(rows, ends, right=True)


def stacked(b: Tensor, mask: Tensor) -> Tensor:
    """Put each row of B [rows, rank] in the columns of its member: [rows, members * rank].

    mask: [rows, members], 1 at a row's member and 0 elsewhere.
    """
    return (mask.unsqueeze(-1) * b.unsqueeze(1)).flatten(1)


class Adapter(Module):
    """The update of one linear, on the part of it that this rank has.

    Column-parallel: A is whole on every rank, B is split by rows; row-parallel: A is split by
    columns, B is whole. What is communicated is the product with A, `rank` wide.
    """

    def __init__(self, linear: Linear, lora: Lora) -> None:
        super().__init__()
        module = linear.module
        weight: Tensor = module.weight
        rows, columns = weight.shape
        count = len(linear.runs)
        options: Any = {"dtype": weight.dtype, "device": weight.device}
        self.a = Parameter(torch.zeros(count * lora.rank, columns, **options))
        self.b = Parameter(torch.zeros(rows, lora.rank, **options))
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.runs = linear.runs
        self.group = module.tp_group
        self.is_column = isinstance(module, ColumnParallelLinear)
        self.sequence_parallel = module.sequence_parallel
        self.mask: Tensor | None
        mask = linear.mask().to(**options) if count > 1 else None
        self.register_buffer("mask", mask, persistent=False)
        self._mark(weight)

    def _mark(self, weight: Any) -> None:
        """Tell mcore's norm and all reductions what is whole on each rank and what is not."""
        split: Any = self.b if self.is_column else self.a
        whole: Any = self.a if self.is_column else self.b
        split.tensor_model_parallel = getattr(weight, "tensor_model_parallel", False)
        # Under sequence parallelism a rank has the gradient of its own tokens: mcore sums them.
        whole.sequence_parallel = self.sequence_parallel
        # A replicated encoder's linear sees a rank's own tiles.
        self.sees_own_tiles = getattr(weight, "sum_gradients_over_tensor_parallel", False)
        for parameter in (split, whole):
            parameter.sum_gradients_over_tensor_parallel = self.sees_own_tiles

    def forward(self, x: Tensor, gathered: bool = False) -> Tensor:
        """Return what is added to the linear's output for its input x [s, b, in].

        gathered: the linear gathers its output over TP.
        """
        low = F.linear(self._drop(x), self.a)
        if self.is_column and self.sequence_parallel:
            low = tensor_parallel.gather_from_sequence_parallel_region(low, group=self.group)
        elif self.is_column:
            low = tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.group)
        elif self.sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.group)
        b = self.b if self.mask is None else stacked(self.b, self.mask)
        update = F.linear(low, b) * self.scale
        if gathered:
            return tensor_parallel.gather_from_tensor_model_parallel_region(
                update, group=self.group
            )
        return update

    def _drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the input, with the masks that tensor parallelism needs.

        Ranks of a row-parallel linear have different features and draw different masks; ranks of a
        column-parallel one have the same and draw the same. Sequence-parallel layers run in the TP
        generator already. Ranks of a replicated encoder have different tiles.
        """
        if not (self.training and self.dropout):
            return x
        split = not self.is_column and not self.sequence_parallel and self.group.size() > 1
        fork = split or self.sees_own_tiles
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else contextlib.nullcontext():
            return F.dropout(x, self.dropout)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return both parameters under the linear's global name, split as its weight is."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            prefix,
            {"b": 0} if self.is_column else {"a": 1},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if len(self.runs) == 2:
            state[f"{prefix}b"] = apply_swiglu_sharded_factory(state[f"{prefix}b"], sharded_offsets)
        named = prefix.removesuffix(f"{_SUFFIX}.")
        replace_prefix_for_sharding(state, prefix, f"{named}{FACTORS[0][:-1]}")
        return state


def only_adapters_train(module: Module) -> bool:
    """Return True when something of a module is trained, and all of it belongs to adapters."""
    adapted = {
        id(parameter)
        for adapter in module.modules()
        if isinstance(adapter, Adapter)
        for parameter in adapter.parameters()
    }
    trained = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    return bool(trained) and all(parameter in adapted for parameter in trained)
