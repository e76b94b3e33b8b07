"""Steps of NVLM-X, H and D where tiles dominate, on a CPU: python tools/bench_nvlm.py

The paper's lengths over four: 256 tokens of text, 6 tiles and a thumbnail of 64 tokens each, and a
decoder of 12 layers, with 2 cross-attention blocks in X and H. A round is one whole training step
of each model (frozen encoder, as in SFT), on the same samples; the medians of the rounds are
printed. CPU time counts, so that other work on the machine weighs little.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from PIL import Image

from nvmm import studies
from nvmm.config.check import check, to_plain
from nvmm.config.compose import composed

SYSTEMS = ("x", "h", "d")
TEXT_TOKENS, TILE_TOKENS, TILE_SIZE, GRID = 256, 64, 128, (3, 2)
OVERHEAD = 22
"""The number of tokens of NVLM-D's template, tags and answer beside the question's digits."""
SHAPE = (
    "parallel=single",
    "init_from=null",
    "optim.freeze=[vision.*]",
    "data.sequence_length=1024",
    f"data.train.build.tile_size={TILE_SIZE}",
    f"data.train.build.tokens_per_tile={TILE_TOKENS}",
    f"model.vision.image_size={TILE_SIZE}",
    "model.vision.transformer.num_layers=6",
    "model.language.transformer.num_layers=12",
    "model.language.transformer.hidden_size=256",
    "model.language.transformer.num_attention_heads=8",
    "model.language.transformer.ffn_hidden_size=768",
    "model.language.max_sequence_length=1024",
)
# The paper has 10 blocks over 60 layers.
BLOCKS = {"d": (), "x": ("model.cross_attention.interval=6",)}
BLOCKS["h"] = BLOCKS["x"]
PAPER = {"x": (1024, 5063), "h": (1280, 7071), "d": (2816, 8885)}
"""NVLM Table 3: decoder length and ms an iteration; 34B, SFT, 128 H100, batch 256."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path("runs/compare_nvlm/speed.json"))
    parser.add_argument("--tokenizer", default="data/quickstart/tokenizer")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = bench(SYSTEMS, options.rounds, options.batch, options.tokenizer)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    studies.save(options.to, found, rounds=options.rounds, batch=options.batch)
    print(report(found))


def bench(
    systems: tuple[str, ...], rounds: int, batch: int, tokenizer: str
) -> dict[str, dict[str, float]]:
    """Return CPU and wall seconds of a step of each system; the first round warms up."""
    from nvmm.parallel.setup import Parallel, shutdown
    from nvmm.proof.equivalence import build_trainer
    from nvmm.proof.synthetic import SyntheticData

    Parallel().initialize(seed=1)
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for system in systems:
            config = configure(system, tokenizer)
            trainer = build_trainer(
                config, SyntheticData([]), Path(folder), global_batch_size=batch
            )
            made[system] = (trainer, micro_batch(config, batch))
        seconds: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
        for step in range(rounds + 1):
            for system, (trainer, rows) in made.items():
                begin = time.process_time(), time.perf_counter()
                trainer.train_step(step, [rows])
                seconds[system].append(
                    (time.process_time() - begin[0], time.perf_counter() - begin[1])
                )
    shutdown()
    found = {}
    for system, (trainer, rows) in made.items():
        cpu, wall = (statistics.median(column) for column in zip(*seconds[system][1:], strict=True))
        found[system] = {
            "decoder_length": rows.tokens.shape[1],
            "cpu_seconds_per_step": cpu,
            "seconds_per_step": wall,
            "samples_per_cpu_second": batch / cpu,
            "num_parameters": sum(p.numel() for p in trainer.chunks[0].parameters()),
        }
    return found


def configure(system: str, tokenizer: str) -> dict[str, Any]:
    """Return the quickstart's config of a system at the shape above."""
    overrides = [f"experiment=nvlm_{system}/quickstart", *SHAPE, *BLOCKS[system]]
    overrides.append(f"tokenizer.path={tokenizer}")
    config = composed("train", overrides)
    if problems := check(config):
        raise ValueError("; ".join(map(str, problems)))
    # build_trainer takes the arguments alone
    return to_plain(config) | {"parallel": {}, "precision": {"dtype": "fp32"}}


def micro_batch(config: dict[str, Any], size: int) -> Any:
    """Return rows of noise in GRID tiles and digits, TEXT_TOKENS long for NVLM-D."""
    from nvmm.data.collate import collate

    tokenizer = instantiate(config["tokenizer"])
    builder = instantiate(config["data"]["train"]["build"], _convert_="all")(
        tokenizer=tokenizer, sequence_length=config["data"]["sequence_length"]
    )
    samples = []
    for number in range(size):
        sample = builder(members(number, TEXT_TOKENS - OVERHEAD))
        samples.append(dataclasses.replace(sample, sample_id=number))
    return collate(samples, pad_id=tokenizer.pad_id)


def members(number: int, digits: int) -> dict[str, Any]:
    """Return an image of noise that is cut to GRID, and a question of so many digits."""
    rng = np.random.default_rng(number)
    cols, rows = GRID
    pixels = rng.integers(0, 256, (rows * TILE_SIZE, cols * TILE_SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    record = {"question": "".join(map(str, rng.integers(0, 10, digits))), "answer": "42"}
    data = json.dumps(record).encode()
    return {"__key__": str(number), "__url__": "noise", "json": data, "png": buffer.getvalue()}


def report(found: dict[str, dict[str, float]]) -> str:
    """Return our step times beside the paper's, each over NVLM-D's."""
    ours = found["d"]["cpu_seconds_per_step"]
    rows = []
    for system, numbers in found.items():
        length, milliseconds = PAPER[system]
        rows.append(
            [
                system.upper(),
                f"{numbers['decoder_length']:.0f}",
                f"{1000 * numbers['cpu_seconds_per_step']:.0f}",
                f"{numbers['samples_per_cpu_second']:.2f}",
                f"{ours / numbers['cpu_seconds_per_step']:.2f}x",
                str(length),
                str(milliseconds),
                f"{PAPER['d'][1] / milliseconds:.2f}x",
            ]
        )
    head = ("NVLM", "length", "CPU-ms a step", "samples/CPU-s", "speed over D")
    return studies.table((*head, "paper's length", "paper's ms", "paper's speed over D"), rows)


if __name__ == "__main__":
    main()
