"""Everything that `tools/demo_audio.py` trains and evaluates on, of `sound_classes`' recordings.

    text/       words to write again, and words with names of the sample alone, some several times
    pretrain/   a take, its class and what it is a recording of, or one time in four its class
    episodes/   solved takes before the one that is asked about, of classes with names of the sample
                alone: nothing but the solved ones says what a name means
    single/     a take, asked about with options
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
JITTER = 0.03
"""A sound's takes are so much faster or slower."""
LISTED = 16
"""Words to write again."""
SOLVED_WORDS = 8
SHOTS = 4
"""Solved takes of an episode."""
NUM_OPTIONS = 8


@dataclass(frozen=True)
class Amounts:
    """The takes of a source, the samples of each stage, the recordings of a class in training and
    test of its split, and the seed.
    """

    takes: int = 16
    text: int = 8000
    pretrain: int = 4000
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
    write_shards(folder / "text", "train", spoken(rng, names, amounts.text))
    write_shards(folder / "pretrain", "train", pretraining(draw, amounts.pretrain))
    write_shards(folder / "single", "train", singles(draw, amounts.single))
    write_shards(folder / "episodes", "train", episodes(draw, names, amounts.episodes))
    for name, labels in (("known", list(known)), ("held_out", hidden)):
        for part, by_label in (("train", train), ("test", test)):
            given = {label: by_label[label][: amounts.most_test] for label in labels}
            # Only the sound that is asked about comes with options, as in Audio Flamingo.
            prompt = asked(labels) if part == "test" else QUESTION
            write_shards(folder / name, part, plain(given, prompt))
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
    """Yield takes with class and what they are of, or their class alone."""
    for number in range(count):
        label = draw.labels()[0]
        detail, sound = draw.one(label)
        if draw.rng.random() < 0.25:
            yield _sample(number, [(sound, QUESTION, label)])
        else:
            yield _sample(number, [(sound, DESCRIBE, f"{label}, {detail}")])


def singles(draw: Draw, count: int) -> Iterator[dict[str, bytes | str]]:
    """Yield takes that are asked about with options."""
    for number in range(count):
        labels = draw.labels()[:NUM_OPTIONS]
        yield _sample(number, [(draw.one(labels[0])[1], asked(labels), labels[0])])


def scene(rng: random.Random, names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return which of SHOTS + 1 things each solved one is, and what these are called, among
    NUM_OPTIONS names. The first thing is asked about: one to three of the solved ones are it, in
    any places.
    """
    alike = rng.randint(1, SHOTS - 1)
    others = rng.randint(1, SHOTS - alike)
    solved = [0] * alike + [rng.randint(1, others) for _ in range(SHOTS - alike)]
    rng.shuffle(solved)
    return solved, rng.sample(names, NUM_OPTIONS)


def spoken(
    rng: random.Random, names: Sequence[str], count: int
) -> Iterator[dict[str, bytes | str]]:
    """Yield words to write again, and words that have a name each, some of them several times."""
    for number in range(count):
        if number % 2:
            listed = " ".join(rng.sample(names, LISTED))
            yield _sample(number, [(None, listed, listed)])
            continue
        things = rng.randint(2, 4)
        words, called = rng.sample(names, things), rng.sample(names, things)
        places = [rng.randrange(things) for _ in range(SOLVED_WORDS)]
        yield _sample(number, [(None, f"{words[place]}.", called[place]) for place in places])


def episodes(draw: Draw, names: Sequence[str], count: int) -> Iterator[dict[str, bytes | str]]:
    """Yield solved takes and the one that is asked about, which is none of them."""
    rng = draw.rng
    for number in range(count):
        solved, called = scene(rng, names)
        things = [draw.alike(label) for label in draw.labels()[: SHOTS + 1]]
        *same, last = rng.sample(things[0], SHOTS)
        takes = [same.pop() if thing == 0 else rng.choice(things[thing]) for thing in solved]
        clips = [(take[1], QUESTION, called[n]) for take, n in zip(takes, solved, strict=True)]
        yield _sample(number, [*clips, (last[1], asked(called), called[0])])


def plain(
    by_label: Mapping[str, Sequence[Recording]], prompt: str
) -> Iterator[dict[str, bytes | str]]:
    """Yield recordings as they are with this prompt; the options are the classes."""
    number = 0
    for label, each in by_label.items():
        for recording in each:
            record = {
                "file": f"{recording.path.parent.name}/{recording.path.name}",
                "kind": "voice" if recording.is_voice else "effect",
                "options": sorted(by_label),
                "sound": "0.flac",
                "prompt": prompt,
                "answer": label,
            }
            yield to_sample(f"{number:06d}", record, [("0", "flac", take(waveform(recording)))])
            number += 1


def asked(options: Sequence[str]) -> str:
    """Return the question with its options."""
    return QUESTION + "\noptions:" + "".join(f"\n - {option}." for option in sorted(options))


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


def _sample(number: int, clips: Sequence[tuple[bytes | None, str, str]]) -> dict[str, bytes | str]:
    """Return a sample of (sound or None, prompt, answer)."""
    listed: list[dict[str, str]] = []
    files: list[tuple[str, str, bytes]] = []
    for sound, prompt, answer in clips:
        clip = {"prompt": prompt, "answer": answer}
        if sound is not None:
            clip["sound"] = f"{len(files)}.flac"
            files.append((str(len(files)), "flac", sound))
        listed.append(clip)
    return to_sample(f"{number:06d}", {"clips": listed}, files)


def _tokenizer(
    folder: Path, names: Sequence[str], known: Mapping[str, Sequence[Recording]]
) -> None:
    """Train a tokenizer that has each name as one token, behind a space and without."""
    texts = [f"{name}\n - {name}." for name in names for _ in range(20)]
    texts += [
        f"{r.label}, {r.detail}" for each in known.values() if not each[0].is_voice for r in each
    ]
    texts += [f"{asked(names)}\nanswer:", DESCRIBE, *(f"x, {speed}" for speed in SPEEDS)] * 20
    train_byte_level_bpe(
        folder,
        texts,
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        eos_token=END,
        pad_token=PAD,
    )
