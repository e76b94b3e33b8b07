"""tools/demo_alignment.py: its commands are valid, feed each other, and run in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm import studies
from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare import word_lists
from tests.tools.demo_script import run_script
from tools import demo_alignment as demo

RUNS = Path("runs/x")
OWN = RUNS / "seed5"


def chain(steps: demo.Steps | None = None) -> dict[str, studies.Command]:
    """The commands of a seed, by their folder."""
    [variant] = demo.plan(RUNS, (5,), steps or demo.Steps())
    return {str(command.folder.relative_to(OWN)): command for command in variant.commands}


def overrides(command: studies.Command) -> list[str]:
    return [argument(text) for text in command.arguments[4:]]


def test_every_command_composes_and_passes_the_checks() -> None:
    kinds = []
    for command in chain(demo.Steps(77, 77, 77, 77)).values():
        kind = command.arguments[3].removeprefix("nvmm.")
        config = composed(kind, overrides(command))
        entry: Any = {} if kind == "train" else {"entry": kind, "world_size": 1}
        assert check(config, **entry) == [], command.folder
        plain = to_plain(config)
        if kind == "train":
            assert plain["trainer"]["max_steps"] == 77 and plain["seed"] == 5
        kinds.append(kind)
    assert [kinds.count(kind) for kind in ("train", "job", "evaluate")] == [4, 6, 6]


def test_each_stage_reads_what_is_made_before_it() -> None:
    """Whatever a command reads of the seed's folder is the folder of a command before it."""
    before: set[str] = set()
    read: dict[str, set[str]] = {}
    for name, command in chain().items():
        own = ("output=", "run.dir=")
        words = [
            text for text in command.arguments if str(OWN) in text and not text.startswith(own)
        ]
        places = {text.partition("=")[2] for text in words}
        read[name] = {str(Path(place).relative_to(OWN)).partition("/")[0] for place in places}
        assert read[name] <= before, name
        before.add(name)
    assert read["dpo"] == read["reward"] == {"sft", "pairs"}
    assert read["rpo"] == {"dpo", "rpo_pairs"}
    assert read["rpo_pairs"] == {"rpo_answers", "rpo_scores"}
    assert read["rpo_scores"] == {"reward", "rpo_answers"}
    assert read["heldout_scores"] == {"reward", "heldout_pairs"}


def test_prompts_of_the_stages_are_of_different_files() -> None:
    asked = [
        text
        for command in chain().values()
        for text in command.arguments
        if text.endswith(".jsonl") and "job.steps.prompts.files=" in text
    ]
    assert [Path(text).stem for text in asked] == ["preference", "heldout", "rpo"]


def test_tables_have_every_number() -> None:
    names = [f"{stage}/{name}" for stage in demo.POLICIES for name in (*demo.WAYS, *demo.COLUMNS)]
    names += ["reward/accuracy", "reward/pairs", "rpo_pairs/pairs"]
    names += ["rpo_pairs/chosen right", "rpo_pairs/rejected right"]
    for made in ("pairs", "heldout_pairs", "rpo_answers"):
        names += [f"{made}/{name}" for name in ("answers", "left out", "right", "pairs")]
    for stage in demo.PREFERRED:
        names += [
            f"{stage}/{side} at the {when}"
            for side in ("chosen", "rejected", "accuracy")
            for when in ("start", "end")
        ]
    seed = {name: float(number) for number, name in enumerate(names)}
    held, reward, likelihoods, data = demo.tables([seed, {k: v + 2 for k, v in seed.items()}])
    assert held.rows[1] == ("dpo", [f"{9.0 + n:.1f} ± 1.4" for n in range(8)])
    assert reward.rows[0][1][:2] == ["25.0 ± 1.4", "26 ± 1"]
    assert [name for name, _ in likelihoods.rows] == ["dpo", "rpo"]
    assert len(data.rows) == 3 and data.columns == ["answers", "left out", "right", "pairs"]


@pytest.mark.slow
def test_the_whole_chain_runs_in_miniature(tmp_path: Path) -> None:
    """With eight words, which are soon learned, of few prompts; a second call runs nothing."""
    script = tmp_path / "small.py"
    script.write_text(
        "import sys\n"
        "from nvmm.data.prepare import word_lists\n"
        f"word_lists.WORDS = {word_lists.WORDS[:8]!r}\n"
        "word_lists.LENGTHS = (3, 3)\n"
        "small = word_lists.Amounts(sft=1000, preference=200, rpo=60, heldout=60)\n"
        "build = word_lists.build\n"
        "word_lists.build = lambda folder: build(folder, small)\n"
        "from tools import demo_alignment\n"
        "demo_alignment.main()\n"
    )
    options = ["--seeds", "1", "--sft-steps", "300", "--reward-steps", "10"]
    options += ["--dpo-steps", "10", "--rpo-steps", "10", "--to", "runs"]

    first = run_script(script, options, tmp_path)
    assert first.count("attempt 1") == len(chain())
    results = json.loads((tmp_path / "runs/results.json").read_text())["results"]["seed1234"]
    assert results["pairs/pairs"] > 0 and results["reward/pairs"] > 0
    assert all(0 <= results[f"{stage}/sampled"] <= 100 for stage in demo.POLICIES)
    assert results["dpo/chosen at the start"] < 0 and results["rpo_pairs/pairs"] > 0
    page = (tmp_path / "runs/report.html").read_text()
    assert "Log-probabilities, rpo" in page and "<svg" in page
    assert "attempt" not in run_script(script, options, tmp_path)
