"""Audio Flamingo 3's graph: cached generation, packed neighbours, FLOPs; Whisper in the first's."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

from nvmm.batch import ATTENDED, MediaKind, Sample
from nvmm.convert.formats.audio_flamingo3 import to_model
from nvmm.data.collate import collate
from nvmm.proof.equivalence import ONE_RANK, run
from nvmm.proof.miniature import shrink
from nvmm.proof.synthetic import synthetic_steps
from tests.config.test_sound_rules import composed, problems
from tests.convert.test_audio_flamingo3 import AUDIO, SOUND, TEXT, samples
from tests.models.test_audio_flamingo import model_of
from tests.models.test_cross_attending import same_logits_with_a_cache

KIND = MediaKind("audio")


def model(**encoder: Any) -> Any:
    hf = {"model_type": "audioflamingo3", "text_config": TEXT, "audio_config": AUDIO}
    config = to_model({**hf, "audio_token_id": SOUND})
    config["encoders"]["audio"]["encoder"] |= encoder
    for part in ("language", "encoders.audio.encoder"):
        node = config
        for name in part.split("."):
            node = node[name]
        node["transformer"]["init_method_std"] = 0.1
    return model_of(config)


@pytest.mark.usefixtures("world")
def test_cached_generation_equals_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one window, of two that end in silence, and of none, padded on the left."""
    same_logits_with_a_cache(model(), samples(), monkeypatch)


def changed(sample: Sample) -> Sample:
    """The sample with other values in its windows."""
    text = sample.text
    media = dataclasses.replace(text.media[KIND], values=-text.media[KIND].values)
    return dataclasses.replace(sample, texts=(dataclasses.replace(text, media={KIND: media}),))


@pytest.mark.usefixtures("world")
def test_packed_neighbours_hear_nothing_of_each_other() -> None:
    first, none, second, third = samples()
    ours = model()
    with torch.no_grad():
        one = ours(collate([first, none, second], pad_id=0, packed=True), output="hidden")
        other = ours(
            collate([changed(first), none, changed(third)], pad_id=0, packed=True), output="hidden"
        )
    start, end = len(first.text.tokens), len(first.text.tokens) + len(none.text.tokens)
    torch.testing.assert_close(one[start:end], other[start:end], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[3:start], other[3:start], atol=1e-3)


@pytest.mark.usefixtures("world")
def test_flops_count_the_tokens_before_the_mean() -> None:
    """The mean takes tokens off the connector and the row, not off the encoder's layers."""
    batch = collate(samples()[:1], pad_id=0)
    windows = batch.media[KIND].values
    paired, single = model(), model(pool=1)
    assert paired.audio.flops(windows, "frozen") == single.audio.flops(windows, "frozen")
    assert paired.audio.grid(windows) == (1, 5) and single.audio.grid(windows) == (1, 11)
    assert paired.flops(batch)["audio"] < single.flops(batch)["audio"]


def test_a_mean_of_more_tokens_than_there_are_is_refused(world: None) -> None:
    with pytest.raises(ValueError, match=r"pool=12 must be in 1\.\.max_source_positions=11"):
        model(pool=12)


def whisper_in_audio_flamingo() -> dict[str, Any]:
    """Audio Flamingo with Whisper's encoder and a mean over each window in HTS-AT's place."""
    config = composed("model=audio_flamingo_tiny", "data=sounds")
    encoder = composed("experiment=audio_flamingo3/tiny")["model"]["encoders"]["audio"]["encoder"]
    config["model"]["encoders"]["audio"]["encoder"] = encoder | {"pool": 50}
    front_end = {"bins": 16, "rate": 16000, "window": 1.0, "hop": 1.0, "fft": 400, "fmin": 0.0}
    front_end |= {"frame_hop": 160, "compression": "whisper"}
    config["data"]["train"]["build"]["front_end"] |= front_end
    return config


def test_whisper_takes_the_place_of_clap_in_audio_flamingo() -> None:
    """The builder's windows fit, and a step trains encoder, layers over windows and blocks."""
    config = whisper_in_audio_flamingo()
    assert problems(copy.deepcopy(config), "seed", 1) == []
    small = shrink(config)
    assert small["model"]["encoders"]["audio"]["encoder"]["pool"] == 7
    [[batch, *_]] = synthetic_steps(small, 1, 1)
    assert batch.media[MediaKind("audio", ATTENDED)].values.shape[1:] == (8, 14)
    result = run(small, ONE_RANK, num_steps=1)
    assert math.isfinite(result.losses[0])
    for part in ("audio.conv1.", "audio.decoder.final_layernorm.", "audio_connector.layers.2."):
        found = [g.abs().max() for n, g in result.gradients[0].items() if n.startswith(part)]
        assert found and all(value > 0 for value in found), part
