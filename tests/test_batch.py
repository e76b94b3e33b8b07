"""What a Batch refuses and how its tensors are mapped."""

from __future__ import annotations

import pytest
import torch

from nvmm.batch import IMAGE, Batch
from nvmm.proof.synthetic import synthetic_steps
from tests import tiny


def _fields(rows: int, length: int) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    return {
        "tokens": zeros,
        "labels": zeros,
        "loss_mask": zeros.float(),
        "position_ids": zeros,
        "lengths": torch.full((rows,), length),
        "sample_ids": torch.arange(rows),
        "owners": torch.arange(rows),
    }


def test_shapes_must_agree() -> None:
    fields = _fields(2, 3) | {"labels": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\), expected \(2, 3\)"):
        Batch(**fields)


def test_a_packed_batch_has_one_row() -> None:
    with pytest.raises(ValueError, match="one row, got 2"):
        Batch(**_fields(2, 3), cu_seqlens=torch.tensor([0, 3]))
    fields = _fields(1, 7) | {"lengths": torch.tensor([2, 4])}
    packed = Batch(**fields, cu_seqlens=torch.tensor([0, 2, 7]))
    with pytest.raises(ValueError, match=r"lengths has shape \(1,\), expected \(2,\)"):
        Batch(**_fields(1, 7), cu_seqlens=torch.tensor([0, 2, 7]))
    assert packed.max_seqlen == 5
    assert Batch(**_fields(2, 3)).max_seqlen == 3


def test_map_reaches_media_and_keeps_numbers() -> None:
    batch = synthetic_steps(tiny.config(tiny.multimodal()), 1, 2)[0][0]
    double = batch.map(lambda x: x * 2)
    assert torch.equal(double.tokens, batch.tokens * 2)
    image = double.media[IMAGE]
    assert torch.equal(image.positions, batch.media[IMAGE].positions * 2)
    assert image.placeholder_id == batch.media[IMAGE].placeholder_id
    assert batch.to("cpu").num_tokens == batch.num_tokens == int((batch.loss_mask > 0).sum())
