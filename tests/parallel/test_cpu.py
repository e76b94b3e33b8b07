"""The CPU layer answers megatron-core's CUDA calls without taxing other torch calls."""

from __future__ import annotations

import subprocess
import sys

import torch

from nvmm.parallel.setup import prepare_backend

prepare_backend()


def test_factories_take_cuda_devices_and_pinned_memory() -> None:
    for device in ("cuda", 0, torch.device("cuda", 0)):
        assert torch.tensor([1.0], device=device).device.type == "cpu"
        assert torch.zeros(2, device=device, pin_memory=True).device.type == "cpu"
    assert torch.ones_like(torch.zeros(1), device="cuda").device.type == "cpu"
    assert torch.zeros(1).to("cuda").device.type == "cpu"
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")


def test_factories_keep_other_devices_and_values() -> None:
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros(1).to("meta").device.type == "meta"
    assert torch.full((2,), 3.0).tolist() == [3.0, 3.0]
    assert torch.zeros(1).to(torch.bfloat16).dtype == torch.bfloat16


def test_a_device_context_is_obeyed_in_a_fresh_process() -> None:
    """Transformers' from_pretrained builds in one; without it RoPE's frequencies stay unset."""
    script = """
import torch
from nvmm.parallel.setup import prepare_backend
prepare_backend()
with torch.device("meta"):
    made = [torch.empty(2), torch.arange(3), torch.tensor([1]), torch.nn.Linear(2, 3).weight]
assert {tensor.device.type for tensor in made} == {"meta"}
assert torch.empty(2).device.type == "cpu"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_tensor_type_is_what_megatron_compares() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32


def test_rng_tracker_forks_real_states() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(1)
    expected = torch.rand(3)
    tracker = CudaRNGStatesTracker()
    tracker.add("other", 5)
    torch.manual_seed(1)
    with tracker.fork("other"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork("other"):
        second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(6), torch.cat([first, second]))


def test_streams_and_events_do_nothing() -> None:
    event = torch.cuda.Event()
    event.record()
    torch.cuda.current_stream().wait_event(event)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
