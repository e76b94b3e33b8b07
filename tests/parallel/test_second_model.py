"""A process that has groups keeps them for a second model, at the same sizes alone."""

from __future__ import annotations

import pytest

from nvmm.parallel.setup import Parallel
from tests.ranks import run_ranks


def twice(rank: int, world: int, init: str) -> tuple[bool, str]:
    from megatron.core import parallel_state

    sizes = Parallel(tensor_model_parallel_size=2)
    sizes.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    group = parallel_state.get_tensor_model_parallel_group()
    sizes.initialize(seed=1, rank=rank, world_size=world)
    kept = parallel_state.get_tensor_model_parallel_group() is group
    with pytest.raises(ValueError, match="tensor_model_parallel_size=1 must be 2") as error:
        Parallel().initialize(seed=1, rank=rank, world_size=world)
    return kept, str(error.value)


def test_a_second_model_has_the_groups_of_the_first() -> None:
    for kept, message in run_ranks(twice, 2):
        assert kept
        assert message.endswith("as of the process's other models")
