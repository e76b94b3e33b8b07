"""tools/verify_parallel.py: its three exit codes and what it prints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvmm.commands import verify_parallel
from nvmm.proof import equivalence
from nvmm.proof.equivalence import Comparison, Result
from nvmm.proof.miniature import miniature
from tests import tiny
from tests.proof.test_mutants import skip_encoder_sum

ROOT = Path(__file__).parents[2]
CONTRASTIVE = "nvmm.objectives.contrastive.Contrastive"
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/verify_parallel.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_config_exits_with_2() -> None:
    done = command(
        "experiment=nvlm_d/sft_72b",
        "parallel.tensor_model_parallel_size=3",
        "parallel.encodr=replicated",
    )
    assert done.returncode == verify_parallel.BAD_CONFIG, done.stderr
    assert "did you mean parallel.encoder?" in done.stderr
    assert "num_attention_heads=64 must be divisible by" in done.stderr
    done = command("--world-size", "12", "experiment=nvlm_d/sft_72b")
    assert done.returncode == verify_parallel.BAD_CONFIG
    assert "WORLD_SIZE=12" in done.stderr
    done = command("seed=1")
    assert done.returncode == verify_parallel.BAD_CONFIG
    assert "model=???" in done.stderr


def test_equal_and_different(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tiny.multimodal(), freeze=["language.*"]) | {"parallel": TP2}
    small = miniature(config)
    monkeypatch.setattr(verify_parallel, "NUM_STEPS", 1)
    assert verify_parallel.verify(small, packed=False) == 0
    printed = capsys.readouterr().out
    assert "EQUAL: 34 of 34 parameters compared, 0 failures, 2 ranks" in printed
    assert "tokens held by rank 1" in printed

    status = verify_parallel.verify(small, packed=False, fault=skip_encoder_sum)
    assert status == verify_parallel.DIFFERENT
    printed = capsys.readouterr().out
    assert "DIFFERENT: 34 of 34 parameters compared" in printed
    assert "gradient of vision.conv1.weight: off by" in printed


def test_rounding_alone_is_no_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What single precision finds is asked again of double precision; DP 3 is run as it is."""
    small = miniature(tiny.config(tiny.language()), 3)
    assert [layout.name for layout in small.layouts] == ["DP3"]
    right, precisions = equivalence.compare, []

    def compare(expected: Result, *others: Any) -> Comparison:
        first = not precisions
        precisions.append(expected.losses[0])
        comparison = right(expected, *others)
        return replace(comparison, failures=["losses at step 1"]) if first else comparison

    monkeypatch.setattr(equivalence, "compare", compare)
    monkeypatch.setattr(verify_parallel, "NUM_STEPS", 1)
    assert verify_parallel.verify(small, packed=False) == 0
    printed = capsys.readouterr().out
    assert "NOT EQUAL IN SINGLE PRECISION: 31 of 31" in printed
    assert printed.rstrip().splitlines()[-1].startswith("EQUAL: 31 of 31")
    single, double = precisions
    assert single != double and single == pytest.approx(double, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "layout", "status", "samples"),
    [
        ({"cross_rank_negatives": False}, {}, verify_parallel.MEANT, "4 -> 2"),
        ({"grad_cache": False}, {}, verify_parallel.MEANT, "1 -> 2"),
        pytest.param({"cross_rank_negatives": False}, TP2, 0, None, marks=pytest.mark.slow),
    ],
    ids=["own negatives", "no cache", "tp2"],
)
def test_a_difference_that_the_objective_means(
    options: dict[str, bool],
    layout: dict[str, Any],
    status: int,
    samples: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny.contrastive(tiny.embedder("Mean"), options) | {"parallel": layout}
    monkeypatch.setattr(verify_parallel, "NUM_STEPS", 1)
    assert verify_parallel.verify(miniature(config), packed=False) == status
    printed = capsys.readouterr().out
    assert ("MEANT: " in printed) == (samples is not None)
    assert samples is None or printed.rstrip().endswith(samples)


def test_the_config_s_kernels_run_on_the_ranks() -> None:
    """One that must be fused has no double precision, which only its use can tell."""
    kernels = {"_target_": "nvmm.kernels.library.Kernels", "norm": "fused"}
    config = miniature(tiny.config(tiny.language()) | {"kernels": kernels}).config
    config["precision"] = {"dtype": "fp64"}
    with pytest.raises(RuntimeError, match=r"kernels\.norm=fused (needs|does not work here)"):
        equivalence.run(config, equivalence.ONE_RANK, num_steps=1)


@pytest.mark.slow
def test_bf16_within_twice_one_ranks_own_rounding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = miniature(tiny.config(tiny.multimodal()) | {"parallel": TP2})
    monkeypatch.setattr(verify_parallel, "NUM_STEPS", 2)
    assert verify_parallel.verify(small, packed=False, bf16=True) == 0
    assert "EQUAL: " in capsys.readouterr().out
    status = verify_parallel.verify(small, packed=False, bf16=True, fault=skip_encoder_sum)
    assert status == verify_parallel.DIFFERENT
    assert "gradient of vision.conv1.weight: off by" in capsys.readouterr().out


@pytest.mark.slow
def test_the_72b_layout_from_the_command_line() -> None:
    done = command("experiment=nvlm_d/sft_72b")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run as      TP2xPP2 (4 ranks)" in done.stdout
    assert "model.language.transformer.num_layers: 80 -> 4" in done.stdout
    left_open = "not set, not needed: init_from, tokenizer.path, data.train.shards"
    assert left_open in done.stdout
    assert "EQUAL: " in done.stdout
