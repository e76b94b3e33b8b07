"""The choices, the fallback without a library, and the build's messages."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvmm.kernels import library
from nvmm.kernels.library import Kernels, fused
from nvmm.kernels.norm import eager_norm, norm
from tests.kernels.accuracy import needs_kernels
from tests.kernels.simulated import ROOT, builder

X = torch.ones(2, 4)
CHOICE_NAMES = [field.name for field in dataclasses.fields(Kernels)]


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_choices", Kernels())


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels.norm=fast must be one of auto, eager, fused"):
        Kernels(norm="fast")


@needs_kernels
def test_choices() -> None:
    assert fused("norm", X, None)
    Kernels(norm="eager").install()
    assert not fused("norm", X) and fused("activation", X)


@needs_kernels
@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ((X.double(),), "no kernel for torch.float64 on cpu"),
        ((X.half(),), "no kernel for torch.float16 on cpu"),
        ((X, X.bfloat16()), "tensors of different dtypes"),
        ((X.to("meta"),), "no kernel for device meta"),
    ],
)
def test_what_has_no_kernel_runs_eagerly_unless_told_otherwise(
    tensors: tuple[torch.Tensor, ...], problem: str
) -> None:
    assert not fused("norm", *tensors)
    Kernels(norm="fused").install()
    with pytest.raises(ValueError, match=f"kernels.norm=fused does not work here: {problem}"):
        fused("norm", *tensors)


def test_without_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "MISSING", "the kernels are not built (nvmm kernels build)")
    weight = torch.ones(4)
    assert torch.equal(
        norm(X, weight, eps=1e-5, rms=True), eager_norm(X, weight, eps=1e-5, rms=True)
    )
    with caplog.at_level(logging.INFO, "nvmm"):
        Kernels().install()
    assert caplog.messages == [
        "kernels: eager PyTorch, the kernels are not built (nvmm kernels build)"
    ]
    with pytest.raises(
        ValueError, match=r"kernels.norm=fused needs the kernels, but the kernels are"
    ):
        Kernels(norm="fused")


def test_a_build_that_failed_once_says_how_to_try_again(tmp_path: Path) -> None:
    (tmp_path / "failed.txt").write_text("no C++ compiler")
    reason = library.build.build_once(tmp_path / "native.so")
    assert reason is not None and reason.startswith("no C++ compiler (")
    assert "nvmm kernels build" in reason


def test_build_without_a_compiler_says_so_and_succeeds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nvmm", "kernels", "build"]
    command += ["--to", str(tmp_path / "native.so")]
    environment = {"PATH": str(tmp_path), "CUDA_HOME": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("kernels are not built, eager PyTorch is used: no C++ compiler")
    required = subprocess.run(
        [*command, "--require"], cwd=ROOT, env=environment, capture_output=True
    )
    assert required.returncode == 1


def test_a_source_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    with pytest.raises(builder().BuildError, match="exit 3"):
        builder().run(["sh", "-c", "echo exit 3; exit 3"])


@pytest.mark.parametrize(
    ("kernels", "device", "message"),
    [
        (Kernels(), "cuda", f"eager PyTorch, {library.PATH} was built without CUDA"),
        (
            Kernels(**dict.fromkeys(CHOICE_NAMES, "eager")),
            "cpu",
            "eager PyTorch, as the config says",
        ),
        (Kernels(**dict.fromkeys(CHOICE_NAMES, "eager") | {"norm": "auto"}), "cpu", "norm"),
    ],
)
@needs_kernels
def test_the_log_says_what_runs_on_the_device(
    kernels: Kernels,
    device: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    with caplog.at_level(logging.INFO, "nvmm"):
        kernels.install(device)
        kernels.install(device, log=False)
    assert caplog.messages == [f"kernels: {message}"]


@needs_kernels
def test_fused_is_refused_for_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    with pytest.raises(ValueError, match=r"kernels.rope=fused needs .* was built without CUDA"):
        Kernels(rope="fused").install("cuda")
