"""What the tools do with the samples that they have made: write them, count them, say so."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from nvmm.data.samples.decode import IMAGES
from nvmm.data.shards.dataset import existing_shards, write_shards

Samples = Iterable[Mapping[str, bytes | str]]
_EXAMPLES = 5


def add_options(command: argparse.ArgumentParser, samples_per_shard: int) -> None:
    """Add the options that `write` reads to the parser of a command."""
    command.add_argument("--to", required=True, help="folder to write")
    command.add_argument("--name", default="train", help="shards are NAME-00000.tar, ...")
    command.add_argument("--samples-per-shard", type=int, default=samples_per_shard)
    command.add_argument(
        "--replace", action="store_true", help="replace all shards NAME-*.tar that are there"
    )


def write(options: argparse.Namespace, make: Callable[[Callable[[str], None]], Samples]) -> None:
    """Write samples to shards, and print what they hold; ValueError where nothing is written.

    options: those of `add_options`. make: returns the samples; it gets a function for records that
    are left out, which is told why.
    """
    counts = {"samples": 0, "with pictures": 0, "pictures": 0}
    left_out: list[str] = []
    progress = tqdm(unit=" samples", mininterval=0.1 if sys.stderr.isatty() else 10)

    def counted() -> Iterator[Mapping[str, bytes | str]]:
        for sample in make(left_out.append):
            if not counts["samples"]:
                _refuse_existing(options)
            pictures = sum(member.rpartition(".")[2] in IMAGES for member in sample)
            counts["samples"] += 1
            counts["with pictures"] += pictures > 0
            counts["pictures"] += pictures
            yield sample
            progress.update()
        if not counts["samples"]:
            why = (
                f": all {len(left_out)} are left out; the first: {left_out[0]}" if left_out else ""
            )
            raise ValueError(f"there is no record to write{why}")

    with contextlib.closing(progress):
        paths = write_shards(
            options.to, options.name, counted(), samples_per_shard=options.samples_per_shard
        )
    total, seeing = counts["samples"], counts["with pictures"]
    print(f"{total} samples in {len(paths)} shards: {options.to}/{options.name}-*.tar")
    print(f"{seeing} with pictures ({counts['pictures']} pictures), {total - seeing} without")
    if left_out:
        print(f"{len(left_out)} of {total + len(left_out)} records left out:")
        for line in left_out[:_EXAMPLES]:
            print(f"  {line}")
        if len(left_out) > _EXAMPLES:
            print(f"  and {len(left_out) - _EXAMPLES} more")


def _refuse_existing(options: argparse.Namespace) -> None:
    """Raise ValueError for shards that are there, which may be all that is left of earlier data,
    and for those of another name that a pattern NAME-*.tar would match too.
    """
    name, old = options.name, existing_shards(options.to, options.name)
    if old and not options.replace:
        raise ValueError(
            f"{options.to} has {len(old)} shards {old[0].name} ... {old[-1].name}; replace them"
            " all by --replace, or give another --name or --to"
        )
    for path in sorted(set(Path(options.to).glob("*-*.tar")) - set(old)):
        other = path.stem.rpartition("-")[0]
        if path.name.startswith(f"{name}-") or name.startswith(f"{other}-"):
            raise ValueError(
                f"--name {name}: {options.to} has {path.name}, and a pattern NAME-*.tar would match"
                " both; give another --name or --to"
            )
