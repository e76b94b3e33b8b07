import functools

import pytest
import torch

from nvmm.config.batch_sizes import BatchSizes
from nvmm.kernels import library
from nvmm.training.optim import Optim, learning_rate
from nvmm.training.optimizer import install_adam, install_multi_tensor
from tests.ranks import run_ranks
from tests.runs import GROUPS, Run

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (0.5 + 0.5 * 2**-0.5), 0.55, 0.1, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.1, 0.1]),
        ("minus_sqrt", [0.5, 1.0, 1.0, 0.55, 1.0 - 0.9 * 0.5**0.5, 0.1, 0.1]),
        ("exponential", [0.5, 1.0, 1.0, 0.1**0.25, 0.1**0.5, 0.1, 0.1]),
        ("inverse_sqrt", [0.5, 1.0, 1.0, 0.5**0.5, 3**-0.5, 5**-0.5, (2 / 99) ** 0.5]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(schedule, expected):
    rate = functools.partial(
        learning_rate, peak=1.0, floor=0.1, warmup_steps=2, decay_steps=10, schedule=schedule
    )
    assert [rate(step) for step in (0, 1, 2, 4, 6, 10, 99)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "half"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("minus_sqrt", 1 - 0.9 * 0.5**0.5),
        ("exponential", 0.1**0.5),
    ],
)
def test_a_cooldown_takes_the_last_steps_alone(schedule, half):
    """Warm-up, stable, decay: steps 0 and 1, 2 to 6, and the four from 6 to 10."""
    optim = Optim(1.0, 0.1, warmup_steps=2, cooldown_steps=4, schedule=schedule)
    rates = [optim.rates(step, 10)[0] for step in (0, 1, 2, 5, 6, 8, 10, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, half, 0.1, 0.1])


def test_inverse_sqrt_stops_at_the_minimum():
    optim = Optim(1.0, 0.5, warmup_steps=4, schedule="inverse_sqrt")
    assert [optim.rates(step, 10**6)[0] for step in (4, 9, 16, 10**5)] == [1.0, 2 / 3, 0.5, 0.5]


RAMP = BatchSizes.read(
    8, [{"global_batch_size": 2, "steps": 3}, {"global_batch_size": 4, "tokens": 85}], 10
)
"""20, 20, 20 tokens, then 40 and 40 (two steps come nearest to 85), then 80 each."""


def test_a_schedule_by_tokens_follows_the_ramp():
    optim = Optim(1.0, 0.0, warmup_tokens=50, decay_tokens=250, schedule="linear")
    rates = [optim.rates(step, 100, RAMP)[0] for step in range(9)]
    # tokens before each step: 0, 20, 40, 60, 100, 140, 220, 300, 380
    assert rates == pytest.approx([0.4, 0.8, 1.0, 0.95, 0.75, 0.55, 0.15, 0.0, 0.0])
    end = Optim(1.0, 0.0, warmup_tokens=50, schedule="linear")
    assert end.end(7, RAMP) == 300, "of the run, where no decay_tokens say it"
    assert end.rates(5, 7, RAMP) == pytest.approx([1 - 90 / 250])
    stable = Optim(1.0, 0.1, cooldown_tokens=80, decay_tokens=220, schedule="minus_sqrt")
    rates = [stable.rates(step, 100, RAMP)[0] for step in (0, 5, 6)]
    assert rates == pytest.approx([1.0, 1.0, 0.1])


def test_without_a_ramp_tokens_are_steps():
    sizes = BatchSizes(4, (), 16)
    for schedule in ("cosine", "linear", "minus_sqrt", "exponential"):
        steps = Optim(1.0, 0.1, 3, 20, schedule, cooldown_steps=5)
        tokens = Optim(1.0, 0.1, schedule=schedule, warmup_tokens=3 * 64, decay_tokens=20 * 64,
                       cooldown_tokens=5 * 64)  # fmt: skip
        for step in range(25):
            assert tokens.rates(step, 30, sizes) == pytest.approx(steps.rates(step, 30, sizes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 1, "decay_tokens": 9}, "warmup_steps stands beside lengths in tokens"),
        ({"decay_steps": 9, "warmup_tokens": 1}, "decay_steps stands beside lengths in tokens"),
        ({"warmup_tokens": 5, "decay_tokens": 5}, "optim.decay_tokens=5 must exceed"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must not be negative"),
        ({"decay_steps": 0}, "optim.decay_steps=0 must be at least 1"),
        ({"cooldown_steps": 0}, "optim.cooldown_steps=0 must be at least 1"),
        (
            {"warmup_steps": 4, "cooldown_steps": 7, "decay_steps": 10},
            "optim.cooldown_steps=7 must be at most the 6",
        ),
        ({"cooldown_steps": 7, "schedule": "constant"}, "another optim.schedule than constant"),
        ({"decay_steps": 7, "schedule": "inverse_sqrt"}, "optim.schedule than inverse_sqrt"),
        ({"schedule": "inverse_sqrt"}, "optim.warmup_steps=0 must be above 0"),
        ({"schedule": "exponential"}, "optim.min_learning_rate=0 must be above 0"),
        (
            {
                "schedule": "exponential",
                "min_learning_rate": 0.1,
                "groups": [{"pattern": "a", "learning_rate": 1, "min_learning_rate": 0}],
            },
            "optim.groups: a.min_learning_rate=0",
        ),
        ({"learning_rate": 0}, "optim.learning_rate=0 must be positive"),
        ({"min_learning_rate": 2.0}, "optim.min_learning_rate=2.0 must lie between"),
        ({"schedule": "step"}, "optim.schedule=step must be one of cosine, linear, minus"),
        ({"warmup_steps": 5, "decay_steps": 5}, "optim.decay_steps=5 must exceed"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"clip_grad": -1}, "optim.clip_grad=-1"),
        ({"moments_dtype": "fp16"}, "optim.moments_dtype=fp16 must be one of fp32, bf16"),
        ({"moments_dtype": "bf16", "betas": (0.9, 0.999)}, "optim.betas=.* at most 0.99"),
        ({"groups": [{"pattern": "*", "lr": 1}]}, r"optim.groups\[0\].lr does not exist"),
        ({"groups": [{"pattern": "*"}]}, r"optim.groups\[0\].learning_rate is missing"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Optim(**({"learning_rate": 1.0} | arguments))


def test_group_keeps_the_fraction_of_the_minimum():
    optim = Optim(1e-3, 1e-4, groups=[{"pattern": "a", "learning_rate": 5e-3}])
    group = optim.param_groups()[1]
    assert group.min_learning_rate == pytest.approx(5e-4)
    assert group.weight_decay == 0.1


def test_install_adam_fails_when_mcore_renames_a_global(monkeypatch):
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    install_adam()
    monkeypatch.delattr(distrib_optimizer, "USING_APEX_OPTIMIZER")
    with pytest.raises(AttributeError, match="USING_APEX_OPTIMIZER is gone"):
        install_adam()


def test_install_multi_tensor_reaches_the_norm_and_fails_when_mcore_renames(monkeypatch):
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer

    install_multi_tensor()
    flag, lists = torch.zeros(1, dtype=torch.int32), [[torch.tensor([3e20, 4e20])]]
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, flag, lists, False)
    assert norm.item() == pytest.approx(5e20) or library.MISSING
    main, model = torch.tensor([1.0 + 2.0**-9]), torch.zeros(1, dtype=torch.bfloat16)
    optimizer._multi_tensor_copy_this_to_that([main], [model], flag)
    assert torch.equal(model, main.bfloat16())
    monkeypatch.delattr(clip_grads, "l2_norm_impl")
    with pytest.raises(AttributeError, match=r"clip_grads\.l2_norm_impl is gone"):
        install_multi_tensor()


def norms_and_groups(rank, world_size, init_method, layout):
    run = Run(rank, world_size, init_method, layout)
    return run.train(0, 3), run.rates(), type(run.optimizer.adam).__name__


def test_norm_and_groups_do_not_depend_on_the_layout():
    expected, rates, adam = run_ranks(norms_and_groups, 1, {})[0]
    assert adam == "FusedAdam"
    assert min(expected) > 0.5, "clipping takes part"
    last = learning_rate(2, peak=1e-3, floor=1e-4, warmup_steps=2, decay_steps=10)
    assert rates == {
        (1.0, 1.0): (last, 0.1),
        (1.0, 0.0): (last, 0.0),
        (2.0, 1.0): (pytest.approx(4 * last), 0.3),
        (2.0, 0.0): (pytest.approx(4 * last), 0.0),
    }
    for layout in (TP2, TP2 | {"sequence_parallel": True}, PP2, {}):
        for norms, _, _ in run_ranks(norms_and_groups, 2, layout):
            assert norms == pytest.approx(expected, rel=1e-5), layout


def non_finite(rank, world_size, init_method):
    run = Run(rank, world_size, init_method)
    run.train(0, 1)
    before = run.weights()
    run.backward(1)
    if rank == world_size - 1:
        run.models[0].buffers[0].grad_data.fill_(float("nan"))
    applied, norm = run.optimizer.step()
    same = all(torch.equal(before[name], value) for name, value in run.weights().items())
    steps = run.optimizer.num_steps
    run.train(2, 3)
    moved = not torch.equal(before["0.output_layer.weight"], run.weights()["0.output_layer.weight"])
    return applied, norm, same, steps, moved


def test_a_non_finite_step_changes_nothing_on_any_rank():
    for applied, norm, same, steps, moved in run_ranks(non_finite, 2):
        assert not applied
        assert norm != norm
        assert same
        assert steps == 1
        assert moved


def frozen(rank, world_size, init_method, layout, patterns, dtype="bf16"):
    run = Run(
        rank, world_size, init_method, layout, {"freeze": patterns, "groups": []}, dtype=dtype
    )
    before = run.weights()
    norms = run.train(0, 2)
    trainable = sum(
        p.numel() for chunk in run.chunks for p in chunk.parameters() if p.requires_grad
    )
    gradients = sum(buffer.grad_data.numel() for model in run.models for buffer in model.buffers)
    masters = sum(p.numel() for group in run.optimizer.mcore.param_groups for p in group["params"])
    states = sum(
        tensor.numel() for state in run.optimizer.adam.state.values() for tensor in state.values()
    )
    changed = {
        name for name, value in run.weights().items() if not torch.equal(before[name], value)
    }
    return run.frozen, trainable, gradients, masters, states, changed, norms


def test_frozen_parameters_hold_nothing():
    (names, trainable, gradients, masters, states, changed, _) = run_ranks(
        frozen, 1, {}, ["decoder.*", "embedding.*"]
    )[0]
    assert trainable == 64 * 32
    assert gradients - trainable < 64, "mcore pads a buffer to its alignment"
    assert masters == trainable
    assert states == 2 * trainable
    assert changed == {"0.output_layer.weight"}
    assert "decoder.layers.3.mlp.linear_fc1.weight" in names
    assert "output_layer.weight" not in names


@pytest.mark.parametrize("pattern", ["embedding.*", "output_layer.*"])
def test_a_stage_without_trainable_parameters_takes_part(pattern):
    others = [name for name in ("embedding.*", "decoder.*", "output_layer.*") if name != pattern]
    expected = run_ranks(frozen, 1, {}, others, "fp32")[0][-1]
    first, last = run_ranks(frozen, 2, PP2, others, "fp32")
    assert {first[1], last[1]} == {0, 64 * 32}
    for norms in (first[-1], last[-1]):
        assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"freeze": ["vision.*"]}, "optim.freeze: .*vision.* matches no parameter"),
        ({"no_decay": ["*.gate"]}, "optim.no_decay: .*gate.* matches no parameter"),
        ({"freeze": ["*.mlp.*"]}, "optim.groups: .*mlp.* matches no trainable parameter"),
        ({"freeze": ["*"], "groups": []}, "leaves nothing to train"),
        (
            {"groups": [*GROUPS, {"pattern": "decoder.*", "learning_rate": 1}]},
            "matches more than one pattern",
        ),
    ],
)
def test_patterns_that_do_nothing_are_errors(optim, message):
    with pytest.raises(RuntimeError, match=message):
        run_ranks(build, 1, optim)


def build(rank, world_size, init_method, optim):
    Run(rank, world_size, init_method, {}, optim)


def no_decay(rank, world_size, init_method):
    run = Run(rank, world_size, init_method, {}, {"no_decay": ["embedding.*"], "groups": []})
    return {
        group["wd_mult"]: sum(p.numel() for p in group["params"])
        for group in run.optimizer.mcore.param_groups
    }


def test_no_decay_patterns_join_the_vectors():
    sizes = run_ranks(no_decay, 1)[0]
    vectors = 32 + 4 * (2 * 32 + 64)
    assert sizes[0.0] == vectors + 64 * 32
