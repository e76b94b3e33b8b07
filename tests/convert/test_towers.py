"""CLIP, SigLIP and Whisper towers and LLaVA-NeXT: features of Transformers, bit-equal back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from nvmm.checkpoint.load import load_weights
from nvmm.config.check import to_plain
from nvmm.config.compose import composed
from nvmm.config.signatures import default_of
from nvmm.convert import exporting, importing, models
from nvmm.convert.formats.whisper import to_model
from nvmm.convert.sources import read
from nvmm.convert.table import ToTheirs
from nvmm.parallel.setup import Parallel, Precision
from tests.convert import families
from tests.convert.test_families import assert_equal, exported, imported
from tests.ranks import run_ranks

KINDS = ("clip", "siglip", "whisper")


def media(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "clap":
        return 20 * torch.randn(3, 16, 256, generator=generator) - 30
    if kind == "whisper":
        return torch.randn(3, 7, 22, generator=generator)
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)


def pixels(tiles: Tensor, model: Any) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model["image_mean"], model["image_std"]))
    return (tiles.float() / 255 - mean) / std


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as Transformers' newest version saves them; older folders have the prefix."""
    return {name.removeprefix("vision_model."): value for name, value in state.items()}


def reference_features(kind: str, reference: Any, model: Any) -> Tensor:
    """Transformers' features of `media`, without the class token."""
    with torch.no_grad():
        if kind == "whisper":
            encoder = getattr(reference, "model", reference)
            return getattr(encoder, "encoder", encoder)(media(kind)).last_hidden_state
        vision = getattr(reference, "vision_model", reference)
        out = vision(pixel_values=pixels(media(kind), model)).last_hidden_state
    return out[:, 1:] if kind == "clip" else out


def features(
    rank: int, world: int, init: str | None, layout: dict[str, Any], kind: str, path: Path
) -> Tensor:
    parallel = Parallel(**layout)
    if init is not None:
        parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    model = models.open_checkpoint(path).model
    ours = instantiate(model, _convert_="all")(chunk=parallel.chunks(Precision())[0]).eval()
    assert load_weights(path, [ours]) == []
    with torch.no_grad():
        return ours(media(kind))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_towers_come_back_bit_equal(kind: str, tmp_path: Path) -> None:
    reference = families.tower(kind, tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    expected = reference_features(kind, reference, model)
    ours = features(0, 1, None, {}, kind, tmp_path / "ours")
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)

    back = bare(exported(tmp_path / "ours", tmp_path / "back", kind))
    original = bare(load_file(tmp_path / "theirs" / "model.safetensors"))
    if kind == "clip":
        # The norm of the pooled token, which we do not compute, comes back as the identity.
        for part, value in (("weight", 1.0), ("bias", 0.0)):
            original[f"post_layernorm.{part}"] = torch.full((60,), value)
    assert_equal(back, original)
    preprocessor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    if kind == "whisper":
        assert preprocessor["feature_size"] == 7
    else:
        assert preprocessor["image_mean"] == model["image_mean"]
        assert preprocessor["size"] == {"height": 16, "width": 16}
    again, info = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(reference_features(kind, again.eval(), model), expected)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_gives_its_tower(kind: str, tmp_path: Path) -> None:
    reference = families.tower(f"{kind}_whole", tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    ours = features(0, 1, None, {}, kind, tmp_path / "ours")
    expected = reference_features(kind, reference, model)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)
    left_out = models.open_checkpoint(tmp_path / "ours").state["dropped"]
    inside = load_file(tmp_path / "theirs" / "model.safetensors")
    assert left_out and set(left_out) <= inside.keys()
    towers = ("vision_model.encoder.", "vision_model.embeddings.", "model.encoder.")
    assert not any(name.startswith(towers) for name in left_out)
    exported(tmp_path / "ours", tmp_path / "back", kind)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "text_config" not in config


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [("clip", "sharded"), ("siglip", "sharded"), ("whisper", "sharded"), ("whisper", "replicated")],
)
def test_towers_load_at_tensor_parallel_2(kind: str, encoder: str, tmp_path: Path) -> None:
    """Three media on two ranks, five heads on two ranks."""
    reference = families.tower(kind, tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    layout = {"tensor_model_parallel_size": 2, "encoder": encoder}
    expected = reference_features(kind, reference, model)
    for ours in run_ranks(features, 2, layout, kind, tmp_path / "ours"):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("world")
def test_llava_next_is_imported(tmp_path: Path) -> None:
    """Projected features of a tile, and text, are Transformers'; what has no place is listed."""
    from tests.models.test_language import batch_of

    reference = families.llava_next(tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    assert model["vision"]["transformer"]["num_layers"] == 2
    ours = instantiate(model, _convert_="all")(chunk=Parallel().chunks(Precision())[0]).eval()
    assert load_weights(tmp_path / "ours", [ours]) == []
    tiles = media("clip")
    tokens = torch.arange(24).view(2, 12) * 37 % (families.VOCABULARY - 1)
    with torch.no_grad():
        inner = reference.model
        values = pixels(tiles, model["vision"])
        hidden = inner.vision_tower(values, output_hidden_states=True).hidden_states[-2]
        expected = inner.multi_modal_projector(hidden[:, 1:])
        projected = ours.connector(ours.vision(tiles), ours.vision.grid(tiles))
        torch.testing.assert_close(projected, expected, atol=1e-4, rtol=1e-5)
        theirs = reference(input_ids=tokens).logits
        found = ours(batch_of(list(tokens)), output="logits")
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-5)

    saved = models.open_checkpoint(tmp_path / "ours")
    left_out = saved.state["dropped"]
    assert "image_newline" in left_out and len(left_out) == 3 + 16
    with pytest.raises(ValueError, match="can only be imported: image_newline"):
        exporting.export(saved, tmp_path / "back", "llava_next")
    # All that was imported goes back to where it came from.
    folder = models.open_folder(tmp_path / "theirs")
    there = ToTheirs(saved.source, models.FORMATS["llava_next"].table(model, folder.config))
    for name, original in load_file(tmp_path / "theirs" / "model.safetensors").items():
        if name not in left_out:
            assert torch.equal(read(there, name), original), name


def test_a_composite_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    families.llava_next(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["vision_feature_layer"] = [-2, -5]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[-2, -5\] is not supported"):
        importing.derive({"": models.open_folder(tmp_path / "theirs")})


def test_the_audio_config_is_whisper_large_v2() -> None:
    """Our config of it is what its published config.json becomes (d_model 1280, 32 layers)."""
    audio = "+audio@model.encoders.audio.encoder=whisper_large_v2"
    needed = ["tokenizer.path=given", "data.train.shards=given", "init_from=null"]
    config = to_plain(composed("train", ["experiment=nvlm_d/sft_7b", audio, *needed]))
    published = {
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
        "init_std": 0.02,
    }
    ours = config["model"]["encoders"]["audio"]["encoder"]
    given = to_model(published)
    assert ours["transformer"] == given["transformer"]
    for name in ("num_mel_bins", "max_source_positions"):
        assert ours.get(name, default_of(ours["_target_"], name)) == given[name]
