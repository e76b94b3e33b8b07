"""Needles at depths of texts with an exact number of tokens, and tasks like RULER's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from nvmm.data.samples.chat import ChatTemplate, ImageTags
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from nvmm.evaluation.haystack import Haystack, exactly, hidden, recall
from nvmm.evaluation.items import count
from nvmm.evaluation.needle import Needle, heatmap
from nvmm.evaluation.ruler import NOISE, MultiKey, Ruler, RulerTask, VariableTracking
from tests.data.conftest import qwen  # noqa: F401

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>"]
TEXT = (
    "It was a bright day. The ships lay in the harbour, and nobody spoke! Who was the captain?"
    " A man of few words, as they said.\nHe had come from the north - with “nothing” but a coat."
    " At noon he left. The wind was good, so the sails were set; in an hour they were gone."
)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> InstructBuilder:
    folder = tmp_path_factory.mktemp("words")
    train_byte_level_bpe(
        folder,
        (TEXT + " magic number numbers special text VAR and so " + NOISE).split(" "),
        vocab_size=500,
        special_tokens=SPECIAL,
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[3],
    )
    return InstructBuilder(
        template=ChatTemplate(
            {
                "system": {"prefix": "<|im_start|>", "suffix": "{end}"},
                "user": {"prefix": "<|im_start|>user\n", "suffix": "{end}\n"},
                "assistant": {"prefix": "<|im_start|>"},
            },
            system="Answer.",
        ),
        tags=ImageTags(),
        tokens_per_tile=4,
        tile_size=16,
        tokenizer=Tokenizer(str(folder)),
        sequence_length=4096,
    )


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def model(builder: InstructBuilder) -> Any:
    return SimpleNamespace(builder=builder, max_sequence_length=16384)


def test_a_needle_stands_behind_the_sentence_at_its_depth() -> None:
    text = "One. Two two! Three three three?\nFour"
    assert hidden(text, [(0, "N.")]) == "N. One. Two two! Three three three?\nFour"
    assert hidden(text, [(0.2, "N.")]) == "One. N. Two two! Three three three?\nFour"
    assert hidden(text, [(0.5, "N.")]) == "One. Two two! N. Three three three?\nFour"
    assert hidden(text, [(0.95, "N.")]) == "One. Two two! Three three three? N. Four"
    assert hidden(text, [(1, "N.")]) == text + " N."
    several = [(1, "C."), (0.5, "A."), (0.5, "B."), (0.0, "Z.")]
    assert hidden(text, several) == "Z. One. Two two! A. B. Three three three?\nFour C."
    assert hidden("", [(0.5, "N.")]) == "N."


def test_a_haystack_begins_at_a_sentence_and_has_no_end(
    builder: InstructBuilder, book: str, tmp_path: Path
) -> None:
    text = Haystack([book], builder)
    for start in range(0, len(text), 7):
        part = text.part(start, 3 * len(text))
        assert len(builder.tokenizer.encode(part)) == pytest.approx(3 * len(text), abs=3)
        assert re.match(r"It|The|Who|A man|He|At", part), part[:20]
    pictures = tmp_path / "pictures.txt"
    pictures.write_text("See <image>.")
    with pytest.raises(ValueError, match=r"pictures.txt has <image>, which stands for a picture"):
        Haystack([str(pictures)], builder)
    with pytest.raises(ValueError, match=r"benchmark.haystack=.*gone.txt is no text"):
        Haystack([book + "/gone.txt"], builder)


@pytest.mark.parametrize("length", [300, 301, 302, 777, 2000])
def test_a_prompt_has_exactly_so_many_tokens(
    builder: InstructBuilder, book: str, length: int
) -> None:
    needle = Needle(haystack=[book], lengths=[length], depths=[0, 37.5, 100], repeats=2)
    items = needle.items(model(builder))
    assert len(items) == 6
    seen = set()
    for number in range(6):
        item = items.item(number)
        assert count(item.text, builder) + item.max_new_tokens == length
        assert item.text.count(needle.needle) == 1 and item.text.endswith(needle.question)
        depth = item.text.index(needle.needle) / (len(item.text) - len(needle.question))
        asked = (0, 0.375, 1)[number // 2]
        # It is moved back by a sentence at most, and stands in front of the question.
        assert (
            asked - 150 / len(item.text)
            < depth + (len(needle.needle) / len(item.text)) * (asked == 1)
            <= asked + 0.05
        )
        seen.add(item.text)
    assert len(seen) >= 3 and items.item(3) == needle.items(model(builder)).item(3)
    others = [replace(needle, seed=seed).items(model(builder)).item(0).text for seed in range(5)]
    assert len(set(others)) > 1


def test_what_does_not_fit_is_refused(builder: InstructBuilder, book: str) -> None:
    with pytest.raises(ValueError, match="4097 tokens, and sequence_length=4096"):
        Needle(haystack=[book], lengths=[4097]).items(model(builder))
    tight = Needle(haystack=[book], lengths=[80]).items(model(builder))
    with pytest.raises(ValueError, match="without a haystack has"):
        tight.item(0)
    with pytest.raises(ValueError, match="must be percent"):
        Needle(haystack=[book], lengths=[80], depths=[101])
    with pytest.raises(ValueError, match=r"benchmark.depths=\[0, 50, 50.0\] has a value twice"):
        Needle(haystack=[book], lengths=[80], depths=[0, 50, 50.0])
    with pytest.raises(ValueError, match=r"must have {haystack} and {question} once"):
        Needle(haystack=[book], lengths=[80], prompt="{haystack}")
    odd = count("?" + " magic number" * 9, builder) % 2
    with pytest.raises(ValueError, match="no filler makes a prompt of 40"):
        exactly(401 - odd, lambda size, filler: "?" + " magic number" * size, builder)


def test_recall_is_the_share_of_the_parts() -> None:
    answers = ["sandwich", "Dolores Park", "sunny day"]
    assert recall(prediction="Eat a SANDWICH in Dolores Park.", answers=answers) == 2 / 3
    assert recall(prediction="", answers=answers) == 0.0
    assert recall(prediction="x", answers=[]) == 0.0


def test_the_heat_map_is_a_picture_of_the_grid() -> None:
    import io

    from PIL import Image

    def colours(grid: list[list[float | None]]) -> set[tuple[int, ...]]:
        png = heatmap(grid, [512, 1024], [0, 100])
        assert png == heatmap(grid, [512, 1024], [0, 100])
        image = Image.open(io.BytesIO(png)).convert("RGB")
        # The cells are the largest areas of one colour, but for the white around them.
        found = sorted(image.getcolors(1 << 20), reverse=True)  # type: ignore[arg-type]
        return {colour for _, colour in found[:4]}

    red, green, grey = (165, 0, 38), (0, 104, 55), (211, 211, 211)
    assert {red, green} <= colours([[0.0, 1.0], [1.0, 0.0]])
    assert {red, grey} <= colours([[0.0, None], [0.0, None]])
    assert green not in colours([[0.0, None], [0.0, None]])


TASKS: dict[str, RulerTask] = {
    "multikey": MultiKey(),
    "needles": MultiKey(haystack="needles"),
    "noise": MultiKey(num_keys=1, haystack="noise"),
    "multivalue": MultiKey(num_values=3),
    "multiquery": MultiKey(num_queries=2, num_values=2),
    "tracking": VariableTracking(num_chains=2, num_hops=3),
}


@pytest.mark.parametrize("name", TASKS)
def test_rulers_questions_have_their_answers_and_length(
    builder: InstructBuilder, book: str, name: str
) -> None:
    ruler = Ruler(
        tasks={name: TASKS[name]}, lengths=[900, 1001], samples=2, haystack=[book], seed=3
    )
    items = ruler.items(model(builder))
    assert len(items) == 4
    texts = []
    for number in range(4):
        item = items.item(number)
        texts.append(item.text)
        assert item.kind == f"{name}/{(900, 1001)[number // 2]}"
        assert count(item.text, builder) + 128 == (900, 1001)[number // 2]
        assert solve(item.text) == sorted(item.answers)
    assert len(set(texts)) == 4
    assert [ruler.items(model(builder)).item(n).text for n in range(4)] == texts


@pytest.mark.slow
def test_lengths_are_exact_with_a_real_vocabulary(qwen: Tokenizer) -> None:  # noqa: F811
    """On this project's own pages, tables and code among them."""
    builder = InstructBuilder(
        template=ChatTemplate({"user": {"suffix": "{end}"}, "assistant": {}}),
        tags=ImageTags(),
        tokens_per_tile=4,
        tile_size=16,
        tokenizer=qwen,
        sequence_length=16384,
    )
    docs = Path(__file__).parents[2] / "docs"
    pages = [str(docs / f"{name}.md") for name in ("fp8", "kernels", "numerics", "checkpoints")]
    needle = Needle(haystack=pages, lengths=[512, 2001, 8192], depths=[0, 33, 100], repeats=3)
    tasks = {name: task for name, task in TASKS.items() if name != "noise"}
    ruler = Ruler(tasks=tasks, lengths=[1024, 4095], samples=3, haystack=pages)
    for bench in (needle, ruler):
        items = bench.items(model(builder))
        for number in range(len(items)):
            item = items.item(number)
            length = int(item.kind.split("/")[bench is ruler])
            assert count(item.text, builder) + item.max_new_tokens == length


def solve(text: str) -> list[str]:
    """The answers, by reading the question."""
    if "VAR" in text:
        [value] = re.findall(r"assigned the value (\d+) in", text)
        found: list[str] = []
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if given == value or given in found:
                found.append(name)
        return sorted(found)
    [query] = re.findall(r"magic numbers? for (.+?) mentioned in the provided", text)
    asked = re.split(r", and |, ", query)
    pairs = re.findall(r"magic numbers for (\w+) is: (\d+)\.", text)
    assert len({number for _, number in pairs}) == len(pairs)
    return sorted(number for name, number in pairs if name in asked)


def test_rulers_options() -> None:
    with pytest.raises(ValueError, match="num_queries=5 must be from 1 to num_keys=4"):
        MultiKey(num_queries=5)
    with pytest.raises(ValueError, match="num_hops at least 0"):
        VariableTracking(num_hops=-1)
    with pytest.raises(ValueError, match=r"haystack=text needs benchmark.haystack"):
        MultiKey().question(Random(0), 500, None, None)
