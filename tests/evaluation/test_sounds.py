"""Benchmarks of sounds: retrieved and drawn examples, closed options, what the report shows."""

from __future__ import annotations

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.data.samples.listening import ListeningTemplate, SoundBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.evaluation.few_shot import FewShot
from nvmm.evaluation.option_accuracy import OptionAccuracy
from tests import test_evaluate
from tests.data.samples.test_listening import tokenizer as tokenizer
from tests.jobs import sounds_run
from tests.jobs.sounds_run import FRONT_END, LABELS, RATE
from tests.ranks import run_ranks

METRIC = {"_target_": "nvmm.evaluation.option_accuracy.OptionAccuracy"}
SPECIAL = [*test_evaluate.SPECIAL, "<audio>", "<|endofchunk|>", "<SEP>"]
TEMPLATE = {"begin": "", "ask": "\n<SEP>", "finish": "", "few_shot": "see. ", "task": ""}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Train, test with a bad sound (2), and neighbours of the test's sounds."""
    folder = tmp_path_factory.mktemp("sounds")
    train, test = sounds_run.write_sets(folder, {2: sounds_run.tone(9)[:300]})
    near = {0: [3, 11, 5], 1: [4, 2, 0], 2: [1, 2, 3], 3: [17, 14, 12], 4: [13, 12, 15]}
    lines = [
        {
            "id": f"test-{number // 4:05d}.tar:k{100 + number}",
            "interleaved": "similar",
            "neighbours": [f"train-{n // 7:05d}.tar:k{n}" for n in numbers],
        }
        for number, numbers in near.items()
    ]
    (folder / "neighbours.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return train, test, folder


def build(tokenizer: Tokenizer, **options: Any) -> SoundBuilder:
    options = {"sequence_length": 400, **options}
    return SoundBuilder(
        instantiate(FRONT_END), ListeningTemplate(**TEMPLATE), tokenizer=tokenizer, **options
    )


def asked(
    tokenizer: Tokenizer, sets: tuple[str, str, Path], number: int = 0, **options: Any
) -> tuple[str, Any]:
    """The prompt of a test question as text, and its example."""
    from nvmm.data.shards.dataset import Dataset

    train, test, folder = sets
    options = {"shots": 2, "neighbours": str(folder), "options": LABELS, **options}
    benchmark = FewShot("few", test, OptionAccuracy(), train=train, **options)
    builder = build(tokenizer)
    example = benchmark.ask(Dataset(test, builder).members(number), builder)
    text = tokenizer.decode(example.prompt.text.tokens.tolist(), skip_special_tokens=False)
    return text, example


def test_retrieved_sounds_stand_before_the_question(
    tokenizer: Tokenizer, sets: tuple[str, str, Path]
) -> None:
    text, example = asked(tokenizer, sets, order="nearest_last")
    clip = "<audio>what is heard?\n<SEP>"
    shots = "".join(f"{clip}{LABELS[n % 3]}<|endofchunk|>" for n in (11, 3))
    assert text == f"see. {shots}{clip}"
    [media] = example.prompt.text.media.values()
    front = instantiate(FRONT_END)
    from nvmm.data.samples.decode import Limits, read_sound

    for item, number in enumerate((11, 3, 100)):
        sound = read_sound(sounds_run.tone(number), "s", Limits(), channel="first")
        assert torch.equal(media.values[media.items == item], front(sound, "s"))
    assert (example.answers, list(example.options)) == ([LABELS[1]], list(LABELS))
    shuffled, _ = asked(tokenizer, sets, number=1, shots=3)
    assert shuffled == asked(tokenizer, sets, number=1, shots=3)[0]
    assert sorted(_answers(shuffled)) == sorted(LABELS[n % 3] for n in (4, 2, 0))
    orders = {asked(tokenizer, sets, number=1, shots=3, seed=n)[0] for n in range(6)}
    assert len(orders) > 1, "the seed shuffles"


def _answers(text: str) -> list[str]:
    return [piece.partition("<|endofchunk|>")[0] for piece in text.split("<SEP>")[1:-1]]


def test_drawn_sounds_and_none(tokenizer: Tokenizer, sets: tuple[str, str, Path]) -> None:
    text, _ = asked(tokenizer, sets, neighbours=None, shots=3)
    assert (
        text.count("<audio>") == 4 and text == asked(tokenizer, sets, neighbours=None, shots=3)[0]
    )
    plain, example = asked(tokenizer, sets, shots=0, options=None)
    assert list(example.options) == list(LABELS), "those of the record"
    assert plain == "<audio>what is heard?\n<SEP>"


def test_what_gives_no_examples_is_named(
    tokenizer: Tokenizer, sets: tuple[str, str, Path], tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shots": 4}, "gives 3 of 4 examples"),
        ({"number": 5}, r"has none of test-00001\.tar:k105"),
        ({"number": 2, "shots": 1}, "member 0.wav: truncated sound"),
        ({"layout": "document"}, "do nothing with sounds"),
        ({"neighbours": str(tmp_path)}, r"has no neighbours\.jsonl"),
        ({"neighbours": None, "order": "nearest_last"}, r"benchmark\.order=nearest_last is of"),
        ({"options": ["dog", "cat"]}, "the answer 'whistle' is none of the options"),
        ({"choose": "guess"}, "must be one of text, likelihood"),
        ({"metric_by_kind": {"a": OptionAccuracy()}}, "metric_by_kind does nothing"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            asked(tokenizer, sets, **options)
    (tmp_path / "neighbours.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        asked(tokenizer, sets, neighbours=str(tmp_path))
    lost = {"id": "test-00000.tar:k100", "interleaved": "similar", "neighbours": ["x.tar:1"]}
    other = tmp_path / "other"
    other.mkdir()
    (other / "neighbours.jsonl").write_text(json.dumps(lost) + "\n")
    with pytest.raises(ValueError, match=r"x\.tar:1 is not in benchmark\.train"):
        asked(tokenizer, sets, neighbours=str(other))


def test_examples_that_do_not_fit_are_not_left_out_in_silence(
    tokenizer: Tokenizer, sets: tuple[str, str, Path]
) -> None:
    from nvmm.data.shards.dataset import Dataset

    train, test, folder = sets
    benchmark = FewShot(
        "few", test, OptionAccuracy(), train=train, shots=3, neighbours=str(folder), options=LABELS
    )
    builder = build(tokenizer, sequence_length=60)
    with pytest.raises(ValueError, match=r"of its 3 examples do not fit data\.sequence_length=60"):
        benchmark.ask(Dataset(test, builder).members(0), builder)


def save(rank: int, world: int, init: str, folder: Path) -> None:
    """A checkpoint of Audio Flamingo in small, with open gates."""
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.data.samples.tokenizer import train_byte_level_bpe
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision
    from tests.models.test_audio_flamingo import tiny

    path = train_byte_level_bpe(
        folder / "tokenizer",
        ["what is heard? see. hum whistle click"],
        vocab_size=300,
        special_tokens=SPECIAL,
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[3],
    )
    words = Tokenizer(str(path))
    model = tiny()
    model["language"] |= {"vocab_size": words.vocab_size, "padded_vocab_size": 320}
    model["language"]["transformer"]["init_method_std"] = 0.3
    target = "nvmm.data.samples.listening"
    config = {
        "model": model,
        "tokenizer": {"_target_": "nvmm.data.samples.tokenizer.Tokenizer", "path": str(path)},
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32"},
        "backend": "native",
        "data": {
            "sequence_length": 200,
            "train": {
                "_target_": "nvmm.data.shards.dataset.Dataset",
                "shards": "gone/*.tar",
                "build": {
                    "_target_": f"{target}.SoundBuilder",
                    "_partial_": True,
                    "front_end": FRONT_END,
                    "template": {"_target_": f"{target}.ListeningTemplate", **TEMPLATE},
                },
            },
        },
    }
    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    chunks = build_chunks(instantiate(model, _convert_="all"), parallel, Precision(), seed=5)
    state = {"config": config, "tokenizer_digest": words.digest}
    directory = folder / "run" / "checkpoints"
    Checkpoint(directory=directory).save(3, chunks, test_evaluate.NoOptimizer(), state)
    (folder / "run" / "summary.json").write_text("{}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound_model")
    run_ranks(save, 1, path)
    return path


def command(folder: Path, sets: tuple[str, str, Path], **benchmark: Any) -> dict[str, Any]:
    train, test, near = sets
    config = test_evaluate.command(folder, test, seed=1234)
    config["benchmark"] |= {
        "_target_": "nvmm.evaluation.few_shot.FewShot",
        **{"metric": METRIC, "suffix": "", "builder": {}, "options": list(LABELS)},
        **{"train": train, "shots": 2, "neighbours": str(near), **benchmark},
    }
    return config


def test_answers_behind_retrieved_sounds_and_their_report(
    folder: Path, sets: tuple[str, str, Path]
) -> None:
    """The bad sound and the one without neighbours are holes that are named; the others are
    answered, and the report shows and plays them."""
    config = command(folder, sets) | {"max_bad_fraction": 0.5}
    [summary] = run_ranks(test_evaluate.launch, 1, config)
    assert (summary["num_samples"], summary["num_bad"]) == (4, 2), summary
    assert "test-00000.tar:k102: member 0.wav: truncated" in summary["skipped"][0]
    out = folder / "run" / "evaluation" / "held" / "step_00000003"
    predictions = (out / "predictions.jsonl").read_text()
    assert len(max(predictions.splitlines(), key=len)) < 600, "it carries no media"
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == [0, 1, 3, 4]
    with wave.open(io.BytesIO(base64.b64decode(lines[0]["sound"]))) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, round(0.3 * RATE))
    page = (folder / "run" / "report.html").read_text()
    assert page.count('<audio controls src="data:audio/wav;base64,') == 4
    assert page.count('alt="spectrogram"') == 4


def likelihoods(rank: int, world: int, init: str, folder: Path, test: str) -> list[str]:
    """The likeliest option of each question, by whole samples without a cache."""
    import torch.distributed as dist

    from nvmm.data.shards.dataset import Dataset
    from nvmm.inference.restore import restore

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    model = restore(folder / "run")
    dataset = Dataset(test, model.builder)
    best = []
    for number in (0, 1, 3, 4):
        members = dataset.members(number)
        record = json.loads(members["json"])
        samples = [
            model.builder(members | {"json": json.dumps(record | {"answer": label}).encode()})
            for label in LABELS
        ]
        scores = [total for total, _ in model.score(samples, batch_size=3)]
        best.append(LABELS[scores.index(max(scores))])
    return best


def test_the_likeliest_option_is_that_of_whole_samples(
    folder: Path, sets: tuple[str, str, Path]
) -> None:
    config = command(folder, sets, shots=0, choose="likelihood")
    config |= {"max_bad_fraction": 0.5, "output": str(folder / "likeliest")}
    run_ranks(test_evaluate.launch, 1, config)
    lines = test_evaluate.read(folder / "likeliest")
    answered = [line["prediction"] for line in lines if line["sample_id"] != 5]
    [expected] = run_ranks(likelihoods, 1, folder, sets[1])
    assert answered == expected
    right = [line["prediction"] == line["answers"][0] for line in lines]
    assert [line["score"] for line in lines] == [float(one) for one in right]
    refused = config | {"temperature": 1.0, "output": str(folder / "refused")}
    [(code, message)] = run_ranks(test_evaluate.launch, 1, refused)
    assert code == 2 and "temperature=1.0 does nothing in this benchmark" in message


def vectors(
    rank: int, world: int, init: str, folder: Path, train: str, output: Path
) -> tuple[list[Any], torch.Tensor]:
    """The rows of encode_sounds by a run's encoder, and its features in the whole model."""
    from nvmm.data.shards.dataset import Dataset
    from nvmm.inference.restore import restore
    from nvmm.jobs.parts import Parts

    options = sounds_run.encoding(train, folder / "run") | {"front_end": None}
    sounds_run.run(rank, world, init, [(options, output)])
    model = restore(folder / "run")
    chunk: Any = model.model[0]
    dataset = Dataset(train, model.builder)
    found = []
    for number in range(len(dataset)):
        [media] = model.builder(dataset.members(number)).text.media.values()
        found.append(chunk.encoders["audio"][0](media.values).mean((0, 1)))
    return Parts(output).read().to_pylist(), torch.stack(found)


def test_sounds_are_encoded_by_a_run_s_own_encoder(
    folder: Path, sets: tuple[str, str, Path], tmp_path: Path
) -> None:
    [(rows, expected)] = run_ranks(vectors, 1, folder, sets[0], tmp_path / "vectors")
    found = torch.tensor([row["vector"] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = sounds_run.encoding(sets[0], folder / "run")
    other["front_end"] = other["front_end"] | {"peak": False}
    [[refusal]] = run_ranks(sounds_run.run_refused, 1, [other], tmp_path / "other")
    assert "was trained with another front end than job.front_end" in refusal


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
@pytest.mark.parametrize("choose", ["text", "likelihood"])
def test_layouts_give_the_same_answers(
    folder: Path, sets: tuple[str, str, Path], size: str, choose: str, tmp_path: Path
) -> None:
    config = command(folder, sets, choose=choose) | {"max_bad_fraction": 0.5}
    parallel = {"_target_": "nvmm.parallel.setup.Parallel", size: 2}
    run_ranks(test_evaluate.launch, 1, config | {"output": str(tmp_path / "one")})
    two = config | {"output": str(tmp_path / "two"), "parallel": parallel}
    run_ranks(test_evaluate.launch, 2, two)
    one, two_lines = (test_evaluate.read(tmp_path / name) for name in ("one", "two"))
    assert [x["prediction"] for x in one] == [x["prediction"] for x in two_lines]
