"""Questions as their builder reads them, metrics of kinds, and summaries."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.forms import Caption, Document, MultipleChoice, Ocr
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.evaluation.benchmark import (
    Example,
    Prediction,
    Questions,
    Settings,
    Skipped,
    _check_known,
    summarize,
    table,
)
from nvmm.evaluation.containment import containment
from nvmm.evaluation.exact_match import exact_match
from nvmm.evaluation.journal import Journal
from tests.data.conftest import template

SUFFIX = "Be brief."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(train_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def ask(tokenizer: Tokenizer, record: Any, images: int = 1, **options: Any) -> tuple[Example, str]:
    """The example, and the text of its prompt without placeholders."""
    changes = {name: options.pop(name) for name in ("form", "fields") if name in options}
    build = InstructBuilder(
        template(),
        ImageTags("none"),
        tokens_per_tile=1,
        tile_size=8,
        tokenizer=tokenizer,
        sequence_length=512,
        **changes,
    )
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    members = {f"{number}.png": data.getvalue() for number in range(images)}
    if record is not None:
        members["json"] = json.dumps(record).encode()
    members = {"__url__": "a.tar", "__key__": "7", **members}
    example = Questions("b", "*.tar", exact_match, **options).ask(members, build)
    text = tokenizer.decode(example.prompt.text.tokens.tolist(), skip_special_tokens=False)
    return example, text.replace("<Image><|vision_pad|></Image>", "#")


CHOICES = {"question": "Which?", "choices": ["cat", "dog"], "answer": "dog"}
BOXES = {"words": ["hi"], "boxes": [[0, 0, 4, 8]]}
TURNS = [
    {"from": "human", "value": "<image>\nOne?"},
    {"from": "gpt", "value": "1"},
    {"from": "human", "value": "Two?"},
    {"from": "gpt", "value": "2"},
]


@pytest.mark.parametrize(
    ("record", "options", "question", "answers", "prompt"),
    [
        ({"question": "Why?", "answers": ["so", "yes"]}, {}, "Why?", ["so", "yes"], "#\nWhy?"),
        ({"question": "Why?", "answers": None, "answer": "so"}, {}, "Why?", ["so"], "#\nWhy?"),
        (
            {"annotation": {"query": "Why?"}, "truth": ["so"]},
            {"fields": {"question": "annotation.query", "answers": "truth"}},
            "Why?",
            ["so"],
            "#\nWhy?",
        ),
        (CHOICES, {"form": MultipleChoice("Letter.")}, None, ["B"], "#\nWhich?\nA. cat\nB. dog"),
        ({"caption": "A cat."}, {"form": Caption("Describe.")}, "Describe.", ["A cat."], "#\n"),
        (BOXES, {"form": Ocr("Read.")}, "Read.", ["hi<box>(0,0),(500,1000)</box>"], "#\nRead."),
        ({"conversations": TURNS}, {}, "Two?", ["2"], "#\nOne?<|im_end|>"),
        (
            {"conversations": None, "messages": [{"role": r, "content": t} for r, t in
             (("user", "<image> q"), ("assistant", "7"))]},
            {},
            "q",
            ["7"],
            "# q",
        ),
        ({"question": "Why?"}, {}, "Why?", [], "#\nWhy?"),
        ({"question": "Why?", "answers": []}, {}, "Why?", [], "#\nWhy?"),
        ({"question": "Why?", "answer": None}, {}, "Why?", [], "#\nWhy?"),
        ({"conversations": TURNS[:1]}, {}, "One?", [], "#\nOne?"),
        ({"question": "Which?", "choices": ["a"]}, {"form": MultipleChoice()}, None, [], "#\nWhi"),
        ({"text": "A <image> b"}, {"form": Document()}, "A  b", [], "A # b"),
    ],
)  # fmt: skip
def test_questions_and_truths_are_read_as_in_training(
    tokenizer: Tokenizer, record: Any, options: Any, question: Any, answers: Any, prompt: str
) -> None:
    example, text = ask(tokenizer, record, **options)
    assert question is None or example.question == question
    assert example.answers == answers
    assert prompt in text
    assert not example.prompt.text.weights.any()
    assert len(example.prompt.text.media) == 1
    if "form" not in options or not isinstance(options["form"], Document):
        assert text.endswith("<|im_start|>assistant\n")
        with_suffix, longer = ask(tokenizer, record, suffix=SUFFIX, **options)
        assert with_suffix.question == example.question
        ending = "<|im_end|>\n<|im_start|>assistant\n"
        assert longer == text.removesuffix(ending) + "\n" + SUFFIX + ending
    else:
        with pytest.raises(ValueError, match=r"a\.tar:7: no user's turn to put"):
            ask(tokenizer, record, suffix=SUFFIX, **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Why?", "answers": ["a", None]}, "answer must be text, got None"),
        ({"question": "Why?", "answers": [["a"], ["b"]]}, r"answer must be text, got \['a'\]"),
        ({"question": "Why?", "answer": {"text": "a"}}, "answer must be text, got None"),
        ({"question": None, "answers": ["a"]}, "no conversations, messages or question"),
        ({"question": {"text": "q"}, "answers": ["a"]}, "question must be text"),
        ({"question": "Why?", "answers": ["a"], "kind": {"a": 1}}, r"kind must be text, got \{'a'"),
        ({"caption": "x"}, "no conversations, messages or question"),
        ({"question": "long " * 600, "answers": ["a"]}, "would cut the prompt"),
        (None, "no conversations, messages or question"),
        (7, "must be an object"),
    ],
)
def test_samples_without_a_question_are_named(
    tokenizer: Tokenizer, record: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.tar:7: .*{message}"):
        ask(tokenizer, record)


def test_kinds_and_names_of_fields(tokenizer: Tokenizer) -> None:
    record = {"question": "Why?", "answers": ["a"], "meta": {"type": 3}}
    assert ask(tokenizer, record)[0].kind == "all"
    assert ask(tokenizer, record, kind="meta.type")[0].kind == "3"
    benchmark = Questions("b", "*", exact_match, question="q", answers="refs")
    assert benchmark.changes == {"fields": {"question": "q", "answers": "refs"}}
    given = {"fields": {"image": ".jpg"}, "max_tiles": 2}
    both = Questions("b", "*", exact_match, question="q", builder=given).changes
    assert both == {"fields": {"question": "q", "image": ".jpg"}, "max_tiles": 2}
    assert Questions("b", "*", exact_match, builder=given).changes == given


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), RecursionError("x"), ZeroDivisionError("x")]
)
def test_whatever_a_record_does_is_a_bad_question(error: Exception) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    model: Any = SimpleNamespace(
        builder=SimpleNamespace(record=fail), generate=lambda prompts, *_, **__: prompts
    )
    dataset = SimpleNamespace(members=lambda number: {"__url__": "a.tar", "__key__": str(number)})
    [line] = Questions("b", "*", exact_match)._answer(model, dataset, [3], Settings())
    reason = f"a.tar:3: {type(error).__name__}: {error}"
    assert line == Skipped(3, "a.tar:3", True, reason)
    error = OSError("lost connection")
    with pytest.raises(OSError, match="lost connection"):
        Questions("b", "*", exact_match)._answer(model, dataset, [3], Settings())


def test_no_accepted_answer_has_no_score() -> None:
    with pytest.raises(ValueError, match="without an accepted answer has no score"):
        Questions("b", "*", exact_match).score("None", [], "all")


@pytest.mark.parametrize(
    ("bad", "total", "fraction", "refused"),
    [(1, 16, 0.01, False), (2, 16, 0.01, True), (2, 16, 0.125, False), (1, 9, 0.0, True)],
)
def test_bad_questions_are_bounded(bad: int, total: int, fraction: float, refused: bool) -> None:
    settings = Settings(max_bad_fraction=fraction)
    lines = [Skipped(number, "s", True, f"s:{number}: no image") for number in range(bad)]
    right = [Prediction(99, "", "all", "", ["a"], "a", 1.0)]
    check = partial(Questions("b", "*.tar", exact_match)._check, right, lines, total, settings)
    if not refused:
        check(finished=True)
        return
    with pytest.raises(ValueError, match=rf"{bad} of {total} questions .* the first: s:0: no imag"):
        check(finished=False)


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    config = {"benchmark": {"name": "b"}, "max_new_tokens": 5, "batch_size": 2, "num_samples": 1}
    folder, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    journal = Journal(folder, config, checkpoint)
    assert journal.start(["a.tar", 3]) == ([], [])
    journal.append([{"sample_id": 0}, {"sample_id": 1}], [{"sample_id": 2}])
    journal.finish({"score": 1.0}, iter([{"sample_id": 0, "image": "x"}]))
    assert not (folder / "predictions.jsonl").read_text().count("image")
    with open(folder / "predictions.jsonl", "a") as file:
        file.write('{"sample_id": 3')
    again = Journal(folder, config | {"batch_size": 4, "num_samples": 9}, checkpoint)
    assert again.start(["a.tar", 3]) == ([{"sample_id": 0}, {"sample_id": 1}], [{"sample_id": 2}])
    again.append([{"sample_id": 3}], [])
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    assert lines == [json.dumps({"sample_id": number}) for number in (0, 1, 3)]
    assert not (folder / "metrics.json").exists(), "it does not tell of the new line"


def test_one_evaluation_writes_to_a_folder_at_a_time(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "out", {}, tmp_path) for _ in range(2))
    first.start([])
    with pytest.raises(ValueError, match="another evaluation is writing to"):
        second.start([])
    first.finish({}, iter(()))
    assert second.start([]) == ([], [])


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    config = {"benchmark": {"name": "b", "suffix": ""}, "max_new_tokens": 5}
    folder, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    Journal(folder, config, checkpoint).start(["a.tar", 3])
    other = config | {"benchmark": {"name": "b", "suffix": "x"}}
    for changed, data, message in (
        (config | {"max_new_tokens": 2}, ["a.tar", 3], "with max_new_tokens=5, not 2; remove"),
        (other, ["a.tar", 3], "with benchmark.suffix=, not x"),
        (config, ["a.tar", 4], r"with data\[1\]=3, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Journal(folder, changed, checkpoint).start(data)
    (checkpoint / "state.json").write_text('{"step": 4}')
    with pytest.raises(ValueError, match="with checkpoint="):
        Journal(folder, config, checkpoint).start(["a.tar", 3])
    (checkpoint / "state.json").write_text("{}")
    (folder / "predictions.jsonl").write_text('{"sample_id": 0}\n{"sample_id": 0}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl: line 2 is damaged \(a second ans"):
        Journal(folder, config, checkpoint).start(["a.tar", 3])
    (folder / "predictions.jsonl").write_text('{"sample_id": 0}\n{"sample_id"\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl: line 2 is damaged"):
        Journal(folder, config, checkpoint).start(["a.tar", 3])
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged"):
        Journal(folder, config, checkpoint).start(["a.tar", 3])
    (folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"has predictions\.jsonl of an evaluation that does not"):
        Journal(folder, config, checkpoint).start(["a.tar", 3])


def test_numbers_that_are_none_are_no_scores(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        benchmark = Questions("b", "*.tar", lambda value=value, **_: value)
        with pytest.raises(ValueError, match=f"metric gives {value} for 'a'"):
            benchmark.score("a", ["a"], "all")
    journal = Journal(tmp_path, {}, tmp_path)
    line = Prediction(0, "s", "all", "q", ["a"], "a", 1.0)
    skipped = Skipped(1, "s", True, "r")
    _check_known(journal, [line], [skipped])
    for wrong in ({"score": float("nan")}, {"score": "1"}, {"sample_id": "0"}, {"sample_id": 1}):
        with pytest.raises(ValueError, match=r"the line of question .* remove the folder"):
            _check_known(journal, [replace(line, **wrong)], [skipped])


def test_a_kind_can_have_its_own_metric() -> None:
    math = partial(containment, handwritten_math=True)
    benchmark = Questions("b", "*.tar", containment, metric_by_kind={"math": math})
    assert benchmark.score("X^2", ["x ^ 2"], "math") == 0.0
    assert benchmark.score("X ^ 2", ["X^2"], "math") == 1.0
    assert benchmark.score("X^2", ["x^2"], "text") == 1.0


def test_summary_and_table() -> None:
    scores = [("read", 1.0), ("count", 0.5), ("read", 0.0), ("read", 1.0)]
    predictions = [
        Prediction(i, "", kind, "", [], "", score) for i, (kind, score) in enumerate(scores)
    ]
    summary = summarize(predictions)
    assert summary == {
        "score": 0.625,
        "num_samples": 4,
        "kinds": {
            "count": {"score": 0.5, "num_samples": 1},
            "read": {"score": pytest.approx(2 / 3), "num_samples": 3},
        },
    }
    lines = table(summary, "heldout").splitlines()
    assert [line.split() for line in lines] == [
        ["count", "0.5000", "1"],
        ["read", "0.6667", "3"],
        ["heldout", "0.6250", "4"],
    ]
    assert summarize([]) == {"score": 0.0, "num_samples": 0, "kinds": {}}
    left_out = table(summary | {"num_bad": 1, "num_without_answer": 2}, "heldout").splitlines()
    assert left_out[-1] == "left out: 1 bad, 2 without an accepted answer (skipped.jsonl)"
