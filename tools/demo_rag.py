"""ChatQA, RankRAG and a longer context in small, on Python's documentation: tools/demo_rag.py

A question asks how a function is called, and the answer is the first line of its entry in the
documentation: exact, and to be copied from a passage. Whole modules are held out
(nvmm/data/prepare/python_api.py). The stages, one after the other:

  text     a decoder of random weights, on the documentation at 512 tokens
  stage1   ChatQA's first: questions without contexts
  stage2   ChatQA's second: questions over the entry that answers
  rankrag  RankRAG's blend: five shuffled passages, questions without an answer, rankings
  extend   the context from 512 to 4,096 tokens: a higher RoPE base, rows of long text
  long     ChatQA 2's third: questions behind long texts

stage1, stage2 and rankrag answer held-out questions by `python -m nvmm.job job=rag`, whose
retriever is all-MiniLM-L6-v2; rankrag ranks its passages too. rankrag and long look for a needle in
texts of up to 4,096 tokens. The score is exact match, chosen before any run. All commands are
public ones, which `command.json` in each folder names. An interrupted call goes on with the same
command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvmm import studies
from nvmm.config.compose import failures
from nvmm.data.prepare import rag_demo
from nvmm.data.prepare.packages import PACKAGE, minilm, sources
from nvmm.io.files import write
from nvmm.report.alignment import Example, Said
from nvmm.report.rag_study import HeatMap, page
from nvmm.report.study import Table

DATA = Path("data/rag_demo")  # of the experiments
SEED = 1234
ASKED = ("stage1", "stage2", "rankrag")
"""The stages that answer."""
WAYS = {
    "no_context": "no context",
    "gold": "gold",
    "searched_1": "retrieved, k=1",
    "searched_5": "retrieved, k=5",
    "reranked_1": "reranked, k=1",
    "reranked_5": "reranked, k=5",
}
"""Row of a RAG run's table -> its column."""
CUTOFFS = (1, 5, 10)
SEARCHED = 20
MAX_NEW_TOKENS = 40  # the longest call has some 35
NEEDLE_LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0, 25, 50, 75, 100)
NEEDLE = (
    "archive.open_volume(path, level=3)\nOpen the volume at path, and return it. level is that of"
    " the compression."
)
NEEDLE_QUESTION = "How do I call archive.open_volume?"
NEEDLE_ANSWER = "archive.open_volume(path, level=3)"
LONG = 4096
EXAMPLES = 8


@dataclass(frozen=True)
class Steps:
    """Steps of the six trainings; null: the experiment's."""

    text: int | None = None
    stage1: int | None = None
    stage2: int | None = None
    rankrag: int | None = None
    extend: int | None = None
    long: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Tokens of the long rows, and needles a cell."""

    long_tokens: int = 160 * LONG
    repeats: int = 2


def retriever(folder: Path) -> studies.Command:
    """Return the import of MiniLM."""
    given = ("import", "--from", str(minilm()), "--to", f"{folder}/checkpoint")
    return studies.command(folder, "tools/convert.py", *given)


def long_rows(folder: Path, tokens: int) -> studies.Command:
    """Return the writer of rows of LONG tokens; every document counts."""
    return studies.command(
        folder,
        *("tools/shard.py", "long", "--from", f"{DATA}/pages.jsonl"),
        *("--tokenizer", f"{DATA}/tokenizer", "--tokens", str(tokens), "--length", str(LONG)),
        *("--source-key", "source", "--mix", "docs=1", "--keep-short", "1"),
        *("--to", f"{folder}/shards"),
    )


def rag(folder: Path, run: Path, embedder: Path) -> studies.Command:
    """Return the RAG run of a stage; only rankrag has learned to rank."""
    ways = {"gold": "source: gold", "searched_1": "source: searched, k: 1"}
    if ranks := run.name == "rankrag":
        ways["reranked_1"] = "source: reranked, k: 1"
    else:
        unranked = ("job.ranking=null", "~job.answers.reranked_5")
    contexts = "_target_: nvmm.jobs.rag.contexts.Contexts"
    cutoffs = ",".join(map(str, CUTOFFS))
    return studies.command(
        folder,
        *("-m", "nvmm.job", "job=rag", f"checkpoint={run}"),
        *(f"job.retriever={embedder}/checkpoint", f"job.documents={DATA}/documents.jsonl"),
        *(f"job.questions={DATA}/questions.jsonl", f"job.searched={SEARCHED}"),
        *(f"job.cutoffs=[{cutoffs}]", f"job.max_new_tokens={MAX_NEW_TOKENS}", "job.batch_size=16"),
        *((f"job.ranking.top={SEARCHED}",) if ranks else unranked),
        *(f"+job.answers.{name}={{{contexts}, {way}}}" for name, way in ways.items()),
        f"output={folder}/rows",
    )


def needle(folder: Path, run: Path, repeats: int) -> studies.Command:
    """Return the search of a needle by a stage."""
    lengths, depths = (",".join(map(str, each)) for each in (NEEDLE_LENGTHS, DEPTHS))
    return studies.command(
        folder,
        *("-m", "nvmm.evaluate", f"checkpoint={run}", "benchmark=needle", f"output={folder}"),
        *(f"benchmark.haystack=[{DATA}/haystack.txt]", f"benchmark.lengths=[{lengths}]"),
        *(f"+benchmark.depths=[{depths}]", f"+benchmark.repeats={repeats}"),
        *(f"+benchmark.max_new_tokens={MAX_NEW_TOKENS}", f"sequence_length={LONG}"),
        *(f'+benchmark.needle="{NEEDLE}"', f'+benchmark.question="{NEEDLE_QUESTION}"'),
        f'+benchmark.answers=["{NEEDLE_ANSWER}"]',
    )


def plan(folder: Path, seed: int, steps: Steps, sizes: Sizes) -> list[studies.Variant]:
    """Return the chains: training with all answers, and what runs beside it."""

    def train(name: str, after: str | None, *overrides: str) -> studies.Command:
        given = getattr(steps, name)
        length = () if given is None else (f"trainer.max_steps={given}",)
        start = () if after is None else (f"init_from={folder / after}",)
        experiment = f"experiment=rag_demo/{name}"
        return studies.train(
            folder / name, experiment, *studies.ALONE, f"seed={seed}", *length, *start, *overrides
        )

    embedder = folder / "retriever"

    def answers(name: str) -> studies.Command:
        return rag(folder / name / "rag", folder / name, embedder)

    stages = {
        "text": train("text", None),
        "stage1": train("stage1", "text"),
        "stage2": train("stage2", "stage1"),
        "rankrag": train("rankrag", "stage2"),
    }
    rows = long_rows(folder / "long_rows", sizes.long_tokens)
    extended = (
        train("extend", "rankrag", f"data.train.shards={rows.folder}/shards/train-*.tar"),
        train("long", "extend"),
        needle(folder / "long" / "needle", folder / "long", sizes.repeats),
    )
    # A stage's folder is locked while it trains, so that the second chain waits for the first.
    return [
        studies.Variant("context", seed, (*stages.values(), rows, *extended)),
        studies.Variant(
            "rag",
            seed,
            (
                retriever(embedder),
                *(each for name in ASKED for each in _until(stages, name, answers(name))),
                needle(folder / "rankrag" / "needle", folder / "rankrag", sizes.repeats),
            ),
        ),
    ]


def _until(
    stages: Mapping[str, studies.Command], name: str, last: studies.Command
) -> tuple[studies.Command, ...]:
    """Return the stages up to one, and a command that needs it."""
    names = list(stages)
    return (*(stages[each] for each in names[: names.index(name) + 1]), last)


def log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measure(folder: Path) -> dict[str, Any]:
    """Return the numbers of a demo: of each stage the RAG run's tables, and the needle's grids."""
    runs = {name: json.loads((folder / name / "rag/rows/table.json").read_text()) for name in ASKED}
    grids = {
        name: json.loads((folder / name / "needle" / "metrics.json").read_text())
        for name in ("rankrag", "long")
    }
    losses = {}
    for name in vars(Steps()):
        lines = [line["loss"] for line in log(folder / name)]
        tenth = max(1, len(lines) // 10)
        losses[name] = {
            "steps": len(lines),
            "first": sum(lines[:tenth]) / tenth,
            "last": sum(lines[-tenth:]) / tenth,
        }
    return {"rag": runs, "needle": grids, "losses": losses}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a report; shares in percent."""

    def cells(row: Mapping[str, Any] | None, keys: Sequence[str]) -> list[str]:
        values = [None if row is None else row.get(key) for key in keys]
        return ["-" if value is None else f"{100 * value:.1f}" for value in values]

    def by_way(key: str) -> list[tuple[str, list[str]]]:
        return [
            (name, [cells(found["rag"][name]["answers"].get(way), [key])[0] for way in WAYS])
            for name in ASKED
        ]

    cutoffs = [f"recall_at_{k}" for k in CUTOFFS]
    questions = found["rag"]["rankrag"]["answers"]["gold"]["questions"]
    kinds = ("unanswerable_accuracy", "answerable_accuracy", "both_accuracy")
    return [
        Table(
            "Exact match",
            f"Share of the {questions} answerable held-out questions, by what is shown: nothing,"
            " the entry that answers, or the first k of the search or the reranking. In percent.",
            list(WAYS.values()),
            by_way("exact_match"),
        ),
        Table("F1", "The same answers, by shared words.", list(WAYS.values()), by_way("f1")),
        Table(
            "Recall of the search",
            f"Share of answerable questions whose entry is among the first k of {SEARCHED}, before"
            " and after rankrag has ranked them anew. In percent.",
            [f"k={k}" for k in CUTOFFS],
            [
                (name, cells(row, cutoffs))
                for name, row in found["rag"]["rankrag"]["recall"].items()
            ],
        ),
        Table(
            "Refusals",
            "Share of refusals where the entry is not among the documents, of other replies where"
            " the entry is shown, and their mean. In percent.",
            [f"{kind.partition('_')[0]}, {name}" for name in ("gold", "k=5") for kind in kinds],
            [
                (
                    name,
                    [
                        *cells(found["rag"][name]["answers"]["gold"], kinds),
                        *cells(found["rag"][name]["answers"]["searched_5"], kinds),
                    ],
                )
                for name in ASKED
            ],
        ),
        Table(
            "Needle",
            "Share of needles found, by tokens of prompt and answer: means over depths, percent.",
            [str(length) for length in NEEDLE_LENGTHS],
            [
                (
                    name,
                    [
                        f"{100 * sum(column) / len(column):.1f}"
                        for column in zip(*grid["recall"], strict=True)
                    ],
                )
                for name, grid in found["needle"].items()
            ],
        ),
        Table(
            "Training",
            "Steps, and the mean loss of the first and the last tenth of them.",
            ["steps", "first loss", "last loss"],
            [
                (name, [str(row["steps"]), f"{row['first']:.3f}", f"{row['last']:.3f}"])
                for name, row in found["losses"].items()
            ],
        ),
    ]


def examples(folder: Path) -> list[Example]:
    """Return some held-out questions with the answers of rankrag by every way."""
    lines = (folder / "rankrag/rag/rows/traces.jsonl").read_text().splitlines()
    traces = [json.loads(line) for line in lines]
    return [
        Example(
            f"{trace['messages'][-1]['content']} {'; '.join(trace['answers']) or '(no answer)'}",
            {
                WAYS[way]: Said(one["text"] or one["error"], one.get("exact_match", 0) >= 1)
                for way, one in sorted(
                    trace["ways"].items(), key=lambda item: [*WAYS].index(item[0])
                )
            },
        )
        for trace in traces[:: max(1, len(traces) // EXAMPLES)][:EXAMPLES]
    ]


def report(folder: Path, steps: Steps, sizes: Sizes) -> None:
    """Write results.json and report.html, and print the tables."""
    found = measure(folder)
    spent = studies.spent(folder)
    given = {name: value for name, value in vars(steps).items() if value is not None}
    settings = {"steps": given or "the experiments'", **vars(sizes), **spent}
    studies.save(folder / "results.json", found, **settings)
    made = tables(found)
    for each in made:
        lines = [[name, *cells] for name, cells in each.rows]
        print(f"\n{each.title}\n{studies.table(['', *each.columns], lines)}")
    seconds = f"{spent['cpu_seconds']:.0f}"
    notes = [
        f"One seed; {seconds} seconds of processor time in all. The score is exact match, chosen"
        " before any run. Modules of the held-out questions are in no training data.",
        "A question asks how a function is called; the answer is the first line of its entry.",
    ]
    maps = [
        HeatMap(title, NEEDLE_LENGTHS, DEPTHS, found["needle"][name]["recall"])
        for name, title in (("rankrag", "Before the extension"), ("long", "After it"))
    ]
    losses = {
        name: [(line["step"], line["loss"]) for line in log(folder / name)]
        for name in vars(Steps())
    }
    title = "ChatQA and RankRAG in small on Python's documentation"
    write(folder / "report.html", page(title, notes, made, maps, losses, examples(folder)))
    print(f"\nreport: {folder}/report.html ({seconds} CPU-seconds)")


def main() -> None:
    parser = studies.parser(__doc__, Steps, Path("runs/demo_rag"))
    parser.add_argument(
        "--repeats", type=studies.at_least_one, default=Sizes().repeats, help="needles a cell"
    )
    parser.add_argument("--package", type=Path, help=f"{PACKAGE}'s .deb, else apt fetches it")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    rag_demo.build(DATA, sources(DATA, options.package))
    steps = studies.steps_given(Steps, options)
    sizes = Sizes(repeats=options.repeats)
    chains = plan(options.to, SEED, steps, sizes)
    studies.run(chains, len(chains))
    report(options.to, steps, sizes)


if __name__ == "__main__":
    with failures("demo_rag.py"):
        main()
