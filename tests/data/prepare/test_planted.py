"""A summary planted in its document breaks no sentence; NarrativeQA's files as its repository's."""

from __future__ import annotations

import csv
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import shard
from nvmm.data.prepare.planted import Lengths, boundaries, plant, planted
from tests.data.prepare.reading import written

SENTENCES = [
    "Mr. Smith met J. R. Hill at 5 p.m. on St. Mary's road.",
    '"Is it late?" he asked.',
    "It was, i.e. too late!",
    "(They left.)",
    "\u201cGood night.\u201d",
    "The end",
]
TEXT = " ".join(SENTENCES[:3]) + "\n\n" + "\n".join(SENTENCES[3:])


def test_boundaries_are_ends_of_sentences() -> None:
    starts = [TEXT.index(sentence) for sentence in SENTENCES]
    # A question within a sentence ends none, as a small letter follows it.
    assert boundaries(TEXT) == [*starts, len(TEXT)]


def test_planting_keeps_every_sentence_and_says_how_deep() -> None:
    depths = Counter()
    for seed in range(300):
        made = plant(TEXT, "A summary. Of two.\n", random.Random(seed))
        assert made == plant(TEXT, "A summary. Of two.\n", random.Random(seed))
        assert made.text.count("A summary. Of two.") == 1
        before, after = re.split(r"\s*A summary\. Of two\.\s*", made.text)
        assert f"{before} {after}".split() == TEXT.split()
        assert all(sentence in before or sentence in after for sentence in SENTENCES)
        assert made.depth == round((len(TEXT) - len(after)) / len(TEXT), 4)
        depths[made.depth] += 1
    assert len(depths) == len(SENTENCES) + 1
    assert min(depths.values()) > 20, "every boundary is as likely: 43 of 300"
    assert {0.0, 1.0} <= depths.keys()


def narrativeqa(folder: Path, documents: dict[str, str]) -> Path:
    """Write a folder as NarrativeQA's repository has it."""
    (folder / "third_party" / "wikipedia").mkdir(parents=True)
    (folder / "tmp").mkdir()
    rows: dict[str, list[list[str]]] = {
        "qaps.csv": [["document_id", "set", "question", "answer1", "answer2"]],
        "third_party/wikipedia/summaries.csv": [["document_id", "set", "summary"]],
    }
    for name, text in documents.items():
        (folder / "tmp" / f"{name}.content").write_bytes(text.encode("latin-1"))
        for number in range(2):
            rows["qaps.csv"].append([name, "train", f"Q{number}?", "One.", "Two."])
        summary = f"This is what, in short,\nhappens in {name}."
        rows["third_party/wikipedia/summaries.csv"].append([name, "train", summary])
    rows["qaps.csv"].append(["other", "test", "Q?", "A", ""])
    for name, lines in rows.items():
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(lines)
    return folder


def count_words(text: str) -> int:
    return len(text.split())


def test_documents_are_cut_to_fit_with_their_summary(tmp_path: Path) -> None:
    long = " ".join(f"The na\u00efve {n} is here." for n in range(100))  # 500 words
    folder = narrativeqa(tmp_path / "n", {"short": "A few words.", "long": long})
    lost: list[str] = []
    lengths = Lengths(shortest=50, longest=300, reserve=20)
    made = list(planted(folder, "train", count_words, lengths, lost.append, seed=3))
    assert [line.partition(" (")[0] for line in lost] == ["short: Q0?", "short: Q1?"]
    for record in made:
        [context] = record["contexts"]
        summary = "This is what, in short,\nhappens in long."
        assert summary in context
        words = count_words(context)
        assert 250 < words <= 280
        assert context.replace(summary, "").split() == long.split()[: words - count_words(summary)]
        assert context.endswith("."), "cut at the end of a sentence"
        assert record["document_id"] == "long" and 0 <= record["depth"] <= 1
        assert record["answers"] == ["One.", "Two."]
    assert made[0]["depth"] != made[1]["depth"]
    again = list(planted(folder, "train", count_words, lengths, lost.append, seed=3))
    assert again == made
    assert list(planted(folder, "train", count_words, lengths, lost.append, seed=4)) != made
    with pytest.raises(ValueError, match="shortest=9, longest=10, reserve=2: need"):
        Lengths(9, 10, 2)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    folder = narrativeqa(tmp_path / "n", {"d": "One sentence. " * 30})

    def run(*arguments: Any) -> list[dict[str, Any]]:
        options = ("narrativeqa", "--from", folder, "--to", tmp_path, "--replace", *arguments)
        monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, options)])
        shard.main()
        return written(tmp_path)

    [first, _] = run("--context", "summary")
    assert first["contexts"] == ["This is what, in short,\nhappens in d."]
    long = ("--shortest", 10, "--longest", 2000, "--reserve", 100)
    [first, _] = run("--context", "planted", "--tokenizer", tiny.path, *long)
    assert first["contexts"][0].count("One sentence.") == 30
    with pytest.raises(ValueError, match="needs --tokenizer"):
        run("--context", "planted")
    assert not (tmp_path / ".train.part" / "state.json").exists()
    with pytest.raises(ValueError, match=r"summaries\.csv: no row has the set dev"):
        run("--context", "summary", "--split", "dev")
