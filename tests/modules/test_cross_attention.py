"""The gated block against a naive reference, for every option; what spans let through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.modules.cross_attention import CrossAttention, GatedCrossAttention
from nvmm.modules.spans import span_attention
from nvmm.modules.specs import backend_provider
from nvmm.parallel.setup import Parallel, Precision
from tests.models.parameter_names import build
from tests.modules.reference_cross_attention import gated_cross_attention
from tests.ranks import run_ranks

OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_query_groups": 4},
    "own_heads": {"num_attention_heads": 2, "kv_channels": 24},
    "channel_gate": {"gate": "channel"},
    "ffn": {"ffn_hidden_size": 48},
    "ffn_with_its_activation": {"ffn_hidden_size": 48, "activation_func": F.gelu},
    "ffn_channel_gate_bias": {"ffn_hidden_size": 48, "gate": "channel", "bias": True},
    "qk_norm": {"qk_norm": True},
    "kv_norm": {"kv_norm": True},
    "bias": {"bias": True},
    "everything": {
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 40,
        "qk_norm": True,
        "kv_norm": True,
        "bias": True,
        "gate": "channel",
    },
}
LAYERNORM = {
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "activation_func": F.gelu,
    "add_bias_linear": True,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (options, {}) for name, options in OPTIONS.items()},
    **{f"layernorm_{name}": (OPTIONS[name], LAYERNORM) for name in ("ffn", "everything")},
}
S, B, KEYS = 8, 2, 11


def _config(parallel: Parallel, changes: dict[str, Any]) -> Any:
    import functools

    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 0.1,  # of every norm, those of heads and of keys too
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.3,
    } | changes
    chunk = parallel.chunks(Precision())[0]
    return chunk.transformer_config(functools.partial(TransformerConfig, **given))


def _block(parallel: Parallel, options: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A block whose norms, biases and gates are anything but ones and zeros."""
    from nvmm.parallel.parameters import initialize, sharded_parameters

    block = GatedCrossAttention(
        _config(parallel, changes), 1, CrossAttention(**options), backend_provider("native")
    )
    initialize(block, seed=3)
    generator = torch.Generator().manual_seed(4)
    for sharded in sharded_parameters(block):
        if len(sharded.global_shape) == 1:
            values = torch.rand(sharded.global_shape, generator=generator) + 0.2
            for (offset,), piece in sharded.pieces(sharded.parameter.data):
                piece.copy_(values[offset : offset + len(piece)])
    return block


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, keys, spans with every case of sight, and a cotangent."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(S, B, 32, generator=generator)
    keys = torch.randn(KEYS, 32, generator=generator)
    spans = torch.zeros(S, B, 2, dtype=torch.int32)
    spans[1:3, 0] = torch.tensor([0, 3])
    spans[3:5, 0] = torch.tensor([3, 7])
    spans[5:, 0] = torch.tensor([0, 7])
    spans[4:6, 1] = torch.tensor([7, 11])
    spans[7, 1] = torch.tensor([10, 11])
    return hidden, keys, spans, torch.randn(S, B, 32, generator=generator)


def _folded(keys: Tensor) -> Tensor:
    """[n, h] -> [m, b, h] with padding behind, m even (two sequence-parallel ranks)."""
    m = 2 * -(-len(keys) // (2 * B))
    return F.pad(keys, (0, 0, 0, m * B - len(keys))).view(m, B, -1)


def _run(parallel: Parallel, case: str) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Output and gradients of hidden states and keys, whole on every rank."""
    from megatron.core import tensor_parallel

    options, changes = CASES[case]
    block = _block(parallel, options, changes)
    hidden, keys, spans, cotangent = _inputs()
    hidden.requires_grad_(), keys.requires_grad_()
    states, media = hidden, _folded(keys)
    if parallel.sequence_parallel:
        states = tensor_parallel.scatter_to_sequence_parallel_region(states)
        media = tensor_parallel.scatter_to_sequence_parallel_region(media)
    out = block(states, spans, media)
    if parallel.sequence_parallel:
        out = tensor_parallel.gather_from_sequence_parallel_region(
            out, tensor_parallel_output_grad=False
        )
    (out * cotangent).sum().backward()
    assert hidden.grad is not None and keys.grad is not None
    return out.detach(), hidden.grad, keys.grad, block


def _reference(case: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    options, changes = CASES[case]
    block = _block(Parallel(), options, changes)
    config = block.config
    weights = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters()}
    hidden, keys, spans, cotangent = _inputs()
    hidden.requires_grad_(), keys.requires_grad_()
    form = CrossAttention(**options)
    heads, groups, width = form.sizes(config)
    out = gated_cross_attention(
        hidden,
        keys,
        [[list(range(*spans[t, r].tolist())) for r in range(B)] for t in range(S)],
        weights,
        num_heads=heads,
        num_groups=groups,
        width=width,
        eps=config.layernorm_epsilon,
        gated_linear_unit=form.has_gated_linear_unit(config),
    )
    (out * cotangent).sum().backward()
    gradients = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert gradients.keys() == weights.keys()
    assert hidden.grad is not None and keys.grad is not None
    return out.detach(), hidden.grad, keys.grad, gradients


def _close(found: Tensor, wanted: Tensor) -> None:
    # Some gradients are exactly 0 in theory: a bias of all keys shifts all scores alike.
    scale = max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_naive_reference(case: str, world: None) -> None:
    *expected, gradients = _reference(case)
    *found, block = _run(Parallel(), case)
    for value, wanted in zip(found, expected, strict=True):
        _close(value, wanted)
    for name, parameter in block.named_parameters():
        _close(parameter.grad, gradients[name])
    blind = [(0, 0), (0, 1), (1, 1), (2, 1), (3, 1), (6, 1)]
    for t, r in blind:
        assert torch.equal(found[0][t, r], _inputs()[0][t, r])


def _split(rank: int, world_size: int, init: str, sequence_parallel: bool) -> dict[str, Any]:
    from nvmm.parallel.gradients import sum_replicated_gradients
    from nvmm.parallel.parameters import sharded_parameters

    parallel = Parallel(tensor_model_parallel_size=world_size, sequence_parallel=sequence_parallel)
    parallel.initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    results = {}
    for case in ("everything", "layernorm_everything", "own_heads"):
        *values, block = _run(parallel, case)
        for parameter in block.parameters():
            parameter.main_grad = parameter.grad
            if sequence_parallel and getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.main_grad)  # as mcore's finalisation does
        sum_replicated_gradients([block])
        pieces = [
            (p.name, p.global_shape, offset, piece)
            for p in sharded_parameters(block)
            for offset, piece in p.pieces(p.parameter.main_grad)
        ]
        results[case] = (values, pieces)
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_over_two_ranks_it_is_the_same_block(sequence_parallel: bool, world: None) -> None:
    ranks = run_ranks(_split, 2, sequence_parallel)
    for case in ranks[0]:
        *expected, block = _run(Parallel(), case)
        whole = _pieces(block)
        for values, pieces in (rank[case] for rank in ranks):
            for value, wanted in zip(values, expected, strict=True):
                _close(value, wanted)
            for name, shape, offset, piece in pieces:
                assert whole[name].shape == shape
                index = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
                _close(piece, whole[name][index])


def _pieces(block: Any) -> dict[str, Tensor]:
    from nvmm.parallel.parameters import sharded_parameters

    whole = {}
    for p in sharded_parameters(block):
        gradient = torch.zeros(p.global_shape)
        for offset, piece in p.pieces(p.parameter.grad):
            gradient[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] = (
                piece
            )
        whole[p.name] = gradient
    return whole


def test_a_new_block_changes_nothing_and_only_its_gates_learn_first(world: None) -> None:
    block = GatedCrossAttention(
        _config(Parallel(), {}), 1, CrossAttention(ffn_hidden_size=48), backend_provider("native")
    )
    from nvmm.parallel.parameters import initialize

    initialize(block, seed=3)
    hidden, keys, spans, cotangent = _inputs()
    out = block(hidden, spans, _folded(keys))
    assert torch.equal(out, hidden)
    (out * cotangent).sum().backward()
    moved = {name for name, p in block.named_parameters() if bool(p.grad.any())}
    assert moved == {"gate", "ffn_gate"}


def test_dropout_takes_whole_branches_with_their_bias_and_leaves_the_residual(world: None) -> None:
    """Each element of what the block adds is either gone or 1 / (1 - p) of itself."""
    p = 0.4
    hidden, keys, spans, _ = _inputs()
    added = []
    for share in (0.0, p):
        block = _block(Parallel(), {"bias": True}, {"hidden_dropout": share})
        with torch.no_grad():
            added.append(block(hidden, spans, _folded(keys)) - hidden)
    whole, dropped = added
    gone = dropped == 0
    kept = torch.isclose(dropped, whole / (1 - p), rtol=1e-4, atol=1e-6)
    assert (gone | kept).all()
    seen = whole != 0
    assert 0.3 < gone[seen].float().mean() < 0.5 and seen.sum() > 200


def test_without_media_the_block_is_idle_but_its_parameters_have_a_gradient(world: None) -> None:
    block = _block(Parallel(), OPTIONS["everything"], {})
    hidden, keys, spans, _ = _inputs()
    for arguments in ((None, None), (torch.zeros_like(spans), _folded(keys))):
        block.zero_grad()
        out = block(hidden, *arguments)
        assert torch.equal(out, hidden)
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("part", ["apart", "late", "ends"])
def test_spans_of_long_rows_are_read_block_by_block(part: str) -> None:
    """More queries than a block holds.

    apart: the rows' media lie far from one another. late: whole blocks see the same, and a second
    image comes after the first block. ends: queries of a block differ in one end of what they see.
    """
    generator = torch.Generator().manual_seed(1)
    s, n = 1100, 90
    query = torch.randn(s, 2, 4, 8, generator=generator)
    key, value = torch.randn(2, n, 2, 8, generator=generator).unbind(0)
    spans = torch.zeros(s, 2, 2, dtype=torch.int32)
    spans[100:700, 0] = torch.tensor([0, 30])
    spans[700:, 0] = torch.tensor([10, 50])
    spans[1030:, 1] = torch.tensor([50, 90])
    if part == "late":
        spans[:512], spans[512:1024] = 0, torch.tensor([20, 60])
        spans[1024:, 0], spans[1024:, 1] = torch.tensor([40, 80]), torch.tensor([0, 70])
    if part == "ends":
        spans[:512], spans[512:700] = torch.tensor([20, 60]), torch.tensor([20, 30])
        spans[700:1024], spans[1024:1090] = torch.tensor([20, 60]), torch.tensor([30, 60])
        spans[1090:] = torch.tensor([50, 60])
    out = span_attention(query, key, value, spans)
    index = torch.arange(n)
    seen = (index >= spans[..., :1]) & (index < spans[..., 1:])
    scores = torch.einsum("sbhd,nhd->sbhn", query, key.repeat_interleave(2, 1)) / 8**0.5
    scores = scores.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).nan_to_num()
    expected = torch.einsum("sbhn,nhd->sbhd", scores, value.repeat_interleave(2, 1)).flatten(2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    if part == "apart":
        assert not out[:100].any() and not out[:1030, 1].any()


def test_flamingo_s_block_is_a_configuration(world: None) -> None:
    model = build("xattn_dense_tiny", meta=False)
    assert [type(layer).__name__ for layer in model.decoder.layers] == ["BlockFirstLayer"] * 3
    block = model.decoder.layers[0].cross_attention_block
    assert block.linear_q.weight.shape == (2 * 16, 128) and block.linear_q.bias is None
    assert block.ffn.linear_fc1.weight.shape == (512, 128) and block.ffn.linear_fc1.bias is None
    weights = {n: torch.randn_like(p) / 8 for n, p in block.named_parameters()}
    block.load_state_dict(weights, strict=False)
    hidden = torch.randn(S, B, 128, requires_grad=True)
    keys, (_, _, spans, _) = torch.randn(KEYS, 128), _inputs()
    out = block(hidden, spans, _folded(keys))
    wanted = gated_cross_attention(
        hidden,
        keys,
        [[list(range(*spans[t, r].tolist())) for r in range(B)] for t in range(S)],
        dict(block.named_parameters()),
        num_heads=2,
        num_groups=2,
        width=16,
        eps=1e-5,
        gated_linear_unit=False,
    )
    _close(out, wanted)
    parameters = [hidden, *block.parameters()]
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, parameters, cotangent)
    for gradient, other in zip(
        found, torch.autograd.grad(wanted, parameters, cotangent), strict=True
    ):
        _close(gradient, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "after"}, "placement=after must be one of inside, before"),
        ({"gate": "vector"}, "gate=vector must be one of scalar, channel"),
        ({"text_sees": "all"}, "text_sees=all must be one of preceding, last, nothing"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"interval": 4, "offset": 4}, "offset=4 null or in"),
        ({"kv_size": 0}, "kv_size=0 must be null or at least 1"),
        ({"activation_func": F.gelu}, "activation_func needs ffn_hidden_size"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossAttention(**options)
