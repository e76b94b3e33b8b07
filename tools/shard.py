"""Turn a user's data into webdataset shards.

python tools/shard.py llava --json train.json --images images/ --to shards/ --name train
python tools/shard.py jsonl --json train.jsonl --files image=images/ --files sound=sounds/ --to ...
python tools/shard.py parquet --from 'tables/*.parquet' --to ...
python tools/shard.py hf --from folder/ --split train --to ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from nvmm.data import llava, tables
from nvmm.data.shards import write_shards
from nvmm.data.storage import expand


def key_and_folder(text: str) -> tuple[str, str]:
    """An argument KEY=FOLDER."""
    key, equals, folder = text.partition("=")
    if not key or not equals or not folder:
        raise argparse.ArgumentTypeError(f"{text} must be KEY=FOLDER")
    return key, folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("llava", help="LLaVA-style JSON and a folder of pictures")
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
    return parser


def samples(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The samples that a command line asks for."""
    if options.command in ("llava", "jsonl"):
        files = {"image": options.images} if options.command == "llava" else dict(options.files)
        return llava.samples(llava.read_records(options.json), files)
    if options.command == "hf":
        return tables.samples(tables.folder_rows(options.source, options.split))
    paths = expand(options.source)
    if not paths:
        raise ValueError(f"--from {options.source} matches no file")
    return tables.samples(tables.parquet_rows(paths))


def main() -> None:
    options = parser().parse_args()
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


if __name__ == "__main__":
    main()
