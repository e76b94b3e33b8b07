"""A hand-written training loop over a tiny language model, for tests of its parts."""

from __future__ import annotations

import functools
import queue
from pathlib import Path
from typing import Any

import torch

from nvmm.batch import Batch
from nvmm.checkpoint.save import Checkpoint
from nvmm.models.language import LanguageModel
from nvmm.objectives.next_token import NextToken
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from nvmm.training.optim import Optim
from nvmm.training.optimizer import build_optimizer, freeze, wrap

GLOBAL_BATCH_SIZE = 4
GROUPS = [{"pattern": "*.mlp.*", "learning_rate": 4e-3, "weight_decay": 0.3}]
MAX_STEPS = 10


def save_as_mcore(state: dict[str, Any], folder: str | Path) -> None:
    """mcore's own save; collective.

    Its queue of results is a manager process, which a rank that has done its work leaves behind.
    """
    from megatron.core.dist_checkpointing import save
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    filesystem_async._results_queue = queue.Queue()
    save(state, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1, 1))


def language_model(**changes: Any) -> Any:
    """A partial of a 4-layer model: GQA, SwiGLU, QKV bias, an odd vocabulary."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    transformer = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.1,
    }
    return functools.partial(
        LanguageModel, functools.partial(TransformerConfig, **(transformer | changes)), 61, 64
    )


class Run:
    """Model, optimizer and data of one rank.

    Args:
        layout: arguments of Parallel.
        optim: arguments of Optim, over two learning rates and two weight decays.
        model: changes of the tiny TransformerConfig.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        init_method: str,
        layout: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        dtype: str = "fp32",
        seed: int = 7,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel = Parallel(**(layout or {}))
        parallel.initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
        precision = Precision(dtype)
        arguments = {
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 2,
            "clip_grad": 0.5,
            "groups": GROUPS,
        } | (optim or {})
        self.optim = Optim(**arguments)
        self.chunks = build_chunks(language_model(**(model or {})), parallel, precision, seed=seed)
        self.frozen = freeze(self.chunks, self.optim.freeze)
        self.models = wrap(self.chunks, parallel, precision)
        self.optimizer = build_optimizer(self.models, self.optim, precision, MAX_STEPS)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches (of one row, some of it unsupervised) of a global batch."""
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 61, (GLOBAL_BATCH_SIZE, 17), generator=generator)
        found = []
        for row in range(self.data_rank, GLOBAL_BATCH_SIZE, self.data_size):
            mask = torch.ones(1, 16)
            mask[0, : 3 * row] = 0.0
            found.append(
                Batch(
                    tokens=tokens[row : row + 1, :-1].contiguous(),
                    labels=tokens[row : row + 1, 1:].contiguous(),
                    loss_mask=mask,
                    position_ids=torch.arange(16)[None],
                    lengths=torch.tensor([16], dtype=torch.int32),
                    sample_ids=torch.tensor([row]),
                    owners=torch.tensor([0]),
                )
            )
        return found

    def backward(self, step: int) -> None:
        """Fill the gradients of one step."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        objective = NextToken()

        def forward_step(batches: Any, model: Any) -> Any:
            batch = next(batches)
            output = objective.forward(model, batch)
            return output, functools.partial(objective.loss, batch=batch)

        self.optimizer.zero_grad()
        self.optimizer.set_step(step)
        batches = self.batches(step)
        iterators = [iter(batches) for _ in self.models]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(batches),
            seq_length=16,
            micro_batch_size=1,
            forward_only=False,
        )

    def train(self, first: int, last: int) -> list[float]:
        """Steps first .. last - 1; the gradient norm of each."""
        norms = []
        for step in range(first, last):
            self.backward(step)
            applied, norm = self.optimizer.step()
            assert applied
            norms.append(norm)
        return norms

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's part of the weights, by local name."""
        return {
            f"{index}.{name}": parameter.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }

    def rates(self) -> dict[tuple[float, float], tuple[float, float]]:
        """(lr_mult, wd_mult) of each param group -> its (learning rate, weight decay)."""
        return {
            (group["lr_mult"], group["wd_mult"]): (group["lr"], group["weight_decay"])
            for group in self.optimizer.mcore.param_groups
        }

    def checkpoint(self, directory: Path, **arguments: Any) -> Checkpoint:
        return Checkpoint(directory=directory, **arguments)

    def save(self, step: int, directory: Path, **arguments: Any) -> Path:
        """Save with a small state; complete on return."""
        checkpoint = self.checkpoint(directory, **arguments)
        path = checkpoint.save(step, self.chunks, self.optimizer, {"step": step})
        checkpoint.finalize(blocking=True)
        return path
