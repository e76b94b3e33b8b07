"""A saved multimodal checkpoint, evaluated and asked in several layouts."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nvmm.checkpoint.files import find
from nvmm.config import compose
from nvmm.config.compose import argument
from nvmm.evaluate import made, output_folder
from nvmm.evaluation.cider import CiderD
from nvmm.generate import members, quoted
from nvmm.inference.trust import require_trusted
from tests import tiny
from tests.damage import changed, data_byte, flip
from tests.ranks import run_ranks

BENCHMARKS = Path(__file__).parent.parent / "configs" / "benchmark"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>"]
TEXT = "what is the number in this picture how many digits are there read it"
WORDS = TEXT.split()
EXACT_MATCH = {"_target_": "nvmm.evaluation.exact_match.exact_match", "_partial_": True}
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)]
NUM_SAMPLES = 5


def picture(width: int, height: int) -> bytes:
    pixels = torch.arange(width * height * 3).mul(37).remainder(255).to(torch.uint8)
    stream = io.BytesIO()
    Image.frombytes("RGB", (width, height), bytes(pixels.tolist())).save(stream, "PNG")
    return stream.getvalue()


def write_questions(folder: Path, name: str, answers: Mapping[int, str]) -> str:
    """Five questions of two kinds: one picture of different shapes, one without any."""
    from nvmm.data.shards.dataset import write_shards

    shapes = [(40, 20), (16, 16), None, (20, 45), (17, 16)]
    samples = []
    for number, shape in enumerate(shapes):
        record = {
            "question": " ".join(WORDS[: 4 + 2 * number]),
            "answer": answers.get(number, "no such answer"),
            "kind": "text" if shape is None else "picture",
        }
        sample: dict[str, bytes | str] = {
            "__key__": str(number),
            "json": json.dumps(record).encode(),
        }
        if shape is not None:
            sample["png"] = picture(*shape)
        samples.append(sample)
    write_shards(folder, name, samples, samples_per_shard=2)
    return str(folder / f"{name}-*.tar")


class NoOptimizer:
    num_steps = 3

    def sharded_state_dict(self, *arguments: Any) -> dict[str, Any]:
        return {}


def save(
    rank: int,
    world_size: int,
    init_method: str,
    folder: Path,
    *,
    text_only: bool = False,
    favourites: int | None = None,
) -> None:
    """favourites: the first tokens, which are likelier than others: ends of an answer are."""
    from hydra.utils import instantiate

    from nvmm.checkpoint.save import Checkpoint
    from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision

    tokenizer = train_byte_level_bpe(
        folder / "tokenizer",
        WORDS,
        vocab_size=300,
        special_tokens=SPECIAL,
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[3],
    )
    digest = Tokenizer(str(tokenizer)).digest
    size = Tokenizer(str(tokenizer)).vocab_size
    model = tiny.multimodal(language=tiny.language(vocab_size=size, padded_vocab_size=320))
    model["language"]["transformer"]["init_method_std"] = 0.3
    if text_only:
        model = model["language"]
    config = {
        "model": model,
        "tokenizer": {"_target_": "nvmm.data.samples.tokenizer.Tokenizer", "path": str(tokenizer)},
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32"},
        "backend": "native",
        "kernels": {"_target_": "nvmm.kernels.library.Kernels", "pixel_shuffle": "eager"},
        "data": {
            "sequence_length": 256,
            "train": {
                "_target_": "nvmm.data.shards.dataset.Dataset",
                "shards": "gone/*.tar",
                "build": {
                    "_target_": "nvmm.data.samples.instruct.InstructBuilder",
                    "_partial_": True,
                    "template": {
                        "_target_": "nvmm.data.samples.chat.ChatTemplate",
                        "system": "Answer.",
                    },
                    "tags": {"_target_": "nvmm.data.samples.chat.ImageTags"},
                    "tokens_per_tile": 4,
                    "tile_size": 16,
                    "max_tiles": 3,
                },
            },
        },
    }
    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
    chunks = build_chunks(instantiate(model, _convert_="all"), parallel, Precision(), seed=5)
    if favourites is not None:
        chunks[0].output_layer.weight.data[favourites:] = 0
    state = {"config": config, "tokenizer_digest": digest}
    Checkpoint(directory=folder / "run" / "checkpoints").save(3, chunks, NoOptimizer(), state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    run_ranks(save, 1, path)
    return path


def command(folder: Path, shards: str, **changes: Any) -> dict[str, Any]:
    return {
        "checkpoint": {"path": str(folder / "run")},
        "benchmark": {
            "_target_": "nvmm.evaluation.benchmark.Questions",
            "name": "held",
            "shards": shards,
            "metric": EXACT_MATCH,
            "suffix": "Be brief.",
            "max_new_tokens": 5,
            "builder": {"max_tiles": 2},
        },
        "parallel": {"_target_": "nvmm.parallel.setup.Parallel"},
        "precision": None,
        "backend": None,
        "tokenizer": {"path": None},
        "sequence_length": None,
        "batch_size": 2,
        "num_samples": None,
        "max_new_tokens": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "use_cache": True,
        "seed": 1,
        "output": None,
        "trust_config": False,
        **changes,
    }


def launch(rank: int, world_size: int, init_method: str, config: dict[str, Any]) -> Any:
    """What torchrun would start: `evaluate`, or its exit code and message where it refuses."""
    import torch.distributed as dist

    from nvmm.evaluate import evaluate

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    sys.stderr = io.StringIO()
    try:
        return evaluate(compose.Job(config, []))
    except SystemExit as exit:
        return exit.code, sys.stderr.getvalue()


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unanswered(folder: Path) -> list[dict[str, Any]]:
    """Predictions of one rank, without a right answer."""
    shards = write_questions(folder, "blank", {})
    [summary] = run_ranks(launch, 1, command(folder, shards, batch_size=1, use_cache=False))
    assert summary["score"] == 0.0
    return read(folder / "run" / "evaluation" / "held" / "step_00000003")


def test_predictions_name_their_samples(unanswered: list[dict[str, Any]]) -> None:
    assert [line["sample_id"] for line in unanswered] == list(range(NUM_SAMPLES))
    assert [line["kind"] for line in unanswered] == ["picture"] * 2 + ["text"] + ["picture"] * 2
    assert unanswered[3]["question"] == " ".join(WORDS[:10])
    assert unanswered[3]["source"].endswith("blank-00001.tar:3")
    assert unanswered[3]["answers"] == ["no such answer"]
    assert len({line["prediction"] for line in unanswered}) > 2


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), LAYOUTS)
def test_every_layout_gives_the_same_answers(
    folder: Path, unanswered: list[dict[str, Any]], world_size: int, tensor: int, pipeline: int
) -> None:
    right = {number: unanswered[number]["prediction"] for number in (0, 1, 2)}
    name = f"right{world_size}{tensor}{pipeline}"
    parallel = {
        "_target_": "nvmm.parallel.setup.Parallel",
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": tensor > 1,
    }
    output = folder / name
    config = command(
        folder, write_questions(folder, name, right), parallel=parallel, output=str(output)
    )
    summaries = run_ranks(launch, world_size, config)
    predictions = read(output)
    assert [p["prediction"] for p in predictions] == [p["prediction"] for p in unanswered]
    assert [p["score"] for p in predictions][:3] == [1.0] * 3
    expected = sum(p["score"] for p in predictions) / NUM_SAMPLES
    for summary in summaries:
        assert summary["score"] == expected
        assert summary["kinds"]["text"] == {"score": 1.0, "num_samples": 1}
    assert json.loads((output / "metrics.json").read_text()) == summaries[0]


def test_the_first_samples_alone(folder: Path, unanswered: list[dict[str, Any]]) -> None:
    config = command(
        folder,
        str(folder / "blank-*.tar"),
        num_samples=3,
        max_new_tokens=2,
        output=str(folder / "first"),
    )
    [summary] = run_ranks(launch, 1, config)
    assert summary["num_samples"] == 3
    for line, longer in zip(read(folder / "first"), unanswered[:3], strict=True):
        assert len(line["prediction"]) < len(longer["prediction"])
        assert longer["prediction"].startswith(line["prediction"].rstrip("\ufffd"))


def test_captions_behind_examples_are_scored_over_the_whole_corpus(folder: Path) -> None:
    """Two images before a third, CIDEr-D; a part of the questions has the scores of the whole."""
    shards = write_questions(folder, "caption", {n: f"the number in picture {n}" for n in range(5)})
    train = write_questions(folder, "solved", {n: WORDS[n] for n in range(5)})
    config = command(folder, shards, output=str(folder / "shots"), batch_size=5)
    config["benchmark"] |= {
        "_target_": "nvmm.evaluation.few_shot.FewShot",
        "shots": 2,
        "train": train,
        "suffix": "",
        "layout": "document",
        "builder": {"max_tiles": 2, "form": {"_target_": "nvmm.data.samples.forms.Chat"}},
        "metric": {"_target_": "nvmm.evaluation.cider.CiderD", "order": 1},
    }
    [summary] = run_ranks(launch, 1, config)
    assert summary["num_samples"] == NUM_SAMPLES and summary["num_bad"] == 0
    lines = read(folder / "shots")
    metric = CiderD(order=1).prepared([line["answers"] for line in lines])
    for line in lines:
        expected = metric(prediction=line["prediction"], answers=line["answers"])
        assert line["score"] == pytest.approx(expected)
    part = config | {"num_samples": 2, "output": str(folder / "two_shots")}
    run_ranks(launch, 1, part)
    assert read(folder / "two_shots") == lines[:2]


def interrupted(rank: int, world_size: int, init_method: str, config: dict[str, Any]) -> None:
    """An evaluation that dies after two batches, in the middle of writing a line."""
    from nvmm.inference.restore import Restored

    generate, calls = Restored.generate, []

    def dying(*arguments: Any, **options: Any) -> list[str]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(None)
        return generate(*arguments, **options)

    Restored.generate = dying  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(rank, world_size, init_method, config)
    finally:
        Restored.generate = generate  # type: ignore[method-assign]
    folder = Path(config["output"])
    assert not (folder / "metrics.json").exists()
    with open(folder / "predictions.jsonl", "a") as file:
        file.write('{"sample_id": 2, "sou')


def test_an_evaluation_that_was_killed_goes_on(
    folder: Path, unanswered: list[dict[str, Any]]
) -> None:
    """With two ranks behind one, and the score of an undisturbed one."""
    shards = write_questions(folder, "killed", {3: unanswered[3]["prediction"]})
    output = folder / "killed"
    config = command(folder, shards, batch_size=1, output=str(output))
    run_ranks(interrupted, 1, config)
    assert [line["sample_id"] for line in read_written(output)] == [0, 1]
    [refused] = run_ranks(launch, 1, config | {"max_new_tokens": 2})
    assert refused[0] == compose.BAD_CONFIG and "max_new_tokens=None, not 2" in refused[1]
    [refused, same] = run_ranks(launch, 2, config | {"max_new_tokens": 2})
    assert refused[0] == same[0] == compose.BAD_CONFIG, "no rank waits for another"
    summaries = run_ranks(launch, 2, config)
    assert [line["prediction"] for line in read(output)] == [x["prediction"] for x in unanswered]
    assert [line["score"] for line in read(output)] == [0.0, 0.0, 0.0, 1.0, 0.0]
    for summary in summaries:
        assert (summary["score"], summary["num_samples"]) == (1 / NUM_SAMPLES, NUM_SAMPLES)
    before = (output / "predictions.jsonl").read_bytes()
    assert run_ranks(launch, 1, config) == summaries[:1]
    assert (output / "predictions.jsonl").read_bytes() == before
    assert len((output / "images.jsonl").read_text().splitlines()) == 4


def read_written(folder: Path) -> list[dict[str, Any]]:
    """The whole lines."""
    text = (folder / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n")].splitlines()]


def test_bad_questions_and_those_without_a_truth_have_no_score(folder: Path) -> None:
    from nvmm.data.shards.dataset import write_shards

    def sample(key: int, image: bytes | None = None, **record: Any) -> dict[str, bytes | str]:
        members: dict[str, bytes | str] = {"__key__": str(key), "json": json.dumps(record).encode()}
        return members | ({} if image is None else {"png": image})

    odd = [
        sample(0, picture(16, 16), question="what", answers=["a"]),
        sample(1, picture(16, 16)[:60], question="what", answers=["a"]),
        sample(2, question="read " * 300, answers=["a"]),
        sample(3, question="how many", answers=None),
        sample(4, question="how many", answers=[None]),
        sample(5, question="how many", answers=["a"]),
        sample(6, question="read it"),
    ]
    shards = str(folder / "odd-*.tar")
    write_shards(folder, "odd", odd)
    strict, output = command(folder, shards, output=str(folder / "odd")), folder / "odd"
    [(code, text)] = run_ranks(launch, 1, strict)
    assert code == compose.BAD_CONFIG
    assert "2 of 7 questions of benchmark.shards=" in text
    assert "odd-00000.tar:1: member png: " in text
    summaries = run_ranks(launch, 2, strict | {"max_bad_fraction": 0.5})
    summary = summaries[0]
    assert summaries[1] == summary
    assert [line["sample_id"] for line in read(output)] == [0, 5]
    assert (summary["num_samples"], summary["num_bad"], summary["num_without_answer"]) == (2, 3, 2)
    assert summary["score"] == sum(line["score"] for line in read(output)) / 2
    skipped = [json.loads(x) for x in (output / "skipped.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in skipped] == [1, 2, 3, 4, 6]
    assert [line["bad"] for line in skipped] == [True, True, False, True, False]
    assert [line["reason"] for line in skipped] == summary["skipped"]
    assert "needs" in summary["skipped"][1] and "no accepted answer" in summary["skipped"][2]
    # None has a truth: there is no score to print.
    write_shards(folder, "test", [sample(0, question="what"), sample(1, question="how many")])
    config = command(folder, str(folder / "test-*.tar"), output=str(folder / "test"))
    [(code, text)] = run_ranks(launch, 1, config)
    assert code == compose.BAD_CONFIG
    assert "has a score: 0 are bad, 2 have no accepted answer; the first: " in text
    assert not (folder / "test" / "metrics.json").exists()


def test_a_length_beyond_the_model_s_longest_is_refused(folder: Path) -> None:
    config = command(folder, str(folder / "blank-*.tar"), sequence_length=4097)
    [(code, message)] = run_ranks(launch, 1, config)
    assert code == compose.BAD_CONFIG
    assert "sequence_length=4097 must be at most the model's max_sequence_length=4096" in message


def test_answers_in_fp8(folder: Path, unanswered: list[dict[str, Any]]) -> None:
    """Other words than in full precision; delayed scaling wants the scales it was trained with."""

    def precision(recipe: str) -> dict[str, Any]:
        fp8 = {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "recipe": recipe}
        return {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32", "fp8": fp8}

    options = {"output": str(folder / "fp8"), "num_samples": 3}
    shards = str(folder / "blank-*.tar")
    run_ranks(launch, 1, command(folder, shards, precision=precision("current"), **options))
    plain = [line["prediction"] for line in unanswered[:3]]
    assert [line["prediction"] for line in read(folder / "fp8")] != plain
    [refused] = run_ranks(
        launch, 1, command(folder, shards, precision=precision("delayed"), **options)
    )
    assert refused[0] == compose.BAD_CONFIG
    assert "FP8 scales (fp8." in refused[1] and "trained with, precision=bf16" in refused[1]


def save_adapters(rank: int, world_size: int, init_method: str, folder: Path) -> None:
    """A LoRA run over the checkpoint: adapters and nothing else."""
    from dataclasses import asdict

    from hydra.utils import instantiate

    from nvmm.checkpoint.base import BaseCheckpoint
    from nvmm.checkpoint.files import read_state
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.modules.lora import FACTORS
    from nvmm.parallel.parameters import build_chunks, sharded_parameters
    from nvmm.parallel.setup import Parallel, Precision

    base = find(folder / "run")
    state = read_state(base)
    lora = tiny.lora(["language.*", "vision.*"], alpha=12.0)
    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
    model = instantiate(state["config"]["model"], _convert_="all")
    adapt = instantiate(lora, _convert_="all").attach
    chunks = build_chunks(model, parallel, Precision(), seed=5, adapt=adapt)
    generator = torch.Generator().manual_seed(2)
    for sharded in sharded_parameters(chunks):
        if sharded.name.endswith(FACTORS[1]):
            torch.nn.init.normal_(sharded.parameter, generator=generator)
    state |= {"config": state["config"] | {"lora": lora}, "base": asdict(BaseCheckpoint.of(base))}
    checkpoint = Checkpoint(directory=folder / "lora" / "checkpoints")
    checkpoint.save(4, chunks, NoOptimizer(), state, BaseCheckpoint.of(base).names())


def test_a_lora_run_answers_as_its_merged_weights(
    folder: Path,
    unanswered: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At TP 2 with adapters, whose base has moved; at one rank merged."""
    from nvmm.commands.convert import main

    own = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    run_ranks(save_adapters, 1, tmp_path)
    own.rename(tmp_path / "moved")
    merged, base = tmp_path / "merged", str(tmp_path / "moved")
    arguments = ["--from", str(tmp_path / "lora"), "--to", str(merged)]
    assert main(["merge", *arguments]) == 2
    # Every bit that goes into the merged weights is compared: of the base, and of the factors.
    for run, name in (
        ("moved", "language.decoder.layers.0.mlp.linear_fc1.weight"),
        ("moved", "vision.decoder.layers.1.mlp.linear_fc1.bias"),
        ("lora", "language.decoder.layers.0.mlp.linear_fc1.lora_b"),
    ):
        with changed(*data_byte(find(tmp_path / run), name, random.Random(1))):
            assert main(["merge", *arguments, "--base", base]) == 2
            assert f"the bits of {name}" in capsys.readouterr().err and not merged.exists()
    peft = ["adapter", "export", "--from", str(tmp_path / "lora"), "--to", str(tmp_path / "peft")]
    with changed(*data_byte(find(tmp_path / "lora"), name, random.Random(1))):
        assert main([*peft, "--format", "nvlm_d"]) == 2
    assert f"the bits of {name}" in capsys.readouterr().err and not (tmp_path / "peft").exists()
    assert main(["merge", *arguments, "--base", base]) == 0
    shards = str(folder / "blank-*.tar")
    parallel = {"_target_": "nvmm.parallel.setup.Parallel", "tensor_model_parallel_size": 2}
    for ranks, output, changes in (
        (2, "adapters", {"checkpoint": {"path": str(tmp_path / "lora")}, "base": base}),
        (1, "weights", {"checkpoint": {"path": str(merged)}}),
    ):
        layout = {"parallel": parallel} if ranks == 2 else {}
        config = command(folder, shards, **changes, **layout, output=str(tmp_path / output))
        run_ranks(launch, ranks, config)
    answers, expected = read(tmp_path / "adapters"), read(tmp_path / "weights")
    assert [a["prediction"] for a in answers] == [a["prediction"] for a in expected]
    plain = [line["prediction"] for line in unanswered]
    assert sum(a["prediction"] != p for a, p in zip(answers, plain, strict=True)) >= 4


def test_a_damaged_checkpoint_is_not_asked(folder: Path, tmp_path: Path) -> None:
    """Also where the model is of another dtype than the checkpoint."""
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    path = find(run)
    name = "language.decoder.final_layernorm.weight"
    flip(*data_byte(path, name, random.Random(2)))
    bf16 = {"_target_": "nvmm.parallel.setup.Precision", "dtype": "bf16"}
    config = command(folder, str(folder / "blank-*.tar"), precision=bf16)
    config["checkpoint"]["path"] = str(run)
    [(code, text)] = run_ranks(launch, 1, config)
    assert code == compose.BAD_CONFIG and str(path) in text and f"the bits of {name}" in text


def test_bad_commands_are_refused(folder: Path, tmp_path: Path) -> None:
    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    other = train_byte_level_bpe(
        tmp_path,
        [],
        vocab_size=280,
        special_tokens=SPECIAL,
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[3],
    )
    shards = str(folder / "blank-*.tar")
    parallel = {"_target_": "nvmm.parallel.setup.Parallel", "tensor_model_parallel_size": 3}
    context = {"_target_": "nvmm.parallel.setup.Parallel", "context_parallel_size": 2}
    benchmark = command(folder, shards)["benchmark"] | {"builder": {"max_tile": 2}}
    cases = [
        ({"tokenizer": {"path": str(other)}}, "is not the tokenizer that"),
        ({"tokenizer": {"path": "/nowhere"}}, "tokenizer.path=/nowhere is not a folder"),
        ({"parallel": parallel}, "must be divisible by"),
        ({"parallel": context}, "parallel.context_parallel_size=2 must be 1 in evaluation"),
        ({"checkpoint": {"path": "/nowhere"}}, "/nowhere is neither a complete checkpoint"),
        ({"checkpoint": {"path": str(tmp_path)}}, "is neither a complete checkpoint"),
        ({"benchmark": benchmark}, "unexpected keyword argument 'max_tile'"),
        ({"kernels": {"norm": "fast"}}, "kernels.norm=fast must be one of auto, eager, fused"),
    ]
    for changes, message in cases:
        [(code, text)] = run_ranks(launch, 1, command(folder, shards, **changes))
        assert code == compose.BAD_CONFIG
        assert message in text


def chosen(
    rank: int, world_size: int, init_method: str, config: dict[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """What differs from auto in this process after `restore`, and what it logs."""
    import dataclasses
    import logging

    import torch.distributed as dist

    from nvmm.inference.restore import restore_from
    from nvmm.kernels import library

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    lines = io.StringIO()
    library.logger.addHandler(logging.StreamHandler(lines))
    library.logger.setLevel(logging.INFO)
    restore_from(config)
    choices = dataclasses.asdict(library._choices)
    found = {name: choice for name, choice in choices.items() if choice != "auto"}
    return found, lines.getvalue().splitlines()


def test_kernels_are_the_checkpoints_and_rank_0_says_so(folder: Path) -> None:
    saved = {"pixel_shuffle": "eager"}
    for changes in ({}, {"kernels": {"rope": "eager"}}):
        results = run_ranks(chosen, 2, command(folder, "", **changes))
        assert [found for found, _ in results] == [saved | changes.get("kernels", {})] * 2
        (line,), others = (lines for _, lines in results)
        assert line.startswith("kernels: ") and not others


def ask(rank: int, world_size: int, init_method: str, config: dict[str, Any]) -> str:
    import torch.distributed as dist

    from nvmm.generate import generate

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    return generate(compose.Job(config, []))


def test_generate_answers_with_and_without_pictures(folder: Path, tmp_path: Path) -> None:
    paths = []
    for name, shape in (("a.png", (40, 20)), ("b.png", (16, 16))):
        (tmp_path / name).write_bytes(picture(*shape))
        paths.append(str(tmp_path / name))
    question = {"prompt": "What's this, then: a {number}?", "image": None, "system": None}
    plain = command(folder, "") | question | {"max_new_tokens": 6}
    plain.pop("benchmark")
    changes = [
        {},
        {"image": paths[0]},
        {"image": paths},
        {"system": "Read."},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    ]
    answers = [run_ranks(ask, 1, plain | change)[0] for change in changes]
    assert len(set(answers)) == len(changes)
    with pytest.raises(RuntimeError, match="is of LoRA checkpoints"):
        run_ranks(ask, 1, plain | {"base": str(folder / "run")})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nvmm.generate", f"checkpoint={folder / 'run'}"),
            *(f"prompt={question['prompt']}", f"image={paths[0]}", "max_new_tokens=6", "seed=1"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers[1] + "\n"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "nvmm.data.shards.dataset.tarfile.os.system",
        "nvmm.data.nothing_here",
        "nvmm.proof.ranks.run_ranks",
        "hydra.utils.get_class",
    ],
)
def test_foreign_targets_are_refused_by_name(target: str) -> None:
    config = {"model": [{"x": {"_target_": target}}]}
    with pytest.raises(ValueError, match=rf"would run {target}; .*trust_config=true"):
        require_trusted(config, Path("c"))


def test_foreign_methods_and_interpolations_are_refused() -> None:
    for path in (
        "os.system",
        "torch.os.system",
        "torch.nn.functional.torch.hub.load",
        "torch.load",
    ):
        with pytest.raises(ValueError, match="get_method"):
            require_trusted({"f": tiny.method(path)}, Path("c"))
    with pytest.raises(ValueError, match=r"would run .*oc\.env"):
        require_trusted({"f": "${oc.env:HOME}"}, Path("c"))


def trust_ours(rank: int, world_size: int, init_method: str) -> None:
    for path in ("torch.nn.functional.gelu", "torch.nn.functional.silu", "torch.tanh"):
        require_trusted({"f": tiny.method(path)}, Path("c"))
    require_trusted({"model": tiny.multimodal()}, Path("c"))
    fp8 = {"_target_": "nvmm.parallel.fp8_recipe.Fp8", "recipe": "current"}
    require_trusted({"precision": {"fp8": fp8}}, Path("c"))


def test_our_targets_are_trusted() -> None:
    run_ranks(trust_ours, 1)  # a refusal raises there; mcore is imported there already


def test_a_run_directory_means_its_newest_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = folder / "run" / "checkpoints" / "step_00000003"
    assert find(str(folder / "run")) == path
    assert find(str(path)) == path
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find(str(tmp_path))
    assert output_folder(None, path, "b") == folder / "run" / "evaluation" / "b" / path.name
    assert output_folder(None, Path("/x/y"), "b") == Path("runs/evaluation/b/y")
    assert output_folder("/o", path, "b") == Path("/o")


@pytest.mark.parametrize("name", sorted(p.stem for p in BENCHMARKS.glob("*.yaml")))
def test_every_benchmark_composes_and_scores(name: str) -> None:
    import hydra
    from omegaconf import OmegaConf

    from nvmm.config import check
    from nvmm.evaluation.benchmark import Questions

    lists = {"lengths": "[128]", "haystack": "[x.txt]", "tasks": "[mmlu]"}
    with hydra.initialize_config_dir(str(check.config_dir()), version_base="1.3"):
        given = hydra.compose("evaluate", [f"benchmark={name}", "checkpoint.path=y"])
        keys = sorted(OmegaConf.missing_keys(given.benchmark))
        data = [f"{key}={lists.get(key.split('.')[-1], 'x.tar')}" for key in keys]
        overrides = [f"benchmark={name}", *data, "checkpoint.path=y"]
        composed = hydra.compose("evaluate", overrides)
    assert check.check(composed, entry="evaluate", world_size=1) == []
    benchmark = made(OmegaConf.to_container(composed.benchmark, resolve=True))
    assert benchmark.name == (f"{name}_4" if "few_shot" in name else name)
    if not isinstance(benchmark, Questions) or hasattr(benchmark.metric, "prepared"):
        return  # scored in tests/evaluation and tests/convert/test_nv_embed.py
    for kind in ("all", *benchmark.metric_by_kind):
        assert benchmark.score("stop", ["stop"] * 10, kind) == 1.0
        assert benchmark.score("stop", ["go"] * 10, kind) == 0.0


def test_words_that_hydra_would_misread() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert argument("checkpoint=runs/a") == "checkpoint.path=runs/a"
    assert argument("tokenizer=dir") == "tokenizer.path=dir"
    assert argument("+checkpoint=a") == "+checkpoint=a"
    assert quoted("image=a.png") == "image=a.png"
    assert quoted("prompt='a, b'") == "prompt='a, b'"
    assert quoted("system=null") == "system=null"
    for text in (
        "What's this, then?",
        "a: {b}",
        "tail\\\\",
        r"it\'s",
        r"\\'",
        "",
        "=",
        "a\\",
        "[1",
    ):
        override = OverridesParser.create().parse_override(quoted(f"prompt={text}"))
        assert override.value() == text


def test_pictures_become_members(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    found = members("Why?", [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")])
    assert found["0.png"] == b"a.png"
    assert found["1.png"] == b"b.jpg"
    assert json.loads(found["json"]) == {"question": "Why?"}
    assert "0.png" not in members("Why?", None)
    with pytest.raises(ValueError, match="image=/nowhere cannot be read"):
        members("Why?", "/nowhere")
