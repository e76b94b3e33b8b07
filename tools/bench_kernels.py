"""Time and memory of the kernels, beside eager PyTorch, its own fused functions and torch.compile.

`make bench-kernels` runs it on one thread and prints Markdown. All variants of an operation take
turns in one process, forward and backward where there is one, and the median of their times is
given (of fewer rounds for the linear cross-entropy); memory is the peak above arguments and
gradients, each variant in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from nvmm.kernels.activation import activation, eager_activation
from nvmm.kernels.adamw import FusedAdam
from nvmm.kernels.gated_residual import eager_gated_residual, gated_residual
from nvmm.kernels.joint_norm import joint_norm
from nvmm.kernels.library import MISSING, Kernels
from nvmm.kernels.linear_cross_entropy import linear_cross_entropy
from nvmm.kernels.merge import eager_merge_rows, merge_rows
from nvmm.kernels.multi_tensor import multi_tensor_l2norm, multi_tensor_scale
from nvmm.kernels.norm import eager_norm, norm, residual_norm
from nvmm.kernels.pixel_shuffle import eager_pixel_shuffle, pixel_shuffle
from nvmm.kernels.rope import rope

Variants = dict[str, Callable[..., Any]]
Steps = dict[str, Callable[[], Any]]
"""A name of a variant -> one measured step; the first is the kernel, the second eager."""
VOCABULARY = 152_064
CROSS_ENTROPY = "linear cross-entropy"
CROSS_ENTROPY_REPEATS = 3  # of seconds each
COMPILED = "torch.compile"
HEADER = (
    *("operation", "dtype", "kernel ms", "eager / kernel", "PyTorch's function / kernel"),
    *("compiled eager / kernel", "MiB beyond: kernel / eager / others"),
)


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Compute it as models write it: every step is a pass over memory."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def naive_residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then normalise."""
    total = x + residual
    return naive_rms_norm(total, weight), total


def fused_residual_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add, then normalise by PyTorch."""
    total = x + residual
    return eager_norm(total, weight, eps=1e-5, rms=True), total


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute LayerNorm by its definition."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight + bias


@functools.cache
def angles(rows: int, device: torch.device) -> Tensor:
    """Return [rows, 1, 64], the angles of heads of 128 channels."""
    return torch.outer(torch.arange(rows), 1e4 ** -(torch.arange(64) / 64))[:, None].to(device)


@functools.cache
def rotations(rows: int, device: torch.device) -> Tensor:
    """Return the table that all layers of a model share."""
    angle = angles(rows, device)
    return torch.cat([angle.cos(), angle.sin()], -1)


@functools.cache
def places(rows: int, device: torch.device) -> Tensor:
    """Return the numbers of every second row."""
    return torch.arange(0, rows, 2, device=device)


def kernel_rope(x: Tensor) -> Tensor:
    """Turn all heads as queries, so that there is one output to differentiate."""
    return rope(x, x.detach()[:, :, :0], rotations(x.shape[0], x.device))[0]


def naive_rope(x: Tensor) -> Tensor:
    """Turn queries, and then keys, as mcore does in every layer."""
    angle = angles(x.shape[0], x.device)
    freqs = torch.cat([angle, angle], -1)[:, :, None]
    a, b = x.chunk(2, -1)
    turned = x * freqs.cos().to(x.dtype) + torch.cat([-b, a], -1) * freqs.sin().to(x.dtype)
    return torch.cat([turned, x[..., 128:]], -1)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Make all logits at once, as mcore's output layer and loss do."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


def operations(rows: int, width: int) -> dict[str, tuple[Variants, list[tuple[int, ...]]]]:
    """Return name -> variants (the first is the kernel, the second eager), argument shapes."""
    found: dict[str, tuple[Variants, list[tuple[int, ...]]]] = {
        "RMSNorm": (
            {
                "kernel": lambda x, w: norm(x, w, eps=1e-5, rms=True),
                "eager": naive_rms_norm,
                "F.rms_norm": lambda x, w: eager_norm(x, w, eps=1e-5, rms=True),
            },
            [(rows, width), (width,)],
        ),
        "LayerNorm": (
            {
                "kernel": lambda x, w, b: norm(x, w, b, eps=1e-5, rms=False),
                "eager": naive_layer_norm,
                "F.layer_norm": lambda x, w, b: eager_norm(x, w, b, eps=1e-5, rms=False),
            },
            [(rows, width), (width,), (width,)],
        ),
        "residual add and RMSNorm": (
            {
                "kernel": lambda x, r, w: residual_norm(x, r, w, eps=1e-5, rms=True),
                "eager": naive_residual_norm,
                "F.rms_norm": fused_residual_norm,
            },
            [(rows, width), (rows, width), (width,)],
        ),
        "joint QK-norm": (
            {
                "kernel": lambda x, w: joint_norm([x], [w], eps=1e-5)[0],
                "eager": naive_rms_norm,
            },
            [(rows, width), (width,)],
        ),
        "LayerScale residual": (
            {"kernel": gated_residual, "eager": eager_gated_residual},
            [(rows, width), (rows, width), (width,), (width,)],
        ),
        "tanh-gated residual": (
            {
                "kernel": functools.partial(gated_residual, tanh=True),
                "eager": functools.partial(eager_gated_residual, tanh=True),
            },
            [(rows, width), (rows, width), (1,)],
        ),
        "RoPE": (
            {
                "kernel": kernel_rope,
                "eager": naive_rope,
            },
            [(rows, 1, width // 128, 128)],
        ),
        "merge of half the rows": (
            {
                "kernel": lambda x, v: merge_rows(x, v, places(x.shape[0], x.device)),
                "eager": lambda x, v: eager_merge_rows(x, v, places(x.shape[0], x.device)),
            },
            [(rows, width), ((rows + 1) // 2, width)],
        ),
        "pixel shuffle": (
            {
                "kernel": lambda x: pixel_shuffle(x, 2),
                "eager": lambda x: eager_pixel_shuffle(x, 2),
            },
            [(-(-rows // 1024), 32, 32, width)],
        ),
    }
    for kind, halves in (("swiglu", 2), ("geglu", 2), ("squared_relu", 1), ("gelu", 1)):
        found[f"{kind} with bias"] = (
            {
                "kernel": lambda x, b, k=kind: activation(x, b, kind=k),
                "eager": lambda x, b, k=kind: eager_activation(x, b, kind=k),
            },
            [(rows, width * halves), (width * halves,)],
        )
    return found


def differentiated(
    variants: Variants, inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> Steps:
    """Return forward and backward of each variant."""
    leaves = [t for t in inputs if t.requires_grad]
    ones: Any = upstream
    if upstream is None:
        ones = tree_map(torch.ones_like, next(iter(variants.values()))(*inputs))

    def step(function: Callable[..., Any]) -> Any:
        return torch.autograd.grad(function(*inputs), leaves, ones)

    return {name: functools.partial(step, function) for name, function in variants.items()}


def optimizers(
    sizes: Sequence[int], dtype: torch.dtype, moments: torch.dtype, device: str
) -> Steps:
    """Return steps of AdamW; of bf16 parameters ours keeps masters, torch's does not.

    Variants share their tensors as far as their dtypes agree: the place in memory alone makes a
    difference of half the time.
    """
    parameters, *shared = (
        [torch.rand(n, device=device).to(dtype) for n in sizes] for _ in range(3)
    )
    leaves = [torch.nn.Parameter(p) for p in parameters]
    for leaf in leaves:
        leaf.grad = torch.randn_like(leaf)
    options: Any = {"master_weights": True, "moments_dtype": moments}
    steps: Steps = {}
    for name, optimizer in {
        "kernel": FusedAdam(leaves, 1e-3, 0.1, **options),
        "eager": torch.optim.AdamW(leaves, 1e-3, weight_decay=0.1, foreach=True),
        "AdamW(fused=True)": torch.optim.AdamW(leaves, 1e-3, weight_decay=0.1, fused=True),
    }.items():
        optimizer.step()  # The first step allocates the state.
        for leaf, mean, square in zip(leaves, *shared, strict=True):
            state = optimizer.state[leaf]
            if state["exp_avg"].dtype == dtype:
                state |= {"exp_avg": mean, "exp_avg_sq": square}
        steps[name] = optimizer.step
    return steps


def lists(sizes: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Steps, Steps]:
    """Return norm, and scaling in place, of a list; eager is mcore's own fallback."""
    tensors = [torch.randn(n, device=device).to(dtype) for n in sizes]
    flag = torch.zeros(1, dtype=torch.int32, device=device)

    def eager_norms() -> float:
        return float(torch.stack([torch.norm(t) for t in tensors]).norm())

    def eager_scaling() -> None:
        for t in tensors:
            t.copy_(t * 0.999)

    norms: Steps = {
        "kernel": lambda: float(multi_tensor_l2norm(0, flag, [tensors])[0]),
        "eager": eager_norms,
        "torch._foreach": lambda: float(torch.stack(torch._foreach_norm(tensors)).norm()),
    }
    scalings: Steps = {
        "kernel": lambda: multi_tensor_scale(0, flag, [tensors, tensors], 0.999),
        "eager": eager_scaling,
        "torch._foreach": lambda: torch._foreach_mul_(tensors, 0.999),
    }
    return norms, scalings


def cases(rows: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Steps]]:
    """Return title -> a function that makes its steps, for tensors of `rows` x `width` elements."""

    def operation(variants: Variants, shapes: list[tuple[int, ...]]) -> Steps:
        inputs = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
        return differentiated(variants | compiled(variants["eager"]), inputs)

    def cross_entropy() -> Steps:
        hidden = torch.randn(min(rows, 512), 896, device=device)
        weight = torch.randn(VOCABULARY, 896, device=device) / 30
        labels = torch.randint(0, VOCABULARY, (hidden.shape[0],), device=device)
        inputs = [*(t.to(dtype).requires_grad_() for t in (hidden, weight)), labels]
        variants: Variants = {"kernel": linear_cross_entropy, "eager": eager_cross_entropy}
        variants |= compiled(eager_cross_entropy)
        return differentiated(variants, inputs, torch.ones(hidden.shape[0], device=device))

    found: dict[str, Callable[[], Steps]] = {
        f"{title} {rows} x {width}": functools.partial(operation, *arguments)
        for title, arguments in operations(rows, width).items()
    }
    found[CROSS_ENTROPY] = cross_entropy
    splits = {"one tensor": [rows * width], "400 tensors": [rows * width // 4000] * 400}
    for what, sizes in splits.items():
        for moments in (torch.float32, torch.bfloat16):
            title = f"AdamW, {str(moments)[6:]} means, {what}"
            found[title] = functools.partial(optimizers, sizes, dtype, moments, device)
        found[f"norm of a list, {what}"] = lambda s=sizes: lists(s, dtype, device)[0]
        found[f"scaling of a list, {what}"] = lambda s=sizes: lists(s, dtype, device)[1]
    return found


_compile = False


def compiled(function: Callable[..., Any]) -> Variants:
    """Return torch.compile of a function, where that is asked for."""
    return {COMPILED: torch.compile(function)} if _compile else {}


def medians(steps: Steps, repeats: int, device: str) -> dict[str, float]:
    """Return milliseconds of each variant, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # The first makes threads, libraries and compiled code.
                times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


Setting = tuple[int, int, torch.dtype, str, bool]


def build(setting: Setting, number: int, rows: int | None = None) -> Steps:
    """Return the steps of the case with this number."""
    global _compile
    whole, width, dtype, device, _compile = setting
    torch.set_num_threads(1)
    # A kernel that gave way to eager would be measured as itself.
    Kernels.all("fused").install()
    return list(cases(rows or whole, width, dtype, device).values())[number]()


def peak_memory(setting: Setting, number: int, name: str, pipe: Any) -> None:
    """Send the bytes that a step takes above what was there and what it gives."""
    # A step before the count loads libraries, starts threads and compiles code.
    build(setting, number, rows=8)[name]()
    step = build(setting, number)[name]
    if name == COMPILED:
        step()
    on_gpu = setting[3] == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    found = step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")
    given = found if isinstance(found, tuple) else ()
    given_bytes = sum(t.numel() * t.element_size() for t in given)
    pipe.send(max(peak - before - given_bytes, 0))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def in_process(*arguments: Any) -> float:
    """Measure `peak_memory` in a process of its own, in MiB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak_memory, args=(*arguments, sender))
    # In the new process, large blocks go back to the system once they are free.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    process.start()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    sender.close()
    memory: int = receiver.recv()
    process.join()
    return memory / 2**20


def row(title: str, dtype: str, times: dict[str, float], memory: dict[str, float]) -> str:
    """Return a row of the table: each variant's time over the kernel's, and all memory."""
    others = [name for name in times if name not in ("kernel", "eager", COMPILED)]
    ratios = {name: f"{times[name] / times['kernel']:.2f}" for name in times}
    fused = ", ".join(f"{ratios[name]} ({name})" for name in others)
    sizes = " / ".join(f"{memory[name]:.0f}" for name in times)
    cells = [title, dtype, f"{times['kernel']:.1f}", ratios["eager"], fused]
    return f"| {' | '.join([*cells, ratios.get(COMPILED, ''), sizes])} |"


def main() -> None:
    """Print a row for each operation and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile of eager too",
    )
    parser.add_argument("--only", default="", help="titles that contain this")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if MISSING:
        raise SystemExit(f"no kernels to measure: {MISSING}")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name in arguments.dtypes:
        dtype, size = getattr(torch, name), (arguments.rows, arguments.width)
        setting = (*size, dtype, arguments.device, arguments.compile)
        for number, title in enumerate(cases(*size, dtype, arguments.device)):
            if arguments.only not in title:
                continue
            steps = build(setting, number)
            names = list(steps)
            repeats = arguments.repeats
            if title == CROSS_ENTROPY:
                repeats = min(repeats, CROSS_ENTROPY_REPEATS)
            times = medians(steps, repeats, arguments.device)
            del steps
            memory = {variant: in_process(setting, number, variant) for variant in names}
            print(row(title, name, times, memory), flush=True)


if __name__ == "__main__":
    main()
