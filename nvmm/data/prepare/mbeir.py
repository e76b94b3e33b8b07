"""M-BEIR as UniIR publishes it (arXiv:2311.17136): pools, queries, qrels, instructions, pictures.

A candidate and a query have a text, a picture or both; `modality` says which, as "text", "image" or
"image,text". Paths of pictures are relative to the set's folder.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm.data.prepare.json_records import file_below
from nvmm.data.prepare.records import to_sample
from nvmm.data.prepare.retrieval_sets import fields_of
from nvmm.data.samples.decode import IMAGES

MODALITIES = ("text", "image", "image,text")
_OWN_SET_ALONE = ("5", "6")
"""OVEN and InfoSeek: their queries' candidates of other sets do not count (UniIR)."""


@dataclass(frozen=True)
class Item:
    """A candidate. text: formatted, empty where there is none. image: path of its picture."""

    text: str
    image: str | None
    modality: str


@dataclass(frozen=True)
class Query(Item):
    """A query. positives, negatives: ids of candidates."""

    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def format_string(text: str | None) -> str:
    """Return a text as UniIR formats it, for training and for evaluation alike.

    Carriage returns, spaces and double quotes around it go, its first letter is a capital, and it
    ends with . ? or !
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def read_pool(path: str | Path) -> dict[str, Item]:
    """Read a candidate pool (.jsonl of did, txt, img_path, modality): id -> candidate.

    Raises ValueError naming the line's id where modality and content disagree.
    """
    return {
        name: _item(path, name, line, ("txt", "img_path", "modality"))
        for name, line in _named(path, "did")
    }


def read_queries(path: str | Path) -> dict[str, Query]:
    """Read queries (.jsonl of qid, query_txt, query_img_path, query_modality, pos_cand_list,
    neg_cand_list): id -> query.

    Raises ValueError as `read_pool`.
    """
    queries = {}
    for name, line in _named(path, "qid"):
        names = ("query_txt", "query_img_path", "query_modality")
        item = _item(path, name, line, names)
        lists = [line.get(f"{kind}_cand_list") or [] for kind in ("pos", "neg")]
        if not all(isinstance(ids, list) and all(map(_is_text, ids)) for ids in lists):
            raise ValueError(f"{path}: {name} needs lists of ids, has {lists}")
        queries[name] = Query(item.text, item.image, item.modality, *map(tuple, lists))
    return queries


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read qrels (`qid 0 did relevance task`): query id -> candidate id -> relevance above 0."""
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) not in (4, 5) or not columns[3].lstrip("-").isdecimal():
            raise ValueError(f"{path}:{number}: needs qid, 0, did, relevance, task: {line!r}")
        if int(columns[3]) > 0:
            qrels.setdefault(columns[0], {})[columns[2]] = int(columns[3])
    return qrels


def judged(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the qrels that count: those of OVEN and InfoSeek lose other sets' candidates."""
    kept = {}
    for query, documents in qrels.items():
        own = query.partition(":")[0]
        if own in _OWN_SET_ALONE:
            documents = {d: r for d, r in documents.items() if d.partition(":")[0] == own}
        if documents:
            kept[query] = dict(documents)
    return kept


def read_instructions(path: str | Path) -> dict[tuple[str, str, str], list[str]]:
    """Read query_instructions.tsv: (set, query modality, candidate modality) -> prompts."""
    instructions = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            try:
                key = (row["dataset_id"], row["query_modality"], row["cand_modality"])
            except KeyError as error:
                raise ValueError(f"{path}: has no column {error}") from error
            prompts = [text for name, text in row.items() if name and name.startswith("prompt")]
            instructions[key] = [text.strip() for text in prompts if text and text.strip()]
    return instructions


def instruction(
    instructions: Mapping[tuple[str, str, str], list[str]],
    query_id: str,
    query_modality: str,
    target: str,
    seed: int | None,
) -> str:
    """Return an instruction of a query: the first one, or with a seed one drawn by seed and query.

    target: modality of what it looks for. Raises ValueError where the table has none.
    """
    key = (query_id.partition(":")[0], query_modality, target)
    prompts = instructions.get(key)
    if not prompts:
        raise ValueError(f"query {query_id}: no instruction of (dataset_id, modalities) {key}")
    return prompts[0] if seed is None else random.Random(f"{seed}/{query_id}").choice(prompts)


def samples(
    queries: Mapping[str, Query],
    pool: Mapping[str, Item],
    instructions: Mapping[tuple[str, str, str], list[str]],
    folder: str | Path,
    *,
    num_negatives: int = 0,
    mined: Mapping[str, list[str]] | None = None,
    seed: int = 0,
) -> Iterator[dict[str, bytes | str]]:
    """Yield a sample for `write_shards` of every query: one of its positives, and negatives.

    The positive and the instruction are drawn by seed and query; all positives are `positive_ids`,
    so that none is a negative of the query.

    folder: where the pictures' paths begin. num_negatives: negatives of each query, the first of
        `mined` (query id -> candidate ids), else drawn from its neg_cand_list.

    Raises ValueError for a query without positives, a candidate that is not in the pool, and a
    picture that cannot be read.
    """
    for number, (name, query) in enumerate(queries.items()):
        draw = random.Random(f"{seed}/{name}/positive")
        if not query.positives:
            raise ValueError(f"query {name} has no positive in pos_cand_list")
        positive = draw.choice(query.positives)
        negatives = [doc for doc in (mined or {}).get(name, []) if doc not in query.positives]
        if mined is None:
            negatives = list(query.negatives)
            negatives = draw.sample(negatives, min(num_negatives, len(negatives)))
        negatives = negatives[:num_negatives]
        unknown = [doc for doc in (positive, *negatives) if doc not in pool]
        if unknown:
            raise ValueError(f"query {name}: candidates {unknown} are not in the pool")
        items: dict[str, Item] = {"query": query, "positive": pool[positive]}
        items |= {f"negative_{i}": pool[doc] for i, doc in enumerate(negatives)}
        pictures = {
            label: _picture(folder, item.image, label)
            for label, item in items.items()
            if item.image is not None
        }
        members = {label: f"{file[0]}.{file[1]}" for label, file in pictures.items()}
        record: dict[str, Any] = {
            "query": query.text,
            "query_image": members.get("query"),
            "positive": pool[positive].text,
            "positive_image": members.get("positive"),
            "negatives": [pool[doc].text for doc in negatives],
            "negative_images": [members.get(f"negative_{i}") for i in range(len(negatives))],
            "instruction": instruction(
                instructions, name, query.modality, pool[positive].modality, seed
            ),
            "positive_id": positive,
            "negative_ids": negatives,
            "positive_ids": list(query.positives),
        }
        sample = to_sample(f"{number:08d}", record)
        sample |= {members[label]: data for label, (_, _, data) in pictures.items()}
        yield sample


def _named(path: str | Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (id, object) of a .jsonl file; raise ValueError for an id of another, or that is no
    text."""
    seen = set()
    for line in fields_of(path, key):
        if not _is_text(line[key]) or line[key] in seen:
            raise ValueError(f"{path}: {key} {line[key]!r} is no text, or that of another line")
        seen.add(line[key])
        yield line[key], line


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _item(
    path: str | Path, name: str, line: Mapping[str, Any], names: tuple[str, str, str]
) -> Item:
    text, image, modality = (line.get(field) for field in names)
    if not isinstance(text, str | None) or not isinstance(image, str | None):
        raise ValueError(f"{path}: {name} needs {names[0]} and {names[1]} as texts, has {line}")
    formatted = format_string(text)
    has = [kind for kind, value in (("image", image), ("text", formatted)) if value]
    if modality not in MODALITIES or ",".join(has) != modality:
        raise ValueError(
            f"{path}: {name} has {' and '.join(has) or 'nothing'}, but {names[2]}={modality!r}"
        )
    return Item(formatted, image or None, modality)


def _picture(folder: str | Path, image: str, label: str) -> tuple[str, str, bytes]:
    """Return (name, extension, bytes) of a picture."""
    try:
        path = file_below(Path(folder), image, f"{Path(folder) / image}")
        extension = path.suffix.lstrip(".").lower()
        if extension not in IMAGES:
            raise ValueError(f"{path} must be a picture: {', '.join(IMAGES)}")
        return label, extension, path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{Path(folder) / image} cannot be read (No such file)") from error
    except OSError as error:
        raise ValueError(f"{Path(folder) / image} cannot be read ({error.strerror})") from error
