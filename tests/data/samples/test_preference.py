"""Records of preferences to Samples: their forms, what is trained, fitting, and refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE, Sample
from nvmm.data.collate import collate
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import ImageTags, Turn
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.preference import PreferenceBuilder
from nvmm.data.samples.reward import RewardBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.inference.restore import _exchanged as exchanged
from nvmm.jobs.score import Score
from tests.data.conftest import image_bytes
from tests.data.conftest import template as dialect

HI, HO, NO = "Read the number.", "471", "Yes"


def builder(tokenizer: Tokenizer, **options: Any) -> PreferenceBuilder:
    arguments: dict[str, Any] = {
        "template": dialect(),
        "tags": ImageTags(),
        "tokens_per_tile": 4,
        "tile_size": 32,
        "sequence_length": 64,
    }
    return PreferenceBuilder(tokenizer=tokenizer, **(arguments | options))


def member(picture: bytes | None = None, **record: Any) -> dict[str, Any]:
    pictures = {} if picture is None else {"png": picture}
    return {"__key__": "k0", "__url__": "s.tar", "json": json.dumps(record).encode()} | pictures


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def words(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, str]]:
    """Each text, and what of it is trained."""

    def text(tokens: torch.Tensor) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    return [(text(t.tokens), text(t.tokens[t.weights == 1])) for t in sample.texts]


PLAIN = {"prompt": HI, "chosen": HO, "rejected": NO}
FORMS: dict[str, dict[str, Any]] = {
    "texts": PLAIN,
    "messages": {"prompt": [user(HI)], "chosen": [said(HO)], "rejected": [said(NO)]},
    "mixed": {"prompt": HI, "chosen": [said(HO)], "rejected": NO},
    "implicit": {"chosen": [user(HI), said(HO)], "rejected": [user(HI), said(NO)]},
    "repeated": {"prompt": HI, "chosen": [user(HI), said(HO)], "rejected": [user(HI), said(NO)]},
    "unpaired": {"prompt": HI, "completion": HO, "label": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_the_answers_alone(tiny: Tokenizer, form: str) -> None:
    sample = builder(tiny)(member(**FORMS[form]))
    check_sample(sample)
    shown = [
        (
            f"<|im_start|>user\n{HI}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n",
            f"{answer}<|im_end|>",
        )
        for answer in (HO, NO)
    ]
    assert words(tiny, sample) == shown[: len(sample.texts)]
    assert len(sample.texts) == 1 + (form != "unpaired")
    extras = collate([sample], pad_id=0).extras
    assert extras["chosen"].tolist() == [1, 0][: len(sample.texts)]
    assert extras["chosen"].dtype == torch.int64
    assert extras["reward"].dtype == torch.float32 and extras["reward"].isnan().all()
    assert sample.source == "s.tar:k0"


def test_earlier_turns_are_prompt_and_later_ones_answer(tiny: Tokenizer) -> None:
    begin = [user("Hi"), said("Ho"), user("Sure?")]
    later = [said("Yes"), user("Same?"), said("No")]
    build = builder(tiny, sequence_length=99)
    sample = build(
        member(system="Be brief.", chosen=[*begin, *later], rejected=[*begin, said("No")])
    )
    assert [trained for _, trained in words(tiny, sample)] == [
        "Yes<|im_end|>No<|im_end|>",
        "No<|im_end|>",
    ]
    assert all(text.startswith("<|im_start|>system\nBe brief.") for text, _ in words(tiny, sample))


def test_rewards_and_other_names_of_fields(tiny: Tokenizer) -> None:
    fields = {"chosen_reward": "score_chosen", "rejected_reward": "score_rejected"}
    sample = builder(tiny, fields=fields)(member(**PLAIN, score_chosen=4, score_rejected=-0.5))
    assert collate([sample], pad_id=0).extras["reward"].tolist() == [4.0, -0.5]


def test_pictures_are_of_the_prompt_in_as_many_tiles_in_both_texts(tiny: Tokenizer) -> None:
    members = member(image_bytes(100, 32), prompt=HI, chosen=HO, rejected="No " * 6)
    sample = builder(tiny, sequence_length=128)(members)
    check_sample(sample)
    media = [text.media[IMAGE] for text in sample.texts]
    assert [len(each.tiles) for each in media] == [4, 4]
    assert torch.equal(media[0].values, media[1].values)
    assert builder(tiny, sequence_length=128).measure(members) == (sample.num_tokens, 8)
    # The rejected text alone is too long for four tiles: both texts have fewer.
    longest = max(len(text.tokens) for text in sample.texts)
    assert len(sample.texts[0].tokens) < longest - 1
    less = builder(tiny, sequence_length=longest - 1)(members)
    assert [len(text.media[IMAGE].tiles) for text in less.texts] == [3, 3]
    batch = collate([less, less], pad_id=0, packed=True)
    assert batch.media[IMAGE].texts.unique().tolist() == [0, 1, 2, 3]


def test_a_pair_that_is_too_long_is_dropped_or_its_answers_are_cut(tiny: Tokenizer) -> None:
    members = member(prompt="Hi", chosen=HO, rejected="Yes No " * 9)
    whole = builder(tiny, sequence_length=200)(members)
    room = len(whole.texts[1].tokens) - 3
    with pytest.raises(BadSample, match=r"s\.tar:k0: a text of \d+ tokens.*too_long=cut would"):
        builder(tiny, sequence_length=room)(members)
    cut = builder(tiny, sequence_length=room, too_long="cut")(members)
    assert torch.equal(cut.texts[0].tokens, whole.texts[0].tokens)
    assert torch.equal(cut.texts[1].tokens, whole.texts[1].tokens[:room])
    start = int(whole.texts[0].weights.argmax())
    with pytest.raises(BadSample, match="would cut an image or the whole answer"):
        builder(tiny, sequence_length=start, too_long="cut")(members)
    # A reward model reads its score at the end, which stays and takes some of the room.
    end = "<|im_end|>"
    closed = builder(tiny, sequence_length=room, too_long="cut", end=end)
    sample = closed(members)
    assert closed.measure(members)[0] == sample.num_tokens
    for text, uncut, size in zip(sample.texts, whole.texts, (None, room - 1), strict=True):
        assert text.tokens.tolist() == [*uncut.tokens[:size].tolist(), tiny.token_id(end)]
        assert text.weights[-1] == 0 and torch.equal(text.weights[:-1], uncut.weights[:size])
    asked = builder(tiny, sequence_length=room).prompt(members)
    assert torch.equal(closed.prompt(members).text.tokens, asked.text.tokens)
    turns = [Turn("user", "Hi"), Turn("assistant", HO)]
    assert torch.equal(closed.conversation(turns, "").text.tokens, sample.texts[0].tokens)
    with pytest.raises(BadSample, match="would cut an image or the whole answer"):
        builder(tiny, sequence_length=start + 1, too_long="cut", end=end)(members)
    alike = member(prompt="Hi", chosen="Yes " * 5, rejected="Yes " * 6)
    with pytest.raises(BadSample, match="chosen and rejected are the same tokens"):
        builder(tiny, sequence_length=start + 2, too_long="cut")(alike)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": HI, "chosen": HO}, "no rejected"),
        ({"prompt": HI, "chosen": HO, "rejected": HO}, "chosen and rejected are the same"),
        ({"chosen": HO, "rejected": NO}, "the prompt must end with a user's turn"),
        (FORMS["repeated"] | {"prompt": "Hi"}, "prompt is none of the turns"),
        (PLAIN | {"label": True}, "label is of a completion"),
        (PLAIN | {"chosen_reward": 1.0}, "one of chosen_reward and rejected_reward"),
        (PLAIN | {"chosen_reward": True, "rejected_reward": 0}, "chosen_reward must be a number"),
        (PLAIN | {"chosen_reward": 0, "rejected_reward": 1e39}, r"of at most 1e\+15 in size"),
        (PLAIN | {"chosen_reward": 10**400, "rejected_reward": 0}, r"of at most 1e\+15 in size"),
        (PLAIN | {"chosen_reward": math.nan, "rejected_reward": 0}, "must be a number"),
        (PLAIN | {"rejected": ""}, "rejected is empty"),
        (PLAIN | {"rejected": [said("")]}, "is empty"),
        (PLAIN | {"rejected": []}, "must be a list"),
        (PLAIN | {"rejected": " "}, "rejected is empty"),
        (PLAIN | {"rejected": [user(NO)]}, "an answer must begin with a turn of the assistant"),
        (PLAIN | {"tools": ["x"]}, "tools beside the turns is not read"),
        (FORMS["unpaired"] | {"label": 1}, "label must be true or false"),
        (FORMS["unpaired"] | {"chosen": HO}, "a completion and chosen"),
        ({"completion": HO, "label": True}, "no prompt"),
        (PLAIN | {"chosen": [said(HO), user("<image>"), said(HO)]}, "pictures are of the prompt"),
        (PLAIN | {"prompt": "Hi <image>"}, "1 <image> markers, the sample 0 images"),
    ],
)
def test_records_that_are_refused(tiny: Tokenizer, record: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSample, match=f"s.tar:k0: .*{says}"):
        builder(tiny)(member(**record))


def test_a_prompt_is_what_both_answers_follow(tiny: Tokenizer) -> None:
    build = builder(tiny)
    sample = build.prompt(member(**PLAIN))
    assert words(tiny, sample)[0][0].endswith("<|im_start|>assistant\n")
    assert build.question(member(**PLAIN)) == HI
    assert build.references(member(**PLAIN)) == [HO]
    assert build.references(member(**FORMS["unpaired"] | {"label": False})) == []
    # A checkpoint of this builder answers questions that are no pairs.
    asked = member(question=HI, answer=HO)
    assert torch.equal(build.prompt(asked).text.tokens, sample.text.tokens)


def test_a_missing_sample_has_the_extras_of_others(tiny: Tokenizer) -> None:
    build = builder(tiny)
    batch = collate([build(member(**PLAIN)), build.blank(-3)], pad_id=0)
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.num_tokens == sum(int(t.weights.sum()) for t in build(member(**PLAIN)).texts)


def test_what_is_scored_is_a_pair_or_a_conversation_that_is_never_cut(tiny: Tokenizer) -> None:
    build = builder(tiny)
    pair = member(prompt=HI, chosen=HO, rejected=NO)
    assert [text.tokens.tolist() for text in build.scored(pair).texts] == [
        text.tokens.tolist() for text in build(pair).texts
    ]
    one = build.scored(member(messages=[user(HI), said(HO)]))
    assert [text.tokens.tolist() for text in one.texts] == [build(pair).texts[0].tokens.tolist()]
    assert set(one.text.extras) == build.extras
    shown = [user(f"<image>{HI}"), said(HO)]
    seen = build.scored(member(image_bytes(32, 32), messages=shown))
    assert set(seen.text.media) == {IMAGE}
    with pytest.raises(BadSample, match="last turn is not the assistant's"):
        build.scored(member(messages=[user(HI)]))
    with pytest.raises(BadSample, match=r"a text of \d+ tokens, and data.sequence_length=64"):
        build.scored(member(messages=[user(HI), said(HO * 60)]))


def test_pictures_are_padded_as_those_of_other_samples_are(tiny: Tokenizer) -> None:
    """A checkpoint of VILA's SFT data scores pairs as preference training reads them."""
    settings: dict[str, Any] = {
        "_target_": "nvmm.data.samples.instruct.InstructBuilder",
        "_partial_": True,
        "template": dialect(),
        "tags": ImageTags(),
        "tokens_per_tile": 4,
        "tile_size": 32,
        "max_tiles": 1,
        "pad": [122, 116, 104],
    }
    only_of_sft = {"drop_images": True, "supervise": "last"}
    changed = exchanged(settings | only_of_sft, Score("", preferences="drop").build)
    assert changed == settings | {"_target_": changed["_target_"], "too_long": "drop"}
    options = {name: value for name, value in changed.items() if name[0] != "_"}
    build = PreferenceBuilder(**options, tokenizer=tiny, sequence_length=64)
    del options["too_long"]
    sft = InstructBuilder(**options, tokenizer=tiny, sequence_length=64)
    unlike = InstructBuilder(**options | {"pad": None}, tokenizer=tiny, sequence_length=64)
    picture = image_bytes(64, 32)
    conversation = member(picture, messages=[user(f"<image>{HI}"), said(HO)])
    tiles = sft(conversation).text.media[IMAGE].values
    for text in build(member(picture, **PLAIN)).texts:
        assert torch.equal(text.media[IMAGE].values, tiles)
    assert not torch.equal(unlike(conversation).text.media[IMAGE].values, tiles)
    labels = RewardBuilder(
        dialect(), ImageTags(), 4, ["good"], tile_size=32, max_tiles=1, pad=[122, 116, 104],
        tokenizer=tiny, sequence_length=64,
    )  # fmt: skip
    labelled = member(picture, prompt=HI, response=HO, good=1)
    assert torch.equal(labels(labelled).text.media[IMAGE].values, tiles)


def test_an_unknown_rule_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"build\.too_long=split must be one of drop, cut"):
        builder(tiny, too_long="split")
