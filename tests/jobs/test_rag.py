"""RAG runs: chunks by hand, orders, a killed run in every stage, layouts, and the table."""

from __future__ import annotations

import copy
import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

from nvmm.jobs.parts import Parts
from nvmm.jobs.rag.chunks import Chunking, chunk_id
from nvmm.jobs.rag.contexts import Contexts
from nvmm.jobs.rag.questions import Chunk, Place, Question, read_documents, read_questions
from tests.jobs import rag_run
from tests.ranks import run_ranks

TEXT = "One two. Three?  Four five six!\n\nSeven\n"


def pieces(unit: str, size: int, overlap: int = 0, text: str = TEXT) -> list[str]:
    chunking = Chunking(unit, size, overlap)  # type: ignore[arg-type]
    return [text[start:end] for start, end in chunking.spans(text)]


def test_chunks_by_words_and_sentences() -> None:
    assert pieces("words", 3) == ["One two. Three?", "Four five six!", "Seven"]
    assert pieces("words", 3, 2) == [
        "One two. Three?",
        "two. Three?  Four",
        "Three?  Four five",
        "Four five six!",
        "five six!\n\nSeven",
    ]
    assert pieces("words", 100) == [TEXT.strip()]
    assert pieces("words", 4, 3, "a b c d") == ["a b c d"], "no chunk lies within another"
    assert pieces("sentences", 1) == ["One two.", "Three?", "Four five six!", "Seven"]
    assert pieces("sentences", 2, 1)[1:] == ["Three?  Four five six!", "Four five six!\n\nSeven"]
    assert pieces("words", 3, 0, " \n") == []
    with pytest.raises(ValueError, match=r"overlap=3 must be at least 0, and below size=3"):
        Chunking("words", 3, 3)
    with pytest.raises(ValueError, match=r"job\.chunking\.unit"):
        Chunking("letters")  # type: ignore[arg-type]


def test_chunks_by_tokens(tmp_path: Path) -> None:
    from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe

    ends = {"eos_token": "</s>", "pad_token": "</s>"}
    special = ["<s>", "</s>"]
    train_byte_level_bpe(tmp_path, [TEXT], vocab_size=300, special_tokens=special, **ends)
    words = Tokenizer(str(tmp_path), image_token="<s>", end_of_turn="</s>")
    spans = Chunking("tokens", 4, 1).spans(TEXT, words)
    tokens = words.spans(TEXT)
    assert spans[0][0] == 0 and spans[-1][1] == len(TEXT.rstrip())
    for number, (start, end) in enumerate(spans[:-1]):
        own = tokens[3 * number : 3 * number + 4]
        assert TEXT[start:end] == TEXT[own[0][0] : own[-1][1]].strip()
    assert chunk_id("doc", spans[1]) == f"doc#{spans[1][0]}-{spans[1][1]}"


def test_orders_of_chunks() -> None:
    ranking = list("12345678")

    def order(name: str, **options: Any) -> str:
        return "".join(Contexts("searched", k=5, order=name, **options).ordered(ranking, "q"))  # type: ignore[arg-type]

    assert [order(name) for name in ("best_first", "reverse", "swing")] == [
        "12345",
        "54321",
        "13542",
    ]
    drawn = order("random", seed=1)
    assert drawn == order("random", seed=1) and sorted(drawn) == list("12345")
    assert len({order("random", seed=seed) for seed in range(9)}) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "searched"}, "k=None with source=searched"),
        ({"source": "gold", "k": 3}, "k=3 with source=gold"),
        ({"source": "searched", "k": 0}, "k=0"),
        ({"source": "searched", "k": 1, "candidates": 3}, "candidates=3 is of source=reranked"),
        ({"source": "none", "order": "swing"}, "order=swing is of ranked chunks"),
        ({"source": "searched", "k": 2, "order": "random"}, "seed=None goes with order=random"),
        ({"source": "searched", "k": 2, "seed": 2}, "seed=2 goes with order=random"),
    ],
)
def test_contexts_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contexts(**options)


def test_what_is_relevant() -> None:
    question = Question(
        "q", [{"role": "user", "content": "?"}], ["The  Bird!"], relevant=[Place("d", 10, 20)]
    )
    chunk = Chunk("d", 0, 10, "a bird, the bird.")
    assert not question.finds(chunk, "gold"), "it ends where the span begins"
    assert question.finds(Chunk("d", 19, 30, ""), "gold")
    assert not question.finds(Chunk("e", 12, 14, ""), "gold")
    assert question.finds(chunk, "answer")
    assert not question.finds(Chunk("d", 0, 9, "the birds"), "answer"), "whole words alone"
    assert question.judged("gold") and question.judged("answer")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "q"}, "give either question or messages"),
        ({"id": "q", "question": "?", "topk": 3}, "topk is unknown"),
        ({"question": "?"}, "id must be a text"),
        ({"id": "q", "question": "?", "relevant": ["x"]}, "document 'x' is not in job.documents"),
        ({"id": "q", "question": "?", "document": "x"}, "document 'x' is not in job.documents"),
        ({"id": "q", "question": "?", "relevant": [{"document": "d", "start": 3, "end": 3}]}, "it"),
        ({"id": "q", "question": "?", "answers": "yes"}, "answers must be a list of texts"),
        ({"id": "q", "question": "?", "answerable": 1}, "answerable must be true or false"),
        ({"id": "q", "question": "?", "relevant": "d"}, "relevant must be a list"),
        (
            {"id": "q", "messages": [{"role": "assistant", "content": "Hi"}]},
            "must end with a turn of the user",
        ),
    ],
)
def test_bad_questions_are_named(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=rf"q\.jsonl: record 1: .*{message}"):
        read_questions(str(path), {"d": "text"})
    path.write_text("")
    with pytest.raises(ValueError, match="has no question"):
        read_questions(str(path), {})
    with pytest.raises(ValueError, match=r"job\.documents=.* cannot be read"):
        read_documents(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder with an undisturbed run in it, its config and its summary."""
    folder = tmp_path_factory.mktemp("rag")
    options = rag_run.prepare(folder)
    [summary] = run_ranks(rag_run.run, 1, options, folder / "generator", folder / "whole")
    return folder, options, summary


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def test_an_undisturbed_run(whole: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, options, summary = whole
    output = folder / "whole"
    chunks = Parts(output / "chunks").read().to_pylist()
    assert [row["id"] for row in chunks] == list(rag_run.DOCUMENTS)
    table = json.loads((output / "table.json").read_text())
    assert set(table["answers"]) == set(options["answers"])
    assert list(table["recall"]) == ["searched", "reranked, N=2", "reranked, N=4"]
    traces = [json.loads(line) for line in (output / "traces.jsonl").read_text().splitlines()]
    assert [trace["id"] for trace in traces] == ["q1", "q2", "q3", "q4"]
    # Recall by hand from the traces: q1 and q2 say what is relevant.
    for name, row in (("searched", table["recall"]["searched"]),):
        ranks = [
            next(n for n, hit in enumerate(trace[name], 1) if hit["relevant"])
            for trace in traces[:2]
        ]
        assert row["recall_at_1"] == sum(rank <= 1 for rank in ranks) / 2
        assert row["recall_at_3"] == sum(rank <= 3 for rank in ranks) / 2
        assert row["questions"] == 2
    second = traces[1]
    # The prompt of a dialogue: its turns, the chunks in their order, no instruction.
    way = second["ways"]["searched"]
    ids = [hit["id"] for hit in second["searched"][:2]]
    assert way["contexts"] == ids[::-1]
    texts = {hit["id"]: hit["text"] for hit in second["searched"]}
    block = "\n\n".join(texts[name] for name in way["contexts"])
    assert f"cannot be found in the context.\n\n{block}\n\nUser: Who sleeps?" in way["prompt"]
    assert way["prompt"].endswith("Assistant: The cat.\n\nUser: And who else?\n\nAssistant:")
    assert "User: Be short. What is green?" in traces[2]["ways"]["none"]["prompt"]
    # Reranking of three: those by score, the others as they were found.
    scored = {hit["id"]: hit["score"] for hit in second["reranked"]}
    three = sorted((hit["id"] for hit in second["searched"][:3]), key=lambda i: -scored[i])
    assert second["ways"]["reranked"]["contexts"] == three[:2]
    assert list(scored.values())[4:] == [None, None], "four were scored of six"
    assert all(0 < score < 1 for score in list(scored.values())[:4])
    # Long context: the whole document, and a row with an error where none is named.
    assert rag_run.DOCUMENTS["birds"] in second["ways"]["document"]["prompt"]
    assert traces[2]["ways"]["document"]["error"] == "q3: its record names no whole document"
    assert table["answers"]["document"]["errors"] == 1
    metrics = summary["metrics"]
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert 0 < metrics["saved_tokens"] < metrics["prompt_tokens"]
    assert summary["bad"] == 3, "no document of q3, no gold chunk of q3 and q4"


def killed(init: str, *arguments: Any) -> None:
    rag_run.run(0, 1, init, *arguments)


STAGES = (
    ("chunks", 1),
    ("vectors/corpus", 2),
    ("vectors/queries", 1),
    ("searched", 1),
    ("reranked", 1),
    ("answers/document", 1),
)


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        pytest.param(*one, marks=[] if one[0] == "reranked" else [pytest.mark.slow])
        for one in STAGES
    ],
)
def test_a_killed_run_goes_on_and_repeats_no_row(
    whole: tuple[Path, dict[str, Any], dict[str, Any]], stage: str, parts: int, tmp_path: Path
) -> None:
    folder, options, summary = whole
    output = tmp_path / "killed"
    context = multiprocessing.get_context("forkserver")
    arguments = (f"file://{tmp_path}/rendezvous", options, folder / "generator", output)
    process = context.Process(target=killed, args=(*arguments, None, (stage, parts)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.arrow")}
    assert any(path.parent == output / stage for path in kept)
    assert not (output / "table.json").exists()
    rows = sum(_rows(path) for path in kept)
    [again] = run_ranks(rag_run.run, 1, options, folder / "generator", output)
    assert again["written"] == summary["rows"] - rows
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "none was made again"
    assert contents(output) == contents(folder / "whole")


def _rows(path: Path) -> int:
    import pyarrow as pa

    return len(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_layouts_and_sharing_give_the_same_answers(
    whole: tuple[Path, dict[str, Any], dict[str, Any]], size: str, tmp_path: Path
) -> None:
    folder, options, _ = whole
    plain = copy.deepcopy(options) | {"share_prefixes": False}
    run_ranks(rag_run.run, 2, plain, folder / "generator", tmp_path / "out", {size: 2})
    ours, theirs = (
        [json.loads(line) for line in (path / "traces.jsonl").read_text().splitlines()]
        for path in (folder / "whole", tmp_path / "out")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert [hit["id"] for hit in one["reranked"]] == [hit["id"] for hit in other["reranked"]]
        scores = [[hit["score"] for hit in trace["reranked"][:4]] for trace in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-12)
        for name, way in one["ways"].items():
            assert way["text"] == other["ways"][name]["text"]
            assert other["ways"][name]["saved_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {}}, "must name at least one way"),
        ({"answers": {"x": {"k": 3}}}, r"job\.answers\.x={'k': 3} needs _target_=nvmm\.jobs\.rag"),
        ({"answers": {"../x": None}}, r"job\.answers\.\.\./x: the name must be one of a folder"),
        ({"ranking": None}, r"job\.answers\.reranked: source=reranked needs job\.ranking"),
        ({"searched": 1}, r"job\.answers\.searched: k=2 must be at most job\.searched=1"),
        ({"candidates": [5]}, r"job\.candidates=\[5\] must be from 1 to job\.ranking\.top=4"),
        ({"cutoffs": [7]}, r"job\.cutoffs=\[7\] must be from 1 to job\.searched=6"),
        ({"max_new_tokens": 0}, r"job\.max_new_tokens=0 must be at least 1"),
        ({"batch_size": 0}, r"job\.batch_size=0 must be at least 1"),
        ({"encode_batch_size": -1}, r"job\.encode_batch_size=-1 must be at least 1"),
        ({"relevance": "good"}, r"job\.relevance"),
        ({"searched": 3}, r"job\.ranking\.top=4 must be at most job\.searched=3"),
    ],
)
def test_bad_runs_are_refused(
    whole: tuple[Path, dict[str, Any], dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    from hydra.utils import instantiate

    from nvmm.jobs.rag.pipeline import Rag

    made = instantiate(whole[1], _convert_="all")
    given = {name: getattr(made, name) for name in Rag.__dataclass_fields__ if name != "build"}
    with pytest.raises(ValueError, match=message):
        Rag(**{key: value for key, value in (given | changes).items() if key != "name"})
