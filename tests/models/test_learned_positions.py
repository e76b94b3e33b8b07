"""A decoder with learned positions (OPT's): packing, padding, generation with a cache, lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.batch import Sample, Text
from nvmm.data.collate import collate
from nvmm.inference.decoding import generate
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.models.test_cross_attending import same_logits_with_a_cache
from tests.models.test_language import batch_of, initialized, rows_of

LEARNED: dict[str, Any] = {"position_embedding_type": "learned_absolute", "position_offset": 2}


def learned(longest: int = 32) -> Any:
    return initialized(**LEARNED, max_sequence_length=longest)


@pytest.mark.usefixtures("world")
def test_positions_restart_in_every_packed_segment() -> None:
    model, rows = learned(12), rows_of(7, 1, 12, 4)
    with torch.no_grad():
        packed = model(batch_of(rows, packed=True), output="logits")[0]
        for row, part in zip(rows, packed.split([len(r) for r in rows]), strict=True):
            alone = model(batch_of([row]), output="logits")[0]
            torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)
        moved = batch_of(rows[:1])
        other = model(dataclasses.replace(moved, position_ids=moved.position_ids.flip(1)))
        assert (other - model(moved)).abs().min() > 1e-3


@pytest.mark.usefixtures("world")
def test_the_rows_that_are_read_lie_behind_the_offset() -> None:
    """Row position + 2 and no other has a gradient; words and given embeddings get the same."""
    model, batch = learned(), batch_of(rows_of(5))
    model(batch).sum().backward()
    table = model.embedding.position_embeddings.weight
    assert table.shape == (34, 64)
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    with torch.no_grad():
        given = model(batch, hidden=model.embed(batch.tokens))
        assert torch.equal(given, model(batch))


@pytest.mark.usefixtures("world")
def test_cached_generation_continues_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths, padded on the left, to the last position of the table."""
    prompts = [
        Sample((Text(row, torch.zeros(len(row))),), i) for i, row in enumerate(rows_of(9, 3))
    ]
    model = learned(13)
    same_logits_with_a_cache(model, prompts, monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": [], "pad_id": 0}
    with pytest.raises(ValueError, match="are more than the model's max_sequence_length=13"):
        generate([model], prompts, **options)


@pytest.mark.usefixtures("world")
def test_padding_may_lie_behind_the_table_and_no_token_may() -> None:
    model, rows = learned(9), rows_of(9, 4)
    samples = [Sample((Text(row, torch.ones(len(row))),), i) for i, row in enumerate(rows)]
    padded = collate(samples, pad_id=0, pad_multiple=8)
    assert padded.tokens.shape == (2, 16)
    with torch.no_grad():
        out = model(padded, output="logits")
        for number, row in enumerate(rows):
            alone = model(batch_of([row]), output="logits")[0]
            torch.testing.assert_close(out[number, : len(row)], alone, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match=r"10 tokens is longer than model\.max_sequence_len"):
            model(batch_of(rows_of(10)))


@pytest.mark.usefixtures("world")
def test_another_kind_of_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="position_embedding_type=alibi must be one of rope, lea"):
        initialized(position_embedding_type="alibi")


@pytest.mark.usefixtures("world")
def test_the_table_has_the_parameters_dtype_and_the_seed_s_values() -> None:
    """mcore makes it in fp32, whatever the model's; a run in bf16 starts from fp32's, rounded."""
    config = tiny.language(**LEARNED, max_sequence_length=32)
    tables = []
    for dtype in ("fp32", "bf16"):
        precision = Precision(dtype)
        [model] = build_chunks(instantiate(config, _convert_="all"), Parallel(), precision, seed=5)
        tables.append(model.embedding.position_embeddings.weight)
        assert tables[-1].dtype == precision.torch_dtype
    assert torch.equal(tables[0].bfloat16(), tables[1])
    assert 0.09 < tables[0].std() < 0.11
