"""Every experiment composes, and its config passes every check once the user's paths are given."""

import functools
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nvmm.config.check import check, config_dir, resolve, to_plain
from nvmm.proof.equivalence import ONE_RANK, run, shrink

EXPERIMENTS = sorted(
    str(path.relative_to(config_dir() / "experiment").with_suffix(""))
    for path in (config_dir() / "experiment").rglob("*.yaml")
)


@functools.lru_cache
def composed(experiment: str):
    """The config of an experiment, and the keys that it leaves to the user."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"])
        unset = [problem.key for problem in resolve(config)[1]]
        return compose("train", [f"experiment={experiment}", *(f"{k}=given" for k in unset)]), unset


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_passes_every_check(experiment: str) -> None:
    config, _ = composed(experiment)
    assert check(config) == []
    assert to_plain(config)["run"]["name"] is None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_begins_with_its_command(experiment: str) -> None:
    """The first comment is a command that names the experiment and every key that is left open."""
    text = Path(config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    comments = [line for line in text.splitlines()[:8] if line.startswith("#")]
    command = next(line for line in comments if "nvmm.train" in line)
    assert f"experiment={experiment}" in command
    _, unset = composed(experiment)
    missing = [key for key in unset if f"{key}=" not in " ".join(comments)]
    assert not missing, f"the command of {experiment} does not name {missing}"


@pytest.mark.parametrize("path", sorted(config_dir().rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_tabs_or_trailing_spaces(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert line == line.rstrip() and "\t" not in line, f"{path}:{number}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_trains_a_step_when_shrunk(experiment: str) -> None:
    config = shrink(to_plain(composed(experiment)[0]))
    result = run(config, ONE_RANK, num_steps=1)
    assert math.isfinite(result.losses[0])
    assert result.grad_norms[0] > 0
