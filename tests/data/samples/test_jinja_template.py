"""Chat templates in Jinja, beside Transformers' `apply_chat_template` and its mask."""

from __future__ import annotations

import json
import pickle
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.loader import Data
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import ChatTemplate, ImageTags, Rendered, Template, Turn, render
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.jinja_template import FILE, JinjaTemplate
from nvmm.data.samples.record import members_of
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, builder_digest
from tests.data.conftest import template as dialect
from tests.data.samples import llama

LLAMA_3 = """\
{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>

' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""
"""Llama 3's own, but for a name."""
MARKED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATQA = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if not loop.first %}{{ '\\n\\n' }}{% endif %}
    {%- if m.role == 'context' %}{{ m.content }}
    {%- else %}{{ m.role | capitalize ~ ': ' ~ m.content }}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.last %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""
TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "  What is it?\n"),
    Turn("assistant", "It is é 7."),
    Turn("user", "And 日本?"),
    Turn("assistant", "Here it is"),
]
THEIRS = {
    "llama3": "<|eot_id|>",
    "llama3_training": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen2_5_training": "<|im_end|>",
    "phi3": "<|end|>",
    "phi3_training": "<|end|>",
    "gemma": "<end_of_turn>",
    "gemma_training": "<end_of_turn>",
}
"""Templates of released models as the package trl ships them -> their end of an answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama.save(tmp_path_factory.mktemp("jinja"), LLAMA_3)


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer(
        str(folder), image_token="<|reserved_special_token_0|>", end_of_turn="<|eot_id|>"
    )


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def draw(words: Tokenizer, template: Template, turns: list[Turn], ask: bool = False) -> Rendered:
    return render(
        turns,
        [],
        tokenizer=words,
        template=template,
        tags=ImageTags(),
        tile_size=1,
        tokens_per_tile=1,
        generation_prompt=ask,
    )


def written(path: Path, text: str, **options: Any) -> JinjaTemplate:
    path.write_text(text, encoding="utf-8")
    return JinjaTemplate(str(path), **options)


def trained(words: Tokenizer, rendered: Rendered) -> str:
    ids = [t for t, w in zip(rendered.tokens, rendered.weights, strict=True) if w]
    return words.decode(ids, skip_special_tokens=False)


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def check(words: Tokenizer, theirs: Any, template: JinjaTemplate) -> None:
    """Compare ids, prompts and, where the template marks its answers, the mask."""
    bound = template.bound(words)
    source = bound.source
    for turns in (TURNS[1:], TURNS[1:3], TURNS):
        if turns[0].role == "system" and "System role not supported" in source:
            with pytest.raises(BadSample, match="the chat template refuses it: System role not"):
                draw(words, bound, turns)
            continue
        found = draw(words, bound, turns)
        expected = theirs.apply_chat_template(
            messages(turns),
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert found.tokens == expected["input_ids"]
        if "generation %}" in source:
            assert [int(weight) for weight in found.weights] == expected["assistant_masks"]
            assert sum(found.weights)
        prompt = draw(words, bound, turns[:-1], ask=True)
        assert prompt.tokens == theirs.apply_chat_template(
            messages(turns[:-1]),
            chat_template=source,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert not any(prompt.weights)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl's templates")
@pytest.mark.parametrize("name", THEIRS)
def test_templates_of_released_models(
    name: str, words: Tokenizer, theirs: Any, tmp_path: Path
) -> None:
    spec = find_spec("trl")
    assert spec and spec.origin
    text = (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    check(words, theirs, written(tmp_path / "t.jinja", text, end=THEIRS[name]))


def test_prefix_difference_is_the_mask_that_authors_give(
    words: Tokenizer, theirs: Any, tmp_path: Path
) -> None:
    """The same text with and without marks has the same mask, and it is Transformers'."""
    marked = written(tmp_path / "a.jinja", MARKED, end="<|im_end|>")
    check(words, theirs, marked)
    bare = MARKED.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
    plain = written(tmp_path / "b.jinja", bare, end="<|im_end|>")
    check(words, theirs, plain)
    one, other = (draw(words, each.bound(words), TURNS) for each in (marked, plain))
    assert one == other
    assert trained(words, one) == "It is é 7.<|im_end|>Here it is<|im_end|>"
    # It is that of our own dialect too, and so are prompts.
    ours = ChatTemplate(
        roles={
            role: {"prefix": f"<|im_start|>{role}\n", "suffix": "\n" if end else "{end}\n"}
            for role, end in (("system", False), ("user", False), ("assistant", True))
        },
        end="<|im_end|>",
    )
    assert draw(words, ours, TURNS) == one
    asked = [draw(words, each, TURNS[:-1], ask=True) for each in (ours, plain.bound(words))]
    assert asked[0].tokens == asked[1].tokens
    for each in (marked, plain):
        some = [*TURNS[:2], Turn("assistant", "It is é 7.", trained=False), *TURNS[3:]]
        assert trained(words, draw(words, each.bound(words), some)) == "Here it is<|im_end|>"


def test_llama_3_is_what_its_own_template_writes(words: Tokenizer) -> None:
    """configs/template/llama3.yaml, to the byte, white space around texts and all."""
    own, ours = JinjaTemplate().bound(words), dialect("llama3")
    spaced = [Turn("user", "\n a  b\t"), Turn("assistant", " c \n")]
    for turns in (TURNS, TURNS[1:], spaced):
        assert draw(words, ours, turns) == draw(words, own, turns)
        asked = draw(words, ours, turns[:-1], ask=True)
        assert asked.tokens == draw(words, own, turns[:-1], ask=True).tokens
    text = words.decode(draw(words, ours, spaced).tokens, skip_special_tokens=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na  b<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>"
    )


def test_a_template_of_chatqa_is_our_dialect(words: Tokenizer, theirs: Any, tmp_path: Path) -> None:
    """A context's role, earlier answers without an end, and a prompt without the last space."""
    jinja = written(tmp_path / "c.jinja", CHATQA, end="<|end_of_text|>").bound(words)
    check(words, theirs, written(tmp_path / "c.jinja", CHATQA, end="<|end_of_text|>"))
    ours = dialect("chatqa", end="<|end_of_text|>", system=None)
    turns = [TURNS[0], Turn("context", "A chunk.\n\nAnother"), *TURNS[3:]]
    assert draw(words, jinja, turns) == draw(words, ours, turns)
    assert trained(words, draw(words, jinja, turns)) == " Here it is<|end_of_text|>"
    assert jinja.lead(words)[1] == ours.lead(words)[1] == " "
    assert draw(words, jinja, TURNS) == draw(words, ours, TURNS)


def build(words: Tokenizer, template: Template, **options: Any) -> InstructBuilder:
    return InstructBuilder(
        template, ImageTags(), 1, tile_size=16, tokenizer=words, sequence_length=512, **options
    )


RECORD = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four"},
    ]
}


def test_a_builder_of_it(words: Tokenizer) -> None:
    members = members_of(RECORD, "r")
    for supervise in ("all", "last"):
        jinja = build(words, JinjaTemplate(), supervise=supervise)
        ours = build(words, dialect("llama3"), supervise=supervise)
        one, other = jinja(members).text, ours(members).text
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.weights.tolist() == other.weights.tolist()
        prompt = jinja.prompt(members).text.tokens.tolist()
        assert prompt == ours.prompt(members).text.tokens.tolist()
        assert jinja.stop_ids == ours.stop_ids
        assert jinja.answer_tokens("Four") == ours.answer_tokens("Four")
    again = pickle.loads(pickle.dumps(jinja))
    assert again(members).text.tokens.tolist() == one.tokens.tolist()


def test_pictures_stand_at_their_markers(words: Tokenizer) -> None:
    from tests.data.conftest import chat, image_bytes

    members = chat(("human", "<image>\nWhat?"), ("gpt", "Ho"), png=image_bytes(20, 20))
    one, other = (build(words, each)(members).text for each in (JinjaTemplate(), dialect("llama3")))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.weights.tolist() == other.weights.tolist() and len(one.media) == 1


def test_system_and_variables_act(words: Tokenizer, tmp_path: Path) -> None:
    text = "{{ word ~ (strftime_now('%Y') if not day is defined else day) }}|" + LLAMA_3
    path = tmp_path / "v.jinja"
    values = {"word": "w", "day": "d"}
    bound = written(path, text, system="Sys", variables=values).bound(words)
    found = words.decode(draw(words, bound, TURNS[1:3]).tokens, skip_special_tokens=False)
    assert found.startswith("wd|<|begin_of_text|><|start_header_id|>system") and "Sys" in found
    own = words.decode(draw(words, bound, TURNS[:3]).tokens, skip_special_tokens=False)
    assert "Sys" not in own and "Be brief." in own
    with pytest.raises(ValueError, match=r"v\.jinja.*give a date by template\.variables"):
        JinjaTemplate(str(path), variables={"word": "w"}).bound(words)
    # What decides the text is in the digest of token counts; where the file lies is not.
    moved = written(tmp_path / "w.jinja", text, system="Sys", variables=values)
    digests = [builder_digest(build(words, each)) for each in (bound, moved)]
    assert digests[0] == digests[1]
    for other in (
        written(path, text, system="Sys", variables=values | {"word": "x"}),
        written(path, text, system="S", variables=values),
    ):
        assert builder_digest(build(words, other)) != digests[0]
    changed = written(path, text.replace("}}|", "}}||"), system="Sys", variables=values)
    assert builder_digest(build(words, changed)) != digests[0]


def test_a_run_knows_the_digests_of_its_templates(tmp_path: Path) -> None:
    """Of the main data set and each part of a blend, before any shard is there; a changed file of
    the folder changes them."""
    folder = llama.save(tmp_path / "t", chat_template=MARKED)
    own = partial(InstructBuilder, dialect("llama3"), ImageTags(), 1)

    def digests() -> dict[str, str]:
        options = {"image_token": "<|reserved_special_token_0|>", "end_of_turn": "<|im_end|>"}
        nested = [{"name": "b", "shards": "b.tar", "build": own}]
        train = Dataset(None, partial(InstructBuilder, JinjaTemplate(), ImageTags(), 1))
        blend = [{"name": "a", "shards": "a.tar"}, {"blend": nested}]
        return Data(
            8, 0, train=train, blend=blend, tokenizer=Tokenizer(str(folder), **options)
        ).template_digests

    first = digests()
    assert first == {"train": first["a"], "a": first["train"]}
    (folder / FILE).write_text(MARKED + "  ")
    assert digests()["a"] != first["a"]


def test_where_a_folder_has_its_templates(words: Tokenizer, tmp_path: Path) -> None:
    """A file goes before tokenizer_config.json; there may be several, by name."""
    from transformers import AutoTokenizer

    folder = llama.save(tmp_path / "t")
    options = {"image_token": "<|reserved_special_token_0|>", "end_of_turn": "<|im_end|>"}

    def source(name: str | None = None) -> str:
        return JinjaTemplate(name=name).bound(Tokenizer(str(folder), **options)).source

    with pytest.raises(ValueError, match="has no chat template default; it has none"):
        source()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": MARKED}, {"name": "rag", "template": MARKED + " "}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert (source(), source("rag")) == (MARKED, MARKED + " ")
    with pytest.raises(ValueError, match="no chat template other; it has default, rag"):
        source("other")
    (folder / FILE).write_text(MARKED + "  ")
    read = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert source() == read.get_chat_template() == MARKED + "  "
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(MARKED)
    assert source("tools") == MARKED


BAD = [
    ("{% for %}", {}, "t.jinja: the chat template refuses it: Expected an expression"),
    ("{{ raise_exception('no') }}", {}, "refuses it: no"),
    ("{{ messages[0].__class__.__mro__ }}", {}, "is unsafe"),
    ("{{ messages.append(1) }}", {}, "of 'list' object is unsafe"),
    ("{{ messages[0].content }}", {}, "leaves out text of the assistant's turn"),
    (MARKED, {}, "without its end <|eot_id|>"),
    (MARKED, {"end": "no token"}, "template.end=no token is not a token"),
    ("{{ 1 + 'a' }}", {}, "unsupported operand"),
    (
        "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
        {},
        "turn 2 otherwise",
    ),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD)
def test_bad_templates_are_named(
    text: str, options: dict[str, Any], message: str, words: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        written(tmp_path / "t.jinja", text, **options).bound(words)


def test_bad_paths_are_named(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"template: .*gone.* cannot be read"):
        JinjaTemplate(str(tmp_path / "gone")).bound(words)
    with pytest.raises(ValueError, match=r"template\.name=a is of the tokenizer's folder"):
        JinjaTemplate("b", name="a")
    with pytest.raises(ValueError, match=r"template\.variables\.none is no name"):
        JinjaTemplate(variables={"none": 1})
    with pytest.raises(BadSample, match=r"U\+FDD0"):
        draw(words, JinjaTemplate().bound(words), [Turn("user", "\ufdd0"), TURNS[2]])
