"""A checkpoint that ranks by P(True), exported so that vLLM and Transformers rank alike.

A classifier's one score is logit(True) - logit(False): its sigmoid is the normalised P(True) of
`job=rag`. As a folder of its own it is <Family>ForSequenceClassification, whose `score.weight` is
the difference of two rows of the output layer. From a plain folder vLLM takes that difference
itself, with the settings of `vllm_hf_overrides.json` (`--hf-overrides`). For both,
`vllm_score_template.jinja` (`--chat-template`) writes the ranking prompt around the messages of the
roles `query` and `document` that vLLM's /score and /rerank make.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nvmm.convert.chat_template import Conversation, jinja
from nvmm.convert.files import is_local
from nvmm.convert.formats import reward
from nvmm.convert.models import SavedModel
from nvmm.convert.sources import Source, read
from nvmm.data.samples.chat import CONTEXT, Turn
from nvmm.data.samples.contexts import Ranking
from nvmm.data.samples.decode import Limits
from nvmm.data.samples.passages import Passages
from nvmm.data.samples.record import Record, members_of

OVERRIDES = "vllm_hf_overrides.json"
TEMPLATE = "vllm_score_template.jinja"
_LANGUAGE = "nvmm.models.language.LanguageModel"
_HEAD = "output_layer.weight"
_EMBEDDING = "embedding.word_embeddings.weight"
_QUERY, _DOCUMENT = "\ue000", "\ue001"
"""Characters of no text, which stand for question and passage while a prompt is written."""


@dataclass(frozen=True)
class Ranker:
    """How a checkpoint ranks. form: its ranking prompt, and its words for right and wrong."""

    form: Ranking

    @classmethod
    def of(cls, saved: SavedModel) -> Ranker:
        """Return how a checkpoint was taught to rank: by the first ranking form of its data.

        Raises ValueError for data without one.
        """
        for options in _mappings(saved.state["config"].get("data")):
            if options.get("_target_") == f"{Ranking.__module__}.{Ranking.__name__}":
                return cls(_ranking(options))
        raise ValueError(
            f"--ranker: {saved.path} was trained without a form that ranks"
            " (nvmm.data.samples.contexts.Ranking)"
        )

    def words(self, talk: Conversation) -> tuple[int, int]:
        """Return the tokens of the words for irrelevant and relevant behind the ranking prompt.

        Raises ValueError for words that are not one token each: their scores are no difference of
        two logits.
        """
        turns = self.turns("Which?", "This.")
        prompt = len(talk.tokens(turns, prompt=True))
        words = (self.form.irrelevant, self.form.relevant)
        false, true = (talk.tokens([*turns, Turn("assistant", word)])[prompt:] for word in words)
        if false[1:] != true[1:] or false[0] == true[0]:
            raise ValueError(
                f"--ranker: {' and '.join(words)} must be one token each of {talk.folder}; they are"
                f" {false} and {true} with what ends an answer"
            )
        return false[0], true[0]

    def turns(self, question: str, passage: str) -> list[Turn]:
        """Return the ranking prompt's turns."""
        members = members_of({"question": question, "passages": [passage]}, source="--ranker")
        example = self.form(Record(members, {}, Limits()), [])
        assert example.contexts is not None, "a ranking has a passage"
        return [Turn(CONTEXT, example.contexts.text), *example.turns]

    def classifier(self, saved: SavedModel, talk: Conversation) -> SavedModel:
        """Return a language model as a reward model of one score: True's logit minus False's."""
        model = dict(saved.model)
        if model.get("_target_") != _LANGUAGE:
            raise ValueError(f"--ranker needs model._target_={_LANGUAGE}, not {model['_target_']}")
        model.pop("share_embeddings_and_output_weights", None)
        model |= {"_target_": reward.TARGET, "num_outputs": 1}
        source = _Difference(saved.source, self.words(talk))
        state = {**saved.state, "config": {**saved.state["config"], "model": model}}
        return SavedModel(saved.path, state, source)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a classifier's config.json: one label, whose score has a sigmoid."""
        label = self.form.relevant
        return {"id2label": {"0": label}, "label2id": {label: 0}, "problem_type": None}

    def write(self, folder: Path, talk: Conversation, architecture: str) -> None:
        """Write what vLLM needs beside a folder's model, and check that its prompt is ours.

        architecture: of config.json. Raises ValueError where the tokens of the prompt differ.
        """
        if talk.template is None:
            raise ValueError("--ranker: the checkpoint's template is not one of nvmm's own")
        classifier = architecture.endswith("ForSequenceClassification")
        if not classifier:
            # vLLM looks them up as the vocabulary spells them.
            vocabulary = [talk.tokenizer.piece(token) for token in self.words(talk)]
            overrides = {
                "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
                "classifier_from_token": vocabulary,
                "method": "from_2_way_softmax",
            }
            text = json.dumps(overrides, ensure_ascii=False)
            (folder / OVERRIDES).write_text(text + "\n", encoding="utf-8")
        text = self._prompt(talk, _QUERY, _DOCUMENT)
        if is_local(folder):
            text = self._begun(folder, talk, text)
        (folder / TEMPLATE).write_text(_score_template(text), encoding="utf-8")

    def _prompt(self, talk: Conversation, question: str, passage: str) -> str:
        """Return the ranking prompt as text, as the exported chat template writes it."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        assert talk.template is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(jinja(talk.template, talk.tokenizer, {}))
        messages = [
            {"role": turn.role, "content": turn.text} for turn in self.turns(question, passage)
        ]
        return template.render(messages=messages, add_generation_prompt=True)

    def _begun(self, folder: Path, talk: Conversation, text: str) -> str:
        """Return the prompt without the BOS that the exported tokenizer puts before every text.

        vLLM tokenises what the template writes as it does any text.
        """
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        bos = theirs.bos_token or ""
        expected = talk.tokens(self.turns("Which one?", "A passage."), prompt=True)
        for begun in dict.fromkeys((text, text.removeprefix(bos))):
            asked = begun.replace(_QUERY, "Which one?").replace(_DOCUMENT, "A passage.")
            if theirs(asked)["input_ids"] == expected:
                return begun
        raise ValueError(
            f"Transformers reads the ranking prompt with the tokenizer of {talk.folder} as"
            f" {theirs(text)['input_ids']}, the model was trained with {expected}"
        )


class _Difference:
    """A decoder's tensors with one score instead of the words' logits."""

    def __init__(self, source: Source, words: tuple[int, int]) -> None:
        self._source, self._words = source, words
        self._rows = _HEAD if _HEAD in source.spec else _EMBEDDING
        head = source.spec[self._rows][:1]
        kept = {name: tensor for name, tensor in source.spec.items() if name != _HEAD}
        self.spec: Mapping[str, Tensor] = {**kept, "head.weight": head}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's blocks; those of the head are one row."""
        if name != "head.weight":
            yield from self._source.blocks(name)
            return
        rows = read(self._source, self._rows)
        false, true = (rows[word].double() for word in self._words)
        yield (true - false)[None].to(rows.dtype)


def _ranking(options: Mapping[str, Any]) -> Ranking:
    keys = {key: value for key, value in options.items() if key != "_target_"}
    if isinstance(passages := keys.get("passages"), Mapping):
        keys["passages"] = Passages(**{k: v for k, v in passages.items() if k != "_target_"})
    return Ranking(**keys)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all mappings in a config, in their order."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _mappings(inner)


def _score_template(text: str) -> str:
    """Return a prompt as a Jinja template of vLLM's query and document."""
    roles = {_QUERY: "query", _DOCUMENT: "document"}
    parts = []
    for part in re.split(f"({'|'.join(roles)})", text):
        if part in roles:
            chosen = f'messages | selectattr("role", "eq", "{roles[part]}") | first'
            parts.append(f"{{{{- ({chosen}).content -}}}}")
        elif part:
            parts.append(f"{{{{- {json.dumps(part, ensure_ascii=False)} -}}}}")
    return "".join(parts)
