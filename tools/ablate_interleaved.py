"""VILA's ablation in small: pairs or documents, frozen or trained decoder, with or without text.

python tools/ablate_interleaved.py [--seeds N]

A decoder is pretrained on text and a tower is aligned to it, once. From there each arm takes VILA's
stages 1 and 2 (arXiv:2312.07533 section 3), in all eight combinations of

  pairs | interleaved   stage 1 has the same pictures and sentences, singly or in documents
  frozen | trained      the decoder in stage 1; stage 2 trains it always
  visual | blended      stage 2 has questions about pictures alone, or as many about words as well

and answers questions about held-out pictures behind 0 and 4 examples, about half in a language
that stage 2 does not have. Fixed before any run: the score is exact match over all questions, and
what is left of the text is the loss on held-out text after stage 2. Chance is 0.1: one of ten
numbers. A seed decides the order of stages 1 and 2; decoder and tower are the same for all. An
interrupted call goes on with the same command.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nvmm import studies
from nvmm.config.compose import failures
from nvmm.data.prepare import vila_demo, wordnet
from nvmm.io.files import write
from nvmm.report.alignment import ANSWERS_STYLE, Example, Said, answer_card, chart, charts
from nvmm.report.study import Table, document, score_table

DATA = Path("data/vila_demo")  # of the experiments
SEED = 1234
FACTORS = (("pairs", "interleaved"), ("frozen", "trained"), ("visual", "blended"))
SHOTS = (0, 4)
COMMON = ("parallel=single", "checkpoint.save_interval=100", "checkpoint.keep_last=1")
MAX_NEW_TOKENS = 6  # a word has one to three
EXAMPLES = 8
PAPER = {
    "pairs (COYO), trained, visual": (51.1, 50.3, 28.8),
    "pairs (MMC4's), trained, visual": (46.4, 44.5, 32.4),
    "interleaved (MMC4), frozen, visual": (66.8, 57.6, None),
    "interleaved (MMC4), trained, visual": (68.7, 70.9, 40.7),
    "interleaved (MMC4), trained, blended": (71.0, 72.1, 51.4),
}
"""VILA's tables of section 3, Llama-2 7B: mean of four benchmarks at 0 and 4 shots, and MMLU
(Llama-2: 46.0). The frozen row has a Transformer block as projector, with which trained has 66.8
and 68.8."""


@dataclass(frozen=True)
class Arm:
    """A combination; each field is one of its place in FACTORS."""

    corpus: str
    decoder: str
    blend: str

    @property
    def name(self) -> str:
        """As "pairs-frozen-visual"."""
        return f"{self.stage_1}-{self.blend}"

    @property
    def stage_1(self) -> str:
        """The name of stage 1, which both blends share."""
        return f"{self.corpus}-{self.decoder}"


ARMS = {arm.name: arm for arm in itertools.starmap(Arm, itertools.product(*FACTORS))}


@dataclass(frozen=True)
class Steps:
    """Steps of the trainings; null: the experiments'."""

    text: int | None = None
    align: int | None = None
    stage1: int | None = None
    sft: int | None = None


def base(folder: Path, stage: str) -> Path:
    """Return the folder of a stage that all seeds share: text or align."""
    return folder / "base" / stage


def run_folder(folder: Path, seed: int, name: str) -> Path:
    """Return the folder of an arm, or of a stage 1."""
    return folder / f"seed{seed}" / name


def evaluation(run: Path, shots: int) -> Path:
    """Return the folder of a run's answers behind so many examples."""
    return run / "evaluation" / f"shots{shots}"


def evaluate(run: Path, shots: int) -> studies.Command:
    """Return the evaluation of a run behind so many examples."""
    output = evaluation(run, shots)
    return studies.command(
        output,
        *("-m", "nvmm.evaluate", f"checkpoint={run}", f"output={output}"),
        *("benchmark=few_shot", f"benchmark.shots={shots}"),
        f"benchmark.train={DATA}/benchmark/shots-*.tar",
        f"benchmark.shards={DATA}/benchmark/test-*.tar",
        *(f"max_new_tokens={MAX_NEW_TOKENS}", "batch_size=120"),
    )


def variant(arm: Arm, seed: int, folder: Path, steps: Steps) -> studies.Variant:
    """Return an arm's chain: the shared start, its stages 1 and 2, its evaluations."""

    def train(
        run: Path, experiment: str, given: int | None, seed: int, *overrides: str
    ) -> studies.Command:
        length = () if given is None else (f"trainer.max_steps={given}",)
        named = f"experiment=vila_demo/{experiment}"
        return studies.train(run, named, *COMMON, f"seed={seed}", *length, *overrides)

    text, align = base(folder, "text"), base(folder, "align")
    first, last = (run_folder(folder, seed, name) for name in (arm.stage_1, arm.name))
    freeze = "optim.freeze=[vision.*,language.*]"
    return studies.Variant(
        arm.name,
        seed,
        (
            train(text, "text", steps.text, SEED),
            train(align, "align", steps.align, SEED, f"init_from={text}"),
            train(
                first,
                arm.corpus,
                steps.stage1,
                seed,
                f"init_from={align}",
                *([freeze] if arm.decoder == "frozen" else []),
            ),
            train(
                last,
                "sft_text" if arm.blend == "blended" else "sft",
                steps.sft,
                seed,
                f"init_from={first}",
            ),
            *(evaluate(last, shots) for shots in SHOTS),
        ),
    )


def plan(folder: Path, seeds: Sequence[int], steps: Steps) -> list[studies.Variant]:
    """Return the chains of all seeds; two that share a stage 1 are apart, so that none waits."""
    arms = sorted(ARMS.values(), key=lambda arm: arm.blend == "blended")
    return [variant(arm, seed, folder, steps) for seed in seeds for arm in arms]


def log(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a training's log: "metrics" or "validation"."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def text_loss(run: Path) -> float:
    """Return the loss on held-out text after a training's last step, nats a token."""
    return float(log(run, "validation")[-1]["validation_loss"])


def measure(run: Path) -> dict[str, float]:
    """Return an arm's scores by shots, of all, seen and unseen questions, and its text loss."""
    found = {"text": text_loss(run)}
    for shots in SHOTS:
        scores = json.loads((evaluation(run, shots) / "metrics.json").read_text())
        found[f"{shots}"] = scores["score"]
        found[f"{shots} questions"] = scores["num_samples"]
        for kind, group in scores["kinds"].items():
            found[f"{shots} {kind}"] = group["score"]
    return found


COLUMNS = {"0": "0-shot", "4": "4-shot", "text": "text loss"}
KINDS = {
    f"{shots} {kind}": f"{shots}-shot, {kind}" for kind in ("seen", "unseen") for shots in SHOTS
}

Results = Mapping[str, Sequence[Mapping[str, float]]]
"""Arm -> a seed's numbers, in the order of seeds."""


def effect(results: Results, place: int, column: str) -> list[float]:
    """Return, of each seed, what the second choice of a factor gains over the first.

    It is the mean over the four pairs of arms that differ in this factor alone.
    """
    before, after = FACTORS[place]

    def mean(choice: str, seed: int) -> float:
        names = [name for name in results if name.split("-")[place] == choice]
        return fmean(results[name][seed][column] for name in names)

    seeds = range(len(next(iter(results.values()))))
    return [mean(after, seed) - mean(before, seed) for seed in seeds]


def tables(results: Results, losses: Mapping[str, Sequence[float]]) -> list[Table]:
    """Return the tables of a report. losses: stage -> text loss after it, of each seed."""
    columns = COLUMNS | KINDS
    questions = int(next(iter(results.values()))[0]["0 questions"])

    def cells(of: Callable[[str], Sequence[float]]) -> list[str]:
        return [studies.spread(of(column), 3) for column in columns]

    return [
        Table(
            "Arms",
            f"Exact match on {questions} questions about held-out pictures, chance 0.1, and the"
            " loss on held-out text, in nats a token. Seen and unseen: the language of the question"
            " in stage 2. Mean ± sample standard deviation over seeds.",
            list(columns.values()),
            [
                (name, cells(lambda column, of=seeds: [seed[column] for seed in of]))
                for name, seeds in results.items()
            ],
        ),
        Table(
            "What each choice changes",
            "Differences of the same seed, means over the other two choices.",
            list(columns.values()),
            [
                (f"{after} - {before}", cells(lambda column, at=place: effect(results, at, column)))
                for place, (before, after) in enumerate(FACTORS)
            ],
        ),
        Table(
            "Text loss before stage 2",
            "Nats a token, on the same held-out text.",
            ["text loss"],
            [(name, [studies.spread(values, 3)]) for name, values in losses.items()],
        ),
        Table(
            "The paper's",
            "Mean of OKVQA, TextVQA (accuracy), COCO and Flickr (CIDEr), and MMLU (Llama-2: 46.0).",
            ["0-shot", "4-shot", "MMLU"],
            [
                (name, ["-" if value is None else f"{value:.1f}" for value in row])
                for name, row in PAPER.items()
            ],
        ),
    ]


def examples(folder: Path, seed: int) -> list[Example]:
    """Return some held-out questions with every arm's answer behind 4 examples."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for name in ARMS:
        path = evaluation(run_folder(folder, seed, name), SHOTS[-1]) / "predictions.jsonl"
        found = map(json.loads, path.read_text().splitlines())
        lines[name] = {line["sample_id"]: line for line in found}
    first = next(iter(lines.values()))
    shared = sorted(set.intersection(*(set(found) for found in lines.values())))
    return [
        Example(
            f"{first[key]['question']} ({'; '.join(first[key]['answers'])})",
            {
                name: Said(found[key]["prediction"], found[key]["score"] >= 1)
                for name, found in lines.items()
            },
        )
        for key in shared[:: max(1, len(shared) // EXAMPLES)][:EXAMPLES]
    ]


def report(folder: Path, seeds: Sequence[int], steps: Steps) -> None:
    """Write results.json and report.html, and print the tables."""
    results = {name: [measure(run_folder(folder, s, name)) for s in seeds] for name in ARMS}
    losses = {"text": [text_loss(base(folder, "text"))]}
    first_stages = dict.fromkeys(arm.stage_1 for arm in ARMS.values())
    losses |= {
        name: [text_loss(run_folder(folder, seed, name)) for seed in seeds] for name in first_stages
    }
    spent = studies.spent(folder)
    given = {name: value for name, value in vars(steps).items() if value is not None}
    studies.save(
        folder / "results.json",
        {"arms": results, "text_loss": losses},
        steps=given or "the experiments'",
        **spent,
    )
    made = tables(results, losses)
    for each in made:
        rows = [[name, *cells] for name, cells in each.rows]
        print(f"\n{each.title}\n{studies.table(['', *each.columns], rows)}")
    seconds = f"{spent['cpu_seconds']:.0f}"
    notes = [
        f"{len(seeds)} seed(s); {seconds} seconds of processor time in all. The score is exact"
        " match over all questions, chosen before any run. Losses and answers are those of the"
        " first seed.",
        "Pictures: handwritten digits (E. Alpaydin, C. Kaynak, UCI, CC BY 4.0). Text: WordNet 3.0.",
    ]
    runs = {name: base(folder, name) for name in ("text", "align")}
    runs |= {name: run_folder(folder, seeds[0], name) for name in (*first_stages, *ARMS)}
    drawn = {
        name: [(line["step"], line["loss"]) for line in log(run, "metrics")]
        for name, run in runs.items()
    }
    sections = {
        "Scores": "".join(map(score_table, made)),
        "Losses": charts([chart(f"Loss, {n}", {"loss": p}, "loss") for n, p in drawn.items()]),
        "Answers behind 4 examples": "".join(map(answer_card, examples(folder, seeds[0]))),
    }
    page = document("VILA's ablation in small", "ablation", notes, sections, ANSWERS_STYLE)
    write(folder / "report.html", page)
    print(f"\nreport: {folder}/report.html ({seconds} CPU-seconds)")


def main() -> None:
    parser = studies.parser(__doc__, Steps, Path("runs/ablate_interleaved"), seeds=3)
    parser.add_argument(
        "--package", type=Path, help=f"{wordnet.PACKAGE}'s .deb, else apt fetches it"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    vila_demo.build(DATA, wordnet.fetch(DATA, options.package))
    seeds = range(SEED, SEED + options.seeds)
    steps = studies.steps_given(Steps, options)
    studies.run(plan(options.to, seeds, steps), options.jobs)
    report(options.to, seeds, steps)


if __name__ == "__main__":
    with failures("ablate_interleaved.py"):
        main()
