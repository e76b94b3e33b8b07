"""Turns by weight: shares at every prefix, seeking, epochs, and config lists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmm.data.order import mixture
from nvmm.data.order.blend import MAX_PERIOD, Blend, Source, integer_weights
from nvmm.data.samples.retrieval import RetrievalBuilder
from nvmm.data.shards.dataset import Dataset

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9), st.sampled_from([97, 1000, 20_000])), min_size=1, max_size=9
)


def blend(weights: list[Any], **options: Any) -> Blend:
    return Blend(
        [Source(f"d{i}", 10**9, Fraction(weight), **options) for i, weight in enumerate(weights)]
    )


@settings(max_examples=50)
@given(weights=WEIGHTS)
def test_every_prefix_holds_each_dataset_within_one_sample_of_its_share(weights: list[int]) -> None:
    count = 3000
    sources, places = blend(weights).locate(0, count)
    turns = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    shares = np.arange(1, count + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(turns - shares).max() < 1
    for index in range(len(weights)):
        mine = places[sources == index]
        assert np.array_equal(mine, np.arange(len(mine))), "each dataset is taken in its order"


@settings(max_examples=50)
@given(
    weights=WEIGHTS,
    first=st.integers(0, 10**12),
    count=st.integers(1, 400),
    consumed=st.integers(0, 10**6),
)
def test_seeking_equals_walking(weights: list[int], first: int, count: int, consumed: int) -> None:
    one = blend(weights, consumed=consumed)
    sources, places = one.locate(first, count)
    before, after = one.counts(first), one.counts(first + count)
    for index, (start, stop) in enumerate(zip(before, after, strict=True)):
        assert places[sources == index].tolist() == list(range(start, stop))
    assert sum(after) == first + count + consumed * len(weights)


@settings(max_examples=50)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=6
    ),
    cut=st.integers(1, 50),
)
def test_datasets_leave_after_their_epochs(sizes: list[tuple[int, int, int]], cut: int) -> None:
    def make() -> Blend:
        return Blend(
            [Source(f"d{i}", n, Fraction(w), epochs=e) for i, (n, w, e) in enumerate(sizes)]
        )

    total = sum(n * e for n, _, e in sizes)
    sources, places = make().locate(0, total + 10)
    assert len(sources) == total, "the blend ends when every dataset has"
    for index, (n, _, epochs) in enumerate(sizes):
        assert places[sources == index].tolist() == list(range(n * epochs))
    seeking = make()
    pieces = [seeking.locate(at, min(cut, total - at)) for at in range(0, total, cut)]
    assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), sources)
    assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), places)
    for at in (1, total // 2, total):
        assert seeking.counts(at) == np.bincount(sources[:at], minlength=len(sizes)).tolist()


def test_the_others_go_on_at_their_weights() -> None:
    sources = [Source("a", 4, Fraction(2), epochs=1), *blend([1, 1]).sources]
    turns = Blend(sources).locate(0, 30)[0]
    last = int(np.flatnonzero(turns == 0)[-1])
    assert np.bincount(turns[: last + 1])[0] == 4 and last in (6, 7)
    assert set(turns[last + 1 :: 2]) != set(turns[last + 2 :: 2])
    assert set(turns[last + 1 :]) == {1, 2}


def test_weights_become_integers() -> None:
    assert integer_weights([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]).tolist() == [
        7,
        2,
        1,
    ]
    awkward = [Fraction(1, 3), Fraction(2**0.5), Fraction(1, 10**9)]
    found = integer_weights(awkward)
    assert found.sum() == MAX_PERIOD and found.min() == 1
    shares = np.array([float(w / sum(awkward)) for w in awkward])
    assert np.abs(found / MAX_PERIOD - shares).max() < 2 / MAX_PERIOD
    with pytest.raises(ValueError, match=r"d0 has weight 0"):
        blend([0, 1])


# -- the list of a config ---------------------------------------------------------------------


def listed(
    make_shards: Callable[..., str], entries: list[dict[str, Any]]
) -> list[mixture.Component]:
    for name, count in (("a", 10), ("b", 30), ("c", 5)):
        pattern = make_shards(count, name)
        for entry in [e for outer in entries for e in (outer, *outer.get("blend", []))]:
            if entry.get("name") == name:
                entry["shards"] = pattern
    options = {"num_negatives": 1, "in_batch_negatives": True, "sequence_length": 8}
    train = Dataset(None, build=functools.partial(RetrievalBuilder, **options))
    return mixture.read(entries, train, {"tokenizer": None})


def weights(found: list[mixture.Component]) -> dict[str, Fraction]:
    return {part.name: part.weight for part in found}


def test_weights_of_a_list(make_shards: Callable[..., str]) -> None:
    by_weight = listed(make_shards, [{"name": "a", "weight": 0.3}, {"name": "b", "weight": 0.9}])
    assert weights(by_weight) == {"a": Fraction(1, 4), "b": Fraction(3, 4)}
    by_size = listed(make_shards, [{"name": "a", "repeat": 2}, {"name": "b"}, {"name": "c"}])
    assert weights(by_size) == {"a": Fraction(4, 11), "b": Fraction(6, 11), "c": Fraction(1, 11)}
    nested = [{"name": "a", "weight": 1}, {"weight": 3, "blend": [{"name": "b"}, {"name": "c"}]}]
    assert weights(listed(make_shards, nested)) == {
        "a": Fraction(1, 4),
        "b": Fraction(3, 4) * Fraction(30, 35),
        "c": Fraction(3, 4) * Fraction(5, 35),
    }
    above_one = [
        {"name": "a", "weight": 7},
        {"weight": 2, "blend": [{"name": "b", "weight": 3}, {"name": "c", "weight": 5}]},
    ]
    assert weights(listed(make_shards, above_one)) == {
        "a": Fraction(7, 9),
        "b": Fraction(2 * 3, 9 * 8),
        "c": Fraction(2 * 5, 9 * 8),
    }
    nested[1]["temperature"] = 2
    tempered = weights(listed(make_shards, nested))
    assert tempered["b"] / tempered["c"] == pytest.approx(6**0.5)
    assert tempered["a"] == Fraction(1, 4)


def test_chosen_samples_are_the_same_in_every_epoch(make_shards: Callable[..., str]) -> None:
    for window in (None, 4):
        [part] = listed(make_shards, [{"name": "b", "samples": 0.5, "local_window": window}])
        assert part.count == 15
        epochs = [part.numbers(epoch, np.arange(15), 7).tolist() for epoch in range(3)]
        assert len({tuple(sorted(numbers)) for numbers in epochs}) == 1
        assert len({tuple(numbers) for numbers in epochs}) == 3
        assert len(set(epochs[0])) == 15
    with pytest.raises(ValueError, match=r"samples=31 of b must be a fraction, or .* its 30"):
        listed(make_shards, [{"name": "b", "samples": 31}])


def test_names_must_differ(make_shards: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="several datasets named a; give names"):
        listed(make_shards, [{"name": "a"}, {"weight": 1, "blend": [{"name": "a"}]}])
    assert mixture.names([{"shards": "x/*.tar"}, {"shards": ["y", "z"]}]) == ["x/*.tar", "y,z"]


# -- passes over a run ------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([0.025, 0.4, 0.5, 1, 1.2, 3.5, 6])),
        min_size=1,
        max_size=9,
    )
)
def test_a_run_of_passes_gives_each_dataset_as_many(sizes: list[tuple[int, float]]) -> None:
    """Counts are N w, rounded; until one has ended, they are within a sample of their share."""
    wanted = [round(Fraction(str(passes)) * n) for n, passes in sizes]
    sources = [
        Source(f"d{i}", n, Fraction(wanted[i]), epochs=passes)
        for i, (n, passes) in enumerate(sizes)
        if wanted[i]
    ]
    wanted = [count for count in wanted if count]
    if not sources:
        return
    run = Blend(sources)
    assert run.size == sum(wanted)
    turns, places = run.locate(0, run.size + 5)
    assert np.bincount(turns, minlength=len(sources)).tolist() == wanted
    shares = np.outer(np.arange(1, len(turns) + 1), wanted) / sum(wanted)
    given_so_far = np.cumsum(turns[:, None] == np.arange(len(wanted)), axis=0)
    first_end = int((given_so_far == wanted).any(axis=1).argmax())
    assert np.abs(given_so_far - shares)[: first_end + 1].max() < 1
    for index, source in enumerate(sources):
        # The n-th pass begins where the one before has had every sample.
        epochs = places[turns == index] // source.num_samples
        assert np.bincount(epochs)[:-1].tolist() == [source.num_samples] * int(epochs.max())


def test_passes_of_many_samples_are_exact_though_their_weights_are_rounded() -> None:
    """The first 18 SFT sets' kind of spread: 5 million samples, whose ratio no table holds."""
    counts = [1, 70, 12_345, 700_001, 4_300_019]
    sources = [Source(f"d{i}", 2 * n, Fraction(n), epochs=0.5) for i, n in enumerate(counts)]
    run = Blend(sources)
    assert run.size == sum(counts) > MAX_PERIOD
    assert run.counts(run.size) == counts
    assert len(run.locate(run.size - 3, 10)[0]) == 3


def test_passes_of_a_list(make_shards: Callable[..., str]) -> None:
    found = listed(
        make_shards,
        [{"name": "a", "passes": 3.5}, {"name": "b", "passes": 0.1}, {"name": "c", "passes": 1}],
    )
    assert weights(found) == {"a": Fraction(35, 43), "b": Fraction(3, 43), "c": Fraction(5, 43)}
    assert [part.epochs for part in found] == [3.5, 0.1, 1]
    assert Blend([part.source() for part in found]).size == 43
    [part] = listed(make_shards, [{"name": "b", "passes": 0.5, "samples": 10}])
    assert part.source().remaining == 5
    with pytest.raises(ValueError, match=r"passes=0\.01 of b with 30 samples are no sample"):
        listed(make_shards, [{"name": "b", "passes": 0.01}])
