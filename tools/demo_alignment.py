"""Alignment in small: SFT, a reward model, DPO and RPO on lists of words: tools/demo_alignment.py

The prompts name words and ask for some of them in an order, a case and a form; verifiers check each
demand exactly (nvmm/data/prepare/word_lists.py). Each seed trains

  sft     a decoder of random weights, on answers of a careless writer
  reward  a Bradley-Terry model, from sft, on pairs of sft's own answers: one that the verifiers
          accept, and one that they do not
  dpo     sft, on the same pairs
  rpo     dpo, on pairs of its own answers, the best and the worst by the reward model

The pairs are made by `python -m nvmm.job job=synthesise` with the checkpoint as generator. No set
of words is in two of: demonstrations, prompts of either kind of pairs, held-out prompts. All
commands are public ones, which `command.json` in each folder names. An interrupted call goes on
with the same command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nvmm import studies
from nvmm.config.compose import failures
from nvmm.data.prepare import word_lists
from nvmm.io.files import write
from nvmm.report.alignment import Curves, Example, Said, page
from nvmm.report.study import Table

DATA = Path("data/word_lists")  # of the experiments' tokenizer
SEED = 1234
POLICIES = ("sft", "dpo", "rpo")
"""The stages that answer."""
PREFERRED = ("dpo", "rpo")
WAYS = {"sampled": 1.0, "greedy": 0.0}
"""How held-out prompts are answered -> temperature."""
SAMPLES = 4
MAX_NEW_TOKENS = 24  # the longest right answer has 15
EXAMPLES = 8
COLUMNS = {
    "words": "keywords:existence",
    "number": "length_constraints:number_words",
    "order": "order:alphabetical",
    "capitals": "change_case:english_capital",
    "bullets": "detectable_format:number_bullet_lists",
    "quotes": "startend:quotation",
}
"""Column of the table of demands -> their verifier."""


@dataclass(frozen=True)
class Steps:
    """Steps of the four trainings; null: the experiment's."""

    sft: int | None = None
    reward: int | None = None
    dpo: int | None = None
    rpo: int | None = None


def rows(folder: Path) -> Path:
    """Return the output of the job in a command's folder."""
    return folder / "rows"


def shards(folder: Path, name: str) -> str:
    """Return the pattern of the shards that a pipeline has written."""
    return f"{rows(folder)}/shards/{name}-*.tar"


def answers(folder: Path, checkpoint: Path, split: str, seed: int) -> studies.Command:
    """Return the pipeline that answers a split's prompts, verifies the answers and pairs them."""
    return studies.command(
        folder,
        *("-m", "nvmm.job", "job=synthesise", "job/steps=verified", "job/generators=checkpoint"),
        *(f"checkpoint={checkpoint}", f"job.steps.prompts.files={DATA}/{split}.jsonl"),
        *(f"job.steps.answered.samples={SAMPLES}", f"job.seed={seed}"),
        f"job.generators.writer.max_new_tokens={MAX_NEW_TOKENS}",
        *("job.generators.writer.temperature=1.0", "job.generators.writer.batch_size=64"),
        *(f"job.generators.writer.seed={seed}", f"output={rows(folder)}"),
    )


def scores(folder: Path, model: Path, pattern: str) -> studies.Command:
    """Return the job that scores answers by the reward model."""
    return studies.command(
        folder,
        *("-m", "nvmm.job", "job=reward", f"checkpoint={model}", f"job.shards={pattern}"),
        *("job.batch_size=64", f"output={rows(folder)}"),
    )


def ranked(folder: Path, answered: Path, scored: Path, seed: int) -> studies.Command:
    """Return the pipeline that pairs answers by their scores."""
    return studies.command(
        folder,
        *("-m", "nvmm.job", "job=synthesise", "job/steps=ranked", "job/generators=none"),
        f"job.steps.records.folder={rows(answered)}/steps/verified",
        *(f"job.steps.rewarded.scores={rows(scored)}", f"job.seed={seed}"),
        f"output={rows(folder)}",
    )


def evaluation(run: Path, way: str) -> Path:
    """Return the folder of a run's answers to the held-out prompts, "sampled" or "greedy"."""
    return run / "evaluation" / way


def evaluate(run: Path) -> tuple[studies.Command, ...]:
    """Return the evaluations of a run on the held-out prompts."""
    return tuple(
        studies.command(
            folder := evaluation(run, way),
            *("-m", "nvmm.evaluate", f"checkpoint={run}", f"output={folder}", "benchmark=ifeval"),
            *(f"benchmark.path={DATA}/heldout.jsonl", f"benchmark.max_new_tokens={MAX_NEW_TOKENS}"),
            *(f"temperature={temperature}", "batch_size=64"),
        )
        for way, temperature in WAYS.items()
    )


def variant(folder: Path, seed: int, steps: Steps) -> studies.Variant:
    """Return the chain of commands of a seed."""
    own = folder / f"seed{seed}"

    def train(name: str, *overrides: str) -> studies.Command:
        given = getattr(steps, name)
        length = () if given is None else (f"trainer.max_steps={given}",)
        experiment = f"experiment=alignment_demo/{name}"
        return studies.train(
            own / name, experiment, *studies.ALONE, f"seed={seed}", *length, *overrides
        )

    def after(stage: str, data: str) -> tuple[str, str]:
        return f"init_from={own / stage}", f"data.train.shards={shards(own / data, 'preference')}"

    return studies.Variant(
        "alignment",
        seed,
        (
            train("sft", f"data.train.shards={DATA}/sft/train-*.tar"),
            *evaluate(own / "sft"),
            answers(own / "pairs", own / "sft", "preference", seed),
            train("reward", *after("sft", "pairs")),
            answers(own / "heldout_pairs", own / "sft", "heldout", seed),
            scores(
                own / "heldout_scores", own / "reward", shards(own / "heldout_pairs", "preference")
            ),
            train("dpo", *after("sft", "pairs")),
            *evaluate(own / "dpo"),
            answers(own / "rpo_answers", own / "dpo", "rpo", seed),
            scores(own / "rpo_scores", own / "reward", shards(own / "rpo_answers", "answers")),
            ranked(own / "rpo_pairs", own / "rpo_answers", own / "rpo_scores", seed),
            train("rpo", *after("dpo", "rpo_pairs")),
            *evaluate(own / "rpo"),
        ),
    )


def plan(folder: Path, seeds: Sequence[int], steps: Steps) -> list[studies.Variant]:
    """Return the chains of all seeds."""
    return [variant(folder, seed, steps) for seed in seeds]


def log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def records(folder: Path, step: str) -> list[dict[str, Any]]:
    """Return the records of a pipeline's step."""
    from nvmm.jobs.parts import Parts  # it needs the extra jobs

    texts = Parts(rows(folder) / "steps" / step).read()["records"].to_pylist()
    return [json.loads(text) for some in texts for text in some]


def measure(own: Path) -> dict[str, float]:
    """Return a seed's numbers, as "sft/pass", "dpo/order" or "reward/accuracy"; shares in percent.

    A log-probability is the mean over the first or the last tenth of the steps.
    """
    from nvmm.jobs.parts import Parts

    found: dict[str, float] = {}
    # 1. The held-out prompts.
    for stage in POLICIES:
        for way in WAYS:
            path = evaluation(own / stage, way) / "metrics.json"
            found[f"{stage}/{way}"] = 100 * json.loads(path.read_text())["prompt_level_strict"]
        sampled = json.loads((evaluation(own / stage, "sampled") / "metrics.json").read_text())
        for column, name in COLUMNS.items():
            found[f"{stage}/{column}"] = 100 * sampled["instructions"][name]
    # 2. The reward model on the held-out pairs of the verifiers; equal scores are wrong.
    table = Parts(rows(own / "heldout_scores")).read().to_pylist()
    right = [line["rewards"][0] > line["rewards"][1] for line in table if line["error"] is None]
    found |= {"reward/accuracy": 100 * fmean(right), "reward/pairs": len(right)}
    # 3. What the pipelines have made.
    for name in ("pairs", "heldout_pairs", "rpo_answers"):
        summary = json.loads((rows(own / name) / "summary.json").read_text())["steps"]
        given = [one for record in records(own / name, "verified") for one in record["answers"]]
        found[f"{name}/answers"] = len(given)
        found[f"{name}/left out"] = summary["answered"]["dropped"] + summary["answered"]["errors"]
        found[f"{name}/right"] = 100 * fmean(one["scores"]["verifier"] for one in given)
        found[f"{name}/pairs"] = summary["preference"]["records"]
    pairs = records(own / "rpo_pairs", "pairs")
    found["rpo_pairs/pairs"] = len(pairs)
    for side in ("chosen", "rejected"):
        verdicts = [record["lineage"][-1][side]["scores"]["verifier"] for record in pairs]
        found[f"rpo_pairs/{side} right"] = 100 * fmean(verdicts)
    # 4. The steps of DPO and RPO.
    for stage in PREFERRED:
        lines = log(own / stage)
        tenth = max(1, len(lines) // 10)
        for name, some in (("start", lines[:tenth]), ("end", lines[-tenth:])):
            for side in ("chosen", "rejected"):
                found[f"{stage}/{side} at the {name}"] = fmean(
                    line[f"log_probability_{side}"] for line in some
                )
            found[f"{stage}/accuracy at the {name}"] = 100 * fmean(
                line["accuracy"] for line in some
            )
    return found


def tables(seeds: Sequence[Mapping[str, float]]) -> list[Table]:
    """Return the tables of a report: means and sample standard deviations over the seeds."""

    def cells(prefix: str, names: Sequence[str], digits: int = 1) -> list[str]:
        return [
            studies.spread([seed[f"{prefix}/{name}"] for seed in seeds], digits) for name in names
        ]

    demands = [*WAYS, *COLUMNS]
    sides = [
        f"{side} at the {when}" for side in ("chosen", "rejected") for when in ("start", "end")
    ]
    sides += ["accuracy at the end"]
    made = ["answers", "left out", "right", "pairs"]
    names = {
        "pairs": "sft, for reward and dpo",
        "heldout_pairs": "sft, held out",
        "rpo_answers": "dpo, for rpo",
    }
    return [
        Table(
            "Held-out prompts",
            "Share of answers that follow all demands, sampled at temperature 1 and greedy; then"
            " the share of each kind of demand that the sampled ones follow. In percent.",
            demands,
            [(stage, cells(stage, demands)) for stage in POLICIES],
        ),
        Table(
            "Reward model",
            "Share of held-out pairs in which the answer that the verifiers accept scores higher,"
            " in percent, and the pairs. Then, of rpo's pairs, which the model chose, how many of"
            " either side the verifiers accept.",
            ["accuracy", "pairs", "rpo's chosen right", "rpo's rejected right", "rpo's pairs"],
            [
                (
                    "reward",
                    [
                        *cells("reward", ["accuracy"]),
                        *cells("reward", ["pairs"], 0),
                        *cells("rpo_pairs", ["chosen right", "rejected right"]),
                        *cells("rpo_pairs", ["pairs"], 0),
                    ],
                )
            ],
        ),
        Table(
            "Log-probabilities in training",
            "Sums over an answer's tokens, means over the first and the last tenth of the steps;"
            " accuracy is the share of pairs whose chosen answer has gained more, in percent.",
            sides,
            [(stage, cells(stage, sides, 2)) for stage in PREFERRED],
        ),
        Table(
            "Synthetic data",
            f"Up to {SAMPLES} answers to each prompt at temperature 1; those that were cut or empty"
            " are left out. Right: the verifiers accept it, in percent.",
            made,
            [
                (
                    label,
                    [
                        *cells(name, made[:2], 0),
                        *cells(name, ["right"]),
                        *cells(name, ["pairs"], 0),
                    ],
                )
                for name, label in names.items()
            ],
        ),
    ]


def curves(own: Path) -> Curves:
    """Return what the page draws of a seed: losses, and log-probabilities of both answers."""
    stages = {stage: log(own / stage) for stage in (*POLICIES, "reward")}
    losses = {
        stage: [(line["step"], line["loss"]) for line in lines] for stage, lines in stages.items()
    }
    likelihoods = {
        stage: {
            side: [(line["step"], line[f"log_probability_{side}"]) for line in stages[stage]]
            for side in ("chosen", "rejected")
        }
        for stage in PREFERRED
    }
    return Curves(losses, likelihoods)


def examples(own: Path) -> list[Example]:
    """Return some held-out prompts with every stage's answer."""
    lines = {}
    for stage in POLICIES:
        text = (evaluation(own / stage, "sampled") / "predictions.jsonl").read_text()
        lines[stage] = {line["sample_id"]: line for line in map(json.loads, text.splitlines())}
    shared = sorted(set.intersection(*(set(found) for found in lines.values())))
    return [
        Example(
            lines["sft"][key]["question"],
            {
                stage: Said(found[key]["prediction"], found[key]["score"] >= 1)
                for stage, found in lines.items()
            },
        )
        for key in shared[:: max(1, len(shared) // EXAMPLES)][:EXAMPLES]
    ]


def report(folder: Path, seeds: Sequence[int], steps: Steps) -> None:
    """Write results.json and report.html, and print the tables."""
    results = {f"seed{seed}": measure(folder / f"seed{seed}") for seed in seeds}
    spent = studies.spent(folder)
    given = {name: value for name, value in vars(steps).items() if value is not None}
    studies.save(folder / "results.json", results, steps=given or "the experiments'", **spent)
    made = tables(list(results.values()))
    for each in made:
        lines = [[name, *cells] for name, cells in each.rows]
        print(f"\n{each.title}\n{studies.table(['', *each.columns], lines)}")
    seconds = f"{spent['cpu_seconds']:.0f}"
    notes = [
        f"{len(seeds)} seed(s); {seconds} seconds of processor time in all. Curves and answers are"
        " those of the first seed.",
        "sft learns from answers of a careless writer; reward and dpo from pairs of sft's answers"
        " that verifiers made; rpo goes on from dpo, with pairs of dpo's answers that the reward"
        " model made.",
    ]
    first = folder / f"seed{seeds[0]}"
    text = page("Alignment in small on lists of words", notes, made, curves(first), examples(first))
    write(folder / "report.html", text)
    print(f"\nreport: {folder}/report.html ({seconds} CPU-seconds)")


def main() -> None:
    parser = studies.parser(__doc__, Steps, Path("runs/demo_alignment"), seeds=3, jobs=3)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    word_lists.build(DATA)
    seeds = range(SEED, SEED + options.seeds)
    steps = studies.steps_given(Steps, options)
    studies.run(plan(options.to, seeds, steps), options.jobs)
    report(options.to, seeds, steps)


if __name__ == "__main__":
    with failures("demo_alignment.py"):
        main()
