"""FP8's recipes against float32 in small: python tools/compare_fp8.py

All variants start from one checkpoint, the quickstart's first two stages in float32, and train its
third for some steps on the same samples in the same order; each then answers the same held-out
questions in its own precision. The rest of an FP8 variant is float32 too: the products are all that
differs.

An interrupted call goes on with the same command; stages that are done are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from nvmm import studies
from nvmm.data.prepare import digits
from nvmm.parallel.fp8_recipe import RECIPES

DATA = Path("data/quickstart")  # of the experiments
_EAGER = ("norm", "activation", "gated_residual", "linear_cross_entropy")
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": ("precision=fp32",),
    # The same arithmetic is rounded elsewhere: so much the choice of kernels alone changes a run.
    "fp32_eager": ("precision=fp32", *(f"kernels.{name}=eager" for name in _EAGER)),
    "bf16": ("precision=bf16",),
    **{
        recipe: ("precision=fp8", "precision.dtype=fp32", f"precision.fp8.recipe={recipe}")
        for recipe in RECIPES
    },
}
"""The overrides of the last stage of each variant."""
EXPERIMENT = "experiment=nvlm_d/quickstart"
LAST = 30
"""The number of last steps over which the loss is averaged."""
QUESTIONS = 1000


def variant(name: str, seed: int, folder: Path, steps: int) -> studies.Variant:
    """Return one of VARIANTS: the start, the last stage and its evaluation."""
    run = folder / f"seed{seed}"
    base = (*studies.ALONE, f"seed={seed}")
    return studies.Variant(
        name,
        seed,
        (
            studies.train(run / "text", f"{EXPERIMENT}_text", *base),
            studies.train(run / "align", f"{EXPERIMENT}_align", *base, f"init_from={run / 'text'}"),
            studies.train(
                run / name,
                EXPERIMENT,
                *base,
                *VARIANTS[name],
                f"trainer.max_steps={steps}",
                f"init_from={run / 'align'}",
            ),
            studies.evaluate(
                run / name,
                f"benchmark.shards={DATA}/strings/test-*.tar",
                "batch_size=64",
                "max_new_tokens=10",
                f"num_samples={QUESTIONS}",
            ),
        ),
    )


def final_loss(folder: Path) -> float:
    """Return the mean loss of a run's last steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()[-LAST:]
    return statistics.mean(json.loads(line)["loss"] for line in lines)


def report(results: dict[str, list[dict[str, float]]]) -> str:
    """Return means and sample deviations over seeds; losses beside float32's of the same seed."""
    rows = []
    for name, seeds in results.items():
        off = [
            100 * (rounded["loss"] / plain["loss"] - 1)
            for rounded, plain in zip(seeds, results["fp32"], strict=True)
        ]
        cells = [studies.spread([seed["loss"] for seed in seeds], 4), studies.spread(off, 2)]
        for key in ("exact_match", *(f"exact_match_{kind}" for kind in digits.KINDS)):
            cells.append(studies.spread([seed[key] for seed in seeds], 3))
        cells.append(studies.spread([seed["cpu_seconds"] for seed in seeds], 0))
        rows.append([name, *cells])
    head = ("variant", "loss", "% of fp32's", "all", *digits.KINDS, "CPU-s")
    return studies.table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default=",".join(VARIANTS), help="fp32 is always one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the last stage")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--to", type=Path, default=Path("runs/compare_fp8"), help="its folder")
    options = parser.parse_args()
    names = list(dict.fromkeys(["fp32", *options.arms.split(",")]))
    if not set(names) <= set(VARIANTS):
        parser.error(f"--arms {options.arms}: use {','.join(VARIANTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    digits.build(DATA)
    seeds = range(1234, 1234 + options.seeds)
    studies.run(
        [variant(name, seed, options.to, options.steps) for seed in seeds for name in names],
        options.jobs,
    )
    results = {
        name: [
            studies.measure(options.to / f"seed{seed}" / name)
            | {"loss": final_loss(options.to / f"seed{seed}" / name)}
            for seed in seeds
        ]
        for name in names
    }
    studies.save(options.to / "results.json", results, steps=options.steps)
    print(report(results))


if __name__ == "__main__":
    main()
