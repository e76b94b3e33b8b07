"""Checkpoints that many ranks wrote are read whole, whatever the layout cut them into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvmm.conversion.sides import open_checkpoint
from nvmm.conversion.verify import compare_tensors
from tests.ranks import run_ranks
from tests.training import Run


def save(rank: int, world: int, init: str, layout: dict[str, Any], folder: Path) -> None:
    Run(rank, world, init, layout).save(5, folder)


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_what_two_ranks_wrote_is_what_one_wrote(size: str, tmp_path: Path) -> None:
    run_ranks(save, 1, {}, tmp_path / "one")
    run_ranks(save, 2, {size: 2}, tmp_path / "two")
    one, two = (open_checkpoint(tmp_path / x / "step_00000005") for x in ("one", "two"))
    if size.startswith("tensor"):
        pieces = two.source.entries["decoder.layers.0.self_attention.linear_proj.weight"].chunks
        assert sorted(piece.offsets[1] for piece in pieces) == [0, 16]
    report = compare_tensors(one, two)
    assert report["equal"] == report["tensors"] == len(one.source.spec) > 30
    assert not report["only_in_a"] and not report["only_in_b"]
