"""Show some samples as training would see them.

    nvmm inspect experiment=nvlm_d/quickstart sample=3
    nvmm inspect experiment=nvlm_d/quickstart sample=3,14 data.pack=true

Takes the overrides of `nvmm train`, and `sample=K[,K...]`: ids of training samples (as
data.log_samples lists them; of a single dataset their numbers), which become one micro-batch.
Prints the decoded tokens with the loss mask, the label of each supervised position, tiles with
their tags, pack borders and positions.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--all", action="store_true", help="list every position")
    parser.add_argument("--no-color", action="store_true", help="[[brackets]] instead of colours")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="also write a page with images and sounds"
    )
    options, overrides = parser.parse_known_args()
    chosen = [text.removeprefix("sample=") for text in overrides if text.startswith("sample=")]
    overrides = [text for text in overrides if not text.startswith("sample=")]
    if len(chosen) != 1 or not all(n.isdecimal() for n in chosen[0].split(",")) or not overrides:
        parser.error("give overrides and one sample=K[,K...], e.g. experiment=NAME sample=0")
    sys.argv[1:] = overrides
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from nvmm.config import compose

    job = compose.load("train", placeholders=True)
    if job is None:
        return 0
    needed = [key for key in job.placeholders if key.startswith(("data.", "tokenizer."))]
    if needed:
        compose.refuse(
            "train", [f"{key} is not set, and reading a sample needs it" for key in needed]
        )
    try:
        numbers = [int(n) for n in chosen[0].split(",")]
        return show(job.config, numbers, options)
    except (ValueError, IndexError, OSError) as error:
        compose.refuse("train", [error])


def show(config: dict[str, Any], numbers: list[int], options: argparse.Namespace) -> int:
    """Build the micro-batch of these samples and print it."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from nvmm.data.collate import collate
    from nvmm.report.batch import segments, to_html, to_text

    try:
        tokenizer = instantiate(config["tokenizer"], _convert_="all")
        data = instantiate(config["data"], _convert_="all")(tokenizer=tokenizer)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error
    if options.split == "validation" and data.validation is None:
        raise ValueError("data.validation is null")
    read = data.sample if options.split == "train" else data.validation.__getitem__
    samples = [read(number) for number in numbers]
    located = [
        data.located(number) if options.split == "train" else (data.validation, number)
        for number in numbers
    ]
    parallel = instantiate(config["parallel"], _convert_="all")
    batch = collate(
        samples,
        pad_id=tokenizer.pad_id,
        pad_multiple=parallel.sequence_multiple,
        segment_multiple=parallel.segment_multiple,
        packed=data.pack,
    )
    tags = config["data"][options.split]["build"].get("tags") or {}
    found = segments(
        batch,
        tokenizer,
        [sample.source for sample in samples],
        image_start=tags.get("image_start", "<Image>"),
    )
    print(to_text(batch, found, color=not options.no_color, every=options.all))
    if options.html is not None:
        title = f"{config['run']['name']}, samples {', '.join(map(str, numbers))}"
        page = to_html(batch, found, title, sounds_of(samples, located))
        options.html.write_text(page, encoding="utf-8")
        print(f"\n{options.html}")
    return 0


def sounds_of(samples: list[Any], located: list[tuple[Any, int]]) -> Any:
    """Return what is heard of these samples, of data sets and numbers; None without sounds."""
    from nvmm.data.samples.drawn_sounds import wav
    from nvmm.report.batch import Sounds

    players: dict[int, list[bytes]] = {}
    front = None
    for sample, (dataset, number) in zip(samples, located, strict=True):
        builder = dataset.build
        heard = builder.heard(dataset.members(number))
        if not heard:
            continue
        front = builder.front_end
        sounds = [wav(samples, front.rate) for samples in heard]
        # A sample that was too long has lost some, and says how many it has.
        kept = 1 + max((int(m.items.max()) for m in sample.text.media.values()), default=-1)
        first = getattr(builder, "too_long", "first") == "first"
        players[sample.sample_id] = sounds[len(sounds) - kept :] if first else sounds[:kept]
    return None if front is None else Sounds(front.hop_samples / front.frame_hop, players)
