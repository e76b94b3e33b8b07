"""Questions behind solved examples: which are chosen, and how they stand in the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import write_shards
from nvmm.evaluation.exact_match import exact_match
from nvmm.evaluation.few_shot import FewShot
from tests.data.conftest import image_bytes, template
from tests.data.conftest import tiny as tiny

QUESTION = {
    "__url__": "test-00000.tar",
    "__key__": "q",
    "json": json.dumps({"question": "how many?", "answer": "none"}).encode(),
    "png": image_bytes(32, 32, seed=99),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve solved examples; number 7 has no answer."""
    folder = tmp_path_factory.mktemp("train")
    samples = []
    for number in range(12):
        record: dict[str, Any] = {"question": f"q{number}", "answer": f"a{number}"}
        if number == 7:
            del record["answer"]
        picture = image_bytes(32, 32, seed=number)
        samples.append(
            {"__key__": str(number), "json": json.dumps(record).encode(), "png": picture}
        )
    write_shards(folder, "train", samples)
    return str(folder / "train-*.tar")


def build(tokenizer: Tokenizer, **options: Any) -> InstructBuilder:
    return InstructBuilder(
        template(),
        ImageTags("none", image_start="", image_end=""),
        tokens_per_tile=1,
        tile_size=32,
        max_tiles=1,
        tokenizer=tokenizer,
        sequence_length=512,
        **options,
    )


def prompt(tokenizer: Tokenizer, train: str, shots: int, **options: Any) -> tuple[str, Any]:
    benchmark = FewShot("few", "test-*.tar", exact_match, shots=shots, train=train, **options)
    example = benchmark.ask(QUESTION, build(tokenizer))
    assert (example.question, example.answers) == ("how many?", ["none"])
    text = tokenizer.decode(example.prompt.text.tokens.tolist(), skip_special_tokens=False)
    assert not example.prompt.text.weights.any()
    return text.replace("<|vision_pad|>", "#"), example.prompt.text.media[IMAGE].values


def chosen(text: str) -> list[int]:
    return [int(piece.split()[0].split("<")[0]) for piece in text.split("#\nq")[1:]]


def test_examples_are_turns_before_the_question(tiny: Tokenizer, train: str) -> None:
    text, tiles = prompt(tiny, train, 2, suffix="Be brief.")
    first, second = chosen(text)
    user, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    shots = "".join(f"{user}#\nq{n}\nBe brief.{end}a{n}<|im_end|>\n" for n in (first, second))
    assert text == f"{shots}{user}#\nhow many?\nBe brief.{end}"
    # Each picture stands where its question does.
    build_one = build(tiny)
    for tile, seed in zip(tiles, (first, second, 99), strict=True):
        alone = build_one({**QUESTION, "png": image_bytes(32, 32, seed=seed)})
        assert torch.equal(tile, alone.text.media[IMAGE].values[0])


def test_or_a_document(tiny: Tokenizer, train: str) -> None:
    text, tiles = prompt(
        tiny, train, 1, layout="document", separator="\n\n", answer_separator=" = ", suffix="?"
    )
    [n] = chosen(text)
    assert text == f"#\nq{n}\n? = a{n}\n\n#\nhow many?\n?" and len(tiles) == 2


def test_no_shots_are_the_plain_question(tiny: Tokenizer, train: str) -> None:
    text, _ = prompt(tiny, train, 0)
    sample = build(tiny).prompt(QUESTION)
    plain = tiny.decode(sample.text.tokens.tolist(), skip_special_tokens=False)
    assert text == plain.replace("<|vision_pad|>", "#")


def test_the_seed_chooses_and_fewer_are_the_first_of_more(tiny: Tokenizer, train: str) -> None:
    eight = chosen(prompt(tiny, train, 8)[0])
    assert len(set(eight)) == 8 and 7 not in eight
    assert chosen(prompt(tiny, train, 8)[0]) == eight
    assert chosen(prompt(tiny, train, 4)[0]) == eight[:4]
    others = chosen(prompt(tiny, train, 8, seed=1)[0])
    assert others != eight and 7 not in others


def test_the_question_s_own_picture_and_a_damaged_one_are_no_examples(
    tiny: Tokenizer, train: str, tmp_path: Path
) -> None:
    picture = image_bytes(32, 32, seed=1)
    samples: list[dict[str, Any]] = [
        {"png": QUESTION["png"], "answer": "the same picture"},
        {"png": picture[: len(picture) // 2], "answer": "half a picture"},
        {"png": picture, "answer": "a1"},
    ]
    members = [
        {
            "__key__": str(number),
            "png": sample["png"],
            "json": json.dumps({"question": f"q{number}", "answer": sample["answer"]}).encode(),
        }
        for number, sample in enumerate(samples)
    ]
    write_shards(tmp_path, "copy", members)
    copied = str(tmp_path / "copy-*.tar")
    for seed in range(4):
        assert chosen(prompt(tiny, copied, 1, seed=seed)[0]) == [2]
    with pytest.raises(ValueError, match=r"gives 1 of 2 examples"):
        prompt(tiny, copied, 2)


def test_what_gives_no_examples_is_refused(tiny: Tokenizer, train: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives 11 of 12 examples"):
        prompt(tiny, train, 12)
    with pytest.raises(ValueError, match=r"benchmark\.shots=-1 must be in 0\.\.64"):
        prompt(tiny, train, -1)
    with pytest.raises(ValueError, match="layout=rows must be one of turns, document"):
        prompt(tiny, train, 1, layout="rows")

    class Model:
        builder = build(tiny)

    benchmark = FewShot("few", train, exact_match, shots=1, train=train)
    with pytest.raises(ValueError, match="which the questions are of"):
        benchmark.data(Model())  # type: ignore[arg-type]
