"""Turn a user's data into webdataset shards, and index shards.

python tools/shard.py llava --json train.json --images images/ --to shards/ --name train
python tools/shard.py jsonl --json train.jsonl --files image=images/ --files sound=sounds/ --to ...
python tools/shard.py parquet --from 'tables/*.parquet' --to ...
python tools/shard.py hf --from folder/ --split train --to ...
python tools/shard.py index 'shards/train-*.tar'
python tools/shard.py index --config experiment=NAME tokenizer.path=DIR data.train.shards=...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from nvmm.config.compose import failures
from nvmm.data.prepare import json_records, tables
from nvmm.data.shards.dataset import write_shards
from nvmm.data.shards.storage import expand


def index_shards(options: argparse.Namespace) -> None:
    """Build the index of the patterns, as a dataset of them would on first use."""
    from nvmm.data.shards.dataset import Dataset

    dataset = Dataset(options.shards, build=dict, index_dir=options.index_dir)
    dataset.skip_damage = True
    print(f"{len(dataset)} samples in {len(dataset.shards)} shards: {dataset.index.path}")
    for line in dataset.index.damage:
        print(f"damaged: {line}")


def index_config(overrides: list[str]) -> None:
    """Index the training data of a run and count the tokens of every sample."""
    from nvmm.config import compose

    sys.argv[1:] = overrides
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
    command = commands.add_parser("parquet", help="Parquet files; needs pyarrow")
    command.add_argument("--from", dest="source", required=True, help="file pattern")
    command = commands.add_parser("hf", help="folder of Hugging Face datasets; needs pyarrow")
    command.add_argument("--from", dest="source", required=True, help="save_to_disk's, or Parquet")
    command.add_argument("--split", help="of a DatasetDict, or the Parquet files' first word")
    for command in commands.choices.values():
        command.add_argument("--to", required=True, help="folder to write")
        command.add_argument("--name", default="train", help="shards are NAME-00000.tar, ...")
        command.add_argument("--samples-per-shard", type=int, default=1000)
    command = commands.add_parser("index", help="index shards; with a config count tokens too")
    command.add_argument("shards", nargs="*", help="file patterns")
    command.add_argument("--index-dir", help="folder for it, where the shards' own cannot hold it")
    command.add_argument(
        "--config", nargs="+", default=[], help="overrides of nvmm.train: count all its tokens"
    )
    return parser


def samples(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Return the samples that a command line asks for."""
    if options.command in ("llava", "jsonl"):
        files = {"image": options.images} if options.command == "llava" else dict(options.files)
        return json_records.samples(json_records.read_records(options.json), files)
    if options.command == "hf":
        return tables.samples(tables.folder_rows(options.source, options.split))
    paths = expand(options.source)
    if not paths:
        raise ValueError(f"--from {options.source} matches no file")
    return tables.samples(tables.parquet_rows(paths))


def write(options: argparse.Namespace) -> None:
    """Write the shards that a command line asks for."""
    interval = 0.1 if sys.stderr.isatty() else 10
    progress = tqdm(unit=" samples", mininterval=interval)

    def counted() -> Iterable[dict[str, Any]]:
        for sample in samples(options):
            yield sample
            progress.update()

    try:
        paths = write_shards(
            options.to, options.name, counted(), samples_per_shard=options.samples_per_shard
        )
    except ValueError as error:
        progress.close()
        sys.exit(str(error))
    progress.close()
    print(f"{progress.n} samples in {len(paths)} shards: {options.to}/{options.name}-*.tar")


def main() -> None:
    options = parser().parse_args()
    if options.command != "index":
        return write(options)
    if bool(options.shards) == bool(options.config):
        sys.exit("index: give patterns, or --config and the overrides of a training run")
    if options.config:
        index_config(options.config)
    else:
        index_shards(options)


if __name__ == "__main__":
    with failures("shard.py"):
        main()
