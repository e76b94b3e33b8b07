"""Time and memory of the kernels, beside eager PyTorch, its own fused functions and torch.compile.

`make bench-kernels` runs it on one thread. All variants of an operation take turns in one process,
forward and backward; the median of their times is printed, and of the linear cross-entropy the
memory above its arguments and gradients, each variant in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.kernels.activation import activation, eager_activation
from nvmm.kernels.gated_residual import eager_gated_residual, gated_residual
from nvmm.kernels.library import MISSING
from nvmm.kernels.linear_cross_entropy import linear_cross_entropy
from nvmm.kernels.merge import eager_merge_rows, merge_rows
from nvmm.kernels.norm import eager_norm, norm
from nvmm.kernels.pixel_shuffle import eager_pixel_shuffle, pixel_shuffle
from nvmm.kernels.rope import rope

Variants = dict[str, Callable[..., Tensor]]
VOCABULARY = 152_064


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As models write it: every step a pass over memory."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm by its definition."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight + bias


@functools.cache
def angles(rows: int, device: torch.device) -> Tensor:
    """[rows, 1, 64] of heads of 128 channels."""
    return torch.outer(torch.arange(rows), 1e4 ** -(torch.arange(64) / 64))[:, None].to(device)


@functools.cache
def rotations(rows: int, device: torch.device) -> Tensor:
    """The table that all layers of a model share."""
    angle = angles(rows, device)
    return torch.cat([angle.cos(), angle.sin()], -1)


@functools.cache
def places(rows: int, device: torch.device) -> Tensor:
    """Every second row."""
    return torch.arange(0, rows, 2, device=device)


def kernel_rope(x: Tensor) -> Tensor:
    """All heads as queries, so that there is one output to differentiate."""
    return rope(x, x.detach()[:, :, :0], rotations(x.shape[0], x.device))[0]


def naive_rope(x: Tensor) -> Tensor:
    """As mcore turns queries, and then keys, in every layer."""
    angle = angles(x.shape[0], x.device)
    freqs = torch.cat([angle, angle], -1)[:, :, None]
    a, b = x.chunk(2, -1)
    turned = x * freqs.cos().to(x.dtype) + torch.cat([-b, a], -1) * freqs.sin().to(x.dtype)
    return torch.cat([turned, x[..., 128:]], -1)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The whole logits, as mcore's output layer and loss make them."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


def operations(rows: int, width: int) -> dict[str, tuple[Variants, list[tuple[int, ...]]]]:
    """Name -> variants (the first is the kernel, the second eager), shapes of the arguments."""
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
        "LayerScale residual": (
            {"kernel": gated_residual, "eager": eager_gated_residual},
            [(rows, width), (rows, width), (width,), (width,)],
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
    for kind, halves in (("swiglu", 2), ("gelu", 1)):
        found[f"{kind} with bias"] = (
            {
                "kernel": lambda x, b, k=kind: activation(x, b, kind=k),
                "eager": lambda x, b, k=kind: eager_activation(x, b, kind=k),
            },
            [(rows, width * halves), (width * halves,)],
        )
    return found


def step(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor | None) -> Tensor:
    """Forward and backward; returns the gradient of the output for the next call."""
    y = function(*inputs)
    dy = torch.randn_like(y) if dy is None else dy
    torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)
    return dy


def medians(variants: Variants, inputs: Sequence[Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of each variant, which take turns."""
    upstream = {name: step(f, inputs, None) for name, f in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            begin = time.perf_counter()
            step(function, inputs, upstream[name])
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def report(title: str, times: dict[str, float]) -> None:
    """One line: milliseconds, and how many times the kernel's each is."""
    kernel = times["kernel"]
    parts = [f"{name} {value:.1f} ms ({value / kernel:.2f}x)" for name, value in times.items()]
    print(f"{title}: {', '.join(parts)}", flush=True)


def cross_entropy_inputs(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, labels"""
    hidden, weight = torch.randn(rows, width), torch.randn(VOCABULARY, width) / width**0.5
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    return [*leaves, torch.randint(0, VOCABULARY, (rows,))]


def peak_memory(name: str, rows: int, width: int, dtype: torch.dtype, pipe: Any) -> None:
    """Send the bytes that forward and backward take above what was there, and the time (s)."""
    torch.set_num_threads(1)
    inputs = cross_entropy_inputs(rows, width, dtype)
    function = {"kernel": linear_cross_entropy, "eager": eager_cross_entropy}[name]
    small = [inputs[0][:8].detach().requires_grad_(), inputs[1], inputs[2][:8]]
    step(function, small, None)  # libraries and threads are there before the count
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _status("VmRSS"), time.perf_counter()
    step(function, inputs, torch.ones(rows))
    seconds = time.perf_counter() - begin
    gradients = sum(t.numel() * t.element_size() for t in inputs[:2])
    pipe.send((_status("VmHWM") - before - gradients, seconds))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def cross_entropy(rows: int, width: int, dtype: torch.dtype) -> None:
    """Memory and time of both variants, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in ("kernel", "eager"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_memory, args=(name, rows, width, dtype, sender))
        process.start()
        found[name] = receiver.recv()
        process.join()
    (ours, our_time), (theirs, their_time) = found["kernel"], found["eager"]
    print(
        f"linear cross-entropy {rows} x {width} x {VOCABULARY} {str(dtype)[6:]}:"
        f" kernel {ours / 2**20:.0f} MiB {our_time:.2f} s,"
        f" eager {theirs / 2**20:.0f} MiB {their_time:.2f} s"
        f" (memory {theirs / ours:.1f}x, time {their_time / our_time:.2f}x)",
        flush=True,
    )


def main() -> None:
    """Print a line for each operation and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile too (a minute each)")
    parser.add_argument(
        "--device", default="cpu", help="cuda leaves out the cross-entropy's memory"
    )
    arguments = parser.parse_args()
    if MISSING:
        raise SystemExit(f"no kernels to measure: {MISSING}")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for title, (variants, shapes) in operations(arguments.rows, arguments.width).items():
            inputs = [
                torch.randn(shape, device=arguments.device).to(dtype).requires_grad_()
                for shape in shapes
            ]
            if arguments.compile:
                variants = variants | {"compiled eager": torch.compile(variants["eager"])}
            times = medians(variants, inputs, arguments.repeats)
            report(f"{title} {arguments.rows} x {arguments.width} {str(dtype)[6:]}", times)
        if arguments.device == "cpu":
            cross_entropy(512, 896, dtype)


if __name__ == "__main__":
    main()
