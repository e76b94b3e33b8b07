"""Benchmarks of text on a checkpoint: conversations with contexts, a needle, long documents."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvmm.config import compose
from nvmm.config.check import config_dir
from nvmm.evaluation.conversations import Conversations, ConversationSet, contract
from nvmm.evaluation.refusals import UNANSWERABLE, refuses
from nvmm.evaluation.squad import squad_f1
from tests import test_evaluate
from tests.ranks import run_ranks
from tests.test_evaluate import WORDS, command, launch, read

CHATQA: dict[str, Any] = yaml.safe_load((config_dir() / "template" / "chatqa.yaml").read_text())
CHATQA |= {"bos": False, "system": "Answer."}
"""ChatQA's template; the tests' tokenizer has no BOS, and byte by byte its words are long."""
FORM = {"_target_": "nvmm.data.samples.contexts.ContextChat"}
SETS = {
    "quac": {"file": "quac.json", "unanswerable": True, "instruction": "Be full."},
    "doqa": {"file": "doqa.jsonl", "unanswerable": True, "kind": "chat"},
    "convfinqa": {"file": "fin.json", "metric": "convfinqa"},
    "hybridial": {"file": "hybrid.json", "num_contexts": 1},
}
TARGET = "nvmm.evaluation.conversations"


def turn(words: int, *answers: str, **more: Any) -> dict[str, Any]:
    question = " ".join(WORDS[:words])
    return {
        "messages": [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": "a number"},
            {"role": "user", "content": question},
        ],
        "ctxs": [{"title": "t", "text": "the picture"}, {"title": "t", "text": "digits"}],
        "answers": list(answers),
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    run_ranks(functools.partial(test_evaluate.save, text_only=True), 1, path)
    (path / "run" / "summary.json").write_text("{}")
    files: dict[str, list[dict[str, Any]]] = {
        "quac.json": [turn(3, UNANSWERABLE), turn(4, "a number", "it"), turn(5, "x")],
        "doqa.jsonl": [turn(2, "digits", answerable=True)],
        "fin.json": [turn(6, "206588 - 181001", exe_answer=25587.0)],
        "hybrid.json": [turn(7, "the number")],
    }
    files["quac.json"][2]["gold_retrieved"] = False
    for name, records in files.items():
        lines = map(json.dumps, records)
        text = "\n".join(lines) if name.endswith("l") else json.dumps(records)
        (path / name).write_text(text)
    (path / "book.txt").write_text("The ship was there. " * 3 + "Nobody read it. How many? " * 20)
    return path


def chatrag(folder: Path, **changes: Any) -> dict[str, Any]:
    sets = {name: {"_target_": f"{TARGET}.ConversationSet", **s} for name, s in SETS.items()}
    return {
        "_target_": f"{TARGET}.Conversations",
        "folder": str(folder),
        "sets": sets,
        "max_new_tokens": 6,
        "builder": {"form": FORM, "template": CHATQA},
    } | changes


def parallel(tensor: int, pipeline: int) -> dict[str, Any]:
    return {
        "_target_": "nvmm.parallel.setup.Parallel",
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }


def test_conversations_are_scored_by_their_sets(folder: Path, tmp_path: Path) -> None:
    """The summary is what the predictions give by hand; a killed evaluation goes on behind them."""
    config = command(folder, "", benchmark=chatrag(folder), output=str(tmp_path / "out"))
    # A rank of two data-parallel ones asks half of the turns.
    [other, _] = run_ranks(launch, 2, config | {"output": str(tmp_path / "other")})
    run_ranks(test_evaluate.interrupted, 1, config | {"batch_size": 1})
    assert len(test_evaluate.read_written(tmp_path / "out")) == 2
    summaries = run_ranks(launch, 2, config | {"parallel": parallel(2, 1)})
    summary = summaries[0]
    assert summaries[1] == summary == other
    lines = read(tmp_path / "out")
    assert [line["kind"] for line in lines] == [*["quac"] * 3, "chat", "convfinqa", "hybridial"]
    assert lines[0]["question"].endswith(" ".join(WORDS[:3]))
    assert lines[4]["answers"] == ["25587.0", "206588 - 181001"]
    for line in (lines[1], lines[2], lines[3], lines[5]):
        assert not refuses(line["prediction"]), "the case is no case"
        expected = squad_f1("spaced", prediction=line["prediction"], answers=line["answers"])
        assert line["score"] == expected
    means = [sum(line["score"] for line in lines[:3]) / 3, *(line["score"] for line in lines[3:])]
    averages = summary["averages"]
    assert averages["average"] == pytest.approx(sum(means) / 4)
    assert averages["average_without_hybridial"] == pytest.approx(sum(means[:3]) / 3)
    # The turn whose gold context was not retrieved is in no accuracy; `chat` has one kind.
    wrong = {"unanswerable": 0.0, "answerable": 1.0, "both": 0.5}
    assert summary["unanswerable"] == {"quac": wrong}
    scores = json.loads((folder / "run" / "summary.json").read_text())
    assert scores["chatrag_score"]["average"] == averages["average"]


def test_the_prompt_of_a_conversation_is_chatqas() -> None:
    record = turn(3, "x")
    asked = ConversationSet(file="", instruction="Be full.", num_contexts=1)
    found = contract(record, "f:1", asked)
    assert found["instruction"] == "Be full." and found["contexts"] == [
        "title: t, source: the picture"
    ]
    assert found["messages"] == record["messages"]
    latest = contract(record, "f:1", ConversationSet("", "Be brief.", latest=True), 1)
    assert latest["messages"] == [{"role": "user", "content": "Be brief. what is the"}]
    assert "instruction" not in latest and len(latest["contexts"]) == 2
    ours = {"messages": record["messages"], "contexts": ["a", "b"]}
    assert contract(ours, "f:1", asked)["contexts"] == ["a"]
    for bad in ({"messages": []}, {"messages": record["messages"][:2]}, {"messages": "x"}):
        with pytest.raises(ValueError, match="f:1: messages must be turns"):
            contract(record | bad, "f:1", asked)
    with pytest.raises(ValueError, match="f:1: ctxs must be a list of objects"):
        contract(record | {"ctxs": ["x"]}, "f:1", asked)
    for odd in ({"ctxs": 7}, {"ctxs": [{"text": "x", "title": 7}]}, {"contexts": {"a": 1}}):
        with pytest.raises(ValueError, match=r"f:1: (ctxs|contexts) must be a list"):
            contract(record | odd, "f:1", asked)
    bare = contract(record | {"ctxs": [{"text": "x {y}"}]}, "f:1", asked, passage="{title}: {text}")
    assert bare["contexts"] == ["x {y}"]
    with pytest.raises(ValueError, match=r"must have \{title\} and \{text\}, and no"):
        Conversations("", {}, passage="{text}")


def test_refusals_and_golds_of_a_set() -> None:
    sets = {
        "quac": ConversationSet("", unanswerable=True),
        "inscit": ConversationSet("", drop_refusal=True),
        "coqa": ConversationSet(""),
    }
    bench = Conversations("gone", sets)
    said = "I cannot find that."
    item = bench._item("f", "quac", turn(3, UNANSWERABLE))
    assert item.metric(prediction=said, answers=item.answers) == 1.0
    assert bench._item("f", "quac", turn(3, "x", answerable=False)).answers == [UNANSWERABLE]
    item = bench._item("f", "coqa", turn(3, UNANSWERABLE, " "))
    assert item.answers == [UNANSWERABLE]
    assert 0 < item.metric(prediction=said, answers=item.answers) < 1.0
    assert bench._item("f", "inscit", turn(3, "x", UNANSWERABLE)).answers == ["x"]
    with pytest.raises(ValueError, match=r"benchmark.only=\['sqa'\] are no sets"):
        Conversations("gone", sets, only=["sqa"]).items(None)  # type: ignore[arg-type]


def needle(folder: Path) -> dict[str, Any]:
    return {
        "_target_": "nvmm.evaluation.needle.Needle",
        "haystack": [str(folder / "book.txt")],
        "lengths": [120, 200],
        "depths": [0, 100],
        "needle": "The number is four.",
        "question": "what is the number",
        "answers": ["four"],
        "max_new_tokens": 4,
    }


def test_a_needle_gives_a_grid_and_its_picture(folder: Path) -> None:
    output = folder / "run" / "evaluation" / "needle" / "step_00000003"
    config = command(folder, "", benchmark=needle(folder))
    summaries = run_ranks(launch, 2, config)
    summary = summaries[1]
    lines = read(output)
    assert [line["kind"] for line in lines] == ["120/0", "120/100", "200/0", "200/100"]
    grid = [[lines[0]["score"], lines[2]["score"]], [lines[1]["score"], lines[3]["score"]]]
    assert summary["recall"] == grid
    picture = (output / "heatmap.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "run" / "report.html").read_text()
    assert "Needle in a haystack" in page and "data:image/png;base64," in page
    [refused] = run_ranks(launch, 1, config | {"max_new_tokens": 3, "output": str(folder / "no")})
    assert refused[0] == compose.BAD_CONFIG and "set benchmark.max_new_tokens" in refused[1]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 2), (2, 1, 1)])
def test_long_documents_at_every_layout(
    folder: Path, tmp_path: Path, ranks: int, tensor: int, pipeline: int
) -> None:
    """LongBench's tasks of both kinds; a document that is too long loses its middle."""
    for name, answer in (("qasper", "digits"), ("lcc", "read it")):
        record = {"context": " ".join(WORDS * 40), "input": "what is it", "answers": [answer]}
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    tasks = {"qasper": "{context} {input}", "lcc": "{context}"}
    benchmark = {
        "_target_": "nvmm.evaluation.longbench.LongBench",
        "folder": str(folder),
        "prompts": tasks,
        "max_new_tokens": {"qasper": 4, "lcc": 6},
    }
    config = command(folder, "", benchmark=benchmark, output=str(tmp_path / "out"))
    summaries = run_ranks(launch, ranks, config | {"parallel": parallel(tensor, pipeline)})
    expected = folder / "longbench.json"
    lines = read(tmp_path / "out")
    assert [line["kind"] for line in lines] == ["qasper", "lcc"]
    assert summaries[0]["num_bad"] == 0
    answers = [line["prediction"] for line in lines]
    if not expected.exists():
        expected.write_text(json.dumps(answers))
    assert answers == json.loads(expected.read_text())
