"""Steps that score answers, and make preferences of them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from nvmm.config.choices import require
from nvmm.evaluation.instruction_following import follows
from nvmm.jobs.parts import Parts, recorded
from nvmm.jobs.synthesis.records import (
    Failed,
    Made,
    Making,
    Record,
    Request,
    answer_ids,
    child,
    conversation_of,
    good,
    source,
    turns,
)
from nvmm.jobs.synthesis.step import FORMAT, Desk, Local, Step

Worse = Literal["lowest", "drawn"]
_SCORE = re.compile(r"([A-Za-z_]+)\s*:\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Verdict(BaseModel):
    """Which of two answers is better."""

    model_config = ConfigDict(extra="forbid")
    better: Literal["first", "second", "tie"]


@dataclass(frozen=True, kw_only=True)
class Verify(Local):
    """Scores every answer by a verifier: 1 where it is right, else 0, as `scores.verifier`.

    Verifiable instructions (`instruction_id_list` and `kwargs`) must all be followed; where they
    bind `all` answers, the earlier ones of the dialogue too. Without them, the last number of an
    answer must be that of the field `reference`.

    reference: name of that field.
    """

    reference: str = "reference"

    def change(self, item: Any, desk: Desk) -> Made:
        """Score the answers; Failed for a record that has nothing to verify."""
        scores = [self._score(item, answer["text"]) for answer in _answers(item)]
        return Made([_scored(desk, item, "verifier", scores, verifier=self._what(item))])

    def _what(self, item: Record) -> Any:
        return item.get("instruction_id_list") or self.reference

    def _score(self, item: Record, text: str) -> float:
        names = item.get("instruction_id_list")
        if names:
            texts = [text]
            if item.get("binding") == "all":
                before = item.get("messages") or []
                texts += [turn["content"] for turn in before if turn["role"] == "assistant"]
            rules = list(zip(names, item["kwargs"], strict=True))
            return float(all(follows(one, *rule) for one in texts for rule in rules))
        if item.get(self.reference) is None:
            raise Failed(f"{item['id']} has neither instructions nor {self.reference} to verify")
        given, right = last_number(text), last_number(str(item[self.reference]))
        if right is None:
            raise Failed(f"{item['id']}: {self.reference} has no number")
        return float(given is not None and math.isclose(given, right, rel_tol=1e-9))


def last_number(text: str) -> float | None:
    """Return the last number in a text, None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True, kw_only=True)
class Reward(Step):
    """Scores every answer by a reward model, as `scores.reward`.

    A judge is sent the conversation with the answer, and replies with `attribute:number`, once or
    several times; the score is their weighted sum. Or the scores are those that job=reward gave to
    the answers as `Write` has written them (form=answers), of these very records.

    Args:
        judge: its name among the generators; null: `scores` is given.
        weights: attribute -> weight of a judge's reply; null: the mean of all.
        scores: folder of job=reward's output; null: `judge` is given.
    """

    judge: str | None = None
    weights: Mapping[str, float] | None = None
    scores: str | None = None

    def __post_init__(self) -> None:
        if (self.judge is None) == (self.scores is None):
            raise ValueError(
                f"judge={self.judge} and scores={self.scores}: give one of them, and not both"
            )
        if self.scores is not None and self.weights is not None:
            raise ValueError("weights are of a judge's reply; job=reward has its own job.weights")

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [] if self.judge is None else [self.judge]

    def items(self, records: list[Record], desk: Desk) -> list[Any]:
        """Return the records; of `scores`, [record, the reward of each answer or an error]."""
        if self.scores is None:
            return list(records)
        rows, judge = _rewards(self.scores)
        missing = f"{self.scores} has no scores of it"
        return [
            [record, [rows.get(name, missing) for name in answer_ids(record)], judge]
            for record in records
            if _answers(record)
        ]

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask for the scores of all answers, or take those that are there."""
        if self.judge is None:
            item, scores, judge = item
            for name, score in zip(answer_ids(item), scores, strict=True):
                if isinstance(score, str):
                    raise Failed(f"{name}: {score}")
            return Made([_scored(desk, item, "reward", scores, judged=judge)])
        messages = conversation_of(item)
        requests = [
            Request(
                self.judge, turns([*messages, {"role": "assistant", "content": answer["text"]}])
            )
            for answer in _answers(item)
        ]
        answers = good((yield requests))
        scores = [self._score(answer.reply.text) for answer in answers]
        entries = {"judged": list(map(source, answers))}
        return Made([_scored(desk, item, "reward", scores, **entries)])

    def _score(self, text: str) -> float:
        found = {name: float(number) for name, number in _SCORE.findall(text)}
        if not found:
            raise Failed(f"{self.judge}: no attribute:number in {text[:80]!r}")
        if self.weights is None:
            return fmean(found.values())
        missing = [name for name in self.weights if name not in found]
        if missing:
            raise Failed(f"{self.judge}: no {missing[0]} in {text[:80]!r}")
        return sum(weight * found[name] for name, weight in self.weights.items())


@dataclass(frozen=True, kw_only=True)
class Compare(Step):
    """Compares answers two by two, in both orders; a pair is kept where the judge says the same.

    A new record has the better answer with `scores.judge` 1, then the worse one with 0.

    judge: its name among the generators. prompt: asks which is better; it is given `messages`,
    `first` and `second`. pairs: how many are drawn of each record's different answers.
    """

    judge: str
    prompt: str = "compare"
    pairs: int = 1

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")

    @property
    def generators(self) -> list[str]:
        """The names of the generators that it asks."""
        return [self.judge]

    @property
    def asks(self) -> list[str]:
        """The names of the prompts that it uses."""
        return [self.prompt, FORMAT]

    def make(self, item: Any, desk: Desk) -> Making:
        """Ask twice about each pair."""
        answers = {answer["text"]: answer for answer in _answers(item)}
        couples = list(itertools.combinations(answers.values(), 2))
        if not couples:
            return Made([], [f"{item['id']}: no two different answers"])
        chosen = desk.draw(item["id"]).sample(couples, min(self.pairs, len(couples)))
        values = {"messages": conversation_of(item)}
        requests = [
            desk.ask(
                self.judge,
                self.prompt,
                values | {"first": first["text"], "second": second["text"]},
                Verdict,
            )
            for pair in chosen
            for first, second in (pair, pair[::-1])
        ]
        verdicts = good((yield requests))
        records, dropped = [], []
        for number, pair in enumerate(chosen):
            ahead, behind = verdicts[2 * number], verdicts[2 * number + 1]
            said = (ahead.value.better, behind.value.better)
            if said not in (("first", "second"), ("second", "first")):
                dropped.append(f"{item['id']}: {self.judge} says {said[0]}, then {said[1]}")
                continue
            order = pair if said[0] == "first" else pair[::-1]
            kept = [
                {**one, "scores": {**one["scores"], "judge": float(1 - place)}}
                for place, one in enumerate(order)
            ]
            entries = {"judged": [source(ahead), source(behind)]}
            records.append(child(desk.step, [item], {"answers": kept}, number, **entries))
        return Made(records, dropped)


@dataclass(frozen=True, kw_only=True)
class Pair(Local):
    """Preferences of scored answers: `chosen` and `rejected`, with their scores as rewards.

    Args:
        by: the score: verifier, reward or judge.
        chosen_at_least: the least score of a chosen answer; null: any.
        margin: the rejected one's score is less by at least so much, and less in any case.
        rejected: the `lowest` of those, or `drawn`.
    """

    by: str
    chosen_at_least: float | None = None
    margin: float = 0.0
    rejected: Worse = "lowest"

    def __post_init__(self) -> None:
        require("rejected", self.rejected, Worse)

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the pair of a record, or why there is none."""
        scored = [(_score_of(item, answer, self.by), answer) for answer in _answers(item)]
        best, chosen = max(scored, key=lambda pair: pair[0])
        if self.chosen_at_least is not None and best < self.chosen_at_least:
            return Made([], [f"{item['id']}: the best {self.by} is {best}"])
        worse = [
            (score, answer)
            for score, answer in scored
            if score < best and score <= best - self.margin and answer["text"] != chosen["text"]
        ]
        if not worse:
            return Made([], [f"{item['id']}: no answer is worse by {self.margin} in {self.by}"])
        if self.rejected == "lowest":
            low, rejected = min(worse, key=lambda pair: pair[0])
        else:
            low, rejected = desk.draw(item["id"]).choice(worse)
        fields = {
            "messages": conversation_of(item),
            "prompt": None,
            "answers": None,
            "chosen": chosen["text"],
            "rejected": rejected["text"],
            "chosen_reward": best,
            "rejected_reward": low,
        }
        good, bad = _said(chosen), _said(rejected)
        return Made([child(desk.step, [item], fields, by=self.by, chosen=good, rejected=bad)])


@dataclass(frozen=True, kw_only=True)
class Best(Local):
    """The answer of the highest score as the last turn of `messages`, for SFT.

    by: the score; null: the first answer. at_least: the least score of one that is kept.
    """

    by: str | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.by is None and self.at_least is not None:
            raise ValueError(f"at_least={self.at_least} is of a score: name it with by")

    def change(self, item: Any, desk: Desk) -> Made:
        """Return the conversation, or why there is none."""
        answers = _answers(item)
        best, score = answers[0], None
        if self.by is not None:
            scores = [_score_of(item, answer, self.by) for answer in answers]
            score = max(scores)
            best = answers[scores.index(score)]
            if self.at_least is not None and score < self.at_least:
                return Made([], [f"{item['id']}: the best {self.by} is {score}"])
        last = {"role": "assistant", "content": best["text"]}
        fields = {
            "messages": [*conversation_of(item), last],
            "prompt": None,
            "answers": None,
        }
        return Made([child(desk.step, [item], fields, best=_said(best))])


def _rewards(folder: str) -> tuple[dict[str, float | str], dict[str, str]]:
    """Return key -> reward, or what is wrong, of job=reward's output, and its checkpoint's digest.

    Raises ValueError for another job's output, and for samples of several texts.
    """
    parts = Parts(Path(folder).expanduser())
    table = parts.read()
    if "rewards" not in table.column_names:
        raise ValueError(f"scores={folder} is no output of job=reward")
    rows: dict[str, float | str] = {}
    for row in table.select(["key", "rewards", "error"]).to_pylist():
        if row["error"] is None and len(row["rewards"]) != 1:
            raise ValueError(
                f"scores={folder}: {row['key']} has {len(row['rewards'])} texts; score what Write"
                " writes as form=answers"
            )
        rows[row["key"]] = row["error"] or row["rewards"][0]
    weights = recorded(parts.manifest["identity"], folder, "checkpoint", "weights")
    return rows, {"checkpoint": weights}


def _answers(item: Record) -> list[Record]:
    answers = item.get("answers")
    if not answers:
        raise ValueError(f"record {item['id']} has no answers: put a step Respond before")
    return list(answers)


def _said(answer: Record) -> Record:
    """Return what a lineage says of an answer that was chosen or rejected."""
    return {name: answer[name] for name in ("generator", "sample", "scores")}


def _score_of(item: Record, answer: Record, by: str) -> float:
    if by not in answer["scores"]:
        known = ", ".join(sorted(answer["scores"])) or "none"
        raise ValueError(f"record {item['id']}: an answer has no score {by!r}; it has {known}")
    return float(answer["scores"][by])


def _scored(desk: Desk, item: Record, name: str, scores: Sequence[float], **entry: Any) -> Record:
    """Return the record with a score of each answer."""
    answers = [
        {**answer, "scores": {**answer["scores"], name: score}}
        for answer, score in zip(_answers(item), scores, strict=True)
    ]
    return child(desk.step, [item], {"answers": answers}, scores=list(scores), **entry)
