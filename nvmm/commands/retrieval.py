"""The commands of `nvmm shard` for retrieval and classification data: queries and documents.

nvmm shard beir --from FOLDER --split train --to SHARDS [--negatives FILE]
nvmm shard mbeir --from QUERIES.jsonl --pool POOL.jsonl --instructions FILE.tsv
    --images FOLDER --to SHARDS [--num-negatives 1 --negatives FILE]
nvmm shard triplets --from FILE.jsonl --to SHARDS
nvmm shard classes --from FILE.jsonl --to SHARDS --instruction TEXT
nvmm shard dialogues --from DIALOGUES.jsonl --documents FILE.jsonl --to SHARDS
    [--words 300 --beir FOLDER --split test]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nvmm.data.prepare import dialogues, mbeir, retrieval_sets
from nvmm.data.prepare.retrieval_sets import fields_of
from nvmm.data.prepare.write import add_options, write
from nvmm.data.samples.dialogue import Dialogue


def run(options: argparse.Namespace) -> None:
    """Write the shards that a command line asks for."""
    if options.command == "mbeir":
        write(options, lambda _: _mbeir(options))
    elif options.command == "dialogues":
        write(options, lambda left_out: _dialogues(options, left_out))
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


def _dialogues(options: argparse.Namespace, left_out: Callable[[str], None]) -> Any:
    rules = dialogues.Rules(options.words, options.answer_recall, options.min_recall)
    form = Dialogue(options.user_word, options.agent_word)
    chunks = dialogues.cut_documents(fields_of(options.documents), rules.words)
    asked = list(dialogues.questions(fields_of(options.source), chunks, rules, left_out))
    if options.beir and asked:
        dialogues.write_beir(options.beir, options.split, chunks, asked, rules, form)
    return retrieval_sets.members(dialogues.records(asked, options.set_name, rules))


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


def add_commands(commands: Any) -> None:
    """Add a parser for each command; `options.run` then writes its shards."""
    texts = {
        "beir": "corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv",
        "mbeir": "M-BEIR's queries, a pool, instructions and pictures",
        "triplets": "lines of anchor, positive, negative, negative_2, ...",
        "classes": "lines of text and label; positives and negatives are other examples",
        "dialogues": "dialogues over documents; positives by 4-gram recall, negatives beside them",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
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
        if name == "dialogues":
            _add_dialogues(command)
        if name == "classes":
            command.add_argument("--instruction", required=True)
            command.add_argument("--num-negatives", type=int, default=7)
            command.add_argument("--seed", type=int, default=0)


def _add_dialogues(command: argparse.ArgumentParser) -> None:
    rules, form = dialogues.Rules(), Dialogue()
    command.add_argument("--documents", required=True, help="lines of _id, title, text")
    command.add_argument("--set-name", required=True, help="before the ids of its documents")
    command.add_argument("--words", type=int, default=rules.words, help="most words of a chunk")
    command.add_argument("--answer-recall", type=float, default=rules.answer_recall)
    command.add_argument("--min-recall", type=float, default=rules.min_recall)
    command.add_argument("--beir", help="write all chunks and the questions there too")
    command.add_argument("--split", default="test", help="name of the qrels in --beir")
    command.add_argument("--user-word", default=form.user_word, help="of the queries in --beir")
    command.add_argument("--agent-word", default=form.agent_word)
