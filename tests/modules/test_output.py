"""The loss without logits: against mcore's path, over TP and SP, and into the main gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import IGNORE_INDEX, Batch
from nvmm.kernels import library
from nvmm.kernels.library import Kernels
from nvmm.parallel.parameters import initialize
from nvmm.parallel.setup import Parallel, Precision
from nvmm.training.optimizer import wrap
from tests import tiny
from tests.kernels.accuracy import needs_kernels
from tests.ranks import run_ranks

pytestmark = needs_kernels
LAYOUTS: list[dict[str, Any]] = [
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
]


def batch() -> Batch:
    tokens = torch.randint(0, 509, (2, 8), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[:, :3] = IGNORE_INDEX
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        position_ids=torch.arange(8).expand(2, 8),
        lengths=torch.tensor([8, 8], dtype=torch.int32),
        sample_ids=torch.arange(2),
        owners=torch.arange(2),
        cu_seqlens=None,
    )


def train(
    rank: int,
    world_size: int,
    init: str,
    layout: dict[str, Any],
    choice: str,
    fusion: bool = False,
    tied: bool = False,
    ddp: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(per-token losses, main gradients by local name) of a step of the tiny language model."""
    parallel, precision = Parallel(**layout), Precision(dtype="fp32")
    parallel.initialize(seed=0, rank=rank, world_size=world_size, init_method=init)
    Kernels(linear_cross_entropy=choice).install()
    config = tiny.language()
    config["transformer"]["gradient_accumulation_fusion"] = fusion
    config["share_embeddings_and_output_weights"] = tied
    model = instantiate(config, _convert_="all")(chunk=parallel.chunks(precision)[0])
    initialize(model, seed=5)
    if ddp:
        [wrapped] = wrap([model], parallel, precision)
        wrapped.zero_grad_buffer()
    else:
        wrapped = model
        for parameter in model.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
    b = batch()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is full of NaN
    loss = wrapped(b)
    (loss * b.loss_mask).sum().backward()
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    if not ddp:
        gradients = {
            name: p.main_grad + (0 if p.grad is None else p.grad)
            for name, p in model.named_parameters()
        }
    return (loss * b.loss_mask).detach(), gradients


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "tp2_sp"])
def test_equals_mcore_s_loss_over_tensor_parallelism(layout: dict[str, Any]) -> None:
    for fused, eager in zip(
        run_ranks(train, 2, layout, "fused"), run_ranks(train, 2, layout, "eager"), strict=True
    ):
        same(fused, eager)


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "no_ddp"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradient_accumulation_fusion_adds_each_gradient_once(tied: bool, ddp: bool) -> None:
    [expected] = run_ranks(train, 1, {}, "eager", False, tied, ddp)
    for choice in ("fused", "eager"):
        [found] = run_ranks(train, 1, {}, choice, True, tied, ddp)
        same(found, expected)


@pytest.mark.parametrize("how", ["replaced", "hooked"])
def test_a_wrapped_output_layer_keeps_its_forward(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from nvmm.modules.output import fused_loss

    class Adapted(ColumnParallelLinear):
        pass

    monkeypatch.setattr(library, "_choices", Kernels())
    kind = Adapted if how == "replaced" else ColumnParallelLinear
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(torch.ones(4, 2))
    layer.bias = None
    if how == "hooked":  # as an adapter is
        layer.register_forward_hook(lambda module, inputs, output: output)
    assert fused_loss(layer, torch.ones(3, 1, 2), torch.zeros(1, 3, dtype=torch.long), 4) is None
