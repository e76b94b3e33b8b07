"""Configs with an odd value at any place: every problem is a line that names its key."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvmm.config.check import check, config_dir

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, float("inf"), float("nan"), 10**30),
    *("", "abc", "1", "???", "${seed}", "${no.key}", "\ud800", "a/../b"),
    *([], {}, [1], ["a"], [None], [{}], [[1]], {"a": 1}, {1: 2}),
    *({"_target_": "nvmm.nowhere.X"}, {"_target_": 3}, {"_target_": "nvmm.modules.lora.Lora"}),
]
PACKED = ["+data.pack=true", "data.train.shards=null"]
BLEND = "+data.blend=[{name: a, shards: a, weight: 2}, {blend: [{shards: b}], temperature: 2}]"
CONFIGS = {
    "nvlm_x": ["experiment=nvlm_x/quickstart"],
    "blend": ["experiment=nvlm_h/quickstart", *PACKED, BLEND],
    "lora": ["experiment=nvlm_d/sft_7b_lora"],
    "embedder": ["experiment=nv_embed/tiny"],
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of a value and of every value inside."""
    inner: Any = enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        inner = value.items()
    return [path, *(found for key, child in inner for found in leaves(child, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "share", [pytest.param(0.01, id="few"), pytest.param(0.2, id="many", marks=pytest.mark.slow)]
)
def test_odd_values(name: str, share: float) -> None:
    """share: of all pairs of a place and an odd value, the same ones in every run."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", CONFIGS[name])
    plain = OmegaConf.to_container(config, resolve=False)
    draw, tried = random.Random(0), 0
    for path in leaves(plain)[1:]:
        for value in ODD:
            if draw.random() > share:
                continue
            try:
                changed = OmegaConf.create(replaced(plain, path, value))
            except OmegaConfBaseException:
                continue  # no config at all
            try:
                problems = check(changed, world_size=draw.choice([None, 1, 2]))
                lines = [str(problem) for problem in problems]
            except Exception as error:
                raise AssertionError(f"{path}={value!r}: {type(error).__name__}") from error
            assert all(line.strip() for line in lines)
            tried += 1
    assert tried > 20
