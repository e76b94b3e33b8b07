"""Golden samples of queries and documents; conventions of instruction masking; data layouts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

from nvmm.batch import IMAGE, NEGATIVE, POSITIVE, QUERY, Sample
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.prepare import retrieval_sets
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.checks import check_sample
from nvmm.data.samples.retrieval import Masking, RetrievalBuilder
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.objectives.contrastive import Contrastive


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = train_byte_level_bpe(
        tmp_path_factory.mktemp("tokenizer"),
        ["Instruct: find it\nQuery: a small bird sings"] * 20,
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    return Tokenizer(str(folder), image_token="<s>", end_of_turn="</s>")


def builder(tokenizer: Tokenizer, **options: Any) -> RetrievalBuilder:
    options = {"num_negatives": 2, "in_batch_negatives": True, "sequence_length": 64} | options
    return RetrievalBuilder(**options, tokenizer=tokenizer)


def member(key: str = "0", **record: Any) -> dict[str, Any]:
    return {"__key__": key, "__url__": "a.tar", "json": json.dumps(record).encode()}


def extras(sample: Sample) -> dict[str, torch.Tensor]:
    """Its texts' extras, as a batch has them."""
    return collate([sample], pad_id=0).extras


RECORD = {"query": "bird", "positive": "sings", "negatives": ["a", "small", "it"]}


def test_prefixes_stand_before_queries_and_documents(tokenizer: Tokenizer) -> None:
    """E5's; they are pooled, stand behind an instruction, and leave hashes and ids as they were."""
    prefixes = {"query_prefix": "query: ", "document_prefix": "passage: "}
    build, plain = builder(tokenizer, **prefixes), builder(tokenizer)
    sample = build(member(**RECORD))
    texts = [tokenizer.decode(text.tokens.tolist()) for text in sample.texts]
    assert texts[:2] == ["query: bird", "passage: sings"]
    assert all(text.startswith("passage: ") for text in texts[2:]) and len(texts) == 4
    found, without = extras(sample), extras(plain(member(**RECORD)))
    for name in ("pool_from", "document_id", "text_hash", "role"):
        assert torch.equal(found[name], without[name]), name
    assert torch.equal(build.text("bird", role=QUERY).text.tokens, sample.texts[0].tokens)
    assert torch.equal(build.text("sings").text.tokens, sample.texts[1].tokens)
    assert torch.equal(build.prompt(member(**RECORD)).text.tokens, sample.texts[0].tokens)
    told = build.text("bird", "find it", QUERY).text
    words = tokenizer.decode(told.tokens.tolist())
    assert words == "Instruct: find it\nQuery: query: bird"
    pooled = tokenizer.decode(told.tokens[int(told.extras["pool_from"]) :].tolist())
    assert pooled.strip() == "query: bird"


def test_texts_of_a_sample_become_rows_with_their_roles(tokenizer: Tokenizer) -> None:
    build = builder(tokenizer)
    first = build(member(**RECORD, positive_id="d1", negative_ids=["d2", "d3", "d4"]))
    second = build(member(**RECORD | {"negatives": ["a"]}))
    check_sample(first)
    for sample in (first, second):
        for text in sample.texts:
            assert text.tokens[0] == tokenizer.bos_id and text.tokens[-1] == tokenizer.eos_id
    batch = collate([first, second], pad_id=0)
    assert batch.tokens.shape[0] == 7
    assert batch.sample_ids.tolist() == [0, 0]
    roles = [QUERY, POSITIVE, NEGATIVE, NEGATIVE, QUERY, POSITIVE, NEGATIVE]
    assert batch.extras["role"].tolist() == roles
    ids, hashes = batch.extras["document_id"], batch.extras["text_hash"]
    assert hashes[1] == hashes[5] and ids[1] != ids[5], "the second knows its text alone"
    assert batch.extras["teacher"].isnan().all()
    assert batch.extras["answers"].shape == (7, 16)
    packed = collate([first, second], pad_id=0, packed=True)
    assert packed.lengths.tolist() == batch.lengths.tolist()
    for number, length in enumerate(batch.lengths.tolist()):
        start = int(packed.cu_seqlens[number])
        assert torch.equal(packed.tokens[0, start : start + length], batch.tokens[number, :length])


def test_masking_conventions(tokenizer: Tokenizer) -> None:
    prefix = tokenizer.encode("Instruct: find it\nQuery: ")
    line = tokenizer.encode("Instruct: find it")
    expected = {
        "sentence_transformers": 1 + len(prefix),
        "nv_embed": len(prefix),
        "mm_embed": 1 + len(line) + 1,
        "none": 0,
    }
    assert set(expected) == set(get_args(Masking))
    for masking, start in expected.items():
        ids, found = builder(tokenizer, masking=masking).encode("bird sings", "find it")
        assert found == start
        # The prefix alone ends with a token for its space; before a word they are one token.
        pooled = {"sentence_transformers": " sings", "nv_embed": " bird sings"}
        if masking in pooled:
            assert tokenizer.decode(ids[found:-1]) == pooled[masking]
        assert builder(tokenizer, masking=masking).encode("bird", None)[1] == 0
    with pytest.raises(ValueError, match="masking=other must be one of"):
        builder(tokenizer, masking="other")


def test_a_long_text_keeps_its_end_token_and_something_to_pool(tokenizer: Tokenizer) -> None:
    ids, start = builder(tokenizer, sequence_length=8).encode("a small bird sings " * 9, "find it")
    assert len(ids) == 8 and ids[-1] == tokenizer.eos_id and start == 7


def test_choices_of_a_record(tokenizer: Tokenizer) -> None:
    build = builder(tokenizer, instruction="find it")
    sample = build(member(**RECORD, symmetric=True, in_batch_negatives=False, scores=[4, 3, 2, 1]))
    assert (extras(sample)["pool_from"] > 0).all()
    assert not extras(sample)["in_batch"].any()
    teacher = extras(sample)["teacher"].tolist()
    assert teacher[1] == 4.0 and sorted(teacher[2:], reverse=True) == teacher[2:]
    plain = build(member(**RECORD))
    assert (extras(plain)["pool_from"] > 0).tolist() == [True, False, False, False]
    chosen = {
        tuple(extras(build(member(str(k), **RECORD)))["text_hash"].tolist()) for k in range(9)
    }
    assert len(chosen) > 1, "which negatives depends on the key"


def test_ids_of_a_record(tokenizer: Tokenizer) -> None:
    ids = {"positive_id": 0, "negative_ids": [1, 2, 3], "positive_ids": [0, 7, 8]}
    build = builder(tokenizer, num_answers=2)
    found = extras(build(member(**RECORD, **ids)))
    named = [extras(build(member(**RECORD, positive_id=i)))["document_id"][1] for i in (0, 7, 8)]
    assert found["document_id"][1] == named[0], "an id of 0 is an id"
    assert found["answers"][0].tolist() == [int(named[1]), int(named[2])]
    plain = extras(build(member(**RECORD)))
    assert plain["document_id"][1] == plain["text_hash"][1] == plain["answers"][0, 0]
    with pytest.raises(BadSample, match=r"3 positive_ids beside its positive, .*num_answers=2"):
        build(member(**RECORD, **(ids | {"positive_ids": [7, 8, 9]})))


def test_all_positives_are_masked(tokenizer: Tokenizer) -> None:
    """Whichever of its positives a query has, the others are no negatives in other samples."""
    build = builder(tokenizer, num_negatives=0)
    every = [f"d{number}" for number in range(17)]
    records = [
        {"query": f"bird {name}", "positive": name, "positive_id": name, "positive_ids": every}
        for name in every[:3]
    ]
    records.append({"query": "it", "positive": "small", "positive_id": "other"})
    samples = [build(member(str(number), **record)) for number, record in enumerate(records)]
    numbered = [replace(sample, sample_id=number) for number, sample in enumerate(samples)]
    batch = collate(numbered, pad_id=0)
    vectors = torch.eye(8)[: len(batch.extras["role"])]
    objective = Contrastive(cross_rank_negatives=False)
    negatives = objective.per_query(vectors, [batch])[:, 2]
    assert negatives.tolist() == [1.0, 1.0, 1.0, 3.0], "the other query's positive alone"


def test_negatives_that_nobody_uses_are_refused(tokenizer: Tokenizer) -> None:
    build = builder(tokenizer, num_negatives=0)
    ids = {"negative_ids": ["a", "b", "c"]}
    with pytest.raises(BadSample, match=r"a\.tar:0: 3 negatives, of which .*num_negatives=0"):
        build(member(**RECORD, **ids))
    build = builder(tokenizer, num_negatives=0, unread=["negatives", "negative_ids"])
    assert len(build(member(**RECORD, **ids)).texts) == 2
    assert len(builder(tokenizer, num_negatives=0)(member(**RECORD | {"negatives": []})).texts) == 2


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"query": "bird"}, "no negatives; its members are json"),
        (RECORD | {"query": " "}, "query is empty"),
        (RECORD | {"negatives": ["a", 3]}, "a negative must be text, got 3"),
        (RECORD | {"scores": [1.0]}, "4 documents, 4 ids, 1 scores"),
        (RECORD | {"negative_ids": ["a"]}, "4 documents, 2 ids"),
        (RECORD | {"negatives": "abc"}, "negatives must be a list, got 'abc'"),
        (RECORD | {"scores": ["x", 1, 2, 3]}, "scores must be numbers"),
        ([RECORD], "must be an object, got list"),
    ],
)
def test_broken_records_are_named(record: Any, says: str, tokenizer: Tokenizer) -> None:
    broken = member() | {"json": json.dumps(record).encode()}
    with pytest.raises(ValueError, match=rf"a\.tar:0: .*{says}"):
        builder(tokenizer)(broken)


def test_a_broken_record_leaves_a_hole_that_no_query_sees(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [RECORD, RECORD | {"positive": 3}, RECORD]
    write_shards(tmp_path, "t", [{**member(str(i), **r)} for i, r in enumerate(records)])
    build = partial(RetrievalBuilder, num_negatives=2, in_batch_negatives=True)
    data = Data(64, 0, Dataset(str(tmp_path / "t-*"), build), tokenizer=tokenizer)
    [batch] = next(data.batches(split="train", global_batch_size=3, micro_batch_size=3))
    assert sorted(batch.sample_ids >= 0) == [False, True, True]
    assert (batch.extras["role"] == QUERY).sum() == 3 and len(batch.tokens) == 9
    counts = data.count([batch], [])
    texts = batch.lengths.sum() - 1  # but for the hole's one token
    assert (counts["train/samples"], counts["train/bad"]) == (2, 1)
    assert counts["train/tokens"] == texts
    embeddings = torch.nn.functional.normalize(torch.randn(9, 6), dim=-1)
    found = Contrastive(cross_rank_negatives=False).per_query(embeddings, [batch])
    # Two hard negatives, and the other sample's two: its positive answers this query too.
    assert found[:, 2].tolist() == [4, 4]


def test_beir_layout(tmp_path: Path) -> None:
    folder = tmp_path / "fiqa"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"}]
    corpus.append({"_id": "d3", "text": "three"})
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "ask"}))
    rows = "query-id\tcorpus-id\tscore\nq\td1\t2\nq\td2\t0\nq\td3\t1\n"
    (folder / "qrels" / "test.tsv").write_text(rows)
    found = list(retrieval_sets.beir(folder, "test", {"q": ["d1", "d2"]}))
    same = {
        "query": "ask",
        "positive_ids": ["fiqa/d1", "fiqa/d3"],
        "negatives": ["two"],
        "negative_ids": ["fiqa/d2"],
    }
    assert found == [
        same | {"positive": "T one", "positive_id": "fiqa/d1"},
        same | {"positive": "three", "positive_id": "fiqa/d3"},
    ]
    with pytest.raises(ValueError, match=r"query q or its documents \['d9'\] are not there"):
        list(retrieval_sets.beir(folder, "test", {"q": ["d9"]}))


@pytest.mark.parametrize(
    "line",
    [
        {"_id": "q", "text": None},
        {"_id": "q"},
        {"_id": None, "text": "ask"},
        {"text": "ask"},
        {"_id": "q", "text": {"en": "ask"}},
        {"_id": "d", "text": "the id of another"},
    ],
)
def test_beir_texts_that_are_none_are_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    """They were asked and ranked as the text "None", and the later of two ids was taken."""
    first = {"_id": "d", "title": None, "text": "one"}
    for name in ("corpus", "queries"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(first))
        read = getattr(retrieval_sets, f"read_{name}")
        assert read(tmp_path) == {"d": "one"}
        path.write_text(f"{json.dumps(first)}\n{json.dumps(line)}")
        with pytest.raises(ValueError, match=rf"{name}\.jsonl: record 2 (needs|has)"):
            read(tmp_path)


def test_triplets_and_classes() -> None:
    rows = [{"anchor": "q", "positive": "p", "negative": "n", "negative_2": "m"}]
    assert list(retrieval_sets.triplets(rows)) == [
        {"query": "q", "positive": "p", "negatives": ["n", "m"]}
    ]
    for wrong in ({"negatives": ["n"]}, {"positive": None}, {"label": "x"}):
        with pytest.raises(ValueError, match="row 2: needs texts anchor"):
            list(retrieval_sets.triplets([rows[0], rows[0] | wrong]))
    texts, labels = ["a", "b", "c", "d", "e"], [0, 0, 1, 1, 2]
    found = list(retrieval_sets.classes(texts, labels, num_negatives=2, instruction="sort"))
    assert [record["query"] for record in found] == ["a", "b", "c", "d"]
    of = dict(zip(texts, labels, strict=True))
    for record in found:
        assert (
            of[record["positive"]] == of[record["query"]] and record["positive"] != record["query"]
        )
        assert all(of[text] != of[record["query"]] for text in record["negatives"])
        assert record["in_batch_negatives"] is False


def test_texts_of_two_classes_are_no_negatives_and_many_texts_take_no_longer_each() -> None:
    texts = ["both", "a", "a", "b", *map(str, range(20_000)), "both", "c"]
    labels = [0, 0, 0, 0, *(i % 3 for i in range(20_000)), 1, 9]
    found = list(retrieval_sets.classes(texts, labels, num_negatives=7, instruction="sort"))
    assert len(found) == len(texts) - 1, "a class of one has no positive"
    classes = {(text, label) for text, label in zip(texts, labels, strict=True)}
    by_query = dict(zip(texts[:-1], labels[:-1], strict=True))
    for record in found:
        assert record["positive"] != record["query"] and len(record["negatives"]) == 7
        assert "both" not in record["negatives"]
        if record["query"] != "both":
            label = by_query[record["query"]]
            assert (record["positive"], label) in classes
            assert all((text, label) not in classes for text in record["negatives"])


def picture(colour: int, width: int = 20) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 30), (colour, 10, 10)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def with_pictures(tokenizer: Tokenizer) -> RetrievalBuilder:
    words = Tokenizer(
        tokenizer.path, image_token="<image>", end_of_turn="</s>", extra_tokens=["<image>"]
    )
    return builder(words, tokens_per_tile=4, tile_size=8, masking="mm_embed", num_negatives=1)


MIXED = {
    "query": "bird",
    "query_image": "query.png",
    "positive": None,
    "positive_image": "positive.png",
    "negatives": ["a"],
    "instruction": "find it",
}


def mixed(key: str = "0", colour: int = 1, **changes: Any) -> dict[str, Any]:
    pictures = {"query.png": picture(colour), "positive.png": picture(2)}
    return {**member(key, **(MIXED | changes)), **pictures}


def test_a_picture_stands_after_the_instruction_and_before_the_text(
    with_pictures: RetrievalBuilder,
) -> None:
    words = with_pictures.tokenizer
    sample = with_pictures(mixed())
    check_sample(sample)
    query, positive, negative = sample.texts
    prefix = words.encode("Instruct: find it\nQuery: ")
    places = [words.image_id] * 4
    behind = words.encode("\nbird")
    assert query.tokens.tolist() == [words.bos_id, *prefix, *places, *behind, words.eos_id]
    assert query.media[IMAGE].positions.tolist() == [1 + len(prefix)]
    assert query.media[IMAGE].values.shape == (1, 3, 8, 8)
    assert int(query.extras["pool_from"]) == 1 + len(words.encode("Instruct: find it")) + 1
    assert positive.tokens.tolist() == [words.bos_id, *places, *words.encode("\n"), words.eos_id]
    assert int(positive.media[IMAGE].values[0, 0, 0, 0]) == 2
    assert not negative.media
    assert with_pictures.media == {IMAGE} and with_pictures.measure(mixed())[1] == 2
    batch = collate([sample, with_pictures(member(**RECORD))], pad_id=0)
    assert batch.media[IMAGE].texts.tolist() == [0, 1]
    prompt = with_pictures.prompt(mixed())
    assert torch.equal(prompt.texts[0].tokens, query.tokens) and IMAGE in prompt.texts[0].media


def test_one_picture_is_one_document(with_pictures: RetrievalBuilder) -> None:
    first, other = extras(with_pictures(mixed())), extras(with_pictures(mixed("1", 3)))
    assert first["document_id"][1] == other["document_id"][1], "the same picture"
    assert first["text_hash"][0] != other["text_hash"][0], "one text, two pictures"
    assert len(set(first["document_id"].tolist())) == 3


def test_a_picture_is_never_cut(with_pictures: RetrievalBuilder) -> None:
    prefix = len(with_pictures.tokenizer.encode("Instruct: find it\nQuery: "))
    short = builder(
        with_pictures.tokenizer,
        tokens_per_tile=4,
        tile_size=8,
        num_negatives=1,
        sequence_length=prefix + 6,
    )
    query = short(mixed(query="bird sings " * 20)).texts[0]
    assert len(query.tokens) == prefix + 6
    assert query.tokens[-5:].tolist() == [short.tokenizer.image_id] * 4 + [short.tokenizer.eos_id]
    shorter = builder(
        with_pictures.tokenizer, tokens_per_tile=4, tile_size=8, sequence_length=prefix + 5
    )
    with pytest.raises(BadSample, match=r"a\.tar:0: a picture of 4 tokens .* does not fit"):
        shorter(mixed())


def test_no_text_has_the_placeholder_whatever_its_batch_has(
    with_pictures: RetrievalBuilder, tokenizer: Tokenizer
) -> None:
    """A model counts the placeholders of a whole batch, to which another text adds its picture."""

    def refused(build: RetrievalBuilder, word: str) -> None:
        match = f"the text has the placeholder {build.tokenizer.image_token}"
        for name in ("positive", "query"):
            with pytest.raises(BadSample, match=rf"a\.tar:0: {match}"):
                build(member(**RECORD | {name: f"a {word} bird", "negatives": ["a", "it"]}))
        with pytest.raises(ValueError, match=match):
            build.text("bird", f"find {word}")

    refused(with_pictures, "<image>")
    # A word of the vocabulary may be the placeholder, as Mistral's <unk>; beside pictures it is no
    # word any more.
    words = Tokenizer(tokenizer.path, image_token="Ġsmall", end_of_turn="</s>")
    refused(builder(words, tokens_per_tile=4), "small")
    text = builder(words).text("a small bird").text
    assert words.image_id in text.tokens.tolist(), "without pictures it is a word as any other"
    # One that was added is none: the model may have no embedding of its id.
    refused(builder(with_pictures.tokenizer), "<image>")


def test_pictures_that_a_record_cannot_have(
    with_pictures: RetrievalBuilder, tokenizer: Tokenizer
) -> None:
    def refused(match: str, build: RetrievalBuilder = with_pictures, **changes: Any) -> None:
        with pytest.raises(BadSample, match=match):
            build(mixed(**changes))

    refused("the picture 'gone.png' of query is no member", query_image="gone.png")
    refused("the picture 3 of query is no member", query_image=3)
    refused("the picture 'json' of query is no picture", query_image="json")
    refused("no field names the picture query.png", query_image=None)
    refused("1 negatives, 2 negative_images", negative_images=[None, None])
    refused(r"member query\.png is not read", builder(tokenizer))
    refused("the text has the placeholder <image>", query="a <image> bird")
    refused("no positive", positive_image=None)
