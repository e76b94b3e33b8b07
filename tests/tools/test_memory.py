"""The memory table's bytes of a layer against what a layer keeps for backward."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

from nvmm.commands import plan as plan_command
from nvmm.commands.plan import Layout, layer_bytes, plan, sizes_of
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests.models.test_flat_memory import Memory, batch_of, settings
from tests.ranks import run_ranks

SIZES = {
    **{"num_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 2},
    **{"kv_channels": 16, "ffn_hidden_size": 320, "gated_linear_unit": True},
}
TOKENS = 512
RECOMPUTE = ("none", "selective", "full")


def kept(rank: int, world: int, init: str, tensor: int, context: int) -> list[float]:
    """Bytes that the second of two layers keeps, in bf16, by what is recomputed."""
    from hydra.utils import instantiate

    sizes = {
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "sequence_parallel": tensor > 1,
    }
    Parallel(**sizes).initialize(seed=1, rank=rank, world_size=world, init_method=init)
    found = []
    for recompute in RECOMPUTE:
        granularity = None if recompute == "none" else recompute
        parallel = Parallel(**sizes, recompute_granularity=granularity)
        alive = []
        for layers in (1, 2):
            config = settings(transformer=SIZES | {"num_layers": layers})
            config["transformer"]["add_qkv_bias"] = False
            constructor = instantiate(config, _convert_="all")
            [model] = build_chunks(constructor, parallel, Precision("bf16"))
            model.train()
            with Memory() as watched:
                output = model(batch_of(TOKENS))
            gc.collect()
            # Weights are in it where an operator has seen them as a view.
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            living = {k: v for k, v in watched.alive.items() if not v[0].expired()}
            alive.append(sum(size for key, (_, size) in living.items() if key not in own))
            del output
        found.append(alive[1] - alive[0])
    return found


@pytest.mark.parametrize(
    ("tensor", "context"), [(1, 1), (1, 2), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_a_layer_keeps_what_the_table_says(tensor: int, context: int) -> None:
    for rank, found in enumerate(run_ranks(kept, tensor * context, tensor, context)):
        for recompute, measured in zip(RECOMPUTE, found, strict=True):
            layout = Layout(tensor, context, recompute=recompute)  # type: ignore[arg-type]
            expected = layer_bytes(SIZES, TOKENS, layout)
            assert measured == pytest.approx(expected, rel=0.02), (rank, recompute)


def test_a_plan_has_the_published_parameters_and_halves_with_the_ranks() -> None:
    sizes, vocabulary = sizes_of("llama3_8b_128k")

    def found(**layout: Any) -> dict[str, float]:
        return plan(sizes, vocabulary, 131072, 32, Layout(**layout), 1e15)

    one = found(tensor=1)
    # All but the norms' weights.
    assert one["weights"] == pytest.approx(2 * 8.030261248, rel=1e-4)
    assert one["optimizer"] == pytest.approx(3 * one["gradients"])
    for other in ({"tensor": 2}, {"tensor": 1, "context": 2}):
        assert found(**other)["activations"] == pytest.approx(one["activations"] / 2)
        assert found(**other)["s a step"] == pytest.approx(one["s a step"] / 2)
    # 6 x parameters x tokens and the attention's square, and the layers' forward once more.
    flops = 32 * 131072 * 6 * (8.03e9 - 128256 * 4096) + 32 * 32 * 6 * 131072**2 * 4096
    again = 32 * 131072 * 2 * (8.03e9 - 2 * 128256 * 4096) + 32 * 32 * 2 * 131072**2 * 4096
    assert one["s a step"] == pytest.approx((flops + again) / 1e15, rel=1e-3)
    staged = found(tensor=1, pipeline=4)
    assert staged["activations"] == pytest.approx(one["activations"])
    assert staged["s a step"] == pytest.approx(one["s a step"] / 4 * 35 / 32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama3", "8x1x1x1"], "llama3 is no language/*.yaml of"),
        (["llama3_8b", "8x1"], "8x1 must be TPxCPxPPxDP"),
        (["llama3_8b", "16x1x1x1"], "TP=16 must divide 8"),
        (["llama3_8b", "8x1x3x1"], "PP=3 must divide 32"),
        (["llama3_8b", "8x1x1x3"], "DP=3 must divide 32"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["nvmm plan", *arguments])
    with pytest.raises(SystemExit):
        plan_command.main()
    assert says in capsys.readouterr().err


def test_the_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nvmm plan", "llama3_70b_128k", "8x2x4x1", "8x8x1x2"])
    plan_command.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 8 x 2 x 4 x 1", "64"],
        ["| 8 x 8 x 1 x 2", "128"],
    ]
    assert {line.count("|") for line in lines} == {12}
