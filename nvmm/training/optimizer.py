"""mcore's distributed optimizer over frozen and grouped parameters, with our AdamW and norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module

from nvmm.config.batch_sizes import BatchSizes
from nvmm.kernels.adamw import FusedAdam
from nvmm.kernels.multi_tensor import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale
from nvmm.modules.lora import FACTORS
from nvmm.parallel.parameters import (
    match,
    names_on_all_ranks,
    refuse_unmatched,
    sharded_parameters,
)
from nvmm.parallel.setup import Parallel, Precision
from nvmm.training.optim import MOMENTS, Group, Optim


def freeze(models: Sequence[Module], patterns: Sequence[str]) -> list[str]:
    """Set requires_grad to False by pattern, before `wrap`: frozen parameters then hold no
    gradient buffer, fp32 copy or optimizer state. Collective; returns the whole model's frozen
    global names. Raises ValueError for a pattern that matches nothing on any pipeline stage, or
    adapters alone: they are trained, whatever freezes their base.
    """
    parameters = sharded_parameters(models)
    names = names_on_all_ranks(parameter.name for parameter in parameters)
    base = [name for name in names if not name.endswith(FACTORS)]
    refuse_unmatched("optim.freeze", patterns, base, "no parameter that it can freeze")
    for parameter in parameters:
        if any(match(pattern, parameter.name) for pattern in patterns):
            parameter.parameter.requires_grad_(False)
    return [name for name in names if any(match(pattern, name) for pattern in patterns)]


def wrap(models: Sequence[Module], parallel: Parallel, precision: Precision) -> list[Any]:
    """Wrap each chunk in mcore's DistributedDataParallel.

    It is always set for the distributed optimizer: the plain one writes another checkpoint format.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    return [
        # Only the first chunk's reduction is on the critical path of an interleaved schedule.
        DistributedDataParallel(model.config, config, model, disable_bucketing=index > 0)  # type: ignore[arg-type]
        for index, model in enumerate(models)
    ]


def install_adam(moments_dtype: torch.dtype = torch.float32) -> None:
    """Make mcore build `FusedAdam`: it picks TE's, Apex's or torch's at import and takes no other.

    torch's keeps a step in every parameter's state, which mcore cannot load afresh. Raises
    AttributeError when this mcore has other names.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    adam = functools.partial(FusedAdam, moments_dtype=moments_dtype)
    _replace(optimizer, "its Adam", Adam=adam, USING_PYTORCH_OPTIMIZER=False)
    names = {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True}
    _replace(distrib_optimizer, "its Adam", **names)


def install_multi_tensor() -> None:
    """Replace mcore's norm and scaling of gradient lists, so that every machine computes alike.

    mcore uses TE's, Apex's or its own loops. Megatron FSDP, which nvmm does not use, keeps its own.
    Raises AttributeError when this mcore has other names.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer

    names = {
        "multi_tensor_applier": multi_tensor_applier,
        "multi_tensor_scale_impl": multi_tensor_scale,
    }
    _replace(optimizer, "its scaling of lists", **names)
    _replace(clip_grads, "its gradient norm", l2_norm_impl=multi_tensor_l2norm, **names)


def _replace(module: ModuleType, what: str, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(module, name):
            raise AttributeError(
                f"{module.__name__}.{name} is gone from megatron-core: {what} cannot be replaced"
            )
        setattr(module, name, value)


def build_optimizer(
    ddp_models: Sequence[Any],
    optim: Optim,
    precision: Precision,
    max_steps: int,
    batch_sizes: BatchSizes | None = None,
) -> Optimizer:
    """Build mcore's distributed optimizer over the trainable parameters of `wrap`ped chunks.

    batch_sizes: of the run, which a schedule by tokens needs.

    Collective: patterns are matched against the whole model. Raises ValueError for a pattern of
    `optim.no_decay` that matches nothing, of `optim.groups` that matches nothing trainable, for a
    parameter in two groups, and when nothing is trainable.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    # 1. Replace mcore's functions first: it looks them up when the optimizer is built.
    install_adam(MOMENTS[optim.moments_dtype])
    install_multi_tensor()
    # 2. Learning rates of mcore's config are the default group's; others override them.
    groups = optim.param_groups()
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=precision.dtype == "bf16",
        params_dtype=precision.torch_dtype,
        use_distributed_optimizer=True,
    )
    # 3. Each data-parallel rank gets a share of masters and moments. `Parallel.initialize` makes
    # no gloo groups beside the others, so mcore must not look for them.
    mcore = get_megatron_optimizer(
        config,
        list(ddp_models),
        config_overrides=_overrides(ddp_models, optim, groups),
        use_gloo_process_groups=False,
    )
    return Optimizer(mcore, optim, groups, max_steps, batch_sizes)


def _overrides(
    ddp_models: Sequence[Any], optim: Optim, groups: list[Group]
) -> dict[Any, dict[str, float]]:
    """Return mcore's param-group overrides, by parameter: mcore passes names local to a stage.

    Group i carries lr_mult = i + 1. mcore 0.16.1 reads that number nowhere but tells groups apart
    by it when it loads a state; without it all groups would get one of their learning rates.
    """
    from megatron.core.optimizer import ParamKey, ParamPredicate

    parameters = sharded_parameters([model.module for model in ddp_models])
    # 1. Every pattern does something, and no parameter is in two groups.
    names = [p.name for p in parameters]
    refuse_unmatched("optim.no_decay", optim.no_decay, names, "no parameter")
    trainable = names_on_all_ranks(p.name for p in parameters if p.parameter.requires_grad)
    if not trainable:
        raise ValueError(f"optim.freeze={list(optim.freeze)} leaves nothing to train")
    patterns = [group.pattern for group in groups if group.pattern is not None]
    refuse_unmatched("optim.groups", patterns, trainable, "no trainable parameter")
    for name in trainable:
        several = [pattern for pattern in patterns if match(pattern, name)]
        if len(several) > 1:
            raise ValueError(f"optim.groups: {name} matches more than one pattern: {several}")

    # 2. The parameters of each group, and those that decay leaves alone: vectors and `no_decay`.
    members: list[set[int]] = [set() for _ in groups]
    undecayed: set[int] = set()
    for p in parameters:
        for index, group in enumerate(groups):
            if group.pattern is not None and match(group.pattern, p.name):
                members[index].add(id(p.parameter))
        vector = p.parameter.dim() == 1 or p.name.endswith(".bias")
        if vector or any(match(pattern, p.name) for pattern in optim.no_decay):
            undecayed.add(id(p.parameter))

    def key(name: str, identities: set[int]) -> Any:
        return ParamKey(predicate=ParamPredicate(name=name, fn=lambda p: id(p) in identities))

    # 3. One override a group; a default group (no pattern) has the config's own values.
    overrides = {
        key(f"group {index}", members[index]): {
            "lr_mult": float(index + 1),
            "max_lr": group.learning_rate,
            "min_lr": group.min_learning_rate,
        }
        for index, group in enumerate(groups)
        if group.pattern is not None
    }
    overrides[key("no decay", undecayed)] = {"wd_mult": 0.0}
    return overrides


class Optimizer:
    """One step in two halves, so that the norm is known before any parameter changes.

    Every method but `set_step` is collective. `mcore` is megatron-core's ChainedOptimizer around
    its DistributedOptimizer; `distributed` is the latter.
    """

    def __init__(
        self,
        mcore: Any,
        optim: Optim,
        groups: list[Group],
        max_steps: int,
        batch_sizes: BatchSizes | None = None,
    ) -> None:
        self.mcore = mcore
        self.distributed = mcore.chained_optimizers[0]
        self.optim = optim
        self.groups = groups
        self.max_steps = max_steps
        self.batch_sizes = batch_sizes
        self.grad_norm = 0.0
        self.adam: FusedAdam = self.distributed.optimizer
        self.adam.initialize_state()
        for group in mcore.param_groups:
            # lr_mult tells a parameter's group, see `_overrides`.
            weight_decay = groups[int(group["lr_mult"]) - 1].weight_decay
            group["weight_decay"] = weight_decay * group["wd_mult"]
        self.set_step(0)

    def set_step(self, step: int) -> float:
        """Set every group's learning rate for 0-based `step`; return the default group's."""
        rates = self.optim.rates(step, self.max_steps, self.batch_sizes)
        for group in self.mcore.param_groups:
            group["lr"] = rates[int(group["lr_mult"]) - 1]
        return rates[0]

    def zero_grad(self) -> None:
        """Clear the gradients before a forward pass, DDP's buffers included."""
        for model in self.mcore.model_chunks:
            model.zero_grad_buffer()
        self.mcore.zero_grad()

    def prepare(self) -> float:
        """Take over the reduced gradients; return their global L2 norm before clipping.

        The norm is the same on every rank; each parameter counts once, however many ranks hold it.
        """
        self.mcore.prepare_grads()
        self.grad_norm = float(self.mcore.get_grad_norm())
        return self.grad_norm

    @torch.no_grad()
    def apply(self) -> None:
        """Clip by the norm of `prepare` and update the parameters."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        parameters = self.distributed.get_parameters()
        if self.optim.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, self.optim.clip_grad, self.grad_norm)
        self.mcore.step_with_ready_grads()

    def discard(self) -> None:
        """Drop the prepared gradients: parameters and optimizer state stay as they are."""
        self.mcore.zero_grad()

    def step(self) -> tuple[bool, float]:
        """Do a whole step: apply it if the norm is finite, else discard it; (applied, norm)."""
        norm = self.prepare()
        finite = math.isfinite(norm)
        if finite:
            self.apply()
        else:
            self.discard()
        return finite, norm

    def reload_parameters(self) -> None:
        """Take the fp32 master weights from the model again, after it loaded other weights."""
        self.mcore.reload_model_params()

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool, sharding_type: str
    ) -> dict[str, Any]:
        """Return the sharded tensors of master weights and running means, and nothing else.

        mcore's own adds its param groups and bucket sizes, pickled; learning rates and decays are
        the config's here, and the step is `num_steps`.
        """
        from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

        state = self.mcore.sharded_state_dict(
            model_state, is_loading, metadata={"distrib_optim_sharding_type": sharding_type}
        )["param_state"]
        if sharding_type == "dp_reshardable":
            _zero_gaps(state)
        for key, value in state.items():
            if isinstance(value, ShardedObject):
                state[key] = LocalNonpersistentObject(value.data)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], sharding_type: str, num_steps: int) -> None:
        """Load what `sharded_state_dict` described. num_steps: updates made so far."""
        self.mcore.load_state_dict(
            self.mcore.state_dict()
            | {"param_state": state, "param_state_sharding_type": sharding_type}
        )
        for group in self.mcore.param_groups:
            group["step"] = num_steps

    @property
    def num_steps(self) -> int:
        """Updates made so far, for AdamW's bias correction. Skipped steps do not count."""
        return int(self.mcore.param_groups[0]["step"])


def _zero_gaps(state: dict[Any, Any]) -> None:
    """Put zeros into the gaps between the parameters of buckets, which mcore leaves as they are.

    state: mcore's dp_reshardable one, {buffer: {dtype: [[parameter or gap of a bucket]]}}.
    """
    buckets = [
        bucket
        for buffer in state.values()
        if isinstance(buffer, dict)
        for buckets in buffer.values()
        for bucket in buckets
    ]
    for entry in (entry for bucket in buckets for entry in bucket if entry["padding"].unwrap()):
        for piece in entry.values():
            if isinstance(getattr(piece, "data", None), torch.Tensor):
                piece.data.zero_()
