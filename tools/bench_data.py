"""Samples/s of nvmm, megatron-energon and webdataset on the same shards: python tools/bench_data.py

Real images (scikit-learn's and scikit-image's, cropped and scaled) as small JPEG, large JPEG and
PNG, with questions; blended 1 : 1 : 1, tiled to 448 pixels with at most 6 tiles and the thumbnail,
rendered, and collated by 2 workers. "same builder" runs nvmm's builder and collation in the other
loader, so that the rows differ in the loader alone; "Pillow, floats" does to images what
Megatron-LM's multimodal example does: Pillow resizes, each tile becomes normalised floats.

Every row is a process of its own. Rounds take turns; the medians are printed. Memory is the
proportional set size of the process and its workers, the highest seen between batches. On a busy
machine compare CPU milliseconds, which other processes disturb less than they do samples/s.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from nvmm.batch import IMAGE, Batch
from nvmm.config.check import option
from nvmm.config.compose import instantiate
from nvmm.data.collate import collate
from nvmm.data.loader import Data
from nvmm.data.prepare.digits import train_tokenizer
from nvmm.data.samples import instruct
from nvmm.data.samples.chat import ImageTags
from nvmm.data.samples.images import Tiles, choose_grid, tile_indices
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards


def template() -> Any:
    return instantiate(option("template", "chatml"))


WORKERS = 2
BATCH_SIZE = 8
LENGTH = 2048
# name -> file format, shortest and longest side in pixels
SETS = {"photos": ("JPEG", 400, 1000), "large": ("JPEG", 1200, 2000), "png": ("PNG", 300, 800)}
PLAIN = ("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel")
PLAIN += ("ihc", "moon", "motorcycle_left", "motorcycle_right")


class Loader(NamedTuple):
    """A running loader. batches: they never end. state: returns the state from which it resumes
    after the batches read so far; None: it cannot resume."""

    batches: Iterator[Batch]
    state: Callable[[], Any] | None


def write_data(folder: Path, samples: int) -> None:
    """Write shards of every set, energon's metadata, its blend, and a tokenizer."""
    import skimage
    from sklearn.datasets import load_sample_image

    root = Path(skimage.__file__).parent / "data"
    images = [Image.open(root / f"{name}.png").convert("RGB") for name in PLAIN]
    images.append(Image.open(root / "hubble_deep_field.jpg").convert("RGB"))
    images += [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for number, name in enumerate(SETS):
        drawn = draw(np.random.default_rng(number), images, name, samples)
        write_shards(folder / name, name, drawn, samples_per_shard=samples // 4)
    train_tokenizer(folder / "tokenizer")
    prepare_energon(folder)
    (folder / "complete").write_text(str(samples))


def draw(
    rng: np.random.Generator, images: list[Image.Image], name: str, samples: int
) -> Iterator[dict[str, Any]]:
    """Yield random crops of real images, scaled to the set's sizes."""
    kind, least, most = SETS[name]
    for number in range(samples):
        image = images[rng.integers(len(images))]
        width, height = (int(side * rng.uniform(0.5, 1.0)) for side in image.size)
        left, top = (
            rng.integers(image.width - width + 1),
            rng.integers(image.height - height + 1),
        )
        scale = rng.uniform(least, most) / max(width, height)
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        crop = image.resize(size, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        record = {
            "question": f"Which image is number {number}?",
            "answer": f"{number} of {name}.",
        }
        extension = "jpg" if kind == "JPEG" else "png"
        yield {
            "__key__": f"{number:06d}",
            extension: buffer.getvalue(),
            "json": json.dumps(record).encode(),
        }


def prepare_energon(folder: Path) -> None:
    """Write the files of `energon prepare`, and a blend of equal weights."""
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    entries = []
    for name in SETS:
        shards = sorted(path.name for path in (folder / name).glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(
            folder / name, shards, split_parts_ratio=[("train", 1.0)], workers=1
        )
        (folder / name / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
        entries.append(f"      - {{weight: 1, path: ./{name}}}\n")
    (folder / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        + "".join(entries)
    )


def builder(folder: Path) -> InstructBuilder:
    """Return the builder of every row."""
    return InstructBuilder(
        template(),
        ImageTags(),
        256,
        tokenizer=Tokenizer(str(folder / "tokenizer")),
        sequence_length=LENGTH,
    )


def pillow_tiles(image: Image.Image, *, min_tiles: int, max_tiles: int, **_: Any) -> Tiles:
    """Do as `tile_image` does, by Pillow and in floats, tile by tile."""
    image = image.convert("RGB")
    cols, rows = grid = choose_grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles)
    whole = image.resize((cols * 448, rows * 448), Image.Resampling.BICUBIC)
    cut = [
        whole.crop((448 * col, 448 * row, 448 * col + 448, 448 * row + 448))
        for row in range(rows)
        for col in range(cols)
    ]
    if len(cut) > 1:
        cut.append(image.resize((448, 448), Image.Resampling.BICUBIC))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    values = [torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255 for tile in cut]
    values = [(value - mean) / std for value in values]
    return Tiles(torch.stack(values), torch.tensor(tile_indices(grid)), grid)


def with_pillow() -> None:
    """Let this process and its forks tile by Pillow."""
    instruct.tile_image = pillow_tiles  # type: ignore[assignment]


def open_nvmm(folder: Path, state: Any) -> Loader:
    blend = [{"name": name, "weight": 1, "shards": f"{folder}/{name}/*.tar"} for name in SETS]
    data = Data(
        LENGTH,
        WORKERS,
        Dataset(None, partial(InstructBuilder, template(), ImageTags(), 256)),
        blend=blend,
        tokenizer=Tokenizer(str(folder / "tokenizer")),
        seed=1,
    )
    step = 0 if state is None else state["step"]
    steps = data.batches(
        split="train",
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        start=step,
        position=state,
    )
    read = itertools.count(step + 1)
    now = step

    def batches() -> Iterator[Batch]:
        nonlocal now
        for [batch] in steps:
            now = next(read)
            yield batch

    return Loader(batches(), lambda: data.position(now))


def open_energon(folder: Path, state: Any) -> Loader:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class Members(Sample):
        members: Any

    build = builder(folder)

    @stateless
    def cook(crude: Any) -> Any:
        members = {key: value for key, value in crude.items() if isinstance(value, bytes | str)}
        return Members(**basic_sample_keys(crude), members=members)

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)
        decoder = None

        @stateless
        def encode_sample(self, sample: Any) -> Any:
            return build(sample.members)

        @stateless
        def batch(self, samples: Any) -> Any:
            return {"batch": collate(samples, pad_id=0)}

        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = get_train_dataset(
        folder / "blend.yaml",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        batch_size=BATCH_SIZE,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    loader = get_savable_loader(dataset)
    if state is not None:
        loader.restore_state_rank(state)
    return Loader((item["batch"] for item in loader), loader.save_state_rank)


def open_webdataset(folder: Path, state: Any) -> Loader:
    import webdataset

    build = builder(folder)
    datasets = [
        webdataset.WebDataset(
            sorted(map(str, (folder / name).glob("*.tar"))), shardshuffle=4, resampled=True
        ).shuffle(100)
        for name in SETS
    ]
    mixed = webdataset.RandomMix(datasets, [1, 1, 1])
    pipeline = webdataset.DataPipeline(
        mixed,
        webdataset.map(build),
        webdataset.batched(BATCH_SIZE, collation_fn=lambda samples: collate(samples, pad_id=0)),
    )
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS)
    return Loader(iter(loader), None)


OPEN = {"nvmm": open_nvmm, "energon": open_energon, "webdataset": open_webdataset}
ROWS = (
    ("nvmm", ""),
    ("energon", "same builder"),
    ("energon", "Pillow, floats"),
    ("webdataset", "same builder"),
    ("webdataset", "Pillow, floats"),
)


def used() -> tuple[float, float]:
    """Return MiB, and seconds of CPU so far, of this process and all below it."""
    process = psutil.Process()
    size, seconds = 0, 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            size += one.memory_full_info().pss
            seconds += sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return size / 2**20, seconds


def measure(name: str, how: str, folder: Path, batches: int) -> dict[str, float | None]:
    """Measure one row, in this process."""
    if how.startswith("Pillow"):
        with_pillow()
    open_loader = OPEN[name]
    if name == "energon":
        import megatron.energon  # noqa: F401  # imports are nobody's time to the first batch
    elif name == "webdataset":
        import webdataset  # noqa: F401
    begin = time.perf_counter()
    loader = open_loader(folder, None)
    next(loader.batches)
    first = time.perf_counter() - begin
    for _ in range(4):
        next(loader.batches)
    highest, before = used()
    begin, tiles, waited = time.perf_counter(), 0, 0.0
    for number in range(batches):
        batch = next(loader.batches)
        tiles += len(batch.media[IMAGE].values)
        if number % 10 == 9:  # Reading the maps takes a while, which is not counted.
            pause = time.perf_counter()
            highest = max(highest, used()[0])
            waited += time.perf_counter() - pause
    seconds = time.perf_counter() - begin - waited
    cpu = used()[1] - before
    found: dict[str, float | None] = {
        "samples/s": batches * BATCH_SIZE / seconds,
        "tiles/s": tiles / seconds,
        "CPU ms/sample": 1e3 * cpu / (batches * BATCH_SIZE),
        "first batch s": first,
        "MiB": highest,
        "save s": None,
        "state bytes": None,
        "restore s": None,
    }
    if loader.state is None:
        return found
    begin = time.perf_counter()
    state = loader.state()
    found["save s"] = time.perf_counter() - begin
    found["state bytes"] = float(len(pickle.dumps(state)))
    expected = [next(loader.batches).labels for _ in range(3)]
    begin = time.perf_counter()
    restored = open_loader(folder, state)
    again = [next(restored.batches).labels]
    found["restore s"] = time.perf_counter() - begin
    again += [next(restored.batches).labels for _ in range(2)]
    if not all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)):
        raise RuntimeError(f"{name} goes on with other samples after a restore")
    return found


def run_row(name: str, how: str, options: argparse.Namespace) -> dict[str, float | None]:
    """Measure one row in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", f"{name}:{how}"]
    command += ["--data", str(options.data), "--batches", str(options.batches)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{name}, {how} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/bench_data"))
    parser.add_argument("--samples", type=int, default=400, help="of each of the three sets")
    parser.add_argument("--batches", type=int, default=60, help=f"of {BATCH_SIZE} samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.row:
        name, _, how = options.row.partition(":")
        print(json.dumps(measure(name, how, options.data, options.batches)), flush=True)
        os._exit(0)  # Exiting in order would wait for energon's watchdog threads and workers.
    complete = options.data / "complete"
    if not complete.is_file() or complete.read_text() != str(options.samples):
        write_data(options.data, options.samples)
    found: dict[tuple[str, str], list[dict[str, float | None]]] = {row: [] for row in ROWS}
    for _ in range(options.rounds):
        for row in ROWS:
            found[row].append(run_row(*row, options))
    print(f"load average {os.getloadavg()[0]:.1f}; {WORKERS} workers, batches of {BATCH_SIZE}")
    columns = list(found[ROWS[0]][0])
    print(" | ".join(["", *columns]))
    for (name, how), results in found.items():
        cells = []
        for column in columns:
            values = [value for result in results if (value := result[column]) is not None]
            cells.append(f"{statistics.median(values):.3g}" if values else "none")
        print(" | ".join([f"{name}, {how}".strip(", "), *cells]))


if __name__ == "__main__":
    main()
