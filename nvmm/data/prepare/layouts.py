"""Retrieval sets on disk: BEIR's folder and M-BEIR's files, read alike.

What a set has is read when it is first asked for, and kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from nvmm.data.prepare import mbeir, retrieval_sets
from nvmm.data.prepare.mbeir import Item

Kind = TypeVar("Kind", bound=Item)
Judgements = dict[str, dict[str, int]]
"""Query id -> candidate id -> relevance above 0."""


class RetrievalSet(ABC):
    """Queries, the candidates that are ranked for them, and which of these are relevant.

    Reading raises ValueError, which names the file, for one that cannot be read, and names the key
    of the config for a file that is needed and not given.
    """

    @property
    @abstractmethod
    def documents(self) -> Mapping[str, Item]:
        """Candidate id -> candidate; `image` is a path."""

    @property
    @abstractmethod
    def questions(self) -> Mapping[str, Item]:
        """Query id -> query; `image` is a path."""

    @property
    @abstractmethod
    def judgements(self) -> Judgements:
        """Everything that is known to be relevant, so that it is no negative."""

    @property
    @abstractmethod
    def modalities(self) -> Mapping[str, str]:
        """Candidate id -> "text", "image" or "image,text"."""

    @property
    def relevant(self) -> Judgements:
        """The judgements that count in scores, of the queries that have any."""
        return self.judgements

    @property
    def asked(self) -> list[str]:
        """Ids of the queries that documents are ranked for; by default of those with judgements."""
        return list(self.relevant)

    @property
    def prompts(self) -> Mapping[str, str] | None:
        """Query id -> instruction, of judged queries; None where a set has no instructions."""
        return None


@dataclass(frozen=True)
class BeirFolder(RetrievalSet):
    """A folder in BEIR's layout. Its candidates may have a field `modality`.

    folder: has corpus.jsonl, queries.jsonl and qrels/. split: which qrels, as "train" for
    qrels/train.tsv; only jobs that need judgements need it.
    """

    folder: str
    split: str | None = None

    @cached_property
    def documents(self) -> Mapping[str, Item]:
        """The texts of corpus.jsonl, behind their titles."""
        with _reading():
            return _texts(retrieval_sets.read_corpus(self.folder))

    @cached_property
    def questions(self) -> Mapping[str, Item]:
        """The texts of queries.jsonl."""
        with _reading():
            return _texts(retrieval_sets.read_queries(self.folder))

    @cached_property
    def judgements(self) -> Judgements:
        """The qrels of the split."""
        with _reading():
            return retrieval_sets.read_qrels(self.folder, _given(self.split, "split"))

    @cached_property
    def modalities(self) -> Mapping[str, str]:
        """The field `modality` of corpus.jsonl; ValueError where a document has none."""
        with _reading():
            return retrieval_sets.read_modalities(self.folder)


@dataclass(frozen=True)
class MBeirFiles(RetrievalSet):
    """Files in M-BEIR's layout (`nvmm.data.prepare.mbeir`).

    folder: where the paths of pictures begin. pool: candidates, a task's own or the union of all.
    queries, instructions: queries and query_instructions.tsv; jobs on candidates alone need none.
    qrels: the judgements; None: each query's pos_cand_list.
    """

    folder: str
    pool: str
    queries: str | None = None
    instructions: str | None = None
    qrels: str | None = None

    @cached_property
    def documents(self) -> Mapping[str, Item]:
        """The candidates of the pool."""
        with _reading():
            return self._placed(mbeir.read_pool(self.pool))

    @cached_property
    def questions(self) -> Mapping[str, mbeir.Query]:
        """The queries."""
        with _reading():
            return self._placed(mbeir.read_queries(_given(self.queries, "queries")))

    @cached_property
    def judgements(self) -> Judgements:
        """The qrels, or the positives of the queries."""
        if self.qrels is None:
            named = {name: query.positives for name, query in self.questions.items()}
            return {name: dict.fromkeys(ids, 1) for name, ids in named.items() if ids}
        with _reading():
            return mbeir.read_qrels(self.qrels)

    @cached_property
    def relevant(self) -> Judgements:
        """The judgements without other sets' candidates of OVEN and InfoSeek."""
        return mbeir.judged(self.judgements)

    @property
    def modalities(self) -> Mapping[str, str]:
        """The pool's field `modality`."""
        return {name: item.modality for name, item in self.documents.items()}

    @cached_property
    def targets(self) -> dict[str, str]:
        """Query id -> the modality of its relevant candidates, of judged queries.

        Raises ValueError for judgements of queries or candidates that are not there.
        """
        require_known(self.relevant, self.questions, self.documents)
        return {
            query: self.documents[next(iter(found))].modality
            for query, found in self.relevant.items()
        }

    @cached_property
    def prompts(self) -> Mapping[str, str]:
        """The first instruction of a query's set, modality and target (UniIR draws in training).

        Raises ValueError as `targets`, and where the table has none.
        """
        with _reading():
            table = mbeir.read_instructions(_given(self.instructions, "instructions"))
        return {
            query: mbeir.instruction(table, query, self.questions[query].modality, target, None)
            for query, target in self.targets.items()
        }

    def _placed(self, items: Mapping[str, Kind]) -> dict[str, Kind]:
        """Return items whose pictures have whole paths."""
        return {
            name: item if item.image is None else replace(item, image=self._path(item.image))
            for name, item in items.items()
        }

    def _path(self, image: str) -> str:
        return str(Path(self.folder) / image)


def require_known(
    relevant: Mapping[str, Collection[str]],
    queries: Collection[str],
    candidates: Collection[str],
    what: str = "judged",
) -> None:
    """Raise ValueError for no queries, and for queries or candidates that are not there.

    relevant: query id -> candidate ids. what: its queries are called so.
    """
    strange = [query for query in relevant if query not in queries]
    unknown = [doc for found in relevant.values() for doc in found if doc not in candidates]
    if unknown or strange or not relevant:
        raise ValueError(
            f"of {len(relevant)} {what} queries {len(strange)} are not in the set: {strange[:5]};"
            f" {len(unknown)} of their candidates are not in it: {unknown[:5]}"
        )


def _texts(texts: Mapping[str, str]) -> dict[str, Item]:
    return {name: Item(text, None, "text") for name, text in texts.items()}


def _given(value: str | None, key: str) -> str:
    if value is None:
        raise ValueError(f"job.data.{key} is not given, and this needs it")
    return value


@contextmanager
def _reading() -> Iterator[None]:
    """Make a file that cannot be read a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror})") from error
