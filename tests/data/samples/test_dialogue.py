"""Golden tokens of dialogue queries, and which turns a long one loses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvmm.batch import POSITIVE, QUERY
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.dialogue import Dialogue
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe

TURNS = [
    {"role": "user", "content": "a b c"},
    {"role": "assistant", "content": "d e "},
    {"role": "user", "content": "f g h"},
]
RENDERED = "user: a b c\nagent: d e\nuser: f g h"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes alone: a character of the text is a token."""
    folder = train_byte_level_bpe(
        tmp_path_factory.mktemp("tokenizer"),
        ["a"],
        vocab_size=259,
        special_tokens=["<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    return Tokenizer(str(folder), image_token="<s>", end_of_turn="</s>")


def builder(tokenizer: Tokenizer, length: int = 512, **options: Any) -> RetrievalBuilder:
    return RetrievalBuilder(
        **{"num_negatives": 0, "in_batch_negatives": True, "dialogue": Dialogue()} | options,
        tokenizer=tokenizer,
        sequence_length=length,
    )


def member(**record: Any) -> dict[str, Any]:
    record = {"positive": "p", "negatives": []} | record
    return {"__key__": "k", "__url__": "a.tar", "json": json.dumps(record).encode()}


def texts(build: RetrievalBuilder, sample: Any) -> list[str]:
    """Of each text without BOS and EOS, which frame it."""
    tokenizer = build.tokenizer
    for text in sample.texts:
        assert text.tokens[0] == tokenizer.bos_id and text.tokens[-1] == tokenizer.eos_id
    return [tokenizer.decode(text.tokens[1:-1].tolist()) for text in sample.texts]


def test_golden_tokens_of_a_dialogue(tokenizer: Tokenizer) -> None:
    """As ChatQA's released retriever writes it: a turn a line, the assistant is the agent."""
    build = builder(tokenizer)
    sample = build(member(messages=TURNS))
    assert texts(build, sample) == [RENDERED, "p"]
    ids = [tokenizer.encode(character)[0] for character in RENDERED]
    assert sample.texts[0].tokens.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    other = builder(tokenizer, dialogue=Dialogue("U", "A"), query_prefix="query: ")
    assert texts(other, other(member(messages=TURNS)))[0] == "query: U: a b c\nA: d e\nU: f g h"


def test_the_same_dialogue_is_the_same_query_however_it_comes(tokenizer: Tokenizer) -> None:
    build = builder(tokenizer, length=30)
    renamed = [{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e"}, TURNS[2]]
    rendered = build.text(RENDERED, role=QUERY)
    for sample in (
        build(member(messages=TURNS)),
        build(member(messages=renamed)),
        build(member(query=RENDERED)),
        build.prompt(member(messages=TURNS)),
        rendered,
    ):
        assert sample.texts[0].tokens.tolist() == rendered.texts[0].tokens.tolist()
    # A document is no dialogue: it loses its end.
    assert texts(build, build.text(RENDERED, role=POSITIVE)) == [RENDERED[:28]]


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (len(RENDERED) + 2, RENDERED),
        (len(RENDERED) + 1, "agent: d e\nuser: f g h"),
        (22 + 2, "agent: d e\nuser: f g h"),
        (22 + 1, "user: f g h"),
        (11 + 2, "user: f g h"),
        (11 + 1, "user: f g "),
        (5, "use"),
    ],
)
def test_a_long_dialogue_loses_whole_turns_from_its_beginning(
    tokenizer: Tokenizer, length: int, kept: str
) -> None:
    """By hand: 11 + 1 + 10 + 1 + 11 characters, and two tokens that frame them."""
    build = builder(tokenizer, length)
    assert texts(build, build(member(messages=TURNS)))[0] == kept
    longer = builder(tokenizer, length + 3, query_prefix="q: ")
    assert texts(longer, longer(member(messages=TURNS)))[0] == f"q: {kept}"


def test_turns_of_several_lines_stay_whole(tokenizer: Tokenizer) -> None:
    text = "user: a\nb: c\nagent: user: x\nuser: d\ne"
    build = builder(tokenizer, len(text) + 1)
    assert texts(build, build.text(text, role=QUERY)) == ["agent: user: x\nuser: d\ne"]
    build = builder(tokenizer, 12)
    assert texts(build, build.text("agent: no user asks", role=QUERY)) == ["agent: no "]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": TURNS[:2]}, "must end with a turn of the user"),
        ({"messages": []}, "must be a list of turns that is not empty"),
        ({"messages": ["a"]}, "turn 1 must be an object"),
        ({"messages": [{"role": "system", "content": "a"}]}, "role 'system' must be one of user"),
        ({"messages": [{"role": "user", "content": " "}]}, "turn 1 must have a text"),
        ({"messages": TURNS, "query": "a"}, "has messages and query"),
        ({"messages": TURNS, "query_image": "a.png"}, "has messages and query_image"),
        ({}, "query"),
    ],
)
def test_bad_dialogues_are_named(tokenizer: Tokenizer, record: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSample, match=rf"a\.tar.*k.*{says}"):
        builder(tokenizer)(member(**record))


def test_a_builder_without_dialogues_reads_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadSample, match="query"):
        builder(tokenizer, dialogue=None)(member(messages=TURNS))
    with pytest.raises(ValueError, match=r"build\.fields\.messages is read with build\.dialogue"):
        builder(tokenizer, dialogue=None, fields={"messages": "turns"})
    build = builder(tokenizer, fields={"messages": "turns"})
    assert texts(build, build(member(turns=TURNS)))[0] == RENDERED
    with pytest.raises(ValueError, match="must be two words"):
        Dialogue("user", "user")
