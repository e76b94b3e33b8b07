"""The quickstarts' first losses on real input, kept as text; `make golden` writes them anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvmm.data.prepare import digits

GOLDEN = Path(__file__).parent / "golden"
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "data"
    digits.build(str(folder), digits.Amounts(text=8, single=8, strings=200, validation=32, test=8))
    return folder


@pytest.mark.parametrize(
    "system",
    ["nvlm_d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nvlm_x", "nvlm_h"))],
)
def test_golden_losses_of_the_quickstart(
    system: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command = [
        *(sys.executable, "-m", "nvmm.train", f"experiment={system}/quickstart"),
        *("parallel=single", "init_from=null"),
        *(f"run.dir={tmp_path}/run", f"tokenizer.path={data}/tokenizer"),
        f"data.train.shards=[{data}/strings/train-*.tar]",
        f"data.validation.shards=[{data}/strings/validation-*.tar]",
        *(f"trainer.max_steps={STEPS}", "trainer.global_batch_size=8", "optim.warmup_steps=5"),
        *("trainer.micro_batch_size=4", f"trainer.validation_interval={STEPS}"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    validation = json.loads((tmp_path / "run" / "validation.jsonl").read_text())
    losses.append(validation["validation_loss"])
    golden = GOLDEN / f"losses_{system}_quickstart.txt"
    if request.config.getoption("--golden"):
        golden.write_text("".join(f"{loss!r}\n" for loss in losses))
    expected = [float(line) for line in golden.read_text().split()]
    assert len(losses) == len(expected) == STEPS + 1
    # CPUs differ in the last bits and ten steps carry them further.
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-3)
    for name in ("config.yaml", "overrides.yaml", "summary.json", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0
