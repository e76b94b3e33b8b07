"""The table of rotations against mcore's own angles, and what the attention refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from nvmm.modules.rotary import REFUSED, rotation_table
from tests.models.test_language import language

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "partial": {"rotary_percent": 0.5},
    "llama3": {"rotary_base": 500000, "rope_scaling": True, "rope_scaling_factor": 4.0},
    "linear": {"seq_len_interpolation_factor": 3.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_mcore_s_angles(name: str) -> None:
    """Bit by bit, in any order of positions, with repetitions."""
    options = {"rotary_percent": 1.0, "use_cpu_initialization": True} | OPTIONS[name]
    embedding = RotaryEmbedding(16, **options)
    positions = torch.tensor([[0, 1, 2, 3], [30000, 7, 7, 8192]])
    table = rotation_table(embedding, positions)
    cosine, sine = embedding.get_cos_sin(30001)
    assert table.dtype == torch.float32 and table.is_contiguous()
    assert table.shape == (4, 2, 8 if name == "partial" else 16)
    assert torch.equal(table, torch.cat([cosine, sine], -1)[positions.t()])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", REFUSED)
def test_another_order_or_place_of_the_rotation_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"transformer\.{name}=True must be false: queries and"):
        language(transformer={name: True})
