"""The ViT against Transformers' encoders, and against itself at every encoder layout."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.parallel.setup import Parallel, Precision
from tests import oracle, tiny
from tests.ranks import run_ranks
from tests.runs import save_as_mcore


def vision(parallel: Parallel | None = None, training: bool = True, **changes: Any) -> Any:
    """The tiny 5-head InternViT, or a variant; `transformer` changes its TransformerConfig."""
    config = tiny.multimodal()["vision"]
    config["transformer"] |= changes.pop("transformer", {})
    chunk = (parallel or Parallel()).chunks(Precision())[0]
    model = instantiate(config | changes, _convert_="all")(chunk=chunk)
    return model.train(training)


def tiles(count: int = 3, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def pixels(values: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (values.float() / 255 - mean) / std


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("qk_norm", ["joint", None])
@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("size", [(16, 16), (20, 20)], ids=["native", "interpolated"])
def test_internvit_equals_transformers(qk_norm: str | None, norm: str, size: Any) -> None:
    """RMSNorm with QK-norm and no QKV bias is InternViT-6B, LayerNorm with bias the 300M."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    bias = norm == "LayerNorm"
    reference = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=80,
            num_hidden_layers=2,
            num_attention_heads=5,
            intermediate_size=128,
            attention_bias=bias,
            use_qk_norm=qk_norm is not None,
            norm_type="layer_norm" if bias else "rms_norm",
            image_size=(16, 16),
            patch_size=(4, 4),
        )
    )
    oracle.randomize(reference)
    for module in reference.modules():  # its norms of queries and keys take none from the config
        for name in ("variance_epsilon", "eps"):
            if hasattr(module, name):
                setattr(module, name, 0.1)
    model = vision(
        training=False,
        qk_norm=qk_norm,
        transformer={"normalization": norm, "add_qkv_bias": bias, "layernorm_epsilon": 0.1},
    )
    oracle.load(model, oracle.internvit_weights(reference.state_dict(), 2, 5))
    images = tiles(2, *size)
    with torch.no_grad():
        ours = model(images)
        theirs = reference(pixels(images, model.image_mean, model.image_std)).last_hidden_state
    assert ours.shape == (2, size[0] * size[1] // 16, 80)
    torch.testing.assert_close(ours, theirs[:, 1:], atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_and_siglip_equal_transformers(kind: str) -> None:
    import transformers

    clip = kind == "clip"
    name = "CLIPVision" if clip else "SiglipVision"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        hidden_act="quick_gelu" if clip else "gelu_pytorch_tanh",
        **({} if clip else {"vision_use_head": False}),
    )
    reference = getattr(transformers, f"{name}Model")(config)
    oracle.randomize(reference)
    activation = (
        tiny.method("megatron.core.fusions.fused_bias_geglu.quick_gelu")
        if clip
        else {
            "_target_": "torch.nn.functional.gelu",
            "_partial_": True,
            "approximate": "tanh",
        }
    )
    model = vision(
        training=False,
        class_token=clip,
        drop_class_token=False,
        patch_bias=not clip,
        pre_layernorm=clip,
        post_layernorm=not clip,
        qk_norm=None,
        layer_scale=None,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        transformer={
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 96,
            "normalization": "LayerNorm",
            "layernorm_epsilon": config.layer_norm_eps,
            "add_qkv_bias": True,
            "activation_func": activation,
        },
    )
    oracle.load(model, oracle.clip_weights(_without_pooling(reference, clip), 2, 4))
    images = tiles(2)
    with torch.no_grad():
        theirs = reference(pixels(images, [0.5] * 3, [0.5] * 3)).last_hidden_state
        torch.testing.assert_close(model(images), theirs, atol=1e-4, rtol=1e-5)


def _without_pooling(reference: Any, clip: bool) -> dict[str, Tensor]:
    """CLIP's last norm acts on the pooled class token alone, not on the features."""
    unused = ("post_layernorm",) if clip else ("head.",)
    state = reference.state_dict()
    return {k: v for k, v in state.items() if not any(x in k for x in unused)}


# -- layouts ---------------------------------------------------------------------------------


def _encode(
    rank: int, world: int, init: str, encoder: str, qk_norm: str | None, folder: str | None
) -> dict[str, Any]:
    """Forward, backward, an SGD step and a checkpoint of the 5-head ViT."""
    from nvmm.parallel.gradients import sum_replicated_gradients
    from nvmm.parallel.parameters import initialize, sharded_parameters, sharded_state_dict

    parallel = Parallel(tensor_model_parallel_size=world, encoder=encoder)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    model = vision(parallel, qk_norm=qk_norm)
    initialize(model, seed=3)
    if folder is not None:
        Path(folder).mkdir(exist_ok=True)
        save_as_mcore(sharded_state_dict(model), folder)

    out = model(tiles())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * weights).sum().backward()
    for parameter in model.parameters():
        parameter.main_grad = parameter.grad  # type: ignore[attr-defined]
    sum_replicated_gradients([model])
    pieces = [
        (p.name, p.global_shape, offset, piece.clone(), p.is_main_replica)
        for p in sharded_parameters(model)
        for offset, piece in p.pieces(p.parameter.grad)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (parameter.main_grad + parameter)  # decay as well
    attention = model.decoder.layers[1].self_attention
    heads = attention.heads
    rows = attention.linear_qkv.weight.unflatten(0, (heads.count, -1))
    columns = attention.linear_proj.weight.unflatten(1, (heads.count, -1))
    padding = [rows[heads.real :].abs().sum(), columns[:, heads.real :].abs().sum()]

    model.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        frozen = model(tiles())
    return {
        "out": out.detach(),
        "pieces": pieces,
        "padding": float(sum(padding)),
        "heads": dataclasses.astuple(heads),
        "after": model(tiles()).detach(),
        "frozen": (frozen.requires_grad, len(saved)),
    }


def _whole(outputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients by global name; every replica must hold the same one."""
    whole: dict[str, Tensor] = {}
    for name, shape, offset, value, _ in [piece for out in outputs for piece in out["pieces"]]:
        index = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
        full = whole.setdefault(name, torch.full(shape, float("nan")))
        if full[index].isnan().all():
            full[index] = value
        torch.testing.assert_close(full[index], value, atol=1e-3, rtol=1e-4)
    return whole


SAVED = [("replicated", 2), ("sharded", 4)]
_temporary = tempfile.TemporaryDirectory()


@functools.cache
def encoded(encoder: str, size: int, qk_norm: str | None) -> tuple[list[dict[str, Any]], str]:
    """Results of a layout, computed once, and the folder of its checkpoint (some have one)."""
    saves = qk_norm is not None and (encoder, size) in SAVED
    folder = str(Path(_temporary.name) / f"{encoder}{size}")
    return run_ranks(_encode, size, encoder, qk_norm, folder if saves else None), folder


@pytest.mark.parametrize("qk_norm", ["joint", None])
@pytest.mark.parametrize(
    ("encoder", "size"), [("replicated", 2), ("sharded", 2), ("sharded", 4)], ids=str
)
def test_five_heads_equal_one_rank(encoder: str, size: int, qk_norm: str | None) -> None:
    """At TP 4 the heads are 2, 2, 1 and none: the last rank holds padding alone."""
    reference, _ = encoded("replicated", 1, qk_norm)
    outputs, _ = encoded(encoder, size, qk_norm)
    expected, whole = _whole(reference), _whole(outputs)
    assert whole.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(
            whole[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for out in outputs:
        torch.testing.assert_close(out["out"], reference[0]["out"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out["after"], reference[0]["after"], atol=1e-4, rtol=1e-4)
        assert out["padding"] == 0.0
        assert out["frozen"] == (False, 0)
    if encoder == "sharded":
        count = -(-5 // size)
        assert [out["heads"] for out in outputs] == [(5, r * count, count) for r in range(size)]
    for name in expected:
        mains = [p for out in outputs for p in out["pieces"] if p[0] == name and p[4]]
        elements = sum(piece[3].numel() for piece in mains)
        assert elements == expected[name].numel(), f"{name} is not saved exactly once"


def _load(rank: int, world: int, init: str, loads: list[tuple[str, str]]) -> list[Tensor]:
    from megatron.core.dist_checkpointing import load

    from nvmm.parallel.parameters import sharded_state_dict

    Parallel(tensor_model_parallel_size=world).initialize(
        seed=1, rank=rank, world_size=world, init_method=init
    )
    outputs = []
    for encoder, folder in loads:
        model = vision(Parallel(tensor_model_parallel_size=world, encoder=encoder))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        result = model.load_state_dict(load(sharded_state_dict(model), folder), strict=False)
        assert not result.unexpected_keys
        assert all(name.endswith("_extra_state") for name in result.missing_keys)
        outputs.append(model(tiles()).detach())
    return outputs


@pytest.mark.parametrize("size", [1, 2])
def test_checkpoints_of_both_modes_load_in_both(size: int) -> None:
    """Saved replicated at TP 2, and sharded at TP 4 with padding."""
    saved = [encoded(encoder, ranks, "joint") for encoder, ranks in SAVED]
    loads = [(encoder, folder) for _, folder in saved for encoder in ("replicated", "sharded")]
    for outputs in run_ranks(_load, size, loads):
        for out in outputs:
            torch.testing.assert_close(out, saved[0][0][0]["out"], atol=1e-5, rtol=1e-5)


# -- autograd --------------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_no_graph_is_kept_without_autograd() -> None:
    """mcore's layers turn autograd on for the residual add; LayerScale would then keep inputs."""
    model = vision()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert not model(tiles()).requires_grad
        assert not saved
        assert model(tiles()).requires_grad and saved


def _gradients(recompute: str | None, freeze: tuple[str, ...]) -> dict[str, Tensor | None]:
    from nvmm.parallel.parameters import initialize, match

    model = vision(Parallel(recompute_granularity=recompute))
    initialize(model, seed=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(match(pattern, name) for pattern in freeze))
    model(tiles()).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    "freeze",
    [(), ("class_token", "conv1.*", "position_embeddings.*"), ("[!d]*", "*.ls?", "*norm*", "*fc*")],
    ids=["nothing", "patch_embedding", "all_but_attention"],
)
def test_recompute_gives_the_same_gradients(recompute: str, freeze: tuple[str, ...]) -> None:
    expected, found = _gradients(None, freeze), _gradients(recompute, freeze)
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient)


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 3}, r"model\.vision\.image_size=3 must be at least"),
        ({"qk_norm": "per_head"}, r"model\.vision\.qk_norm=per_head must be one of joint"),
        ({"transformer": {"num_query_groups": 1}}, r"num_query_groups=1 must equal"),
        ({"transformer": {"hidden_dropout": 0.1}}, r"hidden_dropout=0\.1 must be 0\.0"),
    ],
)
def test_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision(**changes)


@pytest.mark.usefixtures("world")
def test_tiles_must_be_covered_by_patches() -> None:
    with pytest.raises(ValueError, match="tiles of 16 x 18 pixels"):
        vision()(tiles(1, 16, 18))


@pytest.mark.usefixtures("world")
def test_pixels_behind_the_last_patch_are_dropped() -> None:
    """SigLIP's 384 / 14 in small; tests/convert/test_vila.py compares it with Transformers."""
    from nvmm.parallel.parameters import initialize

    encoder = vision(image_size=18)
    initialize(encoder, seed=1)
    pixels = tiles(2, 18, 18)
    assert encoder.grid(pixels) == (4, 4)
    changed = pixels.clone()
    changed[:, :, 16:] = 255 - changed[:, :, 16:]
    changed[:, :, :, 16:] = 255 - changed[:, :, :, 16:]
    assert torch.equal(encoder(pixels), encoder(changed))
    # A tile of another size than the native one must be covered.
    with pytest.raises(ValueError, match="tiles of 22 x 22 pixels"):
        encoder(tiles(1, 22, 22))


@pytest.mark.usefixtures("world")
def test_pixels_are_normalised_in_fp32_and_rounded_once() -> None:
    """All 256 values of each channel, in a bf16 encoder."""
    config = tiny.multimodal()["vision"] | {"image_mean": [0.31, 0.5, 0.7]}
    chunk = Parallel().chunks(Precision("bf16"))[0]
    encoder = instantiate(config, _convert_="all")(chunk=chunk)
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
        for x in (encoder.image_mean, encoder.image_std)
    )
    exact = (tiles.double() / 255 - mean) / std
    pixels = encoder._normalize(tiles)
    assert pixels.dtype == torch.bfloat16
    # Half a unit of the last of 8 bits, and fp32's own rounding near zero.
    error = (pixels.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()
