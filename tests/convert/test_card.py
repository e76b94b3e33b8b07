"""The model card of an export: stages, their data, and the scores of the checkpoint's step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nvmm.convert import exporting, models
from nvmm.convert.card import card
from nvmm.convert.models import SavedModel, write_state
from nvmm.convert.sources import InMemory
from tests.convert import families
from tests.convert.test_families import imported


def saved(path: Path, state: dict[str, Any]) -> SavedModel:
    """A checkpoint's small files, complete for whoever starts from it."""
    path.mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "digests.json"):
        (path / name).write_text("{}")
    write_state(path, state)
    return SavedModel(path, state, InMemory({}))


def test_a_card_has_the_stages_their_data_and_the_scores(tmp_path: Path) -> None:
    sources = {"language": {"folder": "QWEN", "format": "qwen2", "config": {}}}
    saved(tmp_path / "import", {"config": {"model": {}}, "sources": sources})
    first = {
        "run": {"name": "nvlm_d/pretrain"},
        "init_from": str(tmp_path / "import"),
        "data": {"train": {"shards": ["captions/*.tar", "ocr/*.tar"]}},
        "optim": {"learning_rate": 1e-4, "freeze": ["vision.*", "language.*"]},
    }
    before = tmp_path / "runs" / "pretrain" / "checkpoints" / "step_00000005"
    saved(before, {"config": first, "step": 5})
    blend = [{"name": "chat", "shards": "chat/*.tar", "weight": 0.7}, {"shards": "vqa/*.tar"}]
    last = {
        "run": {"name": "nvlm_d/sft"},
        "init_from": str(before),
        "data": {"train": {"shards": None}, "blend": blend},
        "objective": {"_target_": "nvmm.objectives.next_token.NextToken"},
        "lora": {"rank": 8},
    }
    path = tmp_path / "runs" / "sft" / "checkpoints" / "step_00000009"
    model = saved(path, {"config": last, "step": 9})
    for step, value in ((path.name, 0.5), ("step_00000004", 0.1)):
        folder = path.parent.parent / "evaluation" / "docvqa" / step
        folder.mkdir(parents=True)
        metrics = {"benchmark": "docvqa", "checkpoint": "x", "anls": value, "by": {"table": 0.25}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    text = card(model, "nvlm_d", None, 1234)
    for line in (
        "1,234 parameters in the nvlm_d layout",
        "- language: QWEN",
        "- **nvlm_d/sft**: steps 9, objective NextToken, LoRA rank 8",
        "  - data: chat: `chat/*.tar`, weight 0.7",
        "  - data: `vqa/*.tar`",
        "- **nvlm_d/pretrain**: steps 5, learning rate 0.0001, frozen vision.*, language.*",
        "  - data: `captions/*.tar`, `ocr/*.tar`",
        "| docvqa | anls | 0.5 |",
        "| docvqa | by.table | 0.25 |",
    ):
        assert line in text.splitlines() or line in text, line
    assert text.index("nvlm_d/sft") < text.index("nvlm_d/pretrain") and "0.1 |" not in text
    # What is gone is named, and a chain that leads back to its start ends.
    gone = SavedModel(path, {"config": {"init_from": str(tmp_path / "gone")}}, InMemory({}))
    assert f"- `{tmp_path / 'gone'}`, which is not here" in card(gone, "qwen2", None, 1)
    round_ = {"config": {"run": {"name": "round"}, "init_from": str(path)}}
    (path / "state.json").unlink()
    write_state(path, round_)
    assert card(SavedModel(path, round_, InMemory({})), "qwen2", None, 1).count("**round**") == 20


def test_an_export_has_its_card(tmp_path: Path) -> None:
    families.language("qwen2", tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    exporting.export(models.open_checkpoint(tmp_path / "ours"), tmp_path / "back", "qwen2")
    text = (tmp_path / "back" / "README.md").read_text()
    assert f"- model: {tmp_path / 'theirs'}" in text and "## Training" not in text


def test_a_copy_of_merged_weights_is_trained_still(tmp_path: Path) -> None:
    """What was merged on an import talks as it was taught, also when its weights are copied."""
    path = tmp_path / "merged"
    path.mkdir()
    models.write_weights(path, InMemory({"weight": torch.ones(2)}), "test", 1)
    sources = {"": {"folder": "QWEN", "format": "qwen2", "config": {}}}
    state = {"config": {"model": {}}, "sources": sources, "merged_from": ["base", "run"]}
    write_state(path, state)
    exporting.rewrite([models.open_checkpoint(path)], tmp_path / "copy")
    assert models.open_checkpoint(tmp_path / "copy").state["merged_from"] == ["base", "run"]
