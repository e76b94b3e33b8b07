import pytest
import torch

from nvmm.kernels.adamw import FusedAdam


def train(optimizer_class, steps, **kwargs):
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in [(7,), (3, 5), (1,)]
    ]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.0},
        {"params": parameters[1:], "lr": 3e-3},
    ]
    optimizer = optimizer_class(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **kwargs)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_equals_torch(adam_w_mode):
    reference = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    expected, _ = train(reference, 5, fused=False)
    ours, _ = train(FusedAdam, 5, adam_w_mode=adam_w_mode)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_equals_torch_fused_bitwise():
    expected, _ = train(torch.optim.AdamW, 5, fused=True)
    ours, _ = train(FusedAdam, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_step_is_an_int_of_every_group_also_an_empty_one():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([{"params": [parameter]}, {"params": []}])
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert type(optimizer.param_groups[0]["step"]) is int
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_parameter_without_gradient_is_left_alone():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = FusedAdam(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), torch.ones(2))
    assert not torch.equal(parameters[0].detach(), torch.ones(2))
