"""The conversation of an export: its chat template in Jinja and its end tokens, and their check."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.convert.files import at, is_local
from nvmm.convert.formats.all import copy_tokenizer
from nvmm.convert.models import SavedModel
from nvmm.data.samples.chat import (
    CONTEXT,
    IMAGE_MARKER,
    ChatTemplate,
    ImageTags,
    Turn,
    render,
)
from nvmm.data.samples.jinja_template import FILE, JinjaTemplate
from nvmm.data.samples.sound_chat import SOUND_MARKER
from nvmm.data.samples.tokenizer import Tokenizer

_TEMPLATES = {
    "nvmm.data.samples.chat.ChatTemplate": ChatTemplate,
    "nvmm.data.samples.jinja_template.JinjaTemplate": JinjaTemplate,
}
_READ_BY_ITSELF = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that Transformers reads without another beside them."""
_TURNS = (
    Turn("user", "What is 1 + 1?\nSay it."),
    Turn("assistant", "It is 2, I think."),
    Turn("user", "  And twice that?"),
)
_JINJA = """\
{{%- set affixes = {affixes} -%}}
{{%- set systems = messages | selectattr("role", "equalto", "system") | list -%}}
{{%- if {has_system} and systems | length == 0 -%}}
{{%- set messages = [{{"role": "system", "content": {system}}}] + messages -%}}
{{%- endif -%}}
{documents}{{{{- {bos} -}}}}
{{%- for message in messages -%}}
{{%- set role = {aliases}[message["role"]] | default(message["role"]) -%}}
{{%- if role not in affixes -%}}
{{{{- raise_exception("the model was not trained with a turn of " ~ message["role"]) -}}}}
{{%- endif -%}}
{{%- if not loop.first -%}}{{{{- {separator} -}}}}{{%- endif -%}}
{{{{- affixes[role][0] -}}}}
{{%- set content -%}}
{{%- if message["content"] is string -%}}
{{{{- message["content"] -}}}}
{{%- else -%}}
{{%- for part in message["content"] -%}}
{{%- if part["type"] == "text" -%}}{{{{- part["text"] -}}}}
{{%- elif part["type"] in {media} -%}}{{{{- {media}[part["type"]] -}}}}
{{%- else -%}}{{{{- raise_exception("the model does not read parts of type " ~ part["type"]) -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endset -%}}
{{{{- content | trim if {trim} else content -}}}}
{{%- if role == "assistant" and ({end_earlier} or loop.last) -%}}
{{{{- {before_end} ~ {end} -}}}}
{{%- endif -%}}
{{{{- affixes[role][1] -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- {generation_prompt} -}}}}
{{%- else -%}}{{{{- {closing} -}}}}{{%- endif -%}}
"""
_DOCUMENTS = """\
{{%- if documents -%}}
{{%- set start = 1 if messages and messages[0]["role"] == "system" else 0 -%}}
{{%- set texts = documents | map(attribute="text") | join({separator}) -%}}
{{%- set block = [{{"role": "{context}", "content": texts}}] -%}}
{{%- set messages = messages[:start] + block + messages[start:] -%}}
{{%- endif -%}}
"""
"""The documents of `apply_chat_template`, where a template has a role for contexts."""


@dataclass(frozen=True)
class Conversation:
    """How a checkpoint was taught to talk.

    folder: of its tokenizer's files. template: None where its samples have none (an embedder).
    trained: False for an import as it came, whose folder says by itself how it talks. end: text
    behind a conversation, at which a reward model reads its score.
    """

    tokenizer: Tokenizer
    folder: Path
    template: ChatTemplate | JinjaTemplate | None
    trained: bool
    end: str = ""

    @property
    def end_ids(self) -> list[int]:
        """The template's end of an answer, then the tokenizer's end of a turn and of a text."""
        ids = [self.tokenizer.end_of_turn_id, self.tokenizer.eos_id]
        if self.template is not None:
            ids.insert(0, self.template.end_token(self.tokenizer)[1])
        # An import of a tokenizer without any end has the placeholder in its place.
        return [i for i in dict.fromkeys(ids) if i != self.tokenizer.image_id]

    def tokens(self, turns: Sequence[Turn] = _TURNS[:2], prompt: bool = False) -> list[int]:
        """Return a conversation's tokens; prompt: up to where the next answer begins."""
        assert self.template is not None
        tokens = render(
            turns,
            [],
            tokenizer=self.tokenizer,
            template=self.template,
            tags=ImageTags(),
            tile_size=1,
            tokens_per_tile=1,
            generation_prompt=prompt,
        ).tokens
        closes = self.end and not prompt
        end = self.tokenizer.encode_pieces([self.end], continued=True)[0] if closes else []
        return [*tokens, *end]

    def ids(self) -> dict[str, Any]:
        """Return the ids of a config.json and a generation_config.json, those that there are."""
        ends = self.end_ids
        ids = {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": self.tokenizer.pad_id,
        }
        return {key: value for key, value in ids.items() if value is not None}


def conversation(saved: SavedModel, folder: Path | None) -> Conversation | None:
    """Return how a checkpoint talks, from its config; None where that has no tokenizer.

    folder: of its tokenizer; None for the one in the checkpoint, or else where it was trained.
    Raises ValueError when the tokenizer is not there, or is another one now.
    """
    config = saved.state["config"]
    options = dict(config.get("tokenizer") or {})
    path = options.pop("path", None)
    if path is None:
        return None
    candidates = [folder] if folder else [saved.path / "tokenizer", at(path)]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        where = " or ".join(map(str, candidates))
        raise ValueError(f"the tokenizer of {saved.path} is not at {where}; name it: --tokenizer")
    options.pop("_target_", None)
    with tempfile.TemporaryDirectory() as name:
        if not is_local(folder):
            copy_tokenizer(folder, Path(name))
        tokenizer = Tokenizer(str(folder) if is_local(folder) else name, **options)
        digest = saved.state.get("tokenizer_digest")
        if digest is not None and tokenizer.digest != digest:
            raise ValueError(
                f"{folder} is not the tokenizer that {saved.path} was trained with (digest"
                f" {tokenizer.digest[:12]}, not {digest[:12]}); name that one: --tokenizer"
            )
        build = ((config.get("data") or {}).get("train") or {}).get("build") or {}
        template = _template(build.get("template"), tokenizer)
        if isinstance(template, JinjaTemplate):
            template.require_that_of(saved.path, saved.state)
    trained = "sources" not in saved.state or "merged_from" in saved.state
    return Conversation(tokenizer, folder, template, trained, str(build.get("end") or ""))


def _template(given: Any, tokenizer: Tokenizer) -> ChatTemplate | JinjaTemplate | None:
    """Return the dialect of a saved builder, None where it has none."""
    target = _TEMPLATES.get(str(given.get("_target_"))) if isinstance(given, Mapping) else None
    if target is None:
        return None
    template = target(**{k: v for k, v in given.items() if k != "_target_"})
    # An import may have the dialect of a config that its tokenizer was not made for.
    return template.bound(tokenizer) if isinstance(template, JinjaTemplate) else template


def jinja(
    template: ChatTemplate | JinjaTemplate,
    tokenizer: Tokenizer,
    media: Mapping[str, str],
    closing: str = "",
) -> str:
    """Return a template of Transformers that writes what `render` writes, and `closing` behind a
    whole conversation.

    media: kind of part -> the marker that it becomes, for whoever expands that. A template with
    a role for contexts takes them as messages of the role `context` or `document`, or as the
    `documents` of `apply_chat_template`.
    """
    if isinstance(template, JinjaTemplate):
        return template.text(closing)
    end, _ = template.end_token(tokenizer)
    bos = ""
    if template.bos and tokenizer.bos_id is not None:
        bos = tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False)
    rests = CONTEXT in template.roles
    values = {
        "affixes": {
            role: [affixes.prefix.replace("{end}", end), affixes.suffix.replace("{end}", end)]
            for role, affixes in template.roles.items()
        },
        "has_system": template.system is not None,
        "system": template.system or "",
        "before_end": template.before_end,
        "bos": bos,
        "separator": template.separator,
        "end": end,
        "generation_prompt": template.generation_prompt.replace("{end}", end),
        "closing": closing,
        "trim": template.trim,
        "end_earlier": template.end_earlier,
        "aliases": {"document": CONTEXT} if rests and "document" not in template.roles else {},
        "media": dict(media),
    }
    # A JSON string is a Jinja string where its only escapes are those of quotes and controls.
    texts = {k: json.dumps(v, ensure_ascii=False) for k, v in values.items()}
    documents = _DOCUMENTS.format(separator=texts["separator"], context=CONTEXT) if rests else ""
    return _JINJA.format(documents=documents, **texts)


def media_parts(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the kinds of parts that messages to a model may have, and their markers."""
    parts = {"image": IMAGE_MARKER} if "vision" in model else {}
    return parts | ({"audio": SOUND_MARKER} if "audio" in (model.get("encoders") or {}) else {})


def write_conversation(folder: Path, talk: Conversation, *, media: Mapping[str, str]) -> None:
    """Write how a checkpoint talks beside the files of its tokenizer.

    media: as `media_parts` gives them.

    An import as it came keeps what its folder says, and is given what that leaves out.
    """
    # 1. The ends of an answer, at which generation stops.
    generation = _read(folder / "generation_config.json")
    if talk.trained or "eos_token_id" not in generation:
        _write(folder / "generation_config.json", generation | talk.ids())
    # 2. Tokens that the run added to the vocabulary, and a vocabulary that only we can read.
    unread = not any((folder / name).is_file() for name in _READ_BY_ITSELF)
    if (talk.trained or unread) and not talk.tokenizer.is_saved_in(folder):
        talk.tokenizer.save(folder)
        if not (folder / "tokenizer_config.json").is_file():
            _write(folder / "tokenizer_config.json", _plain_config(talk.tokenizer))
    # 3. The template, in the one place where every version of Transformers looks first.
    config = _read(folder / "tokenizer_config.json")
    has_template = (folder / FILE).is_file() or config.get("chat_template")
    if talk.template is not None and (talk.trained or not has_template):
        text = jinja(talk.template, talk.tokenizer, media, talk.end)
        (folder / FILE).write_text(text, encoding="utf-8")
        if config.pop("chat_template", None) is not None:
            _write(folder / "tokenizer_config.json", config)


def check_conversation(folder: Path, talk: Conversation) -> None:
    """Compare Transformers' tokens of conversations with ours, in a folder that is complete.

    Raises ValueError where they differ after training. Behind a URL nothing is compared.
    """
    if talk.template is None or not talk.trained or not is_local(folder):
        return
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    conversations: list[tuple[Sequence[Turn], bool]] = [(_TURNS[:2], False), (_TURNS, True)]
    if isinstance(talk.template, ChatTemplate) and CONTEXT in talk.template.roles:
        conversations.append(((Turn(CONTEXT, "One and one\n\nis two."), *_TURNS), True))
    for turns, prompt in conversations:
        expected = talk.tokens(turns, prompt)
        found = theirs.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            add_generation_prompt=prompt,
            return_dict=False,
        )
        if list(found) != expected:
            raise ValueError(
                f"Transformers reads a conversation with the tokenizer of {talk.folder} as {found},"
                f" the model was trained with {expected}: the export would answer otherwise"
            )


def _plain_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer_config.json for a tokenizer.json without one."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    tokens = {
        f"{name}_token": tokenizer.decode([i], skip_special_tokens=False)
        for name, i in ids.items()
        if i is not None
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
