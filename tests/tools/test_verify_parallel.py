"""tools/verify_parallel.py: its three exit codes and what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvmm.proof.miniature import miniature
from tests import tiny
from tests.proof.test_mutants import skip_encoder_sum
from tools import verify_parallel

ROOT = Path(__file__).parents[2]
TP2 = {"tensor_model_parallel_size": 2}


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


@pytest.mark.slow
def test_the_72b_layout_from_the_command_line() -> None:
    done = command("experiment=nvlm_d/sft_72b")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run as      TP2xPP2 (4 ranks)" in done.stdout
    assert "model.language.transformer.num_layers: 80 -> 4" in done.stdout
    left_open = "not set, not needed: init_from, tokenizer.path, data.train.shards"
    assert left_open in done.stdout
    assert "EQUAL: " in done.stdout
