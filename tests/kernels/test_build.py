"""What the build makes loads: a CUDA build under a torch without CUDA too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvmm.kernels import library
from tests.kernels.simulated import ROOT, builder

_LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nvmm::")]
assert len(names) > 10
for name in names:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
x = torch.tensor([[3.0, 4.0]])
y = torch.ops.nvmm.norm(x, None, torch.tensor([1.0, 2.0]), None, 0.0, True, False)[0]
torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
"""


@pytest.mark.slow
@pytest.mark.skipif(builder().nvcc() is None, reason="no nvcc")
def test_a_cuda_build_loads_and_runs_on_the_cpu(tmp_path: Path) -> None:
    target = tmp_path / "native.so"
    command = [sys.executable, "-m", "nvmm", "kernels", "build", "--cuda", "--to", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, str(target)], capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr


def test_a_library_that_does_not_load_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "native.so"
    broken.write_text("no library")
    monkeypatch.setattr(library, "PATH", broken)
    reason = library._load()
    assert reason is not None and reason.startswith(f"{broken} does not load: ")
    assert "file too short" in reason or "invalid ELF header" in reason
