"""NVLM's ablation of tiles and tags in small: python tools/ablate_tiles.py [--regime strings]

Every variant trains the quickstart's NVLM-D (or X, H: --system) from one start a seed, the
quickstart's two first stages, on the same samples in the same order, and answers the same held-out
questions. Variants differ in how an image becomes tokens:

  low_res  one tile of the image
  none     tiles and thumbnail without tags
  1d       <tile_1> <tile_2> ...
  2d_grid  <tile_x0_y0> <tile_x1_y0> ...
  2d_bbox  <box>(0,0),(32,32)</box> ...

Regimes:
  strings  the quickstart's strings; the start has seen no tags, as the paper's language models
  tagged   the same; the start is the quickstart's own, which has seen 1-D tags in text
  images   1 to 3 images a sample, of which a question names one: the number of tokens before a
           tile varies; the start has seen no tags

An interrupted call goes on with the same command; stages that are done are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from nvmm import studies
from nvmm.data.prepare import digits

DATA = Path("data")
VARIANTS = {
    "low_res": ("data.train.build.tags.variant=none", "data.train.build.max_tiles=1"),
    **{
        variant: (f"data.train.build.tags.variant={variant}",)
        for variant in ("none", "1d", "2d_grid", "2d_bbox")
    },
}
BASE = (
    *studies.ALONE,
    "tokenizer=quickstart_tags",
    "model.language.vocab_size=334",
    "model.language.padded_vocab_size=336",
    "data.sequence_length=512",
)
SEED = 1234
QUESTIONS = 1000
COLUMNS = ("MMMU", "MathVista", "AI2D", "ChartQA", "DocVQA", "TextVQA", "OCRBench")
PAPER = {
    "D": {
        "low_res": (50.9, 46.1, 67.0, 64.8, 52.9, 78.2, 622),
        "none": (50.0, 51.7, 79.9, 76.1, 80.2, 78.4, 728),
        "1d": (52.0, 53.8, 82.1, 81.1, 87.4, 79.9, 806),
        "2d_grid": (51.1, 52.8, 81.7, 81.1, 86.7, 79.4, 787),
        "2d_bbox": (50.3, 50.6, 81.2, 80.8, 86.7, 79.7, 791),
    },
    "X": {
        "low_res": (53.2, 57.4, 69.8, 65.6, 62.3, 63.2, 612),
        "none": (53.0, 57.6, 78.5, 73.2, 75.4, 75.2, 682),
        "1d": (54.1, 59.6, 80.7, 79.2, 80.9, 78.6, 744),
    },
}
"""NVLM section 3.2, on Nous-Hermes-2-Yi-34B: D after 20K steps of 128, X after 10K of 512."""


@dataclass(frozen=True)
class Regime:
    """One setting of the data.

    tags: tags in the start's text. max_images: images of a sample. batch: samples of a step.
    """

    tags: str
    max_images: int
    batch: int

    @property
    def text(self) -> Path:
        """The folder of the start's text."""
        if self.max_images > 1:
            return self.strings
        return DATA / ("quickstart" if self.tags == digits.Form().tags else f"digits_{self.tags}")

    @property
    def strings(self) -> Path:
        """The folder of the images of strings."""
        return DATA / ("quickstart" if self.max_images == 1 else f"digits_{self.max_images}_images")

    def build_data(self) -> None:
        """Write the quickstart's data and this regime's where they are not there yet."""
        digits.build(DATA / "quickstart")
        form = digits.Form(self.tags, self.max_images)
        if self.max_images > 1:
            digits.build(self.strings, digits.Amounts(single=0, strings=20_000), form=form)
        elif form != digits.Form():
            none = dict.fromkeys(("single", "strings", "validation", "test"), 0)
            digits.build(self.text, digits.Amounts(**none), form=form)


REGIMES = {
    "strings": Regime(tags="none", max_images=1, batch=32),
    "tagged": Regime(tags="1d", max_images=1, batch=32),
    "images": Regime(tags="none", max_images=3, batch=16),
}


def variant(
    name: str, seed: int, regime: Regime, folder: Path, steps: int, system: str = "d"
) -> studies.Variant:
    """Return one variant: the start of `seed`, which all share, then its stage and evaluation."""
    experiment = f"experiment=nvlm_{system}/quickstart"
    base = (*BASE, f"seed={seed}")
    text, single = f"{regime.text}/text/train-*.tar", f"{DATA}/quickstart/single/train-*.tar"
    untagged = f"data.train.build.tags.variant={regime.tags}"
    start = folder / f"seed{seed}"
    run = start / name
    return studies.Variant(
        name,
        seed,
        (
            studies.train(
                start / "text",
                f"{experiment}_text",
                *base,
                f"data.train.shards=[{text}]",
                "trainer.micro_batch_size=64",
            ),
            studies.train(
                start / "align",
                f"{experiment}_align",
                *base,
                untagged,
                f"data.train.shards=[{text},{single}]",
                "trainer.micro_batch_size=64",
                f"init_from={start / 'text'}",
            ),
            studies.train(
                run,
                experiment,
                *base,
                *VARIANTS[name],
                f"data.train.shards=[{regime.strings}/strings/train-*.tar]",
                f"trainer.max_steps={steps}",
                f"trainer.global_batch_size={regime.batch}",
                f"trainer.micro_batch_size={regime.batch}",
                f"init_from={start / 'align'}",
            ),
            studies.evaluate(
                run,
                f"benchmark.shards={regime.strings}/strings/test-*.tar",
                "batch_size=64",
                "max_new_tokens=10",
                f"num_samples={QUESTIONS}",
            ),
        ),
    )


def report(results: dict[str, list[dict[str, float]]]) -> str:
    """Return our numbers, mean and sample standard deviation over seeds, and the paper's."""
    kinds = {"all": "exact_match"} | {kind: f"exact_match_{kind}" for kind in digits.KINDS}
    rows = []
    for name, seeds in results.items():
        shown = [studies.spread([seed[key] for seed in seeds], 3) for key in kinds.values()]
        for key, places in {
            "tokens_per_sample": 1,
            "tiles_per_sample": 1,
            "cpu_seconds": 0,
        }.items():
            shown.append(studies.spread([seed[key] for seed in seeds], places))
        rows.append([name, str(len(seeds)), *shown])
    head = ("variant", "seeds", *kinds, "tokens", "tiles", "CPU-s")
    lines = [studies.table(head, rows)]
    if "none" in results:
        lines += [compare(name, results) for name in results if name not in ("none", "low_res")]
    for model, paper in PAPER.items():
        listed = [[name, *map(str, paper[name])] for name in results if name in paper]
        title = f"The paper's, NVLM-{model} 34B (section 3.2):"
        lines += ["", title, studies.table(("variant", *COLUMNS), listed)]
    return "\n".join(lines)


def compare(name: str, results: dict[str, list[dict[str, float]]]) -> str:
    """Return a variant's gain over no tags, beside the standard error of so many questions."""
    gains = [
        tagged["exact_match"] - untagged["exact_match"]
        for tagged, untagged in zip(results[name], results["none"], strict=True)
    ]
    rate = statistics.mean(each["exact_match"] for each in (*results[name], *results["none"]))
    error = math.sqrt(2 * rate * (1 - rate) / (QUESTIONS * len(gains)))
    return (
        f"{name} - none: {studies.spread(gains, 3)} (standard error of the questions {error:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regime", default="strings", choices=REGIMES)
    parser.add_argument("--system", default="d", choices=("d", "x", "h"))
    parser.add_argument("--arms", default="low_res,none,1d", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of the last stage")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--to", default="runs/ablate_tiles", help="folder of the runs and results")
    options = parser.parse_args()
    names = options.arms.split(",")
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"--arms {','.join(sorted(unknown))}: use {', '.join(VARIANTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    regime = REGIMES[options.regime]
    regime.build_data()
    folder = Path(options.to) / options.regime
    if options.system != "d":
        folder = folder.with_name(f"{options.regime}_{options.system}")
    seeds = range(SEED, SEED + options.seeds)
    planned = [
        variant(name, seed, regime, folder, options.steps, options.system)
        for name in names
        for seed in seeds
    ]
    studies.run(planned, options.jobs)
    results = {
        name: [studies.measure(folder / f"seed{seed}" / name) for seed in seeds] for name in names
    }
    settings = {key: getattr(options, key) for key in ("system", "regime", "steps")}
    studies.save(folder / "results.json", results, **settings)
    print(report(results))


if __name__ == "__main__":
    main()
