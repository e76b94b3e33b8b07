import functools

import pytest
import torch

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
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(schedule, expected):
    rate = functools.partial(
        learning_rate, peak=1.0, floor=0.1, warmup_steps=2, decay_steps=10, schedule=schedule
    )
    assert [rate(step) for step in (0, 1, 2, 4, 6, 10, 99)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "optim.learning_rate=0 must be positive"),
        ({"min_learning_rate": 2.0}, "optim.min_learning_rate=2.0 must lie between"),
        ({"schedule": "step"}, "optim.schedule=step must be one of cosine, linear, constant"),
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
