"""model=from:FOLDER: a run's model out of a folder, with overrides, records and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvmm.config import check, compose
from nvmm.convert.described import described
from nvmm.convert.models import write_state
from tests.convert import families


def of(*overrides: str) -> dict[str, Any]:
    model: dict[str, Any] = check.to_plain(compose.composed("train", overrides).model)
    return model


def vit(folder: Path) -> Path:
    return families.save(folder, families.internvit_config(False), families.internvit(False)[1])


def test_a_hugging_face_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relative path too, and overrides of it act as on any option."""
    families.language("qwen2", tmp_path / "theirs")
    model = of(f"model=from:{tmp_path / 'theirs'}")
    assert model["transformer"]["num_layers"] == 2 and model["vocab_size"] == families.VOCABULARY
    monkeypatch.chdir(tmp_path)
    changed = of("model=from:theirs", "model.transformer.num_layers=1", "model.rotary_base=50")
    assert (changed["transformer"].pop("num_layers"), changed.pop("rotary_base")) == (1, 50)
    model["transformer"].pop("num_layers"), model.pop("rotary_base")
    assert changed == model


def test_parts_of_a_model_come_from_folders(tmp_path: Path) -> None:
    """An encoder, and the decoder of a whole model, take the places of an experiment's."""
    families.nvlm_d(tmp_path / "whole")
    vit(tmp_path / "vit")
    model = of(
        "experiment=nvlm_d/sft_7b",
        f"language@model.language=from:{tmp_path / 'whole'}",
        f"vision@model.vision=from:{tmp_path / 'vit'}",
    )
    assert model["language"]["transformer"]["hidden_size"] == 60
    assert (
        model["vision"]["transformer"]["hidden_size"] == 80 and model["vision"]["qk_norm"] is None
    )
    assert model["connector"]["hidden_size"] == 18944
    with pytest.raises(ValueError, match=r"is a model .*VisionTransformer.* without language"):
        of("experiment=nvlm_d/sft_7b", f"language@model.language=from:{tmp_path / 'vit'}")


def checkpoint(folder: Path, model: Any) -> Path:
    folder.mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "digests.json"):
        (folder / name).write_text("{}")
    write_state(folder, {"config": {"model": model}})
    return folder


def test_a_checkpoint_is_a_model_if_it_is_trusted(tmp_path: Path) -> None:
    kept = {"_target_": "nvmm.models.language.LanguageModel", "vocab_size": 7}
    folder = checkpoint(tmp_path / "ours", kept)
    assert of(f"model=from:{folder}") == kept
    for model, message in (
        ({"_target_": "os.system"}, r"would run os\.system"),
        (None, "has no model config"),
    ):
        folder = checkpoint(tmp_path / message[-5:-1], model)
        with pytest.raises(ValueError, match=f"model=from:.*{message}") as refused:
            of(f"model=from:{folder}")
        # `nvmm train` has no trust_config, and one reason is said once.
        assert "trust_config" not in str(refused.value)
        assert str(refused.value).count(message.replace("\\", "")) == 1


def test_an_encoder_of_sounds_is_a_part(tmp_path: Path) -> None:
    encoder = {"_target_": "nvmm.modules.encoders.audio.AudioEncoder", "num_mel_bins": 8}
    whole = {"_target_": "nvmm.models.multimodal.MultimodalModel", "language": {"vocab_size": 7}}
    whole["encoders"] = {"audio": {"encoder": encoder, "connector": {}}}
    folder = checkpoint(tmp_path / "hears", whole)
    assert described(folder, "audio") == encoder
    with pytest.raises(ValueError, match="without vision"):
        described(folder, "vision")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model=from:nowhere: nowhere is not a folder"):
        of("model=from:nowhere")
    with pytest.raises(ValueError, match=r"has no readable config\.json"):
        of(f"model=from:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange"}))
    with pytest.raises(ValueError, match="model_type='strange' has no table; there are qwen2"):
        of(f"model=from:{tmp_path}")
    # Other groups have no such options.
    with pytest.raises(ValueError, match=r"optim=from:.* does not exist"):
        of(f"optim=from:{tmp_path}")


def test_the_record_of_a_run_keeps_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """overrides.yaml is what was typed, so that the command can be given again."""
    families.language("qwen2", tmp_path / "theirs")
    typed = [
        "experiment=language/tiny",
        f"model=from:{tmp_path / 'theirs'}",
        f"tokenizer.path={tmp_path}",
        "data.train.shards=x",
        "data.sequence_length=64",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *typed])
    job = compose.load("train")
    assert job is not None and job.overrides == typed
    assert job.config["model"]["vocab_size"] == families.VOCABULARY
