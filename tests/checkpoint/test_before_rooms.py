"""Checkpoints written before the constructors moved into rooms go on working.

before_rooms.tar.gz holds two runs of revision 2b38770, NVLM-D made small: d (step 4 of
nvlm_d/quickstart) and lora (step 2 of adapters on it), with their configs. Paths in them begin with
/runs/before.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nvmm.checkpoint.files import find, read_state
from nvmm.config.changes import changes
from nvmm.config.moved import MOVED, renamed
from nvmm.config.signatures import signature
from nvmm.data.prepare import digits
from tests.ranks import run_ranks

LOSSES = [5.303751482282366, 5.212503051757812]
"""Steps 5 and 6 of run d as revision 2b38770 went on from step 4."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs, and the data that they were trained on."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(Path(__file__).with_name("before_rooms.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    amounts = digits.Amounts(text=8, single=8, strings=200, validation=32, test=8)
    digits.build(str(folder / "data"), amounts)
    return folder


def command(rank: int, world_size: int, init_method: str, name: str, *arguments: str) -> str:
    """What a command of nvmm prints, in a process of its own."""
    import importlib

    sys.argv = [f"nvmm.{name}", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(f"nvmm.{name}").main()
    return out.getvalue()


def overrides(before: Path, run: Path, max_steps: int) -> list[str]:
    import yaml

    kept = yaml.safe_load((before / "d" / "overrides.yaml").read_text())
    kept = [text.replace("/runs/before", str(before)) for text in kept]
    kept = [text for text in kept if not text.startswith(("run.dir=", "trainer.max_steps="))]
    return [*kept, f"run.dir={run}", f"trainer.max_steps={max_steps}"]


def test_a_run_goes_on_with_the_losses_it_would_have_had(before: Path, tmp_path: Path) -> None:
    shutil.copytree(before / "d", tmp_path / "d")
    run_ranks(command, 1, "train", *overrides(before, tmp_path / "d", 6))
    lines = [json.loads(x) for x in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 6]
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES, rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_it_answers(before: Path, adapted: bool) -> None:
    run = "lora" if adapted else "d"
    [text] = run_ranks(
        command,
        1,
        "evaluate",
        f"checkpoint={before / run}",
        f"tokenizer={before}/data/tokenizer",
        "benchmark=heldout",
        f"benchmark.shards={before}/data/strings/test-*.tar",
        f"output={before}/{run}-output",
        *([f"base={before / 'd'}"] if adapted else []),
        "max_new_tokens=2",
    )
    assert "heldout" in text
    lines = (before / f"{run}-output" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 8


def test_its_weights_export(before: Path, tmp_path: Path) -> None:
    from nvmm.convert.exporting import export
    from nvmm.convert.models import open_checkpoint

    words = before / "data" / "tokenizer"
    export(open_checkpoint(before / "d"), tmp_path / "exported", "nvlm_d", tokenizer=words)
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size > 100_000


def load_chunks(rank: int, world_size: int, init_method: str, path: Path) -> None:
    """Load a checkpoint's weights into its model."""
    from hydra.utils import instantiate

    from nvmm.checkpoint.load import load_weights
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision

    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
    model = instantiate(read_state(path)["config"]["model"], _convert_="all")
    load_weights(path, build_chunks(model, Parallel(), Precision("bf16")))


def test_its_weights_are_compared_with_their_sums(before: Path, tmp_path: Path) -> None:
    """Digests came later; what was covered then still is, and also where the dtype changes."""
    import pickle

    from nvmm.convert.exporting import export
    from nvmm.convert.models import open_checkpoint
    from nvmm.convert.verify import verified

    words = before / "data" / "tokenizer"
    path = Path(shutil.copytree(find(before / "d"), tmp_path / "d" / "step_00000004"))
    assert verified(path) == (
        True,
        f"{path}: the weights are as they were saved; the rest has no digests yet",
    )
    metadata = pickle.loads((path / ".metadata").read_bytes())
    name = "language.decoder.layers.0.mlp.linear_fc2.weight"
    info = next(i for index, i in metadata.storage_data.items() if index.fqn == name)
    with (path / info.relative_path).open("r+b") as stream:
        stream.seek(info.offset + info.length // 2)
        [byte] = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(RuntimeError, match=rf"{name} is not what was saved"):
        run_ranks(load_chunks, 1, path)
    with pytest.raises(ValueError, match=rf"{name} is not what was saved"):
        export(open_checkpoint(path), tmp_path / "exported", "nvlm_d", tokenizer=words)
    assert not (tmp_path / "exported").exists()
    (path / "weights.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no checksum in weights\.json"):
        export(open_checkpoint(path), tmp_path / "exported", "nvlm_d", tokenizer=words)


def test_every_old_name_leads_to_a_constructor_with_the_keys_that_were_saved(before: Path) -> None:
    for new in MOVED.values():
        signature(new)
    saved: Any = json.loads((find(before / "d") / "state.json").read_text())["state"]["config"]
    current = read_state(find(before / "d"))["config"]
    changed = {x.saved for x in changes(saved, current) if x.key.endswith("._target_")}
    assert changed == {x for x in MOVED if f'"{x}"' in json.dumps(saved)} != set()
    assert renamed(current) == current
