"""NVLM-D, X and H in small, side by side: python tools/compare_nvlm.py

Each system trains the quickstart's three stages (the task as text, single digits, strings) on the
same samples in the same order, for the same steps, and answers the same held-out questions. The
stages of all systems take the same overrides. Steps whose tiles dominate: tools/bench_nvlm.py.

An interrupted call goes on with the same command; stages that are done are not run again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nvmm import studies
from nvmm.data.prepare import digits

DATA = Path("data/quickstart")  # of the experiments
SYSTEMS = ("d", "x", "h")
SEED = 1234
QUESTIONS = 1000


def variant(system: str, seed: int, folder: Path, steps: int) -> studies.Variant:
    """Return three stages and the evaluation of one system."""
    run = folder / f"seed{seed}" / system
    experiment = f"experiment=nvlm_{system}/quickstart"
    base = (*studies.ALONE, f"seed={seed}")
    return studies.Variant(
        f"nvlm_{system}",
        seed,
        (
            studies.train(run / "text", f"{experiment}_text", *base),
            studies.train(run / "align", f"{experiment}_align", *base, f"init_from={run / 'text'}"),
            studies.train(
                run / "strings",
                experiment,
                *base,
                f"trainer.max_steps={steps}",
                f"init_from={run / 'align'}",
            ),
            studies.evaluate(
                run / "strings",
                f"benchmark.shards={DATA}/strings/test-*.tar",
                "batch_size=64",
                "max_new_tokens=10",
                f"num_samples={QUESTIONS}",
            ),
        ),
    )


def report(results: dict[str, list[dict[str, float]]]) -> str:
    """Return means and sample standard deviations over seeds."""
    columns = {
        "all": ("exact_match", 3, 1.0),
        **{kind: (f"exact_match_{kind}", 3, 1.0) for kind in digits.KINDS},
        "samples/s": ("samples_per_second", 0, 1.0),
        "CPU-s": ("cpu_seconds", 0, 1.0),
        "decoder length": ("tokens_per_sample", 1, 1.0),
        "peak MB": ("peak_memory_bytes", 0, 1e-6),
        "parameters": ("num_parameters", 0, 1.0),
    }
    rows = []
    for system, seeds in results.items():
        cells = [
            studies.spread([factor * seed[key] for seed in seeds], places)
            for key, places, factor in columns.values()
        ]
        rows.append([f"NVLM-{system.upper()}", str(len(seeds)), *cells])
    return studies.table(("system", "seeds", *columns), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of the last stage")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--to", type=Path, default=Path("runs/compare_nvlm"), help="its folder")
    options = parser.parse_args()
    systems = options.systems.split(",")
    if not set(systems) <= set(SYSTEMS):
        parser.error(f"--systems {options.systems}: use {','.join(SYSTEMS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    digits.build(DATA)
    seeds = range(SEED, SEED + options.seeds)
    planned = [variant(name, seed, options.to, options.steps) for name in systems for seed in seeds]
    studies.run(planned, options.jobs)
    results = {
        name: [studies.measure(options.to / f"seed{seed}" / name / "strings") for seed in seeds]
        for name in systems
    }
    studies.save(options.to / "results.json", results, steps=options.steps)
    print(report(results))


if __name__ == "__main__":
    main()
