"""The decoder against Transformers' Qwen2 and Llama; packing, padding and masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, Batch
from nvmm.parallel.setup import Parallel, Precision
from tests import oracle, tiny
from tests.ranks import run_ranks


def language(**changes: Any) -> Any:
    config = tiny.language()
    config["transformer"] |= changes.pop("transformer", {})
    chunk = Parallel(**changes.pop("parallel", {})).chunks(Precision())[0]
    return instantiate(config | changes, _convert_="all")(chunk=chunk).eval()


def initialized(**changes: Any) -> Any:
    from nvmm.parallel.parameters import initialize

    model = language(**changes)
    initialize(model, seed=5)
    return model


def batch_of(rows: list[Tensor], packed: bool = False) -> Batch:
    """Rows padded on the right with 0, or one packed row; the label is the token itself."""
    lengths = [len(row) for row in rows]
    if packed:
        tokens = torch.cat(rows)[None]
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    else:
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        position_ids = torch.arange(tokens.shape[1]).expand_as(tokens)
        bounds = None
    return Batch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.ones(tokens.shape),
        position_ids=position_ids,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        sample_ids=torch.arange(len(rows)),
        owners=torch.arange(len(rows)),
        cu_seqlens=bounds,
    )


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 509, (n,), generator=generator) for n in lengths]


CONFIG = {
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_logits_equal_transformers(kind: str) -> None:
    import transformers

    reference = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**CONFIG)
    )
    oracle.randomize(reference, std=0.1)
    model = language(transformer={"add_qkv_bias": kind == "Qwen2"})
    oracle.load(model, oracle.decoder_weights(reference))
    batch = batch_of(rows_of(11, 11))
    with torch.no_grad():
        theirs = reference(batch.tokens).logits
        ours = model(batch, output="logits")
        assert ours.shape == (2, 11, 509)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        # The three padding rows of the vocabulary (filled with 3.0) are outside the soft-max.
        loss = torch.nn.functional.cross_entropy(
            theirs.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        torch.testing.assert_close(model(batch).flatten(), loss, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("world")
def test_packed_segments_equal_separate_rows() -> None:
    model, rows = initialized(), rows_of(7, 1, 12, 4)
    with torch.no_grad():
        packed = model(batch_of(rows, packed=True), output="logits")[0]
        for row, part in zip(rows, packed.split([len(r) for r in rows]), strict=True):
            alone = model(batch_of([row]), output="logits")[0]
            torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("packed", [True, False])
def test_another_sample_changes_nothing(packed: bool) -> None:
    """Bit-equal, for neighbours in a pack and for rows of a padded batch with their padding."""
    model, rows = initialized(), rows_of(6, 9, 5)
    changed = [rows[0], (rows[1] + 1) % 509, rows[2]]
    with torch.no_grad():
        first, second = (
            model(batch_of(x, packed=packed), output="logits") for x in (rows, changed)
        )
    if packed:
        first, second = (x[0].split([6, 9, 5]) for x in (first, second))
    for i in (0, 2):
        assert torch.equal(first[i][: len(rows[i])], second[i][: len(rows[i])])
    assert not torch.equal(first[1], second[1])


def _packed_logits(
    rank: int, world_size: int, init: str, batches: list[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """(positions, logits there) of each batch on this context-parallel rank."""
    from nvmm.parallel.context_parallel import positions

    Parallel(context_parallel_size=world_size).initialize(
        seed=1, rank=rank, world_size=world_size, init_method=init
    )
    model = initialized(parallel={"context_parallel_size": world_size})
    with torch.no_grad():
        return [
            (positions(batch, world_size, rank), model(batch, output="logits")[0])
            for batch in batches
        ]


def test_packed_segments_under_context_parallelism() -> None:
    """Equal to separate rows at one rank; another sample changes nothing, bit for bit."""
    rows = rows_of(8, 4, 12)
    changed = [rows[0], (rows[1] + 1) % 509, rows[2]]
    alone = [batch_of([row], packed=True) for row in rows]
    whole = [torch.empty(24, 509), torch.empty(24, 509)]
    for result in run_ranks(_packed_logits, 2, [batch_of(x, packed=True) for x in (rows, changed)]):
        for logits, (index, part) in zip(whole, result, strict=True):
            logits[index] = part
    first, second = (x.split([8, 4, 12]) for x in whole)
    for ours, (_, separate) in zip(first, run_ranks(_packed_logits, 1, alone)[0], strict=True):
        torch.testing.assert_close(ours, separate, atol=1e-5, rtol=0)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert not torch.equal(first[1], second[1])


@pytest.mark.usefixtures("world")
def test_key_spans_make_left_padding_invisible() -> None:
    model, row = initialized(), rows_of(6)[0]
    padded = torch.cat([torch.tensor([17, 18, 19]), row])
    other = torch.cat([torch.tensor([1, 2, 3]), row])
    spans = torch.tensor([[3, 9]], dtype=torch.int32)
    with torch.no_grad():
        alone = model(batch_of([row]), output="logits")
        left = model(batch_of([padded]), output="logits", key_spans=spans)
        again = model(batch_of([other]), output="logits", key_spans=spans)
        unmasked = model(batch_of([padded]), output="logits")
    torch.testing.assert_close(left[:, 3:], alone, atol=1e-5, rtol=0)
    assert torch.equal(left[:, 3:], again[:, 3:])
    assert (unmasked[:, 3:] - alone).abs().max() > 1e-3


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_positions_are_the_batch_s_and_relative(share: float) -> None:
    model, batch = initialized(rotary_percent=share), batch_of(rows_of(9, 9))
    shifts = torch.tensor([[40], [3000]])
    moved, other = (
        dataclasses.replace(batch, position_ids=ids)
        for ids in (batch.position_ids + shifts, batch.position_ids.flip(1))
    )
    with torch.no_grad():
        expected, found, reversed_ = (model(b, output="logits") for b in (batch, moved, other))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert (reversed_[:, 1:] - expected[:, 1:]).abs().amax(-1).min() > 1e-2


@pytest.mark.usefixtures("world")
def test_layers_without_positions() -> None:
    """mcore's no_rope_freq: 1 leaves no layer that knows of them, 2 every other one."""
    batch = batch_of(rows_of(9))
    moved = dataclasses.replace(batch, position_ids=batch.position_ids.flip(1))
    for frequency, same in ((1, True), (2, False)):
        model = initialized(transformer={"no_rope_freq": frequency})
        with torch.no_grad():
            outputs = [model(b, output="logits") for b in (batch, moved)]
        assert torch.equal(*outputs) == same


@pytest.mark.usefixtures("world")
def test_recompute_has_its_own_micro_batch_s_positions() -> None:
    """Backward passes that wait for other forward passes, as in a pipeline: the same gradients."""
    model = initialized(parallel={"recompute_granularity": "full"}).train()
    plain = initialized().train()
    rows = rows_of(6, 5)
    batches = [batch_of(rows), batch_of(rows, packed=True), batch_of(rows[::-1], packed=True)]
    losses = [model(batch).sum() for batch in batches]
    for loss in losses:
        loss.backward()
    for batch in batches:
        plain(batch).sum().backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.usefixtures("world")
def test_ignored_labels_and_hidden_output() -> None:
    model, batch = initialized(), batch_of(rows_of(5))
    with torch.no_grad():
        assert model(batch, output="hidden").shape == (5, 1, 64)
        labels = batch.labels.clone()
        labels[0, 2] = IGNORE_INDEX
        loss = model(dataclasses.replace(batch, labels=labels))
        assert loss.shape == (1, 5) and loss.isfinite().all()


@pytest.mark.usefixtures("world")
def test_vocabulary_must_fit() -> None:
    with pytest.raises(ValueError, match=r"model\.padded_vocab_size=500 must be at least"):
        language(padded_vocab_size=500)
