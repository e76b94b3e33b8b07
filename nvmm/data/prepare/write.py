"""What the tools do with the samples that they have made: write them, count them, say so."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nvmm.data.prepare.records import LeftOut
from nvmm.data.prepare.resume import Resumed, from_start, part_folder, write_steps
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


def write(options: argparse.Namespace, make: Callable[[LeftOut], Samples]) -> None:
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
        _print_first(left_out)


def write_resumed(
    options: argparse.Namespace,
    make: Callable[[LeftOut], Samples] | None = None,
    resumed: Callable[[LeftOut], Callable[[Any], Resumed]] | None = None,
) -> None:
    """Write samples to shards in steps: the same call goes on where one that was killed stopped.

    options: those of `add_options`; all of them, and the sizes of the files that they name, must be
        the same in a call that goes on, but for --on-bad: no shard before has a bad record.
    make: returns the samples, as in `write`, which are made again up to where it stopped.
    resumed: returns a function from a state to the samples behind it (`nvmm.data.prepare.resume`),
        for those that are dear.

    Raises ValueError where nothing is written, or an unfinished call had other options.
    """
    left_out: list[str] = []
    if not part_folder(options.to, options.name).is_dir():
        _refuse_existing(options)
    settings = {
        key: value
        for key, value in sorted(vars(options).items())
        if key not in ("to", "name", "replace", "on_bad", "run")
    }
    progress = tqdm(unit=" samples", mininterval=0.1 if sys.stderr.isatty() else 10)

    def stream(state: Any) -> Resumed:
        told: LeftOut = left_out.append
        if resumed is not None:
            samples = resumed(told)(state)
        else:
            assert make is not None
            samples = from_start(partial(make, told))(state)
        for sample in samples:
            progress.update()
            yield sample

    with contextlib.closing(progress):
        paths = write_steps(
            options.to,
            options.name,
            stream,
            {**settings, "sizes of files": _sizes(settings.values())},
            samples_per_shard=options.samples_per_shard,
        )
    if not paths:
        why = f"; the first of {len(left_out)} left out: {left_out[0]}" if left_out else ""
        raise ValueError(f"there is no record to write{why}")
    print(f"{len(paths)} shards: {options.to}/{options.name}-*.tar")
    if left_out:
        print("left out:" if make is None else f"{len(left_out)} left out:")
        _print_first(left_out)


def _sizes(values: Iterable[Any]) -> dict[str, int]:
    """Return the sizes of the files among some values."""
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    paths = [Path(text) for text in texts if isinstance(text, str) and text]
    return {str(path): path.stat().st_size for path in paths if path.is_file()}


def _print_first(lines: list[str]) -> None:
    for line in lines[:_EXAMPLES]:
        print(f"  {line}")
    if len(lines) > _EXAMPLES:
        print(f"  and {len(lines) - _EXAMPLES} more")


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
