"""MM-Embed in small on openmoji, random against modality-aware negatives: tools/demo_retrieval.py

Each seed trains stage 1 (other samples of the batch are the negatives), embeds the training pool
and queries with it, mines negatives, and trains stage 2 once for each arm, from the weights that
stage 1 began with:

  random    one negative of the union pool, drawn at random
  siblings  one of the data's own: other skin tones, emoji of the same subgroup, the query's picture
  mined     one of MM-Embed's two kinds: wrong modality above the positive, right modality far below

All of them answer the same held-out queries on the union pool and on each task's own. The commands
are public ones, which `command.json` in each folder names. An interrupted call goes on with the
same command.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nvmm import studies
from nvmm.config.compose import failures
from nvmm.data.prepare import mbeir, openmoji_set
from nvmm.data.prepare.openmoji_tasks import MODALITIES
from nvmm.io.files import write
from nvmm.report.retrieval import Example, Shown, Table, page

DATA = Path("data/openmoji")  # of the experiments' tokenizer
SEED = 1234
STAGE_1 = "stage 1"
ARMS = ("mined", "random", "siblings")
"""The first to start is the one with the longest chain."""
TASKS = {task: f"{asked} to {target}" for task, (asked, target) in MODALITIES.items()}
CUTOFFS = (1, 5, 10)
EXAMPLES = 3
SHOWN = 5


def shards(folder: Path, *options: str) -> studies.Command:
    """Return the command that makes shards of the training queries."""
    source = DATA / "query/train/mbeir_union_train.jsonl"
    return studies.command(
        folder,
        *("tools/retrieval_data.py", "mbeir", "--from", str(source), "--to", f"{folder}/shards"),
        *("--pool", str(DATA / "cand_pool/global/mbeir_union_train_cand_pool.jsonl")),
        *("--instructions", str(DATA / "instructions/query_instructions.tsv")),
        *("--images", str(DATA), "--replace", *options),
    )


def job(folder: Path, kind: str, split: str, *overrides: str) -> studies.Command:
    """Return a job on the union pool of a split; its output is `folder`/rows."""
    files = (
        f"job.data.folder={DATA}",
        f"job.data.pool={DATA}/cand_pool/global/mbeir_union_{split}_cand_pool.jsonl",
        f"job.data.queries={DATA}/query/{split}/mbeir_union_{split}.jsonl",
        f"job.data.instructions={DATA}/instructions/query_instructions.tsv",
    )
    return studies.command(
        folder,
        *("-m", "nvmm.job", f"job={kind}", "job/data=mbeir", *files),
        *(f"output={folder}/rows", *overrides),
    )


def vectors(run: Path, split: str) -> tuple[studies.Command, studies.Command]:
    """Return the jobs that embed a split's union pool and queries with a run's checkpoint."""
    corpus, queries = (
        job(
            run / f"{split}_{side}",
            "encode",
            split,
            f"checkpoint={run}",
            f"job.side={side}",
            "job.batch_size=64",
        )
        for side in ("corpus", "queries")
    )
    return corpus, queries


def ranked(run: Path, kind: str, split: str, *overrides: str) -> studies.Command:
    """Return a job on the vectors of a run."""
    return job(
        run / f"{split}_{kind}",
        kind,
        split,
        f"job.corpus={run}/{split}_corpus/rows",
        f"job.queries={run}/{split}_queries/rows",
        *overrides,
    )


def scores_folder(run: Path, task: int, pool: str) -> Path:
    """Return the folder of a run's scores; pool: "union" or "local"."""
    return run / "evaluation" / f"{pool}_task{task}"


def evaluate(run: Path, task: int, pool: str) -> studies.Command:
    """Return the evaluation of a run on one task."""
    name = f"mbeir_openmoji_task{task}_test"
    pools = {"union": "global/mbeir_union_test", "local": f"local/{name}"}
    folder = scores_folder(run, task, pool)
    return studies.command(
        folder,
        *("-m", "nvmm.evaluate", f"checkpoint={run}", f"output={folder}", "benchmark=mbeir"),
        f"benchmark.pool={DATA}/cand_pool/{pools[pool]}_cand_pool.jsonl",
        f"benchmark.queries={DATA}/query/test/{name}.jsonl",
        f"benchmark.qrels={DATA}/qrels/test/{name}_qrels.txt",
        f"benchmark.instructions={DATA}/instructions/query_instructions.tsv",
        f"benchmark.folder={DATA}",
        "batch_size=64",
    )


def run_folder(folder: Path, seed: int, arm: str) -> Path:
    """Return the run directory of an arm."""
    return folder / f"seed{seed}" / arm.replace(" ", "")


def judged(run: Path) -> tuple[studies.Command, ...]:
    """Return the evaluations of a run, and its rankings for the report."""
    return (
        *(evaluate(run, task, pool) for task in TASKS for pool in ("union", "local")),
        *vectors(run, "test"),
        ranked(run, "search", "test", f"job.k={max(CUTOFFS)}"),
    )


def variant(arm: str, seed: int, folder: Path, steps: int) -> studies.Variant:
    """Return the chain of commands of stage 1 or of an arm."""
    first, run = run_folder(folder, seed, STAGE_1), run_folder(folder, seed, arm)
    base = (*studies.ALONE, f"seed={seed}", f"trainer.max_steps={steps}")

    def train(to: Path, experiment: str, data: Path) -> studies.Command:
        return studies.train(
            to, f"experiment=mm_embed/{experiment}", *base, f"data.train.shards={data}/shards/*.tar"
        )

    in_batch = folder / "data/in_batch"
    start = (shards(in_batch), train(first, "demo_rand", in_batch))
    if arm == STAGE_1:
        return studies.Variant(arm, seed, (*start, *judged(run)))
    if arm == "mined":
        data = folder / f"seed{seed}/data_mined"
        mined = ranked(
            first,
            "mine",
            "train",
            *(
                "job.range_max=50",
                "job.modality_floor=45",
                "job.num_negatives=1",
                f"job.seed={seed}",
            ),
        )
        given = ("--num-negatives", "1", "--negatives", f"{mined.folder}/rows")
        before = (*start, *vectors(first, "train"), mined, shards(data, *given))
    else:
        data = folder / f"data/{arm}"
        drawn = ("--negatives", str(DATA / "negatives/random.jsonl"))
        given = ("--num-negatives", "1", *(drawn if arm == "random" else ()))
        before = (shards(data, *given),)
    return studies.Variant(arm, seed, (*before, train(run, "demo_hard", data), *judged(run)))


def plan(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], steps: int
) -> list[studies.Variant]:
    """Return all variants; those that others wait for come first."""
    return [variant(arm, seed, folder, steps) for arm in (*arms, STAGE_1) for seed in seeds]


def measure(run: Path) -> dict[str, float]:
    """Return a run's scores, as "union/0/hit_rate_at_1" (pool, task, metric)."""
    return {
        f"{pool}/{task}/{name}": value
        for pool in ("union", "local")
        for task in TASKS
        for name, value in json.loads(
            (scores_folder(run, task, pool) / "metrics.json").read_text()
        ).items()
        if "_at_" in name
    }


def tables(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Table]:
    """Return the tables of scores: means and standard deviations over the seeds, in percent."""

    def row(arm: str, keys: Sequence[str]) -> tuple[str, list[str]]:
        seeds = results[arm]
        return arm, [studies.spread([100 * seed[key] for seed in seeds], 1) for key in keys]

    def table(title: str, note: str, columns: dict[str, str]) -> Table:
        rows = [row(arm, list(columns.values())) for arm in results]
        return Table(title, note, list(columns), rows)

    made = []
    for pool in ("union", "local"):
        for task, name in TASKS.items():
            columns = {f"hit@{k}": f"{pool}/{task}/hit_rate_at_{k}" for k in CUTOFFS}
            if pool == "union":
                columns |= {
                    f"modality@{k}": f"union/{task}/modality_accuracy_at_{k}" for k in (1, 5)
                }
            made.append(table(f"{name}, {pool} pool", _NOTES[pool], columns))
    return made


_NOTES = {
    "union": "Share of queries with a right candidate among the k best of the pool of all tasks,"
    " and share of the k best that have the right modality; in percent.",
    "local": "The same among the candidates of the right modality alone.",
}


def examples(folder: Path, seed: int, arms: Sequence[str]) -> list[Example]:
    """Return some queries of each task with the best candidates of every arm, of one seed."""
    from nvmm.jobs.search import read_rankings  # it needs the extra jobs

    pool = mbeir.read_pool(DATA / "cand_pool/global/mbeir_union_test_cand_pool.jsonl")
    prompts = mbeir.read_instructions(DATA / "instructions/query_instructions.tsv")
    rankings = {
        arm: read_rankings(run_folder(folder, seed, arm) / "test_search/rows") for arm in arms
    }

    def shown(item: mbeir.Item, right: bool = False) -> Shown:
        image = (DATA / item.image).read_bytes() if item.image else None
        return Shown(item.text, image, right)

    made = []
    for task, name in TASKS.items():
        queries = mbeir.read_queries(DATA / f"query/test/mbeir_openmoji_task{task}_test.jsonl")
        # Spread over the file, so that they are of different groups, and the same in every report.
        places = [len(queries) * (2 * i + 1) // (2 * EXAMPLES) for i in range(EXAMPLES)]
        for query in [list(queries)[place] for place in places]:
            asked, target = MODALITIES[task]
            best = {
                arm: [
                    shown(pool[doc], doc in queries[query].positives)
                    for doc in found[query][:SHOWN]
                ]
                for arm, found in rankings.items()
            }
            prompt = mbeir.instruction(prompts, query, asked, target, None)
            made.append(Example(name, prompt, shown(queries[query]), best))
    return made


def losses(folder: Path, seed: int, arms: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Return the losses of training of one seed."""
    found = {}
    for arm in arms:
        lines = (run_folder(folder, seed, arm) / "metrics.jsonl").read_text().splitlines()
        steps = map(json.loads, lines)
        found[arm] = [(step["step"], step["loss"]) for step in steps]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=200, help="of a training")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--package", type=Path, help="openmoji-17.0.0.tgz, else npm fetches it")
    parser.add_argument("--to", type=Path, default=Path("runs/demo_retrieval"), help="its folder")
    options = parser.parse_args()
    arms = options.arms.split(",")
    if not set(arms) <= set(ARMS):
        parser.error(f"--arms {options.arms}: use {','.join(ARMS)}")
    if min(options.seeds, options.jobs) < 1:
        parser.error(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    studies.exit_on_sigterm()
    openmoji_set.build(DATA, package=options.package)
    seeds = range(SEED, SEED + options.seeds)
    studies.run(plan(options.to, seeds, arms, options.steps), options.jobs)
    # Stage 1 goes first in what is shown.
    shown = [STAGE_1, *(arm for arm in ("random", "siblings", "mined") if arm in arms)]
    results = {arm: [measure(run_folder(options.to, seed, arm)) for seed in seeds] for arm in shown}
    spent = studies.spent(options.to)
    studies.save(options.to / "results.json", results, steps=options.steps, **spent)
    made = tables(results)
    for each in made:
        rows = [[name, *cells] for name, cells in each.rows]
        print(f"\n{each.title}\n{studies.table(['', *each.columns], rows)}")
    notes = [
        f"{options.seeds} seed(s), {options.steps} steps a training; {spent['cpu_seconds']:.0f}"
        " seconds of processor time in all. Losses and candidates are those of the first seed.",
        "Stage 1 has the other samples of a batch as negatives. random, siblings and mined have one"
        " more negative each, and start from the same weights as stage 1.",
        "Pictures: OpenMoji 17.0.0, CC BY-SA 4.0 (openmoji.org), drawn at 64 x 64 pixels.",
    ]
    text = page(
        "MM-Embed in small on openmoji",
        notes,
        made,
        losses(options.to, seeds[0], shown),
        examples(options.to, seeds[0], shown),
    )
    write(options.to / "report.html", text)
    print(f"\nreport: {options.to}/report.html ({spent['cpu_seconds']:.0f} CPU-seconds)")


if __name__ == "__main__":
    with failures("demo_retrieval.py"):
        main()
