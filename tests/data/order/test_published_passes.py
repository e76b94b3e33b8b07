"""Audio Flamingo's blends have the passes of its released configs, and a run of them gives N w."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from nvmm.data.order.blend import Blend, samples_of
from nvmm.data.order.mixture import Component
from tests.data.order.test_order import Virtual
from tests.test_configs import YAMLS

PRETRAIN = {"OpenAQA-AQA": 1, "BBCSoundEffects": 5, "CLAP_freesound": 1, "SoundDescs": 1}
PRETRAIN |= {"WavCaps-AudioSet_SL": 1, "WavCaps-BBC_Sound_Effects": 2, "WavCaps-FreeSound": 2}
PRETRAIN |= {"WavCaps-SoundBible": 5, "AudioSetFull": 1, "WavText5K": 3, "MSP-Podcast": 1.2}
PRETRAIN |= {"MELD-Emotion": 1.2, "MELD-Sentiment": 1.2, "Music-AVQA": 3, "MU-LLaMA": 1.2}
PRETRAIN |= {"LP-MusicCaps-MSD": 1, "NSynth": 0.4, "MTG-Jamendo": 1}
SFT: dict[str, tuple[float, ...]] = {
    # alone, and behind similar ones
    **{"Clotho-AQA": (3.5, 0.5), "OpenAQA": (0.1,), "Clotho-v2": (2, 0.5), "MACS": (0.8, 0.2)},
    **{"Epidemic_sound": (0.8, 0.2), "FSD50k": (0.9, 0.3), "CochlScene": (1.2, 0.3)},
    **{"NonSpeech7k": (2.4, 0.6), "chime-home": (1.5, 0.5), "SONYC-UST": (0.8, 0.2)},
    **{"EmoV-DB": (1.6, 0.4), "JL-Corpus": (6, 1.5), "TESS": (2, 0.5), "OMGEmotion": (3,)},
    **{"Music-AVQA": (5, 1), "MU-LLaMA": (0.35, 0.05), "LP-MusicCaps-MSD": (0.025, 0.007)},
    **{"LP-MusicCaps-MC": (2,), "LP-MusicCaps-MTT": (0.8, 0.2), "MusicCaps": (6,)},
    **{"NSynth": (1, 1), "MTG-Jamendo": (0.1,), "FMA": (0.4, 0.3), "MUSDB": (1,)},
}
PUBLISHED = {
    "pretrain": PRETRAIN,
    "sft": {
        f"{name}{behind}": passes
        for name, both in SFT.items()
        for behind, passes in zip(("", "_knn"), both, strict=False)
    },
    "chat": {"dialog_AudioSetSL": 1, "dialog_MusicCaps": 5},
}
PLAIN = {"pretrain": 0.5, "sft": None, "chat": None}
"""The probability of a task's sentence where it is not 1."""


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_passes_of_a_stage(stage: str) -> None:
    config = YAMLS[f"data/audio_flamingo_{stage}.yaml"]
    blend: list[dict[str, Any]] = config["blend"]
    assert {entry["name"]: entry["passes"] for entry in blend} == PUBLISHED[stage]
    assert len({entry["shards"] for entry in blend}) == len(blend)
    assert all(("knn" in entry["shards"]) == ("_knn" in entry["name"]) for entry in blend)
    build = config["train"]["build"]
    assert build["most_clips"] == (4 if stage == "chat" else 8)
    assert build.get("task_probability") == PLAIN[stage]
    told = {e["name"]: (e.get("build") or {}).get("task_probability") for e in blend}
    assert {name for name, share in told.items() if share is not None} == (
        {"OpenAQA-AQA"} if stage == "pretrain" else set()
    )
    for entry in blend:
        shares = (entry.get("build") or {}).get("augment", {"do_nothing": 1})
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("stage", PUBLISHED)
def test_a_run_gives_every_set_its_samples_times_its_passes(stage: str) -> None:
    sizes = {name: 997 + 10 * number for number, name in enumerate(PUBLISHED[stage])}
    parts = [
        Component(name, Virtual(sizes[name]), Fraction(samples_of(p, sizes[name])), p, sizes[name])  # type: ignore[arg-type]
        for name, p in PUBLISHED[stage].items()
    ]
    run = Blend([part.source() for part in parts])
    assert run.size is not None
    given = dict(zip(sizes, run.counts(run.size), strict=True))
    for name, passes in PUBLISHED[stage].items():
        assert abs(given[name] - passes * sizes[name]) <= 0.5
    # Half-way every set has given half of its own, within a sample or two.
    for name, count in zip(sizes, run.counts(run.size // 2), strict=True):
        assert abs(count - given[name] / 2) < 2
