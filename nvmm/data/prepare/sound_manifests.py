"""Audio Flamingo's manifests (arXiv:2402.01831, released code) and their sounds become samples.

    split.json                  {header, "data": {"0": {name, prompt, output, [audio_start]}, ...}}
    chat                        {header, "data": {"0": {name, dialogue: [{user, assistant}]}, ...}}
    interleaved_knn-split.json  {header, "interleaved_data": {"0": {generation_index_in_split,
                                fewshot_indices_in_train}, ...}}, beside split.json and train.json
    Audio-Dialogues             [{audio_id, dialogue: [{user, assistant}]}, ...]

A header is dataset_path, split_path (or null) and flamingo_task. Nothing is held in memory but an
entry: what interleaved samples refer to lies in a table on disk. Records are those of
`nvmm.data.samples.listening`.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ijson

from nvmm.data.prepare.json_records import file_below
from nvmm.data.prepare.records import LeftOut, read_objects, to_sample
from nvmm.data.prepare.resume import Resumed
from nvmm.data.samples.decode import SOUNDS

Entry = Mapping[str, Any]
_HEADER = ("dataset_path", "split_path", "flamingo_task")
_INTERLEAVED = re.compile(r"interleaved_(knn|random)-(.+)")
_CHOSEN = {"knn": "similar", "random": "random"}
MIN_BYTES = 16_000
"""Smaller files are left out, as in the released code: half a second of 16 kHz."""
REFUSALS = (
    # LLARK's
    *("metadata", "as an ai assistant", "violin 1", "violin 2", "viola 2", "viola 3", "pack"),
    # LTU's
    *("not provided", "sorry", "without more information", "not possible", "more context"),
    *("enough", "impossible", "unclear", "cannot", "not clear", "do not provide sufficient"),
    *("does not provide", "difficult to determine", "can't infer", "difficult to infer"),
    *("not specified", "no specific", "no information", "without additional", "no indication"),
    "it is difficult to",
    # its own
    *("doesn't provide", "doesn't specify", "doesn't indicate", "based on"),
)
"""A dialogue with one of these in an answer is left out: the released code's phrases, without those
that contain another one and those whose words its source has run together."""


@dataclass(frozen=True)
class Rules:
    """How manifests become records.

    sounds: folder instead of the header's dataset_path. task: instead of the one that flamingo_task
        names. options: labels of a closed task, which every label of an answer must be one of.
    min_bytes: smaller sounds are left out. refusals: phrases, in lower case, of answers whose
        dialogue is left out. skip: is told of bad entries, which are errors without it.
    """

    sounds: str | None = None
    task: str | None = None
    options: Sequence[str] = ()
    min_bytes: int = MIN_BYTES
    refusals: Sequence[str] = REFUSALS
    skip: LeftOut | None = None


def task_name(flamingo_task: str) -> str:
    """Return the task in words: "audiocaps-AudioCaptioning" is audio captioning."""
    data_set, _, name = flamingo_task.rpartition("-")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    if "musiccaps" in data_set.lower() and words == "audio captioning":
        return "music captioning"
    for short, task in {
        "AQA": "audio question answering",
        "AVQA": "audio vision question answering",
        "Instr": "instrument classification",
        "MIR": "music information retrieval",
    }.items():
        if name.startswith(short):
            return task
    return words


def samples(path: str | Path, rules: Rules, told: LeftOut) -> Callable[[Any], Resumed]:
    """Return the samples of a manifest for `write_steps`; no sound is read twice.

    told: is told how many entries were left out, and why.

    Raises ValueError naming file and entry for what is malformed, and for a sound that is not there
    or has no decoder.
    """
    path = Path(path)

    def make(state: Any) -> Resumed:
        done = state["entries"] if state else 0
        counts = Counter(state["left_out"] if state else {})
        with tempfile.TemporaryDirectory() as folder:
            for number, (key, entry) in enumerate(_entries(path, rules, Path(folder)), 1):
                if number <= done:
                    continue
                where = f"{path}: entry {key}"
                try:
                    sample, why = _sample(f"{number - 1:09d}", entry, rules)
                except (ValueError, FileNotFoundError) as error:
                    if rules.skip is None:
                        raise ValueError(
                            f"{where}: {error}\n--on-bad skip leaves such entries out"
                        ) from error
                    rules.skip(f"{where}: {error}")
                    continue
                if sample is None:
                    counts[why] += 1
                    continue
                yield sample, partial(_reached, number, dict(counts))
        for why, count in counts.items():
            told(f"{count} entries: {why}")

    return make


def _reached(entries: int, left_out: dict[str, int]) -> dict[str, Any]:
    return {"entries": entries, "left_out": left_out}


@dataclass(frozen=True)
class _Heard:
    """A sound: its file below a folder, its start, and pairs of prompts and answers on it."""

    root: Path
    name: str
    start: Any
    turns: Sequence[tuple[Any, Any]]
    is_dialogue: bool


@dataclass(frozen=True)
class _Item:
    """The sounds of an entry, the one that is asked about last.

    data_set: that of flamingo_task, within which job=few_shot searches; "" where none is named.
    """

    sounds: Sequence[_Heard]
    task: str
    data_set: str = ""
    interleaved: str | None = None


def _sample(key: str, item: Callable[[], _Item], rules: Rules) -> tuple[Any, str]:
    """Return the sample of an entry, or None and why it is left out."""
    found = item()
    clips: list[dict[str, Any]] = []
    files = []
    for number, heard in enumerate(found.sounds):
        path = file_below(heard.root, heard.name, f"sound {heard.name[:80]}")
        extension = path.suffix[1:].lower()
        if extension not in SOUNDS:
            raise ValueError(f"sound {heard.name[:80]} must be one of {', '.join(SOUNDS)}")
        if path.stat().st_size < rules.min_bytes:
            return None, f"a sound of less than {rules.min_bytes} bytes"
        for place, (prompt, answer) in enumerate(heard.turns):
            sound = {"sound": f"{number}.{extension}", **_start(heard.start)} if place == 0 else {}
            clips.append({**sound, "prompt": _text(prompt), "answer": _text(answer)})
            said = str(answer).lower()
            if heard.is_dialogue and any(phrase in said for phrase in rules.refusals):
                return None, "an answer that refuses"
        files.append((str(number), extension, path.read_bytes()))
    record: dict[str, Any] = {"clips": clips, "task": rules.task or found.task}
    if found.interleaved:
        record |= {
            "interleaved": found.interleaved,
            "files": [heard.name for heard in found.sounds],
        }
    if rules.options:
        _check_options(clips, rules.options)
        record["options"] = list(rules.options)
    if found.data_set:
        record["dataset"] = found.data_set
    return to_sample(key, {**record, "file": found.sounds[-1].name}, files), ""


def _start(start: Any) -> dict[str, float]:
    """Return `audio_start`, a number or its text, as the record has it."""
    if start is None:
        return {}
    try:
        return {"start": float(start)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"audio_start={start!r} must be a number of seconds") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"prompts and answers must be texts that are not empty, got {value!r}")
    return value


def _check_options(clips: Sequence[Mapping[str, Any]], options: Sequence[str]) -> None:
    known = {option.lower() for option in options}
    for clip in clips:
        labels = {part.strip() for part in clip["answer"].strip().removesuffix(".").split(",")}
        if strange := sorted(label for label in labels if label.lower() not in known):
            raise ValueError(
                f"the answer {clip['answer']!r} has {strange[0]!r}, which is no option"
            )


# -- entries of the four layouts ----------------------------------------------------------------


def _entries(path: Path, rules: Rules, folder: Path) -> Iterator[tuple[str, Callable[[], _Item]]]:
    """Yield the key of each entry, and a function that returns its clips."""
    with open(path, "rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if is_list:
        for number, found in enumerate(read_objects(path)):
            named = {"name": found.get("audio_id"), "dialogue": found.get("dialogue") or []}
            yield str(number), partial(_single, named, _root({}, rules, path), "", "dialog", "")
        return
    chosen = _INTERLEAVED.fullmatch(path.stem)
    header = _header(path)
    root, within = _root(header, rules, path), str(header.get("split_path") or "")
    flamingo_task = str(header["flamingo_task"])
    task, data_set = task_name(flamingo_task), flamingo_task.rpartition("-")[0]
    if chosen is None:
        for key, entry in _values(path, "data"):
            yield key, partial(_single, entry, root, within, task, data_set)
        return
    query, train = path.with_name(f"{chosen[2]}.json"), path.with_name("train.json")
    tables = [_Rows(each, folder, rules) for each in dict.fromkeys((query, train))]
    try:
        for key, entry in _values(path, "interleaved_data"):
            whole = partial(_together, entry, tables[0], tables[-1])
            yield key, partial(whole, task, data_set, _CHOSEN[chosen[1]])
    finally:
        for each in tables:
            each.table.close()


def _single(entry: Entry, root: Path, within: str, task: str, data_set: str) -> _Item:
    return _Item([_heard(entry, root, within)], task, data_set)


def _together(
    entry: Entry, query: _Rows, train: _Rows, task: str, data_set: str, chosen: str
) -> _Item:
    """Return the clips of an interleaved entry, the query last."""
    last, shots = (entry.get(k) for k in ("generation_index_in_split", "fewshot_indices_in_train"))
    if not isinstance(shots, list):
        raise ValueError(f"fewshot_indices_in_train must be a list, got {shots!r}")
    sounds = [*(train.heard(index) for index in shots), query.heard(last)]
    return _Item(sounds, task, data_set, chosen)


def _heard(entry: Entry, root: Path, within: str) -> _Heard:
    """Return the sound of an entry."""
    name, dialogue = entry.get("name"), entry.get("dialogue")
    if not isinstance(name, str) or not name:
        raise ValueError(f"it needs the name of a sound, got {name!r}")
    turns = [(entry.get("prompt"), entry.get("output"))]
    if dialogue is not None:
        if not isinstance(dialogue, list) or not dialogue or not all(map(_is_turn, dialogue)):
            raise ValueError(f"dialogue must list {{user, assistant}}, got {dialogue!r:.80}")
        turns = [(turn["user"], turn["assistant"]) for turn in dialogue]
    name = str(Path(within) / name)
    return _Heard(root, name, entry.get("audio_start"), turns, dialogue is not None)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and {"user", "assistant"} <= turn.keys()


class _Rows:
    """The entries of a manifest by their index, in a table on disk."""

    def __init__(self, path: Path, folder: Path, rules: Rules) -> None:
        header = _header(path)
        self.root = _root(header, rules, path)
        self.within = str(header.get("split_path") or "")
        self.path = path
        self.table = sqlite3.connect(folder / f"{path.stem}.db")
        self.table.execute("create table entries (key text primary key, entry text)")
        self.table.execute("pragma journal_mode = off")
        rows = ((key, json.dumps(entry)) for key, entry in _values(path, "data"))
        self.table.executemany("insert or replace into entries values (?, ?)", rows)

    def heard(self, index: Any) -> _Heard:
        """Return one sound; ValueError for an index that is not there."""
        query = "select entry from entries where key = ?"
        found = self.table.execute(query, (str(index),)).fetchone()
        if found is None:
            raise ValueError(f"{self.path} has no entry {index}")
        return _heard(json.loads(found[0]), self.root, self.within)


def _root(header: Mapping[str, Any], rules: Rules, path: Path) -> Path:
    root = rules.sounds or header.get("dataset_path")
    if not isinstance(root, str):
        raise ValueError(f"{path} names no dataset_path; give the folder of its sounds: --sounds")
    return Path(root)


def _header(path: Path) -> dict[str, Any]:
    """Return a manifest's header, which may stand in front of its entries or behind them."""
    header: dict[str, Any] = {}
    with open(path, "rb") as file:
        try:
            for prefix, event, value in ijson.parse(file, use_float=True):
                if prefix in _HEADER and event in ("string", "null"):
                    header[prefix] = value
                if len(header) == len(_HEADER):
                    break
        except (ijson.JSONError, ValueError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(header.get("flamingo_task"), str):
        raise ValueError(f"{path} is no manifest of Audio Flamingo: it has no flamingo_task")
    return header


def _values(path: Path, name: str) -> Iterator[tuple[str, Entry]]:
    """Yield the entries of a manifest's object `name`, one after another."""
    number = 0
    with open(path, "rb") as file:
        try:
            for key, entry in ijson.kvitems(file, name, use_float=True):
                if not isinstance(entry, dict):
                    raise ValueError(f"{name} must hold objects, got {entry!r:.40}")
                yield key, entry
                number += 1
        except (ijson.JSONError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: behind {number} entries: {reason}") from error
    if not number:
        raise ValueError(f"{path}: {name} has no entry")
