"""Everything that `tools/demo_audio.py` trains and evaluates on, of `sound_classes`' recordings.

    pretrain/   one take and its class, or its class and what it is a recording of
    episodes/   solved takes before the one that is asked about, whose classes have names of this
                episode alone: nothing but the solved ones says what a name means
    single/     one take, asked about with options
    known/ held_out/   train and test recordings as they are, of the classes that training hears,
                and of those that it does not
    tokenizer/  a byte-level BPE
    README.md   a dataset card

Takes of training are faster or slower than the recording, by at most a quarter for a voice, which
makes several voices of one, and begin somewhere in a long one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvmm.data.prepare.once import once
from nvmm.data.prepare.records import to_sample
from nvmm.data.prepare.sound_classes import (
    RATE,
    SECONDS,
    VOICES,
    Recording,
    held_out,
    recordings,
    split,
    take,
    waveform,
)
from nvmm.data.prepare.word_lists import WORDS
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.io.files import write

import os
PROTO = "PROTO" in os.environ
FORMAT = 1
"""A number that is increased when the data made from the same arguments change."""
QUESTION = "what is this sound?"
DESCRIBE = "describe the sound."
END, CHUNK, ASK, MARKER, PAD = "</s>", "<|endofchunk|>", "<SEP>", "<audio>", "<pad>"
SPECIAL_TOKENS = (PAD, END, MARKER, ASK, CHUNK, "<|vision_pad|>")
"""The last is the placeholder of a picture, which every tokenizer has and none of these texts."""
VOCAB_SIZE = 1024
SPEEDS = {"lower": 0.8, "low": 0.9, "plain": 1.0, "high": 1.12, "higher": 1.25}
"""Word -> speed of a voice's takes."""
JITTER = 0.06
"""A sound's takes are so much faster or slower."""
SHOTS = 4
"""Solved takes of an episode."""
NUM_OPTIONS = 8


@dataclass(frozen=True)
class Amounts:
    """The takes of a source, the samples of pretraining, `single` and `episodes`, the recordings of
    a class in training and test of its split, and the seed.
    """

    takes: int = 16
    pretrain: int = 6000
    single: int = 1500
    episodes: int = 3000
    most_train: int = 150
    most_test: int = 20
    seed: int = 1234


def build(folder: str | Path, stamps: Path, samples: Path, amounts: Amounts = Amounts()) -> bool:
    """Write the data; return False if they were there already.

    stamps, samples: see `recordings`. The same arguments give the same bytes.
    """
    settings = {"format": FORMAT, **asdict(amounts)}
    return once(Path(folder), settings, partial(_write, Path(folder), stamps, samples, amounts))


def _write(folder: Path, stamps: Path, samples: Path, amounts: Amounts) -> None:
    classes = recordings(stamps, samples)
    hidden = held_out(list(classes))
    train, test = split(classes, amounts.most_train, amounts.most_test)
    known = {label: each for label, each in train.items() if label not in hidden}
    rng = random.Random(amounts.seed)
    draw = Draw(bank(known, amounts.takes, rng), rng)
    names = tuple(dict.fromkeys([*classes, *WORDS]))
    _tokenizer(folder / "tokenizer", names, known)
    write_shards(folder / "pretrain", "train", pretraining(draw, amounts.pretrain))
    write_shards(folder / "single", "train", singles(draw, amounts.single))
    write_shards(folder / "episodes", "train", episodes(draw, names, amounts.episodes))
    for name, labels in (("known", list(known)), ("held_out", hidden)):
        for part, by_label in (("train", train), ("test", test)):
            given = {label: by_label[label][: amounts.most_test] for label in labels}
            write_shards(folder / name, part, plain(given, labels))
    write(folder / "README.md", card(train, test, hidden))


@dataclass(frozen=True)
class Source:
    """Takes that sound alike, to which an episode gives one name.

    takes: (what the recording is of, FLAC) of one voice at one speed, or of one recording.
    """

    label: str
    takes: Sequence[tuple[str, bytes]]


def bank(known: Mapping[str, Sequence[Recording]], count: int, rng: random.Random) -> list[Source]:
    """Return the sources of training, of so many takes each: voices at each speed, recordings."""
    sources = []
    for label, each in known.items():
        kinds: list[tuple[Sequence[Recording], float, str | None]]
        if each[0].is_voice:
            kinds = [(each, speed, word) for word, speed in SPEEDS.items()]
        else:
            kinds = [([recording], 1.0, None) for recording in each]
        for chosen, speed, word in kinds:
            takes = []
            for _ in range(count):
                recording = rng.choice(chosen)
                jitter = 1 + rng.uniform(-JITTER, JITTER)
                sound = take(waveform(recording, speed * jitter), rng.random())
                takes.append((word or recording.detail, sound))
            sources.append(Source(label, takes))
    return sources


class Draw:
    """Random sources and takes, each class equally often."""

    def __init__(self, sources: Sequence[Source], rng: random.Random) -> None:
        self.rng = rng
        self.by_label: dict[str, list[Source]] = {}
        for source in sources:
            self.by_label.setdefault(source.label, []).append(source)

    def labels(self) -> list[str]:
        """Return all classes in a random order."""
        return self.rng.sample(list(self.by_label), len(self.by_label))

    def one(self, label: str) -> tuple[str, bytes]:
        """Return a take of a class."""
        return self.rng.choice(self.rng.choice(self.by_label[label]).takes)

    def alike(self, label: str) -> list[tuple[str, bytes]]:
        """Return takes that sound alike: of one source, or one time in three of a class of effects
        any."""
        sources = self.by_label[label]
        if label not in VOICES.values() and self.rng.random() < 1 / 3:
            return [take for source in sources for take in source.takes]
        return list(self.rng.choice(sources).takes)


def pretraining(draw: Draw, count: int) -> Iterator[dict[str, bytes | str]]:
    """Yield takes, each with its class, or its class and what it is of."""
    for number in range(count):
        label = draw.labels()[0]
        detail, sound = draw.one(label)
        if draw.rng.random() < 0.5:
            yield _sample(number, [(sound, QUESTION, label)])
        else:
            yield _sample(number, [(sound, DESCRIBE, f"{label}, {detail}")])


def singles(draw: Draw, count: int) -> Iterator[dict[str, bytes | str]]:
    """Yield takes that are asked about with options."""
    for number in range(count):
        labels = draw.labels()[:NUM_OPTIONS]
        yield _sample(number, [(draw.one(labels[0])[1], QUESTION, labels[0])], labels)


def episodes(draw: Draw, names: Sequence[str], count: int) -> Iterator[dict[str, bytes | str]]:
    """Yield solved takes and the one that is asked about, of classes with names of the episode.

    One to three of the solved takes are of the class that is asked about, in any places.
    """
    rng = draw.rng
    for number in range(count):
        right, *others = [draw.alike(label) for label in draw.labels()[: SHOTS + 1]]
        given = rng.sample(names, NUM_OPTIONS)
        alike = rng.randint(1, SHOTS - 1)
        others = others[: rng.randint(1, SHOTS - alike)]
        wrong = [rng.randrange(len(others)) for _ in range(SHOTS - alike)]
        # The take that is asked about is none of the solved ones.
        *same, last = rng.sample(right, alike + 1)
        shots = [(take, given[0]) for take in same]
        shots += [(rng.choice(others[place]), given[1 + place]) for place in wrong]
        rng.shuffle(shots)
        clips = [(sound, QUESTION, name) for (_, sound), name in shots]
        yield _sample(number, [*clips, (last[1], QUESTION, given[0])], given)


def plain(
    by_label: Mapping[str, Sequence[Recording]], options: Sequence[str]
) -> Iterator[dict[str, bytes | str]]:
    """Yield recordings as they are, asked about with these options."""
    number = 0
    for label, each in by_label.items():
        for recording in each:
            record = {
                "file": recording.path.name,
                "kind": "voice" if recording.is_voice else "effect",
                "options": sorted(options),
                "sound": "0.flac",
                "prompt": QUESTION,
                "answer": label,
            }
            yield to_sample(f"{number:06d}", record, [("0", "flac", take(waveform(recording)))])
            number += 1


def options_block(options: Sequence[str]) -> str:
    """Return options as the template writes them, for the tokenizer."""
    return "\noptions:" + "".join(f"\n - {option}." for option in sorted(options))


def card(
    train: Mapping[str, Sequence[Recording]],
    test: Mapping[str, Sequence[Recording]],
    hidden: Sequence[str],
) -> str:
    """Return a dataset card: sources, licences, classes."""
    rows = "".join(
        f"| {label} | {'held out' if label in hidden else 'known'} | {len(train[label])} |"
        f" {len(test[label])} |\n"
        for label in train
    )
    return (
        "# Sounds of the demo of Audio Flamingo\n\n"
        "Recordings of Debian's tuxpaint-stamps-default (the Tux Paint developers and others,"
        " GPL-2) and sonic-pi-samples (Sonic Pi's samples, CC0); both packages have a"
        " `copyright` file. A class of spoken names is a language. Equal recordings are"
        f" one. Takes have {RATE} samples a second, and at most {SECONDS} seconds.\n\n"
        "| class | | train | test |\n|---|---|---|---|\n" + rows
    )


def _sample(
    number: int, clips: Sequence[tuple[bytes, str, str]], options: Sequence[str] = ()
) -> dict[str, bytes | str]:
    """Return a sample of (sound, prompt, answer), the last of which has these options."""
    listed = [
        {"sound": f"{place}.flac", "prompt": prompt, "answer": answer}
        for place, (_, prompt, answer) in enumerate(clips)
    ]
    if PROTO and options: listed[-1]["prompt"] += options_block(options)
    files = [(str(place), "flac", sound) for place, (sound, _, _) in enumerate(clips)]
    record = {"clips": listed, **({"options": sorted(options)} if options and not PROTO else {})}
    return to_sample(f"{number:06d}", record, files)


def _tokenizer(
    folder: Path, names: Sequence[str], known: Mapping[str, Sequence[Recording]]
) -> None:
    """Train a tokenizer for which each name is one token, behind a space and without."""
    texts = [f"{name}\n - {name}." for name in names for _ in range(20)]
    texts += [f"{r.label}, {r.detail}" for each in known.values() if not each[0].is_voice for r in each]
    texts += [f"{QUESTION}{options_block(names)}\nanswer:", DESCRIBE, *(f"x, {speed}" for speed in SPEEDS)] * 20
    train_byte_level_bpe(
        folder,
        texts,
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        eos_token=END,
        pad_token=PAD,
    )
