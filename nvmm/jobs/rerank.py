"""Reranking: the best candidates of each query in the order of P(True) by a generative model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from nvmm.data.prepare.layouts import RetrievalSet, require_known
from nvmm.data.prepare.mbeir import Item
from nvmm.data.samples.chat import IMAGE_MARKER
from nvmm.data.samples.record import plain_question
from nvmm.evaluation.ranking import mean_scores
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest, file_digest, items_digest, pictures_digest
from nvmm.jobs.parts import Parts
from nvmm.jobs.prompts import batches, build, continuation_tokens
from nvmm.jobs.search import rankings_of, read_rankings

_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS = ("query", "candidate", "instruction")


@dataclass(frozen=True)
class Rerank(Job):
    """Ask a checkpoint of each query and each of its best candidates whether they fit.

    A candidate's score is the probability of the first continuation among all of them: P(True) of
    True and False, as MM-Embed reranks (arXiv:2411.02571). A row has `query_id`, `ids` (the scored
    candidates best first, then the others in their order), `scores` (null for the others) and
    `error` (why a candidate has no score, else null). metrics.json has the means over the judged
    queries after reranking, and before it (`..._before`).

    Args:
        data: the retrieval set that was searched.
        ranking: output of `search`, or of another `rerank`.
        prompt: {query} and {candidate} stand for `<image>` and a line break where there is a
            picture, and the text; {instruction}, which may be left out, for M-BEIR's instruction of
            the query.
        top: candidates of a query to score, the best ranked.
        continuations: texts that may follow; their tokens follow the prompt's as they are.
        max_candidate_tokens: longest text of a candidate, which loses its end; None: any. A pair
            that does not fit into the model has no score.
        batch_size: pairs of a forward pass.
        part_size: queries of a part file.
    """

    data: RetrievalSet
    ranking: str
    prompt: str
    top: int = 10
    continuations: Sequence[str] = ("True", "False")
    max_candidate_tokens: int | None = None
    batch_size: int = 8
    part_size: int = 32
    name: str = "rerank"

    def __post_init__(self) -> None:
        named = _FIELD.findall(self.prompt)
        unknown = sorted(set(named) - set(_FIELDS))
        if unknown or named.count("query") != 1 or named.count("candidate") != 1:
            raise ValueError(
                f"job.prompt={self.prompt!r} must have {{query}} and {{candidate}} once each, and"
                f" may have {{instruction}}; it has {', '.join(named) or 'nothing'}"
            )
        if "\\n" in self.prompt:
            raise ValueError(
                f"job.prompt={self.prompt!r} has a backslash and an n, no line break; in a shell"
                " write it as job.prompt=$'\"...\\n...\"'"
            )
        for key, least, value in (
            ("top", 1, self.top),
            ("max_candidate_tokens", 1, self.max_candidate_tokens),
            ("continuations", 2, len(self.continuations)),
        ):
            if value is not None and value < least:
                raise ValueError(f"job.{key}={value} must be at least {least}")

    def prepare(self, model: Restored | None) -> Work:
        """Open ranking and set. Raises ValueError for a ranking of another set, and an embedder."""
        model = self.require(model)
        model.require_answers()
        rankings = read_rankings(self.ranking)
        require_known(rankings, self.data.questions, self.data.documents, "ranked")
        items = items_digest(self.data.documents)
        identity = Parts(Path(self.ranking).expanduser()).manifest["identity"]
        if identity["inputs"]["items"] != items:
            raise ValueError(f"job.ranking={self.ranking} ranks other documents than job.data's")
        if lacking := [query for query in self.data.relevant if query not in rankings]:
            raise ValueError(f"{self.ranking} lacks {len(lacking)} judged queries: {lacking[:5]}")
        pairs = _Pairs(self, rankings, model)
        tokens = continuation_tokens(model.tokenizer, self.continuations)
        room = model.max_sequence_length - max(map(len, tokens))

        def rows(numbers: range) -> pa.Table:
            wanted = [pair for number in numbers for pair in pairs.of(number)]
            samples, errors = build(pairs.members, wanted, model.builder.prompt, room)
            scores: dict[int, float] = {}
            for chosen in batches(samples, self.batch_size):
                table = model.score_continuations([samples[pair] for pair in chosen], tokens)
                scores |= dict(zip(chosen, table.softmax(1)[:, 0].tolist(), strict=True))
            records = []
            for number in numbers:
                query, own = pairs.queries[number], pairs.of(number)
                ids, values = reordered(rankings[query], [scores.get(pair) for pair in own])
                error = next((errors[pair] for pair in own if pair in errors), None)
                records.append({"query_id": query, "ids": ids, "scores": values, "error": error})
            return pa.Table.from_pylist(records, _SCHEMA)

        ranking = file_digest(Path(self.ranking).expanduser() / "manifest.json")
        inputs = {"items": items, "ranking": ranking, "pairs": pairs.digest()}
        return Work(len(rankings), inputs, rows)

    def metrics(self, rows: pa.Table) -> dict[str, float]:
        """Return the scores of the rankings after and before."""
        before = mean_scores(read_rankings(self.ranking), self.data.relevant)
        after = mean_scores(rankings_of(rows), self.data.relevant)
        return after | {f"{name}_before": value for name, value in before.items()}


class _Pairs:
    """Each query with each of its best candidates, numbered: those of a query follow each other.

    queries: ids of the queries, in the ranking's order.
    """

    def __init__(self, job: Rerank, rankings: Mapping[str, list[str]], model: Restored) -> None:
        self._job, self._rankings, self._model = job, rankings, model
        self.queries = list(rankings)
        self._instructions: Mapping[str, str] | None = {}
        if "instruction" in _FIELD.findall(job.prompt):
            self._instructions = job.data.prompts
            if self._instructions is None:
                raise ValueError("job.prompt has {instruction}, and the set has none")

    def of(self, number: int) -> range:
        """Return the pairs of the query of this number."""
        first = number * self._job.top
        return range(first, first + min(self._job.top, len(self._rankings[self.queries[number]])))

    def members(self, pair: int) -> dict[str, Any]:
        """Return a pair as a question with pictures.

        Raises ValueError for a picture that cannot be read, and where there is no instruction.
        """
        query, name, items = self._items(pair)
        texts = {
            "query": _written(items["query"]),
            "candidate": _written(self._cut(items["candidate"])),
        }
        named = _FIELD.findall(self._job.prompt)
        if "instruction" in named:
            if query not in (self._instructions or {}):
                raise ValueError(f"query {query}: no judgement says what it looks for")
            texts["instruction"] = (self._instructions or {})[query]
        text = _FIELD.sub(lambda match: texts[match[1]], self._job.prompt)
        images = [items[field].image for field in named if field in items]
        if any(images) and not self._model.reads_pictures:
            raise ValueError(f"{query}, {name}: the checkpoint reads texts alone, no pictures")
        return plain_question(text, [_read(path) for path in images if path], f"{query}, {name}")

    def digest(self) -> str:
        """Return a digest of all that the prompts are made of; collective."""
        pairs = [pair for number in range(len(self.queries)) for pair in self.of(number)]
        items = list(dict.fromkeys(i for pair in pairs for i in self._items(pair)[2].values()))
        return digest(
            [(item.text, item.image) for item in items],
            dict(self._instructions or {}),
            pictures_digest([item.image for item in items]),
        )

    def _items(self, pair: int) -> tuple[str, str, dict[str, Item]]:
        """Return the ids of query and candidate, and both."""
        number, place = divmod(pair, self._job.top)
        query = self.queries[number]
        name = self._rankings[query][place]
        data = self._job.data
        return query, name, {"query": data.questions[query], "candidate": data.documents[name]}

    def _cut(self, item: Item) -> Item:
        """Return a candidate whose text has at most `max_candidate_tokens`."""
        longest = self._job.max_candidate_tokens
        words = self._model.tokenizer
        if longest is None or len(ids := words.encode(item.text)) <= longest:
            return item
        return replace(item, text=words.decode(ids[:longest]))


def reordered(
    ids: Sequence[str], scores: Sequence[float | None]
) -> tuple[list[str], list[float | None]]:
    """Return ids and scores, best first; those without a score follow in their order.

    scores: of the first ids; there may be fewer.
    """
    values = [*scores, *[None] * (len(ids) - len(scores))]
    scored = [place for place, value in enumerate(values) if value is not None]
    scored.sort(key=lambda place: -(values[place] or 0.0))  # Of equal scores the first stays first.
    order = scored + [place for place, value in enumerate(values) if value is None]
    return [ids[place] for place in order], [values[place] for place in order]


def _written(item: Item) -> str:
    """Return a query or candidate as text, with the marker of its picture."""
    return "\n".join(part for part in (IMAGE_MARKER if item.image else "", item.text) if part)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
        "error": pa.string(),
    }
)
