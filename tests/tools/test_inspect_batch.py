"""The inspector shows the loss mask of every template, and of every part of a blend."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nvmm.config import compose
from nvmm.config.check import check, config_dir, to_plain
from nvmm.data.shards.dataset import write_shards
from tests.data.samples import llama
from tests.data.samples.test_jinja_template import MARKED
from tests.data.samples.test_sounds import noise, wave
from tools.inspect_batch import show

EXTRA = ["<extra_id_0>", "<extra_id_1>"]
TURNS = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Ho!"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two"},
]
MASKS = {
    "chatml": ["Ho!<|im_end|>", "Two<|im_end|>"],
    "yi": ["Ho!<|im_end|>", "Two<|im_end|>"],
    "llama3": ["Ho!<|im_end|>", "Two<|im_end|>"],
    "nemotron": ["Ho!\n<extra_id_1>", "Two\n<extra_id_1>"],
    "nemotron_reward": ["Ho!", "Two"],
    "pretraining": ["Ho!<|im_end|>", "Two<|im_end|>"],
    "chatqa": [" Ho!", " Two<|im_end|>"],
    "vicuna": [" Ho!<|im_end|>", " Two<|im_end|>"],
    "llava_plain": ["Ho!\n", "Two\n"],
    "jinja": ["Ho!<|im_end|>", "Two<|im_end|>"],
}
"""The stretches that are trained, with supervise=all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    llama.save(folder / "tokenizer", MARKED)
    ranking = {"question": "Who?", "passages": ["He."], "relevant": [0]}
    sets: dict[str, Any] = {
        "chat": {"messages": TURNS},
        "qa": {"messages": TURNS[2:], "contexts": ["A chunk.", "Another."]},
        "ranking": ranking,
        "list": ranking | {"passages": ["He.", "She."], "relevant": [0, 1]},
    }
    for name, record in sets.items():
        write_shards(folder, name, [{"__key__": "0", "json": json.dumps(record).encode()}])
    return folder


def composed(folder: Path, *given: str) -> dict[str, Any]:
    overrides = [
        "experiment=language/tiny",
        f"tokenizer.path={folder / 'tokenizer'}",
        "tokenizer.image_token='<|reserved_special_token_0|>'",
        f"tokenizer.extra_tokens={EXTRA}",
        *given,
    ]
    config = compose.composed("train", overrides)
    assert check(config) == []
    return to_plain(config)


def shown(config: dict[str, Any], capsys: pytest.CaptureFixture[str], sample: int = 0) -> str:
    options = argparse.Namespace(split="train", all=False, no_color=True, html=None)
    assert show(config, [sample], options) == 0
    return capsys.readouterr().out


def trained(text: str) -> list[str]:
    return re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)


def test_every_template_is_here() -> None:
    assert {path.stem for path in (config_dir() / "template").glob("*.yaml")} == set(MASKS)


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_a_template(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialect = f"template@data.train.build.template={name}"
    config = composed(folder, f"data.train.shards={folder}/chat-*.tar", dialect)
    assert trained(shown(config, capsys)) == MASKS[name]
    config["data"]["train"]["build"]["supervise"] = "last"
    assert trained(shown(config, capsys)) == MASKS[name][1:]


SOUNDS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "single": (
        "sounds",
        {"clips": [{"sound": "0.wav", "prompt": "What?", "answer": "A dog"}], "task": "x"},
        "The task is x. ",
        ["a dog<|endofchunk|></s>"],
    ),
    "few_shot": (
        "audio_flamingo_sft",
        {
            "clips": [
                {"sound": f"{n}.wav", "prompt": "What?", "answer": answer}
                for n, answer in enumerate(["A dog", "A cat"])
            ],
            "interleaved": "similar",
        },
        "Here are similar examples. ",
        ["a dog<|endofchunk|>", "a cat<|endofchunk|></s>"],
    ),
    "dialogue": (
        "audio_flamingo_chat",
        {
            "clips": [
                {"sound": "0.wav", "prompt": "What?", "answer": "A dog."},
                {"prompt": "Loud?", "answer": "Yes."},
            ],
            "task": "dialog",
        },
        "The task is dialog. ",
        ["A dog.<|endofchunk|></s>", "Yes.<|endofchunk|></s>"],
    ),
}
"""Templates of sounds: data, record, how it begins, and the stretches that are trained."""


@pytest.mark.parametrize("name", SOUNDS)
def test_the_mask_of_a_template_of_sounds(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, record, opening, masks = SOUNDS[name]
    sounds = {clip["sound"]: wave(noise(0.5, 8000, 1), 8000) for clip in record["clips"][:1]}
    sounds |= {c["sound"]: sounds["0.wav"] for c in record["clips"] if "sound" in c}
    write_shards(tmp_path, "a", [{"__key__": "0", "json": json.dumps(record).encode(), **sounds}])
    blend = f"[{{name: a, passes: 1, shards: {tmp_path}/a-*.tar}}]"
    extra = "['<audio>','<SEP>','<|endofchunk|>','</s>']"
    given = [
        *("experiment=audio_flamingo/tiny", f"data={data}", f"tokenizer.path={folder}/tokenizer"),
        *("data.train.shards=null", f"data.blend={blend}", f"tokenizer.extra_tokens={extra}"),
    ]
    config = compose.composed("train", given)
    assert check(config) == []
    text = shown(to_plain(config), capsys)
    assert trained(text) == masks and opening in text


FORMS = {
    "qa": ("{instruction: Say it.}", "\n\nA chunk.\n\nAnother.\n\nUser: Say it. One?", " Two"),
    "ranking": (
        "{_target_: nvmm.data.samples.contexts.Ranking}",
        "Passage: He.\n\nUser: For the question Who?, access whether the passage is",
        " True",
    ),
    "list": (
        "{_target_: nvmm.data.samples.contexts.ListRanking, passages: {_target_:"
        " nvmm.data.samples.passages.Passages, several: 'Passage {number}: {text}'}}",
        "Passage 1: He.\n\nPassage 2: She.\n\nUser: For the question Who?, access",
        " 1, 2",
    ),
}


def test_parts_of_a_blend_have_forms_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry says what differs from data.train.build; a nested list may be between."""
    chat, *parts = [f"{{name: chat, weight: 1, shards: {folder}/chat-*.tar}}"] + [
        f"{{name: {name}, weight: 1, shards: {folder}/{name}-*.tar, build: {{form: {form}}}}}"
        for name, (form, *_) in FORMS.items()
    ]
    blend = f"data.blend=[{chat},{parts[0]},{{weight: 1, blend: [{parts[1]},{parts[2]}]}}]"
    config = composed(folder, "data=chatqa", "data.train.shards=null", blend)
    assert trained(shown(config, capsys)) == MASKS["chatqa"][1:]
    for ordinal, (_, text, answer) in enumerate(FORMS.values(), 1):
        found = shown(config, capsys, sample=ordinal << 53)
        assert text in found and trained(found) == [f"{answer}<|im_end|>"]


def test_a_key_that_the_builder_lacks_is_refused(folder: Path) -> None:
    entry = "{shards: a, build: {form: {instructions: x}}}"
    given = ["data=chatqa", "data.train.shards=null", f"data.blend=[{entry}]"]
    config = compose.composed("train", ["experiment=language/tiny", "tokenizer.path=x", *given])
    [problem] = check(config)
    assert "data.blend[0].build.form.instructions" in str(problem) and "instruction" in str(problem)
