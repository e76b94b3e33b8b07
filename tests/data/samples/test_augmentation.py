"""Templates of sounds, token by token: tasks, examples, options, augmentations, dialogues."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nvmm.batch import Sample
from nvmm.config.check import config_dir
from nvmm.config.compose import instantiate
from nvmm.data.samples.augmentation import Augmentation, Augmentations
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.samples.record import PASS
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.samples.test_listening import FRONT, clip, members, tokenizer
from tests.test_configs import YAMLS

__all__ = ["tokenizer"]
NAMED = instantiate(YAMLS["augmentations/audio_flamingo.yaml"])
DIALOGUE = YAMLS["data/audio_flamingo_chat.yaml"]["train"]["build"]
END = "<|endofchunk|>"


@pytest.fixture
def make(tokenizer: Tokenizer) -> Callable[..., SoundBuilder]:
    def made(way: str = "", template: dict[str, Any] | None = None, **options: Any) -> SoundBuilder:
        return SoundBuilder(
            FRONT,
            ListeningTemplate(**(template or {})),
            augmentations=options.pop("augmentations", NAMED),
            augment=options.pop("augment", {way: 1.0} if way else None),
            **{"tokenizer": tokenizer, "sequence_length": 400, **options},
        )

    return made


def check(sample: Sample, tokenizer: Tokenizer, text: str) -> None:
    """The text's tokens, of which those between [ and ] are trained."""
    plain = text.replace("[", "").replace("]", "")
    assert sample.text.tokens.tolist() == tokenizer.encode(plain)
    shown = tokenizer.decode(sample.text.tokens, skip_special_tokens=False)
    assert shown == plain
    trained = "".join(part.partition("]")[0] for part in text.split("[")[1:])
    on = sample.text.tokens[sample.text.weights > 0]
    assert tokenizer.decode(on, skip_special_tokens=False) == trained


def test_a_single_sample(make: Any, tokenizer: Tokenizer) -> None:
    check(
        make()(members(clip(0), task="audio captioning")),
        tokenizer,
        f"</s></s>The task is audio captioning. <audio>what?\nAnswer:<SEP>[a dog{END}</s>]",
    )


def test_a_few_shot_sample_has_its_options_at_the_query_alone(
    make: Any, tokenizer: Tokenizer
) -> None:
    given = members(
        clip(0, "Which?", "Dog"),
        clip(1, "Which?", "Cat"),
        task="event classification",
        interleaved="similar",
        options=["Dog", "Cat"],
    )
    check(
        make("provide_all_labels")(given),
        tokenizer,
        "</s></s>Here are similar examples. The task is event classification. "
        f"<audio>which?\nAnswer:<SEP>[dog{END}]"
        f"<audio>which?\nOPTIONS:\n - cat.\n - dog.\nAnswer:<SEP>[cat{END}</s>]",
    )
    check(
        make("provide_all_labels").prompt(given),
        tokenizer,
        "</s></s>Here are similar examples. The task is event classification. "
        f"<audio>which?\nAnswer:<SEP>dog{END}"
        "<audio>which?\nOPTIONS:\n - cat.\n - dog.\nAnswer:<SEP>",
    )
    assert make().options(given) == ["dog", "cat"]


def test_the_sentence_of_examples_needs_two_clips_that_fit(make: Any, tokenizer: Tokenizer) -> None:
    given = members(clip(0, "a" * 99), clip(1), interleaved="random")
    text = "</s></s>Here are random examples. <audio>" + "a" * 99
    shown = tokenizer.decode(make()(given).text.tokens, skip_special_tokens=False)
    assert shown.startswith(text)
    cut = make(sequence_length=60)(given)
    assert cut.dropped == 1
    check(cut, tokenizer, f"</s></s><audio>what?\nAnswer:<SEP>[a dog{END}</s>]")


def test_a_dialogue(make: Any, tokenizer: Tokenizer) -> None:
    """One clip; the loss is on every answer with its two ends, and not on the line's end."""
    template = {k: v for k, v in DIALOGUE["template"].items() if k != "_target_"}
    turns = members(clip(0, "Hi?", "A Dog."), clip(None, "Loud?", "Yes."), task="dialog")
    text = (
        "</s></s>The task is dialog. <audio>user: Hi? \nassistant: <SEP>"
        f"[A Dog.{END}</s>]\nuser: Loud? \nassistant: <SEP>[Yes.{END}</s>]\n"
    )
    check(make(template=template)(turns), tokenizer, text)
    # A dialogue that is too long loses its last turns, and a prompt is refused instead.
    first = text[: text.index("]") + 2]
    assert DIALOGUE["too_long"] == "last"
    size = len(tokenizer.encode(first.replace("[", "").replace("]", "")))
    short = {"template": template, "too_long": "last", "sequence_length": size}
    cut = make(**short)(turns)
    assert cut.dropped == 1 and len(cut.text.media) == 1
    check(cut, tokenizer, first)
    with pytest.raises(BadSample, match=r"its clips take \d+ tokens"):
        make(**short).prompt(turns)
    with pytest.raises(BadSample, match=r"its first clip takes \d+ tokens"):
        make(**{**short, "sequence_length": size - 1})(turns)


CASES: dict[str, tuple[str, str, str, str, list[str]]] = {
    # way: prompt, answer -> prompt, answer
    "": ("Question: Why?", "It. Is.", "question: why?", "it. is.", []),
    "do_nothing": ("Question: Why?", "It. Is.", "question: why?", "it. is.", []),
    "default": ("Question: Why?", "It. Is.", "question: why?", "it. is.", []),
    "AQA": ("Question: Why?", "So", "please answer this question: why?", "so", []),
    "provide_all_labels": ("Which?", "b", "which?\nOPTIONS:\n - a.\n - b.", "b", ["b", "a"]),
    "num_words": ("x", "a", "Describe the sound in 1 label.", "a", []),
    "num_words_of_all": (
        *("x", "a.", "Describe the sound in 1 label. All labels are: b, a.", "a", ["b", "a"]),
    ),
    "all_labels": (
        *("x", "A, b.", "use a few labels to describe this sound. All labels are: b, a.", "a, b"),
        ["b", "a"],
    ),
    "AC_short": ("x", "It. Is.", "describe the sound in a sentence.", "it. is.", []),
    "AC_long": ("x", "It. Is.", "describe the sound at length.", "it. is.", []),
    "AC_paragraph": ("x", "It. Is. On.", "describe the sound in a paragraph.", "it; is; on.", []),
    "AQA_binary_instruction": (
        *("Question: Is it?", "No", "please answer this question: is it?\nOPTIONS:\nyes.\nno."),
        *("no", []),
    ),
    "AQA_binary_instruction of words": (
        *("Question: What?", "A dog", "please answer this question: what?", "a dog", []),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_an_augmentation_writes(name: str, make: Any, tokenizer: Tokenizer) -> None:
    prompt, answer, asked, answered, options = CASES[name]
    way = name.split(" of ")[0]
    sample = make(way)(
        members(clip(0, prompt, answer), **({"options": options} if options else {}))
    )
    text = f"</s></s><audio>{asked}\nAnswer:<SEP>[{answered}{END}</s>]"
    check(sample, tokenizer, text)


def test_every_named_augmentation_is_here() -> None:
    assert {*NAMED, ""} == {name.split(" of ")[0] for name in CASES}


def test_answers_of_other_forms() -> None:
    assert Augmentation(answer="sentences").answered("rock; pop; calm") == "rock. pop. calm"
    assert Augmentation(answer="one_sentence").answered("no stop") == "no stop"
    shuffled = [
        Augmentation(answer="shuffled_labels").answered("a, b, c, d.", f"key {n}")
        for n in range(40)
    ]
    assert {tuple(sorted(each.split(", "))) for each in shuffled} == {("a", "b", "c", "d")}
    assert len(set(shuffled)) > 10
    assert Augmentation(prompt="In {labels}.").prompted("x", "a, b") == "In 2 labels."


def test_draws_have_their_shares_and_follow_seed_pass_and_sample(make: Any) -> None:
    builder = make(augment={"provide_all_labels": 0.75, "do_nothing": 0.25}, task_probability=0.5)

    def seen(key: str, passing: str) -> tuple[bool, bool]:
        record = members(clip(None, "Which?", "a"), task="x", options=["a", "b"])
        text = builder({**record, "__key__": key, PASS: passing}).text
        shown = builder.tokenizer.decode(text.tokens, skip_special_tokens=False)
        return "OPTIONS" in shown, "The task is" in shown

    keys = [f"{n}" for n in range(400)]
    first = [seen(key, "1/0") for key in keys]
    share = np.array(first).mean(axis=0)
    # Four standard deviations of 400 draws.
    assert abs(share[0] - 0.75) < 0.09 and abs(share[1] - 0.5) < 0.1
    assert [seen(key, "1/0") for key in keys[:50]] == first[:50]
    both = np.mean([one and other for one, other in first])
    assert abs(both - share[0] * share[1]) < 0.09, "the two draws do not hang together"
    for passing in ("1/1", "2/0", ""):
        assert [seen(key, passing) for key in keys[:50]] != first[:50], passing


def test_a_prompt_takes_the_likeliest_way_and_tells_the_task(make: Any) -> None:
    record = members(clip(None, "Which?", "a"), task="x", options=["a", "b"])
    shown = []
    for share, told in ((0.9, 0.1), (0.4, 0.0)):
        builder = make(
            augment={"provide_all_labels": share, "do_nothing": 1 - share}, task_probability=told
        )
        tokens = builder.prompt(record).text.tokens
        shown.append(builder.tokenizer.decode(tokens, skip_special_tokens=False))
    assert shown[0].startswith("</s></s>The task is x. ") and "OPTIONS" in shown[0]
    assert shown[1] == "</s></s>which?\nAnswer:<SEP>"


def test_references_are_all_answers(make: Any) -> None:
    assert make().references(members(clip(0), answers=["A", "B"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment": {"no": 1.0}},
            r"build\.augment\.no is no key of build\.augmentations: AC_long",
        ),
        ({"augment": {"AC_long": 0.5}}, r"build\.augment=.* must sum to 1, not 0\.5"),
        ({"augment": {"AC_long": 2, "AC_short": -1}}, r"build\.augment\.AC_long=2 must be in"),
        ({"task_probability": 1.5}, r"build\.task_probability=1\.5 must be in \[0, 1\]"),
        ({"too_long": "middle"}, r"build\.too_long=middle must be"),
    ],
)
def test_bad_settings_are_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_bad_augmentations_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"options='x' must have \{options\} once"):
        Augmentation(options="x")
    with pytest.raises(ValueError, match=r"replace=.* does nothing beside prompt='a'"):
        Augmentation(prompt="a", replace={"b": "c"})
    with pytest.raises(ValueError, match=r"labels=\['yes'\] .* do nothing without"):
        Augmentation(labels=["yes"])
    with pytest.raises(ValueError, match=r"augmentations\.answer=loud must be"):
        Augmentation(answer="loud")  # type: ignore[arg-type]
    assert Augmentations({}, {}).drawn("k") == Augmentation() == Augmentations({}, {}).likeliest
    with pytest.raises(BadSample, match=r"s\.tar:k: the prompt lists the options, and the record"):
        make("provide_all_labels")(members(clip(0)))
    asked = members({"sound": "0.wav", "prompt": "x"})
    with pytest.raises(BadSample, match=r"how many labels its answer has, and there is none"):
        make("num_words").prompt(asked)


def test_a_record_of_one_clip_has_the_same_keys(make: Any, tokenizer: Tokenizer) -> None:
    record = {**clip(0), "task": "t", "options": ["a", "b"]}
    one = {**members(clip(0)), "json": json.dumps(record).encode()}
    check(
        make("provide_all_labels")(one),
        tokenizer,
        "</s></s>The task is t. <audio>what?\nOPTIONS:\n - a.\n - b.\nAnswer:<SEP>"
        f"[a dog{END}</s>]",
    )
    assert config_dir().is_dir()
