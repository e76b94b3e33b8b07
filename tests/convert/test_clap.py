"""CLAP's audio encoder: features of Transformers, and the same folder back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvmm.convert import models
from nvmm.convert.formats import clap
from tests.convert import families
from tests.convert.test_families import assert_equal, exported, imported
from tests.convert.test_towers import features as tower_features
from tests.ranks import run_ranks

WINDOWS = (50, 256)
"""Frames that are stretched to the picture's, and as many as it has."""


def windows(frames: int) -> Tensor:
    return 20 * torch.randn(3, 16, frames, generator=torch.Generator().manual_seed(3)) - 30


def expected(reference: Any, frames: int) -> Tensor:
    """Transformers' vector of each window [3, 1, width]."""
    spectrograms = windows(frames).transpose(1, 2)[:, None]
    with torch.no_grad():
        if hasattr(reference, "text_model"):
            # Without its normalisation, as Audio Flamingo takes the vector.
            pooled = reference.audio_model(input_features=spectrograms).pooler_output
            return reference.audio_projection(pooled)[:, None]
        out = reference(input_features=spectrograms)
    return (out.pooler_output if "pooler_output" in out else out.audio_embeds)[:, None]


def ours(path: Path, frames: int) -> Tensor:
    from hydra.utils import instantiate

    from nvmm.checkpoint.load import load_weights
    from nvmm.parallel.setup import Parallel, Precision

    model = models.open_checkpoint(path).model
    [chunk] = Parallel().chunks(Precision())
    encoder = instantiate(model, _convert_="all")(chunk=chunk).eval()
    assert load_weights(path, [encoder]) == []
    with torch.no_grad():
        return encoder(windows(frames))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["alone", "projected"])
def test_an_encoder_comes_back_bit_equal(kind: str, tmp_path: Path) -> None:
    reference = families.clap(kind, tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    assert model["projection"] == ("laion" if kind == "projected" else "none")
    for frames in WINDOWS:
        features = ours(tmp_path / "ours", frames)
        torch.testing.assert_close(features, expected(reference, frames), atol=1e-4, rtol=1e-5)
    back = exported(tmp_path / "ours", tmp_path / "back", "clap")
    assert_equal(back, load_file(tmp_path / "theirs" / "model.safetensors"))
    again, info = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(expected(again.eval(), 256), expected(reference, 256))


@pytest.mark.usefixtures("world")
def test_a_whole_clap_gives_its_audio_branch(tmp_path: Path) -> None:
    reference = families.clap("whole", tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    features = ours(tmp_path / "ours", 256)
    torch.testing.assert_close(features, expected(reference, 256), atol=1e-4, rtol=1e-5)
    left_out = models.open_checkpoint(tmp_path / "ours").state["dropped"]
    assert any(name.startswith("text_model.") for name in left_out)
    assert not any(name.startswith("audio_projection.") for name in left_out)


@pytest.mark.parametrize("encoder", ["replicated", "sharded"])
def test_ranks_share_the_windows(encoder: str, tmp_path: Path) -> None:
    """It is whole on both ranks whatever parallel.encoder says; three windows are two shares."""
    reference = families.clap("projected", tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    layout = {"tensor_model_parallel_size": 2, "encoder": encoder}
    for result in run_ranks(_features, 2, layout, tmp_path / "ours"):
        torch.testing.assert_close(result, expected(reference, 256), atol=1e-4, rtol=1e-5)


def _features(rank: int, world: int, init: str, layout: dict[str, Any], path: Path) -> Tensor:
    return tower_features(rank, world, init, layout, "clap", path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_fusion": True}, "enable_fusion=True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"patch_stride": [2, 2]}, "patch_stride=.* is not supported"),
        ({"hidden_size": 24}, "hidden_size=24 is not supported"),
        ({"a_field": 1}, "a_field=1 would not be read"),
    ],
)
def test_what_the_encoder_has_not_is_refused(fields: dict[str, Any], message: str) -> None:
    hf = {"model_type": "clap_audio_model", **families.CLAP, **fields}
    with pytest.raises(ValueError, match=message):
        clap.to_model(hf)


def test_clapcaps_projection_has_no_folder(tmp_path: Path) -> None:
    model = clap.to_model({"model_type": "clap_audio_model", **families.CLAP})
    with pytest.raises(ValueError, match="not projection=clapcap"):
        clap.from_model(model | {"projection": "clapcap"})
    assert json.dumps(clap.from_model(model))
