"""Questions with ranked passages become RankRAG's retrieval data (arXiv:2407.02485, section 4).

A ranking record is {"question", "passages", "relevant", "messages"}: passages in the order of the
ranking, the places from 0 of those that are relevant, and the earlier turns of a dialogue. A
question of one passage is context ranking, of several retrieval-augmented ranking.

    answering   retrieval-augmented QA: the gold passage and others of a ranking as contexts
    relevance   retrieval-augmented ranking: the same passages, relevant = contains an answer
    pairs       context ranking: one passage a record, gold ones and hard negatives
    ms_marco, ms_marco_triples      context ranking of MS MARCO

Passages are in the ranking's order, gold first where the ranking lacks it; the builder shuffles.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.data.prepare.conversations import Record, record
from nvmm.data.prepare.records import LeftOut

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Ranked:
    """A question, its answers, and its passages in the order of a ranking.

    gold: passages that are known to answer. others: the rest, best first.
    """

    question: str
    answers: list[str]
    gold: list[str]
    others: list[str]

    def chosen(self, count: int) -> list[str]:
        """Return the first gold passage, and the best others up to `count` together."""
        return [self.gold[0], *self.others[: count - 1]]


def read_dpr(items: Iterable[Mapping[str, Any]], left_out: LeftOut) -> Iterator[Ranked]:
    """Yield the questions of DPR's files.

    Files for retrievers have `positive_ctxs`, `hard_negative_ctxs` (BM25's best that hold no
    answer) and `negative_ctxs`, which are drawn at random and not read. Files for readers have one
    ranking, `ctxs` (Pyserini: `contexts`); its gold passage is then the best that holds an answer.

    left_out: is told of questions without a gold passage: nothing is trained on contexts that lack
        the answer.

    Raises ValueError naming the question's number, from 1.
    """
    for number, item in enumerate(items, 1):
        where = f"question {number}"
        question, answers = item.get("question"), item.get("answers")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where} must have a text, got {question!r}")
        if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
            raise ValueError(f"{where}: answers must be a list of texts, got {answers!r}")
        if "positive_ctxs" in item:
            gold = _texts(item["positive_ctxs"], where)
            others = _texts(item.get("hard_negative_ctxs") or [], where)
        elif (ranking := item.get("ctxs", item.get("contexts"))) is not None:
            found = _texts(ranking, where)
            gold = [text for text in found if has_answer(text, answers)][:1]
            others = [text for text in found if text not in gold]
        else:
            raise ValueError(f"{where} has none of positive_ctxs, ctxs, contexts")
        if not gold:
            left_out(f"{where}: no passage is gold")
            continue
        yield Ranked(question, answers, gold, [text for text in others if text not in gold])


def has_answer(passage: str, answers: Iterable[str]) -> bool:
    """Return whether a passage holds the words of an answer, one after another, in any case.

    DPR's definition, but for single punctuation marks, which count as words there.
    """
    words = _words(passage)
    for answer in answers:
        wanted = _words(answer)
        starts = range(len(words) - len(wanted) + 1) if wanted else ()
        if any(words[start : start + len(wanted)] == wanted for start in starts):
            return True
    return False


def answering(ranked: Iterable[Ranked], count: int, left_out: LeftOut) -> Iterator[Record]:
    """Yield a conversation record a question, with `count` contexts: gold and the best others."""
    for one in _enough(ranked, count, left_out):
        asked = [{"role": "user", "content": one.question}]
        try:
            yield record(asked, one.answers, one.chosen(count))
        except ValueError as error:
            raise ValueError(f"{one.question!r}: {error}") from error


def relevance(ranked: Iterable[Ranked], count: int, left_out: LeftOut) -> Iterator[Record]:
    """Yield a ranking record a question: `count` passages, those relevant that hold an answer.

    A question of which no passage holds an answer, not even the gold one, is left out.
    """
    for one in _enough(ranked, count, left_out):
        passages = one.chosen(count)
        relevant = [place for place, text in enumerate(passages) if has_answer(text, one.answers)]
        if not relevant:
            left_out(f"no passage of {one.question!r} holds an answer")
            continue
        yield {"question": one.question, "passages": passages, "relevant": relevant}


def pairs(ranked: Iterable[Ranked], negatives: int) -> Iterator[Record]:
    """Yield ranking records of one passage: the first gold one, and up to `negatives` others.

    An other passage that holds an answer is no negative.
    """
    for one in ranked:
        wrong = (text for text in one.others if not has_answer(text, one.answers))
        yield pair(one.question, one.gold[0], relevant=True)
        for text in itertools.islice(wrong, negatives):
            yield pair(one.question, text, relevant=False)


def pair(
    question: str,
    passage: str,
    *,
    relevant: bool,
    messages: Sequence[Mapping[str, str]] = (),
) -> Record:
    """Return the ranking record of a question and one passage. messages: the turns before it."""
    made: Record = {
        "question": question,
        "passages": [passage],
        "relevant": [0] if relevant else [],
    }
    return {**made, "messages": list(messages)} if messages else made


def ms_marco_triples(path: str | Path) -> Iterator[Record]:
    """Yield a relevant and an irrelevant pair of each line of MS MARCO's triples of texts.

    Lines are query, relevant passage, irrelevant one (found by BM25), with tabs between them.
    """
    for query, relevant, irrelevant in _rows(path, 3):
        yield pair(query, relevant, relevant=True)
        yield pair(query, irrelevant, relevant=False)


def ms_marco(
    collection: str | Path,
    queries: str | Path,
    qrels: str | Path,
    negatives: Mapping[str, Sequence[str]],
    count: int,
) -> Iterator[Record]:
    """Yield the pairs of MS MARCO's own files: each judged passage, and `count` hard negatives.

    collection, queries: lines of id and text. qrels: lines of query, 0, passage, relevance.
    negatives: query id -> ids of mined passages, best first; those that are judged relevant are
        none. Only passages that are needed are held in memory.

    Raises ValueError naming a query or passage that is not there.
    """
    judged: dict[str, list[str]] = {}
    for query, _, passage, relevance_ in _rows(qrels, 4):
        if relevance_ != "0":
            judged.setdefault(query, []).append(passage)
    wrong = {
        query: [name for name in negatives.get(query, ()) if name not in relevant][:count]
        for query, relevant in judged.items()
    }
    wanted = {name for names in (*judged.values(), *wrong.values()) for name in names}
    texts = {name: text for name, text in _rows(collection, 2) if name in wanted}
    asked = {name: text for name, text in _rows(queries, 2) if name in judged}
    lacking = [*sorted(wanted - texts.keys()), *sorted(judged.keys() - asked.keys())]
    if lacking:
        raise ValueError(
            f"{len(lacking)} ids of {qrels} or of the negatives are in neither {collection} nor"
            f" {queries}: {lacking[:5]}"
        )
    for query, relevant in judged.items():
        for name in relevant:
            yield pair(asked[query], texts[name], relevant=True)
        for name in wrong[query]:
            yield pair(asked[query], texts[name], relevant=False)


def _rows(path: str | Path, width: int) -> Iterator[list[str]]:
    """Yield the rows of a file with tabs; ValueError naming the line of another width."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            row = line.rstrip("\r\n").split("\t")
            if len(row) != width:
                raise ValueError(f"{path}:{number}: {len(row)} columns, expected {width}")
            yield row


def _enough(ranked: Iterable[Ranked], count: int, left_out: LeftOut) -> Iterator[Ranked]:
    """Yield the questions that have `count` passages."""
    if count < 2:
        raise ValueError(f"passages={count} must be at least 2: gold and others")
    for one in ranked:
        if len(one.others) < count - 1:
            left_out(f"{one.question!r} has {len(one.others) + 1} passages, expected {count}")
            continue
        yield one


def _texts(contexts: Any, where: str) -> list[str]:
    """Return the texts of passages, behind their titles, each once."""
    if not isinstance(contexts, list):
        raise ValueError(f"{where}: passages must be a list, got {contexts!r}")
    texts = []
    for context in contexts:
        text = context.get("text") if isinstance(context, Mapping) else context
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a passage must have a text, got {context!r}")
        title = context.get("title") if isinstance(context, Mapping) else None
        texts.append(f"{title}\n{text}" if title else text)
    return list(dict.fromkeys(texts))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFD", text).lower())
