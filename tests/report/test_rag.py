"""The page of a RAG run: self-contained, escaped, with every number, prompt and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.report import page as command
from nvmm.report import rag
from tests.report.test_retrieval import Checker

TABLES = {
    "relevance": "answer",
    "recall": {
        "searched": {"recall_at_1": 0.25, "recall_at_5": 0.5, "questions": 4},
        "reranked, N=10": {"recall_at_1": 0.75, "recall_at_5": None, "questions": 4},
    },
    "answers": {
        "none": {"f1": 0.125, "exact_match": 0.0, "errors": 0, "prompt_tokens": 1234.0},
        "<best>": {"f1": 0.625, "exact_match": 0.5, "errors": 1, "both_accuracy": 0.875},
    },
}


def trace(number: int) -> dict[str, Any]:
    hit = {"id": "doc#0-9", "score": 0.4321, "relevant": True, "text": "a <chunk> & text"}
    way = {"contexts": ["doc#0-9"], "prompt": "System: <s>\n\nUser: Why?", "text": "So <it> is."}
    wrong: dict[str, Any] = {"contexts": [], "prompt": "", "text": None, "error": "q: too long"}
    return {
        "id": f"q{number}",
        "messages": [{"role": "user", "content": "Why <b>?"}],
        "answers": ["Because"],
        "answerable": number % 2 == 0,
        "searched": [hit, {**hit, "id": "doc#9-12", "score": None, "relevant": False}],
        "ways": {"best": {**way, "error": None, "f1": 0.25, "exact_match": 0.0}, "bad": wrong},
    }


def test_the_page_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text(json.dumps(TABLES))
    count = 203
    lines = "".join(json.dumps(trace(number)) + "\n" for number in range(count))
    (tmp_path / "traces.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nvmm.report", str(tmp_path)])
        command.main()
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert checker.classes.count("trace") == 200
    assert "200 of 203 questions" in text
    for part in (
        "0.250",
        "0.750",
        "1,234",
        "0.625",
        "0.875",
        "0.432",
        "recall at 1",
        "both accura",
    ):
        assert part in text, part
    assert "&lt;best&gt;" in text and "a &lt;chunk&gt; &amp; text" in text
    assert "System: &lt;s&gt;\n\nUser: Why?" in text and "So &lt;it&gt; is." in text
    assert "q: too long" in text and "(cannot be answered)" in text and "Because" in text
    assert "A chunk is relevant that contains an answer." in text
    assert "http" not in text and "<script" not in text


def test_an_output_that_is_not_whole_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"table\.json is missing: run job=rag to its end"):
        rag.write(tmp_path)
