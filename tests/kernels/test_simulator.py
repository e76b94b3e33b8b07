"""The simulator finds planted faults, and the CUDA sources give in it what the CPU's loops give."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nvmm.kernels.activation import GATED, KINDS
from tests.kernels.accuracy import DTYPES, needs_kernels
from tests.kernels.simulated import ORDERS, ROOT, SANITIZED, Elsewhere, InFloat32, placed, simulator

pytestmark = needs_kernels
ALL_DTYPES = (*DTYPES, torch.float16)
SIZES = [(1, 3), (3, 127), (5, 64), (2, 520), (2, 1), (0, 8)]
LAUNCHES = [  # order of the threads, threads of a block (0: as the launch has it)
    *(("forward", 0), ("reverse", 0), ("shuffled", 0)),
    *(("forward", 32), ("shuffled", 32), ("reverse", 64), ("shuffled", 64)),
]


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """torch.ops.nvmm_simulated"""
    torch.ops.load_library(simulator())
    yield torch.ops.nvmm_simulated
    torch.ops.nvmm_simulated.configure(0, 0)


def shifted(run: Any) -> Elsewhere:
    """The operations on tensors that start one element behind 16 bytes."""
    return Elsewhere(lambda t: placed(t, "cpu", 1), run)


def test_reverses_with_a_barrier_and_not_without(run: Any) -> None:
    """Without the barrier some order of the threads reads what is not written yet."""
    x = torch.arange(64.0)
    wrong = []
    for order in ORDERS.values():
        run.configure(order, 0)
        assert torch.equal(run.faulty(x, 0), x.flip(0))
        wrong.append(not torch.equal(run.faulty(x, 1), x.flip(0)))
    assert all(wrong)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, "divergent barrier"),
        (3, "deadlock"),
        (4, "mask that leaves it out"),
        (5, "beyond the dynamic shared memory"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_are_named(run: Any, fault: int, message: str, order: str) -> None:
    run.configure(ORDERS[order], 0)
    with pytest.raises(RuntimeError, match=message):
        run.faulty(torch.arange(64.0), fault)


def test_shared_memory_that_nothing_wrote_is_nan(run: Any) -> None:
    run.configure(0, 0)
    assert run.faulty(torch.zeros(64), 6).isnan().all()


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norms(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    x, residual, dy, dsum = (numbers(rows, width, dtype=dtype, seed=i) for i in range(4))
    weight, bias = (numbers(width, dtype=dtype, seed=i) for i in (4, 5))
    if dtype == torch.float16:
        residual = x  # a sum that needs no rounding: float32 stands in for float16 on the CPU
    found = []
    for rms in (True, False):
        y, total, mean, rstd = ops.norm(x, residual, weight, None if rms else bias, 1e-5, rms, True)
        again = ops.norm(x, None, weight, None if rms else bias, 1e-5, rms, False)[0]
        back = ops.norm_backward(dy, dsum, total, weight, mean, rstd, rms, True)
        found += [y, total, mean, rstd, again, *back]
    return found


def activations(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for index, kind in enumerate(KINDS):
        columns = width * (2 if kind in GATED else 1)
        x, bias = numbers(rows, columns, dtype=dtype), numbers(columns, dtype=dtype, seed=1)
        dy = numbers(rows, width, dtype=dtype, seed=2)
        for b in (bias, None):
            found += [ops.activation(x, b, index), *ops.activation_backward(dy, x, b, index)]
    return found


def gated_residuals(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    residual, branch, dy = (numbers(rows, width, dtype=dtype, seed=i) for i in range(3))
    bias = numbers(width, dtype=dtype, seed=3)
    mask = torch.tensor([1.0, 0.0, 0.5]).repeat(rows)[:rows].to(dtype)
    found = []
    for gate, m in ((numbers(width, dtype=dtype), mask), (numbers(1, dtype=dtype), None)):
        found += [
            ops.gated_residual(residual, branch, bias, gate, m, True),
            *ops.gated_residual_backward(dy, branch, bias, gate, m, False),
        ]
    return found


def cross_entropies(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    logits = 4 * numbers(rows, width, dtype=dtype)
    labels = torch.arange(rows) * 7 % width + 100
    maximum = torch.full((rows,), float("-inf"))
    total, picked = torch.zeros(rows), torch.zeros(rows)
    valid = max(width - 2, 1)
    for begin in (0, width):  # the second chunk has no label and no new maximum in some rows
        ops.logits_reduce(logits, labels - begin, 100, valid, maximum, total, picked)
    gradient = logits.clone()
    scale = torch.linspace(0, 2, rows)
    ops.logits_gradient(gradient, labels, maximum + total.log(), scale, 100, valid)
    return [maximum, total, picked, gradient]


def ropes(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    fused = numbers(rows, 2, 4, 2 * width, dtype=dtype)  # three heads of q and one of k, with gaps
    q, k = fused[:, :, :3, :width], fused[:, :, 3:, width:]
    found = []
    for dim in (width // 2 * 2, width // 32 * 16):
        table = numbers(rows, 2, dim, dtype=torch.float32, seed=1)
        found += [*ops.rope(q, k, table, False), *ops.rope(q, k, table, True)]
    return found


def merges(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    base, values = numbers(rows, width, dtype=dtype), numbers(2, width, dtype=dtype, seed=1)
    dy = numbers(rows + 2, width, dtype=dtype, seed=2)
    replaced, beside = torch.arange(rows), torch.arange(rows + 2).flip(0)
    replaced[rows // 2 : rows // 2 + 1] = rows
    found = [ops.merge(base, values, source) for source in (replaced, beside)]
    for target in (beside, torch.where(beside % 3 == 1, -1, beside)):
        found += ops.merge_backward(dy, target, rows)
    return found


def pixel_shuffles(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    grid = numbers(rows, 1 + 4 * 6, width, dtype=dtype)[:, 1:].view(rows, 4, 6, width)
    tokens = ops.pixel_shuffle(grid, 2)
    turned = ops.pixel_shuffle(grid.transpose(0, 2), 1)
    return [tokens, turned, ops.pixel_shuffle_backward(tokens, 2)]


def joint_norms(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Shares of a first rank, of one with padding (on packs and off), and of padding alone."""
    x, dy = (numbers(rows, width, dtype=dtype, seed=i) for i in (0, 1))
    weight = numbers(2 * width, dtype=dtype)
    scale, dots = torch.linspace(0.5, 2, rows), torch.linspace(-1, 1, rows)
    found = []
    for first, real in ((0, width), (width, width // 8 * 8), (width, width - 1), (2 * width, 0)):
        found += [
            ops.joint_norm_squares(x, real),
            ops.joint_norm_apply(x, weight, scale, first, real),
            *ops.joint_norm_sums(dy, x, weight, scale, first, real),
            ops.joint_norm_backward(dy, x, weight, scale, dots, first, real),
        ]
    return found


def lists(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Empty ones, one of several chunks, one off 16 bytes; for one row more than a launch takes."""
    odd = numbers(width + 1, dtype=dtype, seed=seed)[1:]
    large = numbers(16_384 * (rows // 2) + width, dtype=dtype, seed=seed)
    count = 70 if rows == 1 else 4
    small = [numbers(n % 5, dtype=dtype, seed=n + seed) for n in range(count)]
    return [odd, large, *small, numbers(rows, width, dtype=dtype, seed=seed)]


def adamws(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for moments, mastered in ((torch.float32, False), (torch.bfloat16, dtype != torch.float32)):
        parameters, gradients, means, squares = (
            lists(rows, width, kind, seed)
            for seed, kind in enumerate((dtype, dtype, moments, moments))
        )
        squares = [t.abs_() for t in squares]
        masters = [t.float() for t in parameters] if mastered else []
        changed = (parameters, gradients, masters, means, squares)
        ops.adamw(*changed, 0.01, 0.9, 0.95, 1e-8, 0.1, 3, not mastered)
        found += [torch.cat([t.flatten() for t in ts]) for ts in changed if ts]
    return found


def multi_tensors(ops: Any, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    found = []
    for bad in (0.0, float("inf")):
        sources = lists(rows, width, dtype)
        sources[1][-1] += bad
        flags = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
        found += [*flags, ops.multi_tensor_l2norm(sources, flags[0])]
        for kind, flag in zip(ALL_DTYPES, flags[1:], strict=True):
            targets = [torch.empty_like(t, dtype=kind) for t in sources]
            ops.multi_tensor_scale(sources, targets, flag, 0.3)
            found += [torch.cat([t.flatten() for t in targets])]
    return found


Case = Callable[..., list[Tensor]]
CASES: tuple[Case, ...] = (
    *(norms, activations, gated_residuals, cross_entropies),
    *(joint_norms, adamws, multi_tensors),
    *(ropes, merges, pixel_shuffles),
)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """rtol and atol between roundings of one sum."""
    found = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}.get(dtype, 2e-5)
    return {"rtol": found, "atol": found}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **tolerance(a.dtype))


def check(run: Any, case: Case, rows: int, width: int, dtype: torch.dtype) -> None:
    """Every order gives the same bits; the CPU's loops and other block sizes agree to rounding."""
    expected = case(InFloat32(), rows, width, dtype)
    first: dict[int, list[Tensor]] = {}
    for order, threads in LAUNCHES:
        run.configure(ORDERS[order], threads)
        found = case(run, rows, width, dtype)
        bits = first.setdefault(threads, found)
        assert all(map(torch.equal, found, bits)), (rows, width, order, threads)
        if bits is found:
            close(found, expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu_kernels(run: Any, case: Case, dtype: torch.dtype) -> None:
    for rows, width in SIZES:
        check(run, case, rows, width, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_tensors_off_16_bytes(run: Any, case: Case, dtype: torch.dtype) -> None:
    run.configure(0, 0)
    close(case(shifted(run), 2, 64, dtype), case(InFloat32(), 2, 64, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_thread_that_takes_several_columns(run: Any, case: Case, dtype: torch.dtype) -> None:
    for width in (4097, 4104):  # in scalars, in packs
        check(run, case, 1, width, dtype)


_SANITIZED_RUN = """
import sys, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
if sys.argv[2] == "fault":
    torch.ops.nvmm_simulated.faulty(torch.zeros(64), 7)
from tests.kernels import test_simulator as t
for case in t.CASES:
    for rows, width in t.SIZES:
        for dtype in t.ALL_DTYPES:
            case(torch.ops.nvmm_simulated, rows, width, dtype)
            case(t.shifted(torch.ops.nvmm_simulated), rows, width, dtype)
"""


@pytest.mark.slow
def test_under_sanitizers() -> None:
    """No access outside a tensor and no undefined behaviour; a planted one ends the process."""
    library = simulator(sanitized=True)
    names = ("libasan.so", "libubsan.so")
    preload = [
        subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    assert "address" in SANITIZED[0]

    def start(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _SANITIZED_RUN, str(library), what]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    faulty = start("fault")
    assert faulty.returncode and "heap-buffer-overflow" in faulty.stderr
    done = start("all")
    assert done.returncode == 0, done.stderr[-4000:]
