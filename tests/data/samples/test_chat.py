"""Token layout, tile tags and the loss mask, against ids worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

from nvmm.config.check import config_dir
from nvmm.config.moved import renamed
from nvmm.data.samples.chat import (
    DOCUMENT,
    ChatTemplate,
    ImageLayout,
    ImageTags,
    Rendered,
    Turn,
    render,
)
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.conftest import template as dialect

PAD = 151654
THUMBNAIL = [27, 21094, 19296, 37824, 29]
QUESTION = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat."))


def draw(tokenizer: Tokenizer, turns: Any, grids: Any = (), **options: Any) -> Rendered:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": dialect(),
        "tags": ImageTags(),
        "tile_size": 448,
        "tokens_per_tile": 2,
        "source": "s.tar:k",
    }
    return render(turns, [ImageLayout.of(grid) for grid in grids], **(arguments | options))


def supervised(tokenizer: Tokenizer, rendered: Rendered) -> str:
    ids = [t for t, w in zip(rendered.tokens, rendered.weights, strict=True) if w]
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_nvlm_layout_of_one_tile(qwen: Tokenizer) -> None:
    out = draw(qwen, QUESTION, [(1, 1)])
    assert out.tokens == [
        *[151644, 872, 198, 46465, 29],  # <|im_start|>user\n<Image>
        *THUMBNAIL,  # never <tile_1>
        *[PAD, PAD],
        *[522, 1906, 397],  # </Image>\n
        *qwen.encode("What is it?"),
        *[151645, 198, 151644, 77091, 198],  # <|im_end|>\n<|im_start|>assistant\n
        *qwen.encode("A cat."),
        *[151645, 198],
    ]
    assert out.positions == [10]
    assert out.weights == [0.0] * (len(out.tokens) - 5) + [1.0] * 4 + [0.0]
    assert supervised(qwen, out) == "A cat.<|im_end|>"


def test_nvlm_length_of_six_tiles_and_thumbnail(qwen: Tokenizer) -> None:
    text_only = draw(qwen, (Turn("user", "\nWhat is it?"), QUESTION[1]))
    out = draw(qwen, QUESTION, [(3, 2)], tokens_per_tile=256)
    # 7 tiles of 5 + 256, <Image> of 2, </Image> of 3; its > joins the newline, which ends as one
    assert len(out.tokens) == len(text_only.tokens) + 7 * 261 + 2 + 3 - 1 + 1
    assert out.tokens.count(PAD) == 7 * 256
    assert out.positions == [5 + 5 + 261 * tile for tile in range(7)]
    for tile, start in enumerate(out.positions[:6]):
        assert out.tokens[start - 5 : start] == [27, 21094, 62, 16 + tile, 29]
    assert out.tokens[out.positions[6] - 5 : out.positions[6]] == THUMBNAIL


def test_hf_form_fuses_the_first_tag_with_the_image_start(qwen: Tokenizer) -> None:
    out = draw(qwen, QUESTION, [(2, 1)], tags=ImageTags(form="hf"))
    first, second, third = out.positions
    assert out.tokens[3:first] == [46465, 1784, 21094, 62, 16, 29]
    assert out.tokens[second - 5 : second] == [27, 21094, 62, 17, 29]
    assert out.tokens[third - 5 : third] == THUMBNAIL
    megatron = draw(qwen, QUESTION, [(2, 1)])
    assert len(out.tokens) == len(megatron.tokens) - 1
    assert supervised(qwen, out) == supervised(qwen, megatron)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("none", ["", "", "", "", "", "", ""]),
        ("1d", [*(f"<tile_{k}>" for k in range(1, 7)), "<t>"]),
        (
            "2d_grid",
            [*(f"<tile_x{x}_y{y}>" for y in (0, 1) for x in (0, 1, 2)), "<t>"],
        ),
        (
            "2d_bbox",
            [
                "<box>(0,0),(448,448)</box>",
                "<box>(448,0),(896,448)</box>",
                "<box>(896,0),(1344,448)</box>",
                "<box>(0,448),(448,896)</box>",
                "<box>(448,448),(896,896)</box>",
                "<box>(896,448),(1344,896)</box>",
                "<t>",
            ],
        ),
    ],
)
def test_tag_variants(variant: str, expected: list[str]) -> None:
    tags = ImageTags(variant=variant, thumbnail_tag="<t>")
    assert [tags.tag(tile, (3, 2), 448) for tile in (1, 2, 3, 4, 5, 6, 0)] == expected


def test_tags_of_two_dimensions_are_text_to_qwen(qwen: Tokenizer) -> None:
    out = draw(qwen, QUESTION, [(2, 1)], tags=ImageTags(variant="2d_grid"))
    first, second, thumbnail = out.positions
    assert out.tokens[5:first] == [27, 21094, 3212, 15, 4178, 15, 29]  # <tile_x0_y0>
    assert out.tokens[first + 2 : second] == [27, 21094, 3212, 16, 4178, 15, 29]
    assert out.tokens[second + 2 : thumbnail] == THUMBNAIL

    out = draw(qwen, QUESTION, [(2, 1)], tags=ImageTags(variant="2d_bbox"))
    first, second, _ = out.positions
    # <box>(0,0),(448,448)</box>, then <box>(448,0),(896,448)</box>: a token a digit
    corners = [2235, 15, 11, 15, 23547, 19, 19, 23, 11, 19, 19, 23, 12533]
    assert out.tokens[5:first] == [27, 2011, *corners, 2011, 29]
    corners = [2235, 19, 19, 23, 11, 15, 23547, 23, 24, 21, 11, 19, 19, 23, 12533]
    assert out.tokens[first + 2 : second] == [27, 2011, *corners, 2011, 29]


def test_tags_of_the_small_tokenizer(tiny: Tokenizer) -> None:
    """The quickstart's 1-D tags are tokens; 2-D tags are where `quickstart_tags` adds them."""
    config = yaml.safe_load((config_dir() / "tokenizer" / "quickstart_tags.yaml").read_text())
    tagged = Tokenizer(tiny.path, extra_tokens=config["extra_tokens"])
    grids = [(c, r) for c in range(1, 7) for r in range(1, 7) if 1 < c * r <= 6]
    for grid in grids:
        for tile in range(1, grid[0] * grid[1] + 1):
            for variant in ("1d", "2d_grid"):
                assert len(tagged.encode(ImageTags(variant).tag(tile, grid, 32))) == 1
    assert len(tiny.encode("<tile_x0_y0>")) == 12
    ids = tagged.encode("<box>(32,0),(64,32)</box>")
    assert [ids[0], ids[-1]] == [tagged.token_id("<box>"), tagged.token_id("</box>")]
    assert ids[1:-1] == tiny.encode("(32,0),(64,32)")


def test_no_tags_leave_only_placeholders_between_the_image_tags(qwen: Tokenizer) -> None:
    out = draw(qwen, QUESTION, [(2, 1)], tags=ImageTags(variant="none"))
    assert out.tokens[3:14] == [46465, 29, *[PAD] * 6, 522, 1906, 397]


def test_two_turns_supervise_both_answers(qwen: Tokenizer) -> None:
    turns = (*QUESTION, Turn("user", "Sure?"), Turn("assistant", "Yes."))
    assert supervised(qwen, draw(qwen, turns, [(1, 1)])) == "A cat.<|im_end|>Yes.<|im_end|>"
    template = dialect(supervise_suffix=True)
    megatron = draw(qwen, turns, [(1, 1)], template=template)
    assert supervised(qwen, megatron) == "A cat.<|im_end|>\nYes.<|im_end|>\n"
    assert megatron.tokens == draw(qwen, turns, [(1, 1)]).tokens


def test_system_message(qwen: Tokenizer) -> None:
    template = dialect(system="Answer the questions.")
    text = qwen.decode(
        draw(qwen, QUESTION, [(1, 1)], template=template).tokens[:10], skip_special_tokens=False
    )
    assert text.startswith("<|im_start|>system\nAnswer the questions.<|im_end|>\n")
    own = (Turn("system", "Be brief."), *QUESTION)
    shown = qwen.decode(draw(qwen, own, [(1, 1)], template=template).tokens)
    assert "Be brief." in shown
    assert "Answer the questions." not in shown
    # Qwen's own default system message is not added
    assert draw(qwen, QUESTION, [(1, 1)]).tokens[:2] == [151644, 872]


def test_several_images_anywhere_in_the_text(qwen: Tokenizer) -> None:
    turns = (Turn("user", "First <image> then <image>: alike?"), Turn("assistant", "No."))
    out = draw(qwen, turns, [(1, 1), (2, 1)])
    shown = qwen.decode(out.tokens, skip_special_tokens=False)
    pads = "<|vision_pad|>" * 2
    assert shown == (
        "<|im_start|>user\nFirst <Image><tile_global_thumbnail>" + pads + "</Image> then <Image>"
        f"<tile_1>{pads}<tile_2>{pads}<tile_global_thumbnail>{pads}</Image>: alike?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert [out.tokens[p : p + 2] for p in out.positions] == [[PAD, PAD]] * 4


def test_text_only(qwen: Tokenizer) -> None:
    out = draw(qwen, (Turn("user", "Hi"), Turn("assistant", "Ho")))
    assert out.positions == []
    assert PAD not in out.tokens
    assert supervised(qwen, out) == "Ho<|im_end|>"


def test_yi_has_one_bos(qwen: Tokenizer) -> None:
    yi = replace_bos(qwen)
    out = draw(
        yi,
        (*QUESTION, Turn("user", "Sure?"), Turn("assistant", "Yes.")),
        [(1, 1)],
        template=dialect("yi"),
        tags=ImageTags(thumbnail_tag="<tile_global>"),
    )
    assert out.tokens[:3] == [151643, 151644, 872]
    assert out.tokens.count(151643) == 1
    assert out.tokens[6:10] == [27, 21094, 19296, 29]


def replace_bos(tokenizer: Tokenizer) -> Tokenizer:
    changed = copy.copy(tokenizer)
    changed.bos_id = 151643
    return changed


def test_pretraining_has_no_roles(qwen: Tokenizer) -> None:
    template, tags = dialect("pretraining"), ImageTags(variant="none")
    out = draw(qwen, QUESTION, [(1, 1)], template=template, tags=tags)
    assert qwen.decode(out.tokens, skip_special_tokens=False) == (
        "<Image><|vision_pad|><|vision_pad|></Image>\nWhat is it?\nA cat.<|im_end|>"
    )
    assert supervised(qwen, out) == "A cat.<|im_end|>"


@pytest.mark.parametrize("style", ["chatml", "pretraining"])
def test_generation_prompt_is_a_prefix_of_the_training_sample(qwen: Tokenizer, style: str) -> None:
    template = dialect(style)
    whole = draw(qwen, QUESTION, [(2, 1)], template=template)
    prompt = draw(qwen, QUESTION[:1], [(2, 1)], template=template, generation_prompt=True)
    assert prompt.tokens == whole.tokens[: len(prompt.tokens)]
    assert whole.weights[: len(prompt.tokens)] == [0.0] * len(prompt.tokens)
    assert whole.weights[len(prompt.tokens)] == 1.0


def test_a_document_is_asked_to_go_on(qwen: Tokenizer) -> None:
    turns = [Turn(DOCUMENT, "<image> A cat sits")]
    whole = draw(qwen, turns, [(1, 1)])
    prompt = draw(qwen, turns, [(1, 1)], generation_prompt=True)
    assert whole.tokens == [*prompt.tokens, qwen.eos_id]
    assert qwen.decode(prompt.tokens).endswith("</Image> A cat sits")


def test_a_word_of_the_vocabulary_is_no_end_of_a_turn(qwen: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"template: Ġthe is not a token of .* found in text"):
        dialect(end="Ġthe").check(qwen)


def test_refuses_wrong_numbers_of_markers(qwen: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"s\.tar:k: the text has 1 <image> markers, .* 2 images"):
        draw(qwen, QUESTION, [(1, 1), (1, 1)])
    with pytest.raises(ValueError, match="1 <image> markers, the sample 0 images"):
        draw(qwen, QUESTION)
    with pytest.raises(ValueError, match="<image> in an assistant turn"):
        draw(qwen, (Turn("user", "?"), Turn("assistant", "<image>")), [(1, 1)])


def test_refuses_unknown_choices(qwen: Tokenizer, tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tags\.variant=3d must be one of none, 1d"):
        ImageTags(variant="3d")
    with pytest.raises(ValueError, match=r"tags\.form=vllm"):
        ImageTags(form="vllm")
    with pytest.raises(ValueError, match=r"template\.supervise_suffix=true needs a suffix"):
        ChatTemplate({"user": {}, "assistant": {}}, supervise_suffix=True)
    with pytest.raises(ValueError, match=r"template\.bos=true needs a BOS token"):
        dialect("yi").check(tiny)
    with pytest.raises(ValueError, match=r"template: <nowhere> is not a token"):
        dialect(special_tokens=["<nowhere>"]).check(qwen)
    with pytest.raises(ValueError, match=r"template: <nowhere> is not a token"):
        dialect(end="<nowhere>").check(qwen)
    with pytest.raises(ValueError, match=r"template\.roles lacks assistant, user"):
        ChatTemplate({"system": {}})
    with pytest.raises(ValueError, match=r"template\.roles\.user\.before is unknown"):
        ChatTemplate({"user": {"before": "x"}, "assistant": {}})
    with pytest.raises(ValueError, match=r"template\.system='Hi' needs template\.roles\.system"):
        ChatTemplate({"user": {}, "assistant": {}}, system="Hi")


def test_a_dialect_of_ones_own_is_data(qwen: Tokenizer) -> None:
    """Llama 3's: other words, its own end, a generation prompt, no system role."""
    template = ChatTemplate(
        {"user": {"prefix": "[user]", "suffix": "{end}"}, "assistant": {"prefix": "[bot] "}},
        end="<|endoftext|>",
        separator=" / ",
        generation_prompt=" / [bot] ->",
    )
    template.check(qwen)
    plain = (Turn("user", "Who?"), Turn("assistant", "I."))
    whole = draw(qwen, plain, template=template)
    assert qwen.decode(whole.tokens, skip_special_tokens=False) == (
        "[user]Who?<|endoftext|> / [bot] I.<|endoftext|>"
    )
    assert supervised(qwen, whole) == " I.<|endoftext|>", "Qwen has a token for ' I'"
    prompt = draw(qwen, plain[:1], template=template, generation_prompt=True)
    assert qwen.decode(prompt.tokens, skip_special_tokens=False) == (
        "[user]Who?<|endoftext|> / [bot] ->"
    )
    with pytest.raises(ValueError, match=r"a turn of system, and template\.roles has user, assis"):
        draw(qwen, (Turn("system", "Hi"), *plain), template=template)


@pytest.mark.parametrize("style", ["chatml", "yi", "pretraining"])
def test_a_style_of_old_is_the_dialect_of_that_name(style: str) -> None:
    old = {"_target_": "nvmm.data.chat.ChatTemplate", "style": style, "system": "Be brief."}
    if style != "pretraining":
        old |= {"supervise_newline": True}  # type: ignore[dict-item]
    changes = {"system": "Be brief.", "supervise_suffix": style != "pretraining"}
    new = instantiate(renamed(old), _convert_="all")
    assert repr(new) == repr(dialect(style, **changes))
