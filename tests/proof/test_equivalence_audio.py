"""Audio Flamingo on every layout equals one rank: clips unevenly spread, and none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvmm.batch import Batch
from nvmm.data.collate import collate
from nvmm.parallel.setup import Parallel
from nvmm.proof.equivalence import ONE_RANK, Result, compare, run
from nvmm.proof.miniature import double
from tests import tiny
from tests.models.test_audio_flamingo import sample
from tests.models.test_audio_flamingo import tiny as audio_flamingo
from tests.proof.test_equivalence import LAYOUTS

CLIPS = [
    # Micro-batches of two rows. Under DP 2 a rank has every second one of a step.
    [[[3, 1], []], [[1], [2, 1, 1]], [[], []], [[4], [1]]],
    [[[1], [2]], [[], []], [[], [5, 1]], [[], []]],  # the second rank hears nothing
    [[[], [1]], [[2, 2], []], [[1, 1, 1], [3]], [[], [1]]],
]
"""The windows of each clip of each row; the third micro-batch of the first step is text alone."""


def steps(config: dict[str, Any], packed: bool) -> list[list[Batch]]:
    multiple = max(4, Parallel(**config.get("parallel", {})).sequence_multiple)
    numbers = iter(range(100))
    return [
        [
            collate(
                [sample(clips, next(numbers)) for clips in rows],
                pad_id=0,
                pad_multiple=multiple,
                segment_multiple=multiple if packed else 1,
                packed=packed,
            )
            for rows in micro_batches
        ]
        for micro_batches in CLIPS
    ]


def padded(config: dict[str, Any]) -> list[list[Batch]]:
    return steps(config, packed=False)


def packed(config: dict[str, Any]) -> list[list[Batch]]:
    return steps(config, packed=True)


def model(**language: Any) -> dict[str, Any]:
    """OPT's kind of decoder: learned positions and a tied output layer."""
    config = audio_flamingo()
    config["language"] |= language
    config["language"]["transformer"] |= {"num_layers": 4}
    return config


ROTARY = {"position_embedding_type": "rope", "position_offset": 0}
MODELS = {
    "trained": (double(tiny.config(model())), padded),
    "frozen": (double(tiny.config(model(), freeze=["audio.*"])), packed),
    "rotary": (double(tiny.config(model(**ROTARY), freeze=["audio.*"])), packed),
}
ROWS = [("frozen", "tp2_sp"), ("trained", "pp2")]
SLOW = [
    (name, layout)
    for name in ("trained", "frozen")
    for layout in ("tp2", "tp2_sp", "pp2", "pp2_vp2", "dp2", "dp2_overlap", "cp2", "tp2_sp_pp2")
    if (name, layout) not in ROWS
] + [("rotary", "tp2_sp_pp2"), ("rotary", "cp2")]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return {}


@pytest.mark.parametrize(
    ("name", "layout"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_layout_equals_one_rank(
    name: str,
    layout: str,
    references: dict[str, Result],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config, make = MODELS[name]
    if name not in references:
        weights: Path = tmp_path_factory.mktemp(name) / "weights"
        references[name] = run(config, ONE_RANK, make_steps=make, weights=weights)
    expected = references[name]
    result = run(config, LAYOUTS[layout], make_steps=make, reference=expected.weights)
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)
    names = expected.gradients[0].keys()
    assert any(n.startswith("audio_connector.layers.2.") for n in names)
    assert any(n.startswith("audio.") for n in names) == (name == "trained")
    learned = any(n.endswith("embedding.position_embeddings.weight") for n in names)
    assert learned == (name != "rotary")
