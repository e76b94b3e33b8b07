"""lm-evaluation-harness over a checkpoint, against its own `hf` model on the exported folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.samples.chat import Turn
from nvmm.evaluation.lm_eval_tasks import numbers
from nvmm.evaluation.token_work import cut
from tests import test_evaluate, tiny
from tests.ranks import run_ranks
from tests.test_evaluate import command, launch, read

LENGTH = 40
TASKS = ("toy_choice", "toy_generate", "toy_rolling")
WORDS = test_evaluate.WORDS
DOCUMENTS = [
    {
        "text": " ".join(WORDS[start:] + WORDS * (start % 3)),
        "choices": [" number", " digits é there", f" {WORDS[start]}"],
        "gold": start % 3,
    }
    for start in range(5)
]
YAMLS = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "toy_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["er", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "toy_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def save(rank: int, world_size: int, init_method: str, folder: Path) -> None:
    plain = tiny.language
    tiny.language = functools.partial(plain, max_sequence_length=LENGTH)  # type: ignore[assignment]
    try:
        test_evaluate.save(rank, world_size, init_method, folder, text_only=True)
    finally:
        tiny.language = plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its exported folder and local tasks."""
    from nvmm.convert import exporting, models

    path = tmp_path_factory.mktemp("lm_eval")
    run_ranks(save, 1, path)
    (path / "run" / "summary.json").write_text("{}")
    saved = models.open_checkpoint(path / "run" / "checkpoints" / "step_00000003")
    exporting.export(saved, path / "hf", "qwen2")
    (path / "tasks").mkdir()
    (path / "tasks" / "toy.jsonl").write_text("".join(f"{json.dumps(d)}\n" for d in DOCUMENTS))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path / "tasks" / "toy.jsonl")},
            "cache_dir": str(path / "cache"),
        },
        "test_split": "test",
    }
    for name, task in YAMLS.items():
        text = json.dumps({"task": name, **data, **task})
        (path / "tasks" / f"{name}.yaml").write_text(text)
    return path


def benchmark(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "_target_": "nvmm.evaluation.lm_eval_tasks.LMEval",
        "tasks": list(TASKS),
        "include_path": [str(folder / "tasks")],
        "include_defaults": False,
        "bootstrap_iters": 0,
    } | changes


def ours(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base = {"sequence_length": LENGTH, "output": str(output), "batch_size": 2}
    return command(folder, "", benchmark=benchmark(folder)) | base | changes


@pytest.fixture(scope="module")
def judge(folder: Path) -> Any:
    """The harness's own model on the exported folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def expected(folder: Path, judge: Any) -> dict[str, dict[str, float]]:
    """The harness's results with its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = simple_evaluate(judge, tasks=list(TASKS), bootstrap_iters=0, task_manager=manager)
    return {task: numbers(values) for task, values in results["results"].items()}


def compare(judge: Any, output: Path) -> None:
    """Every request's result is the judge's."""
    from lm_eval.api.instance import Instance

    lines = read(output)
    assert {line["call"] for line in lines} == {
        *("loglikelihood", "generate_until", "loglikelihood_rolling"),
    }
    for line in lines:
        asked = line["request"]
        arguments = tuple(asked) if isinstance(asked, list) else (asked,)
        request = Instance(line["call"], {}, arguments, 0)
        [answer] = getattr(judge, line["call"])([request], disable_tqdm=True)
        if line["call"] == "generate_until":
            assert line["result"] == answer
        elif line["call"] == "loglikelihood":
            [(value, greedy)] = line["result"]
            assert value == pytest.approx(answer[0], abs=1e-4) and greedy == answer[1]
        else:
            total = sum(value for value, _ in line["result"])
            assert total == pytest.approx(answer, abs=1e-3)


def check(summary: dict[str, Any], expected: dict[str, dict[str, float]]) -> None:
    assert summary["num_samples"] == dict.fromkeys(TASKS, len(DOCUMENTS))
    assert summary["results"].keys() == expected.keys() == set(TASKS)
    for task, values in expected.items():
        assert values and summary["results"][task] == pytest.approx(values, rel=1e-5)


def parallel(tensor: int, pipeline: int) -> dict[str, Any]:
    return {
        "_target_": "nvmm.parallel.setup.Parallel",
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }


def test_numbers_are_those_of_the_harness_with_transformers(
    folder: Path, judge: Any, expected: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    config = ours(folder, tmp_path / "out", parallel=parallel(2, 1))
    summaries = run_ranks(launch, 2, config)
    check(summaries[0], expected)
    assert summaries[0] == summaries[1]
    compare(judge, tmp_path / "out")
    lines = read(tmp_path / "out")
    generated = [line["result"] for line in lines if line["call"] == "generate_until"]
    windows = [line["result"] for line in lines if line["call"] == "loglikelihood_rolling"]
    assert any(map(len, generated)) and max(map(len, windows)) > 1, "the cases are no cases"
    assert len(lines) == 5 * 3 + 5 + 5 - 1, "a choice that is there twice is asked once"
    # A killed evaluation has lines, and perhaps half a line; the same command goes on behind them.
    file = tmp_path / "out" / "predictions.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:17]) + whole[17][:9])
    changed = json.loads(whole[3])
    assert changed["call"] == "loglikelihood"
    again = run_ranks(launch, 2, config)
    assert again == summaries
    assert file.read_bytes().splitlines(keepends=True)[:17] == whole[:17]
    assert sorted(map(without_number, read(tmp_path / "out"))) == sorted(map(without_number, lines))
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    # The run's report takes lines that have no score of their own.
    assert json.loads((folder / "run" / "summary.json").read_text())["lm_eval_toy_choice"]
    assert len(samples) == 15 and {"task", "doc_id", "acc"} <= json.loads(samples[0]).keys()


def without_number(line: dict[str, Any]) -> str:
    return json.dumps([line["call"], line["request"], round_all(line["result"])])


def round_all(value: Any) -> Any:
    """A result without what another batch's rounding may change."""
    if isinstance(value, list):
        return [round_all(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 2), (2, 1, 1)])
def test_every_layout_gives_the_same_numbers(
    folder: Path,
    judge: Any,
    expected: dict[str, dict[str, float]],
    tmp_path: Path,
    ranks: int,
    tensor: int,
    pipeline: int,
) -> None:
    config = ours(folder, tmp_path / "out", parallel=parallel(tensor, pipeline))
    for summary in run_ranks(launch, ranks, config):
        check(summary, expected)
    compare(judge, tmp_path / "out")


def test_stop_strings_end_the_text() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["x"]) == "one" == cut("one", [])


def test_generation_options() -> None:
    from nvmm.evaluation.lm_eval_model import generation

    greedy = {"until": ["\n", "</s>"], "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0}
    assert generation({"until": "\n", "max_gen_toks": 5, "do_sample": False}, "</s>") == greedy
    assert generation({"temperature": 0.7, "do_sample": False}, "")["temperature"] == 0.0
    drawn = generation({"temperature": 0.7, "top_p": 0.9, "max_tokens": 3, "num_beams": 1}, "")
    assert drawn == {"until": [], "max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9}
    assert generation({"do_sample": True}, "")["temperature"] == 1.0
    assert generation({}, "")["max_new_tokens"] == 256
    with pytest.raises(ValueError, match=r"generation options \{'top_k': 5\} are not built"):
        generation({"top_k": 5}, "")


def test_texts_and_conversations_have_the_templates_tokens(tmp_path: Path) -> None:
    """BOS stands in front once; a conversation's text has the tokens that training gives it."""
    from types import SimpleNamespace

    from nvmm.data.samples.chat import ChatTemplate, ImageTags
    from nvmm.data.samples.instruct import InstructBuilder
    from nvmm.data.samples.tokenizer import Tokenizer
    from nvmm.evaluation.lm_eval_model import CheckpointLM
    from tests.data.samples import llama

    words = Tokenizer(
        str(llama.save(tmp_path)),
        end_of_turn="<|eot_id|>",
        image_token="<|reserved_special_token_0|>",
    )
    roles = {
        role: {"prefix": f"<|start_header_id|>{role}<|end_header_id|>\n\n", "suffix": "{end}"}
        for role in ("system", "user", "assistant")
    }
    builder = InstructBuilder(
        ChatTemplate(roles, bos=True, system="Help."),
        ImageTags("none"),
        tokens_per_tile=1,
        tile_size=8,
        tokenizer=words,
        sequence_length=256,
    )
    model: Any = SimpleNamespace(
        builder=builder, tokenizer=words, require_answers=lambda: None, max_sequence_length=256
    )
    asked = CheckpointLM(model)
    first = words.bos_id
    assert asked.prefix_token_id == first and asked.eot_token_id == words.eos_id
    plain = words.encode("What is it?")
    assert asked.tok_encode("What is it?") == [first, *plain]
    assert asked.tok_encode("<|begin_of_text|>What is it?") == [first, *plain]
    assert asked.tok_encode("What is it?", add_special_tokens=False) == plain
    assert asked.tok_encode("What is it?", left_truncate_len=2) == plain[-2:]
    assert CheckpointLM(model, add_bos=False).tok_encode("What is it?") == plain
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = asked.apply_chat_template(turns)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nHelp.")
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    [turn] = [Turn(t["role"], t["content"], False) for t in turns]
    expected = builder.conversation([turn], "x", prompt=True).text.tokens.tolist()
    assert asked.tok_encode(text) == expected
    with pytest.raises(ValueError, match="gen_prefix"):
        asked.apply_chat_template(turns, add_generation_prompt=False)
    with pytest.raises(ValueError, match="has one template; use true"):
        asked.chat_template("other")


def test_rows_that_cannot_be_scored_are_refused() -> None:
    from types import SimpleNamespace

    from nvmm.inference.likelihood import likelihoods

    model: Any = [SimpleNamespace(training=False, max_sequence_length=4)]
    with pytest.raises(ValueError, match="2 tokens to score of 2: one must come before them"):
        likelihoods(model, [([1, 2, 3], 2), ([1, 2], 2)], 0)
    with pytest.raises(ValueError, match=r"6 tokens are more than max_sequence_length=4 \+ 1"):
        likelihoods(model, [([1, 2, 3, 4, 5, 6], 1)], 0)
    model[0].training = True
    with pytest.raises(ValueError, match="needs the model in eval mode"):
        likelihoods(model, [([1, 2], 1)], 0)
