"""The rank server imports this once, so that its forks need not: torch, megatron-core with the CPU
layer where it is needed, and what a training run imports."""

# ruff: noqa: E402, F401

from nvmm.parallel.setup import prepare_backend

prepare_backend()

import hydra.utils
import megatron.core.dist_checkpointing
import megatron.core.dist_checkpointing.strategies.fully_parallel
import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.optimizer

import nvmm.models.bidirectional
import nvmm.models.cross_attending
import nvmm.models.embedder
import nvmm.models.two_towers
import nvmm.objectives.contrastive
import nvmm.objectives.kto
import nvmm.proof.equivalence
import nvmm.training.trainer
