"""tools/compare_nvlm.py and tools/bench_nvlm.py: fair variants, shapes and what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmm.config.check import check, to_plain
from nvmm.config.compose import composed
from nvmm.data.prepare import digits
from tools import bench_nvlm, compare_nvlm


def stages(system: str) -> list[dict]:
    """The composed configs of a system's three stages."""
    made = compare_nvlm.variant(system, 5, Path("runs/x"), 100)
    found = []
    for command in made.commands[:3]:
        config = composed("train", command.arguments[4:])
        assert check(config) == [], system
        found.append(to_plain(config))
    return found


@pytest.mark.parametrize("system", ("x", "h"))
def test_systems_see_the_same_samples(system: str) -> None:
    for theirs, ours in zip(stages("d"), stages(system), strict=True):
        theirs["optim"].pop("freeze")
        frozen = ours["optim"].pop("freeze")
        assert not any(pattern.startswith("language") for pattern in frozen)
        for key in ("trainer", "seed", "tokenizer", "precision", "parallel", "optim"):
            assert ours[key] == theirs[key], key
        assert ours["data"]["train"]["shards"] == theirs["data"]["train"]["shards"]
        same = ("tile_size", "tokens_per_tile", "max_tiles", "use_thumbnail")
        for key in same:
            assert ours["data"]["train"]["build"][key] == theirs["data"]["train"]["build"][key]
        assert (
            ours["model"]["language"]["transformer"] == theirs["model"]["language"]["transformer"]
        )


def test_report_lists_every_system() -> None:
    kinds = {f"exact_match_{kind}": 0.5 for kind in digits.KINDS}
    numbers = {"samples_per_second": 120.0, "cpu_seconds": 200.0, "tokens_per_sample": 45.5}
    size = {"peak_memory_bytes": 7e8, "num_parameters": 900_000}
    seeds = [{"exact_match": score, **kinds, **numbers, **size} for score in (0.5, 0.75)]
    text = compare_nvlm.report({"d": seeds, "x": seeds[:1]})
    assert "| NVLM-D | 2     | 0.625 ± 0.177 |" in text
    assert "| 700 " in text
    assert "| NVLM-X | 1     | 0.500 " in text


def test_speed_beside_the_papers() -> None:
    def numbers(seconds: float) -> dict[str, float]:
        return {
            "decoder_length": 704,
            "cpu_seconds_per_step": seconds,
            "samples_per_cpu_second": 2 / seconds,
        }

    text = bench_nvlm.report({"x": numbers(1.0), "h": numbers(1.6), "d": numbers(2.0)})
    x, h, d = text.splitlines()[2:]
    assert "| 2.00x" in x and "| 1.75x" in x
    assert "| 1.25x" in h and "| 1.26x" in h
    assert d.count("1.00x") == 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(digits.train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(("system", "length"), [("d", 704), ("x", 256), ("h", 320)])
def test_lengths_are_the_papers_over_four(tokenizer: str, system: str, length: int) -> None:
    batch = bench_nvlm.micro_batch(bench_nvlm.configure(system, tokenizer), 1)
    shapes = [media.values.shape for media in batch.media.values()]
    assert sum(shape[0] for shape in shapes) == 7
    assert {shape[1:] for shape in shapes} == {(3, 128, 128)}
    assert abs(batch.tokens.shape[1] - length) <= 6  # H's tags are in the keys and values
    assert length == bench_nvlm.PAPER[system][0] / 4


@pytest.mark.slow
def test_every_system_takes_a_step(tokenizer: str) -> None:
    found = bench_nvlm.bench(bench_nvlm.SYSTEMS, rounds=1, batch=1, tokenizer=tokenizer)
    assert list(found) == ["x", "h", "d"]
    assert all(numbers["cpu_seconds_per_step"] > 0 for numbers in found.values())
    assert found["d"]["decoder_length"] > found["h"]["decoder_length"]
    assert found["h"]["decoder_length"] > found["x"]["decoder_length"]
