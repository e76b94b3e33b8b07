"""Audio Flamingo's manifests become shards: what is written, left out, refused, resumed."""

from __future__ import annotations

import itertools
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from nvmm.data.prepare import sound_manifests
from nvmm.data.prepare.sound_manifests import Rules, task_name
from tests.data.samples.test_sounds import noise, wave

SECOND = wave(noise(1.5, 8000, 1), 8000)  # 24 kB


def manifest(folder: Path, data: list[dict[str, Any]], task: str = "x-AQA", **more: Any) -> Path:
    """A split's file, with its sounds in folder/audio; those of a name with "small" are small."""
    sounds = folder / "audio" / "part"
    sounds.mkdir(parents=True, exist_ok=True)
    for entry in data:
        if "gone" not in entry["name"]:
            small = "small" in entry["name"]
            (sounds / entry["name"]).write_bytes(SECOND[:15_999] if small else SECOND)
    header = {"dataset_path": str(folder / "audio"), "split": "train", "split_path": "part"}
    entries = {str(number): entry for number, entry in enumerate(data)}
    path = folder / "train.json"
    whole = {**header, "flamingo_task": task, "total_num": len(data), "data": entries, **more}
    path.write_text(json.dumps(whole))
    return path


def row(name: str, prompt: str = "Why?", output: str = "So.", **more: Any) -> dict[str, Any]:
    return {"name": name, "prompt": prompt, "output": output, **more}


def run(monkeypatch: pytest.MonkeyPatch, source: Path, *more: Any) -> None:
    arguments = ["audio_flamingo", "--from", source, "--to", source.parent / "to", *more]
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
    shard.main()


def read(folder: Path) -> list[tuple[dict[str, Any], dict[str, bytes]]]:
    """The record and the sounds of every sample."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((folder / "to").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[name] = content.read()
    return [(json.loads(each.pop("json")), each) for each in found.values()]


def test_clips_of_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        row("a.wav", audio_start="1.5"),
        row("small.wav"),
        row("b.wav", output="No"),
        row("a.wav"),
    ]
    labels = tmp_path / "labels.txt"
    labels.write_text("so\n\nno\n")
    path = manifest(tmp_path, data, "Clotho-AQA-AQA")
    run(monkeypatch, path, "--options", labels, "--name", "aqa")
    samples = read(tmp_path)
    assert samples[0] == (
        {
            "clips": [{"sound": "0.wav", "start": 1.5, "prompt": "Why?", "answer": "So."}],
            "task": "audio question answering",
            "options": ["so", "no"],
            "dataset": "Clotho-AQA",
            "file": "part/a.wav",
        },
        {"0.wav": SECOND},
    )
    assert [record["file"] for record, _ in samples] == ["part/a.wav", "part/b.wav", "part/a.wav"]
    assert "1 entries: a sound of less than 16000 bytes" in capsys.readouterr().out


def test_dialogues_that_refuse_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"user": "Hi?", "assistant": "A dog."}, {"user": "Loud?", "assistant": "Yes."}]
    bad = [{"user": "Hi?", "assistant": "It CANNOT be told."}]
    data: list[dict[str, Any]] = [
        {"name": "a.wav", "dialogue": turns},
        {"name": "b.wav", "dialogue": [*turns, *bad]},
    ]
    path = manifest(tmp_path, data, "dialog_AudioSetSL-Dialog")
    run(monkeypatch, path)
    [(record, sounds)] = read(tmp_path)
    assert record["task"] == "dialog" and list(sounds) == ["0.wav"]
    assert record["clips"] == [
        {"sound": "0.wav", "prompt": "Hi?", "answer": "A dog."},
        {"prompt": "Loud?", "answer": "Yes."},
    ]
    assert "1 entries: an answer that refuses" in capsys.readouterr().out
    # Another list of phrases, and the raw list of Audio-Dialogues.
    phrases = tmp_path / "phrases"
    phrases.write_text("a DOG\n")
    with pytest.raises(ValueError, match=r"no record to write; .* 2 entries: an answer that refu"):
        run(monkeypatch, path, "--refusals", phrases, "--name", "other")
    raw = [{"audio_id": each["name"], "dialogue": each["dialogue"]} for each in data]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(raw))
    phrases.write_text("")
    run(
        *(monkeypatch, listed, "--sounds", tmp_path / "audio" / "part", "--name", "raw"),
        *("--refusals", phrases),
    )
    with tarfile.open(tmp_path / "to" / "raw-00000.tar") as tar:
        records = [tar.extractfile(m) for m in tar if m.name.endswith(".json")]
        files = [json.loads(record.read())["file"] for record in records if record is not None]
    assert files == ["a.wav", "b.wav"]


def interleaved(folder: Path, rows: list[dict[str, Any]], mode: str = "knn") -> Path:
    path = folder / f"interleaved_{mode}-train.json"
    entries = {str(number): entry for number, entry in enumerate(rows)}
    header = {"dataset_path": "/gone", "split_path": None, "flamingo_task": "macs-AudioCaptioning"}
    path.write_text(json.dumps({**header, "interleaved_data": entries}))
    return path


def entry(query: int, *shots: int) -> dict[str, Any]:
    return {"generation_index_in_split": query, "fewshot_indices_in_train": list(shots)}


@pytest.mark.parametrize(("mode", "word"), [("knn", "similar"), ("random", "random")])
def test_samples_behind_others_have_the_query_last(
    mode: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(tmp_path, [row(f"{n}.wav", f"p{n}", f"o{n}") for n in range(3)])
    run(monkeypatch, interleaved(tmp_path, [entry(0, 2, 1), entry(2, 0)], mode))
    (first, sounds), (second, _) = read(tmp_path)
    assert [clip["prompt"] for clip in first["clips"]] == ["p2", "p1", "p0"]
    assert [clip["sound"] for clip in first["clips"]] == ["0.wav", "1.wav", "2.wav"] == list(sounds)
    assert first["files"] == ["part/2.wav", "part/1.wav", "part/0.wav"]
    assert first["file"] == "part/0.wav" and first["interleaved"] == word
    assert first["task"] == "audio captioning" and len(second["clips"]) == 2
    assert first["dataset"] == "macs"


def test_a_query_of_another_split_takes_its_examples_from_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = manifest(tmp_path, [row(f"{n}.wav", f"t{n}") for n in range(2)])
    train.rename(tmp_path / "kept.json")
    manifest(tmp_path, [row(f"{n}.wav", f"v{n}") for n in range(2)]).rename(tmp_path / "val.json")
    (tmp_path / "kept.json").rename(train)
    path = interleaved(tmp_path, [entry(1, 0)]).rename(tmp_path / "interleaved_knn-val.json")
    run(monkeypatch, path)
    [(record, _)] = read(tmp_path)
    assert [clip["prompt"] for clip in record["clips"]] == ["t0", "v1"]


BAD = [
    (row("gone.wav"), "sound part/gone.wav is not a file in"),
    (row("a.wav", audio_start="x"), "audio_start='x' must be a number of seconds"),
    (row("a.wav", output=" "), "prompts and answers must be texts that are not empty, got ' '"),
    (row("a.wav", prompt=None), "prompts and answers must be texts"),
    ({"name": "a.wav", "dialogue": [{"user": "x"}]}, "dialogue must list {user, assistant}"),
    ({"name": "a.wav", "dialogue": []}, "dialogue must list {user, assistant}"),
    (row("a.mp3"), "must be one of"),
    (row("a.txt"), "must be one of wav, flac, ogg"),
    (row("../../a.wav"), "lies outside"),
    (row("a.wav", output="so, maybe"), "has 'maybe', which is no option"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_entries_are_named(
    bad: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = manifest(tmp_path, [row("a.wav"), row("b.wav")])
    whole = json.loads(path.read_text())
    whole["data"]["1"] = bad
    path.write_text(json.dumps(whole))
    for name in ("a.mp3", "a.txt"):
        (tmp_path / "audio" / "part" / name).write_bytes(SECOND)
    (tmp_path / "labels").write_text("so\n")
    with pytest.raises(ValueError, match="--on-bad skip leaves such entries out") as error:
        run(monkeypatch, path, "--options", tmp_path / "labels")
    assert f"{path}: entry 1: " in str(error.value) and message in str(error.value)
    run(monkeypatch, path, "--options", tmp_path / "labels", "--on-bad", "skip")
    assert len(read(tmp_path)) == 1
    assert f"{path}: entry 1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no manifest of Audio Flamingo: it has no flamingo_task"),
        (
            '{"flamingo_task": "x-AQA", "dataset_path": "/", "split_path": null}',
            "data has no entry",
        ),
        ('{"flamingo_task": "x-AQA", "split_path": null, "data": {"0": {}}}', "no dataset_path"),
        ('{"flamingo_task": "x-AQA", "dataset_path": "/", "data": {"0": 1}}', "must hold objects"),
        (
            '{"flamingo_task": "x-AQA", "dataset_path": "/", "split_path": null, "data": {"0": {',
            "behind 0",
        ),
        ("[1]", "a list must hold objects"),
        ("nothing", "train.json: "),
    ],
)
def test_files_of_another_kind_are_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path / "train.json", "--on-bad", "skip")


def test_an_index_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(tmp_path, [row("a.wav")])
    with pytest.raises(ValueError, match=r"entry 0: .*train\.json has no entry 7"):
        run(monkeypatch, interleaved(tmp_path, [entry(0, 7)]))
    with pytest.raises(ValueError, match="fewshot_indices_in_train must be a list, got None"):
        run(monkeypatch, interleaved(tmp_path, [{"generation_index_in_split": 0}]))


def test_a_call_that_goes_on_reads_no_sound_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind any sample; what was left out before it is still counted in the end."""
    names = ["a.wav", "small.wav", "b.wav", "c.wav", "small2.wav"]
    path = manifest(tmp_path, [row(name) for name in names])
    told: list[str] = []
    make = sound_manifests.samples(path, Rules(), told.append)
    whole = list(make(None))
    assert told == ["2 entries: a sound of less than 16000 bytes"]
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: opened.append(self.name) or read_bytes(self)
    )
    for place in range(1, 4):
        told.clear()
        opened.clear()
        state = json.loads(json.dumps(whole[place - 1][1]()))
        rest = [sample for sample, _ in make(state)]
        assert rest == [sample for sample, _ in whole[place:]]
        assert opened == ["a.wav", "b.wav", "c.wav"][place:]
        assert told == ["2 entries: a sound of less than 16000 bytes"]


def test_nothing_but_an_entry_is_in_memory(tmp_path: Path) -> None:
    """The first sample comes before a broken end of the file is read."""
    path = manifest(tmp_path, [row(f"{n}.wav") for n in range(9)])
    # ijson reads 64 KiB at once: what follows is larger.
    big = json.loads(path.read_text())
    big["data"] |= {f"{n}": row("0.wav", "p" * 2000) for n in range(9, 99)}
    path.write_text(json.dumps(big)[:-40])
    stream = sound_manifests.samples(path, Rules(), lambda why: None)(None)
    assert len(list(itertools.islice(stream, 9))) == 9
    with pytest.raises(ValueError, match=r"train\.json: behind \d\d entries"):
        list(stream)


def test_tasks_in_words() -> None:
    for name, words in {
        "audiocaps-AudioCaptioning": "audio captioning",
        "MusicCaps-AudioCaptioning": "music captioning",
        "LP-MusicCaps-MSD-AudioCaptioning": "music captioning",
        "Clotho-AQA-AQA": "audio question answering",
        "Music-AVQA-AQA_All": "audio question answering",
        "Music-AVQA-AVQA_All": "audio vision question answering",
        "NSynth-MIR": "music information retrieval",
        "NSynth-InstrClassification": "instrument classification",
        "CochlScene-SceneClassification": "scene classification",
        "WavText5K-Tagging": "tagging",
        "dialog_MusicCaps-Dialog": "dialog",
    }.items():
        assert task_name(name) == words
