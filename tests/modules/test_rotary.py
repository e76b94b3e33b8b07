"""The table of rotations against mcore's own angles, and what the attention refuses."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from nvmm.modules.rotary import REFUSED, Rotary
from tests.models.test_language import batch_of, language, rows_of


@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_rows_are_mcore_s_angles(percent: float) -> None:
    """Bit by bit, in any order of positions, with repetitions."""
    embedding = RotaryEmbedding(16, rotary_percent=percent, use_cpu_initialization=True)
    positions = torch.tensor([[0, 1, 2, 3], [30000, 7, 7, 8192]])
    batch = batch_of(rows_of(4, 4)).replace(position_ids=positions)
    table = Rotary(10000, int(16 * percent)).table(batch)
    cosine, sine = embedding.get_cos_sin(30001)
    assert table.dtype == torch.float32 and table.is_contiguous()
    assert table.shape == (4, 2, 16 * percent)
    assert torch.equal(table, torch.cat([cosine, sine], -1)[positions.t()])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", REFUSED)
def test_another_order_or_place_of_the_rotation_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"transformer\.{name}=True must be false: queries and"):
        language(transformer={name: True})
