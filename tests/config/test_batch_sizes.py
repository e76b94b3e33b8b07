"""The arithmetic of the batch ramp, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from nvmm.config.batch_sizes import BatchSizes, ramp_problems

NEMOTRON = [
    {"global_batch_size": 768, "tokens": 200 * 10**9},
    {"global_batch_size": 1536, "tokens": 200 * 10**9},
]


def test_every_step_has_its_size_and_what_came_before_it() -> None:
    sizes = BatchSizes(5, ((2, 3), (4, 1)), 10)
    listed = [2, 2, 2, 4, 5, 5, 5]
    assert [sizes.at(step) for step in range(7)] == listed
    assert [sizes.before(step) for step in range(8)] == [sum(listed[:k]) for k in range(8)]
    assert [sizes.steps_of(n) for n in (1, 2, 7, 9, 10, 14, 15, 20)] == [0, 1, 3, 3, 4, 4, 5, 6]
    assert sizes.tokens_before(5) == 150
    assert str(sizes) == "2 to step 3, 4 to step 4, 5 from there on"
    assert str(BatchSizes(5)) == "5"
    assert BatchSizes.of(sizes) is sizes and BatchSizes.of(5) == BatchSizes(5)


def test_nemotron_4_ramp_in_tokens_has_the_steps_of_its_report() -> None:
    """Table 2 of 2406.11704, sequences of 4,096: 63,578 and 31,789 steps, then 7,600 B tokens."""
    last = {"global_batch_size": 2304, "tokens": 7600 * 10**9}
    sizes = BatchSizes.read(1, [*NEMOTRON, last], 4096)
    assert sizes.stages == ((768, 63_578), (1536, 31_789), (2304, 805_325))


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ("768", "trainer.batch_ramp=768 must be a list of {global_batch_size, steps or tokens}"),
        ([3], "trainer.batch_ramp[0]=3 must be {global_batch_size"),
        ([{"global_batch_size": 2}], "must have a length: either steps or tokens"),
        ([{"global_batch_size": 2, "steps": 1, "tokens": 9}], "either steps or tokens"),
        ([{"size": 2, "steps": 1}], "trainer.batch_ramp[0].size=2 is unknown; use global_batch"),
        ([{"steps": 1}], "trainer.batch_ramp[0].global_batch_size=null must be a whole number"),
        ([{"global_batch_size": 0, "steps": 1}], "global_batch_size=0 must be a whole number"),
        ([{"global_batch_size": 2, "steps": True}], "steps=True must be a whole number"),
        ([{"global_batch_size": 2, "tokens": 1.5}], "tokens=1.5 must be a whole number"),
        ([{"global_batch_size": 2, "tokens": 31}], "tokens=31 must be at least the 32 tokens"),
    ],
)
def test_bad_stages_are_named(ramp: Any, message: str) -> None:
    assert any(message in str(problem) for problem in ramp_problems(ramp, 16))
    with pytest.raises(ValueError):
        BatchSizes.read(2, ramp, 16)
