"""Which keys may change at a resume."""

from __future__ import annotations

from nvmm.config.changes import compare

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
