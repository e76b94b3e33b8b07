"""Prove that a config's parallel layout computes what one rank computes.

    nvmm verify-parallel experiment=nvlm_d/sft_72b \\
        parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true

Takes the overrides of `nvmm train`. The config is shrunk, data, tokenizer and paths
become synthetic, more than 4 ranks become 2 of each kind of parallelism; then the layout trains
5 steps on gloo ranks of this machine beside one rank (nvmm/proof/equivalence.py defines equal).
Where single precision alone may make the difference, both run again in double precision.
Exit status: 0 equal, 1 different (the parameters are named), 2 a bad config, 3 a difference that
the config means (an objective that compares the samples of a rank alone).
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

from nvmm.proof.miniature import ONE_RANK

if TYPE_CHECKING:
    from collections.abc import Callable

    from nvmm.proof.equivalence import Comparison, Result
    from nvmm.proof.miniature import Layout, Miniature

DIFFERENT, BAD_CONFIG, MEANT = 1, 2, 3
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
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="run in bf16; at most twice one rank's own distance from double precision is equal",
    )
    options, overrides = parser.parse_known_args()
    if not overrides:
        parser.error("name an experiment, as for nvmm train")
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
    describe(small, job, packed=packed, everything=options.all, bf16=options.bf16)
    fault = None
    if options.fault is not None:
        module, _, name = options.fault.partition(":")
        fault = getattr(importlib.import_module(module), name)
    return verify(small, packed=packed, fault=fault, bf16=options.bf16)


def describe(small: Miniature, job: Any, *, packed: bool, everything: bool, bf16: bool) -> None:
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
    count = small.num_micro_batches
    print(f"synthetic   data: {count} micro-batches a step, {rows} each, some without images")
    print(
        "            tokenizer: 509 token ids drawn at random; precision:"
        f" {'bf16' if bf16 else small.config.get('precision', {}).get('dtype', 'fp32')}; dropout: 0"
    )
    chosen = {k: v for k, v in small.config.get("kernels", {}).items() if v in ("eager", "fused")}
    if chosen:
        print(f"            kernels: {', '.join(f'{k}={v}' for k, v in chosen.items())}")
    if job.placeholders:
        print(f"            not set, not needed: {', '.join(job.placeholders)}")


def verify(
    small: Miniature,
    *,
    packed: bool,
    fault: Callable[[], None] | None = None,
    bf16: bool = False,
) -> int:
    """Run one rank and every layout, print their tables; return the exit status.

    fault: called first on the ranks of a layout, not on the one rank that it is compared with.
    bf16: run the layouts, and one rank for the bound, in bf16 against one rank in double precision.
    """
    from nvmm.proof.equivalence import compare
    from nvmm.proof.miniature import double

    config = small.config
    if bf16 and (config.get("precision") or {}).get("fp8") is not None:
        print("\nrefused: precision=fp8 is compared in double precision; leave out --bf16")
        return BAD_CONFIG
    in_double = (config.get("precision") or {}).get("dtype") == "fp64"
    statuses = [0]
    with tempfile.TemporaryDirectory() as folder:
        # 1. One rank; in bf16 it gives the bound, beside one rank in double precision.
        sides = {
            name: _Side(changed, small.num_micro_batches, packed, Path(folder) / name)
            for name, changed in (
                ("given", config),
                ("double", config if in_double else double(config)),
                ("bf16", config | {"precision": {"dtype": "bf16"}}),
            )
        }
        side = sides["bf16" if bf16 else "given"]
        origin = sides["double"] if bf16 else side
        try:
            expected = origin.one_rank()
            rounding = side.layout(ONE_RANK, origin) if bf16 else None
        except RuntimeError as error:
            print(f"\nrefused: the shrunk config does not train on one rank\n{error}")
            return BAD_CONFIG
        for layout in small.layouts:
            # 2. An objective may compare other samples with each other there than on one rank.
            if meant := _meant(small, layout):
                print(f"\nMEANT: {layout.name} computes another loss than one rank: {meant}")
                statuses.append(MEANT)
                continue
            begin = time.monotonic()
            try:
                result = side.layout(layout, origin, fault)
                comparison = compare(expected, result, rounding)
                seconds = time.monotonic() - begin
                # 3. Rounding alone may make them differ: double precision tells.
                again = not (comparison.equal or bf16 or in_double)
                verdict = "NOT EQUAL IN SINGLE PRECISION" if again else None
                show(expected, result, comparison, layout, seconds, verdict=verdict, bf16=bf16)
                if again:
                    print("\nagain in double precision, where rounding is no reason to differ")
                    exact, begin = sides["double"].one_rank(), time.monotonic()
                    result = sides["double"].layout(layout, sides["double"], fault)
                    comparison = compare(exact, result)
                    show(exact, result, comparison, layout, time.monotonic() - begin)
            except (RuntimeError, TimeoutError) as error:
                print(f"\nDIFFERENT: one rank trains, {layout.name} fails\n{error}")
                statuses.append(DIFFERENT)
                continue
            statuses.append(0 if comparison.equal else DIFFERENT)
    return DIFFERENT if DIFFERENT in statuses else max(statuses)


class _Side:
    """One config, run on one rank (once) and at layouts that start from another's weights."""

    def __init__(
        self, config: dict[str, Any], num_micro_batches: int, packed: bool, weights: Path
    ) -> None:
        self.config = config
        self.weights = weights
        self.options: dict[str, Any] = {"num_steps": NUM_STEPS, "packed": packed}
        self.options |= {"num_micro_batches": num_micro_batches}
        self._one_rank: Result | None = None

    def one_rank(self) -> Result:
        from nvmm.proof.equivalence import run

        if self._one_rank is None:
            self._one_rank = run(self.config, ONE_RANK, weights=self.weights, **self.options)
        return self._one_rank

    def layout(
        self, layout: Layout, origin: _Side, fault: Callable[[], None] | None = None
    ) -> Result:
        from nvmm.proof.equivalence import run

        return run(self.config, layout, reference=origin.weights, fault=fault, **self.options)


def _meant(small: Miniature, layout: Layout) -> str | None:
    """Return why a layout's loss is another one than one rank's, None where it is the same."""
    from nvmm.config.changes import loss_changes
    from nvmm.config.compose import instantiate

    trainer = {"global_batch_size": small.num_micro_batches, "micro_batch_size": 1}
    sides = [
        ({"parallel": each.parallel, "trainer": trainer}, each.world_size)
        for each in (ONE_RANK, layout)
    ]
    samples_in_loss = instantiate(small.config["objective"]).samples_in_loss
    found = loss_changes(sides[0], sides[1], samples_in_loss)
    return str(found[0]) if found else None


def show(
    expected: Result,
    result: Result,
    comparison: Comparison,
    layout: Layout,
    seconds: float,
    *,
    verdict: str | None = None,
    bf16: bool = False,
) -> None:
    """Print the table of one layout beside one rank."""
    print("\n" + FIELDS.format("", "one rank", layout.name.partition(",")[0], "relative"))
    for name, attribute in (("loss", "losses"), ("grad norm", "grad_norms")):
        pairs = zip(getattr(expected, attribute), getattr(result, attribute), strict=True)
        for step, (a, b) in enumerate(pairs, 1):
            off = f"{abs(b - a) / max(abs(a), 1e-30):.1e}"
            print(FIELDS.format(f"{name}, step {step}", f"{a:.9g}", f"{b:.9g}", off))
    for rank, held in enumerate(result.tokens):
        alone = sum(expected.tokens[0]) if rank == 0 else ""
        print(FIELDS.format(f"tokens held by rank {rank}", alone, sum(held), "").rstrip())
    bound = "bounds twice one bf16 rank's" if bf16 else "bound 1e-5"
    print("worst gradients, as rms(difference) / max(rms, 1 % of all gradients' rms); " + bound)
    for name, error in comparison.worst:
        print(f"  {name:69} {error:10.1e}")
    verdict = verdict or ("EQUAL" if comparison.equal else "DIFFERENT")
    print(
        f"{verdict}: {comparison.num_parameters} of {len(expected.gradients[0])} parameters"
        f" compared, {len(comparison.failures)} failures, {layout.world_size} ranks,"
        f" {seconds:.0f} s"
    )
    for failure in comparison.failures:
        print(f"  {failure}")
