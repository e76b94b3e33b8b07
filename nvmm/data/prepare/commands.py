"""The commands of `nvmm shard` for conversations, questions over documents, and long texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, get_args

from nvmm.data.prepare import (
    conversations,
    evidence,
    long_text,
    planted,
    ranking,
    sound_manifests,
)
from nvmm.data.prepare.records import LeftOut, read_objects
from nvmm.data.prepare.resume import Resumed
from nvmm.data.prepare.retrieval_sets import fields_of, members
from nvmm.data.prepare.write import Samples, add_options, write_resumed
from nvmm.data.samples.tokenizer import Tokenizer

Run = Callable[[argparse.Namespace, LeftOut], Iterable[dict[str, Any]]]
_HELP = {
    "chatqa": "ChatQA-Training-Data's and ChatQA2-Long-SFT-data's JSON",
    "chatrag": "ChatRAG-Bench's JSON",
    "squad": "SQuAD's JSON, 1.1 or 2.0",
    "tatqa": "TAT-QA's JSON",
    "conversations": "chats without documents: messages or conversations",
    "dpr": "DPR's JSON: RankRAG's retrieval-augmented QA or ranking, or pairs",
    "msmarco": "MS MARCO's files of passages: pairs for context ranking",
    "unanswerable": "dialogues over documents whose answers are taken out",
    "pairs": "dialogues over documents: pairs of questions and chunks for context ranking",
    "narrativeqa": "NarrativeQA's folder: summaries, or long documents with the summary planted",
}


def add_commands(commands: Any) -> None:
    """Add a parser for each command; `options.run` then writes its shards."""
    parsers = {name: commands.add_parser(name, help=text) for name, text in _HELP.items()}
    for name, command in parsers.items():
        add_options(command, samples_per_shard=1000)
        command.set_defaults(run=run)
        if name != "msmarco":
            command.add_argument("--from", dest="source", required=True, help="file or folder")
        if name in ("chatqa", "chatrag", "squad", "tatqa", "conversations"):
            command.add_argument(
                "--on-bad",
                choices=("stop", "skip"),
                default="stop",
                help="skip: leave bad records out, and list them in the end",
            )
    _add_passages(parsers)
    _add_dialogues(parsers["unanswerable"], parsers["pairs"])
    _add_narrativeqa(parsers["narrativeqa"])
    parsers["tatqa"].add_argument("--part", required=True, choices=get_args(conversations.Part))
    long = commands.add_parser("long", help="long documents drawn more often, cut into rows")
    add_options(long, samples_per_shard=100)
    long.set_defaults(run=run_long)
    _add_long(long)
    sounds = commands.add_parser(
        "audio_flamingo", help="Audio Flamingo's manifests: clips, samples of several, dialogues"
    )
    add_options(sounds, samples_per_shard=1000)
    sounds.set_defaults(run=run_sounds)
    _add_sounds(sounds)


def run(options: argparse.Namespace) -> None:
    """Write the shards of a command but `long`."""
    records = _COMMANDS[options.command]

    def samples(left_out: LeftOut) -> Samples:
        return members(records(options, left_out))

    write_resumed(options, samples)


def run_long(options: argparse.Namespace) -> None:
    """Write the rows of `long`; a call that goes on does not tokenise again what it had done."""
    mix = dict(options.mix or long_text.SLIMPAJAMA)
    if len(mix) < len(options.mix or ()):
        raise ValueError("--mix names a source twice")
    rules = long_text.Rules(
        tokens=options.tokens,
        mix=mix,
        length=options.length,
        long_tokens=options.long_tokens,
        keep_short=options.keep_short,
        chars_per_token=options.chars_per_token,
        separator=options.separator,
        seed=options.seed,
    )
    tokenizer = _tokenizer(options)
    write_resumed(
        options,
        resumed=lambda told: long_text.samples(
            lambda: long_text.documents(options.source, options.source_key), tokenizer, rules, told
        ),
    )


def run_sounds(options: argparse.Namespace) -> None:
    """Write the samples of a manifest; a call that goes on reads no sound again."""
    refusals = _lines(options.refusals) if options.refusals else sound_manifests.REFUSALS

    def resumed(told: LeftOut) -> Callable[[Any], Resumed]:
        rules = sound_manifests.Rules(
            sounds=options.sounds,
            task=options.task,
            options=_lines(options.options) if options.options else (),
            min_bytes=options.min_bytes,
            refusals=[phrase.lower() for phrase in refusals],
            skip=_skip(options, told),
        )
        return sound_manifests.samples(options.source, rules, told)

    write_resumed(options, resumed=resumed)


def _lines(path: str) -> list[str]:
    """Return the lines of a file that are not empty."""
    with open(path, encoding="utf-8-sig") as file:
        return [line.strip() for line in file if line.strip()]


def _dpr(options: argparse.Namespace, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    ranked = ranking.read_dpr(read_objects(options.source), left_out)
    if options.to_train == "pairs":
        return ranking.pairs(ranked, options.num_negatives)
    make = ranking.answering if options.to_train == "answer" else ranking.relevance
    return make(ranked, options.num_passages, left_out)


def _ms_marco(options: argparse.Namespace, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    apart = (options.collection, options.queries, options.qrels)
    if options.triples and not any((*apart, options.negatives)):
        return ranking.ms_marco_triples(options.triples)
    if options.triples or not all(apart):
        raise ValueError("give --triples alone, or --collection, --queries and --qrels")
    lines = fields_of(options.negatives, "query_id", "ids") if options.negatives else ()
    negatives = {str(line["query_id"]): list(map(str, line["ids"])) for line in lines}
    count = options.num_negatives
    return ranking.ms_marco(*apart, negatives, count)


def _evidence(options: argparse.Namespace, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    if options.documents:
        documents = evidence.read_documents(fields_of(options.documents))
        asked = evidence.questions(fields_of(options.source), documents)
    else:
        asked = evidence.chatqa_questions(read_objects(options.source))
    bounds = evidence.Bounds(options.words, options.high, options.low)
    if options.command == "pairs":
        return evidence.pairs(asked, bounds, negatives=options.num_negatives, seed=options.seed)
    count, seed = options.count, options.seed
    return evidence.unanswerable(asked, options.by, bounds, left_out, count=count, seed=seed)


def _narrativeqa(options: argparse.Namespace, left_out: LeftOut) -> Iterable[dict[str, Any]]:
    if options.context == "summary":
        return planted.summaries(options.source, options.split)
    if not options.tokenizer:
        raise ValueError("--context planted needs --tokenizer, to count the documents' tokens")
    tokenizer = _tokenizer(options)
    lengths = planted.Lengths(options.shortest, options.longest, options.reserve)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    return planted.planted(
        options.source, options.split, count_tokens, lengths, left_out, options.seed
    )


_COMMANDS: dict[str, Run] = {
    "chatqa": lambda options, left_out: conversations.chatqa(
        read_objects(options.source), _skip(options, left_out)
    ),
    "chatrag": lambda options, left_out: conversations.chatrag(
        read_objects(options.source),
        options.num_contexts,
        gold=options.gold,
        passage=options.passage,
        skip=_skip(options, left_out),
    ),
    "squad": lambda options, left_out: conversations.squad(
        options.source, _skip(options, left_out)
    ),
    "tatqa": lambda options, left_out: conversations.tatqa(
        read_objects(options.source), options.part, _skip(options, left_out)
    ),
    "conversations": lambda options, left_out: conversations.plain(
        read_objects(options.source), left_out, _skip(options, left_out)
    ),
    "dpr": _dpr,
    "msmarco": _ms_marco,
    "unanswerable": _evidence,
    "pairs": _evidence,
    "narrativeqa": _narrativeqa,
}


def _skip(options: argparse.Namespace, left_out: LeftOut) -> conversations.Skip:
    return left_out if options.on_bad == "skip" else None


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of a folder. Texts need neither placeholder nor turns, so that any
    tokens stand for these.
    """
    image, end = "<|no image|>", "<|no turn|>"
    return Tokenizer(
        options.tokenizer, image_token=image, end_of_turn=end, extra_tokens=[image, end]
    )


def _add_passages(parsers: dict[str, argparse.ArgumentParser]) -> None:
    chatrag, dpr, msmarco = parsers["chatrag"], parsers["dpr"], parsers["msmarco"]
    chatrag.add_argument("--num-contexts", type=int, default=5, help="of ctxs")
    chatrag.add_argument("--gold", action="store_true", help="ground_truth_ctx, and not ctxs")
    chatrag.add_argument("--passage", default=conversations.PASSAGE, help="{title} and {text}")
    dpr.add_argument("--to-train", required=True, choices=("answer", "relevance", "pairs"))
    dpr.add_argument("--num-passages", type=int, default=5, help="gold and others; not of pairs")
    dpr.add_argument("--num-negatives", type=_count, default=1, help="of pairs")
    msmarco.add_argument("--triples", help="query, positive, negative with tabs between")
    for name, text in {
        "collection": "passage ids and texts",
        "queries": "query ids and texts",
        "qrels": "query, 0, passage, relevance",
        "negatives": '.jsonl of {"query_id": .., "ids": [..]}, mined',
    }.items():
        msmarco.add_argument(f"--{name}", help=text)
    msmarco.add_argument("--num-negatives", type=_count, default=1, help="for each query")


def _add_dialogues(unanswerable: argparse.ArgumentParser, pairs: argparse.ArgumentParser) -> None:
    bounds = evidence.Bounds()
    for command in (unanswerable, pairs):
        command.add_argument(
            "--documents", help="lines of _id and text; none: --from is ChatQA's training data"
        )
        command.add_argument("--words", type=int, default=bounds.words, help="most of a chunk")
        command.add_argument("--high", type=float, default=bounds.high, help="recall above it")
        command.add_argument("--low", type=float, default=bounds.low, help="recall below it")
        command.add_argument("--seed", type=int, default=0)
    unanswerable.add_argument("--by", required=True, choices=get_args(evidence.By))
    unanswerable.add_argument("--count", type=int, help="ChatQA has 1500; default: all")
    pairs.add_argument("--num-negatives", type=_count, help="for each positive; default: all")


def _add_narrativeqa(command: argparse.ArgumentParser) -> None:
    lengths = planted.Lengths()
    command.add_argument("--split", default="train", help="train, valid or test")
    command.add_argument("--context", required=True, choices=("summary", "planted"))
    command.add_argument("--tokenizer", help="folder; planted counts its tokens")
    command.add_argument("--shortest", type=int, default=lengths.shortest)
    command.add_argument("--longest", type=int, default=lengths.longest)
    command.add_argument("--reserve", type=int, default=lengths.reserve)
    command.add_argument("--seed", type=int, default=0)


def _add_sounds(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        help="train.json, interleaved_knn-train.json (train.json beside it), or Audio-Dialogues'",
    )
    command.add_argument("--sounds", help="folder of the sounds, instead of dataset_path")
    command.add_argument("--task", help="default: the one that flamingo_task names")
    command.add_argument("--options", help="file of the labels of a closed task, one a line")
    command.add_argument(
        "--min-bytes",
        type=int,
        default=sound_manifests.MIN_BYTES,
        help="leave smaller sounds out",
    )
    command.add_argument(
        "--refusals",
        help="file of phrases, one a line: a dialogue that has one in an answer is left out;"
        " default: Audio Flamingo's. An empty file leaves none out",
    )
    command.add_argument(
        "--on-bad",
        choices=("stop", "skip"),
        default="stop",
        help="skip: leave bad entries out, and list them in the end",
    )


def _add_long(command: argparse.ArgumentParser) -> None:
    rules = long_text.Rules(tokens=10**10)
    command.add_argument("--from", dest="source", required=True, nargs="+", help=".jsonl files")
    command.add_argument("--tokenizer", required=True, help="folder")
    command.add_argument("--tokens", type=int, default=rules.tokens, help="of all rows")
    command.add_argument("--source-key", default="meta.redpajama_set_name")
    command.add_argument(
        "--mix", type=_share, action="append", metavar="SOURCE=SHARE", help="default: SlimPajama's"
    )
    command.add_argument("--length", type=int, default=rules.length)
    command.add_argument("--long-tokens", type=int, default=rules.long_tokens)
    command.add_argument("--keep-short", type=float, default=rules.keep_short)
    command.add_argument("--chars-per-token", type=float, default=rules.chars_per_token)
    command.add_argument("--separator", default=rules.separator)
    command.add_argument("--seed", type=int, default=0)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return int(text)


def _share(text: str) -> tuple[str, float]:
    source, equals, share = text.rpartition("=")
    try:
        if not source or not equals:
            raise ValueError
        return source, float(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} must be SOURCE=SHARE") from error
