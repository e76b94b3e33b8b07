"""The rank server imports this once, so that its forks need not: torch, megatron-core with the CPU
layer where it is needed, and what a training run imports."""

from nvmm.parallel.setup import prepare_backend

prepare_backend()

import hydra.utils  # noqa: E402
import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.dist_checkpointing.strategies.fully_parallel  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402

import nvmm.models.cross_attending  # noqa: E402
import nvmm.models.embedder  # noqa: E402
import nvmm.objectives.contrastive  # noqa: E402
import nvmm.proof.equivalence  # noqa: E402
import nvmm.training.trainer  # noqa: E402, F401
