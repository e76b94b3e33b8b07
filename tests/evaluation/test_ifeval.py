"""IFEval's verifiers on hand-made answers, its four accuracies, and the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.evaluation.ifeval import Prompts
from nvmm.evaluation.instruction_following import (
    VERIFIERS,
    accuracies,
    follows,
    follows_loosely,
    sentences,
    variants,
)
from tests import test_evaluate
from tests.ranks import run_ranks
from tests.test_evaluate import command, folder, launch  # noqa: F401

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES: dict[str, list[tuple[dict[str, Any], list[str], list[str]]]] = {
    "keywords:existence": [
        ({"keywords": ["Sea", "ship"]}, ["The ships are at SEA."], ["The sea is empty."])
    ],
    "keywords:frequency": [
        ({"keyword": "so", "frequency": 2, **AT_LEAST}, ["So, so it is."], ["So it is."]),
        ({"keyword": "so", "frequency": 2, **LESS}, ["So it is.", "No."], ["so and so"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["cat"]}, ["A catalogue."], ["My Cat, yes."])
    ],
    "keywords:letter_frequency": [
        (
            {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
            ["Eleven men"],
            ["Seven of us"],
        ),
        ({"letter": "q", "let_frequency": 1, "let_relation": "less than"}, ["none"], ["a Q"]),
    ],
    "length_constraints:number_sentences": [
        ({"num_sentences": 2, **AT_LEAST}, ["One. Two!", "Dr. No came. He left."], ["Mr. X came."]),
        ({"num_sentences": 2, **LESS}, ["It costs 3.50 or so."], ["One? Two."]),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, **AT_LEAST}, ["one two three"], ["one, two"]),
        ({"num_words": 3, **LESS}, ["one, two"], ["a b c"]),
    ],
    "length_constraints:number_paragraphs": [
        ({"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb"], ["a", "a ***\n\n*** b", "a\n\nb"])
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
            ["First.\n\nThen, it ends.", 'First.\n\n"Then" it ends.'],
            ["Then.\n\nFirst.", "First.\n\nThen.\n\nMore.", "Then it ends."],
        )
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[a] and [b c]"], ["[a] and b"])
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye.\nP.S. me", "p. s. me"], ["PS me"]),
        ({"postscript_marker": "P.P.S"}, ["Bye.\np.p.s me"], ["P.S. me"]),
        ({"postscript_marker": "Note (end)"}, ["note (end) me"], ["note me"]),
    ],
    "detectable_format:number_bullet_lists": [
        ({"num_bullets": 2}, ["* a\n- b", "x\n  * a\n* b"], ["* a", "**a**\n* b", "* a\n* b\n* c"])
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "Hm. My answer is maybe."], ["Yes.", "my answer is yes"])
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*a* and *b*", "**a** *b*"], ["*a* and b", "* *\n* *", "*a\nb*"])
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "Part", "num_sections": 2},
            ["Part 1\na\nPart 2\nb"],
            ["Part 1\na", "Part one, part two"],
        )
    ],
    "detectable_format:json_format": [
        ({}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```"], ["a", '{"a": 1', "{'a': 1}"])
    ],
    "detectable_format:title": [({}, ["<<A song>>\nla"], ["<A song>", "<<>>", "<< >>"])],
    "combination:two_responses": [
        ({}, ["a\n******\nb", "******\na\n******\nb"], ["a\n******\na", "a", "a ****** b ****** c"])
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Say it."}, [" say it. It."], ["It. Say it."])
    ],
    "startend:start_checker": [({"start_phrase": "Well,"}, ["well, no"], ["No, well,"])],
    "startend:end_checker": [({"end_phrase": "The end."}, ['"So. the end."'], ["The end. So."])],
    "startend:quotation": [({}, ['"all of it"'], ['"', '"a" or', "'a'"])],
    "change_case:capital_word_frequency": [
        (
            {"capital_frequency": 2, "capital_relation": "at least"},
            ["NASA and a TV-SET"],
            ["NASA and a tv"],
        )
    ],
    "change_case:english_capital": [({}, ["NO 1!"], ["No 1!", "1"])],
    "change_case:english_lowercase": [({}, ["no 1!"], ["No 1!", "1"])],
    "punctuation:no_comma": [({}, ["a; b"], ["a, b"])],
    "order:alphabetical": [
        ({"direction": "ascending"}, ["* ant\n* Bee\n* bee", "cat"], ["bee ant"]),
        ({"direction": "descending"}, ['"BEE ant"'], ["ant bee", "c a b"]),
    ],
}


def test_every_verifier_has_a_case() -> None:
    assert CASES.keys() == VERIFIERS.keys() and len(VERIFIERS) == 26


@pytest.mark.parametrize("name", CASES)
def test_a_verifier(name: str) -> None:
    for arguments, good, bad in CASES[name]:
        padded = {**arguments, "not_given": None}  # published files name every argument
        assert [follows(answer, name, padded) for answer in good] == [True] * len(good)
        assert [follows(answer, name, padded) for answer in bad] == [False] * len(bad)
        assert not follows(" \n", name, arguments)


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown instruction 'language:response_language'"):
        follows("x", "language:response_language", {"language": "de"})
    with pytest.raises(ValueError, match=r"punctuation:no_comma does not take \{'num': 1\}"):
        follows("x", "punctuation:no_comma", {"num": 1})
    with pytest.raises(ValueError, match="relation 'more than' must be one of less than, at least"):
        follows("x", "length_constraints:number_words", {"num_words": 1, "relation": "more than"})
    with pytest.raises(ValueError, match="direction 'up' must be one of ascending, descending"):
        follows("x", "order:alphabetical", {"direction": "up"})


def test_the_loose_criterion() -> None:
    assert variants("a\n*b*\nc") == [
        *("a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*"),
        *("a\nb\nc", "b\nc", "a\nb", "b"),
    ]
    rule = ("startend:quotation", {})
    assert not follows('Sure:\n"It is."', *rule)
    assert follows_loosely('Sure:\n"It is."', *rule)
    assert follows_loosely('*"It is."*', *rule)
    assert not follows_loosely('Sure: "It is."', *rule)


def test_accuracies_of_prompts_and_of_instructions() -> None:
    assert accuracies([[True, True, False], [True]]) == (1 / 2, 3 / 4)


def test_sentences() -> None:
    assert sentences("Is it? Yes, e.g. 3.5 of Mr. X!\n\nNo stop") == [
        *("Is it?", "Yes, e.g. 3.5 of Mr. X!", "No stop"),
    ]


def prompts(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 1}, "record 2 has no text prompt"),
        ({"instruction_id_list": []}, "record 2 has no instruction_id_list"),
        ({"kwargs": []}, "record 2: kwargs must be a list of 1 objects"),
        ({"instruction_id_list": ["a:b"]}, "record 2: unknown instruction 'a:b'"),
    ],
)
def test_a_bad_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"prompt": "Say.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    with pytest.raises(ValueError, match=message):
        Prompts(prompts(tmp_path / "bad.jsonl", [good, good | change]))


def test_a_checkpoint_is_scored(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The scores are those of the answers that the folder keeps; the same command asks no more."""
    text = " ".join(test_evaluate.WORDS[:4])
    rules = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 99, "relation": "at least"}),
        ("change_case:english_capital", {"unused": None}),
    ]
    records = [
        {
            "key": 7 + count,
            "prompt": text,
            "instruction_id_list": [name for name, _ in rules[:count]],
            "kwargs": [arguments for _, arguments in rules[:count]],
        }
        for count in (1, 2, 3)
    ]
    benchmark = {
        "_target_": "nvmm.evaluation.ifeval.IFEval",
        "path": prompts(tmp_path / "ifeval.jsonl", records),
        "max_new_tokens": 6,
    }
    config = command(folder, "", benchmark=benchmark, output=str(tmp_path / "out"))
    [summary, _] = run_ranks(launch, 2, config)
    lines = test_evaluate.read(tmp_path / "out")
    followed = [
        [follows(line["prediction"], *rule) for rule in rules[: number + 1]]
        for number, line in enumerate(lines)
    ]
    assert [line["source"].rpartition(":")[2] for line in lines] == ["8", "9", "10"]
    scores = accuracies(followed)
    assert (summary["prompt_level_strict"], summary["instruction_level_strict"]) == scores
    assert 0 < summary["instruction_level_strict"] < 1
    assert run_ranks(launch, 1, config) == [summary]
