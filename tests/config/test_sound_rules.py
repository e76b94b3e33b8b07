"""What the data cut of a sound must be what the model's encoder takes, before the first step."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nvmm.config.check import config_dir, to_plain
from nvmm.config.rules.all import violations

BUILD, FRONT_END = "data.train.build", "data.train.build.front_end"
ENCODER = "model.encoders.audio.encoder"


@functools.lru_cache
def _composed(*overrides: str) -> dict[str, Any]:
    given = ["init_from=null", "tokenizer.path=t", "data.train.shards=a.tar"]
    given += ["trainer.max_steps=1", "trainer.global_batch_size=1"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: dict[str, Any] = to_plain(compose("train", [*overrides, *given]))
    return config


def composed(*overrides: str) -> dict[str, Any]:
    return copy.deepcopy(_composed(*overrides))


@pytest.fixture
def placed() -> dict[str, Any]:
    """Audio Flamingo 3 in small: windows of 100 frames x 16 bins, 25 features each."""
    return composed("experiment=audio_flamingo3/tiny")


@pytest.fixture
def attended() -> dict[str, Any]:
    """Audio Flamingo in small: HTS-AT on at most 64 frames x 16 bins, one feature a window."""
    config = composed("model=audio_flamingo_tiny", "data=sounds")
    front_end = {"bins": 16, "rate": 16000, "window": 0.7, "hop": 0.175, "frame_hop": 200}
    config["data"]["train"]["build"]["front_end"] |= front_end
    return config


def problems(config: dict[str, Any], key: str, value: Any) -> list[str]:
    *parents, last = key.split(".")
    node = config
    for name in parents:
        node = node[name]
    node[last] = value
    return [str(problem) for problem in violations(config)]


def test_good_configs_break_none(placed: dict[str, Any], attended: dict[str, Any]) -> None:
    for config in (placed, attended):
        assert [p for p in violations(config) if "front_end" in p.key or "build" in p.key] == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{FRONT_END}.bins", 80, f"{FRONT_END}.bins=80 must be {ENCODER}.num_mel_bins=16"),
        (
            f"{FRONT_END}.window",
            2.0,
            f"{FRONT_END}.window=2.0 gives 200 frames, and {ENCODER}.max_source_positions takes at"
            " most 100",
        ),
        (
            f"{BUILD}.tokens_per_window",
            50,
            f"{BUILD}.tokens_per_window=50 must be 25, what {ENCODER} makes of a window",
        ),
        (f"{ENCODER}.pool", 5, f"{BUILD}.tokens_per_window=25 must be 10, what {ENCODER}"),
        (
            f"{FRONT_END}.most_windows",
            20,
            f"{FRONT_END}.most_windows=20 x tokens_per_window=25 must be below"
            " data.sequence_length=256",
        ),
        (
            "model.encoders",
            None,
            f"{FRONT_END}={{...}} needs an encoder, {ENCODER}",
        ),
        (
            "model.cross_attention",
            {"_target_": "nvmm.modules.cross_attention.CrossAttention", "kv_size": 64},
            f"{BUILD}._target_=nvmm.data.samples.sound_chat.SoundChatBuilder must be attended:"
            " model.cross_attention.kv_size=64",
        ),
    ],
)
def test_windows_in_the_sequence(
    placed: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    found = problems(placed, key, value)
    assert any(text.startswith(expected) for text in found), found


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{FRONT_END}.bins", 64, f"{FRONT_END}.bins=64 must be {ENCODER}.num_mel_bins=16"),
        (
            f"{FRONT_END}.window",
            7.0,
            f"{FRONT_END}.window=7.0 gives 561 frames, and {ENCODER}.picture takes at most 64",
        ),
        (f"{BUILD}.tokens_per_window", 2, f"{BUILD}.tokens_per_window=2 must be 1, what {ENCODER}"),
        (
            f"{BUILD}.placement",
            "sequence",
            f"{BUILD}.placement=sequence must be attended: model.cross_attention.kv_size=64",
        ),
        (
            "model.cross_attention",
            None,
            f"{BUILD}.placement=attended must be sequence: model._target_=",
        ),
    ],
)
def test_windows_that_are_attended(
    attended: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    found = problems(attended, key, value)
    assert any(text.startswith(expected) for text in found), found


def test_an_encoder_that_takes_windows_whole_gets_no_mask(attended: dict[str, Any]) -> None:
    attended["data"]["train"]["build"] = {
        "_target_": "nvmm.data.samples.sound_chat.SoundChatBuilder",
        "front_end": attended["data"]["train"]["build"]["front_end"],
        "tokens_per_window": 1,
    }
    [found] = [p for p in problems(attended, "seed", 1) if "mask" in p]
    assert found.startswith(f"{BUILD}.mask_padding=True must be false: {ENCODER}._target_=")


def test_layers_over_windows_get_one_feature_each(attended: dict[str, Any]) -> None:
    """Whisper in the place of HTS-AT, without and with a mean over each window."""
    whisper = composed("experiment=audio_flamingo3/tiny")["model"]["encoders"]["audio"]["encoder"]
    attended["data"]["train"]["build"]["front_end"] |= {"window": 1.0, "frame_hop": 320}
    build = attended["data"]["train"]["build"]
    build["front_end"]["compression"] = "whisper"
    assert (
        f"{ENCODER}.pool=2 must be 25"
        in problems(attended, "model.encoders.audio.encoder", whisper)[1]
    )
    assert problems(attended, "model.encoders.audio.encoder", whisper | {"pool": 25}) == []


def test_builders_of_validation_and_of_a_blend_are_checked(placed: dict[str, Any]) -> None:
    build = placed["data"]["train"]["build"]
    other = build | {"front_end": build["front_end"] | {"bins": 8}}
    placed["data"]["validation"] = {"build": other}
    found = problems(placed, "data.blend", [{"name": "a", "shards": "a.tar", "build": other}])
    for key in ("data.validation.build", "data.blend[0].build"):
        assert any(text.startswith(f"{key}.front_end.bins=8 must be") for text in found)


def test_whisper_is_an_override_away_in_audio_flamingo() -> None:
    """At full size: three keys go with the encoder, and each one that is left out is named."""
    changes = {
        f"audio@{ENCODER}": "whisper_large_v2",
        f"front_end@{FRONT_END}": "whisper",
        f"+{ENCODER}.pool": "1500",
        "model.cross_attention.kv_size": "1280",
    }
    given = [f"{key}={value}" for key, value in changes.items()]
    config = composed("model=audio_flamingo", "data=sounds", *given)
    assert config["model"]["encoders"]["audio"]["encoder"]["transformer"]["num_layers"] == 32
    assert problems(config, "seed", 1) == []
    for left_out, expected in ((1, f"{FRONT_END}.bins=64 must be"), (2, f"{ENCODER}.pool=1 must")):
        some = [text for number, text in enumerate(given) if number != left_out]
        found = problems(composed("model=audio_flamingo", "data=sounds", *some), "seed", 1)
        assert any(text.startswith(expected) for text in found), found
