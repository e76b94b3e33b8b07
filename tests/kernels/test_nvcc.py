"""nvcc compiles every .cu for every architecture, within budgets that ptxas reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernels.simulated import ROOT, builder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(builder().nvcc() is None, reason="no nvcc"),
]
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))
REGISTERS = 64  # of 65,536: two blocks of 512 threads on a multiprocessor
# 16 bytes at a time: .v4 of 32 bits, .v2 of 64.
WIDE_LOAD = re.compile(r"ld\.global(?:\.nc)?(?:\.L\S+)?\.(?:v4\.[bfu]32|v2\.[bfu]64)")
WIDE_STORE = re.compile(r"st\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@pytest.mark.parametrize("source", SOURCES)
def test_budgets(source: str, tmp_path: Path) -> None:
    """No stack, no spills, at most 64 registers, no static shared memory, on any architecture."""
    build = builder()
    command = build.device_command(ROOT / "csrc" / source, build.nvcc())
    output = build.run([*command, "-Xptxas", "-v", "-o", str(tmp_path / "object.o")])
    kernels = [match.groupdict() for match in REPORT.finditer(output)]
    assert {k["architecture"] for k in kernels} == {f"sm_{a}" for a in build.ARCHITECTURES}
    for kernel in kernels:
        assert [kernel[key] for key in ("stack", "stores", "loads")] == ["0", "0", "0"], kernel
        assert int(kernel["registers"]) <= REGISTERS, kernel
        assert " smem" not in kernel["rest"], kernel


@pytest.mark.parametrize("source", SOURCES)
def test_wide_loads_and_stores(source: str, tmp_path: Path) -> None:
    """Every kernel on packs of float32, bfloat16 and float16 moves 16 bytes at a time."""
    build = builder()
    target = tmp_path / "kernels.ptx"
    command = build.device_command(ROOT / "csrc" / source, build.nvcc(), architectures=())
    command.remove("-c")
    build.run([*command, "-ptx", "-arch=sm_90a", "-o", str(target)])
    entries = re.split(r"\.visible \.entry |\.entry ", target.read_text())[1:]
    packed = [e for e in entries if re.search(r"Li[48]E", e.split("(")[0])]
    assert len(packed) >= 3
    for entry in packed:
        assert WIDE_LOAD.search(entry), entry.split("(")[0]
        if "reduce" not in entry.split("(")[0]:  # logits_reduce writes three numbers a row
            assert WIDE_STORE.search(entry), entry.split("(")[0]
