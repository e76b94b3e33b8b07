"""nvcc compiles every .cu for every architecture, within budgets that ptxas reports."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels.simulated import ROOT, builder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(builder().nvcc() is None, reason="no nvcc"),
]
SOURCES = [str(path.relative_to(ROOT / "csrc")) for path in builder().sources(".cu")]
# Of a thread: what nvcc 13.0 takes on its greediest architecture, and at most 64, which lets two
# blocks of 512 threads share a multiprocessor's 65,536.
REGISTERS = {
    "activation_backward": 64,
    "activation_forward": 40,
    "adamw_update": 61,
    "gated_backward": 64,
    "gated_forward": 48,
    "joint_apply": 32,
    "joint_backward": 32,
    "joint_squares_reduce": 32,
    "joint_sums_reduce": 40,
    "logits_gradient": 32,
    "logits_reduce": 32,
    "merge_backward": 32,
    "merge_forward": 32,
    "norm_backward": 48,
    "norm_forward": 40,
    "norm_reduce": 26,
    "pixel_shuffle": 32,
    "rope": 34,
    "scale_list": 32,
    "squares_reduce": 38,
    "sum_rows": 32,
}
# Parameters that kernels on packs read, and those that they write, 16 bytes at a time and no other
# way. What is left out is read once a row or for all rows, or holds sums that stay in cache.
OPERANDS = {
    "activation_backward": ({0, 1, 2}, {3}),
    "activation_forward": ({0, 1}, {2}),
    "gated_backward": ({0, 1, 2}, {5}),
    "gated_forward": ({0, 1, 2}, {5}),
    "joint_apply": ({0, 1}, {3}),
    "joint_backward": ({0, 1, 2}, {5}),
    "joint_squares_reduce": ({0}, set()),
    "joint_sums_reduce": ({0, 1, 2}, set()),
    "logits_gradient": ({0}, {0}),
    "logits_reduce": ({0}, set()),
    "merge_backward": ({0}, {2, 3}),
    "merge_forward": ({0, 1}, {3}),
    "norm_backward": ({0, 1, 2, 3}, {6}),
    "norm_forward": ({0, 1, 2, 3}, {4, 5}),
    "pixel_shuffle": ({0}, {1}),
    "rope": ({0, 1, 2}, {3, 4}),
}
# Lists that kernels over many tensors read and write so: master or parameter, gradient, both means.
LISTS = {"adamw_update": (4, 3), "scale_list": (1, 1), "squares_reduce": (1, 0)}
TAILED = {"logits_reduce", *LISTS}  # what is left behind the last pack goes one by one
WIDE = re.compile(r"\.(?:v4\.[bfu]32|v2\.[bfu]64)$")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores,"
    r" (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernel_of(mangled: str) -> str:
    """_ZN4nvmm12norm_forwardI... -> norm_forward"""
    match = re.match(r"_ZN4nvmm(\d+)(\w+)", mangled)
    assert match is not None, mangled
    return match[2][: int(match[1])]


@pytest.mark.parametrize("architecture", builder().ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_budgets(source: str, architecture: str, tmp_path: Path) -> None:
    """No stack, no spills, no static shared memory, and each kernel's registers."""
    build = builder()
    command = build.device_command(ROOT / "csrc" / source, build.nvcc(), [architecture])
    output = build.run([*command, "-Xptxas", "-v", "-o", str(tmp_path / "object.o")])
    kernels = [match.groupdict() for match in REPORT.finditer(output)]
    assert len(kernels) == output.count("Compiling entry function") > 0
    assert {k["architecture"] for k in kernels} == {f"sm_{architecture}"}
    for kernel in kernels:
        assert [kernel[key] for key in ("stack", "stores", "loads")] == ["0", "0", "0"], kernel
        assert int(kernel["registers"]) <= REGISTERS[kernel_of(kernel["name"])], kernel
        assert " smem" not in kernel["rest"], kernel


def accesses(entry: str) -> dict[tuple[str, int], Counter[bool]]:
    """(ld | st, what the address came from) -> how many accesses are 16 bytes wide, how many not.

    An address comes from a parameter, by its number, or from a place in a parameter that is a list
    of addresses.
    """
    origins: dict[str, set[int]] = {}
    lines = [
        line.split("}", 1)[-1] if line.lstrip().startswith("@") else line
        for line in entry.splitlines()
    ]
    statements = [re.sub(r"^\s*@!?%p\d+\s+", "", line).strip(" \t;") for line in lines]
    for _ in range(3):  # loops define a register behind its use
        for statement in statements:
            name, _, rest = statement.partition("\t")
            target, _, source = rest.partition(",")
            if not target.startswith("%rd") or name.startswith(("ld.global", "ld.shared")):
                continue
            found = {int(n) for n in re.findall(r"_param_(\d+)\]?$", source)}
            in_list = re.search(r"\[%rd\d+\+?(-?\d+)?\]", source)
            if name.startswith("ld.param") and in_list:
                found = {int(in_list[1] or 0)}
            else:
                for register in re.findall(r"%rd\d+", source):
                    found |= origins.get(register, set())
            origins.setdefault(target, set()).update(found)
    counts: dict[tuple[str, int], Counter[bool]] = {}
    for statement in statements:
        match = re.match(r"((ld|st)\.global\S*)\s.*\[(%rd\d+)", statement)
        if match:
            for origin in origins.get(match[3], ()):
                counts.setdefault((match[2], origin), Counter())[bool(WIDE.search(match[1]))] += 1
    return counts


@pytest.mark.parametrize("source", SOURCES)
def test_wide_loads_and_stores(source: str, tmp_path: Path) -> None:
    """Every kernel on packs of float32, bfloat16 and float16 moves 16 bytes of each operand."""
    build = builder()
    target = tmp_path / "kernels.ptx"
    command = build.device_command(ROOT / "csrc" / source, build.nvcc(), architectures=())
    command.remove("-c")
    build.run([*command, "-ptx", "-arch=sm_90a", "-o", str(target)])
    check_wide(target.read_text())


def check_wide(ptx: str) -> None:
    """Every entry on packs touches its operands as OPERANDS or LISTS says."""
    entries = re.split(r"\.visible \.entry |\.entry ", ptx)[1:]
    packed = [e for e in entries if re.search(r"Li[48]E", e.split("(")[0])]
    dtypes: dict[str, set[str]] = {}
    for entry in packed:
        mangled = entry.split("(")[0]
        kernel = kernel_of(mangled)
        dtypes.setdefault(kernel, set()).update(re.findall(r"8BFloat16|4Half|If", mangled))
        counts = accesses(entry)
        for kind, index in (("ld", 0), ("st", 1)):
            found = {origin: n for (k, origin), n in counts.items() if k == kind}
            wide = {origin for origin, n in found.items() if n[True]}
            if kernel in LISTS:
                assert len(wide) >= LISTS[kernel][index], (mangled, kind, found)
                continue
            claimed = OPERANDS[kernel][index]
            assert claimed <= wide, (mangled, kind, found)
            if kernel not in TAILED:
                assert not any(found[origin][False] for origin in claimed), (mangled, kind, found)
    assert dtypes and all(len(kinds) == 3 for kinds in dtypes.values()), dtypes
