"""Turn retrieval and classification data into webdataset shards of queries and documents.

python tools/retrieval_data.py beir --from FOLDER --split train --to SHARDS [--negatives FILE]
python tools/retrieval_data.py triplets --from FILE.jsonl --to SHARDS
python tools/retrieval_data.py classes --from FILE.jsonl --to SHARDS --instruction TEXT
"""

from __future__ import annotations

import argparse
from typing import Any

from nvmm.config.compose import failures
from nvmm.data.prepare import retrieval_sets
from nvmm.data.prepare.records import read_lines
from nvmm.data.shards.dataset import write_shards


def main() -> None:
    options = _parser().parse_args()
    paths = write_shards(
        options.to,
        options.name,
        retrieval_sets.members(_records(options)),
        samples_per_shard=options.samples_per_shard,
    )
    print(f"{len(paths)} shards: {options.to}/{options.name}-*.tar")


def _records(options: argparse.Namespace) -> Any:
    if options.command == "beir":
        mined = None
        if options.negatives:
            lines = read_lines(options.negatives)
            mined = {str(line["query_id"]): list(map(str, line["ids"])) for line in lines}
        return retrieval_sets.beir(options.source, options.split, mined)
    rows = list(read_lines(options.source))
    if options.command == "triplets":
        return retrieval_sets.triplets(rows)
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
        "triplets": "lines of anchor, positive, negative, negative_2, ...",
        "classes": "lines of text and label; positives and negatives are other examples",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--from", dest="source", required=True, help="folder or file")
        command.add_argument("--to", required=True, help="folder to write")
        command.add_argument("--name", default="train", help="shards are NAME-00000.tar, ...")
        command.add_argument("--samples-per-shard", type=int, default=10_000)
        if name == "beir":
            command.add_argument("--split", default="train")
            command.add_argument("--negatives", help='.jsonl of {"query_id": .., "ids": [..]}')
        if name == "classes":
            command.add_argument("--instruction", required=True)
            command.add_argument("--num-negatives", type=int, default=7)
            command.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    with failures("retrieval_data.py"):
        main()
