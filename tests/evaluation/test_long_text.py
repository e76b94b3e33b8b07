"""LongBench and InfiniteBench: their metrics by hand, their files, prompts that lose the middle."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nvmm.config.check import config_dir
from nvmm.evaluation import infinitebench, longbench
from nvmm.evaluation.benchmark import Prediction
from nvmm.evaluation.items import prompt, without_middle
from nvmm.evaluation.longbench import classification, code_similarity, numbered
from tests.evaluation.test_haystack import builder  # noqa: F401


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "score"),
    [
        ("hotpotqa", "The cat sat.", ["a cat"], 2 / 3),
        ("triviaqa", "\nthe cat\nQuestion: dog", ["cat"], 1.0),  # the first line alone
        ("samsum", "a b\nc", ["a b"], 1.0),
        ("gov_report", "a b\nc", ["a b"], 0.8),  # P 2/3, R 1
        ("trec", "Type: B", ["B"], 1.0),
        ("trec", "A or B", ["B"], 0.5),  # two classes
        ("trec", "A", ["B"], 0.0),
        ("trec", "B of C", ["B of C"], 0.5),  # the part "B" is no rival, "C" is passed over
        ("passage_retrieval_en", "Paragraph 3, not 12", ["Paragraph 3"], 0.5),
        ("passage_retrieval_zh", "段落7", ["段落7"], 1.0),
        ("passage_count", "There are 5, 5 or 17", ["5"], 2 / 3),
        ("passage_count", "none", ["5"], 0.0),
        ("lcc", "\n# a note\nx = 1\ny", ["x = 2"], 0.8),  # 4 of 5 signs: 2 * 4 / 10
        ("lcc", "`x`", ["x"], 0.0),
    ],
)
def test_longbench(task: str, prediction: str, answers: list[str], score: float) -> None:
    record = {"context": "c", "input": "i", "answers": answers, "all_classes": ["A", "B", "C"]}
    if answers == ["B of C"]:
        record["all_classes"] = ["B", "C", "B of C"]
    bench = longbench.LongBench("gone", {task: "{context} {input}"}, {task: 4})
    item = bench._item("file:1", task, record)
    assert item.text == "c i" and item.plain == (task in longbench._PLAIN)
    found = item.metric(prediction=prediction, answers=item.answers)
    assert found == pytest.approx(score, abs=1e-6)


def test_longbench_functions_without_answers() -> None:
    nothing: list[str] = []
    assert classification(["A"], prediction="A", answers=nothing) == 0.0
    assert numbered(r"(\d)", prediction="1", answers=nothing) == 0.0
    assert code_similarity(prediction="x", answers=nothing) == 0.0


@pytest.mark.parametrize(
    ("task", "label", "prediction", "score"),
    [
        ("passkey", ["71432"], "The pass key is 71432.", 1.0),
        ("passkey", ["71432"], "1 or 71432", 0.0),
        ("number_string", ["0011"], "0011", 1.0),
        ("kv_retrieval", ["a-1"], '{"a-1"}', 1.0),
        ("kv_retrieval", ["a-1"], "a-12", 0.0),
        ("code_run", [-7], "func(3) is -7.", 1.0),
        ("code_run", [-7], "-7 it is", 0.0),
        ("longbook_qa_eng", ["a cat", "dog"], "The cat sat.", 2 / 3),
        ("longbook_qa_chn", ["鲁迅"], "是鲁迅。", 0.8),  # two of three signs: P 2/3, R 1
        ("longbook_sum_eng", ["a b\nc d"], "c d\na b", 1.0),
        ("longdialogue_qa_eng", ["JOHN"], "It is John.", 1.0),
        ("longdialogue_qa_eng", ["JOHN"], "Johnny", 0.0),
        ("math_find", [42], "42 of them", 1.0),
        ("math_find", [4.5], "is 4.5", 1.0),
        ("math_find", [42], "7, then 42", 0.0),
        ("math_calc", [1, 3, 6, 10], "[1, 3, 7, 10]", 0.5),
    ],
)
def test_infinitebench(task: str, label: Any, prediction: str, score: float) -> None:
    record = {
        "context": "c",
        "input": "The largest number of the list; func_1(3) of it",
        "answer": label,
    }
    bench = infinitebench.InfiniteBench("gone", {task: "{context}"}, {task: 4})
    item = bench._item("file:1", task, record)
    found = item.metric(prediction=prediction, answers=item.answers)
    assert found == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "prediction", "score"),
    [
        ("longbook_choice_eng", "B", 1.0),
        ("longbook_choice_eng", " C. no", 0.0),
        ("longbook_choice_eng", "the dog", 1.0),
        ("longbook_choice_eng", "I think the answer is: B!", 1.0),
        ("longbook_choice_eng", "my answer is the dog", 1.0),
        ("longbook_choice_eng", "the option is D", 0.0),
        ("longbook_choice_eng", "maybe B or C", 1.0),
        ("longbook_choice_eng", "", 0.0),
        ("code_debug", "B.", 1.0),
        ("code_debug", "The answer is: B", 1.0),
        ("code_debug", "The answer is: `the dog`", 1.0),
        ("code_debug", "The answer is: C", 0.0),
        ("code_debug", "B", 0.0),
        ("code_debug", "answer is:", 0.0),
    ],
)
def test_infinitebench_choices(task: str, prediction: str, score: float) -> None:
    record = {
        "context": "c {x}",
        "input": "which?",
        "answer": ["the dog"],
        "options": ["the cat", "the dog", "a cow", "no"],
    }
    bench = infinitebench.InfiniteBench(
        "gone", {task: "{context} {question} {OPTION_D}"}, {task: 4}
    )
    item = bench._item("file:1", task, record)
    assert item.text == "c {x} which? no" and item.answers == ["the dog", "B"]
    assert item.metric(prediction=prediction, answers=item.answers) == score


def test_prompts_of_numbers_and_functions() -> None:
    tasks = {"math_find": "{prefix} {context}", "code_run": "{func}: {func_call}"}
    bench = infinitebench.InfiniteBench("gone", tasks, dict.fromkeys(tasks, 4))
    record = {"context": "[1, 2]", "input": "The second largest number of it is:", "answer": [1]}
    text = bench._item("f", "math_find", record).text
    assert text == "What is the second largest number in the following list? [1, 2]"
    record = {"context": "", "input": "What is func_12(-3)?", "answer": [1]}
    assert bench._item("f", "code_run", record).text == "func_12: func_12(-3)"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("longbench", {"context": 1}, "q.jsonl:0: context and input must be texts"),
        ("longbench", {"answers": "x"}, "q.jsonl:0: answers must be a list of texts"),
        ("infinitebench", {"answer": []}, "q.jsonl:0 has no answer"),
        ("infinitebench", {"options": ["x"]}, "q.jsonl:0: options must be four"),
        ("infinitebench", {"answer": "z"}, "q.jsonl:0: the answer 'z' is none of its options"),
        ("infinitebench", {"input": None}, "q.jsonl:0: input must be text"),
    ],
)
def test_a_bad_record_is_named(kind: str, change: dict[str, Any], message: str) -> None:
    good = {"context": "c", "input": "i", "answers": ["x"], "answer": "x", "options": list("xyvw")}
    bench: Any
    if kind == "longbench":
        bench, task = longbench.LongBench("g", {"qasper": "{input}"}, {"qasper": 1}), "qasper"
    else:
        task = "longbook_choice_eng"
        bench = infinitebench.InfiniteBench("g", {task: "{input}"}, {task: 1})
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        bench._item("q.jsonl:0", task, good | change)


@pytest.mark.parametrize("kind", ["longbench", "infinitebench"])
def test_every_task_has_prompt_length_and_metric(kind: str) -> None:
    config = yaml.safe_load((config_dir() / "benchmark" / f"{kind}.yaml").read_text())
    metrics = {"longbench": longbench.METRICS, "infinitebench": infinitebench.METRICS}[kind]
    assert config["prompts"].keys() == config["max_new_tokens"].keys() == metrics.keys()


def test_files_and_tasks_are_checked(tmp_path: Path) -> None:
    model: Any = SimpleNamespace()
    bench = longbench.LongBench(str(tmp_path), {"qasper": "{input}"}, {"qasper": 4})
    with pytest.raises(ValueError, match=r"benchmark.folder: .*qasper.jsonl cannot be read"):
        bench.items(model)
    record = {"context": "c", "input": "i", "answers": ["a"], "length": 5000}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record) + "\n")
    items = bench.items(model)
    assert len(items) == 1 and items.item(0).answers == ["a"]
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record | {"input": "j"}) + "\n")
    assert bench.items(model).fingerprint != items.fingerprint
    with pytest.raises(ValueError, match="vcsum is no task with a prompt"):
        longbench.LongBench("x", {}, {}, only=["vcsum"]).items(model)


def test_longbench_e_is_reported_by_length(tmp_path: Path) -> None:
    """Also for answers that this rank has not asked for."""
    model: Any = SimpleNamespace()
    records = [
        {"context": "c", "input": "i", "answers": ["a"], "length": n} for n in (3999, 4000, 8000)
    ]
    (tmp_path / "qasper_e.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    bench = longbench.LongBench(str(tmp_path), {"qasper": "{input}"}, {"qasper": 4}, suffix="_e")
    items = bench.items(model)
    sources = [items.records[number][0] for number in range(3)]  # type: ignore[attr-defined]
    lines = [
        Prediction(number, source, "qasper", "i", ["a"], "a", score)
        for number, (source, score) in enumerate(zip(sources, (1.0, 0.0, 0.5), strict=True))
    ]
    summary = bench.result(lines, tmp_path).summary
    assert summary["lengths"] == {"0-4k": 1.0, "4-8k": 0.0, "8k+": 0.5}
    assert summary["average"] == 0.5
    with pytest.raises(ValueError, match="f: length must be a number, got None"):
        bench._item("f", "qasper", {**records[0], "length": None})


def test_a_long_prompt_loses_its_middle(builder: Any) -> None:  # noqa: F811
    """The first and the last tokens stay, half and half, and the prompt fits."""
    ids = builder.tokenizer.encode("".join(f" {n}" for n in range(1000)))
    text = builder.tokenizer.decode(ids)
    cut = without_middle(text, lambda t: len(builder.tokenizer.encode(t)), builder)
    assert cut == text
    builder = builder.asking(reserve=4096 - 200)
    cut = without_middle(text, lambda t: len(builder.tokenizer.encode(t)), builder)
    kept = builder.tokenizer.encode(cut)
    assert kept[:95] == ids[:95] and kept[-95:] == ids[-95:] and 195 <= len(kept) <= 200
    task = {"qasper": "{context}{input}"}
    bench = longbench.LongBench("gone", task, {"qasper": 50})
    record = {"context": text, "input": "?", "answers": ["x"]}
    for name in ("qasper", "lcc"):
        bench = longbench.LongBench("gone", {name: "{context}{input}"}, {name: 50})
        sample, _ = prompt(bench._item("f", name, record), builder)
        assert 140 <= len(sample.text.tokens) <= 150
