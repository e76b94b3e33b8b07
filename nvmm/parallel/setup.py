"""Process groups, parallel sizes and precision: the only place that sets up torch.distributed."""

from __future__ import annotations

import datetime
import logging
import math
import re
import secrets
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from nvmm.config.choices import Backend, require
from nvmm.parallel import environment, generators
from nvmm.parallel.fp8_recipe import Fp8

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

Dtype = Literal["fp32", "bf16", "fp64"]
EncoderLayout = Literal["replicated", "sharded"]
DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
METADATA = {"non_homogeneous_layers": True}
"""Save metadata of every sharded_state_dict: tensors of a layer are named with its index."""


@dataclass(frozen=True)
class Precision:
    """Number format of the model.

    Args:
        dtype: fp32 | bf16 | fp64, of weights and activations. bf16 and fp64 have fp32 master
            weights in the optimizer; fp64 is for proofs on a CPU, where rounding must not tip a
            decision.
        grad_reduce_in_fp32: gradients are accumulated and reduced in fp32, not in dtype.
        fp8: products in FP8, None for none.
    """

    dtype: Dtype = "fp32"
    grad_reduce_in_fp32: bool = True
    fp8: Fp8 | None = None

    def __post_init__(self) -> None:
        require("precision.dtype", self.dtype, Dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return DTYPES[self.dtype]

    def sequence_multiple(self, parallel: Parallel) -> int:
        """Return the multiple that the length of a row must be of in this layout and precision."""
        multiple = parallel.sequence_multiple
        if self.fp8 is None:
            return multiple
        fp8 = self.fp8.sequence_multiple(
            parallel.tensor_model_parallel_size,
            parallel.context_parallel_size,
            parallel.sequence_parallel,
        )
        return math.lcm(multiple, fp8)


@dataclass(frozen=True)
class Normal:
    """Initial weights N(0, std^2).

    As mcore's `init_method` it only marks the parameter; `nvmm.parallel.parameters.initialize`
    draws the values from the seed and the global name.
    """

    std: float

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        parameter.initial = self  # type: ignore[attr-defined]
        return parameter


@dataclass(frozen=True)
class Parallel:
    """Sizes of the parallel layout; data parallel takes what the others leave of the world.

    Args:
        encoder: the layout of a media encoder over tensor-parallel ranks: "replicated" keeps it
            whole on every rank and deals the micro-batch's tiles over them; "sharded" splits heads.
        recompute_granularity: None, "selective" (core attention) or "full" (whole layers).
        variable_seq_lengths: pipeline stages exchange shapes; needed unless every micro-batch has
            the same padded length.
        timeout_minutes: a collective that waits longer stops the job and is named.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    encoder: EncoderLayout = "replicated"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    variable_seq_lengths: bool = True
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        require("parallel.encoder", self.encoder, EncoderLayout)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def segment_multiple(self) -> int:
        """The multiple that a packed segment's length must be of: two chunks a context rank."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """The multiple that the length of a row must be of.

        Context parallelism deals two chunks to each of its ranks; sequence parallelism splits
        a context rank's part over the tensor-parallel ranks.
        """
        split = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return math.lcm(self.segment_multiple, self.context_parallel_size * split)

    def initialize(
        self,
        *,
        seed: int,
        rank: int | None = None,
        world_size: int | None = None,
        init_method: str | None = None,
    ) -> None:
        """Join the process group, build mcore's groups, seed every generator.

        Under torchrun (or srun) rank and world size come from the environment; without either the
        world is one rank. A process that has groups keeps them, so that it may hold several models.

        Raises ValueError when the sizes do not divide the world, or are not those of its groups.
        """
        prepare_backend()
        from megatron.core import parallel_state

        rank = environment.rank() if rank is None else rank
        world_size = environment.world_size() if world_size is None else world_size
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"world size {world_size} must be divisible by parallel.tensor_model_parallel_size"
                f" x pipeline_model_parallel_size x context_parallel_size ="
                f" {self.model_parallel_size}"
            )
        if not dist.is_initialized():
            self._init_process_group(rank, world_size, init_method)
        if parallel_state.model_parallel_is_initialized():
            self._require_groups()
            generators.reseed(seed)
            return
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.virtual_pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            distributed_timeout_minutes=max(1, round(self.timeout_minutes)),
            create_gloo_process_groups=False,
        )
        generators.reseed(seed)

    def _require_groups(self) -> None:
        """Raise ValueError where mcore's groups have other sizes."""
        from megatron.core import parallel_state

        for name, there in (
            ("tensor_model_parallel_size", parallel_state.get_tensor_model_parallel_world_size()),
            (
                "pipeline_model_parallel_size",
                parallel_state.get_pipeline_model_parallel_world_size(),
            ),
            ("context_parallel_size", parallel_state.get_context_parallel_world_size()),
        ):
            if getattr(self, name) != there:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)} must be {there}, as of the process's"
                    " other models"
                )

    def _init_process_group(self, rank: int, world_size: int, init_method: str | None) -> None:
        options: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "timeout": datetime.timedelta(minutes=self.timeout_minutes),
        }
        if torch.cuda.is_available():
            torch.cuda.set_device(environment.local_rank())
            options["backend"] = "cpu:gloo,cuda:nccl"
            options["device_id"] = torch.device("cuda", environment.local_rank())
        else:
            options["backend"] = "gloo"
        if init_method is not None:
            options["init_method"] = init_method
        elif world_size == 1 and not environment.has_rendezvous():
            options["store"] = dist.HashStore()
        elif environment.agent_store():
            where = {"rank": rank, "world_size": world_size, "timeout": options["timeout"]}
            store, _, _ = next(dist.rendezvous("env://", **where))
            options["store"] = attempt_store(store, **where)
        dist.init_process_group(**options)

    def transformer_kwargs(self, precision: Precision) -> dict[str, Any]:
        """Return what layout and precision add to the language model's TransformerConfig."""
        from megatron.core.transformer.enums import AttnBackend

        interleaved = self.virtual_pipeline_model_parallel_size is not None
        pipelined = self.pipeline_model_parallel_size > 1
        kwargs: dict[str, Any] = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "sequence_parallel": self.sequence_parallel,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage,
            "params_dtype": precision.torch_dtype,
            "pipeline_dtype": precision.torch_dtype,
            "bf16": precision.dtype == "bf16",
            "attention_backend": AttnBackend.auto,
            # loss() returns a sum and a token count; the schedule divides by the global tokens.
            "calculate_per_token_loss": True,
            # mcore's default sends an activation and a gradient of one shape untagged to the same
            # peer when PP is 2 and swaps them; two groups keep them apart.
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
            # gloo's isend still reads the storage that deallocation frees.
            "deallocate_pipeline_outputs": pipelined
            and not (interleaved and not torch.cuda.is_available()),
            **self._recompute_kwargs(),
        }
        if pipelined and self.variable_seq_lengths:
            # mcore refuses variable lengths with its default (allgather) dispatcher, MoE or not.
            kwargs |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
        return kwargs

    def encoder_kwargs(self, precision: Precision) -> dict[str, Any]:
        """Return the same for a media encoder: TP only when sharded, and no SP, CP or PP."""
        sharded = self.encoder == "sharded"
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size if sharded else 1,
            "params_dtype": precision.torch_dtype,
            "pipeline_dtype": precision.torch_dtype,
            "bf16": precision.dtype == "bf16",
            **self._recompute_kwargs(),
        }

    def _recompute_kwargs(self) -> dict[str, Any]:
        full = self.recompute_granularity == "full"
        return {
            "recompute_granularity": self.recompute_granularity,
            "recompute_method": (self.recompute_method or "uniform") if full else None,
            "recompute_num_layers": (self.recompute_num_layers or 1) if full else None,
        }

    def chunks(self, precision: Precision, backend: Backend = "native") -> list[Chunk]:
        """Return the model chunks this rank builds: one, or one per virtual pipeline stage."""
        from megatron.core import parallel_state

        virtual = self.virtual_pipeline_model_parallel_size
        chunks = []
        for stage in range(virtual or 1):
            where: dict[str, Any] = {"ignore_virtual": virtual is None}
            if virtual is not None:
                where["vp_stage"] = stage
            chunks.append(
                Chunk(
                    parallel=self,
                    precision=precision,
                    backend=backend,
                    pre_process=parallel_state.is_pipeline_first_stage(**where),
                    post_process=parallel_state.is_pipeline_last_stage(**where),
                    vp_stage=stage if virtual is not None else None,
                )
            )
        return chunks


@dataclass(frozen=True)
class Chunk:
    """The part of a model that a constructor builds.

    Args:
        backend: "native" (eager PyTorch + SDPA) or "transformer_engine".
        pre_process: this chunk holds the embedding (and the encoders).
        post_process: this chunk holds the output layer.
        vp_stage: virtual pipeline stage, None without interleaving.
        meta: build on the meta device: shapes and names only.
    """

    parallel: Parallel
    precision: Precision
    backend: Backend = "native"
    pre_process: bool = True
    post_process: bool = True
    vp_stage: int | None = None
    meta: bool = False

    @property
    def device(self) -> torch.device:
        """The device of this chunk's own parameters."""
        if self.meta:
            return torch.device("meta")
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @property
    def input_needs_gradient(self) -> bool:
        """True where a block's input must require a gradient, whatever trains before the block.

        mcore's reentrant checkpoint gives no gradients behind an input that needs none. Delayed
        scaling records the gradients that reach a linear: those of a frozen block's first layers
        would depend on recompute, overlap and pipeline stages, whose inputs always require one.
        """
        fp8 = self.precision.fp8
        delayed = fp8 is not None and fp8.recipe == "delayed"
        return delayed or self.parallel.recompute_granularity == "full"

    def transformer_config(self, partial: Callable[..., Any]) -> TransformerConfig:
        """Complete a YAML's partial of TransformerConfig for the language model."""
        return self._config(partial, self.parallel.transformer_kwargs(self.precision))

    def encoder_config(self, partial: Callable[..., Any], **changes: Any) -> TransformerConfig:
        """Complete a YAML's partial of TransformerConfig for a media encoder, with `changes`."""
        return self._config(partial, self.parallel.encoder_kwargs(self.precision) | changes)

    def _config(self, partial: Callable[..., Any], kwargs: dict[str, Any]) -> TransformerConfig:
        fields: dict[str, Any] = getattr(partial, "keywords", {})
        std = fields.get("init_method_std", 0.02)
        init = Normal(std)
        if fields.get("window_size") is not None:
            kwargs["window_size"] = tuple(fields["window_size"])  # a YAML has a list
        if self.meta:
            kwargs |= {"use_cpu_initialization": True, "perform_initialization": False}
        if self.backend == "transformer_engine":
            if self.precision.fp8 is not None:
                kwargs |= self.precision.fp8.transformer_kwargs()
        elif fields.get("fp8"):
            # mcore would train without FP8 and say nothing.
            raise ValueError(
                f"fp8={fields['fp8']} in a TransformerConfig needs backend=transformer_engine; set"
                " precision=fp8"
            )
        return partial(
            **kwargs,
            init_method=init,
            embedding_init_method=init,
            output_layer_init_method=Normal(std / (2.0 * fields["num_layers"]) ** 0.5),
        )


def device_type() -> str:
    """Return the type of device that this process computes on: "cuda" with a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_device(config: TransformerConfig) -> torch.device | None:
    """Return the device of a config's parameters; None for the ambient device."""
    if config.use_cpu_initialization:
        return None
    return torch.device(torch.cuda.current_device())


def prepare_backend() -> None:
    """Install the CPU layer where there is no GPU. Idempotent."""
    # mcore warns in every module that Transformer Engine or Apex is missing. `backend=` decides
    # that here, and refuses transformer_engine where it is missing.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    # mcore 0.16.1 uses names of torch.distributed that torch 2.13 announces to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for message in (
        ".*CUDA_DEVICE_MAX_CONNECTIONS",
        "full scope is deprecated",
        "The .grad attribute of a Tensor that is not a leaf",
        "`load_state_dict` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        from nvmm.parallel import cpu

        cpu.install()


def attempt_store(
    store: dist.Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> dist.Store:
    """Return a part of torchrun's store that the ranks of this attempt have for themselves.

    The agent's store outlives a restart (--max-restarts) and keeps the addresses of killed ranks
    (gloo) and the id of their communicator (NCCL), which ranks of the next attempt would read and
    connect to. Restart counts tell no attempt from another: a node without a failure does not count
    it. So rank 0 draws a name and hands it to each rank that asks under a name of its own.

    Raises TimeoutError naming the ranks that did not come.
    """
    if rank != 0:
        question = secrets.token_hex(8)
        store.set(f"nvmm/question/{rank}", question)
        name = store.get(f"nvmm/answer/{question}").decode()
        store.set(f"nvmm/{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    name = f"attempt_{secrets.token_hex(8)}"
    missing = set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"nvmm/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"nvmm/question/{other}"]):
                # A question of an earlier attempt is answered too, and nobody reads that.
                question = store.get(f"nvmm/question/{other}").decode()
                store.set(f"nvmm/answer/{question}", name)
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"ranks {sorted(missing)} did not come within parallel.timeout_minutes"
            )
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def stalled_collective(error: BaseException) -> str | None:
    """Return the collective that a rank never joined, or that lost its peer; None for other errors.

    torch's own message names neither the operation nor where in the step it was called.
    """
    message = str(error)
    if not re.search(r"[Tt]imed? ?out|Connection closed by peer|Connection reset", message):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    operations = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    callers = [f for f in frames if "/torch/" not in f.filename]
    caller = (
        f" in {callers[-1].name} ({callers[-1].filename}:{callers[-1].lineno})" if callers else ""
    )
    operation = next((name for name in operations if name != "wrapper"), "a collective")
    return f"{operation}{caller}: {message.splitlines()[0]}"


def shutdown() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
