"""GPT models as Megatron-LM writes them: `mp_rank_XX/model_optim_rng.pt` or distributed; read only.

Both have mcore's names, which are ours, and Megatron-LM's arguments, of which the model's config is
derived. They differ from ours: legacy files hold one rank's slices under its own layer numbers,
distributed checkpoints may stack all layers into one tensor, and the vocabulary is padded further.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nvmm.config.rules.rope import ROOM
from nvmm.config.rules.transformer import LANGUAGE_FIELDS, TARGET
from nvmm.config.signatures import default_of, signature
from nvmm.convert.files import is_local
from nvmm.convert.formats.config import (
    GELU,
    GELU_TANH,
    SILU,
    SQUARED_RELU,
    integral,
    only,
    padded,
    transformer,
)
from nvmm.convert.mapping import Rename, Row
from nvmm.convert.pickles import load

LEGACY, DISTRIBUTED = "megatron_legacy", "megatron_distributed"
_FILE = "model_optim_rng.pt"
_TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2,3})(?:_(\d{3}))?(?:_\d{3})?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACKED = "decoder.layers."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# The norms' names without Transformer Engine.
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_COLUMNS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
_ROWS = ("linear_proj.weight", "linear_fc2.weight")

_OPTIONS = (
    *("qk_layernorm", "softmax_scale", "window_size", "window_attn_skip_freq", "no_rope_freq"),
    *("glu_linear_offset", "activation_func_clamp_value"),
)
"""Fields of TransformerConfig that most models leave out; the arguments have the same names."""
_OTHER_MODELS = (
    *("num_experts", "quick_geglu", "openai_gelu", "onnx_safe", "use_mup", "spec"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
)
"""Arguments beside TransformerConfig's fields that make other models."""
_SAME_MODEL_PREFIXES = (
    *("tp_comm_", "cuda_graph_", "cpu_offloading", "fp8", "fp4", "inference_", "recompute_"),
    # Of layers that another argument, which is refused, turns on.
    *("moe_", "mamba_", "linear_", "dsa_", "kitchen_"),
)
_SAME_MODEL = frozenset(
    (
        # The layout of ranks, and what they exchange.
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"),
        *("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_comm_backend"),
        *("pipeline_model_parallel_layout", "context_parallel_size", "cp_comm_type"),
        *("hierarchical_context_parallel_sizes", "hybrid_context_parallel"),
        *("max_seqlen_per_dp_cp_rank", "expert_model_parallel_size"),
        *("expert_tensor_parallel_size", "num_layers_in_first_pipeline_stage"),
        *("num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split"),
        *("account_for_loss_in_pipeline_split", "microbatch_group_size_per_vp_stage"),
        *("variable_seq_lengths", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush"),
        *("batch_p2p_comm", "batch_p2p_sync", "use_ring_exchange_p2p"),
        *("deallocate_pipeline_outputs", "async_tensor_model_parallel_allreduce"),
        *("defer_embedding_wgrad_compute", "wgrad_deferral_limit", "delay_wgrad_compute"),
        *("overlap_moe_expert_parallel_comm", "ep_overlap_early_attn_memory_release"),
        *("symmetric_ar_type", "mtp_standalone", "distribute_saved_activations"),
        "num_microbatches_with_partial_activation_checkpoints",
        # Precision, and which kernel computes the same.
        *("fp16", "bf16", "params_dtype", "pipeline_dtype", "enable_autocast", "autocast_dtype"),
        *("fp32_residual_connection", "apply_query_key_layer_scaling"),
        *("attention_softmax_in_fp32", "disable_bf16_reduced_precision_matmul"),
        *("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
        *("tp_only_amax_red", "activation_func_fp8_input_store", "deterministic_mode"),
        *("batch_invariant_mode", "attention_backend", "transformer_impl", "masked_softmax_fusion"),
        *("persist_layer_norm", "memory_efficient_layer_norm", "bias_dropout_fusion"),
        *("bias_activation_fusion", "apply_rope_fusion", "fused_single_qkv_rope"),
        *("use_fused_weighted_squared_relu", "use_te_activation_func", "use_te_rng_tracker"),
        *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "flash_decode"),
        *("gradient_accumulation_fusion", "use_kitchen", "use_kitchen_attention"),
        *("use_inference_optimized_layers", "use_mamba_mem_eff_path", "mlp_chunks_for_prefill"),
        *("clone_scatter_output_in_embedding", "disable_parameter_transpose_cache"),
        *("enable_cuda_graph", "external_cuda_graph", "fine_grained_activation_offloading"),
        *("offload_modules", "min_offloaded_tensor_size"),
        # The start of a training, and how it goes.
        *("perform_initialization", "use_cpu_initialization", "init_model_with_meta_device"),
        *("init_method", "output_layer_init_method", "embedding_init_method"),
        *("embedding_init_method_std", "calculate_per_token_loss", "mtp_loss_scaling_factor"),
        *("qk_clip", "qk_clip_alpha", "qk_clip_threshold", "log_max_attention_logit"),
        *("grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func"),
        *("finalize_model_grads_func", "timers", "barrier_with_L1_time", "test_mode"),
        *("config_logger_dir", "hetereogenous_dist_checkpoint"),
    )
)
"""Fields of TransformerConfig that make no other model of the same weights."""


def locate(path: Path) -> tuple[Path, str] | None:
    """Find a Megatron-LM checkpoint: (its iteration's folder, LEGACY or DISTRIBUTED), or None.

    path: an iteration's folder, or the one above with `latest_checkpointed_iteration.txt`.
    """
    tracker = path / _TRACKER
    if tracker.is_file():
        text = tracker.read_text().strip()
        if not (text == "release" or text.isdigit()):
            raise ValueError(f"{tracker} names {text!r}, no iteration")
        path = path / (text if text == "release" else f"iter_{int(text):07d}")
    if any(_RANK.fullmatch(entry.name) for entry in path.glob("mp_rank_*")):
        return path, LEGACY
    if (path / ".metadata").is_file() and not (path / "state.json").is_file():
        return path, DISTRIBUTED
    return None


def arguments(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the arguments that Megatron-LM saved. Raises ValueError where there are none."""
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{path} has no args of Megatron-LM, which describe the model")
    plain = (type(None), bool, int, float, str)
    lists = {k: list(v) for k, v in vars(args).items() if isinstance(v, list | tuple)}
    return {k: v for k, v in vars(args).items() if isinstance(v, plain)} | lists


def _refuse_unread(args: Mapping[str, Any]) -> None:
    """Raise ValueError naming an argument that makes another model and that nobody reads.

    Arguments have the names of TransformerConfig's fields, but for some; a field that a new mcore
    brings is refused where it is not its default.
    """
    for name in signature(TARGET).parameters:
        if name in LANGUAGE_FIELDS or name in _SAME_MODEL or name.startswith(_SAME_MODEL_PREFIXES):
            continue
        if args.get(name) not in (None, default_of(TARGET, name)):
            only(args, name, default_of(TARGET, name))
    for name in _OTHER_MODELS:
        only(args, name, None, False)


def to_model(args: Mapping[str, Any]) -> dict[str, Any]:
    """Turn Megatron-LM's arguments into our model config; ValueError for what we do not have."""
    # 1. Options that change the graph, with the values that we have.
    only(args, "position_embedding_type", "rope")
    _refuse_unread(args)
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    # 2. Flags of which each switches something on, as Megatron-LM's command line has them.
    grouped = bool(args.get("group_query_attention"))
    gated, squared = bool(args.get("swiglu")), bool(args.get("squared_relu"))
    # Megatron-LM's fusion of bias and GELU computes the approximation by tanh.
    gelu = GELU_TANH if args.get("bias_gelu_fusion") else GELU
    activation = SILU if gated else SQUARED_RELU if squared else gelu
    rows = args["padded_vocab_size"]
    return {
        "_target_": "nvmm.models.language.LanguageModel",
        "_partial_": True,
        "transformer": transformer(
            num_layers=args["num_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=args["num_query_groups"] if grouped else heads,
            kv_channels=args.get("kv_channels") or hidden // heads,
            ffn_hidden_size=args["ffn_hidden_size"],
            normalization=args.get("normalization", "LayerNorm"),
            layernorm_epsilon=args.get("norm_epsilon", 1e-5),
            layernorm_zero_centered_gamma=bool(args.get("apply_layernorm_1p")),
            gated_linear_unit=gated,
            activation_func=activation,
            add_bias_linear=bool(args.get("add_bias_linear", True)),
            add_qkv_bias=bool(args.get("add_qkv_bias")),
            init_method_std=args.get("init_method_std", 0.02),
            **{name: args[name] for name in _OPTIONS if args.get(name)},
        ),
        "vocab_size": args.get("vocab_size") or rows,
        "padded_vocab_size": padded(args.get("vocab_size") or rows),
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
        "max_sequence_length": args.get("max_position_embeddings") or args.get("seq_length", 4096),
        "rotary_base": integral(args.get("rotary_base") or 10000),
        "rotary_percent": args.get("rotary_percent", 1.0),
        "rope_scaling": _rope_scaling(args),
    }


def _rope_scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return Llama 3's scaling, whose other constants megatron-core has built in, or a divisor."""
    divisor = args.get("rotary_seq_len_interpolation_factor")
    if not args.get("use_rope_scaling"):
        return None if divisor is None else {"_target_": f"{ROOM}Linear", "factor": divisor}
    # megatron-core would divide twice.
    only(args, "rotary_seq_len_interpolation_factor", None)
    return {"_target_": f"{ROOM}Llama3", "factor": args.get("rope_scaling_factor") or 8.0}


def from_model(model: Mapping[str, Any]) -> NoReturn:
    """Raise ValueError: Megatron-LM reads the Hugging Face exports of its own tools."""
    raise ValueError("Megatron-LM's checkpoints are read only; export a Hugging Face format")


def complete(args: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments as they are."""
    return dict(args)


@dataclass(frozen=True)
class _CutVocabulary(Rename):
    """The first rows of a vocabulary, then zeros up to ours."""

    our_rows: int
    kept: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Iterator[Tensor]:
        tensor = theirs[0]
        if tensor.shape[0] < self.kept:
            raise ValueError(f"{tensor.shape[0]} vocabulary rows, fewer than {self.kept}")
        yield tensor[: self.kept].clone()
        if self.our_rows > self.kept:
            yield tensor.new_zeros(self.our_rows - self.kept, *tensor.shape[1:])


def table(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a GPT model: the names are ours, the vocabulary's padding is not."""
    config = model["transformer"]
    kinds = ["weight"] if config["normalization"] == "RMSNorm" else ["weight", "bias"]
    has_bias = config["add_bias_linear"]
    linear = ["weight", "bias"] if has_bias else ["weight"]
    parts = ["self_attention.linear_qkv.weight"]
    if has_bias or config["add_qkv_bias"]:
        parts.append("self_attention.linear_qkv.bias")
    for kind in kinds:
        parts += [fused + kind for fused in _FUSED.values()]
        if config.get("qk_layernorm"):
            parts += [f"self_attention.{x}_layernorm.{kind}" for x in "qk"]
    for kind in linear:
        parts += [f"{x}.{kind}" for x in ("self_attention.linear_proj", "mlp.linear_fc1")]
        parts.append(f"mlp.linear_fc2.{kind}")
    names = [f"{_STACKED}{i}.{part}" for i in range(config["num_layers"]) for part in parts]
    names += [f"decoder.final_layernorm.{kind}" for kind in kinds]
    tied = model["share_embeddings_and_output_weights"]
    vocabulary = _CutVocabulary(model["padded_vocab_size"], model["vocab_size"])
    rows = [Row(name, (name,)) for name in names]
    return rows + [Row(name, (name,), vocabulary) for name in _VOCABULARY[: 1 if tied else 2]]


class LegacySource:
    """The tensors of all ranks' files, put together over tensor and pipeline parallel ranks.

    The files are mapped, and a tensor is made of its slices when it is read. Raises ValueError for
    missing ranks, for files that hold more than tensors and plain values, and for ranks that
    disagree.
    """

    def __init__(self, folder: Path) -> None:
        if not is_local(folder):
            raise ValueError(f"{folder}: copy it to a local disk first, its files are mapped")
        paths: dict[tuple[int, int], Path] = {}
        for entry in folder.glob("mp_rank_*"):
            if match := _RANK.fullmatch(entry.name):
                paths[int(match[2] or 0), int(match[1])] = entry / _FILE
        self.pipeline, self.tensor = (max(x) + 1 for x in zip(*paths, strict=True))
        absent = [
            f"pipeline rank {p}, tensor rank {t}"
            for p in range(self.pipeline)
            for t in range(self.tensor)
            if (p, t) not in paths
        ]
        if absent:
            raise ValueError(f"{folder} lacks the files of {', '.join(absent)}")
        first: dict[str, Any] | None = None
        self._slices: dict[str, list[Tensor]] = {}
        states = {}
        for ranks, path in sorted(paths.items()):
            states[ranks] = load(path, mmap=True)
            first = first or states[ranks]
        assert first is not None
        self.args = arguments(first, paths[0, 0])
        for rank in range(self.tensor):
            for name, tensor in self._named([states[p, rank] for p in range(self.pipeline)]):
                self._slices.setdefault(name, []).append(tensor)
        self.spec = {name: self._merged(name, meta=True) for name in self._slices}

    def _named(self, stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """Yield one tensor rank's tensors under global names, by chunks and stages in order."""
        virtual = [k for k in ("model", *(f"model{i}" for i in range(64))) if k in stages[0]]
        offset = 0
        for key in virtual:
            for stage in stages:
                layers = 0
                for name, tensor in stage[key].items():
                    if not isinstance(tensor, Tensor) or name.endswith("_extra_state"):
                        continue
                    if match := _LAYER.fullmatch(name):
                        layers = max(layers, int(match[1]) + 1)
                        name = f"{_STACKED}{int(match[1]) + offset}.{_fused(match[2])}"
                    # The last stage has a copy of a tied embedding, which is left out.
                    if name != _VOCABULARY[1] or self.args.get(
                        "untie_embeddings_and_output_weights"
                    ):
                        yield name, tensor
                offset += layers

    def _merged(self, name: str, meta: bool = False) -> Tensor:
        slices = self._slices[name]
        if len(slices) != self.tensor:
            raise ValueError(f"{name} is in {len(slices)} of {self.tensor} tensor-parallel ranks")
        if meta:
            slices = [tensor.to("meta") for tensor in slices]
        if name in _VOCABULARY:
            return torch.cat(slices)
        if name.endswith(_COLUMNS):
            if "linear_fc1" in name and self.args.get("swiglu"):
                halves = [tensor.chunk(2) for tensor in slices]
                return torch.cat([half for side in zip(*halves, strict=True) for half in side])
            return torch.cat(slices)
        if name.endswith(_ROWS):
            return torch.cat(slices, dim=1)
        if not meta and not all(torch.equal(slices[0], other) for other in slices[1:]):
            raise ValueError(f"the tensor-parallel ranks hold different {name}")
        return slices[0]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the whole tensor."""
        yield self._merged(name)


def _fused(name: str) -> str:
    for plain, fused in _FUSED.items():
        if name.startswith(plain):
            return fused + name.removeprefix(plain)
    return name


def unstacked(metadata: Metadata, num_layers: int) -> Metadata:
    """Return the index with each layer of a stacked tensor [layers, ...] under its own name.

    Optimizer state and entries that are no tensors are left out: neither is read.
    """
    entries: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or name.startswith("optimizer."):
            continue
        stacked = name.startswith(_STACKED) and not _LAYER.fullmatch(name)
        if not stacked:
            entries[name] = entry
            for chunk in entry.chunks:
                index = MetadataIndex(name, chunk.offsets)
                storage[index] = metadata.storage_data.get(index)
            continue
        if entry.size[0] != num_layers:
            raise ValueError(f"{name} stacks {entry.size[0]} layers; args say {num_layers}")
        rest = name.removeprefix(_STACKED)
        for chunk in entry.chunks:
            if chunk.sizes[0] != 1:
                raise ValueError(f"{name} is stored in pieces of {chunk.sizes[0]} layers, not 1")
            layer = f"{_STACKED}{chunk.offsets[0]}.{rest}"
            part = ChunkStorageMetadata(chunk.offsets[1:], chunk.sizes[1:])
            here = entries.setdefault(
                layer, TensorStorageMetadata(entry.properties, entry.size[1:], [])
            )
            here.chunks.append(part)
            index = MetadataIndex(name, chunk.offsets)
            storage[MetadataIndex(layer, part.offsets)] = metadata.storage_data.get(index)
    return Metadata(dict(entries), storage_data=storage)
