"""Turn a user's data into webdataset shards.

python tools/shard.py llava --json train.json --images images/ --to shards/ --name train
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from nvmm.data import llava
from nvmm.data.shards import write_shards


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("llava", help="LLaVA-style JSON and a folder of pictures")
    command.add_argument("--json", required=True, help="JSON list, or .jsonl")
    command.add_argument("--images", required=True, help="folder that image names are relative to")
    command.add_argument("--to", required=True, help="folder to write")
    command.add_argument("--name", default="train", help="shards are NAME-00000.tar, ...")
    command.add_argument("--samples-per-shard", type=int, default=1000)
    options = parser.parse_args()

    records = llava.read_records(options.json)
    stream = tqdm(
        llava.samples(records, options.images),
        total=len(records),
        unit=" samples",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    paths = write_shards(
        options.to, options.name, stream, samples_per_shard=options.samples_per_shard
    )
    print(f"{len(records)} samples in {len(paths)} shards: {options.to}/{options.name}-*.tar")


if __name__ == "__main__":
    main()
