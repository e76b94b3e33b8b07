"""What a config asks of the machine, told from names, sizes and JSON."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from nvmm.config import compose, machine
from nvmm.config.parts import part_alone
from tests import tiny


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model": tiny.language(),
        "lora": None,
        "precision": {"dtype": "fp32"},
        "optim": {"freeze": []},
        "checkpoint": {"save_interval": 10, "keep_last": 2},
        "trainer": {"max_steps": 100},
        **changes,
    }


def test_folders_that_are_there_may_be_something_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    given = {"tokenizer": {"path": str(tmp_path)}, "init_from": str(run), "resume": "/nope"}
    keys = ("tokenizer.path", "init_from", "resume", "checkpoint.path")
    assert [str(each).partition("=")[0] for each in machine.missing_folders(given, keys)] == [
        *keys[:3]
    ]
    (run / "checkpoints" / "step_00000003" / "state.json").touch()
    (tmp_path / "tokenizer.json").touch()
    assert [*machine.missing_folders(given, keys[:2])] == []
    assert machine.newest_state(run) == run / "checkpoints" / "step_00000003"


def test_a_file_with_brackets_in_its_name_is_there(tmp_path: Path) -> None:
    (tmp_path / "set[1].tar").touch()
    assert [*machine.unmatched("data.train.shards", f"{tmp_path}/set[1].tar")] == []
    assert [*machine.unmatched("data.train.shards", [f"{tmp_path}/set[2].tar"])] != []


def test_weights_of_other_shapes_name_the_key_to_change() -> None:
    saved = {"language": tiny.language(), "vision": {"transformer": {"hidden_size": 80}}}
    model = {"language": tiny.language(padded_vocab_size=1000), "connector": {"hidden_size": 1}}
    model["language"]["transformer"] |= {"hidden_size": 128, "num_layers": 9}
    assert sorted(map(str, machine.misfits(saved, model, "CKPT"))) == [
        "model.language.padded_vocab_size=1000 must be 512 for init_from=CKPT",
        "model.language.transformer.hidden_size=128 must be 64 for init_from=CKPT",
    ]
    assert [*machine.misfits(saved, saved, "CKPT")] == []


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_s_weights_are_compared_with_that_part(part: str) -> None:
    model = {"language": tiny.language(), "vision": tiny.multimodal()["vision"]}
    saved = json.loads(json.dumps(model[part]))
    assert [*machine.misfits(saved, model, "CKPT")] == []
    size = saved["transformer"]["hidden_size"]
    saved["transformer"]["hidden_size"] = 2 * size
    assert [*map(str, machine.misfits(saved, model, "CKPT"))] == [
        f"model.{part}.transformer.hidden_size={size} must be {2 * size} for init_from=CKPT"
    ]


def test_the_disk_is_that_of_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a run's checkpoints may be a link to a larger disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    free = namedtuple("free", "free")
    space = lambda path: free(10**12 if path.resolve().name == "large" else 0)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", space)
    assert [*machine.disk(config(), tmp_path / "run")] == []
    assert [*machine.disk(config(), tmp_path / "other")] != []


@pytest.mark.parametrize(("step", "saves"), [(100, 0), (90, 1), (95, 1), (80, 2)])
@pytest.mark.parametrize("kept", [5, None])
def test_a_run_that_goes_on_needs_room_for_the_rest(
    step: int, saves: int, kept: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished one needs none, however full the disk is."""
    (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    asked = config(checkpoint={"save_interval": 10, "keep_last": kept})
    free = namedtuple("free", "free")
    size = machine.checkpoint_bytes(asked)
    for room, refused in ((saves * size, False), (saves * size - 1, saves > 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free(room))  # noqa: B023
        assert bool([*machine.disk(asked, tmp_path)]) == refused


@pytest.mark.parametrize("part", ["language", "vision"])
def test_the_config_of_a_part_alone_is_known(part: str) -> None:
    """By what every such config of ours has, and a whole model's has not."""
    model = compose.composed("train", ["model=nvlm_d_tiny"]).model
    assert part_alone(model[part]) == part and part_alone(model) is None


def test_a_disk_must_hold_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = 4 * (2 * 64 * 64 + 2 * 64 * 96) + 512 * 64
    size = parameters * (4 + 8)
    assert machine.checkpoint_bytes(config()) == size
    assert machine.checkpoint_bytes(config(lora={"rank": 4})) == 0
    free = namedtuple("free", "free")
    for there, room, refused in ((0, 3, False), (0, 2.9, True), (1, 2.9, False)):
        for step in range(there):
            (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free(int(room * size)))  # noqa: B023
        problems = [str(each) for each in machine.disk(config(), tmp_path / "run")]
        assert bool(problems) == refused
        assert all(
            each.startswith("checkpoint.keep_last=2 makes 3 checkpoints") for each in problems
        )
    one = config(trainer={"max_steps": 5})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(size))
    assert [*machine.disk(one, tmp_path / "other")] == []


def test_the_estimate_is_at_most_what_a_checkpoint_has() -> None:
    """Of the published sizes, whose checkpoints are known: 16 bytes a parameter in bf16."""
    from nvmm.config.check import resolve
    from nvmm.config.compose import composed

    plain, _ = resolve(composed("train", ["experiment=nvlm_d/sft_7b", "optim.freeze=[]"]))
    assert 0.4 < machine.checkpoint_bytes(plain) / (14 * 7.6e9) < 1.0
