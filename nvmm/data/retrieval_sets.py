"""Public layouts of retrieval and classification data -> records of `nvmm.data.retrieval`."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Objects of a .jsonl file. Raises ValueError naming file and line for anything else."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: no JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: must be an object")
            yield record


def read_corpus(folder: str | Path) -> dict[str, str]:
    """BEIR's corpus.jsonl: document id -> title and text, as BEIR and mteb join them."""
    return {
        str(line["_id"]): f"{line.get('title', '')} {line['text']}".strip()
        for line in read_lines(Path(folder) / "corpus.jsonl")
    }


def read_queries(folder: str | Path) -> dict[str, str]:
    """BEIR's queries.jsonl: query id -> text."""
    return {
        str(line["_id"]): str(line["text"]) for line in read_lines(Path(folder) / "queries.jsonl")
    }


def read_qrels(folder: str | Path, split: str) -> dict[str, dict[str, int]]:
    """BEIR's qrels/<split>.tsv: query id -> document id -> relevance above 0."""
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    path = Path(folder) / "qrels" / f"{split}.tsv"
    with open(path, encoding="utf-8", newline="") as file:
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
    """One record a relevant pair of a BEIR folder.

    negatives: query id -> ids of mined hard negatives; a relevant one among them is left out.
    """
    corpus, queries, qrels = read_corpus(folder), read_queries(folder), read_qrels(folder, split)
    for query, relevant in qrels.items():
        mined = [doc for doc in (negatives or {}).get(query, []) if doc not in relevant]
        for positive in relevant:
            yield {
                "query": queries[query],
                "positive": corpus[positive],
                "positive_id": positive,
                "negatives": [corpus[doc] for doc in mined],
                "negative_ids": mined,
            }


def triplets(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sentence-transformers' columns: anchor (or query), positive, negative, negative_2, ..."""
    for record in records:
        query = record.get("anchor", record.get("query"))
        negatives = [value for key, value in record.items() if key.startswith("negative")]
        yield {"query": query, "positive": record["positive"], "negatives": negatives}


def classes(
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    num_negatives: int,
    instruction: str,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Classification or clustering by examples (NV-Embed v2, section 4.2).

    The positive is another text of the same class, the negatives are texts of other classes, drawn
    by the seed. Other samples of a batch may be of the same class: no in-batch negatives. All
    texts get the instruction. Texts of a class of one are left out.
    """
    rng = random.Random(seed)
    members: dict[Any, list[int]] = defaultdict(list)
    for number, label in enumerate(labels):
        members[label].append(number)
    if len(members) < 2:
        raise ValueError(f"classes need two labels, got {sorted(map(str, members))}")
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        same = [other for other in members[label] if other != number and texts[other] != text]
        if not same:
            continue
        others = [other for other in range(len(texts)) if labels[other] != label]
        chosen = rng.sample(others, min(num_negatives, len(others)))
        yield {
            "query": text,
            "positive": texts[rng.choice(same)],
            "negatives": [texts[other] for other in chosen],
            "instruction": instruction,
            "symmetric": True,
            "in_batch_negatives": False,
        }


def members(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, bytes | str]]:
    """Records as samples for `write_shards`."""
    for number, record in enumerate(records):
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        yield {"__key__": f"{number:08d}", "json": text.encode("utf-8")}
