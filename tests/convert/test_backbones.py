"""NVLM-X and -H begin with D's weights, or with those of their backbones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nvmm.checkpoint.load import load_weights
from nvmm.config.check import config_dir
from nvmm.convert import importing, models
from nvmm.convert.sources import InMemory, read
from nvmm.parallel.parameters import initialize, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision


def config_of(name: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(f"model/{name}")["model"], resolve=True)  # type: ignore


def built(model: dict[str, Any], seed: int = 7) -> Any:
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(model, _convert_="all")(chunk=chunk)
    initialize(module, seed=seed)
    return module


def values(module: Any) -> dict[str, torch.Tensor]:
    return {p.name: p.parameter.detach().clone() for p in sharded_parameters(module)}


def checkpoint(path: Path, model: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    models.write_weights(path, InMemory(tensors), "test", 1)
    models.write_state(path, {"config": {"model": model}})
    return path


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", ["nvlm_x_tiny", "nvlm_h_tiny"])
def test_d_s_checkpoint_starts_x_and_h(name: str, tmp_path: Path) -> None:
    """A projector of another shape stays as the seed made it, whole, and is listed; within one
    class of model it is an error still."""
    d, model = config_of("nvlm_d_tiny"), config_of(name)
    given = values(built(d, seed=1))
    path = checkpoint(tmp_path / "d", d, given)
    module = built(model)
    before = values(module)
    missing = load_weights(path, [module], other_graph=True)
    after = values(module)
    projector = {n for n in before if n.startswith("connector.")} if name[5] == "x" else set()
    assert set(missing) == projector | {n for n in before if n.startswith("cross_attention.")}
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in missing else given[key]), key
    if projector:
        with pytest.raises(ValueError, match="does not fit this model: connector"):
            load_weights(path, [module])
    other = {**d, "connector": {**d["connector"], "hidden_size": 96}}
    with pytest.raises(ValueError, match=r"connector\.linear_fc1\.weight is"):
        load_weights(path, [built(other)], other_graph=True)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_backbone_s_checkpoint_gives_its_part(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = config_of("nvlm_x_tiny")
    module = built(model)
    before = values(module)
    backbone = {
        n.removeprefix(f"{part}."): v + 1 for n, v in before.items() if n.startswith(f"{part}.")
    }
    path = checkpoint(tmp_path / part, model[part], backbone)
    with caplog.at_level(logging.WARNING):
        missing = load_weights(path, [module], other_graph=True)
    assert set(missing) == {n for n in before if not n.startswith(f"{part}.")}
    assert "does not have" not in caplog.text
    for key, value in values(module).items():
        assert torch.equal(value, before[key] + (key not in missing)), key
    # Without being asked for, no part stands for the whole.
    with pytest.raises(ValueError, match=r"has no weight of this model|does not fit"):
        load_weights(path, [module])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", ["nvlm_x_tiny", "nvlm_h_tiny"])
def test_import_composes_x_and_h(name: str, tmp_path: Path) -> None:
    """Blocks, gates and projector have the bits of a run from the seed, and are listed."""
    model = config_of(name)
    module = built(model, seed=5)
    expected = values(module)
    given = {n: v for n, v in expected.items() if n.startswith(("language.", "vision."))}
    missing = {n: torch.empty_like(v, device="meta") for n, v in expected.items() if n not in given}
    shapes, spreads = importing._drawn(instantiate(model, _convert_="all"))
    assert {n: list(t.shape) for n, t in shapes.items()} == {
        n: list(v.shape) for n, v in expected.items()
    }
    source = importing.Initial(missing, 5, spreads, torch.float32)
    assert any("gate" in n for n in missing) and any(n.startswith("connector.") for n in missing)
    for key in missing:
        assert torch.equal(read(source, key), expected[key]), key
    with pytest.raises(ValueError, match=r"no source gives vision\.conv1\.bias"):
        importing.Initial({"vision.conv1.bias": torch.ones(1)}, 5, {}, torch.float32)
