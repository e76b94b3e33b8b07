"""Four of M-BEIR's tasks from openmoji, in the files that UniIR publishes (`mbeir.py` reads them).

| task | query | candidate | positives |
|---|---|---|---|
| 0 | text | image | every picture of the name |
| 3 | image | text | every name of the picture |
| 4 | image | image | other pictures of the base emoji: in black, in another skin tone |
| 7 | image,text | image | the picture that the text asks for: a skin tone, or black and white |

A query's negatives are its own picture (tasks 4 and 7), other skin tones (0, 3, 7), and siblings:
entries of the same subgroup.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvmm.data.prepare.openmoji import SPLITS, TONES, Entry
from nvmm.io.files import write

DATASET = 20
"""Id of the set, which M-BEIR's ten do not have."""
MODALITIES = {0: ("text", "image"), 3: ("image", "text"), 4: ("image", "image")}
MODALITIES |= {7: ("image,text", "image")}
"""Task -> modality of its queries and of their candidates."""
INSTRUCTIONS = {
    0: (
        "Find the emoji of this description.",
        "Which picture shows this?",
        "Match the text with a picture.",
        "Show an emoji for these words.",
    ),
    3: (
        "Find the description of this emoji.",
        "What does this picture show?",
        "Match the picture with a text.",
        "Name this emoji.",
    ),
    4: (
        "Find another drawing of this emoji.",
        "Which other picture shows the same?",
        "Match the picture with a variant.",
        "Show the same in another style.",
    ),
    7: (
        "Change the picture as the text says.",
        "Find the picture with this change.",
        "Which picture follows the request?",
        "Show the emoji altered as asked.",
    ),
}
BLACK_AND_WHITE = "the same in black and white"
TONE = "the same with {}"

_SIBLINGS = 6
_RANDOM_NEGATIVES = 4


@dataclass(frozen=True)
class Query:
    """A query of one task; documents are captions or paths of pictures."""

    task: int
    text: str | None
    image: str | None
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Lookup:
    """The entries of a split by what links them."""

    entries: Sequence[Entry]
    of_picture: Mapping[str, list[Entry]]
    of_base: Mapping[str, list[Entry]]
    of_subgroup: Mapping[str, list[Entry]]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Lookup:
        entries = list(entries)
        picture, base, subgroup = (defaultdict(list) for _ in range(3))
        for entry in entries:
            base[entry.base].append(entry)
            subgroup[entry.subgroup].append(entry)
            for path in sorted(entry.all_pictures):
                picture[path].append(entry)
        return cls(entries, picture, base, subgroup)

    @property
    def documents(self) -> list[tuple[str, str]]:
        """The pool: (modality, caption or path)."""
        captions = [("text", entry.caption) for entry in self.entries]
        return captions + [("image", path) for path in self.of_picture]


def queries(lookup: Lookup, seed: int) -> list[Query]:
    """Return the queries of all tasks, by task; the same seed gives the same ones."""
    made = [*_by_text(lookup), *_by_picture(lookup), *_variants(lookup), *_changes(lookup, seed)]
    return [_with_negatives(query, lookup, seed) for query in made]


def _by_text(lookup: Lookup) -> Iterator[Query]:
    for entry in lookup.entries:
        rivals = _pictures(e for e in lookup.of_base[entry.base] if e is not entry)
        yield Query(0, entry.caption, None, _sorted(entry.all_pictures), _sorted(rivals))


def _by_picture(lookup: Lookup) -> Iterator[Query]:
    for path, owners in lookup.of_picture.items():
        relatives = {e.caption for owner in owners for e in lookup.of_base[owner.base]}
        yield Query(3, None, path, _sorted({e.caption for e in owners}), _sorted(relatives))


def _variants(lookup: Lookup) -> Iterator[Query]:
    for path, owners in lookup.of_picture.items():
        same = _pictures(e for owner in owners for e in lookup.of_base[owner.base])
        if others := same - {path}:
            yield Query(4, None, path, _sorted(others), (path,))


def _changes(lookup: Lookup, seed: int) -> Iterator[Query]:
    for entry in lookup.entries:
        tones = lookup.of_base[entry.base]
        colour, black = (entry.pictures.get(style, set()) for style in ("color", "black"))
        start = min(colour, default=None)
        if start is not None and (wanted := black - colour):
            rivals = {start, *_pictures(tones)} - black
            yield Query(7, BLACK_AND_WHITE, start, _sorted(wanted), _sorted(rivals))
        others = [e for e in tones if e.tone != entry.tone and e.pictures.get("color")]
        if others and colour:
            other = random.Random(f"{seed}/{entry.name}/tone").choice(others)
            start = min(other.pictures["color"])
            if wanted := colour - {start}:
                text = TONE.format(TONES[entry.tone])
                yield Query(7, text, start, _sorted(wanted), _sorted({start, *_pictures(tones)}))


def _with_negatives(query: Query, lookup: Lookup, seed: int) -> Query:
    """Return a query whose negatives are no positives, with siblings of the first positive."""
    if MODALITIES[query.task][1] == "text":
        owners = lookup.of_picture[query.image or ""]
    else:
        owners = lookup.of_picture[query.positives[0]]
    around = [e for e in lookup.of_subgroup[owners[0].subgroup] if e not in owners]
    draw = random.Random(f"{seed}/{query.task}/{query.text}/{query.image}")
    chosen = draw.sample(around, min(_SIBLINGS, len(around)))
    if MODALITIES[query.task][1] == "text":
        siblings = [e.caption for e in chosen]
    else:
        siblings = [draw.choice(_sorted(e.all_pictures)) for e in chosen if e.all_pictures]
    negatives = dict.fromkeys([*query.negatives, *siblings])
    return replace(query, negatives=tuple(d for d in negatives if d not in query.positives))


def _pictures(entries: Iterable[Entry]) -> set[str]:
    return {path for entry in entries for path in entry.all_pictures}


def _sorted(documents: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(documents))


def write_all(entries: Sequence[Entry], to: Path, seed: int) -> dict[str, dict[str, int]]:
    """Write all files of the set below `to`; return split -> {"task 0": queries, ..., "pool": n}.

    query/SPLIT/, cand_pool/{local,global}/, qrels/SPLIT/, instructions/query_instructions.tsv, and
    negatives/random.jsonl: of every training query some candidates of the union pool, drawn at
    random, for `nvmm shard mbeir --negatives`.
    """
    _instructions(to / "instructions/query_instructions.tsv")
    next_query, next_document = 1, 1
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        lookup = Lookup.of(entry for entry in entries if entry.split == split)
        # 1. The union pool, and the part of it that has a task's modality.
        names: dict[tuple[str, str], str] = {}
        pool = []
        for modality, content in lookup.documents:
            names[modality, content] = did = f"{DATASET}:{next_document}"
            next_document += 1
            text, image = (content, None) if modality == "text" else (None, content)
            pool.append({"did": did, "txt": text, "img_path": image, "modality": modality})
        _jsonl(to / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl", pool)
        counts[split] = {"pool": len(pool)}
        # 2. The queries and judgements of each task, and of all.
        lines: dict[int, list[dict[str, Any]]] = {task: [] for task in MODALITIES}
        for query in queries(lookup, seed):
            asked, target = MODALITIES[query.task]
            lines[query.task].append(
                {
                    "qid": f"{DATASET}:{next_query}",
                    "query_txt": query.text,
                    "query_img_path": query.image,
                    "query_modality": asked,
                    "pos_cand_list": [names[target, d] for d in query.positives],
                    "neg_cand_list": [names[target, d] for d in query.negatives],
                }
            )
            next_query += 1
        for task, (_, target) in MODALITIES.items():
            name = f"mbeir_openmoji_task{task}_{split}"
            local = [line for line in pool if line["modality"] == target]
            _jsonl(to / f"cand_pool/local/{name}_cand_pool.jsonl", local)
            _queries(to, split, name, {task: lines[task]})
            counts[split][f"task {task}"] = len(lines[task])
        _queries(to, split, f"mbeir_union_{split}", lines)
        if split == "train":
            _random_negatives(to / "negatives/random.jsonl", lines, pool, seed)
    return counts


def _queries(to: Path, split: str, name: str, lines: Mapping[int, list[dict[str, Any]]]) -> None:
    _jsonl(to / f"query/{split}/{name}.jsonl", [line for each in lines.values() for line in each])
    judged = [
        f"{line['qid']} 0 {did} 1 {task}\n"
        for task, each in lines.items()
        for line in each
        for did in line["pos_cand_list"]
    ]
    _write(to / f"qrels/{split}/{name}_qrels.txt", "".join(judged))


def _random_negatives(
    path: Path, lines: Mapping[int, list[dict[str, Any]]], pool: list[dict[str, Any]], seed: int
) -> None:
    dids = [line["did"] for line in pool]
    records = []
    for line in (line for each in lines.values() for line in each):
        draw = random.Random(f"{seed}/{line['qid']}/random")
        positives = line["pos_cand_list"]
        drawn = draw.sample(dids, min(len(dids), _RANDOM_NEGATIVES + len(positives)))
        ids = [did for did in drawn if did not in positives][:_RANDOM_NEGATIVES]
        records.append({"query_id": line["qid"], "ids": ids})
    _jsonl(path, records)


def _instructions(path: Path) -> None:
    columns = ["query_modality", "cand_modality", "name", "dataset_id"]
    rows = [[*columns, *(f"prompt_{i}" for i in range(1, 5))]]
    for task, prompts in INSTRUCTIONS.items():
        rows.append([*MODALITIES[task], "openmoji", str(DATASET), *prompts])
    _write(path, "".join("\t".join(row) + "\n" for row in rows))


def _jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
