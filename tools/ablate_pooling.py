"""NV-Embed's ablation in small: four poolings, with and without the causal mask, at equal steps.

python tools/ablate_pooling.py [--steps N] [--seeds N] [--to runs/ablate_pooling]

A model is trained from random weights to find a WordNet synset's words by its gloss, against
sister terms as hard negatives; scored on held-out glosses. One process a run; what the results'
file has is not run again. WordNet 3.0 comes from Debian's package wordnet-base (`apt-get download`;
nothing is installed).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvmm.data.prepare import retrieval_sets
from nvmm.data.prepare.wordnet import Synset, fetch, read_nouns
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.proof.ranks import run_ranks

POOLINGS = ("EOS", "Mean", "LatentAttention", "SelfAttention")
INSTRUCTION = "Given a definition, find the words that it defines"
NUM_QUERIES = 500
NUM_DOCUMENTS = 3000
NUM_NEGATIVES = 2


def build(folder: Path, synsets: list[Synset]) -> None:
    """Write folder/train-*.tar, tokenizer, test.json {corpus, queries, qrels}."""
    order = list(range(len(synsets)))
    random.Random(0).shuffle(order)
    test = [synsets[i] for i in order[:NUM_QUERIES]]
    others = [synsets[i] for i in order[NUM_QUERIES:NUM_DOCUMENTS]]
    children: dict[str, list[Synset]] = defaultdict(list)
    for synset in synsets:
        for parent in synset.parents:
            children[parent].append(synset)

    def records() -> Iterator[dict[str, Any]]:
        rng = random.Random(1)
        for i in order[NUM_QUERIES:]:
            synset = synsets[i]
            sisters = [s for p in synset.parents for s in children[p] if s != synset]
            chosen = rng.sample(sisters, min(NUM_NEGATIVES, len(sisters)))
            yield {
                "query": synset.gloss,
                "positive": synset.words,
                "positive_id": synset.offset,
                "negatives": [s.words for s in chosen],
                "negative_ids": [s.offset for s in chosen],
            }

    texts = [s.gloss for s in synsets[::4]] + [s.words for s in synsets[::4]]
    train_byte_level_bpe(
        folder / "tokenizer",
        texts,
        vocab_size=4096,
        special_tokens=["<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    write_shards(folder, "train", retrieval_sets.members(records()), samples_per_shard=20_000)
    held_out = {
        "corpus": {s.offset: s.words for s in [*test, *others]},
        "queries": {s.offset: s.gloss for s in test},
        "qrels": {s.offset: {s.offset: 1} for s in test},
    }
    (folder / "test.json").write_text(json.dumps(held_out))


def config_of(pooling: str, causal: bool, seed: int, steps: int) -> dict[str, Any]:
    """Return the run's config: the tiny NV-Embed, two layers of it."""
    import hydra

    from nvmm.config.check import config_dir, resolve

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        plain = resolve(hydra.compose(overrides=["+model=nv_embed_tiny"]))[0]
    model = copy.deepcopy(plain["model"])
    model["transformer"]["num_layers"] = 2
    sizes = {
        "LatentAttention": ("num_latents", "num_heads", "head_dim", "ffn_hidden_size"),
        "SelfAttention": ("num_heads", "ffn_hidden_size"),
    }
    given = model["pooling"]
    model["pooling"] = {"_target_": f"nvmm.modules.pooling.{pooling}", "_partial_": True}
    if pooling in sizes:
        names = (*sizes[pooling], "init_method_std")
        model["pooling"] |= {name: given[name] for name in names}
    model["causal"] = causal
    return {
        "model": model,
        "objective": {
            "_target_": "nvmm.objectives.contrastive.Contrastive",
            "temperature": 0.05,
        },
        "optim": {
            "_target_": "nvmm.training.optim.Optim",
            "learning_rate": 1e-3,
            "warmup_steps": steps // 10,
            "decay_steps": steps,
            "weight_decay": 0.03,
        },
        "backend": "native",
        "seed": seed,
    }


def train(
    rank: int, world: int, init: str, folder: Path, config: dict[str, Any], steps: int, batch: int
) -> dict[str, float]:
    """Run one training; return held-out scores."""
    import functools

    from nvmm.data.loader import Data
    from nvmm.data.samples.retrieval import RetrievalBuilder
    from nvmm.data.samples.tokenizer import Tokenizer
    from nvmm.data.shards.dataset import Dataset
    from nvmm.evaluation import beir
    from nvmm.inference.embedding import TextEncoder
    from nvmm.parallel.setup import Parallel, shutdown
    from nvmm.proof.equivalence import build_trainer

    Parallel().initialize(seed=config["seed"], rank=rank, world_size=world, init_method=init)
    tokenizer = Tokenizer(str(folder / "tokenizer"), image_token="<s>", end_of_turn="</s>")
    options = {"num_negatives": NUM_NEGATIVES, "in_batch_negatives": True}
    build = functools.partial(RetrievalBuilder, **options, instruction=INSTRUCTION)
    dataset = Dataset([str(folder / "train-*.tar")], build)
    data = Data(48, 0, dataset, tokenizer=tokenizer, seed=config["seed"])
    trainer = build_trainer(
        config, data, folder, global_batch_size=batch, micro_batch_size=batch, max_steps=steps
    )
    batches = trainer.batches("train", 0)
    losses = [trainer.train_step(step, next(batches)).metrics["loss"] for step in range(steps)]
    encode = TextEncoder([chunk.eval() for chunk in trainer.chunks], data.train.build, 64)
    test = json.loads((folder / "test.json").read_text())
    scores = beir.evaluate(
        encode, test["corpus"], test["queries"], test["qrels"], instruction=INSTRUCTION
    )
    shutdown()
    return {"loss": statistics.mean(losses[-20:]), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("runs/ablate_pooling"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if not (options.to / "test.json").is_file():
        build(options.to, read_nouns(fetch(options.to)))
    file = options.to / f"results_{options.steps}x{options.batch}.json"
    found_before = json.loads(file.read_text()) if file.is_file() else {}
    results: dict[str, list[dict[str, float]]] = defaultdict(list, found_before)
    for seed in range(options.seeds):
        for pooling in POOLINGS:
            for causal in (False, True):
                name = f"{pooling}, {'causal' if causal else 'bidirectional'}"
                if len(results[name]) > seed:
                    continue
                started = time.monotonic()
                config = config_of(pooling, causal, seed, options.steps)
                arguments = (options.to, config, options.steps, options.batch)
                [found] = run_ranks(train, 1, *arguments, timeout=7200)
                results[name].append(found)
                print(
                    f"{name}, seed {seed}: nDCG@10 {found['ndcg_at_10']:.4f}, loss"
                    f" {found['loss']:.3f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
                file.write_text(json.dumps(results, indent=1))
    print(table(results))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return mean and standard deviation over seeds, as Markdown."""
    lines = ["| pooling, mask | nDCG@10 | recall@10 | loss |", "|---|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for key in ("ndcg_at_10", "recall_at_10", "loss"):
            values = [run[key] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
