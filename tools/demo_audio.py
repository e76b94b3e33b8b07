"""Audio Flamingo in small, on real recordings: does it hear a class that it was never trained on?

The sounds are spoken names and effects of two Debian packages (nvmm/data/prepare/sound_classes.py).
A third of the classes is in no training data. Each seed trains, from random weights,

  text      the decoder, to copy and to answer by what stands before: what a large one brings
  pretrain  encoder, layers over windows and gated blocks with it: one sound, its class
  few_shot  all but the encoder: four solved sounds before the one that is asked about, whose
            classes have names of that sample alone, so that nothing but the solved ones helps

and is asked for the class of test recordings, with the names of all classes as options: without
solved sounds, behind four of the training recordings that the sound resembles most by the encoder's
vectors (job=encode_sounds, job=few_shot), and behind four at random. The score is accuracy over the
options' likelihoods; it was chosen before any run, and so were the held-out classes. All commands
are public ones, which `command.json` in each folder names. An interrupted call goes on with the
same command.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm import studies
from nvmm.config.check import to_plain
from nvmm.config.compose import composed, failures
from nvmm.data.prepare import audio_demo
from nvmm.data.prepare.packages import sounds
from nvmm.data.samples.decode import Limits, decode_sound
from nvmm.data.samples.drawn_sounds import spectrogram_png
from nvmm.data.samples.sounds import FrontEnd
from nvmm.data.shards.dataset import Dataset
from nvmm.io.files import write
from nvmm.report.alignment import Said
from nvmm.report.audio_study import Heard, Sound, page
from nvmm.report.study import Table

DATA = Path("data/audio_demo")  # of the experiments
SEED = 1234
SHOTS = audio_demo.SHOTS
WAYS = {
    "known": "known classes, 0 shots",
    "zero": "held out, 0 shots",
    "random": f"held out, {SHOTS} random shots",
    "similar": f"held out, {SHOTS} retrieved shots",
}
"""Evaluation -> its row."""
VOTE = f"vote of the {SHOTS} retrieved shots, no decoder"
EXAMPLES = 6


@dataclass(frozen=True)
class Steps:
    """Steps of the three trainings; null: the experiment's."""

    text: int | None = None
    pretrain: int | None = None
    few_shot: int | None = None


def shards(classes: str, part: str) -> str:
    """Return the pattern of test or training recordings of known or held-out classes."""
    return f"{DATA}/{classes}/{part}-*.tar"


def plan(folder: Path, seed: int, steps: Steps) -> studies.Variant:
    """Return the commands of a seed."""

    def train(name: str, *overrides: str) -> studies.Command:
        given = getattr(steps, name)
        length = () if given is None else (f"trainer.max_steps={given}",)
        experiment = f"experiment=audio_demo/{name}"
        return studies.train(
            folder / name, experiment, *studies.ALONE, f"seed={seed}", *length, *overrides
        )

    def encode(part: str) -> studies.Command:
        return studies.command(
            folder / "vectors" / part,
            *("-m", "nvmm.job", "job=encode_sounds", f"job.encoder={folder / 'pretrain'}"),
            *(f"job.shards={shards('held_out', part)}", f"output={folder}/vectors/{part}/rows"),
        )

    def evaluate(name: str, *overrides: str) -> studies.Command:
        output = folder / "evaluation" / name
        classes = "known" if name == "known" else "held_out"
        return studies.command(
            output,
            *("-m", "nvmm.evaluate", f"checkpoint={folder / 'few_shot'}", f"output={output}"),
            *(f"benchmark.shards={shards(classes, 'test')}", "benchmark.choose=likelihood"),
            *overrides,
        )

    neighbours = studies.command(
        folder / "neighbours",
        *("-m", "nvmm.job", "job=few_shot", f"job.num_samples={SHOTS + 1}"),
        *(f"job.shards={shards('held_out', 'test')}", f"job.vectors={folder}/vectors/test/rows"),
        f"job.train={shards('held_out', 'train')}",
        *(f"job.train_vectors={folder}/vectors/train/rows", f"output={folder}/neighbours/rows"),
    )
    shots = (
        *("benchmark=sounds_few_shot", f"benchmark.shots={SHOTS}"),
        f"benchmark.train={shards('held_out', 'train')}",
    )
    return studies.Variant(
        "audio",
        seed,
        (
            train("text"),
            train("pretrain", f"init_from={folder / 'text'}"),
            *(encode(part) for part in ("train", "test")),
            neighbours,
            train("few_shot", f"init_from={folder / 'pretrain'}"),
            evaluate("known", "benchmark=sounds"),
            evaluate("zero", "benchmark=sounds"),
            evaluate("random", *shots),
            evaluate("similar", *shots, f"benchmark.neighbours={folder}/neighbours/rows"),
        ),
    )


def log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(pattern: str) -> dict[str, dict[str, Any]]:
    """Return the members of the samples of shards, by SHARD:KEY."""
    dataset = Dataset(pattern, build=None)  # type: ignore[arg-type]
    found = {}
    for number in range(len(dataset)):
        members = dataset.members(number)
        found[f"{Path(members['__url__']).name}:{members['__key__']}"] = members
    return found


def answer_of(members: Mapping[str, Any]) -> str:
    """Return the class of a recording."""
    return str(json.loads(members["json"])["answer"])


def kind_of(members: Mapping[str, Any]) -> str:
    """Return voice or effect."""
    return str(json.loads(members["json"])["kind"])


def vote(names: Sequence[str]) -> str:
    """Return the name that most have; of several, that of the nearest."""
    counts = Counter(names)
    return max(counts, key=lambda name: (counts[name], -names.index(name)))


def neighbours_of(folder: Path) -> dict[str, list[str]]:
    """Return the retrieved recordings of each test recording, the nearest first."""
    lines = (folder / "neighbours/rows/neighbours.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row["neighbours"] for row in rows}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Return the accuracy of a seed: row -> all, voice, effect -> share."""
    found = {}
    for name in WAYS:
        scores = json.loads((folder / "evaluation" / name / "metrics.json").read_text())
        kinds = {kind: group["score"] for kind, group in scores["kinds"].items()}
        found[WAYS[name]] = {"all": scores["score"], **kinds}
    test, train = records(shards("held_out", "test")), records(shards("held_out", "train"))
    right: dict[str, list[bool]] = {}
    for key, nearest in neighbours_of(folder).items():
        said = vote([answer_of(train[each]) for each in nearest])
        for kind in ("all", kind_of(test[key])):
            right.setdefault(kind, []).append(said == answer_of(test[key]))
    found[VOTE] = {kind: sum(each) / len(each) for kind, each in right.items()}
    return found


def table(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return the table of accuracy. found: seed -> row -> all, voice, effect -> share."""
    seeds = list(found)
    rows = []
    for name in found[seeds[0]]:
        cells = [
            studies.spread([100 * found[seed][name][kind] for seed in seeds], 1)
            for kind in ("all", "voice", "effect")
        ]
        rows.append((name, [*cells, *(f"{100 * found[seed][name]['all']:.1f}" for seed in seeds)]))
    num_known, num_held_out = (len(options_of(classes)) for classes in ("known", "held_out"))
    return Table(
        "Accuracy",
        f"Share of test recordings whose class has the highest likelihood of all options, in"
        f" percent; with several seeds mean ± standard deviation. Chance is"
        f" {100 / num_known:.1f} with the {num_known} known classes and {100 / num_held_out:.1f}"
        f" with the {num_held_out} held-out ones.",
        ["all", "voices", "effects", *(f"seed {seed}" for seed in seeds)],
        rows,
    )


def options_of(classes: str) -> list[str]:
    """Return the classes that test recordings are asked about with."""
    first = next(iter(records(shards(classes, "test")).values()))
    return list(json.loads(first["json"])["options"])


def verdict(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Return in a sentence whether retrieved shots help, in every seed and beyond chance."""
    gains = [
        100 * (rows[WAYS["similar"]]["all"] - rows[WAYS["zero"]]["all"]) for rows in found.values()
    ]
    said = ", ".join(f"{gain:+.1f}" for gain in gains)
    error = 100 * (0.5 / len(records(shards("held_out", "test")))) ** 0.5
    if min(gains) > 2 * error:
        effect = "Effect: retrieved shots raise the accuracy on held-out classes"
    else:
        effect = "No effect: retrieved shots do not raise the accuracy on held-out classes"
    above = [100 * (rows[WAYS["similar"]]["all"] - rows[VOTE]["all"]) for rows in found.values()]
    beside = ", ".join(f"{gain:+.1f}" for gain in above)
    return (
        f"{effect} by more than twice the greatest standard error of a difference,"
        f" {error:.1f} points, in every seed ({said} points over 0 shots). Over the vote of the"
        f" retrieved shots, which asks no decoder, it is {beside} points."
    )


def examples(folder: Path) -> list[Heard]:
    """Return some test recordings of held-out classes with what a seed retrieves and says."""
    test, train = records(shards("held_out", "test")), records(shards("held_out", "train"))
    front_end = experiments_front_end()
    said: dict[str, dict[str, Said]] = {}
    for name in ("zero", "random", "similar"):
        path = folder / "evaluation" / name / "predictions.jsonl"
        for line in path.read_text().splitlines():
            row = json.loads(line)
            url, _, key = row["source"].rpartition(":")
            answers = said.setdefault(f"{Path(url).name}:{key}", {})
            answers[WAYS[name]] = Said(row["prediction"], row["score"] >= 1)
    nearest = neighbours_of(folder)
    keys = list(nearest)
    return [
        Heard(
            sound_of(test[key], front_end),
            [sound_of(train[each], front_end) for each in nearest[key]],
            said[key],
        )
        for key in keys[:: max(1, len(keys) // EXAMPLES)][:EXAMPLES]
    ]


def experiments_front_end() -> FrontEnd:
    """Return the front end of the experiments."""
    config = to_plain(composed("train", ["experiment=audio_demo/pretrain"]))
    options = dict(config["data"]["train"]["build"]["front_end"])
    del options["_target_"]
    return FrontEnd(**options)


def sound_of(members: Mapping[str, Any], front_end: FrontEnd) -> Sound:
    """Return a recording with its file's name, its class and its spectrogram."""
    record = json.loads(members["json"])
    data = members[record["sound"]]
    waveform = front_end.waveform(decode_sound(data, record["file"], Limits()), record["file"])
    whole = front_end.log_mel(front_end.windows(waveform))
    hop = front_end.hop_samples / front_end.frame_hop
    png = spectrogram_png(whole, hop)
    return Sound(f"{record['answer']}: {record['file']}", data, png)


def report(folder: Path, seeds: Sequence[int], steps: Steps) -> None:
    """Write results.json and report.html, and print the table."""
    folders = {seed: folder / f"seed{seed}" for seed in seeds}
    found = {seed: measure(each) for seed, each in folders.items()}
    logs = {
        name: {f"seed {seed}": log(each / name) for seed, each in folders.items()}
        for name in vars(Steps())
    }
    spent = studies.spent(folder)
    given = {name: value for name, value in vars(steps).items() if value is not None}
    last = {
        stage: {line: rows[-1]["loss"] for line, rows in lines.items()}
        for stage, lines in logs.items()
    }
    results = {"accuracy": found, "last_loss": last}
    studies.save(folder / "results.json", results, steps=given or "the experiments'", **spent)
    made, said = table(found), verdict(found)
    lines = [[name, *cells] for name, cells in made.rows]
    print(f"\n{made.note}\n{studies.table(['', *made.columns], lines)}\n\n{said}")
    seconds = f"{spent['cpu_seconds']:.0f}"
    notes = [
        said,
        f"{len(seeds)} seeds; {seconds} seconds of processor time in all. Score and held-out"
        " classes were chosen before any run.",
        f"The sounds are those that the first seed retrieves; the last of a row is asked about."
        f" {DATA}/README.md has sources and licences.",
    ]
    losses = {
        stage: {line: [(row["step"], row["loss"]) for row in rows] for line, rows in lines.items()}
        for stage, lines in logs.items()
    }
    title = "Audio Flamingo in small: sounds of classes that training never heard"
    text = page(title, notes, [made], losses, examples(folders[seeds[0]]))
    write(folder / "report.html", text)
    print(f"\nreport: {folder}/report.html ({seconds} CPU-seconds)")


def main() -> None:
    parser = studies.parser(__doc__, Steps, Path("runs/demo_audio"), seeds=2)
    parser.add_argument("--packages", type=Path, help="folder of both .deb, else apt fetches them")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    audio_demo.build(DATA, *sounds(DATA, options.packages))
    steps = studies.steps_given(Steps, options)
    seeds = range(SEED, SEED + options.seeds)
    studies.run([plan(options.to / f"seed{seed}", seed, steps) for seed in seeds], options.jobs)
    report(options.to, seeds, steps)


if __name__ == "__main__":
    with failures("demo_audio.py"):
        main()
