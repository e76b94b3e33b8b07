"""Planted faults, each caught by `compare`, each by the quantity that it spoils.

The reference is one rank without the fault. A fault of the data stands on the faulty side alone:
with the same wrong data on both sides the layouts would rightly agree, and `collate` refuses such
data by itself. Two mutants need a changed reference and say so in `reference`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvmm.batch import IGNORE_INDEX
from nvmm.proof.equivalence import ONE_RANK, Layout, Result, compare, run
from tests import tiny

TP2 = Layout("TP2", 2, {"tensor_model_parallel_size": 2})
TP2_SP = Layout("TP2+SP", 2, TP2.parallel | {"sequence_parallel": True})
TP2_SHARDED = Layout("TP2, sharded encoder", 2, TP2.parallel | {"encoder": "sharded"})
PP2 = Layout("PP2", 2, {"pipeline_model_parallel_size": 2})
VPP2 = Layout(
    "PP2xVPP2",
    2,
    PP2.parallel | {"virtual_pipeline_model_parallel_size": 2, "variable_seq_lengths": False},
)
DP2 = Layout("DP2", 2)
CP2 = Layout("CP2", 2, {"context_parallel_size": 2})
RECOMPUTE = Layout("full recompute", 1, {"recompute_granularity": "full"})


def _qk_layernorm() -> dict[str, Any]:
    model = tiny.multimodal()
    model["language"]["transformer"]["qk_layernorm"] = True
    return model


MODELS = {
    "nvlm_d": tiny.config(tiny.multimodal()),
    "packed": tiny.config(tiny.multimodal()),
    "qk_layernorm": tiny.config(_qk_layernorm()),
    "language": tiny.config(tiny.language()),
    "tied": tiny.config(tiny.language(share_embeddings_and_output_weights=True)),
    "lora": tiny.config(tiny.multimodal()) | {"lora": tiny.lora(["*linear*"])},
    "frozen_embedding": tiny.config(tiny.language(), freeze=["embedding.*"]),
    "nvlm_x": tiny.config(tiny.cross_attending(qk_norm=True), attended="all"),
    "nvlm_h": tiny.config(tiny.cross_attending(), attended="regular"),
}


def skip_encoder_sum() -> None:
    """Gradients of a replicated encoder stay each rank's own share."""
    from nvmm.parallel import schedule

    schedule.sum_replicated_gradients = lambda models: None  # type: ignore[assignment]


def skip_row_reduction() -> None:
    """Row-parallel linears return each rank's partial sum."""
    from megatron.core.tensor_parallel import layers

    layers.reduce_from_tensor_model_parallel_region = lambda x, **kwargs: x


def skip_data_parallel_reduction() -> None:
    """Each data-parallel rank keeps the gradients of its own micro-batches."""
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.finish_grad_sync = lambda self, **kwargs: None


def skip_tied_embedding_sum() -> None:
    """First and last stage keep their own gradient of the one embedding."""
    from megatron.core.distributed import finalize_model_grads

    # The function hides its module, which has the same name.
    module: Any = sys.modules[finalize_model_grads.__module__]
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def _change_batches(change: Callable[[Any], Any]) -> None:
    from nvmm.proof import synthetic

    collate = synthetic.collate
    synthetic.collate = lambda *args, **kwargs: change(collate(*args, **kwargs))


def drop_label_shift() -> None:
    """Each supervised position is trained to say its own token."""

    def change(batch: Any) -> Any:
        own = batch.tokens.masked_fill(batch.labels == IGNORE_INDEX, IGNORE_INDEX)
        return batch.replace(labels=own)

    _change_batches(change)


def drop_mask_shift() -> None:
    """The mask weighs the token at t instead of the label at t."""

    def change(batch: Any) -> Any:
        mask = torch.roll(batch.loss_mask, 1, dims=1)
        return batch.replace(loss_mask=mask, labels=batch.labels.clamp(min=0))

    _change_batches(change)


def move_segment_borders() -> None:
    """Inner borders of packed segments lie one token late."""
    from nvmm.models import language

    right = language.packed_seq_params

    def wrong(batch: Any) -> Any:
        ends = batch.cu_seqlens.clone()
        ends[1:-1] += 1
        return right(batch.replace(cu_seqlens=ends))

    language.packed_seq_params = wrong


def forget_sequence_parallel() -> None:
    """A norm's weight is not marked: its gradient is that of one rank's share of the tokens."""
    from nvmm.modules.norm import Norm

    build = Norm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    Norm.__init__ = init  # type: ignore[method-assign]


def take_means_of_means() -> None:
    """Every micro-batch counts the same, however many tokens it supervises; the log is right."""
    from nvmm.objectives.next_token import NextToken

    right = NextToken.loss

    def loss(self: Any, output: Any, batch: Any) -> Any:
        total, count, metrics = right(self, output, batch)
        return total / count, torch.ones_like(count), metrics

    NextToken.loss = loss  # type: ignore[method-assign]


def average_encoder_over_all_ranks() -> None:
    """The encoder's gradient is divided by ranks that had no image."""
    from nvmm.parallel import schedule

    finalize = schedule.finalize_model_grads

    def average(models: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(models, *args, **kwargs)
        for model in models:
            for name, parameter in model.named_parameters():
                if "vision." in name:
                    parameter.main_grad /= 2

    schedule.finalize_model_grads = average


def slice_after_merge() -> None:
    """Each rank cuts its share of the merged sequence and no gradient comes back for the rest."""
    from megatron.core import parallel_state, tensor_parallel

    def cut(hidden: Any) -> Any:
        group = parallel_state.get_tensor_model_parallel_group()
        return hidden.chunk(group.size())[group.rank()].contiguous()

    tensor_parallel.scatter_to_sequence_parallel_region = cut


def keep_the_payload_s_gradient() -> None:
    """A stage uses the media it received, and sends nothing back for them."""
    from nvmm.parallel import payload

    right = payload.unpack

    def wrong(packed: Any, rows: Any) -> Any:
        hidden, tensors = right(packed, rows)
        return hidden, {name: tensor.detach() for name, tensor in tensors.items()}

    payload.unpack = wrong


def forget_head_norms() -> None:
    """A norm of heads keeps the gradient of its own rank's heads."""
    from nvmm.modules import cross_attention

    cross_attention.heads_per_rank = lambda norm: norm


def forget_sharded_gates() -> None:
    """A gate keeps the gradient of its own rank's part of the sequence."""
    from nvmm.modules.cross_attention import GatedCrossAttention

    build = GatedCrossAttention.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.gate.sequence_parallel = False

    GatedCrossAttention.__init__ = init  # type: ignore[method-assign]


def show_tags_everything() -> None:
    """A tile's tag sees all tiles so far."""
    from nvmm.models import cross_attending

    right = cross_attending.query_spans

    def wrong(media: Any, *args: Any, **kwargs: Any) -> Any:
        return right(replace(media, ends=media.positions), *args, **kwargs)

    cross_attending.query_spans = wrong


def even_rows() -> None:
    """Rows of one length: pipeline stages need not exchange shapes."""
    from nvmm.batch import Text
    from nvmm.proof import synthetic

    def even(generator: Any, model: Any, **options: Any) -> Text:
        weights = torch.ones(12)
        weights[:2] = 0
        return Text(torch.randint(0, 500, (12,), generator=generator), weights)

    synthetic._text = even  # type: ignore[assignment]


def default_interleaved_communication() -> None:
    """mcore's own choice: one untagged exchange of activations and gradients; rows are even."""
    from nvmm.parallel.setup import Parallel

    even_rows()
    right = Parallel.transformer_kwargs
    wrong = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    Parallel.transformer_kwargs = lambda self, precision: right(self, precision) | wrong  # type: ignore[method-assign]


def leave_recompute_input_alone() -> None:
    """The checkpointed block's input needs no gradient where the embedding is frozen."""
    from nvmm.models.language import LanguageModel

    LanguageModel._enter = LanguageModel._embedding_dropout  # type: ignore[method-assign]


def norm_under_mcore_s_name() -> None:
    """The joint QK-norm is an attribute that mcore knows, and its gradients are not marked."""
    from nvmm.modules.encoders.layers import EncoderAttention

    build = EncoderAttention.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for name in ("q", "k"):
            norm = getattr(self, f"{name}_norm")
            norm.weight.average_gradients_across_tp_domain = False
            norm.forward = torch.nn.Identity().forward  # mcore applies what it knows
            delattr(self, f"{name}_norm")
            setattr(self, f"{name}_layernorm", norm)
            object.__setattr__(self, f"{name}_norm", norm)

    EncoderAttention.__init__ = init  # type: ignore[method-assign]


def unmask_padding_rows() -> None:
    """Rows of the vocabulary that no token has take part in the softmax."""
    from nvmm.models import language

    right = language.fused_loss

    def fused_loss(layer: Any, hidden: Any, labels: Any, vocab_size: int, weight: Any) -> Any:
        return right(layer, hidden, labels, layer.output_size, weight)

    language.fused_loss = fused_loss
    language.LanguageModel._mask_padding_rows = lambda self, logits: logits  # type: ignore[method-assign]


def mark_encoder_as_split() -> None:
    """Whole weights marked as one rank's part: the norm counts them once per rank."""
    from nvmm.modules.encoders.vision import VisionTransformer

    build = VisionTransformer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = True

    VisionTransformer.__init__ = init  # type: ignore[method-assign]


def sum_encoder_output_gradients() -> None:
    """The gathered features' gradient, whole on every rank, is summed as if it were partial."""
    from nvmm.modules.encoders import base

    right = base.tensor_parallel.gather_from_sequence_parallel_region

    def gather(x: Any, tensor_parallel_output_grad: bool, group: Any) -> Any:
        return right(x, tensor_parallel_output_grad=True, group=group)

    base.tensor_parallel = SimpleNamespace(gather_from_sequence_parallel_region=gather)


def seed_by_rank() -> None:
    """Initial weights of the second rank come from another seed."""
    import torch.distributed as dist

    from nvmm.parallel import parameters

    right = parameters.initialize
    parameters.initialize = lambda models, seed: right(models, seed + dist.get_rank())


def deal_to_the_first_rank() -> None:
    """Every data-parallel rank reads the first one's micro-batches."""
    from nvmm.proof.synthetic import SyntheticData

    right = SyntheticData.batches

    def batches(self: Any, *, rank: int, **kwargs: Any) -> Any:
        return right(self, rank=0, **kwargs)

    SyntheticData.batches = batches  # type: ignore[method-assign]


def keep_own_key_gradients() -> None:
    """Keys and values are gathered over context parallelism; other ranks' gradients are lost."""
    from nvmm.parallel.context_parallel import _Gather

    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient[ctx.group.rank()], None

    _Gather.backward = staticmethod(backward)  # type: ignore[method-assign]


def deal_in_order() -> None:
    """Context-parallel ranks get neighbouring chunks, no zigzag as attention expects."""
    from nvmm.parallel import context_parallel

    def positions(batch: Any, size: int, rank: int) -> Any:
        return torch.arange(batch.tokens.shape[1]).chunk(size)[rank]

    context_parallel.positions = positions


def draw_b() -> None:
    """Adapters' B starts at random: while it is zero, no gradient reaches A."""
    from nvmm.modules.lora import Lora
    from nvmm.parallel.parameters import sharded_parameters
    from nvmm.parallel.setup import Normal

    right = Lora.attach

    def attach(self: Any, models: Any) -> None:
        right(self, models)
        for sharded in sharded_parameters(models):
            if sharded.name.endswith(".lora_b"):
                Normal(0.1)(sharded.parameter)

    Lora.attach = attach  # type: ignore[method-assign]


def forget_sequence_parallel_adapters() -> None:
    """The factor that is whole on every rank keeps the gradient of its own tokens."""
    from nvmm.modules.lora import Adapter

    draw_b()
    right = Adapter._mark

    def mark(self: Any, weight: Any) -> None:
        right(self, weight)
        self.a.sequence_parallel = self.b.sequence_parallel = False

    Adapter._mark = mark  # type: ignore[method-assign]


def keep_partial_adapter_gradients() -> None:
    """What a column-parallel linear's rows send back to A is not summed over TP."""
    from nvmm.modules import lora

    draw_b()
    changed = {"copy_to_tensor_model_parallel_region": lambda x, group: x}
    lora.tensor_parallel = SimpleNamespace(**vars(lora.tensor_parallel) | changed)


@dataclass(frozen=True)
class Mutant:
    """A fault, where it is planted, failures that must be found and failures that must not be.

    reference: planted on the reference too.
    """

    fault: Callable[[], None]
    model: str
    layout: Layout
    betrayed: list[str]
    spared: list[str]
    reference: Callable[[], None] | None = None


VISION = "gradient of vision.conv1.weight"
OUTPUT = "gradient of language.output_layer.weight"
EMBEDDING = "gradient of language.embedding.word_embeddings.weight"
BLOCK = "cross_attention.layers."
LOSS, NORM, REPLICAS = "losses at step 1", "grad_norms at step 1", "replicas differ"
ADAPTER = "language.decoder.layers.0.self_attention.linear_"
Q_NORM = "vision.decoder.layers.0.self_attention.q_layernorm.weight"
MUTANTS = [
    Mutant(skip_encoder_sum, "nvlm_d", TP2, [VISION, NORM], [LOSS, OUTPUT]),
    Mutant(skip_row_reduction, "nvlm_d", TP2, [LOSS, NORM], []),
    Mutant(skip_data_parallel_reduction, "nvlm_d", DP2, [OUTPUT, NORM], [LOSS]),
    Mutant(
        skip_tied_embedding_sum,
        "tied",
        PP2,
        [f"{REPLICAS}: embedding.word_embeddings.weight"],
        [LOSS, "gradient of decoder"],
    ),
    Mutant(drop_label_shift, "nvlm_d", ONE_RANK, [LOSS, OUTPUT], ["tokens"]),
    Mutant(drop_mask_shift, "nvlm_d", ONE_RANK, [LOSS, OUTPUT], []),
    Mutant(move_segment_borders, "packed", ONE_RANK, [LOSS, VISION], ["tokens"]),
    Mutant(
        forget_sequence_parallel,
        "nvlm_d",
        TP2_SP,
        [
            f"{REPLICAS}: language.decoder.final_layernorm.weight",
            "gradient of language.decoder.final_layernorm.weight",
        ],
        [LOSS, OUTPUT, VISION],
    ),
    Mutant(take_means_of_means, "nvlm_d", DP2, [OUTPUT, NORM], [LOSS, "tokens"]),
    Mutant(average_encoder_over_all_ranks, "nvlm_d", DP2, [VISION, NORM], [LOSS, OUTPUT]),
    Mutant(
        slice_after_merge,
        "nvlm_d",
        TP2_SP,
        ["gradient of connector.linear_fc1.weight", VISION],
        [LOSS, OUTPUT],
    ),
    Mutant(
        default_interleaved_communication,
        "language",
        VPP2,
        [LOSS, "gradient of output_layer.weight"],
        ["tokens"],
        reference=even_rows,
    ),
    Mutant(
        leave_recompute_input_alone,
        "frozen_embedding",
        RECOMPUTE,
        ["gradient of decoder.layers.3.mlp.linear_fc1.weight: off by 1.00e+00"],
        [LOSS, "gradient of output_layer.weight"],
    ),
    Mutant(
        norm_under_mcore_s_name,
        "qk_layernorm",
        TP2_SHARDED,
        [f"gradient of {Q_NORM}"],
        [LOSS, OUTPUT, VISION],
        reference=norm_under_mcore_s_name,
    ),
    Mutant(
        forget_sequence_parallel_adapters,
        "lora",
        TP2_SP,
        [
            f"{REPLICAS}: {ADAPTER}qkv.lora_a",
            f"gradient of {ADAPTER}qkv.lora_a",
            f"gradient of {ADAPTER}proj.lora_b",
        ],
        [LOSS, f"gradient of {ADAPTER}qkv.lora_b", f"gradient of {ADAPTER}proj.lora_a"],
        reference=draw_b,
    ),
    Mutant(
        keep_partial_adapter_gradients,
        "lora",
        TP2,
        [f"{REPLICAS}: {ADAPTER}qkv.lora_a", f"gradient of {ADAPTER}qkv.lora_a"],
        [LOSS, "gradient of language.decoder.layers.3.mlp.linear_fc2.lora"],
        reference=draw_b,
    ),
    Mutant(unmask_padding_rows, "nvlm_d", TP2, [LOSS, OUTPUT], ["tokens"]),
    Mutant(mark_encoder_as_split, "nvlm_d", TP2, [NORM], [LOSS, "gradient", REPLICAS]),
    Mutant(
        sum_encoder_output_gradients, "nvlm_d", TP2, [f"{VISION}: off by 1.00e+00"], [LOSS, OUTPUT]
    ),
    Mutant(
        keep_own_key_gradients,
        "nvlm_d",
        CP2,
        ["gradient of language.decoder.layers.3.self_attention.linear_qkv.weight", VISION],
        [LOSS, OUTPUT, "tokens"],
    ),
    Mutant(deal_in_order, "packed", CP2, [LOSS, VISION], ["tokens"]),
    Mutant(
        keep_the_payload_s_gradient,
        "nvlm_h",
        PP2,
        ["gradient of connector.linear_fc1.weight", VISION, EMBEDDING],
        [LOSS, OUTPUT, f"gradient of {BLOCK}"],
    ),
    Mutant(
        forget_head_norms,
        "nvlm_x",
        TP2,
        [f"gradient of {BLOCK}1.q_norm.weight", f"gradient of {BLOCK}3.k_norm.weight"],
        [LOSS, OUTPUT, VISION],
    ),
    Mutant(forget_sharded_gates, "nvlm_x", TP2_SP, [f"gradient of {BLOCK}1.gate"], [LOSS, OUTPUT]),
    Mutant(show_tags_everything, "nvlm_x", ONE_RANK, [LOSS, OUTPUT, VISION], ["tokens"]),
    Mutant(seed_by_rank, "nvlm_d", PP2, [LOSS, NORM], ["tokens"]),
    Mutant(deal_to_the_first_rank, "nvlm_d", DP2, ["tokens at step 1", LOSS], []),
]
References = Callable[[Mutant], Result]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    """One step of one rank and its weights, computed once for a model."""
    known: dict[tuple[str, Any], Result] = {}

    def get(mutant: Mutant) -> Result:
        key = (mutant.model, mutant.reference)
        if key not in known:
            known[key] = one_step(
                mutant.model,
                ONE_RANK,
                fault=mutant.reference,
                weights=tmp_path_factory.mktemp("reference") / "weights",
            )
        return known[key]

    return get


def one_step(model: str, layout: Layout, **options: Any) -> Result:
    return run(MODELS[model], layout, num_steps=1, packed=model == "packed", **options)


def named(name: str, failures: list[str]) -> bool:
    return any(failure.startswith(name) for failure in failures)


# `make test-slow` plants these; `make test` plants the others.
SLOW = (
    *(forget_head_norms, move_segment_borders, forget_sharded_gates, deal_in_order),
    *(keep_partial_adapter_gradients, forget_sequence_parallel_adapters, keep_own_key_gradients),
    *(default_interleaved_communication, mark_encoder_as_split, average_encoder_over_all_ranks),
)


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=pytest.mark.slow if m.fault in SLOW else ()) for m in MUTANTS],
    ids=lambda mutant: mutant.fault.__name__,
)
def test_mutant_is_caught(mutant: Mutant, reference: References) -> None:
    expected = reference(mutant)
    weights = expected.weights
    assert isinstance(weights, Path)
    faulty = one_step(mutant.model, mutant.layout, fault=mutant.fault, reference=weights)
    failures = compare(expected, faulty).failures
    assert failures
    for name in mutant.betrayed:
        assert named(name, failures), (name, failures[:12])
    for name in mutant.spared:
        assert not named(name, failures), (name, failures[:12])


CLEAN = {(m.model, m.layout.name): m for m in MUTANTS if m.reference is not m.fault}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", CLEAN.values(), ids=map("-".join, CLEAN))
def test_without_the_fault_nothing_is_found(mutant: Mutant, reference: References) -> None:
    """The same rows pass: what the mutants are caught by is the fault."""
    expected = reference(mutant)
    options = {"reference": expected.weights, "fault": mutant.reference}
    comparison = compare(expected, one_step(mutant.model, mutant.layout, **options))
    assert comparison.equal, str(comparison)
