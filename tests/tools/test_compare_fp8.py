"""tools/compare_fp8.py: variants that differ in precision alone, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

from nvmm.config.check import check, to_plain
from nvmm.config.compose import composed
from nvmm.data.prepare import digits
from tools import compare_fp8


def test_variants_differ_in_precision_alone() -> None:
    found = {}
    for name in compare_fp8.VARIANTS:
        command = compare_fp8.variant(name, 5, Path("runs/x"), 300).commands[2]
        config = composed("train", command.arguments[4:])
        assert check(config) == [], name
        found[name] = to_plain(config)
    own = {name: (c.pop("precision"), c.pop("kernels"), c.pop("run")) for name, c in found.items()}
    assert all(config == found["fp32"] for config in found.values())
    recipes = {
        name: p["fp8"].get("recipe", "delayed") for name, (p, *_) in own.items() if "fp8" in p
    }
    assert recipes == {name: name for name in ("delayed", "current", "blockwise", "mxfp8")}
    assert {p.get("dtype", "fp32") for name, (p, *_) in own.items() if name != "bf16"} == {"fp32"}
    assert own["fp32_eager"][1] != own["fp32"][1] == own["bf16"][1]


def test_report_compares_with_float32_of_the_same_seed(tmp_path: Path) -> None:
    losses = [0.9] * 5 + [0.5] * compare_fp8.LAST
    lines = "\n".join(json.dumps({"loss": loss}) for loss in losses)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert compare_fp8.final_loss(tmp_path) == 0.5
    scores = {f"exact_match_{kind}": 0.25 for kind in digits.KINDS}
    scores |= {"exact_match": 0.5, "cpu_seconds": 100.0}
    plain = [scores | {"loss": 0.5}, scores | {"loss": 0.4}]
    table = compare_fp8.report({"fp32": plain, "mxfp8": [s | {"loss": 0.5} for s in plain]})
    assert "| mxfp8   | 0.5000 ± 0.0000 | 12.50 ± 17.68 |" in table
