"""Global names and shapes of a configured model's parameters, without allocating them.

`make golden` writes tests/golden/parameter_names_MODEL.txt anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from nvmm.config.check import config_dir

GOLDEN = Path(__file__).parent.parent / "golden"


def build(model: str, *, meta: bool = True) -> Any:
    """The model of configs/model/MODEL.yaml on the meta device; needs a world of one rank.

    meta=False: on the CPU, uninitialised, fp32.
    """
    from nvmm.parallel.setup import Chunk, Parallel, Precision

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(f"model/{model}")["model"], resolve=True)
    chunk = Chunk(Parallel(), Precision("bf16" if meta else "fp32"), meta=meta)
    with torch.device("meta" if meta else "cpu"):
        return instantiate(config, _convert_="all")(chunk=chunk)


def parameter_names(model: str) -> list[str]:
    """`name shape` of every parameter, in module order."""
    from nvmm.parallel.parameters import sharded_parameters

    return [
        f"{parameter.name} {list(parameter.global_shape)}"
        for parameter in sharded_parameters(build(model))
    ]


def golden_path(model: str) -> Path:
    return GOLDEN / f"parameter_names_{model}.txt"
