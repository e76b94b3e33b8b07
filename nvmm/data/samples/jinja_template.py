"""Any chat template in Jinja, as tokenizer folders carry them, with the mask of its answers.

A template is rendered as Transformers renders it, in Jinja's sandbox. What is trained is what its
author marked by `{% generation %}` and `{% endgeneration %}`, or else what an answer adds to the
text of the turns before it, up to the end token.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from jinja2 import Template as Compiled
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import Piece, Turn
from nvmm.data.samples.tokenizer import Tokenizer

FILE = "chat_template.jinja"
_NAMED = "additional_chat_templates"
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_START, _STOP = "\ufdd0", "\ufdd1"
"""Mark a generation block in rendered text. Unicode keeps both for a program's own use."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = (Turn("user", "Which?"), Turn("assistant", "This"))


class JinjaTemplate:
    """A dialect that a Jinja template writes; the contract is `nvmm.data.samples.chat.Template`.

    path: file of the template; None: the one of the tokenizer's folder.
    name: of one of several templates of the folder; None: "default".
    end: token that ends an answer; None: the tokenizer's `end_of_turn`.
    system: system message of samples that bring none; None: what the template does without one.
    variables: values that the template reads, as `{enable_thinking: false}`.

    The text must not change with the day: `strftime_now` raises, so that a template which writes a
    date wants it in `variables` (Llama 3.1: `date_string`).
    """

    bos = False  # The template writes it.

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        end: str | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if path is not None and name is not None:
            raise ValueError(f"template.name={name} is of the tokenizer's folder, not of {path}")
        for key in variables or {}:
            if not key.isidentifier() or key.lower() in ("true", "false", "none"):
                raise ValueError(f"template.variables.{key} is no name of a variable in Jinja")
        self.path = path
        self.name = name
        self.end = end
        self.system = system
        self.variables = dict(variables or {})
        self.source = ""
        self.tokens: dict[str, str] = {}

    @property
    def digest(self) -> str:
        """The sha256 of what decides the text of turns."""
        content = [self.source, self.tokens, self.variables]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def require_that_of(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a checkpoint says that it was trained with another text."""
        trained = (state.get("template_digests") or {}).get("train")
        if trained not in (None, self.digest):
            raise ValueError(
                f"the chat template of {self.path or 'the tokenizer folder'} is not the one that"
                f" {checkpoint} was trained with (digest {self.digest[:12]}, not {trained[:12]});"
                " put its text back"
            )

    def bound(self, tokenizer: Tokenizer) -> JinjaTemplate:
        """Return the template with its text and the names of the tokenizer's special tokens.

        Raises ValueError for a folder without the template, one that is no Jinja, an end token that
        is none, and one whose answers cannot be told from the rest, or never end.
        """
        other = copy.copy(self)
        folder = Path(tokenizer.path).expanduser()
        if self.path is None:
            other.source, where = _of_folder(folder, self.name)
        else:
            other.source, where = _read(Path(self.path).expanduser()), self.path
        other.tokens = _special_tokens(folder, tokenizer)
        end = tokenizer.end_of_turn if self.end is None else self.end
        known = tokenizer.token_id(end)
        if known is None or tokenizer.encode(end) != [known]:
            raise ValueError(f"template.end={end} is not a token of {tokenizer.path}")
        try:
            trained = "".join(
                piece.text
                for piece in other.pieces(_PROBE, tokenizer, prompt=False)
                if piece.weight
            )
        except Exception as error:  # A template raises what it likes.
            reason = error.reason if isinstance(error, BadSample) else error
            raise ValueError(f"template: {where}: {reason}") from error
        if end not in trained:
            raise ValueError(
                f"template: {where} trains {trained!r} of an answer, without its end {end}; name"
                " the token that ends it by template.end"
            )
        return other

    def text(self, closing: str = "") -> str:
        """Return a template of Transformers that writes the same, with `system` and `variables` as
        they are here, and `closing` behind a whole conversation."""
        sets = "".join(f"{{% set {k} = {_literal(v)} %}}" for k, v in self.variables.items())
        if self.system is not None:
            message = f'[{{"role": "system", "content": {json.dumps(self.system)}}}]'
            roles = 'messages | map(attribute="role")'
            sets += f'{{% if "system" not in {roles} %}}{{% set messages = {message} + messages %}}'
            sets += "{% endif %}"
        # What stands behind a block's end would lose a line break: an expression's end keeps it.
        text = (sets + '{{ "" }}' if sets else "") + self.source
        if closing:
            text += (
                f"{{% if not add_generation_prompt %}}{{{{ {json.dumps(closing)} }}}}{{% endif %}}"
            )
        return text

    def joins(self, tokenizer: Tokenizer) -> bool:
        """Return False: no token counts are kept of turns that were tokenised apart."""
        return False

    def end_token(self, tokenizer: Tokenizer) -> tuple[str, int]:
        """Return the token that ends an answer, as text and id."""
        end = tokenizer.end_of_turn if self.end is None else self.end
        token = tokenizer.token_id(end)
        assert token is not None, "checked with the tokenizer"
        return end, token

    def lead(self, tokenizer: Tokenizer, first: bool = False) -> tuple[str, str]:
        """Return the end of a prompt's text, and what the model writes before an answer's first
        word."""
        prompt = self._prompt(self._messages(_PROBE[:1]), tokenizer)
        whole, _ = self._write(self._messages(_PROBE), prompt=False)
        begins = whole.find(_PROBE[1].text, len(prompt))
        ahead = whole[len(prompt) : begins] if whole.startswith(prompt) else ""
        return prompt, ahead

    def pieces(
        self, turns: Sequence[Turn], tokenizer: Tokenizer, *, prompt: bool, source: str = ""
    ) -> Iterator[Piece]:
        """Yield the text of a conversation, with what is trained of it.

        Raises BadSample naming `source` for turns that the template refuses or leaves out, and
        where the answers to train cannot be told from the rest.
        """
        if self.system is not None and not any(turn.role == "system" for turn in turns):
            turns = [Turn("system", self.system), *turns]
        messages = self._messages(turns)
        if any(mark in turn.text for turn in turns for mark in (_START, _STOP)):
            raise BadSample(source, "a turn has the characters U+FDD0 or U+FDD1, which are no text")
        try:
            text, marked = self._write(messages, prompt)
            lost = [turn.role for turn in turns if turn.text.strip() not in text]
            if lost:
                raise BadSample(
                    source, f"the chat template leaves out text of the {lost[0]}'s turn"
                )
            if prompt:
                yield Piece(self._prompt(messages, tokenizer))
                return
            spans = self._marked(turns, marked) if self._marks else None
            if spans is None:
                spans = self._added(turns, messages, text, tokenizer)
        except BadSample as error:
            raise BadSample(source, error.reason) from error
        except TemplateError as error:
            raise BadSample(source, f"the chat template refuses it: {error}") from error
        place = 0
        for start, stop in spans:
            yield Piece(text[place:start])
            yield Piece(text[start:stop], 1.0)
            place = stop
        yield Piece(text[place:])

    @property
    def _marks(self) -> bool:
        """Whether the template marks what is trained."""
        return bool(_MARKS.search(self.source))

    @staticmethod
    def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.text} for turn in turns]

    def _write(
        self, messages: Sequence[Mapping[str, str]], prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and where its generation blocks start and stop."""
        values = {**self.tokens, **self.variables, "tools": None, "documents": None}
        written = self._compiled.render(
            messages=[dict(message) for message in messages], add_generation_prompt=prompt, **values
        )
        text, spans, start = "", [], 0
        for part in re.split(f"([{_START}{_STOP}])", written):
            if part == _START:
                start = len(text)
            elif part == _STOP:
                spans.append((start, len(text)))
            else:
                text += part
        return text, spans

    def _prompt(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
        """Return the text of a prompt, without a space that is of the answer's first token."""
        text, _ = self._write(messages, prompt=True)
        return text[: len(text) - tokenizer.joined_space(text)]

    @staticmethod
    def _marked(turns: Sequence[Turn], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the generation blocks of the turns that are trained."""
        answers = [turn for turn in turns if turn.role == "assistant"]
        if all(turn.trained for turn in answers):
            return spans
        if len(spans) != len(answers):
            reason = (
                f"{len(answers)} answers in {len(spans)} generation blocks of the chat template"
            )
            raise BadSample("", f"{reason}: those to train cannot be told")
        return [span for span, turn in zip(spans, answers, strict=True) if turn.trained]

    def _added(
        self,
        turns: Sequence[Turn],
        messages: Sequence[Mapping[str, str]],
        text: str,
        tokenizer: Tokenizer,
    ) -> list[tuple[int, int]]:
        """Return what each trained answer adds to the text of the turns before it, up to its end
        token, or of its own text where the whole conversation has no end token there."""
        end, _ = self.end_token(tokenizer)
        spans = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.trained:
                continue
            start = len(prompt := self._prompt(messages[:number], tokenizer))
            whole, _ = self._write(messages[: number + 1], prompt=False)
            shared = commonprefix([whole, text])  # noqa: RUF071  # of characters
            closed, answer = shared.rfind(end, start), turn.text.strip()
            said = shared.rfind(answer, start)
            if not shared.startswith(prompt) or said < 0:
                raise BadSample(
                    "",
                    f"the chat template writes turn {number + 1} otherwise once it is answered or"
                    " followed; mark its answers by {% generation %}, or use supervise=last",
                )
            spans.append((start, said + len(answer) if closed < said else closed + len(end)))
        return spans

    @cached_property
    def _compiled(self) -> Compiled:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _no_date}
        return environment.from_string(self.source)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has, and what is pickled: not the compiled template."""
        return {key: value for key, value in vars(self).items() if key != "_compiled"}


class _Generation(Extension):
    """The tag `generation`, which marks the text of its block."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own name

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_STOP}"


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _no_date(_: str) -> None:
    raise TemplateError(
        "it writes the day of its use; give a date by template.variables (Llama 3.1: date_string)"
    )


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _literal(value: Any) -> str:
    """Return a plain value as Jinja writes it: JSON, but for null."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value)


def _of_folder(folder: Path, name: str | None) -> tuple[str, str]:
    """Return the text of a tokenizer folder's template, and where it stands, for messages.

    A file goes before tokenizer_config.json, as in Transformers.
    """
    wanted = name or "default"
    path = folder / FILE if wanted == "default" else folder / _NAMED / f"{wanted}.jinja"
    if path.is_file():
        return _read(path), str(path)
    path = folder / "tokenizer_config.json"
    found = json.loads(_read(path)).get("chat_template") if path.is_file() else None
    if isinstance(found, str):
        found = [{"name": "default", "template": found}]
    texts = {each["name"]: each["template"] for each in found or []}
    texts |= {file.stem: "" for file in (folder / _NAMED).glob("*.jinja")}
    if not texts.get(wanted):
        has = ", ".join(sorted(texts)) or "none"
        raise ValueError(
            f"template: tokenizer.path={folder} has no chat template {wanted}; it has {has}. Name a"
            " file by template.path, or another dialect"
        )
    return texts[wanted], f"{path}: chat_template"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template: {path} cannot be read ({error})") from error


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the names under which templates know special tokens, as `bos_token`."""
    path = folder / "tokenizer_config.json"
    config = json.loads(_read(path)) if path.is_file() else {}
    given = {f"{name}_token": config.get(f"{name}_token") for name in _TOKENS}
    texts = {
        name: token.get("content") if isinstance(token, Mapping) else token
        for name, token in given.items()
    }
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    for name, token in ids.items():
        if texts[name] is None and token is not None:
            texts[name] = tokenizer.decode([token], skip_special_tokens=False)
    return {name: text for name, text in texts.items() if text is not None}
