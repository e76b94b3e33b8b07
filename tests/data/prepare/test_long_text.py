"""Rows for context extension: what is drawn, the mix, the cuts, and going on after a kill."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.commands import shard
from nvmm.data.collate import collate
from nvmm.data.prepare.long_text import SLIMPAJAMA, Rules, Stream, rows, separator_ids
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.token_rows import TokenRows
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data.prepare.reading import written

MIX = {"web": 0.75, "books": 0.25}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def cut(texts: Any, rules: Rules, stream: Stream | None = None) -> list[dict[str, Any]]:
    return list(rows(texts, letters, letters("|"), rules, stream or Stream(), [].append))


def test_rows_are_one_stream_without_padding() -> None:
    rules = Rules(tokens=24, mix={"web": 0.5, "books": 0.5}, length=8, long_tokens=0)
    told: list[str] = []
    texts = [
        ("web", "aaaaa"),
        ("books", "B" * 9),
        ("web", "cccc"),
        ("web", "ddd"),
        ("books", "E" * 9),
    ]
    made = list(
        rows(
            iter([*texts, ("web", "z"), ("web", "z")]),
            letters,
            letters("|"),
            rules,
            Stream(),
            told.append,
        )
    )
    assert ["".join(map(chr, row["tokens"])) for row in made] == [
        "aaaaa|BB",
        "BBBBBBB|",
        "cccc|ddd",
    ]
    assert made[0]["spans"] == [
        {"source": "web", "start": 0, "end": 5},
        {"source": "books", "start": 6, "end": 8},
    ]
    assert made[1]["spans"] == [{"source": "books", "start": 0, "end": 7}]
    assert [span["start"] for span in made[2]["spans"]] == [0, 5]
    # The last document of a source is cut where it has given its tokens: 12 of each.
    assert told[-1] == "4 tokens at the end, which fill no row"


def test_short_documents_are_kept_with_their_probability_and_long_ones_always() -> None:
    rules = Rules(tokens=10**9, mix=MIX, length=8, long_tokens=100)
    # 367 characters are estimated as 99.7 tokens, 368 as 100.
    kept = [rules.keeps(number, "x" * 367) for number in range(20_000)]
    assert 0.09 < sum(kept) / len(kept) < 0.11
    assert kept == [rules.keeps(number, "y") for number in range(20_000)], (
        "by number and seed alone"
    )
    assert all(rules.keeps(number, "x" * 368) for number in range(100))


def test_every_source_gives_its_share() -> None:
    def endless() -> Iterator[tuple[str, str]]:
        number = 0
        while True:
            yield ("web" if number % 9 else "books"), "x" * (3 + number % 11)
            number += 1

    rules = Rules(tokens=4000, mix=MIX, length=50, long_tokens=2, keep_short=0.5)
    stream = Stream()
    made = cut(endless(), rules, stream)
    assert stream.used == {"web": 3000, "books": 1000}
    assert all(len(row["tokens"]) == 50 for row in made)
    given = Counter()
    for row in made:
        for span in row["spans"]:
            given[span["source"]] += span["end"] - span["start"]
    rest = Counter()
    for span in stream.spans:
        rest[span["source"]] += span["end"] - span["start"]
    assert given + rest == stream.used
    assert sum(SLIMPAJAMA.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"too few .*'web': '5 of 3000', 'books': '0 of 1000'"):
        cut(iter([("web", "x" * 5)]), Rules(tokens=4000, mix=MIX, length=50, long_tokens=0))
    with pytest.raises(ValueError, match="document 0: source 'wiki' is none of"):
        cut(iter([("wiki", "x")]), rules)
    with pytest.raises(ValueError, match=r"the shares sum to 0\.5"):
        Rules(tokens=100, mix={"web": 0.5}, length=10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = train_byte_level_bpe(
        tmp_path_factory.mktemp("long"),
        ["some words of a text"],
        vocab_size=300,
        special_tokens=["<end>", "<image>"],
        eos_token="<end>",
        pad_token="<end>",
    )
    return Tokenizer(str(folder), image_token="<image>", end_of_turn="<end>")


def long(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, *more: Any) -> None:
    """Write rows of 64 tokens, three a shard, of 120 documents that are in the folder then."""
    lines = [
        {"text": f"text {n} of some words " * (1 + n % 7), "meta": {"s": "ab"[n % 3 == 0]}}
        for n in range(120)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("long", "--from", folder / "t.jsonl", "--tokenizer", tokenizer.path)
    options += ("--tokens", 1500, "--source-key", "meta.s", "--mix", "a=0.75", "--mix", "b=0.25")
    options += ("--length", 64, "--long-tokens", 20, "--to", folder, "--samples-per-shard", 3)
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, (*options, *more))])
    shard.main()


def test_a_killed_call_goes_on_without_tokenising_again(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    encode, calls = Tokenizer.encode, 0

    def dying(self: Tokenizer, text: str) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise Killed
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", dying)
    limit = 10**9
    long(tmp_path / "whole", tokenizer, monkeypatch)
    whole, needed = {p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.tar")}, calls
    assert len(whole) > 3
    killed = tmp_path / "killed"
    total = 0
    for limit in (needed // 3, needed // 2, needed):
        calls = 0
        if limit < needed:
            with pytest.raises(Killed):
                long(killed, tokenizer, monkeypatch)
            assert not list(killed.glob("*.tar")), "no shard has its name before all are there"
        else:
            long(killed, tokenizer, monkeypatch)
        total += calls
    assert {p.name: p.read_bytes() for p in killed.glob("*.tar")} == whole
    assert not [p for p in killed.iterdir() if p.name.startswith(".")]
    assert total < needed + needed // 2, "two starts of a shard and the separators are done twice"


def test_an_unfinished_call_must_have_the_same_options(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="too few documents for the mix"):
        long(tmp_path, tokenizer, monkeypatch, "--tokens", 10**6)
    with pytest.raises(ValueError, match=r"unfinished call with seed=0, tokens=1000000; give the"):
        long(tmp_path, tokenizer, monkeypatch, "--seed", 5)


def test_rows_are_read_whole_or_document_by_document(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long(tmp_path, tokenizer, monkeypatch)
    records = written(tmp_path)
    separator = tokenizer.encode("<s>")
    assert len(separator) == 3, "ordinary text"

    def read(record: dict[str, Any], length: int = 64, **options: Any) -> Any:
        build = TokenRows(tokenizer=tokenizer, sequence_length=length, **options)
        return build({"__url__": "t.tar", "__key__": "0", "json": json.dumps(record).encode()})

    for record in records:
        whole, parted = read(record), read(record, separate_documents=True)
        assert whole.text.tokens.tolist() == record["tokens"]
        assert whole.text.weights.tolist() == [1.0] * 64
        assert torch.cat([text.tokens for text in parted.texts]).tolist() == record["tokens"]
        assert len(parted.texts) == len(record["spans"])
        for text, span, after in zip(
            parted.texts[:-1], record["spans"][:-1], record["spans"][1:], strict=True
        ):
            assert text.tokens.tolist() == record["tokens"][: after["start"]][-len(text.tokens) :]
            assert text.tokens.tolist()[-3:] == separator
            assert len(text.tokens) >= span["end"] - span["start"]
    assert max(len(record["spans"]) for record in records) > 1
    # Packed, every document is a segment that attends to itself, with positions from 0.
    parted = [read(record, separate_documents=True) for record in records[:2]]
    batch = collate(parted, pad_id=0, packed=True)
    starts = [
        64 * row + start
        for row, record in enumerate(records[:2])
        for start in [0, *(span["start"] for span in record["spans"][1:])]
    ]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*starts, 128]
    assert [int(batch.position_ids[0, start]) for start in starts] == [0] * len(starts)
    whole = collate([read(record) for record in records[:2]], pad_id=0, packed=True)
    assert whole.cu_seqlens is not None and whole.cu_seqlens.tolist() == [0, 64, 128]
    assert whole.tokens.equal(batch.tokens)
    bad = records[0]
    for changed, why in (
        ({"begins": "else"}, "of another tokenizer"),
        ({"tokens": [*bad["tokens"], 1]}, "a row of 65 tokens, and data.sequence_length=64"),
        ({"tokens": [0.5]}, "tokens must be whole numbers"),
        ({"tokens": None}, "no tokens"),
    ):
        with pytest.raises(BadSample, match=why):
            read({**bad, **changed})
    with pytest.raises(BadSample, match="spans must have ascending starts"):
        read({**bad, "spans": [{"start": 3}, {"start": 1}]}, separate_documents=True)


def test_a_separator_must_be_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="separator=<end> is one token"):
        separator_ids(tokenizer, "<end>")
