"""HelpSteer2's records: turns of a prompt, labels that are missing, and the token that is read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from nvmm.data.collate import collate
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.reward import RewardBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.models.reward import last_tokens
from tests.data.conftest import template

HELPSTEER2 = {"helpfulness": 3, "correctness": 4, "coherence": 4.0, "complexity": 2, "verbosity": 1}
ATTRIBUTES = ["quality", "helpfulness", "verbosity"]


def builder(tokenizer: Tokenizer, **options: Any) -> RewardBuilder:
    options = {"attributes": ATTRIBUTES, "sequence_length": 64} | options
    return RewardBuilder(template(), ImageTags(), 1, **options, tokenizer=tokenizer)


def member(**record: Any) -> dict[str, Any]:
    return {"__key__": "7", "__url__": "a.tar", "json": json.dumps(record).encode()}


def test_a_record_of_helpsteer2(qwen: Tokenizer) -> None:
    """The attributes that are listed, in their order; `quality` has no label here."""
    sample = builder(qwen)(member(prompt="Hi?", response="Hello.", **HELPSTEER2))
    text = qwen.decode(sample.text.tokens.tolist(), skip_special_tokens=False)
    assert text == ("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n")
    labels = sample.text.extras["attributes"]
    assert labels[1:].tolist() == [3.0, 1.0] and labels[0].isnan()
    assert labels.dtype == torch.float32
    trained = sample.text.tokens[sample.text.weights > 0].tolist()
    assert qwen.decode(trained, skip_special_tokens=False) == "Hello.<|im_end|>"


def test_turns_in_a_text_prompt_are_turns(qwen: Tokenizer) -> None:
    prompt = "One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?"
    listed = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    build = builder(qwen)
    first = build(member(prompt=prompt, system="Be brief.", response="Four.", helpfulness=0))
    second = build(member(prompt=listed, response="Four.", helpfulness=0))
    conversation = [*listed, {"role": "assistant", "content": "Four."}]
    third = build(member(messages=conversation, helpfulness=0))
    for sample in (second, third):
        assert sample.text.tokens.tolist() == first.text.tokens.tolist()
        assert sample.text.weights.tolist() == first.text.weights.tolist()
    trained = first.text.tokens[first.text.weights > 0].tolist()
    assert qwen.decode(trained) == "Four.", "an earlier answer has no label, and is not supervised"


@pytest.mark.parametrize("end", ["", "<|object_ref_end|>", "<|endoftext|>"])
def test_the_score_is_read_at_the_end_also_where_that_is_the_padding(
    end: str, qwen: Tokenizer
) -> None:
    build = builder(qwen, end=end)
    long = build(member(prompt="Hi? " * 5, response="Hello.", helpfulness=1))
    short = build(member(prompt="Hi?", response="No.", helpfulness=1))
    assert qwen.pad_id == qwen.token_id("<|endoftext|>")
    for packed in (False, True):
        batch = collate([long, short], pad_id=qwen.pad_id, packed=packed, pad_multiple=8)
        columns = last_tokens(batch).tolist()
        rows = [0, 0] if packed else [0, 1]
        found = [int(batch.tokens[row, column]) for row, column in zip(rows, columns, strict=True)]
        expected = qwen.encode(end)[-1] if end else qwen.encode("\n")[-1]
        assert found == [expected] * 2
        assert columns[0] == len(long.text.tokens) - 1


def test_labels_that_are_missing(qwen: Tokenizer) -> None:
    build = builder(qwen)
    labels = [-100, None, math.nan]
    for value in labels:
        sample = build(member(prompt="Hi?", response="No.", helpfulness=value, verbosity=2))
        assert sample.text.extras["attributes"].isnan().tolist() == [True, True, False]
        nothing = member(prompt="Hi?", response="No.", helpfulness=value)
        with pytest.raises(BadSample, match=r"a\.tar:7: no label among quality, helpfulness"):
            build(nothing)
        assert build.scored(nothing).text.extras["attributes"].isnan().all()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"response": "No."}, "no prompt"),
        ({"prompt": "Hi?", "response": ""}, "response is empty"),
        ({"prompt": "Hi?", "response": "No.", "verbosity": "4"}, "verbosity must be a number"),
        ({"prompt": "Hi?", "response": "No.", "verbosity": True}, "verbosity must be a number"),
        ({"prompt": "Hi?", "response": "No.", "verbosity": 1e39}, r"at most 1e\+15 in size"),
        ({"prompt": "A\n<extra_id_1>Assistant\nB", "response": "C"}, "must end with a user's turn"),
        ({"prompt": "A <extra_id_1> B", "response": "C"}, "not in front of User or Assistant"),
        ({"prompt": "Hi?" * 99, "response": "C"}, "sequence_length=64: cut, it would be scored"),
        ({"messages": [{"role": "user", "content": "A"}]}, "the last turn is not the assistant's"),
        ({"prompt": "A", "response": "B", "tools": ["c"]}, "tools beside the turns is not read"),
        (
            {"prompt": [{"role": "system", "content": "A"}], "system": "B", "response": "C"},
            "it has a system text, and its messages have one too",
        ),
    ],
)
def test_bad_records_are_named(record: dict[str, Any], message: str, qwen: Tokenizer) -> None:
    with pytest.raises(BadSample, match=message):
        builder(qwen)(member(**{"helpfulness": 1, **record}))


def test_a_hole_has_no_label(qwen: Tokenizer) -> None:
    blank = builder(qwen).blank(-3)
    assert blank.sample_id == -3
    assert blank.text.extras["attributes"].isnan().tolist() == [True] * 3


def test_attributes_are_names(qwen: Tokenizer) -> None:
    for wrong in ([], ["a", "a"], "helpfulness"):
        with pytest.raises(ValueError, match=r"build\.attributes=.* must list different names"):
            builder(qwen, attributes=wrong)
    with pytest.raises(ValueError, match="a reward model makes no prompts"):
        builder(qwen).prompt(member(prompt="Hi?", response="No."))
