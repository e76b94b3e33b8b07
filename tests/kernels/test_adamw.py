"""AdamW: accuracy over steps, lists of all kinds, dtypes of the state, FusedAdam."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from nvmm.kernels import library
from nvmm.kernels.adamw import FusedAdam, adamw, eager_adamw
from tests.kernels.accuracy import BOTH, DTYPES, needs_kernels, ulp

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 5
SIZES = [(1,), (3,), (127,), (0,), (4097,), (2, 33, 5), ()]
Lists = list[list[Tensor]]


def numbers(sizes: Sequence[Any], dtype: torch.dtype, scale: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in sizes]


def zeros(like: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros_like(t, dtype=dtype) for t in like]


def run(
    function: Callable[..., None],
    sizes: Sequence[Any],
    dtype: torch.dtype,
    moments: torch.dtype,
    mastered: bool,
    decoupled: bool,
    scale: float,
) -> Lists:
    """Parameters, masters and running means after some steps."""
    parameters = numbers(sizes, dtype, 1.0, 0)
    masters = [p.float() for p in parameters] if mastered else []
    means, squares = zeros(parameters, moments), zeros(parameters, moments)
    for step in range(1, STEPS + 1):
        gradients = numbers(sizes, dtype, scale, step)
        function(
            *(parameters, gradients, masters, means, squares),
            step=step,
            decoupled=decoupled,
            **OPTIONS,
        )
    return [masters or parameters, means, squares]


def eager(*lists: list[Tensor], betas: tuple[float, float], **options: Any) -> None:
    eager_adamw(*lists, beta1=betas[0], beta2=betas[1], **options)


def exact(sizes: Sequence[Any], dtype: torch.dtype, decoupled: bool, scale: float) -> Lists:
    """torch's step by step function in float64, on the same rounded numbers."""
    parameters = [p.double() for p in numbers(sizes, dtype, 1.0, 0)]
    means, squares = zeros(parameters, torch.float64), zeros(parameters, torch.float64)
    steps = [torch.zeros(()) for _ in parameters]
    for step in range(1, STEPS + 1):
        torch_adam(
            parameters,
            [g.double() for g in numbers(sizes, dtype, scale, step)],
            *(means, squares, [], steps),
            foreach=False,
            amsgrad=False,
            maximize=False,
            decoupled_weight_decay=decoupled,
            lr=OPTIONS["lr"],
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
        )
    return [parameters, means, squares]


def check(
    sizes: Sequence[Any],
    dtype: torch.dtype,
    moments: torch.dtype,
    mastered: bool = False,
    decoupled: bool = True,
    scale: float = 1.0,
) -> None:
    """The largest error of each list is at most twice PyTorch's, plus one ulp of the largest."""
    arguments = (sizes, dtype, moments, mastered, decoupled, scale)
    found, theirs = run(adamw, *arguments), run(eager, *arguments)
    for ours, eagers, truth in zip(
        found, theirs, exact(sizes, dtype, decoupled, scale), strict=True
    ):
        a, b, e = (torch.cat([t.flatten().double() for t in ts]) for ts in (ours, eagers, truth))
        if e.numel():
            allowed = 2 * (b - e).abs().max() + ulp(e.abs().max(), ours[0].dtype)
            assert (a - e).abs().max() <= allowed


KINDS = [
    *((dtype, moments, False) for dtype in DTYPES for moments in DTYPES),
    *((torch.bfloat16, moments, True) for moments in DTYPES),
]


@needs_kernels
@pytest.mark.parametrize(("dtype", "moments", "mastered"), KINDS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_accuracy(
    dtype: torch.dtype, moments: torch.dtype, mastered: bool, decoupled: bool, scale: float
) -> None:
    check(SIZES, dtype, moments, mastered, decoupled, scale)


@needs_kernels
@pytest.mark.parametrize(("dtype", "moments", "mastered"), KINDS)
def test_hundreds_of_small_tensors(
    dtype: torch.dtype, moments: torch.dtype, mastered: bool
) -> None:
    check([(n % 37,) for n in range(400)], dtype, moments, mastered)


@needs_kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.sampled_from(KINDS), st.booleans())
def test_any_list(sizes: list[int], kind: Any, decoupled: bool) -> None:
    check(sizes, *kind, decoupled)


@needs_kernels
@pytest.mark.parametrize("decoupled", [True, False])
def test_numbers_beyond_fp32_s_squares_and_not_finite_ones(decoupled: bool) -> None:
    """A square that overflows makes the step vanish; NaN and infinity do what they do in torch."""
    values = [0.0, 1e-30, -1e-22, 1e19, -1e25, float("inf"), float("nan")]
    found = []
    for function in (adamw, eager):
        parameters, gradients = [torch.ones(7)], [torch.tensor(values)]
        means, squares = zeros(parameters, torch.float32), zeros(parameters, torch.float32)
        function(parameters, gradients, [], means, squares, step=1, decoupled=decoupled, **OPTIONS)
        found.append(torch.stack([*parameters, *means, *squares]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-30, equal_nan=True)


@needs_kernels
def test_bits_do_not_depend_on_threads() -> None:
    code = """
import sys, torch
from tests.kernels.accuracy import FUSED
from tests.kernels.test_adamw import KINDS, run
from nvmm.kernels.adamw import adamw
FUSED.install()
for kind in KINDS:
    torch.set_num_threads(1)
    expected = run(adamw, [(70_001,), (3,)], *kind, True, 1.0)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(run(adamw, [(70_001,), (3,)], *kind, True, 1.0), expected, strict=True):
            assert all(map(torch.equal, a, b)), kind
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kernels
def test_layouts_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is copied; a parameter runs eagerly, or is refused."""
    monkeypatch.setattr(library, "_choices", library.Kernels())
    plain, turned, strided = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(3))
    turned.data = torch.ones(5, 3).t()
    gradient = numbers([(5, 3)], torch.float32, 1.0, 0)[0].t()
    plain.grad, turned.grad, strided.grad = gradient.contiguous(), gradient, gradient
    for parameter in (plain, turned, strided):
        FusedAdam([parameter], lr=0.1).step()
    torch.testing.assert_close(turned, plain)
    assert torch.equal(strided, plain)
    library.Kernels(adamw="fused").install()
    with pytest.raises(ValueError, match=r"kernels.adamw=fused does not .* not contiguous"):
        FusedAdam([turned]).step()


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {0: [torch.ones(2), torch.ones(3).bfloat16()]},
            "parameters: tensor 1 is of another dtype",
        ),
        ({1: []}, "gradients: lists of different lengths"),
        ({1: [torch.ones(2)] * 2}, "gradients: tensor 1 differs in size"),
        ({2: [torch.ones(2)] * 2}, "float32 parameters are their own masters"),
        ({4: [torch.ones(6)[::2]] * 2}, "squares: tensor 0 is not contiguous"),
        ({"step": 0}, "step counts from 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(changes: dict[Any, Any], message: str) -> None:
    lists = [[torch.ones(2), torch.ones(3)] for _ in range(5)]
    lists[2] = []
    for index, value in changes.items():
        if isinstance(index, int):
            lists[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nvmm.adamw(*lists, 1e-3, 0.9, 0.95, 1e-8, 0.1, changes.get("step", 1), True)


@needs_kernels
def test_schema_and_fake() -> None:
    lists = [numbers([(3,), (4, 5)], torch.float32, 1.0, seed) for seed in range(4)]
    lists[3] = [t.abs() for t in lists[3]]
    torch.library.opcheck(
        torch.ops.nvmm.adamw.default,
        (lists[0], lists[1], [], lists[2], lists[3], 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, True),
    )


def test_an_empty_list() -> None:
    adamw([], [], [], [], [], step=1, **OPTIONS)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    loss = parameter.square().sum()
    FusedAdam([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def train(optimizer_class: Any, steps: int, **kwargs: Any) -> tuple[list[Tensor], Any]:
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


@pytest.mark.parametrize("choice", BOTH)
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_equals_torch(adam_w_mode: bool, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_choices", library.Kernels(adamw=choice))
    reference = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    expected, _ = train(reference, 5, fused=False)
    ours, _ = train(FusedAdam, 5, adam_w_mode=adam_w_mode)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_step_is_an_int_of_every_group_also_an_empty_one() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([{"params": [parameter]}, {"params": []}])
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert type(optimizer.param_groups[0]["step"]) is int
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_parameter_without_gradient_is_left_alone() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = FusedAdam(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), torch.ones(2))
    assert not torch.equal(parameters[0].detach(), torch.ones(2))


def test_parameters_of_several_dtypes_in_a_group() -> None:
    parameters = [torch.nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in DTYPES * 2]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    FusedAdam(parameters, lr=2.0**-5).step()
    for parameter in parameters:
        torch.testing.assert_close(parameter.float(), torch.full((9,), 1 - 2.0**-5))


@pytest.mark.parametrize("choice", BOTH)
def test_masters_keep_what_bf16_rounds_away(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of 1e-4 from 1: less than half a bfloat16 ulp each."""
    monkeypatch.setattr(library, "_choices", library.Kernels(adamw=choice))
    found = []
    for master_weights in (True, False):
        parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        optimizer = FusedAdam([parameter], lr=1e-4, master_weights=master_weights)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        found.append(parameter.detach())
        if master_weights:
            master = optimizer.state[parameter]["master_param"]
            torch.testing.assert_close(master, torch.full((5,), 0.99), rtol=0, atol=1e-5)
            assert torch.equal(parameter, master.bfloat16())
    assert torch.equal(found[1], torch.ones_like(found[1]))


def test_a_loaded_state_keeps_its_dtypes_and_bits() -> None:
    def make(seed: int) -> tuple[list[torch.nn.Parameter], FusedAdam]:
        parameters = [
            torch.nn.Parameter(p)
            for dtype in DTYPES
            for p in numbers([(5,), (2, 3)], dtype, 1.0, seed)
        ]
        options = {"master_weights": True, "moments_dtype": torch.bfloat16}
        return parameters, FusedAdam([{"params": parameters}], lr=0.01, **options)

    def advance(parameters: list[torch.nn.Parameter], optimizer: FusedAdam, first: int) -> None:
        for step in range(first, first + 3):
            for i, parameter in enumerate(parameters):
                [parameter.grad] = numbers([parameter.shape], parameter.dtype, 1.0, 10 * step + i)
            optimizer.step()

    parameters, optimizer = make(0)
    advance(parameters, optimizer, 0)
    others, other = make(0)
    for ours, theirs in zip(others, parameters, strict=True):
        ours.data.copy_(theirs)
    state = torch.optim.Optimizer.state_dict(optimizer)
    other.load_state_dict({**state, "state": {k: dict(v) for k, v in state["state"].items()}})
    for theirs, ours in zip(parameters, others, strict=True):
        before, after = optimizer.state[theirs], other.state[ours]
        assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
        other.state[ours] = {k: v.clone() for k, v in after.items()}
    advance(parameters, optimizer, 3)
    advance(others, other, 3)
    assert all(map(torch.equal, parameters, others))
    assert other.param_groups[0]["step"] == 6


def test_unknown_moments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moments_dtype=torch.float16 must be torch.float32 or"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], moments_dtype=torch.float16)
