"""Sets of conversations with contexts: ChatRAG Bench, and one's own in the same layout.

Liu et al. 2024, "ChatQA" (arXiv:2401.10225), and the files and scripts of nvidia/ChatRAG-Bench: F1
for all sets but ConvFinQA, refusals replaced before F1 where turns may be unanswerable, and for
those sets the accuracy on unanswerable and answerable turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from nvmm.data.prepare.conversations import PASSAGE, check_passage
from nvmm.evaluation.arithmetic import convfinqa_accuracy
from nvmm.evaluation.benchmark import Metric, Prediction, Result, summarize, table
from nvmm.evaluation.items import Item, Items, Listed, TextBenchmark, read_records
from nvmm.evaluation.refusals import REFUSALS, UNANSWERABLE, replaced, unanswerable_accuracy
from nvmm.evaluation.squad import squad_f1

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored


@dataclass(frozen=True)
class ConversationSet:
    """One file of conversations, and how it is asked and scored.

    Args:
        file: a .json list or .jsonl below the benchmark's folder. A record has `messages` up to the
            question, `answers` or `answer`, and `ctxs` ([{title, text}]), or `contexts` (texts, or
            tables as the form of training reads them); `exe_answer` is ConvFinQA's number.
        instruction: put before the first user's turn, or before the latest one (`latest`).
        num_contexts: the first so many contexts; None: all.
        metric: f1, or ConvFinQA's accuracy.
        unanswerable: turns may have no answer: refusals become ChatQA's sentence before F1, and the
            accuracies are taken. A turn is unanswerable where its first answer is that sentence, or
            `answerable` is false. An answerable turn whose record says `gold_retrieved: false` is
            left out of the accuracies.
        drop_refusal: take the sentence out of the accepted answers (INSCIT).
        kind: name that it is reported under; None: the set's.
    """

    file: str
    instruction: str | None = None
    latest: bool = False
    num_contexts: int | None = 5
    metric: Literal["f1", "convfinqa"] = "f1"
    unanswerable: bool = False
    drop_refusal: bool = False
    kind: str | None = None


@dataclass(frozen=True)
class Conversations(TextBenchmark):
    """Sets of conversations: the mean of each set, and the mean over sets.

    Args:
        folder: where the sets' files are.
        sets: name -> set.
        only: names of the sets to ask; None: all of them.
        exclude: kinds that the second average leaves out.
        num_messages: the last so many messages are asked; None: all.
        passage: the words of a passage of `ctxs`, with {title} and {text}, as the released scripts
            have them; the text alone stands for one without a title.
        refusals: phrases that make an answer a refusal.
        max_new_tokens: tokens of the longest answer.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    folder: str
    sets: Mapping[str, ConversationSet]
    only: Sequence[str] | None = None
    exclude: Sequence[str] = ("hybridial",)
    num_messages: int | None = 7
    passage: str = PASSAGE
    refusals: Sequence[str] = REFUSALS
    max_new_tokens: int = 128
    name: str = "chatrag"
    builder: Mapping[str, Any] = field(default_factory=dict)
    _not_retrieved: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_passage(self.passage)

    @property
    def where(self) -> str:
        """The key that names the questions, and its value."""
        return f"benchmark.folder={self.folder}"

    def items(self, model: Restored) -> Items:
        """Return the turns of all sets that are asked."""
        unknown = sorted({*(self.only or ())} - self.sets.keys())
        if unknown or not self.sets:
            raise ValueError(
                f"benchmark.only={unknown} are no sets; benchmark.sets has {', '.join(self.sets)}"
            )
        records = []
        for name in self.sets if self.only is None else self.only:
            path = Path(self.folder).expanduser() / self.sets[name].file
            read = read_records(path, f"benchmark.sets.{name}.file")
            records += [(f"{path}:{number}", name, record) for number, record in enumerate(read)]
        # Of all records: this rank does not ask all of them, and some were answered before.
        self._not_retrieved.update(
            source for source, _, record in records if record.get("gold_retrieved") is False
        )
        return Listed(records, self._item)

    def _item(self, source: str, name: str, record: Mapping[str, Any]) -> Item:
        asked = self.sets[name]
        answers = _answers(record, source)
        if asked.drop_refusal:
            answers = [answer for answer in answers if answer != UNANSWERABLE]
        conversation = contract(record, source, asked, self.num_messages, self.passage)
        metric: Metric = partial(_f1, self.refusals if asked.unanswerable else ())
        if asked.metric == "convfinqa":
            executed = record.get("exe_answer")
            answers = answers if executed is None else [str(executed), *answers]
            metric = partial(convfinqa_accuracy, _latest(record))
        kind = asked.kind or name
        return Item(source, source, kind, answers, metric, self.max_new_tokens, record=conversation)

    def result(self, predictions: Sequence[Prediction], folder: Path) -> Result:
        """Return each set's mean, the mean over sets, that without `exclude`, and accuracies."""
        summary = summarize(predictions)
        means = {kind: group["score"] for kind, group in summary["kinds"].items()}
        averages = {"average": fmean(means.values())}
        rest = [mean for kind, mean in means.items() if kind not in self.exclude]
        if rest and len(rest) < len(means):
            averages[f"average_without_{'_'.join(self.exclude)}"] = fmean(rest)
        accuracies = self._accuracies(predictions)
        lines = [
            *(f"{name:<32} {value:8.4f}" for name, value in averages.items()),
            *(
                f"{kind} {name:<{31 - len(kind)}} {value:8.4f}"
                for kind, values in accuracies.items()
                for name, value in values.items()
            ),
        ]
        text = "\n".join([table(summary, "all turns"), *lines])
        more = {"averages": averages, "unanswerable": accuracies}
        return Result(summary | more, {f"{self.name}_score": {**averages, **means}} | more, text)

    def _accuracies(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
        """Return the accuracies of sets with unanswerable turns, where both kinds were asked."""
        kinds = {s.kind or name for name, s in self.sets.items() if s.unanswerable}
        found = {}
        for kind in sorted(kinds):
            asked = [
                (line.prediction, line.answers[0] != UNANSWERABLE)
                for line in predictions
                if line.kind == kind and line.source not in self._not_retrieved
            ]
            if len({answerable for _, answerable in asked}) == 2:
                found[kind] = unanswerable_accuracy(asked, self.refusals)
        return found


def _f1(refusals: Sequence[str], *, prediction: str, answers: Sequence[str]) -> float:
    """Return ChatRAG Bench's F1; blank answers count for nothing."""
    guess = replaced(prediction, refusals)
    return squad_f1("spaced", prediction=guess, answers=[a for a in answers if a.strip()])


def contract(
    record: Mapping[str, Any],
    source: str,
    asked: ConversationSet,
    num_messages: int | None = None,
    passage: str = PASSAGE,
) -> dict[str, Any]:
    """Return a record of ChatRAG Bench as a conversation with contexts that a form of ours reads.

    Raises ValueError naming the record for messages or contexts that are none.
    """
    messages = record.get("messages")
    plain = isinstance(messages, list) and all(
        isinstance(m, Mapping) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )
    if not plain or not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{source}: messages must be turns of role and content, the last a user's")
    messages = [dict(message) for message in messages[-num_messages if num_messages else 0 :]]
    contexts = record.get("contexts")
    if contexts is None:
        contexts = record.get("ctxs") or []
        if not isinstance(contexts, list) or not all(map(_is_passage, contexts)):
            raise ValueError(f"{source}: ctxs must be a list of objects with a text")
        contexts = [
            context["text"] if context.get("title") is None else passage.format_map(context)
            for context in contexts
        ]
    if not isinstance(contexts, list):
        raise ValueError(f"{source}: contexts must be a list, got {contexts!r}")
    if asked.instruction and asked.latest:
        messages[-1]["content"] = f"{asked.instruction} {messages[-1]['content']}"
    found: dict[str, Any] = {"messages": messages, "contexts": contexts[: asked.num_contexts]}
    if asked.instruction and not asked.latest:
        found["instruction"] = asked.instruction
    return found


def _is_passage(value: Any) -> bool:
    """Return whether it has a text, and a title that is one or missing."""
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        return False
    return isinstance(value.get("title"), str | None)


def _latest(record: Mapping[str, Any]) -> str:
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    return str(last.get("content", "")) if isinstance(last, Mapping) else ""


def _answers(record: Mapping[str, Any], source: str) -> list[str]:
    """Return the accepted answers of a record, in its order; none of them is blank."""
    if record.get("answerable") is False:
        return [UNANSWERABLE]
    value = record.get("answers", record.get("answer"))
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, str | int | float) for v in values):
        raise ValueError(f"{source}: answers must be texts or numbers, got {values!r}")
    return [str(v) for v in values if str(v).strip()]
