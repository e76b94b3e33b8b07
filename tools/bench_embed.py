"""Time and memory of a contrastive step: ours against sentence-transformers' losses.

python tools/bench_embed.py [--queries N] [--chunk N] [--length N] [--steps N]

One model with the same weights, one batch of queries and positives of random tokens, AdamW; each
case runs in a process of its own. The best step of several counts, with the CPU seconds that the
process (user) and the operating system (system: fresh pages of memory) took of it; memory is the
peak of the process above what it held before the first step. The first losses must agree.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.proof.ranks import run_ranks

TEMPERATURE = 0.05
LEARNING_RATE = 1e-4


def timed(step: Callable[[], float], steps: int) -> dict[str, float]:
    """Return the fastest step's times, the first loss, and MiB of the peak above the start."""
    before = resident()
    losses, times = [], []
    for _ in range(steps):
        used, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        losses.append(step())
        seconds, now = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        times.append((seconds, now.ru_utime - used.ru_utime, now.ru_stime - used.ru_stime))
    seconds, user, system = min(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured = {"seconds": seconds, "user": user, "system": system}
    return {**measured, "loss": losses[0], "mib": peak - before}


def resident() -> float:
    """Return the MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def batches_of(ids: Tensor, chunk: int) -> list[Any]:
    """Return ids [queries, 2, length] as micro-batches of `chunk` samples."""
    from nvmm.batch import Sample, Text
    from nvmm.data.collate import collate

    samples = [
        Sample(
            tuple(
                Text(
                    ids_of_text,
                    torch.ones(len(ids_of_text)),
                    extras={
                        "role": torch.tensor(role),
                        "pool_from": torch.tensor(0),
                        "document_id": torch.tensor(2 * number + role),
                        "text_hash": torch.tensor(2 * number + role),
                        "answers": torch.zeros(0, dtype=torch.long),
                        "in_batch": torch.tensor(True),
                        "teacher": torch.tensor(float("nan")),
                    },
                )
                for role, ids_of_text in enumerate(pair)
            ),
            number,
        )
        for number, pair in enumerate(ids)
    ]
    starts = range(0, len(samples), chunk)
    return [collate(samples[start : start + chunk], pad_id=0) for start in starts]


def ours(
    rank: int, world: int, init: str, config: dict[str, Any], ids: Tensor, chunk: int, steps: int
) -> dict[str, float]:
    """Time our trainer's step; `chunk` samples a micro-batch, all of them: no GradCache."""
    from nvmm.parallel.setup import Parallel, shutdown
    from nvmm.proof.equivalence import build_trainer
    from nvmm.proof.synthetic import SyntheticData

    torch.set_num_threads(1)
    Parallel().initialize(seed=1, rank=rank, world_size=world, init_method=init)
    step = batches_of(ids, chunk)
    trainer = build_trainer(
        config, SyntheticData([step]), Path("unused"), global_batch_size=len(ids)
    )
    found = timed(lambda: trainer.train_step(0, step).metrics["loss"], steps)
    shutdown()
    return found


def theirs(
    rank: int, world: int, init: str, config: dict[str, Any], ids: Tensor, chunk: int, steps: int
) -> dict[str, float]:
    """Time MultipleNegativesRankingLoss, or the Cached one with chunks, and torch's AdamW."""
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.models import Normalize, Pooling

    from nvmm.parallel.setup import shutdown

    torch.set_num_threads(1)
    backbone = Backbone(exported(rank, world, init, config))
    shutdown()
    hidden = config["model"]["transformer"]["hidden_size"]
    model = SentenceTransformer(modules=[backbone, Pooling(hidden, "mean"), Normalize()])
    scale = 1 / TEMPERATURE
    if chunk < len(ids):
        loss: Any = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=chunk
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)

    def step() -> float:
        optimizer.zero_grad()
        columns = [
            {"input_ids": column, "attention_mask": torch.ones_like(column)}
            for column in ids.unbind(1)
        ]
        value = loss(columns, torch.tensor([]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(value)

    return timed(step, steps)


class Backbone(torch.nn.Module):
    """The exported model as sentence-transformers' first module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Adds token_embeddings [b, s, h]."""
        outputs = self.model(features["input_ids"], features["attention_mask"])
        return features | {"token_embeddings": outputs.last_hidden_state}


class Memory:
    """Tensors in memory as a conversion's source."""

    def __init__(self, spec: dict[str, Tensor]) -> None:
        self.spec = spec

    def blocks(self, name: str) -> Any:
        yield self.spec[name]


def exported(rank: int, world: int, init: str, config: dict[str, Any]) -> Any:
    """Return the Transformers model with the weights that ours begins with."""
    from hydra.utils import instantiate

    from nvmm.convert.formats import nv_embed
    from nvmm.convert.formats.modeling_nvembed import NVEmbedConfig, NVEmbedModel
    from nvmm.convert.sources import read
    from nvmm.convert.table import ToTheirs
    from nvmm.parallel.parameters import build_chunks, sharded_parameters
    from nvmm.parallel.setup import Parallel, Precision

    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    constructor = instantiate(config["model"], _convert_="all")
    chunks = build_chunks(constructor, parallel, Precision(), seed=config["seed"])
    weights = Memory({p.name: p.parameter.detach() for p in sharded_parameters(chunks)})
    fields = nv_embed.from_model(config["model"])
    table = ToTheirs(weights, nv_embed.table(config["model"], fields))
    model = NVEmbedModel(NVEmbedConfig(**fields))
    model.load_state_dict({name: read(table, name).clone() for name in table.spec})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64, help="samples a chunk")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    config = config_of()
    shape = (options.queries, 2, options.length)
    vocabulary = config["model"]["vocab_size"]
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    whole, chunk = options.queries, options.chunk
    cases = [
        ("nvmm, whole batch", ours, whole),
        (f"nvmm, GradCache in chunks of {chunk}", ours, chunk),
        ("sentence-transformers, MultipleNegativesRanking", theirs, whole),
        (f"sentence-transformers, Cached, chunks of {chunk}", theirs, chunk),
    ]
    print(f"{whole} queries and positives of {options.length} tokens, torch {torch.__version__}")
    print("| case | s / step | user | system | peak MiB | first loss |\n|---|---|---|---|---|---|")
    found = []
    for name, function, size in cases:
        [result] = run_ranks(function, 1, config, ids, size, options.steps, timeout=3600)
        found.append(result)
        times = " | ".join(f"{result[key]:.2f}" for key in ("seconds", "user", "system"))
        print(f"| {name} | {times} | {result['mib']:.0f} | {result['loss']:.5f} |")
        sys.stdout.flush()
    seconds = [result["seconds"] for result in found]
    print(f"GradCache takes {seconds[1] / seconds[0]:.2f} x our whole batch's time,")
    print(f"and {seconds[1] / seconds[3]:.2f} x the Cached loss's")
    if max(r["loss"] for r in found) - min(r["loss"] for r in found) > 1e-3:
        sys.exit("the first losses differ: the cases do not compute the same")


def config_of() -> dict[str, Any]:
    """Return the config of the tiny NV-Embed with the objective's plain settings."""
    import hydra

    from nvmm.config.check import config_dir, resolve

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        plain = resolve(hydra.compose(overrides=["+model=nv_embed_tiny"]))[0]
    return {
        "model": plain["model"],
        "objective": {
            "_target_": "nvmm.objectives.contrastive.Contrastive",
            "temperature": TEMPERATURE,
        },
        "optim": {
            "_target_": "nvmm.training.optim.Optim",
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.1,
        },
        "backend": "native",
        "seed": 1234,
    }


if __name__ == "__main__":
    main()
