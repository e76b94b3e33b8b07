"""Audio Flamingo 3 on every layout equals one rank: windows whole, ending in silence, and none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nvmm.config.check import config_dir, to_plain
from nvmm.proof.equivalence import ONE_RANK, Result, compare, run
from nvmm.proof.miniature import double, shrink
from tests.proof.test_equivalence import LAYOUTS

ROWS = [("tp2_sp", True)]
SLOW = [
    (layout, packed)
    for layout in ("tp2_sp", "pp2", "dp2_overlap", "cp2", "sharded", "tp2_sp_pp2")
    for packed in (False, True)
    if (layout, packed) not in ROWS
]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """All three parts are trained."""
    given = ["experiment=audio_flamingo3/tiny", "tokenizer.path=t", "data.train.shards=a.tar"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return double(shrink(to_plain(compose("train", given))))


@pytest.fixture(scope="module")
def references() -> dict[bool, Result]:
    return {}


@pytest.mark.parametrize(
    ("layout", "packed"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_layout_equals_one_rank(
    layout: str,
    packed: bool,
    config: dict[str, Any],
    references: dict[bool, Result],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if packed not in references:
        weights: Path = tmp_path_factory.mktemp("audio3") / "weights"
        references[packed] = run(config, ONE_RANK, packed=packed, weights=weights)
    expected = references[packed]
    result = run(config, LAYOUTS[layout], packed=packed, reference=expected.weights)
    comparison = compare(expected, result)
    assert comparison.equal, str(comparison)
    names = expected.gradients[0].keys()
    for part in ("audio.conv1.", "audio.decoder.final_layernorm.", "audio_connector.linear_fc2."):
        assert any(name.startswith(part) for name in names), part
