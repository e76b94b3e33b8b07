"""A connector of one's own: rules, counters, conversion and proofs ask its class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.config import check, compose, tiles
from nvmm.convert import importing
from nvmm.convert.logits import _batch
from nvmm.parallel.parameters import initialize
from nvmm.parallel.setup import Parallel, Precision

OWN = "tests.models.own_connector."


def model_of(name: str, **options: Any) -> dict[str, Any]:
    model: dict[str, Any] = check.to_plain(compose.composed("train", ["model=nvlm_d_tiny"]).model)
    return model | {"connector": {"_target_": OWN + name, "_partial_": True, **options}}


def problems(name: str, tokens: int, *more: str) -> list[str]:
    """What the check says of the data of an experiment with an own connector."""
    config = compose.composed(
        "train",
        [
            "experiment=nvlm_d/sft_7b",
            f"++model.connector={{_target_:{OWN}{name},_partial_:true}}",
            *(f"~model.connector.{key}" for key in ("hidden_size", "activation_func")),
            "~model.connector.init_method_std",
            f"data.train.build.tokens_per_tile={tokens}",
            *more,
        ],
    )
    found = map(str, check.check(config, entry="train", world_size=None))
    return [text for text in found if "token" in text or "connector" in text]


def test_rules_take_the_tokens_that_the_class_says() -> None:
    said = [text for text in problems("Resampler", 17) if "tokens_per_tile" in text]
    assert said == [
        "data.train.build.tokens_per_tile=17 must be 16, what model.vision and model.connector make"
        " of a tile"
    ]
    quiet = [problems("Resampler", 16), problems("Resampler", 5, "++model.connector.num_queries=5")]
    assert all("tokens_per_tile" not in text for texts in quiet for text in texts)
    # Of a class that says nothing the data are believed, in the length that an image needs too.
    assert not [t for t in problems("Silent", 17) if "tokens_per_tile" in t]
    [short] = [t for t in problems("Silent", 500) if t.startswith("data.sequence_length")]
    assert "x 500 tokens" in short


def test_tokens_of_a_tile() -> None:
    vision = {"image_size": 384, "patch_size": 14}
    plain = {"_target_": "nvmm.modules.connector.MLPConnector"}
    assert tiles.tokens_per_tile(vision, plain | {"pad_grid": True}) == 14 * 14
    assert tiles.tokens_per_tile(vision, plain | {"downsample": 1}) == 27 * 27
    assert tiles.require_tokens(vision, {"_target_": OWN + "Resampler", "num_queries": 3}) == 3
    with pytest.raises(ValueError, match=r"Silent does not say .* attribute tokens_of_tile"):
        tiles.require_tokens(vision, {"_target_": OWN + "Silent"})


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("name", "known"), [("Resampler", True), ("Silent", False)])
def test_a_step_is_counted_or_unknown(name: str, known: bool) -> None:
    """Never a crash: what a class does not say makes the utilisation null (NaN, which is null in
    metrics.jsonl). `verify` asks for as many placeholders as the connector gives."""
    model = model_of(name, num_queries=3)
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(model, _convert_="all")(chunk=chunk)
    initialize(module, seed=1)
    batch = _batch(module, torch.ones(2, 4, dtype=torch.int64), seed=0)
    assert batch.tokens.shape == (2, 3 + 4)
    with torch.no_grad():
        assert module(batch, output="logits").isfinite().all()
    flops = module.flops(batch)
    assert math.isfinite(flops["image"]) is known and math.isfinite(flops["language"])
    if known:
        assert importing._chat(model)["train"]["build"]["tokens_per_tile"] == 3
