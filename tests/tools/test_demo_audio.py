"""tools/demo_audio.py: its data, its commands are valid, feed each other, and run in miniature."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nvmm import studies
from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare import audio_demo, packages, sound_classes
from nvmm.data.shards.dataset import Dataset
from nvmm.inference import sound_encoder
from nvmm.report.alignment import Said
from nvmm.report.audio_study import Heard, page
from tests.tools.demo_script import ROOT, run_script
from tools import demo_audio as demo

RUN = Path("runs/x/seed5")
FAMILIES = ("bd", "drum", "elec", "glitch", "loop", "perc", "tabla")
VOICES = ("fr", "es")
RATE = 22_050
SMALL = audio_demo.Amounts(
    takes=4, text=6, pretrain=12, single=6, episodes=8, most_train=5, most_test=3
)


def package(folder: Path, each: int = 8) -> tuple[Path, Path]:
    """The folders of both packages, with tones: one pitch a class, one length a recording."""
    stamps, samples = (folder / name / place for name, (place, _) in packages.SOUNDS.items())
    samples.mkdir(parents=True)
    (stamps / "animals/birds").mkdir(parents=True)
    (stamps / "symbols").mkdir(parents=True)
    paths = [samples / f"{family}_a{n}.flac" for family in FAMILIES for n in range(each)]
    for voice in VOICES:
        paths += [stamps / f"animals/birds/crow{n}_desc_{voice}.ogg" for n in range(each)]
    # Too few birds for a class, a letter, and a family that the demo does not have.
    paths += [stamps / "animals/birds/crow.ogg", stamps / "symbols/a_desc_fr.ogg"]
    paths += [samples / "misc_burp.flac"]
    for number, path in enumerate(paths):
        time = np.arange(RATE * (4 + number % each) // 10) / RATE
        tone = np.sin(2 * np.pi * (200 + 100 * (number // each)) * time)
        soundfile.write(path, 0.5 * tone, RATE)
    (samples / "bd_again.flac").write_bytes((samples / "bd_a0.flac").read_bytes())
    (samples / "bd_broken.flac").write_bytes(b"fLaC and no more")
    return stamps, samples


def test_classes_are_families_folders_and_languages(tmp_path: Path) -> None:
    classes = sound_classes.recordings(*package(tmp_path))
    assert {label: len(each) for label, each in classes.items()} == dict.fromkeys(
        [
            "drum",
            "electronic",
            "french",
            "glitch",
            "kick",
            "loop",
            "percussion",
            "spanish",
            "tabla",
        ],
        8,
    )
    assert sound_classes.held_out(list(classes)) == ["electronic", "kick", "spanish"]
    assert {recording.detail for recording in classes["french"]} == {f"crow{n}" for n in range(8)}
    assert classes["french"][0].is_voice and not classes["kick"][0].is_voice
    train, test = sound_classes.split(classes, 5, 3)
    for label, each in classes.items():
        assert not {*train[label]} & {*test[label]} and {*train[label], *test[label]} <= {*each}
        assert (len(train[label]), len(test[label])) == (5, 3)
    with pytest.raises(ValueError, match="no class has 8 recordings"):
        sound_classes.recordings(tmp_path / "none", tmp_path / "none")


def test_a_take_is_cut_scaled_and_faster(tmp_path: Path) -> None:
    _, samples = package(tmp_path, each=1)
    recording = sound_classes.Recording(samples / "bd_a0.flac", "kick", "a0")
    slow, fast = (sound_classes.waveform(recording, speed) for speed in (0.5, 2.0))
    assert abs(len(slow) - 4 * len(fast)) <= 2
    values = np.linspace(-0.2, 0.2, 3 * sound_classes.RATE, dtype=np.float32)
    for begin, first in ((0.0, -0.2), (1.0, 0.0)):
        taken, rate = soundfile.read(io.BytesIO(sound_classes.take(values, begin)))
        assert rate == sound_classes.RATE and len(taken) == sound_classes.SECONDS * rate
        assert abs(taken).max() == pytest.approx(0.9, abs=1e-3)
        assert taken[0] == pytest.approx(4.5 * first, abs=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of small packages, as the experiments read them."""
    folder = tmp_path_factory.mktemp("audio_demo")
    stamps, samples = package(folder / demo.DATA)
    assert audio_demo.build(folder / demo.DATA, stamps, samples, SMALL)
    assert not audio_demo.build(folder / demo.DATA, stamps, samples, SMALL)
    return folder


def jsons(data: Path, name: str, part: str = "train") -> list[dict[str, Any]]:
    dataset = Dataset(str(data / demo.DATA / name / f"{part}-*.tar"), build=None)  # type: ignore[arg-type]
    return [json.loads(dataset.members(n)["json"]) for n in range(len(dataset))]


def test_only_solved_sounds_say_what_a_name_means(data: Path) -> None:
    told: dict[str, set[bytes]] = {}
    dataset = Dataset(str(data / demo.DATA / "episodes/train-*.tar"), build=None)  # type: ignore[arg-type]
    for number in range(len(dataset)):
        members = dataset.members(number)
        record = json.loads(members["json"])
        *solved, asked = record["clips"]
        names = [clip["answer"] for clip in solved]
        assert len(solved) == demo.SHOTS and 1 <= names.count(asked["answer"]) <= demo.SHOTS - 1
        options = asked["prompt"].split(" - ")[1:]
        assert {f"{name}." for name in names} <= {option.strip() for option in options}
        assert len(options) == audio_demo.NUM_OPTIONS
        again = [clip for clip in solved if members[clip["sound"]] == members[asked["sound"]]]
        assert not again, "the sound that is asked about is solved already"
        told.setdefault(asked["answer"], set()).add(members[asked["sound"]])
    assert len(told) > 4, "a name is of this sample alone"


def test_held_out_classes_are_in_no_training_data(data: Path) -> None:
    hidden = {"electronic", "kick", "spanish"}
    for name in ("pretrain", "single"):
        said = {clip["answer"].split(",")[0] for row in jsons(data, name) for clip in row["clips"]}
        assert said and not said & hidden
    assert {row["answer"] for row in jsons(data, "held_out")} == hidden
    test, train = jsons(data, "held_out", "test"), jsons(data, "held_out")
    assert all(row["options"] == sorted(hidden) for row in test)
    assert not {row["file"] for row in test} & {row["file"] for row in train}
    assert not {row["answer"] for row in jsons(data, "known", "test")} & hidden
    card = (data / demo.DATA / "README.md").read_text()
    assert "GPL-2" in card and "CC0" in card and "| kick | held out | 5 | 3 |" in card


def test_every_stage_reads_its_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.utils import instantiate

    monkeypatch.chdir(data)
    texts = {}
    for name in ("text", "pretrain", "few_shot"):
        start = [] if name == "text" else ["init_from=x"]
        config = to_plain(composed("train", [f"experiment=audio_demo/{name}", *start]))
        tokenizer = instantiate(config["tokenizer"], _convert_="all")
        assert tokenizer.vocab_size <= config["model"]["language"]["vocab_size"]
        made = instantiate(config["data"], _convert_="all")(tokenizer=tokenizer)
        for component in made.components:
            for number in range(len(component.dataset)):
                tokens = component.dataset[number].text.tokens.tolist()
                text = tokenizer.decode(tokens, skip_special_tokens=False)
                texts.setdefault((name, component.name), []).append(text)
    for text in texts["few_shot", "episodes"]:
        assert text.count("<audio>") == demo.SHOTS + 1 and text.count("options:") == 1
    assert all(text.count("options:") == 1 for text in texts["few_shot", "single"])
    for stage in ("text", "pretrain", "few_shot"):
        solved, again = texts[stage, "text"][::2], texts[stage, "text"][1::2]
        assert all(text.count("<SEP>") == audio_demo.SOLVED_WORDS for text in solved)
        for text in again:
            asked, _, answer = text.partition("\nAnswer:<SEP>")
            assert answer == f"{asked}<|endofchunk|></s>"
            assert len(asked.split()) == audio_demo.LISTED
    assert all(text.count("<audio>") == 1 for text in texts["pretrain", "sounds"])


def chain(steps: demo.Steps | None = None) -> list[studies.Command]:
    return list(demo.plan(RUN, 5, steps or demo.Steps()).commands)


def test_every_command_composes_and_passes_the_checks() -> None:
    kinds = []
    for command in chain(demo.Steps(77, 77, 77)):
        kind = command.arguments[3].removeprefix("nvmm.")
        config = composed(kind, [argument(text) for text in command.arguments[4:]])
        entry: Any = {} if kind == "train" else {"entry": kind, "world_size": 1}
        assert check(config, **entry) == [], command.folder
        plain = to_plain(config)
        if kind == "train":
            assert plain["trainer"]["max_steps"] == 77 and plain["seed"] == 5
        elif kind == "evaluate":
            shots = command.folder.name in ("random", "similar")
            assert plain["benchmark"].get("shots") == (demo.SHOTS if shots else None)
        kinds.append(kind)
    assert [kinds.count(kind) for kind in ("train", "job", "evaluate")] == [3, 3, 4]


def test_each_command_reads_what_is_made_before_it() -> None:
    before: set[str] = set()
    for command in chain():
        own = ("output=", "run.dir=")
        words = [t for t in command.arguments if str(RUN) in t and not t.startswith(own)]
        read = {Path(text.rpartition("=")[2]).relative_to(RUN).parts[0] for text in words}
        assert read <= before, command.folder
        before.add(command.folder.relative_to(RUN).parts[0])


def test_vectors_come_from_the_encoder_of_a_run() -> None:
    """A run's encoder is loaded by the name that models give it."""
    names = ROOT / "tests/golden/parameter_names_audio_flamingo_tiny.txt"
    assert f"\n{sound_encoder._PREFIX}.bin_norm.mean " in names.read_text()


def test_the_vote_is_of_most_and_then_of_the_nearest() -> None:
    assert demo.vote(["a", "b", "b", "c"]) == "b"
    assert demo.vote(["c", "b", "b", "c"]) == "c"
    assert demo.vote(["c", "a", "b", "d"]) == "c"


def test_table_and_verdict_have_every_number(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    names = [*demo.WAYS.values(), demo.VOTE]

    def scores(zero: float, similar: float) -> dict[str, dict[str, float]]:
        rows = {name: {"all": 0.5, "voice": 0.25, "effect": 0.75} for name in names}
        rows[demo.WAYS["zero"]]["all"] = zero
        rows[demo.WAYS["similar"]]["all"] = similar
        return rows

    found = {1: scores(0.1, 0.9), 2: scores(0.1, 0.8)}
    made = demo.table(found)
    assert made.columns == ["all", "voices", "effects", "seed 1", "seed 2"]
    assert [name for name, _ in made.rows] == names
    assert made.rows[3][1] == ["85.0 ± 7.1", "25.0 ± 0.0", "75.0 ± 0.0", "90.0", "80.0"]
    assert "16.7 with the 6 known classes and 33.3 with the 3 held-out ones" in made.note
    # Nine questions: the greatest standard error of a difference is sqrt(1 / 18).
    assert demo.verdict(found).startswith("Effect") and "23.6 points" in demo.verdict(found)
    assert "it is +40.0, +30.0 points" in demo.verdict(found)
    found[2] = scores(0.4, 0.8)
    assert demo.verdict(found).startswith("No effect") and "+40.0" in demo.verdict(found)


def test_a_page_has_players_and_spectrograms(data: Path) -> None:
    members = next(iter(demo.records(str(data / demo.DATA / "held_out/test-*.tar")).values()))
    sound = demo.sound_of(members, demo.experiments_front_end())
    assert sound.name.startswith("electronic: samples/elec_a") and sound.flac == members["0.flac"]
    heard = Heard(sound, [sound], {"way <0>": Said("kick", False)})
    made = demo.Table("Scores", "A note.", ["all"], [("row", ["1.0"])])
    text = page(
        "A <title>", ["Said."], [made], {"pretrain": {"seed 1": [(1, 2.0), (2, 1.0)]}}, [heard]
    )
    assert text.count("<audio controls") == text.count("data:image/png") == 2
    assert "A &lt;title&gt;" in text and "way &lt;0&gt;" in text and "<svg" in text


@pytest.mark.slow
def test_the_whole_chain_runs_in_miniature(tmp_path: Path) -> None:
    """Small packages, few steps; a second call runs nothing."""
    package(tmp_path / demo.DATA)
    script = tmp_path / "small.py"
    numbers = ", ".join(f"{name}={value}" for name, value in vars(SMALL).items())
    script.write_text(
        "from nvmm.data.prepare import audio_demo\n"
        f"small = audio_demo.Amounts({numbers})\n"
        "build = audio_demo.build\n"
        "audio_demo.build = lambda *places: build(*places, small)\n"
        "from tools import demo_audio\n"
        "demo_audio.main()\n"
    )
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    options = [
        "--seeds=1",
        "--text-steps=20",
        "--pretrain-steps=20",
        "--few-shot-steps=20",
        "--to",
        "runs",
    ]
    assert run_script(script, options, tmp_path).count("attempt 1") == len(chain())
    results = json.loads((tmp_path / "runs/results.json").read_text())["results"]
    rows = results["accuracy"][str(demo.SEED)]
    assert set(rows) == {*demo.WAYS.values(), demo.VOTE}
    assert rows[demo.VOTE]["all"] > 0.5, "tones of one pitch are no neighbours"
    text = (tmp_path / "runs/report.html").read_text()
    assert "<audio controls" in text and ("Effect:" in text or "No effect:" in text)
    assert "attempt" not in run_script(script, options, tmp_path)
