"""Sizes and global names of the configured embedders."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate

from nvmm.modules.lora import Lora
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny
from tests.models.parameter_names import build, golden_path, parameter_names

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", ["nv_embed_7b", "nv_embed_tiny"])
def test_golden_parameter_names(name: str, request: pytest.FixtureRequest) -> None:
    names = parameter_names(name)
    path = golden_path(name)
    if request.config.getoption("--golden"):
        path.write_text("\n".join(names) + "\n")
    assert path.read_text().splitlines() == names
    assert not any(line.startswith("output_layer") for line in names)


def test_nv_embed_has_the_published_size() -> None:
    """Mistral-7B-v0.1 without its output layer, and the pooling's 740,356,096."""
    model = build("nv_embed_7b")
    assert sum(p.numel() for p in model.parameters()) == 7_851_016_192


@pytest.mark.usefixtures("world")
def test_flops_count_the_pooling_and_what_trains() -> None:
    """Instruction tokens do not reach the pooling; adapted weights need no gradients."""

    def count(config: dict, start: int = 0, lora: Lora | None = None) -> float:
        adapt = None if lora is None else lora.attach
        chunks = build_chunks(
            instantiate(config, _convert_="all"), Parallel(), Precision(), adapt=adapt
        )
        if lora is not None:
            lora.freeze(chunks)
        rows = synthetic_steps({"model": tiny.embedder()}, 1, 1)[0][0]
        starts = torch.full_like(rows.extras["pool_from"], start)
        batch = rows.replace(extras=rows.extras | {"pool_from": starts})
        return chunks[0].flops(batch)["language"]

    latent, mean = count(tiny.embedder()), count(tiny.embedder("Mean"))
    texts = 6
    shorter = count(tiny.embedder(), start=2)
    assert mean < shorter < latent
    per_token = 3 * (2 * 64 * (2 * 96 + 3 * 80) + 4 * 96 * 6)
    assert latent - shorter == 2 * texts * per_token
    adapted = count(tiny.embedder(), lora=Lora(["decoder.*linear_*"], train=["pooling.*"]))
    assert adapted - (latent - mean) < 0.75 * mean
