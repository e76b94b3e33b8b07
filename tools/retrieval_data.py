"""Turn retrieval and classification data into webdataset shards of queries and documents.

python tools/retrieval_data.py beir --from FOLDER --split train --to SHARDS [--negatives FILE]
python tools/retrieval_data.py mbeir --from QUERIES.jsonl --pool POOL.jsonl --instructions FILE.tsv
    --images FOLDER --to SHARDS [--num-negatives 1 --negatives FILE]
python tools/retrieval_data.py triplets --from FILE.jsonl --to SHARDS
python tools/retrieval_data.py classes --from FILE.jsonl --to SHARDS --instruction TEXT
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nvmm.config.compose import failures
from nvmm.data.prepare import mbeir, retrieval_sets
from nvmm.data.prepare.retrieval_sets import fields_of
from nvmm.data.prepare.write import add_options, write


def main() -> None:
    options = _parser().parse_args()
    if options.command == "mbeir":
        write(options, lambda _: _mbeir(options))
    else:
        write(options, lambda _: retrieval_sets.members(_records(options)))


def _mined(options: argparse.Namespace) -> dict[str, list[str]] | None:
    """Return query id -> ids of mined negatives, None where none are given."""
    if not options.negatives:
        return None
    lines: Iterable[dict[str, Any]]
    if Path(options.negatives).is_dir():
        from nvmm.jobs.parts import Parts  # it needs the extra jobs

        lines = Parts(Path(options.negatives)).read().to_pylist()
    else:
        lines = fields_of(options.negatives, "query_id", "ids")
    return {str(line["query_id"]): list(map(str, line["ids"])) for line in lines}


def _mbeir(options: argparse.Namespace) -> Any:
    count = options.num_negatives
    if count < 0 or (options.negatives and not count):
        raise ValueError(
            f"--num-negatives {count} must be at least {1 if options.negatives else 0}"
            + (", to take those of --negatives" if options.negatives else "")
        )
    queries = mbeir.read_queries(options.source)
    unused = sum(bool(query.negatives) for query in queries.values())
    if unused and (options.negatives or not count):
        print(f"the neg_cand_list of {unused} queries is left out")
    return mbeir.samples(
        queries,
        mbeir.read_pool(options.pool),
        mbeir.read_instructions(options.instructions),
        options.images,
        num_negatives=options.num_negatives,
        mined=_mined(options),
        seed=options.seed,
    )


def _records(options: argparse.Namespace) -> Any:
    if options.command == "beir":
        return retrieval_sets.beir(options.source, options.split, _mined(options))
    if options.command == "triplets":
        return retrieval_sets.triplets(fields_of(options.source))
    rows = list(fields_of(options.source, "text", "label"))
    return retrieval_sets.classes(
        [row["text"] for row in rows],
        [row["label"] for row in rows],
        num_negatives=options.num_negatives,
        instruction=options.instruction,
        seed=options.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "beir": "corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv",
        "mbeir": "M-BEIR's queries, a pool, instructions and pictures",
        "triplets": "lines of anchor, positive, negative, negative_2, ...",
        "classes": "lines of text and label; positives and negatives are other examples",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--from", dest="source", required=True, help="folder or file")
        add_options(command, samples_per_shard=10_000)
        if name == "beir":
            command.add_argument("--split", default="train")
            command.add_argument(
                "--negatives", help='output of job=mine, or .jsonl of {"query_id": .., "ids": [..]}'
            )
        if name == "mbeir":
            command.add_argument("--pool", required=True, help="cand_pool/....jsonl")
            command.add_argument("--instructions", required=True, help="query_instructions.tsv")
            command.add_argument("--images", required=True, help="where pictures' paths begin")
            command.add_argument("--num-negatives", type=int, default=0)
            command.add_argument("--negatives", help="as of beir; else each query's neg_cand_list")
            command.add_argument("--seed", type=int, default=0)
        if name == "classes":
            command.add_argument("--instruction", required=True)
            command.add_argument("--num-negatives", type=int, default=7)
            command.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    with failures("retrieval_data.py"):
        main()
