"""Public layouts of retrieval and classification data become records for retrieval shards."""

from __future__ import annotations

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import read_lines, to_sample

_NEGATIVE = re.compile(r"negative(_\d+)?")


def fields_of(path: str | Path, *names: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file; raise ValueError for one without the fields `names`."""
    for number, record in enumerate(read_lines(path), 1):
        lacking = [name for name in names if record.get(name) is None]
        if lacking:
            raise ValueError(f"{path}: record {number} has no {', '.join(lacking)}")
        yield record


def read_corpus(folder: str | Path) -> dict[str, str]:
    """Read BEIR's corpus.jsonl: document id -> title and text, as BEIR and mteb join them.

    Raises ValueError for a document without an id or text, or with an id of another.
    """
    return _texts(Path(folder) / "corpus.jsonl", titled=True)


def read_modalities(folder: str | Path) -> dict[str, str]:
    """Read the field `modality` of corpus.jsonl ("text", "image", "image,text"): id -> modality.

    Raises ValueError naming a document that has none.
    """
    path = Path(folder) / "corpus.jsonl"
    modalities = {}
    for line in read_lines(path):
        if not isinstance(line.get("modality"), str):
            raise ValueError(f"{path}: document {line['_id']} has no field modality")
        modalities[str(line["_id"])] = line["modality"]
    return modalities


def read_queries(folder: str | Path) -> dict[str, str]:
    """Read BEIR's queries.jsonl: query id -> text; raise ValueError as `read_corpus` does."""
    return _texts(Path(folder) / "queries.jsonl", titled=False)


def _texts(path: Path, *, titled: bool) -> dict[str, str]:
    """Return id -> text of a file of BEIR's, behind its title if it may have one."""
    texts: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        name, text = line.get("_id"), line.get("text")
        title = (line.get("title") or "") if titled else ""
        known = isinstance(name, str | int) and not isinstance(name, bool)
        if not known or not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{path}: record {number} needs an _id and a text, has {line}")
        if str(name) in texts:
            raise ValueError(f"{path}: record {number} has the _id {name} of another")
        texts[str(name)] = f"{title} {text}".strip() if titled else text
    return texts


def read_qrels(folder: str | Path, split: str) -> dict[str, dict[str, int]]:
    """Read BEIR's qrels/<split>.tsv: query id -> document id -> relevance above 0.

    Raises ValueError for a row without query-id, corpus-id and score.
    """
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    path = Path(folder) / "qrels" / f"{split}.tsv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            try:
                relevance = int(row["score"])
                if relevance > 0:
                    qrels[row["query-id"]][row["corpus-id"]] = relevance
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: needs query-id, corpus-id, score: {row}") from error
    return dict(qrels)


def beir(
    folder: str | Path, split: str, negatives: Mapping[str, Sequence[str]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a record for each relevant pair of a BEIR folder; ids begin with the folder's name.

    negatives: query id -> ids of mined hard negatives; a relevant one among them is left out.

    Raises ValueError when qrels or negatives name a query or document that is not there.
    """
    folder = Path(folder)
    corpus, queries, qrels = read_corpus(folder), read_queries(folder), read_qrels(folder, split)
    name = folder.resolve().name
    for query, relevant in qrels.items():
        mined = [doc for doc in (negatives or {}).get(query, []) if doc not in relevant]
        unknown = [doc for doc in (*relevant, *mined) if doc not in corpus]
        if query not in queries or unknown:
            raise ValueError(f"{folder}: query {query} or its documents {unknown} are not there")
        shared = {
            "query": queries[query],
            "positive_ids": [f"{name}/{doc}" for doc in relevant],
            "negatives": [corpus[doc] for doc in mined],
            "negative_ids": [f"{name}/{doc}" for doc in mined],
        }
        for positive in relevant:
            yield shared | {"positive": corpus[positive], "positive_id": f"{name}/{positive}"}


def triplets(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield records from sentence-transformers' columns: anchor (or query), positive, negative,
    negative_2, ...

    Raises ValueError naming the row's number, from 1, for one with other columns or no texts.
    """
    for number, record in enumerate(records, 1):
        rest = dict(record)
        query = rest.pop("anchor", None) or rest.pop("query", None)
        positive = rest.pop("positive", None)
        texts = [query, positive, *rest.values()]
        if not all(_NEGATIVE.fullmatch(name) for name in rest) or not all(
            isinstance(text, str) for text in texts
        ):
            raise ValueError(
                f"row {number}: needs texts anchor (or query), positive and any of negative,"
                f" negative_2, ...: {dict(record)}"
            )
        yield {"query": query, "positive": positive, "negatives": list(rest.values())}


def classes(
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    num_negatives: int,
    instruction: str,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield records of classification or clustering by examples (NV-Embed v2, section 4.2).

    The positive is another text of the same class, the negatives are texts of other classes, drawn
    by the seed. Other samples of a batch may be of the same class: no in-batch negatives. All
    texts get the instruction (our choice: the paper says so of similarity tasks). A text that is
    alone in its class is left out, a text of two classes is nobody's negative.

    Raises ValueError for fewer than two labels, and naming the row's number, from 1, for one whose
    text is no text, or whose label is neither a text nor a whole number.
    """
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        # As labels 1, 1.0 and true would be one.
        if not isinstance(text, str) or type(label) not in (str, int):
            raise ValueError(f"row {number}: text {text!r} of label {label!r} is no example")
    rng = random.Random(seed)
    # 1. List the texts of each class once; a class maps a text to its place in it.
    members: dict[Any, dict[str, int]] = defaultdict(dict)
    classes_of: dict[str, set[Any]] = defaultdict(set)
    for text, label in zip(texts, labels, strict=True):
        members[label].setdefault(text, len(members[label]))
        classes_of[text].add(label)
    if len(members) < 2:
        raise ValueError(f"classes need two labels, got {sorted(map(str, members))}")
    texts_of = {label: list(places) for label, places in members.items()}
    # 2. Pool the possible negatives class after class, so that those of one class are a range, and
    # drawing from all other classes is drawing from the pool without that range.
    pool: list[str] = []
    ranges: dict[Any, range] = {}
    for label, class_texts in texts_of.items():
        start = len(pool)
        pool += [text for text in class_texts if len(classes_of[text]) == 1]
        ranges[label] = range(start, len(pool))
    # 3. Draw for each text another one of its class, and negatives from the pool.
    for text, label in zip(texts, labels, strict=True):
        same_class, excluded = texts_of[label], ranges[label]
        if len(same_class) < 2:
            continue
        positive = rng.randrange(len(same_class) - 1)
        available = len(pool) - len(excluded)
        chosen = rng.sample(range(available), min(num_negatives, available))
        yield {
            "query": text,
            "positive": same_class[positive + (positive >= members[label][text])],
            "negatives": [pool[i if i < excluded.start else i + len(excluded)] for i in chosen],
            "instruction": instruction,
            "symmetric": True,
            "in_batch_negatives": False,
        }


def members(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, bytes | str]]:
    """Yield records as samples for `write_shards`."""
    for number, record in enumerate(records):
        yield to_sample(f"{number:08d}", record)
