"""Which keys may change at a resume."""

from __future__ import annotations

from typing import Any

import pytest

from nvmm.config.changes import compare, loss_changes
from nvmm.objectives.contrastive import Contrastive
from nvmm.objectives.next_token import NextToken

SAVED = {
    "model": {"vocab_size": 10, "transformer": {"num_layers": 2}},
    "objective": {"_target_": "a"},
    "tokenizer": {"path": "t", "image_token": "a"},
    "optim": {"learning_rate": 1.0},
    "parallel": {"tensor_model_parallel_size": 1},
    "data": {"num_workers": 0, "train": {"shards": ["a.tar"]}},
    "trainer": {"global_batch_size": 4, "micro_batch_size": 2, "log_interval": 1},
    "seed": 1,
}


def _changed(**sections: object) -> dict[str, object]:
    return SAVED | sections


def test_nothing_changed() -> None:
    assert compare(SAVED, SAVED) == ([], [])


def test_layout_workers_and_logging_are_free() -> None:
    current = _changed(
        parallel={"tensor_model_parallel_size": 2, "encoder": "sharded"},
        data={"num_workers": 3, "train": {"shards": ["a.tar"]}},
        trainer={"global_batch_size": 4, "micro_batch_size": 1, "log_interval": 5},
        logger={"wandb": True},
    )
    assert compare(SAVED, current) == ([], [])


def test_a_longer_longest_sequence_is_free() -> None:
    longer = _changed(model=SAVED["model"] | {"max_sequence_length": 9})  # type: ignore[operator]
    assert compare(SAVED, longer) == ([], [])


def test_other_weights_at_the_start_are_listed() -> None:
    """A finished run does not take `init_from` of another one for its own."""
    _, notable = compare(_changed(init_from="runs/a"), _changed(init_from="runs/b"))
    assert [str(change) for change in notable] == ["init_from: 'runs/a' -> 'runs/b'"]


def test_training_changes_are_listed() -> None:
    current = _changed(
        optim={"learning_rate": 2.0},
        data={"num_workers": 0, "train": {"shards": ["b.tar"]}},
        trainer={"global_batch_size": 8, "micro_batch_size": 2, "log_interval": 1},
    )
    refused, notable = compare(SAVED, current)
    assert refused == []
    assert [str(change) for change in notable] == [
        "data.train.shards: ['a.tar'] -> ['b.tar']",
        "optim.learning_rate: 1.0 -> 2.0",
        "trainer.global_batch_size: 4 -> 8",
    ]


def test_another_model_objective_tokenizer_or_seed_is_refused() -> None:
    current = _changed(
        model={"vocab_size": 11, "transformer": {"num_layers": 2, "kv_channels": 4}},
        objective={"_target_": "b"},
        tokenizer={"path": "u", "image_token": "b"},
        seed=2,
    )
    refused, notable = compare(SAVED, current)
    assert notable == []
    assert {change.key for change in refused} == {
        "model.vocab_size",
        "model.transformer.kv_channels",
        "objective._target_",
        "tokenizer.image_token",
        "seed",
    }


def test_an_absent_leaf_has_its_constructor_s_default() -> None:
    cross = {"_target_": "nvmm.modules.cross_attention.CrossAttention"}
    optim = {"_target_": "nvmm.training.optim.Optim", "learning_rate": 1.0}
    short = SAVED | {"model": {"cross_attention": cross}, "optim": optim}
    long = SAVED | {
        "model": {"cross_attention": cross | {"gate": "scalar", "interval": 1, "offset": None}},
        "optim": optim | {"betas": [0.9, 0.95], "schedule": "cosine"},
    }
    assert compare(short, long) == compare(long, short) == ([], [])
    long["model"]["cross_attention"]["gate"] = "channel"
    long["optim"]["schedule"] = "linear"
    refused, notable = compare(short, long)
    assert list(map(str, refused)) == ["model.cross_attention.gate: 'scalar' -> 'channel'"]
    assert list(map(str, notable)) == ["optim.schedule: 'cosine' -> 'linear'"]


LORA = {"_target_": "nvmm.modules.lora.Lora", "targets": ["*"], "rank": 8}


@pytest.mark.parametrize(
    ("saved", "current", "key"),
    [(LORA, LORA | {"rank": 4}, "lora.rank"), (LORA, None, "lora"), (None, LORA, "lora")],
    ids=["other", "none", "new"],
)
def test_other_adapters_are_refused(saved: Any, current: Any, key: str) -> None:
    refused, notable = compare(_changed(lora=saved), _changed(lora=current))
    assert [change.key for change in refused] == [key]
    assert notable == []


def test_another_precision_is_listed() -> None:
    refused, notable = compare(
        _changed(precision={"dtype": "bf16", "fp8": None}),
        _changed(precision={"dtype": "fp32", "fp8": {"recipe": "delayed"}}),
    )
    assert refused == []
    assert [change.key for change in notable] == ["precision.dtype", "precision.fp8"]


def test_another_context_parallel_size_is_listed_where_it_changes_the_packs() -> None:
    layout = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    for pack in (False, True):
        saved = SAVED | {"data": {"pack": pack}}
        refused, notable = compare(saved, saved | {"parallel": layout})
        assert refused == []
        keys = [change.key for change in notable]
        assert keys == ["parallel.context_parallel_size"] * pack


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("objective", "ranks", "layout", "micro", "counts"),
    [
        (NextToken(), 4, {}, 2, None),
        (Contrastive(), 4, {}, 2, None),
        (Contrastive(), 1, {}, 8, None),
        (Contrastive(grad_cache=False), 2, {}, 4, (4, 8)),
        (Contrastive(grad_cache=False), 4, {}, 1, None),  # as many at once
        (Contrastive(grad_cache=False, cross_rank_negatives=False), 2, {}, 4, None),
        (Contrastive(grad_cache=False, cross_rank_negatives=False), 1, {}, 2, (4, 2)),
        (Contrastive(cross_rank_negatives=False), 2, {}, 4, (16, 8)),
        (Contrastive(cross_rank_negatives=False), 2, TP2, 4, None),
        (Contrastive(cross_rank_negatives=False), 4, {"context_parallel_size": 2}, 4, (16, 8)),
    ],
)
def test_how_many_samples_one_loss_compares(
    objective: Any, ranks: int, layout: dict[str, int], micro: int, counts: tuple[int, int] | None
) -> None:
    """Saved: 16 samples, micro-batches of 4, one rank."""

    def config(micro: int, layout: dict[str, int]) -> dict[str, Any]:
        trainer = {"global_batch_size": 16, "micro_batch_size": micro}
        return {"parallel": layout, "trainer": trainer}

    found = loss_changes(
        (config(4, {}), 1), (config(micro, layout), ranks), objective.samples_in_loss
    )
    assert [(change.saved, change.current) for change in found] == ([counts] if counts else [])
    assert all("samples in one loss" in change.key for change in found)
