"""Windows, packs and positions: nothing lost, repeated or reordered, whatever changes."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmm.config.batch_sizes import BatchSizes
from nvmm.data.order import sample_ids
from nvmm.data.order.mixture import Component
from nvmm.data.order.order import Order, Settings
from nvmm.data.order.packing import assign
from nvmm.data.order.permutation import Permutation

LENGTHS = {"short": 16, "long": 40}


class Virtual:
    """As many samples as one likes, of which nothing exists but their lengths."""

    local_window = None

    def __init__(self, size: int, salt: int = 0) -> None:
        self.size = size
        self.salt = salt
        self.index = self
        self.path = Path("virtual")

    def __len__(self) -> int:
        return self.size

    def epoch(self, epoch: int, seed: int, count: int) -> Permutation:
        return Permutation(self.size, seed, epoch)

    def estimates(self, numbers: np.ndarray) -> np.ndarray:
        return numbers % 7 + self.salt

    def lengths(self, digest: str) -> Any:
        return None if digest == "gone" else _Lengths(LENGTHS[digest])


class _Lengths:
    """Lengths 1..longest by number, two tiles for every third sample, -1 for every 50th."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        tokens = np.where(numbers % 50 == 49, -1, numbers * 7919 % self.longest + 1)
        return np.stack([tokens, 2 * (numbers % 3 == 0)], axis=1)


def part(name: str, size: int, weight: Any = 1, epochs: int | None = None) -> Component:
    return Component(name, Virtual(size), Fraction(weight), epochs, size)  # type: ignore[arg-type]


ONE = [part("one", 1000)]
THREE = [part("a", 300, 3), part("b", 10**9, 2), part("c", 50, 1, epochs=2)]
PLAIN = Settings(64)
PACKED = Settings(64, 40, 1, {name: "short" for name in "abcde"} | {"one": "short"})
LONGER = Settings(64, 80, 4, {name: "long" for name in "abcde"} | {"one": "long"})


def order(
    parts: list[Component],
    setting: Settings = PLAIN,
    size: int | BatchSizes = 8,
    position: Any = None,
    seed: int = 3,
) -> Order:
    saved = None if position is None else json.loads(json.dumps(position))
    return Order(parts, seed, setting, size, saved)


def samples(one: Order, steps: range) -> list[int]:
    return [sample for k in steps for pack in one.batch(k) for sample in pack.samples]


def blend_order(parts: list[Component], count: int) -> list[int]:
    """The blend's slots as ids, without any window or pack."""
    return samples(order(parts, Settings(1), size=1), range(count))


def test_every_sample_comes_once_an_epoch() -> None:
    stream = samples(order(ONE), range(250))
    numbers = np.array(stream) & (2**32 - 1)
    assert sorted(numbers[:1000]) == sorted(numbers[1000:]) == list(range(1000))
    assert numbers[:1000].tolist() != numbers[1000:].tolist()
    assert [epoch for epoch in sample_ids.split(stream)[1][::1000]] == [0, 1]
    assert len(set(stream)) == 2000, "ids differ between epochs"
    assert samples(order(ONE, seed=4), range(250)) != stream


@pytest.mark.parametrize("setting", [PLAIN, PACKED], ids=["plain", "packed"])
def test_global_batches_are_cuts_of_one_list(setting: Settings) -> None:
    """Batch size decides where the list is cut and nothing else."""
    one = order(THREE, setting, size=6)
    packs = [pack for k in range(50) for pack in one.batch(k)]
    other = order(THREE, setting, size=25)
    assert [pack for k in range(12) for pack in other.batch(k)] == packs
    # whole windows hold exactly the blend's slots
    done, window = Counter[int](), 0
    expected = blend_order(THREE, 64 * 4)
    for pack in packs:
        done.update(pack.samples)
        if done.total() == 64 * (window + 1):
            window += 1
            assert done == Counter(expected[: 64 * window])
            if window == 4:
                break
    assert window == 4
    if setting is PACKED:
        assert max(pack.length for pack in packs) <= 40
        full = [pack.length for pack in packs if len(pack.samples) > 1]
        assert np.mean(full) > 38
    else:
        assert [pack.samples[0] for pack in packs[:256]] == expected


RAMP = BatchSizes(25, ((3, 5), (8, 7)))


@pytest.mark.parametrize("setting", [PLAIN, PACKED], ids=["plain", "packed"])
def test_a_batch_ramp_cuts_the_same_list(setting: Settings) -> None:
    """Sample k comes at the same place, and any step resumes, within a stage and at its ends."""
    plain = order(THREE, setting, size=1)
    ramped = order(THREE, setting, RAMP)
    place = 0
    for k in range(16):
        batch = ramped.batch(k)
        assert len(batch) == (3 if k < 5 else 8 if k < 12 else 25)
        assert batch == [pack for i in range(len(batch)) for pack in plain.batch(place + i)]
        place += len(batch)
        position = ramped.position(k)
        resumed = order(THREE, setting, RAMP, position)
        assert resumed.batch(k) == batch
        ahead = order(THREE, setting, RAMP, position)
        assert ahead.batch(15) == order(THREE, setting, RAMP).batch(15), "over the stages' ends"
        assert ahead.position(k) == position
    assert RAMP.before(16) == place


@settings(max_examples=25)
@given(k=st.integers(0, 10**7), packed=st.booleans(), size=st.integers(1, 40))
def test_seeking_equals_walking(k: int, packed: bool, size: int) -> None:
    parts = [part("a", 10**9, 3), part("b", 10**6, 1)]
    setting, k = (PACKED, k % 60) if packed else (PLAIN, k)
    sought = order(parts, setting, size)
    position = sought.position(k)
    batches = [sought.batch(k + i) for i in range(4)]
    resumed = order(parts, setting, size, position)
    assert [resumed.batch(k + i) for i in (0, 1, 2, 3)] == batches
    assert [resumed.batch(k + i) for i in (2, 0)] == [batches[2], batches[0]]
    assert pickle.loads(pickle.dumps(resumed)).batch(k + 1) == batches[1]
    assert resumed.position(k) == position
    assert len(json.dumps(position)) < 900
    if not packed and k < 2000:
        walked = order(parts, setting, size)
        assert [walked.batch(i) for i in range(k + 1)][-1] == batches[0]


SETTINGS = {"plain": PLAIN, "packed": PACKED, "longer": LONGER, "wider": Settings(100)}


@settings(max_examples=30)
@given(
    legs=st.lists(
        st.tuples(st.sampled_from(sorted(SETTINGS)), st.integers(1, 12), st.integers(1, 9)),
        min_size=2,
        max_size=6,
    )
)
def test_packing_may_change_at_any_step(legs: list[tuple[str, int, int]]) -> None:
    """Each leg: settings, global batch size, steps. Then to the end of the last window."""
    seen: list[int] = []
    position, step = None, 0
    for name, size, steps in legs:
        one = order(THREE, SETTINGS[name], size, position)
        seen += samples(one, range(step, step + steps))
        step += steps
        position = one.position(step)
    assert len(set(seen)) == len(seen), "nothing twice"
    one = order(THREE, SETTINGS[legs[-1][0]], 1, position)
    before, window = len(seen), one.position(step)
    while one.position(step)["first"] == window["first"]:
        seen += samples(one, range(step, step + 1))
        step += 1
    # the last pack read was the first of the next window
    last = one.batch(step - 1)[0].samples
    kept = seen[: len(seen) - len(last)] if len(seen) > before else seen
    assert Counter(kept) == Counter(blend_order(THREE, len(kept))), "nothing lost"


def test_a_window_may_be_cut_three_times() -> None:
    """Rows of 40, of 80, of 40 again, single samples: each cut is planned again as it was.

    The window has many groups of rows, which a plan shuffles by its seed.
    """
    seen: list[int] = []
    position, step = None, 0
    packed, longer, plain = (replace(setting, window=512) for setting in (PACKED, LONGER, PLAIN))
    for setting, steps in ((packed, 9), (longer, 7), (packed, 12), (plain, 5), (longer, 4)):
        one = order(THREE, setting, 1, position)
        seen += samples(one, range(step, step + steps))
        step += steps
        position = one.position(step)
        assert position["first"] == 0, "all of it in one window"
        # A resume without a change reads what the run would have read.
        again = order(THREE, setting, 1, position)
        assert samples(again, range(step, step + 3)) == samples(one, range(step, step + 3))
    assert len(position["cuts"]) == 5
    one = order(THREE, plain, 1, position)
    seen += samples(one, range(step, step + 512 - len(seen)))
    assert Counter(seen) == Counter(blend_order(THREE, 512))


@pytest.mark.parametrize("then", [PACKED, LONGER, PLAIN], ids=["same", "longer", "plain"])
def test_samples_that_changed_since_they_were_counted_are_refused(
    then: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the open window cannot be made again: its samples would be lost or repeated."""
    one = order(THREE, PACKED, 1)
    position = one.position(3)
    old = {**position, "cuts": [{**position["cuts"][0]}]}
    assert len(json.dumps(order(THREE).position(3))) < len(json.dumps(position)) < 900
    expected = samples(one, range(3, 40))
    assert samples(order(THREE, PACKED, 1, position), range(3, 40)) == expected
    monkeypatch.setitem(LENGTHS, "short", 15)
    with pytest.raises(ValueError, match=r"other numbers of tokens .* \(one of a, b, c\)"):
        order(THREE, then, 1, position)
    del old["cuts"][0]["counts"]  # as runs of before saved it
    order(THREE, then, 1, old)


def test_a_dataset_joins_with_the_next_window() -> None:
    first = order(THREE, PACKED, size=5)
    seen = samples(first, range(7))
    four = [THREE[0], part("new", 40, 6), *THREE[1:]]
    packed = Settings(64, 40, 1, PACKED.lengths | {"new": "short"})
    second = order(four, packed, 5, first.position(7))
    left = 64 - len(seen) % 64
    assert second.changes == [
        "the rest of the open window is planned anew: lengths",
        "new is new in the blend, weight 6",
        f"this holds after the {left} samples left of the open window",
    ]
    stream = samples(second, range(7, 60))
    assert Counter(seen + stream[:left]) == Counter(blend_order(THREE, len(seen) + left))
    datasets, _, _ = sample_ids.split(stream[left : left + 120])
    # three datasets keep their numbers, the new one gets the next; weights 3, 6, 2, 1
    assert np.abs(np.bincount(datasets) - np.array([30, 20, 10, 60])).max() <= 30
    everything = seen + stream
    assert len(set(everything)) == len(everything)
    # a resume within the new blend goes on in it, without a word
    third = order(four, packed, 5, second.position(40))
    assert third.changes == []
    assert samples(third, range(40, 50)) == samples(second, range(40, 50))


def test_a_changed_weight_and_a_lost_dataset() -> None:
    first = order(THREE)
    seen = samples(first, range(9))
    two = [part("a", 300, 1), part("b", 10**9, 1)]
    second = order(two, position=first.position(9))
    assert "c is gone from the blend" in second.changes
    assert "weight of a: 3 -> 1" in second.changes
    stream = samples(second, range(9, 40))
    assert 2 not in sample_ids.split(stream)[0]
    assert len(set(seen + stream)) == len(seen + stream)
    missing = Counter(blend_order(THREE, 128)) - Counter(seen + stream)
    assert set(sample_ids.split(list(missing))[0]) == {2}, (
        "only what cannot be read any more is left out"
    )
    # c comes back within the window: what is left of it is read after all
    third = order(THREE, position=second.position(11))
    stream = samples(second, range(9, 11)) + samples(third, range(11, 40))
    assert Counter(blend_order(THREE, 128)) - Counter(seen + stream) == Counter()
    packed = order(THREE, PACKED)
    samples(packed, range(5))
    with pytest.raises(ValueError, match=r"c is gone, .* set its epochs to 0 instead"):
        order(two, PACKED, position=packed.position(5))
    idle = [*two, part("c", 50, 1, epochs=0)]
    stream = samples(order(idle, PACKED, position=packed.position(5)), range(5, 40))
    assert (sample_ids.split(stream)[0] == 2).sum() < 64


def test_positions_of_another_run_are_refused() -> None:
    position = order(THREE).position(5)
    with pytest.raises(ValueError, match="seed is 4, but the position was saved with seed=3"):
        order(THREE, position=position, seed=4)
    grown = [part("a", 301, 3), *THREE[1:]]
    with pytest.raises(ValueError, match=r"dataset a has samples=301, .* samples=300; give it an"):
        order(grown, position=position)
    with pytest.raises(ValueError, match="batch 4 lies before batch 5"):
        order(THREE, position=position).batch(4)
    gone = Settings(64, 40, 1, PACKED.lengths | {"a": "gone"})
    position = order(THREE, PACKED).position(5)
    position["cuts"][0]["settings"]["lengths"]["a"] = "gone"
    with pytest.raises(ValueError, match=r"open window of a was planned with are gone"):
        order(THREE, PLAIN, position=position)
    with pytest.raises(ValueError, match="are gone"):
        order(THREE, gone)
    for wrong in ({"window": 0}, {}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Order(ONE, 3, Settings(**{"window": 4} | wrong), 0)
    with pytest.raises(ValueError, match=r"data\.seed=-1"):
        order(ONE, seed=-1)


def test_a_blend_of_epochs_ends() -> None:
    ending = [part("a", 30, 3, epochs=2), part("b", 10, 1, epochs=1)]
    one = order(ending, Settings(16), size=10)
    stream = samples(one, range(7))
    assert len(set(stream)) == len(stream) == 70
    with pytest.raises(ValueError, match=r"end after \{'a': 60, 'b': 10\} samples: every dataset"):
        one.batch(7)
    # A run may end with the blend, at a window's edge as well, and save that it has.
    for count, size in ((30, 10), (32, 8)):
        whole = [part("a", count, epochs=2)]
        steps = 2 * count // size
        walked = order(whole, Settings(16), size)
        samples(walked, range(steps))
        assert order(whole, Settings(16), size).position(steps) == walked.position(steps)


def test_ids_are_one_number_for_dataset_epoch_and_number() -> None:
    assert sample_ids.join(0, 0, 7).tolist() == 7
    every = sample_ids.join([1, 1022], [0, 2**21 - 1], [5, 2**32 - 1])
    assert [part.tolist() for part in sample_ids.split(every)] == [
        [1, 1022],
        [0, 2**21 - 1],
        [5, 2**32 - 1],
    ]
    holes = sample_ids.empty_slot(every)
    assert (holes < sample_ids.FILLING).all()
    assert [part.tolist() for part in sample_ids.split(holes)] == [
        p.tolist() for p in sample_ids.split(every)
    ]
    for values in ((1023, 0, 0), (0, 2**21, 0), (0, 0, 2**32)):
        with pytest.raises(ValueError, match="has no id: it must be below"):
            sample_ids.join(*values)


@settings(max_examples=60)
@given(
    size=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 4),
    rounds=st.integers(1, 4),
    padded=st.booleans(),
    data=st.data(),
)
def test_dealing(size: int, micro: int, rounds: int, padded: bool, data: st.DataObject) -> None:
    count = size * micro * rounds
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count))
    dealt = assign(costs, micro, size, padded=padded)
    assert [[len(batch) for batch in rank] for rank in dealt] == [[micro] * rounds] * size
    assert sorted(itertools.chain(*itertools.chain(*dealt))) == list(range(count))
    if micro == 1:
        sums = [sum(costs[i] for batch in rank for i in batch) for rank in dealt]
        assert max(sums) - min(sums) <= max(costs)
    if padded:
        widths = sorted((max(costs[i] for i in b) for rank in dealt for b in rank), reverse=True)
        assert widths == sorted(costs, reverse=True)[::micro], "as little padding as can be"


@pytest.mark.parametrize("setting", [PLAIN, replace(PLAIN, window=7)])
def test_a_blend_of_passes_that_a_resumed_run_changes_says_where_it_ends(setting: Settings) -> None:
    """As a run says it: samples from the first step on, those of the blend before included."""

    def parts(first: int, *others: str) -> list[Component]:
        return [part("a", 30, 30 * first, first), *(part(name, 20, 20, 1) for name in others)]

    def end(run: Order, step: int) -> int:
        with pytest.raises(ValueError, match="has come to its end"):
            while run.batch(step):
                step += 1
        return step

    first = order(parts(2, "b"), setting)
    assert first.size == 80 and end(order(parts(2, "b"), setting), 0) == 10
    for k in (1, 4):
        saved = json.loads(json.dumps(first.position(k)))
        for changed in (parts(2, "b"), parts(4, "b"), parts(2), parts(2, "b", "c")):
            again = order(changed, setting, position=saved)
            said = again.size
            twice = order(changed, setting, position=again.position(k + 1))
            assert said is not None and said == twice.size
            assert said // 8 == end(again, k) == end(twice, k + 1)


def test_a_blend_that_ended_long_ago_says_what_it_gave() -> None:
    with pytest.raises(ValueError, match=r"its end after \{'a': 12\} samples"):
        order([part("a", 6, 1, 2)], replace(PLAIN, window=4)).batch(100)
