"""Process groups that mcore's parallel_state does not make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from nvmm.parallel.setup import Parallel


def own_group() -> dist.ProcessGroup:
    """Make a group of this rank alone, without the other ranks.

    mcore sends nothing within a group of one. It is gloo's, because NCCL splits its world
    communicator for a new group and would wait for the ranks that do not ask for one.
    """
    return dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def encoder_groups(parallel: Parallel) -> ProcessGroupCollection:
    """Return the groups a media encoder is built with: no pipeline or context parallelism.

    Its tensor-parallel group is the model's when the encoder is sharded (or TP is 1), else this
    rank alone: mcore then builds whole weights on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone = own_group()
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    replicated = parallel.encoder == "replicated" and tensor_parallel.size() > 1
    return ProcessGroupCollection(tp=alone if replicated else tensor_parallel, pp=alone, cp=alone)
