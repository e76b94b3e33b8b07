"""What `tools/ablate_interleaved.py` trains and evaluates on: real digits and WordNet's glosses.

    text/       train, validation: lines "word: definition", several a document
    numbers/    train: numbers in digits, then in words, several of one language a document
    captions/   train: a picture and its sentence
    documents/  train: 2 to 6 pictures of one language, each before its sentence
    pairs/      train: the pictures and sentences of documents/, one a sample
    questions/  train: a question about a picture, in every language but HELD_OUT
    words/      train: a question about a word, without a picture
    benchmark/  shots, test: the same questions, about half in HELD_OUT ("unseen")
    tokenizer/  a byte-level BPE

Pictures of test are in no other split (`digits.load_splits`), and words of validation in no other
text.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvmm.data.prepare import digits, wordnet
from nvmm.data.prepare.number_words import LANGUAGES
from nvmm.data.prepare.once import once
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.io.files import write

FORMAT = 1
"""A number that is increased when the data made from the same arguments change."""
HELD_OUT = "sv"
"""The language of unseen questions: the text and stage 1 have it, the instructions do not."""
SEEN = tuple(name for name in LANGUAGES if name != HELD_OUT)
PICTURES = (2, 6)
"""Of a document: 4.0 on average, as MMC4 has."""
PICTURE_TOKENS = 4
"""A number stands so often in the text, as a picture has so many tokens."""
GLOSSES = 2
NUMBERS = 6
"""Of a document of text."""
SIZE = 32
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
VOCAB_SIZE = 2048

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Amounts:
    """Samples of each part, and the seed. shots, test: of the benchmark."""

    text: int = 10_000
    validation: int = 256
    numbers: int = 6_000
    captions: int = 19_200
    documents: int = 3_200
    questions: int = 4_800
    words: int = 4_800
    shots: int = 600
    test: int = 720
    seed: int = 1234


def kind(language: str) -> str:
    """Return whether the instructions have a language."""
    return "unseen" if language == HELD_OUT else "seen"


@dataclass(frozen=True)
class Shown:
    """A number's picture (PNG), and the language that names it."""

    number: int
    language: str
    picture: bytes

    @property
    def sentence(self) -> str:
        """The caption."""
        return LANGUAGES[self.language].say(self.number)

    @property
    def asked(self) -> Record:
        """The question with its answer."""
        language = LANGUAGES[self.language]
        return {
            "question": language.question,
            "answer": language.words[self.number],
            "kind": kind(self.language),
        }


def build(folder: str | Path, nouns: Path, amounts: Amounts = Amounts()) -> bool:
    """Write the data; return False if they were there already.

    nouns: WordNet's data.noun. The same arguments give the same bytes.

    Raises ValueError where it has too few synsets to hold out.
    """
    folder = Path(folder)
    settings = {"format": FORMAT, **asdict(amounts)}
    return once(folder, settings, partial(_write, folder, nouns, amounts))


def _write(folder: Path, nouns: Path, amounts: Amounts) -> None:
    def draw(part: str) -> random.Random:
        return random.Random(f"{amounts.seed}/{part}")

    # 1. Text, of synsets that validation does not have.
    synsets = wordnet.read_nouns(nouns)
    draw("synsets").shuffle(synsets)
    held_out = synsets[: GLOSSES * amounts.validation]
    known = synsets[len(held_out) :]
    if len(known) < GLOSSES:
        raise ValueError(f"{nouns} has {len(synsets)} synsets; validation takes {len(held_out)}")
    validation = (_glosses(held_out[n :: amounts.validation]) for n in range(amounts.validation))
    _texts(folder / "text", "validation", validation)
    _texts(folder / "text", "train", _drawn_glosses(known, amounts.text, draw("text")))
    _texts(folder / "numbers", "train", _numbers(amounts.numbers, draw("numbers")))
    _texts(folder / "words", "train", _word_questions(known, amounts.words, draw("words")))
    # 2. Captions, and documents with the pairs that they are made of.
    shown = partial(_show, digits.load_splits())
    every = tuple(LANGUAGES)
    captions = shown("train", every, amounts.captions, draw("captions"))
    _samples(folder / "captions", "train", map(_pair, captions))
    documents = _documents(shown, amounts.documents, draw("documents"))
    _samples(folder / "documents", "train", map(_document, documents))
    pairs = [_pair(each) for document in documents for each in document]
    _samples(folder / "pairs", "train", pairs)
    # 3. Instructions and benchmarks.
    questions = shown("train", SEEN, amounts.questions, draw("questions"))
    _samples(folder / "questions", "train", map(_question, questions))
    half = (*SEEN, *[HELD_OUT] * len(SEEN))
    for name, split, amount in (
        ("shots", "train", amounts.shots),
        ("test", "test", amounts.test),
    ):
        asked = shown(split, half, amount, draw(f"benchmark/{name}"))
        _samples(folder / "benchmark", name, map(_question, asked))
    # 4. The tokenizer, and what all this is.
    _tokenizer(folder / "tokenizer", known, draw("tokenizer"))
    write(folder / "README.md", _CARD.format(held_out=HELD_OUT, **asdict(amounts)))


def _show(
    splits: Mapping[str, digits.Digits],
    split: str,
    languages: Sequence[str],
    amount: int,
    rng: random.Random,
) -> list[Shown]:
    """Return pictures of a split: each in turn in random order, those of training distorted."""
    found = splits[split]
    order: list[int] = []
    while len(order) < amount:
        order += rng.sample(range(len(found.labels)), len(found.labels))
    made = []
    for number in order[:amount]:
        buffer = io.BytesIO()
        drawn = digits.draw_digit(found.pixels[number], SIZE, rng, augment=split == "train")
        drawn.save(buffer, "PNG", compress_level=1)
        made.append(Shown(found.labels[number], rng.choice(languages), buffer.getvalue()))
    return made


def _documents(shown: partial[list[Shown]], amount: int, rng: random.Random) -> list[list[Shown]]:
    sizes = [rng.randint(*PICTURES) for _ in range(amount)]
    return [shown("train", (rng.choice(tuple(LANGUAGES)),), size, rng) for size in sizes]


def _pair(shown: Shown) -> tuple[Record, list[bytes]]:
    return {"caption": shown.sentence}, [shown.picture]


def _question(shown: Shown) -> tuple[Record, list[bytes]]:
    return shown.asked, [shown.picture]


def _document(document: Sequence[Shown]) -> tuple[Record, list[bytes]]:
    """Return a document as MMC4 has it."""
    record = {
        "text_list": [shown.sentence for shown in document],
        "image_info": [{"matched_text_index": place} for place in range(len(document))],
    }
    return record, [shown.picture for shown in document]


def _glosses(synsets: Iterable[wordnet.Synset]) -> Record:
    return {"text": "\n".join(f"{each.words}: {each.gloss}" for each in synsets)}


def _drawn_glosses(
    synsets: Sequence[wordnet.Synset], amount: int, rng: random.Random
) -> Iterator[Record]:
    for _ in range(amount):
        yield _glosses(rng.sample(synsets, GLOSSES))


def _numbers(amount: int, rng: random.Random) -> Iterator[Record]:
    """Yield documents whose numbers stand in the places of pictures; half of them are asked for."""
    for _ in range(amount):
        language = LANGUAGES[rng.choice(tuple(LANGUAGES))]
        asked = rng.random() < 0.5
        pieces = []
        for number in rng.choices(range(10), k=NUMBERS):
            said = (
                f"\n{language.question} {language.words[number]}\n"
                if asked
                else language.say(number)
            )
            pieces.append(str(number) * PICTURE_TOKENS + said)
        yield {"text": "".join(pieces).strip()}


def _word_questions(
    synsets: Sequence[wordnet.Synset], amount: int, rng: random.Random
) -> Iterator[Record]:
    for _ in range(amount):
        synset = rng.choice(synsets)
        word = synset.words.partition(",")[0]
        yield {"question": f"What is the meaning of {word}?", "answer": synset.gloss}


def _texts(folder: Path, split: str, records: Iterable[Record]) -> None:
    _samples(folder, split, ((record, []) for record in records))


def _samples(folder: Path, split: str, samples: Iterable[tuple[Record, Sequence[bytes]]]) -> None:
    """Write records with their pictures, in order."""

    def members() -> Iterator[dict[str, bytes | str]]:
        for number, (record, pictures) in enumerate(samples):
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            yield {
                "__key__": f"{number:06d}",
                **{f"{place}.png": picture for place, picture in enumerate(pictures)},
                "json": text.encode("utf-8"),
            }

    write_shards(folder, split, members())


def _tokenizer(folder: Path, synsets: Sequence[wordnet.Synset], rng: random.Random) -> None:
    """Train the tokenizer on glosses, and on sentences, questions and turns often enough."""
    texts = [
        text
        for each in rng.sample(synsets, min(len(synsets), 6000))
        for text in (f"{each.words}: {each.gloss}",)
    ]
    for language in LANGUAGES.values():
        spoken = [
            language.question,
            *map(language.say, range(10)),
            *(f" {w}" for w in language.words),
        ]
        texts += spoken * 100
    texts += ["USER: \nWhat is the meaning of ASSISTANT: "] * 100
    train_byte_level_bpe(
        folder,
        texts,
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


_CARD = """# Digits and glosses for VILA in small

Made by `tools/ablate_interleaved.py` of nvmm (seed {seed}); the same arguments give the same bytes.

## Real data
- The digits: 1,797 images of 8x8 written by 43 people, *Optical Recognition of Handwritten Digits*
  (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49), licence
  CC BY 4.0, as shipped with scikit-learn. They are split by image: train 1257, test 360.
- The glosses: WordNet 3.0's nouns (Princeton University, WordNet licence), from Debian's package
  wordnet-base. {validation} documents of them are held out.

## Made by rule
- Sentences, questions and answers in eight languages ("C'est sept."); instructions have no
  {held_out}.
- Pictures of training are rotated, sheared, scaled, shifted and dimmed, a digit differently each
  time; those of test are not.

| part | samples |
|---|---|
| text | {text} |
| numbers | {numbers} |
| captions | {captions} |
| documents, and pairs of the same pictures | {documents} |
| questions | {questions} |
| words | {words} |
| benchmark: shots, test | {shots}, {test} |
"""
