"""LoRA runs that begin with the weights of another graph go on, and their weights are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra.utils import instantiate

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.files import find, read_state
from nvmm.checkpoint.load import load_weights
from nvmm.convert import models
from nvmm.convert.sources import InMemory
from nvmm.modules.lora import Lora
from nvmm.parallel.parameters import initialize
from nvmm.parallel.setup import Parallel, Precision, shutdown
from nvmm.training.reference import Reference
from tests import tiny
from tests.convert.test_backbones import checkpoint, values
from tests.modules.test_lora import fit
from tests.ranks import run_ranks

LORA = tiny.lora(["language.*.linear_qkv"])


def adapted(seed: int) -> Any:
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(tiny.multimodal(), _convert_="all")(chunk=chunk)
    initialize(module, seed=seed)
    Lora(**{key: value for key, value in LORA.items() if key != "_target_"}).attach([module])
    return module


def language_of(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights and the adapters of the language model under its own names."""
    own = {
        name.removeprefix("language."): value
        for name, value in values(module).items()
        if name.startswith("language.")
    }
    factors = {name: value for name, value in own.items() if ".lora_" in name}
    return {name: value for name, value in own.items() if name not in factors}, factors


def write_language(rank: int, world: int, init: str, path: Path) -> None:
    Parallel().initialize(seed=7, rank=rank, world_size=world, init_method=init)
    checkpoint(path, tiny.multimodal()["language"], language_of(adapted(1))[0])


def lacking(rank: int, world: int, init: str, path: Path) -> list[str]:
    Parallel().initialize(seed=7, rank=rank, world_size=world, init_method=init)
    return load_weights(find(path), [adapted(9)])


def test_a_lora_run_from_a_language_model_goes_on_and_is_whole(tmp_path: Path) -> None:
    """Its checkpoints name no base: the names there are others."""
    run_ranks(write_language, 1, tmp_path / "language")
    for steps in (1, 2):
        run_ranks(fit, 1, tmp_path / "run", steps, {}, LORA, tmp_path / "language")
    state = read_state(find(tmp_path / "run"))
    assert (state["step"], state["base"]) == (2, None)
    assert run_ranks(lacking, 1, tmp_path / "run") == [[]]


@pytest.fixture
def world() -> Iterator[None]:
    Parallel().initialize(seed=0, rank=0, world_size=1)
    yield
    shutdown()


@pytest.mark.usefixtures("world")
def test_the_base_below_a_language_model_s_adapters_gives_its_part_too(tmp_path: Path) -> None:
    given, other = adapted(1), adapted(2)
    weights, _ = language_of(given)
    _, factors = language_of(other)
    config = tiny.multimodal()["language"]
    base = checkpoint(tmp_path / "base", config, weights)
    path = tmp_path / "lora"
    path.mkdir()
    factors = {name: value + 1 for name, value in factors.items()}
    models.write_weights(path, InMemory(factors), "test", 1)
    about = asdict(BaseCheckpoint.of(base))
    models.write_state(path, {"config": {"model": config}, "base": about})
    module = adapted(3)
    missing = load_weights(path, [module], other_graph=True)
    found, adapters = language_of(module)
    assert missing == sorted(n for n in values(module) if not n.startswith("language."))
    for expected, there in ((weights, found), (factors, adapters)):
        assert expected.keys() == there.keys()
        assert all(torch.equal(there[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("world")
def test_the_reference_of_preferences_is_found_again(tmp_path: Path) -> None:
    """A run of DPO that began with a language model's weights resumes with that reference."""
    config = tiny.multimodal()["language"]
    path = checkpoint(tmp_path / "language", config, language_of(adapted(1))[0])
    first, again = adapted(3), adapted(3)
    load_weights(path, [first], other_graph=True)
    state = {"reference": asdict(BaseCheckpoint.of(path))}
    Reference([again], cast(Any, None)).take_again(tmp_path / "run", state, None)
    expected, found = values(first), values(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
