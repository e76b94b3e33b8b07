"""Turn retrieval and classification data into webdataset shards of queries and documents.

python tools/retrieval_data.py beir --from FOLDER --split train --to SHARDS [--negatives FILE]
python tools/retrieval_data.py triplets --from FILE.jsonl --to SHARDS
python tools/retrieval_data.py classes --from FILE.jsonl --to SHARDS --instruction TEXT
"""

from __future__ import annotations

import argparse
from typing import Any

from nvmm.data.prepare import retrieval_sets
from nvmm.data.prepare.retrieval_sets import fields_of
from nvmm.data.prepare.write import add_options, write


def main() -> None:
    options = _parser().parse_args()
    write(options, lambda _: retrieval_sets.members(_records(options)))


def _records(options: argparse.Namespace) -> Any:
    if options.command == "beir":
        mined = None
        if options.negatives:
            lines = fields_of(options.negatives, "query_id", "ids")
            mined = {str(line["query_id"]): list(map(str, line["ids"])) for line in lines}
        return retrieval_sets.beir(options.source, options.split, mined)
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
        "triplets": "lines of anchor, positive, negative, negative_2, ...",
        "classes": "lines of text and label; positives and negatives are other examples",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--from", dest="source", required=True, help="folder or file")
        add_options(command, samples_per_shard=10_000)
        if name == "beir":
            command.add_argument("--split", default="train")
            command.add_argument("--negatives", help='.jsonl of {"query_id": .., "ids": [..]}')
        if name == "classes":
            command.add_argument("--instruction", required=True)
            command.add_argument("--num-negatives", type=int, default=7)
            command.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
