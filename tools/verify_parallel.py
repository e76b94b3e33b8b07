"""Prove that a config's parallel layout computes what one rank computes.

    python tools/verify_parallel.py experiment=nvlm_d/sft_72b \\
        parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true

Takes the overrides of `python -m nvmm.train`. The config is shrunk, data, tokenizer and paths
become synthetic, more than 4 ranks become 2 of each kind of parallelism; then the layout trains
5 steps on gloo ranks of this machine beside one rank (nvmm/proof/equivalence.py defines equal).
Exit status: 0 equal, 1 different (the parameters are named), 2 a bad config.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvmm.proof.equivalence import Comparison, Result
    from nvmm.proof.miniature import Layout, Miniature

DIFFERENT, BAD_CONFIG = 1, 2
NUM_STEPS = 5
SHOWN = ("num_layers", "heads", "groups", "hidden", "precision")
FIELDS = "{:34} {:>22} {:>22} {:>10}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-size", type=int, help="ranks of the full layout, for its DP")
    parser.add_argument("--all", action="store_true", help="list every change of the config")
    parser.add_argument(
        "--fault", metavar="MODULE:FUNCTION", help="call this first on the layout's ranks"
    )
    options, overrides = parser.parse_known_args()
    if not overrides:
        parser.error("name an experiment, as for python -m nvmm.train")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.argv[1:] = overrides

    from nvmm.config import compose
    from nvmm.proof.miniature import miniature

    job = compose.load("train", ranks=options.world_size, placeholders=True)
    if job is None:
        return 0
    try:
        small = miniature(job.config, options.world_size)
    except ValueError as error:
        compose.refuse("train", [error])
    packed = bool(job.config["data"].get("pack"))
    describe(small, job, packed=packed, everything=options.all)
    fault = None
    if options.fault is not None:
        sys.path.insert(0, os.getcwd())
        module, _, name = options.fault.partition(":")
        fault = getattr(importlib.import_module(module), name)
    return verify(small, packed=packed, fault=fault)


def describe(small: Miniature, job: Any, *, packed: bool, everything: bool) -> None:
    """Print the layout that was asked for and the one that stands for it."""
    print(f"layout      {small.full}")
    if len(small.layouts) > 1 or small.layouts[0].name != small.full:
        names = " and ".join(f"{x.name} ({x.world_size} ranks)" for x in small.layouts)
        print(f"run as      {names}")
    shown = [line for line in small.changes if everything or any(name in line for name in SHOWN)]
    print("shrunk      " + "\n            ".join(shown))
    if len(shown) < len(small.changes):
        print(f"            ... and {len(small.changes) - len(shown)} more (--all lists them)")
    rows = "one packed row" if packed else "2 padded rows"
    print(f"synthetic   data: 4 micro-batches a step, {rows} each, some without images")
    print(
        "            tokenizer: 509 token ids drawn at random; precision:"
        f" {small.config.get('precision', {}).get('dtype', 'fp32')}; dropout: 0"
    )
    if job.placeholders:
        print(f"            not set, not needed: {', '.join(job.placeholders)}")


def verify(small: Miniature, *, packed: bool, fault: Callable[[], None] | None = None) -> int:
    """Run one rank and every layout, print their tables; return the exit status.

    fault: called first on the ranks of a layout, not on the one rank that it is compared with.
    """
    from nvmm.proof.equivalence import compare, run
    from nvmm.proof.miniature import ONE_RANK

    status = 0
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        options: dict[str, Any] = {"num_steps": NUM_STEPS, "packed": packed}
        try:
            expected = run(small.config, ONE_RANK, weights=weights, **options)
        except RuntimeError as error:
            print(f"\nrefused: the shrunk config does not train on one rank\n{error}")
            return BAD_CONFIG
        for layout in small.layouts:
            begin = time.monotonic()
            try:
                result = run(small.config, layout, reference=weights, fault=fault, **options)
            except (RuntimeError, TimeoutError) as error:
                print(f"\nDIFFERENT: one rank trains, {layout.name} fails\n{error}")
                status = DIFFERENT
                continue
            comparison = compare(expected, result)
            show(expected, result, comparison, layout, time.monotonic() - begin)
            status = status if comparison.equal else DIFFERENT
    return status


def show(
    expected: Result, result: Result, comparison: Comparison, layout: Layout, seconds: float
) -> None:
    """Return the table of one layout beside one rank."""
    print("\n" + FIELDS.format("", "one rank", layout.name.partition(",")[0], "relative"))
    for name, attribute in (("loss", "losses"), ("grad norm", "grad_norms")):
        pairs = zip(getattr(expected, attribute), getattr(result, attribute), strict=True)
        for step, (a, b) in enumerate(pairs, 1):
            off = f"{abs(b - a) / max(abs(a), 1e-30):.1e}"
            print(FIELDS.format(f"{name}, step {step}", f"{a:.9g}", f"{b:.9g}", off))
    for rank, held in enumerate(result.tokens):
        alone = sum(expected.tokens[0]) if rank == 0 else ""
        print(FIELDS.format(f"tokens held by rank {rank}", alone, sum(held), "").rstrip())
    print("worst gradients, as rms(difference) / max(rms, 1 % of all gradients' rms); bound 1e-5")
    for name, error in comparison.worst:
        print(f"  {name:69} {error:10.1e}")
    verdict = "EQUAL" if comparison.equal else "DIFFERENT"
    print(
        f"{verdict}: {comparison.num_parameters} of {len(expected.gradients[0])} parameters"
        f" compared, {len(comparison.failures)} failures, {layout.world_size} ranks,"
        f" {seconds:.0f} s"
    )
    for failure in comparison.failures:
        print(f"  {failure}")


if __name__ == "__main__":
    sys.exit(main())
