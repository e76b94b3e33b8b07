"""Turn a user's data into webdataset shards, and index shards.

nvmm shard llava --json train.json --images images/ --to shards/ --name train
nvmm shard jsonl --json train.jsonl --files image=images/ --files sound=sounds/ --to ...
nvmm shard mmc4 --json 'docs_*.jsonl' --images images/ --to shards/ --name mmc4
nvmm shard parquet --from 'tables/*.parquet' --to ...
nvmm shard hf --from folder/ --split train --to ...
nvmm shard chatqa --from train.json --to ...       (conversations, questions: --help)
nvmm shard long --from texts.jsonl --tokenizer DIR --tokens 10000000000 --to ...
nvmm shard beir|mbeir|triplets|classes|dialogues ...   (queries and documents: --help)
nvmm shard index 'shards/train-*.tar'
nvmm shard index --config experiment=NAME tokenizer.path=DIR data.train.shards=...
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nvmm.commands import retrieval
from nvmm.data.prepare import commands as questions
from nvmm.data.prepare import json_records, mmc4, tables
from nvmm.data.prepare.write import add_options, write
from nvmm.data.shards.storage import expand


def index_shards(options: argparse.Namespace) -> None:
    """Build the index of the patterns, as a dataset of them would on first use."""
    from nvmm.data.shards.dataset import Dataset

    dataset = Dataset(options.shards, build=dict, index_dir=options.index_dir)
    dataset.skip_damage = True
    index = dataset.index
    print(f"{len(index)} samples in {len(dataset.shards)} shards: {index.path}")
    kinds = ", ".join(f".{kind} {count}" for kind, count in index.kinds.items())
    print(f"{index.num_with_images} with pictures; members: {kinds}")
    for line in dataset.index.damage:
        print(f"damaged: {line}")


def index_config(overrides: list[str], folder: str | None) -> None:
    """Index the training data of a run and count the tokens of every sample.

    folder: more groups of configs, as of --config-dir.
    """
    from nvmm.config import compose
    from nvmm.config.batch_sizes import BatchSizes
    from nvmm.data.order.blend import Blend

    sys.argv[1:] = [*overrides, *([] if folder is None else ["--config-dir", folder])]
    job = compose.load("train", placeholders=True)
    if job is None:
        return
    from hydra.utils import instantiate

    tokenizer = instantiate(job.config["tokenizer"], _convert_="all")
    data = instantiate(job.config["data"], _convert_="all")(tokenizer=tokenizer)
    data.count_lengths()
    for component in data.components:
        tokens = component.dataset.lengths[:, 0]
        bad = int((tokens < 0).sum())
        total = int(tokens[tokens > 0].sum(dtype="int64"))
        print(
            f"{component.name}: {len(tokens)} samples, {bad} bad, {total} tokens, weight"
            f" {float(component.weight):.4g}: {component.dataset.index.path}"
        )
        print(f"{component.name}: {component.dataset.contents()[0]}")
    size = Blend([component.source() for component in data.components]).size
    if size is not None:
        print(data.end_of(size, BatchSizes.of_config(job.config)))


def key_and_folder(text: str) -> tuple[str, str]:
    """Split an argument KEY=FOLDER."""
    key, equals, folder = text.partition("=")
    if not key or not equals or not folder:
        raise argparse.ArgumentTypeError(f"{text} must be KEY=FOLDER")
    return key, folder


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("llava", help="LLaVA-style JSON and a folder of images")
    command.add_argument("--json", required=True, help="JSON list, or .jsonl")
    command.add_argument("--images", required=True, help="folder that image names are relative to")
    command = commands.add_parser("jsonl", help="JSON records and folders of any files")
    command.add_argument("--json", required=True, help=".jsonl, or a JSON list")
    command.add_argument(
        "--files",
        action="append",
        default=[],
        type=key_and_folder,
        metavar="KEY=FOLDER",
        help="a record's KEY names files in FOLDER; may be given several times",
    )
    command = commands.add_parser("mmc4", help="MMC4's documents; pictures that cannot be had go")
    command.add_argument("--json", required=True, help="pattern of .jsonl files")
    command.add_argument(
        "--images",
        help="folder that image_name is relative to; left out: image_base64 in the lines",
    )
    command = commands.add_parser("parquet", help="Parquet files; needs pyarrow")
    command.add_argument("--from", dest="source", required=True, help="file pattern")
    command = commands.add_parser("hf", help="folder of Hugging Face datasets; needs pyarrow")
    command.add_argument("--from", dest="source", required=True, help="save_to_disk's, or Parquet")
    command.add_argument("--split", help="needed where the folder has several")
    command.add_argument("--config", help="folder of the Parquet files, where there are several")
    for name, command in commands.choices.items():
        add_options(command, samples_per_shard=1000)
        if name == "mmc4":
            continue
        command.add_argument(
            "--unread",
            action="append",
            default=[],
            metavar="KEY",
            help="key or column whose files are left out; may be given several times",
        )
        if name in ("llava", "jsonl"):
            command.add_argument(
                "--on-missing",
                choices=("stop", "skip"),
                default="stop",
                help="skip: leave out records whose files are missing, and list them in the end",
            )
    questions.add_commands(commands)
    retrieval.add_commands(commands)
    command = commands.add_parser("index", help="index shards; with a config count tokens too")
    command.add_argument("shards", nargs="*", help="file patterns")
    command.add_argument("--index-dir", help="folder for it, where the shards' own cannot hold it")
    command.add_argument(
        "--config", nargs="+", default=[], help="overrides of nvmm train: count all its tokens"
    )
    command.add_argument("--config-dir", help="more groups of configs, from your own folder")
    return parser


def samples(
    options: argparse.Namespace, leave_out: Callable[[str], None]
) -> Iterable[dict[str, Any]]:
    """Return the samples that a command line asks for."""
    if options.command in ("llava", "jsonl"):
        files = options.images if options.command == "llava" else dict(options.files)
        if options.command == "jsonl" and len(files) < len(options.files):
            raise ValueError("--files names a key twice; a key's files are in one folder")
        return json_records.samples(
            json_records.read_records(options.json),
            files,
            options.unread,
            leave_out if options.on_missing == "skip" else None,
        )
    if options.command == "mmc4":
        return documents(options, leave_out)
    if options.command == "hf":
        rows = tables.folder_rows(options.source, options.split, options.config)
        return tables.samples(rows, options.unread)
    paths = expand(options.source)
    if not paths:
        raise ValueError(f"--from {options.source} matches no file")
    return tables.samples(tables.parquet_rows(paths), options.unread)


def documents(
    options: argparse.Namespace, leave_out: Callable[[str], None]
) -> Iterable[dict[str, Any]]:
    """Yield the samples of MMC4's documents, then print how many of their pictures are left out."""
    paths = expand(options.json)
    if not paths:
        raise ValueError(f"--json {options.json} matches no file")
    counts: Counter[str] = Counter()
    yield from mmc4.samples(paths, options.images, leave_out, counts)
    print(
        f"{counts['missing']} pictures missing and {counts['damaged']} damaged of"
        f" {counts['pictures']}"
    )


def main() -> None:
    options = parser().parse_args()
    if "run" in options:
        return options.run(options)
    if options.command != "index":
        return write(options, partial(samples, options))
    if bool(options.shards) == bool(options.config):
        sys.exit("index: give patterns, or --config and the overrides of a training run")
    if options.config:
        index_config(options.config, options.config_dir)
    else:
        index_shards(options)
