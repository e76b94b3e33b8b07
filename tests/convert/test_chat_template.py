"""Exports talk as the model was trained: Transformers writes the same tokens, and stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvmm.commands.convert import main
from nvmm.config.check import option
from nvmm.convert import models
from nvmm.convert.chat_template import (
    FILE,
    Conversation,
    check_conversation,
    conversation,
    write_conversation,
)
from nvmm.convert.exporting import export
from nvmm.convert.formats.all import copy_tokenizer
from nvmm.data.samples.chat import ChatTemplate, ImageTags, Turn, render
from nvmm.data.samples.contexts import ContextChat
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.jinja_template import JinjaTemplate
from nvmm.data.samples.record import members_of
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from tests.convert import families
from tests.data.samples import test_sentence_pieces as sentence_pieces

CHATML = {
    "roles": {
        "system": {"prefix": "<|im_start|>system\n", "suffix": "{end}\n"},
        "user": {"prefix": "<|im_start|>user\n", "suffix": "{end}\n"},
        "assistant": {"prefix": "<|im_start|>assistant\n", "suffix": "\n"},
    },
    "special_tokens": ["<|im_start|>"],
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "chatml": CHATML,
    "bos": {**CHATML, "bos": True},
    "default_system": {**CHATML, "system": 'Say "so", {{ it }} \\ {% if %} é\n'},
    "own_end": {**CHATML, "end": "<|stop|>"},
    "trim": {**CHATML, "trim": True},
    "chatqa": {
        "roles": {
            "system": {"prefix": "System: "},
            "context": {},
            "user": {"prefix": "User: "},
            "assistant": {"prefix": "Assistant: "},
        },
        "separator": "\n\n",
        "bos": True,
        "end_earlier": False,
        "generation_prompt": "\n\nAssistant:",
        "system": "Answer.",
    },
    "plain": {
        "roles": {"user": {"prefix": "Q'\": "}, "assistant": {"prefix": "A:", "suffix": " {end}"}},
        "separator": "\t|",
        "generation_prompt": "\t|A (short):",
    },
}
TURNS = [
    [Turn("user", "What is it?")],
    [Turn("user", "A"), Turn("assistant", "b {{ c }}"), Turn("user", " D\n")],
    [Turn("system", "Be brief."), Turn("user", "<|im_start|> é 日本 🦆"), Turn("assistant", "Yes")],
    [Turn("context", " One\n\ntwo"), Turn("user", "A"), Turn("assistant", "b"), Turn("user", "C")],
]
NAME = "nvmm.data.samples.chat.ChatTemplate"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with another end of text and its own sampling, imported."""
    folder = tmp_path_factory.mktemp("hf") / "theirs"
    families.language("qwen2", folder)
    train_byte_level_bpe(
        folder,
        ["What is it? Be brief."],
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    settings = {"eos_token_id": 0, "max_new_tokens": 77}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'theirs' }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder.parent / "ours"
    assert main(["import", "--from", str(folder), "--to", str(path)]) == 0
    return path


def taught(ours: Path, to: Path, template: dict[str, Any], **tokenizer: Any) -> Path:
    """A checkpoint that a run with this template would leave of the import."""
    shutil.copytree(ours, to)
    state = json.loads((to / "state.json").read_text())["state"]
    del state["sources"]
    state["config"]["data"]["train"]["build"]["template"] = {"_target_": NAME, **template}
    config = state["config"]["tokenizer"] | {"path": str(ours / "tokenizer")} | tokenizer
    state["config"]["tokenizer"] = config
    options = {k: v for k, v in config.items() if k not in ("_target_", "path")}
    state["tokenizer_digest"] = Tokenizer(config["path"], **options).digest
    models.write_state(to, state)
    return to


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_transformers_writes_the_tokens_of_training(name: str, ours: Path, tmp_path: Path) -> None:
    import transformers

    extra = ["<|vision_pad|>", "<|stop|>"]
    path = taught(ours, tmp_path / "run", TEMPLATES[name], extra_tokens=extra)
    export(models.open_checkpoint(path), tmp_path / "back", "qwen2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    tokenizer = Tokenizer(str(ours / "tokenizer"), extra_tokens=extra)
    template = ChatTemplate(**TEMPLATES[name])
    for turns in TURNS:
        if any(turn.role not in template.roles for turn in turns):
            with pytest.raises(Exception, match=f"not trained with a turn of {turns[0].role}"):
                theirs.apply_chat_template([{"role": t.role, "content": t.text} for t in turns])
            continue
        for prompt in (False, True):
            expected = render(
                turns,
                [],
                tokenizer=tokenizer,
                template=template,
                tags=ImageTags(),
                tile_size=1,
                tokens_per_tile=1,
                generation_prompt=prompt,
            ).tokens
            for text in (str, lambda text: [{"type": "text", "text": text}]):
                messages = [{"role": t.role, "content": text(t.text)} for t in turns]
                found = theirs.apply_chat_template(
                    messages, add_generation_prompt=prompt, return_dict=False
                )
                assert found == expected, theirs.decode(found)
    with pytest.raises(Exception, match="parts of type image"):
        theirs.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    # Generation stops where an answer ends, and the other settings are the folder's.
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    end = template.end_token(tokenizer)[1]
    ends = list(dict.fromkeys([end, tokenizer.end_of_turn_id, tokenizer.eos_id]))
    assert generation.eos_token_id == ends and generation.max_new_tokens == 77
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert config.eos_token_id == ends and config.pad_token_id == tokenizer.pad_id
    assert config.bos_token_id == tokenizer.bos_id


def test_the_context_block_of_an_export(ours: Path, tmp_path: Path) -> None:
    """What Transformers makes of messages and documents in the exported folder are the tokens of
    the builder's prompt, of configs/template/chatqa.yaml, and nothing else."""
    import transformers

    template = option("template", "chatqa")
    del template["_target_"]
    extra = ["<|vision_pad|>"]
    path = taught(ours, tmp_path / "run", template, extra_tokens=extra)
    export(models.open_checkpoint(path), tmp_path / "back", "qwen2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    tokenizer = Tokenizer(str(ours / "tokenizer"), extra_tokens=extra)
    build = InstructBuilder(
        ChatTemplate(**template),
        ImageTags(),
        1,
        form=ContextChat(instruction="Say it."),
        supervise="last",
        tokenizer=tokenizer,
        sequence_length=4096,
    )
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "Then"},
    ]
    chunks = ["One chunk.", "Two {{ chunks }}\n"]
    record = {"messages": turns, "contexts": chunks}
    prompt = build.prompt(members_of(record, "r")).text.tokens.tolist()
    asked = [turns[0] | {"content": "Say it. Where?"}, *turns[1:3]]
    block = {"content": "\n\n".join(chunks)}
    documents = [{"title": str(number), "text": text} for number, text in enumerate(chunks)]
    for messages, options in (
        ([{"role": "context", **block}, *asked], {}),
        ([{"role": "document", **block}, *asked], {}),
        ([*({"role": "context", "content": text} for text in chunks), *asked], {}),
        (asked, {"documents": documents}),
        ([{"role": "system", "content": template["system"]}, *asked], {"documents": documents}),
    ):
        found = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
        assert found == prompt, theirs.decode(found)
    whole = build(members_of(record, "r")).text.tokens.tolist()
    messages = [{"role": "context", **block}, *asked, turns[3]]
    assert theirs.apply_chat_template(messages, return_dict=False) == whole
    text = theirs.decode(prompt)
    assert text.startswith("<s>System: This is a chat") and text.endswith("When?\n\nAssistant:")
    # Without contexts there is no block, and no blank line in its place.
    bare = build.prompt(members_of({"messages": turns}, "r")).text.tokens.tolist()
    assert bare == theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert "context.\n\nUser: Say it. Where?" in theirs.decode(bare)


OWN = """\

{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ word ~ m.content ~ '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' ~ word }}{% endif %}"""


def test_a_jinja_template_is_exported_as_it_was_trained(ours: Path, tmp_path: Path) -> None:
    """With the values and the system message that the run gave it; else byte for byte."""
    import transformers

    folder = shutil.copytree(ours / "tokenizer", tmp_path / "tokenizer")
    for number, options in enumerate(
        [
            {},
            {
                "system": 'Say "so" {{',
                "variables": {"word": ["é"], "nothing": None, "no": {"a": True}},
            },
        ]
    ):
        (folder / FILE).write_text(OWN)
        path = taught(ours, tmp_path / f"run{number}", CHATML, path=str(folder))
        shutil.copytree(folder, path / "tokenizer", dirs_exist_ok=True)
        state = json.loads((path / "state.json").read_text())["state"]
        target = "nvmm.data.samples.jinja_template.JinjaTemplate"
        build = state["config"]["data"]["train"]["build"]
        build["template"] = {"_target_": target, **options}
        names = state["config"]["tokenizer"]
        words = Tokenizer(str(folder), extra_tokens=names.get("extra_tokens", []))
        models.write_state(path, state | {"template_digests": {"train": "of another text"}})
        with pytest.raises(ValueError, match=r"is not the one that .* was trained with"):
            export(models.open_checkpoint(path), tmp_path / "other", "qwen2")
        digest = JinjaTemplate(**options).bound(words).digest
        models.write_state(path, state | {"template_digests": {"train": digest}})
        back = tmp_path / f"back{number}"
        export(models.open_checkpoint(path), back, "qwen2")
        if not options:
            assert (back / FILE).read_text() == OWN
        theirs = transformers.AutoTokenizer.from_pretrained(back)
        tokenizer = Tokenizer(str(folder), extra_tokens=["<|vision_pad|>"])
        talk = Conversation(
            tokenizer, folder, JinjaTemplate(**options).bound(tokenizer), trained=True
        )
        for turns in TURNS[1:3]:
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            found = theirs.apply_chat_template(messages, return_dict=False)
            assert found == talk.tokens(turns), theirs.decode(found)
            text = theirs.decode(found)
            assert ('Say "so" {{' in text) == (bool(options) and turns[0].role != "system")
            assert ("['é']" in text) == bool(options)


def test_nemotron_talks_with_its_sentencepiece_model_alone(tmp_path: Path) -> None:
    """Imported with *_megatron_2.model and no other file of a tokenizer, trained, exported."""
    import transformers

    theirs = tmp_path / "theirs"
    families.language("nemotron", theirs)
    reference = sentence_pieces.train(theirs)
    assert main(["import", "--from", str(theirs), "--to", str(tmp_path / "ours")]) == 0
    template, names = option("template", "nemotron"), option("tokenizer", "nemotron")
    del template["_target_"], names["_target_"], names["path"]
    state = json.loads((tmp_path / "ours/state.json").read_text())["state"]
    state["config"]["data"] = {"train": {"build": {}}}
    models.write_state(tmp_path / "ours", state)
    path = taught(tmp_path / "ours", tmp_path / "run", template, **names, extra_tokens=[])
    for part, checkpoint in (("imported", tmp_path / "ours"), ("trained", path)):
        back = tmp_path / part
        export(models.open_checkpoint(checkpoint), back, "nemotron")
        read = transformers.AutoTokenizer.from_pretrained(back)
        for text in sentence_pieces.TEXTS:
            assert read.encode(text, add_special_tokens=False) == reference.encode(text)
        assert (read.bos_token_id, read.eos_token_id) == (1, 2)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYo\n<extra_id_1>"
    assert read.apply_chat_template(turns, return_dict=False) == reference.encode(text)
    assert read.apply_chat_template(
        turns[:1], return_dict=False, add_generation_prompt=True
    ) == reference.encode(text.removesuffix("Yo\n<extra_id_1>"))
    generation = transformers.GenerationConfig.from_pretrained(back)
    assert generation.eos_token_id == [reference.piece_to_id("<extra_id_1>"), 2]


def test_generation_stops_at_the_trained_end(ours: Path, tmp_path: Path) -> None:
    """Transformers' generate with nothing but the folder ends at the token that we end at."""
    import transformers

    path = taught(ours, tmp_path / "run", CHATML)
    export(models.open_checkpoint(path), tmp_path / "back", "qwen2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    end = model.generation_config.eos_token_id[0]
    model.lm_head = torch.nn.Linear(60, families.VOCABULARY)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias).data[end] = 1
    out = model.generate(torch.tensor([[7, 8, 9]]), do_sample=False)
    assert out.tolist() == [[7, 8, 9, end]]


def test_an_import_keeps_what_its_folder_says(ours: Path, tmp_path: Path) -> None:
    export(models.open_checkpoint(ours), tmp_path / "back", "qwen2")
    theirs = ours.parent / "theirs"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()
    assert not (tmp_path / "back" / "chat_template.jinja").exists()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("eos_token_id") is None


def test_a_moved_import_brings_its_tokenizer(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is exported from where it lies; without its tokenizer, or with another, it is refused."""
    shutil.copytree(ours, tmp_path / "moved")
    state = json.loads((tmp_path / "moved" / "state.json").read_text())["state"]
    state["config"]["tokenizer"]["path"] = str(tmp_path / "gone")
    models.write_state(tmp_path / "moved", state)
    to = ["--to", str(tmp_path / "back"), "--format", "qwen2"]
    assert main(["export", "--from", str(tmp_path / "moved"), *to]) == 0
    assert load_file(tmp_path / "back" / "model.safetensors")
    # A run keeps its tokenizer beside its checkpoints.
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(tmp_path / "moved", step)
    (step / "tokenizer").rename(tmp_path / "run" / "tokenizer")
    models.write_state(step, state)
    assert main(["export", "--from", str(step), "--to", str(tmp_path / "of_run"), *to[2:]]) == 0
    assert (tmp_path / "of_run" / "tokenizer.json").is_file()
    (tmp_path / "moved" / "tokenizer").rename(tmp_path / "elsewhere")
    models.write_state(tmp_path / "moved", state)  # seals the files that are left
    to[1] = str(tmp_path / "again")
    assert main(["export", "--from", str(tmp_path / "moved"), *to]) == 2
    assert "name it: --tokenizer" in capsys.readouterr().err
    given = ["--tokenizer", str(tmp_path / "elsewhere")]
    assert main(["export", "--from", str(tmp_path / "moved"), *to, *given]) == 0
    other = train_byte_level_bpe(
        tmp_path / "other",
        ["x"],
        vocab_size=300,
        special_tokens=["<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    to[1] = str(tmp_path / "third")
    given = ["--tokenizer", str(other)]
    assert main(["export", "--from", str(tmp_path / "moved"), *to, *given]) == 2
    assert "is not the tokenizer that" in capsys.readouterr().err


def test_another_tokenisation_is_refused(ours: Path, tmp_path: Path) -> None:
    """A folder in which Transformers writes other tokens would not answer as the model does."""
    path = taught(ours, tmp_path / "run", CHATML)
    saved = models.open_checkpoint(path)
    talk = conversation(saved, None)
    assert talk is not None
    (tmp_path / "back").mkdir()
    copy_tokenizer(talk.folder, tmp_path / "back")
    write_conversation(tmp_path / "back", talk, media={})
    (tmp_path / "back" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    check_conversation(tmp_path / "back", talk)
    text = (tmp_path / "back" / FILE).read_text()
    (tmp_path / "back" / FILE).write_text(text.replace("user\\n", "user"))
    with pytest.raises(ValueError, match="the export would answer otherwise"):
        check_conversation(tmp_path / "back", talk)


def test_a_composite_talks_too(ours: Path, tmp_path: Path) -> None:
    """NVLM-D: the ends are in its decoder's config, and images of a message are our markers."""
    import transformers

    families.nvlm_d(tmp_path / "theirs")
    copy_tokenizer(ours / "tokenizer", tmp_path / "theirs")
    imported = ["import", "--from", str(tmp_path / "theirs"), "--to", str(tmp_path / "ours")]
    assert main(imported) == 0
    run = taught(tmp_path / "ours", tmp_path / "run", CHATML)
    saved = models.open_checkpoint(run)
    export(saved, tmp_path / "back", "nvlm_d")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["llm_config"]["eos_token_id"] == [2, 0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    messages = [{"role": "user", "content": content}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    # The decoder alone reads none.
    export(saved, tmp_path / "part", "qwen2", part="language")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "part")
    with pytest.raises(Exception, match="parts of type image"):
        theirs.apply_chat_template(messages, tokenize=False)
    # An encoder has no conversation.
    export(saved, tmp_path / "vision", "internvit", part="vision")
    assert not (tmp_path / "vision" / "tokenizer.json").exists()
