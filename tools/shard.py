"""Turn a user's data into webdataset shards, and index shards.

python tools/shard.py llava --json train.json --images images/ --to shards/ --name train
python tools/shard.py index 'shards/train-*.tar'
python tools/shard.py index --config experiment=NAME tokenizer.path=DIR data.train.shards=...
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from nvmm.data import llava
from nvmm.data.shards import write_shards


def index_shards(options: argparse.Namespace) -> None:
    """Build the index of some patterns, as a dataset of them would on first use."""
    from nvmm.data.shards import Dataset

    dataset = Dataset(options.shards, build=dict, index_dir=options.index_dir)
    dataset.skip_damage = True
    print(f"{len(dataset)} samples in {len(dataset.shards)} shards: {dataset.index.path}")
    for line in dataset.index.damage:
        print(f"damaged: {line}")


def index_config(overrides: list[str]) -> None:
    """Index the training data of a run and count the tokens of every sample."""
    from nvmm import entry

    sys.argv[1:] = overrides
    job = entry.load("train", stand_ins=True)
    if job is None:
        return
    from hydra.utils import instantiate

    tokenizer = instantiate(job.config["tokenizer"], _convert_="all")
    data = instantiate(job.config["data"], _convert_="all")(tokenizer=tokenizer)
    data.count_lengths()
    for part in data.parts:
        tokens = part.dataset.lengths[:, 0]
        bad = int((tokens < 0).sum())
        total = int(tokens[tokens > 0].sum(dtype="int64"))
        print(
            f"{part.name}: {len(tokens)} samples, {bad} bad, {total} tokens, weight"
            f" {float(part.weight):.4g}: {part.dataset.index.path}"
        )


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
    command = commands.add_parser("index", help="index shards; with a config count tokens too")
    command.add_argument("shards", nargs="*", help="file patterns")
    command.add_argument("--index-dir", help="folder for it, where the shards' own cannot hold it")
    command.add_argument(
        "--config", nargs="+", default=[], help="overrides of nvmm.train: count all its tokens"
    )
    options = parser.parse_args()
    if options.command == "index":
        if bool(options.shards) == bool(options.config):
            parser.error("index: give patterns, or --config and the overrides of a training run")
        index_config(options.config) if options.config else index_shards(options)
        return

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
