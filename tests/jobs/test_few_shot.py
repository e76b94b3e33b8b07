"""Few-shot samples of sounds: vectors, neighbours by brute force, shards, killed jobs."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.samples.sounds import FrontEnd
from nvmm.data.shards.dataset import Dataset
from nvmm.jobs.neighbours import Query, neighbours, one_a_file
from nvmm.jobs.parts import Parts
from tests.convert import families
from tests.convert.test_families import imported
from tests.data.samples.test_listening import tokenizer as tokenizer
from tests.data.samples.test_sounds import wave
from tests.jobs import sounds_run
from tests.jobs.sounds_run import LABELS, contents, encoding, few_shot
from tests.ranks import run_ranks

Whole = tuple[Path, str, str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """CLAP's encoder with its projection, as a checkpoint, and Transformers' model of it."""
    folder = tmp_path_factory.mktemp("clap")
    reference = families.clap("projected", folder / "theirs")
    imported(folder / "theirs", folder / "ours")
    return folder / "ours", reference


@pytest.fixture(scope="module")
def whole(encoder: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Vectors of train and test, and few-shot samples of test: folder, train, test, summaries."""
    folder = tmp_path_factory.mktemp("few_shot")
    header = sounds_run.tone(1)
    bad = {2: header[:200]}
    train, test = sounds_run.write_sets(folder, bad)
    jobs = [
        (encoding(train, encoder[0]), folder / "train"),
        (encoding(test, encoder[0]), folder / "test"),
        (few_shot(train, test, folder), folder / "similar"),
    ]
    [summaries] = run_ranks(sounds_run.run, 1, jobs)
    return folder, train, test, summaries


def read(folder: Path) -> list[dict[str, Any]]:
    return Parts(folder).read().to_pylist()


def records(folder: Path) -> list[dict[str, Any]]:
    """The samples of the shards of an output, their json decoded, and their sounds."""
    dataset = Dataset(str(folder / "shards" / "few_shot-*.tar"), None)  # type: ignore[arg-type]
    found = [dataset.members(number) for number in range(len(dataset))]
    return [members | json.loads(members["json"]) for members in found]


def test_a_row_has_the_vector_of_its_sound(whole: Whole, encoder: tuple[Path, Any]) -> None:
    """Transformers' vectors of the same windows, their mean; a bad sound has none, by name."""
    front = instantiate(sounds_run.FRONT_END)
    folder, train, _, summaries = whole
    rows, dataset = read(folder / "train"), Dataset(train, None)  # type: ignore[arg-type]
    from nvmm.data.samples.decode import Limits, read_sound

    for number, row in enumerate(rows):
        sound = read_sound(dataset.members(number)["0.wav"], "s", Limits(), channel="first")
        windows = front(sound, "s")
        assert len(windows) == 2
        with torch.no_grad():
            out = encoder[1](input_features=windows.transpose(1, 2)[:, None]).audio_embeds
        np.testing.assert_allclose(row["vector"], out.mean(0), rtol=1e-4, atol=1e-5)
    assert [row["file"] for row in rows[:3]] == ["file:0.wav", "file:1.wav", "file:2.wav"]
    assert len({row["file"] for row in rows[12:]}) == 6, "without a name the bytes tell the file"
    assert {row["group"] for row in rows} == {'[null, "a"]', '[null, "b"]'}
    [_, _, bad, *_] = read(folder / "test")
    assert bad["vector"] is None and "test-00000.tar:k102: member 0.wav: " in bad["error"]
    assert [summary["bad"] for summary in summaries] == [0, 1, 2]


def test_no_forward_pass_has_more_windows_than_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import parallel_state

    from nvmm.jobs import encode_sounds

    passes: list[list[int]] = []

    def embed(sounds: Any) -> torch.Tensor:
        passes.append([len(sound) for sound in sounds])
        return torch.zeros(len(sounds), 2)

    front_end = FrontEnd(**{k: v for k, v in sounds_run.FRONT_END.items() if k != "_target_"})
    encoder = mock.Mock(side_effect=embed, front_end=front_end, size=2, weights="w")
    for name in ("get_tensor_model_parallel_world_size", "get_pipeline_model_parallel_world_size"):
        monkeypatch.setattr(parallel_state, name, lambda: 1)
    monkeypatch.setattr(encode_sounds, "restore_sound_encoder", lambda *_: encoder)
    train, _ = sounds_run.write_sets(tmp_path)
    for batch_size, together in ((5, [[2, 2]] * 9), (1, [[2]] * 18)):
        passes.clear()
        job = encode_sounds.EncodeSounds(train, "x", batch_size=batch_size)
        rows = job.prepare(None).rows(range(18))
        assert passes == together and rows["error"].null_count == 18
        assert job.metrics(rows) == {"without_dataset": 1.0, "without_task": 0.0}


def test_shots_are_the_nearest_of_the_group_by_brute_force(whole: Whole) -> None:
    folder, *_ = whole
    train, test = read(folder / "train"), read(folder / "test")
    rows = read(folder / "similar")
    names = [f"train-{n // 7:05d}.tar:k{n}" for n in range(18)]
    for query, row in zip(test[:2] + test[3:5], rows[:2] + rows[3:5], strict=True):
        asked = np.array(query["vector"])
        distances = {
            n: float(((np.array(other["vector"]) - asked) ** 2).sum())
            for n, other in enumerate(train)
            if other["group"] == query["group"] and other["file"] != query["file"]
        }
        nearest: dict[str, float] = {}
        for n in sorted(distances, key=distances.__getitem__):
            nearest.setdefault(train[n]["file"], distances[n])
        numbers = [names.index(name) for name in row["neighbours"]]
        assert [train[n]["file"] for n in numbers] == list(nearest)[:3]
        expected = [distances[n] for n in numbers]
        np.testing.assert_allclose(row["distances"], expected, rtol=1e-3, atol=1e-4)
    assert "file:3.wav" not in [train[names.index(n)]["file"] for n in rows[0]["neighbours"]]
    assert rows[2]["error"] == test[2]["error"]
    assert rows[5]["error"].startswith("test-00001.tar:k105: job.train has no sound of another")


def test_shards_have_the_shots_shuffled_and_the_query_last(whole: Whole, tokenizer: Any) -> None:
    folder, *_ = whole
    rows = [row for row in read(folder / "similar") if row["error"] is None]
    lines = [json.loads(x) for x in (folder / "similar" / "neighbours.jsonl").open()]
    assert lines == [
        {"id": r["id"], "interleaved": "similar", "neighbours": r["neighbours"]} for r in rows
    ]
    shuffled = 0
    samples = records(folder / "similar")
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001", *_keys(3, 4)]
    for sample, row in zip(samples, rows, strict=True):
        numbers = [int(name.partition(":k")[2]) for name in row["neighbours"]]
        assert [clip["sound"] for clip in sample["clips"]] == [f"{n}.wav" for n in range(4)]
        sounds = [sample[f"{n}.wav"] for n in range(4)]
        by_sound = [next(n for n in numbers if sounds_run.tone(n) == s) for s in sounds[:3]]
        assert sorted(by_sound) == sorted(numbers)
        shuffled += by_sound != numbers
        asked = int(row["id"].partition(":k")[2])
        assert sounds[3] == sounds_run.tone(asked)
        answers = [clip["answer"] for clip in sample["clips"]]
        assert answers == [LABELS[n % 3] for n in (*by_sound, asked)]
        assert (sample["interleaved"], sample["options"]) == ("similar", list(LABELS))
        assert sample["task"] == sample["kind"] and ("files" in sample) == (asked == 100)
    assert shuffled, "the order says nothing of the distance"
    template = ListeningTemplate(begin="", ask="\n<SEP>", finish="<|im_end|>", few_shot="see. ")
    front = instantiate(sounds_run.FRONT_END)
    build = SoundBuilder(front, template, tokenizer=tokenizer, sequence_length=400)
    shards = Dataset(str(folder / "similar" / "shards" / "*.tar"), lambda **_: build)
    example = shards.bind()[0]
    text = tokenizer.decode(example.text.tokens, skip_special_tokens=False)
    assert text.count("<audio>what is heard?\n<SEP>") == 4 and text.startswith("see. ")


def _keys(*numbers: int) -> list[str]:
    return [f"{number:08d}" for number in numbers]


def test_a_draw_and_a_seed_and_the_training_split_itself(whole: Whole, tmp_path: Path) -> None:
    folder, train, test, _ = whole
    jobs = [
        (few_shot(train, test, folder, mode="random"), tmp_path / "random"),
        (few_shot(train, test, folder, mode="random", part_size=9), tmp_path / "again"),
        (few_shot(train, test, folder, mode="random", seed=1), tmp_path / "other"),
        (few_shot(train, train, folder, num_samples=7), tmp_path / "own"),
        (few_shot(train, test, folder, normalize=True), tmp_path / "normalised"),
    ]
    [summaries] = run_ranks(sounds_run.run, 1, jobs)
    drawn, again, other, own = (read(tmp_path / x) for x in ("random", "again", "other", "own"))
    names = [[row["neighbours"] for row in some] for some in (drawn, again, other)]
    assert names[0] == names[1] != names[2]
    assert all(sample["interleaved"] == "random" for sample in records(tmp_path / "random"))
    assert all(len(row["neighbours"] or "123") == 3 for row in drawn)
    for number, row in enumerate(own):
        files = [int(name.partition(":k")[2]) for name in row["neighbours"]]
        files = [n % 8 if n < 12 else n for n in files]
        assert (number % 8 if number < 12 else number) not in files
        assert len(set(files)) == len(files) == (6 if number < 12 else 5)
    assert summaries[3]["metrics"] == {
        "shots_per_sample": pytest.approx((12 * 6 + 6 * 5) / 18),
        "samples_with_fewer": pytest.approx(6 / 18),
    }
    vectors = {row["key"]: np.array(row["vector"]) for row in read(folder / "train")}
    asked = {row["key"]: row["vector"] for row in read(folder / "test")}
    first = read(tmp_path / "normalised")[0]

    def unit(x: Any) -> Any:
        return np.array(x) / np.linalg.norm(x)

    nearest = unit(vectors[first["neighbours"][0].partition(":")[2]])
    expected = ((nearest - unit(asked["k100"])) ** 2).sum()
    assert first["distances"][0] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_more_rows_are_searched_until_there_are_enough_files() -> None:
    """400 rows of one file are nearer than the two others."""
    files = ["near"] * 400 + ["far", "farther", "own"]
    query, asked = Query("own", "g", np.zeros(1, np.float32), "0/k"), []

    def ranked(queries: Any, k: int) -> list[list[tuple[int, float]]]:
        asked.append(k)
        return [[(n, float(n)) for n in range(403)][:k] for _ in queries]

    [found] = neighbours([query], ranked, files, 403, 3)
    assert [files[row] for row, _ in found] == ["near", "far", "farther"]
    assert asked == [54, 216, 864]
    ranking = ranked([query], 400)[0]
    rows = {
        one_a_file(ranking, files, Query("x", "g", query.vector, f"{n}"), 3)[0] for n in range(9)
    }
    assert len(rows) > 1, "which row of a file is drawn"


def killed(init: str, *arguments: Any) -> None:
    sounds_run.run(0, 1, init, *arguments)


@pytest.mark.parametrize("folder", ["similar", pytest.param("train", marks=pytest.mark.slow)])
def test_a_killed_job_goes_on_and_repeats_nothing(
    whole: Whole, encoder: tuple[Path, Any], folder: str, tmp_path: Path
) -> None:
    """Killed behind its second part; two ranks go on, and the files are an undisturbed job's."""
    source, train, test, _ = whole
    options = few_shot(train, test, source) if folder == "similar" else encoding(train, encoder[0])
    output = tmp_path / folder
    context = multiprocessing.get_context("forkserver")
    arguments = (f"file://{tmp_path}/rendezvous", [(options, output)], (folder, 2))
    process = context.Process(target=killed, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.arrow")}
    assert len(kept) == 2 and not (output / "neighbours.jsonl").exists()
    ranks = 2 if folder == "similar" else 1
    run_ranks(sounds_run.run, ranks, [(options, output)])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "none was made again"
    assert contents(output) == contents(source / folder)


def test_a_shard_that_was_damaged_is_written_again(whole: Whole, tmp_path: Path) -> None:
    """It and the one that is gone have four samples; then there is nothing to do."""
    folder, train, test, _ = whole
    options = few_shot(train, test, folder)
    [found] = run_ranks(sounds_run.run_damaged, 1, options, tmp_path / "out")
    before, first, after, second, last = found
    assert (first, second) == (4, 0)
    assert before == after == last and len(before) == 9


def test_hostile_sounds_are_holes_that_are_named(encoder: tuple[Path, Any], tmp_path: Path) -> None:
    from nvmm.data.shards.dataset import write_shards

    rng = np.random.default_rng(0)
    tone = sounds_run.tone(1)
    hostile = {
        "empty": b"",
        "a header alone": b"RIFF\x10\x00\x00\x00WAVEfmt ",
        "no samples": wave(np.zeros(0, np.float32), 8000),
        "1 Hz": wave(np.zeros(9, np.float32), 1),
        "NaN": wave(np.array([0, np.nan] * 500, np.float32), 8000, subtype="FLOAT"),
        "truncated": tone[:-50],
        "lying header": tone[:4]
        + b"\xff\xff\xff\x7f"
        + tone[8:40]
        + b"\xff\xff\xff\x7f"
        + tone[44:],
    }
    heard = {
        "8 channels": wave(rng.normal(0, 0.1, (2000, 8)), 8000),
        "24 bits": wave(rng.normal(0, 0.1, 2000), 8000, subtype="PCM_24"),
        "an hour": wave(np.zeros(3600 * 1000, np.int16), 1000, "FLAC"),
    }
    sounds = hostile | heard
    samples = [sounds_run.sample(n, "a", None, data) for n, data in enumerate(sounds.values())]
    for sample in samples[-1:]:
        record = json.loads(sample["json"]) | {"sound": "0.flac"}
        sample |= {"json": json.dumps(record).encode(), "0.flac": sample.pop("0.wav")}
    write_shards(tmp_path, "test", samples)
    write_shards(tmp_path, "train", [sounds_run.sample(n, "a", None) for n in range(6)])
    test, train = str(tmp_path / "test-*.tar"), str(tmp_path / "train-*.tar")
    jobs = [
        (encoding(train, encoder[0]), tmp_path / "train"),
        (encoding(test, encoder[0]), tmp_path / "test"),
        (few_shot(train, test, tmp_path), tmp_path / "out"),
        (
            few_shot(test, train, tmp_path)
            | {
                "vectors": str(tmp_path / "train"),
                "train_vectors": str(tmp_path / "test"),
            },
            tmp_path / "back",
        ),
    ]
    [summaries] = run_ranks(sounds_run.run, 1, jobs)
    rows = dict(zip(sounds, read(tmp_path / "test"), strict=True))
    for name, row in rows.items():
        if name in heard:
            assert row["error"] is None and len(row["vector"]) == 12, name
        else:
            assert row["error"].startswith(str(tmp_path / "test-00000.tar")), name
            assert "member 0.wav" in row["error"], name
    assert [s["bad"] for s in summaries] == [0, len(hostile), len(hostile), 0]
    assert len(records(tmp_path / "out")) == len(heard)
    assert all(len(row["neighbours"]) == len(heard) for row in read(tmp_path / "back"))


def test_what_does_not_fit_is_refused(
    whole: Whole, encoder: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, train, test, _ = whole
    plain = few_shot(train, test, folder)
    own = encoding(test, encoder[0])
    cases: list[tuple[dict[str, Any], str]] = [
        (plain | {"vectors": str(folder / "train")}, "job.vectors=.* other samples than"),
        (plain | {"num_samples": 1}, "num_samples=1 must be at least 2"),
        (plain | {"mode": "near"}, "job.mode=near must be one of similar, random"),
        (plain | {"mode": "random", "normalize": True}, "normalize=true does nothing"),
        (plain | {"vectors": str(folder / "similar")}, "is no output of job=encode_sounds"),
        (own | {"front_end": None}, "does not say what its encoder hears"),
        (own | {"front_end": sounds_run.FRONT_END | {"bins": 8}}, "hears 16 bins"),
    ]
    options = [options for options, _ in cases]
    [found] = run_ranks(sounds_run.run_refused, 1, options, tmp_path / "out")
    for (_, message), text in zip(cases, found, strict=True):
        assert re.search(message, text), text
