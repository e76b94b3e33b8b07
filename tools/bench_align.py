"""Time and memory of steps on preference pairs: ours against TRL's trainers.

python tools/bench_align.py [--pairs N] [--steps N] [--rounds N]

DPO, with the reference's pass in the step and with its log-probabilities made before, and
Bradley-Terry training of a reward model. Both sides have the same weights (a folder that ours are
exported to), the same pairs of random tokens in one padded batch, float32, AdamW, clipping, one
thread, and no recomputed activations (TRL's default is to recompute). Each case runs in a process
of its own, and the sides take turns: the best step of all rounds counts, with the CPU seconds that
the process took of it. Memory is the peak of the process above what it held before it had a model:
weights, gradients, moments, the reference and activations. The losses of all steps must agree.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nvmm.proof.ranks import run_ranks

BETA, LEARNING_RATE, BETAS = 0.1, 1e-5, (0.9, 0.95)
VOCABULARY = 16_000
CASES = {
    "DPO, reference in the step": "dpo",
    "DPO, reference precomputed": "dpo_data",
    "reward, Bradley-Terry": "reward",
}
Pairs = list[tuple[list[int], list[int], list[int]]]
"""Tokens of prompts, chosen and rejected answers."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8, help="of the batch")
    parser.add_argument("--steps", type=int, default=3, help="of a case in a round")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    pairs = pairs_of(options.pairs)
    tokens = sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in pairs)
    longest = max(len(prompt) + max(len(a), len(b)) for prompt, a, b in pairs)
    print(f"{len(pairs)} pairs, {tokens} tokens, rows of {longest}; torch {torch.__version__}\n")
    print(
        "| step | side | s | CPU s | peak MiB | loss of the last step |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        ratios = [compare(name, Path(scratch), pairs, options) for name in CASES]
    print()
    for name, (seconds, memory) in zip(CASES, ratios, strict=True):
        print(f"{name}: nvmm takes {seconds:.2f} x TRL's CPU time and {memory:.2f} x its memory")


def compare(
    name: str, scratch: Path, pairs: Pairs, options: argparse.Namespace
) -> tuple[float, float]:
    """Print both sides of a case; return ours over TRL's, CPU seconds and memory."""
    case = CASES[name]
    config = config_of(case)
    folder = scratch / case
    run_ranks(export, 1, config, folder)
    sides: dict[str, Any] = {"nvmm": ours, "TRL": theirs}
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, run in sides.items():
            arguments = (config, folder, case, pairs, options.steps)
            found[side] += run_ranks(run, 1, *arguments, timeout=3600)
    best = {}
    for side, results in found.items():
        seconds, cpu = (min(result[key] for result in results) for key in ("seconds", "cpu"))
        peak, loss = min(result["mib"] for result in results), results[0]["losses"][-1]
        best[side] = cpu, peak
        print(
            f"| {name} | {side} | {seconds:.2f} | {cpu:.2f} | {peak:.0f} | {loss:.4f} |", flush=True
        )
    both = [torch.tensor(results[0]["losses"]) for results in found.values()]
    if not torch.allclose(*both, rtol=1e-3, atol=1e-4):
        sys.exit(f"the losses differ, {both}: the sides do not compute the same")
    return best["nvmm"][0] / best["TRL"][0], best["nvmm"][1] / best["TRL"][1]


def pairs_of(count: int) -> Pairs:
    """Return pairs of random tokens: prompts of 16 to 48, answers of 16 to 64."""
    draw = random.Random(0)

    def text(least: int, most: int) -> list[int]:
        return [draw.randrange(10, VOCABULARY) for _ in range(draw.randint(least, most))]

    return [(text(16, 48), text(16, 64), text(16, 64)) for _ in range(count)]


def timed(step: Callable[[], float], steps: int, before: float) -> dict[str, Any]:
    """Return the fastest step's times, all losses, and MiB of the peak above `before`."""
    losses, times = [], []
    for _ in range(steps):
        used, begin = time.process_time(), time.perf_counter()
        losses.append(step())
        times.append((time.perf_counter() - begin, time.process_time() - used))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, cpu = (min(values) for values in zip(*times, strict=True))
    return {"seconds": seconds, "cpu": cpu, "losses": losses, "mib": peak - before}


def resident() -> float:
    """Return the MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


# -- ours -------------------------------------------------------------------------------------


def ours(
    rank: int,
    world: int,
    init: str,
    config: dict[str, Any],
    folder: Path,
    case: str,
    pairs: Pairs,
    steps: int,
) -> dict[str, Any]:
    """Time our trainer's step."""
    import nvmm.training.trainer  # noqa: F401  Imports are no memory of the model's.
    from nvmm.data.collate import collate
    from nvmm.objectives.preference import log_probabilities
    from nvmm.parallel.setup import Parallel, shutdown
    from nvmm.proof.equivalence import build_trainer
    from nvmm.proof.synthetic import SyntheticData

    torch.set_num_threads(1)
    Parallel().initialize(seed=1, rank=rank, world_size=world, init_method=init)
    before = resident()
    batch = collate([sample_of(number, *pair) for number, pair in enumerate(pairs)], pad_id=0)
    options = {"global_batch_size": len(pairs), "micro_batch_size": len(pairs)}
    trainer = build_trainer(config, SyntheticData([[batch]]), folder / "unused", **options)
    if case == "dpo_data":
        with torch.no_grad():
            output = trainer.chunks[0].eval()(batch, output="loss")
        trainer.chunks[0].train()
        reference = log_probabilities(output, batch)[0]
        batch = batch.replace(extras=batch.extras | {"reference": reference})
    found = timed(lambda: trainer.train_step(0, [batch]).metrics["loss"], steps, before)
    shutdown()
    return found


def sample_of(number: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Any:
    """Return a pair as our builder makes it."""
    from nvmm.batch import Sample, Text

    texts = [
        Text(
            torch.tensor(prompt + answer),
            torch.tensor([0.0] * len(prompt) + [1.0] * len(answer)),
            extras={"chosen": torch.tensor(1 - place), "reward": torch.tensor(float("nan"))},
        )
        for place, answer in enumerate((chosen, rejected))
    ]
    return Sample(tuple(texts), number)


def export(rank: int, world: int, init: str, config: dict[str, Any], folder: Path) -> None:
    """Write the weights that ours begins with as Transformers' folder."""
    import transformers
    from bench_embed import Memory
    from hydra.utils import instantiate

    from nvmm.convert.formats.all import FORMATS
    from nvmm.convert.sources import read
    from nvmm.convert.table import ToTheirs
    from nvmm.parallel.parameters import build_chunks, sharded_parameters
    from nvmm.parallel.setup import Parallel, Precision, shutdown

    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    constructor = instantiate(config["model"], _convert_="all")
    chunks = build_chunks(constructor, parallel, Precision(), seed=config["seed"])
    weights = Memory({p.name: p.parameter.detach() for p in sharded_parameters(chunks)})
    format = FORMATS["qwen2_reward" if "num_outputs" in config["model"] else "qwen2"]
    fields = format.from_model(config["model"]) | {"pad_token_id": 0}
    table = ToTheirs(weights, format.table(config["model"], fields))
    model = getattr(transformers, fields["architectures"][0])(transformers.Qwen2Config(**fields))
    model.load_state_dict({name: read(table, name).clone() for name in table.spec})
    model.save_pretrained(folder)
    shutdown()


def config_of(case: str) -> dict[str, Any]:
    """Return the config of a Qwen2 of 13 M parameters and 6 M in each of its embeddings."""
    import hydra

    from nvmm.config.check import config_dir, resolve

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        chosen = "reward_tiny" if case == "reward" else "language_tiny"
        model = resolve(hydra.compose(overrides=[f"+model={chosen}"]))[0]["model"]
    model["transformer"] |= {
        "num_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "kv_channels": 64,
        "ffn_hidden_size": 1536,
    }
    model |= {"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY}
    objectives: dict[str, dict[str, Any]] = {
        "dpo": {"_target_": "nvmm.objectives.preference.Dpo", "beta": BETA},
        "reward": {"_target_": "nvmm.objectives.reward.BradleyTerry"},
    }
    objectives["dpo_data"] = objectives["dpo"] | {"reference": "data"}
    if case == "reward":
        model["num_outputs"] = 1
    optim = {"learning_rate": LEARNING_RATE, "betas": list(BETAS), "schedule": "constant"}
    return {
        "model": model,
        "objective": objectives[case],
        "optim": {"_target_": "nvmm.training.optim.Optim", "weight_decay": 0.0, **optim},
        "backend": "native",
        "seed": 1234,
    }


# -- TRL --------------------------------------------------------------------------------------


def theirs(
    rank: int,
    world: int,
    init: str,
    config: dict[str, Any],
    folder: Path,
    case: str,
    pairs: Pairs,
    steps: int,
) -> dict[str, Any]:
    """Time the loss of TRL's trainer, its gradients, clipping and torch's AdamW."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    import trl  # noqa: F401
    from trl.trainer import dpo_trainer, reward_trainer  # noqa: F401

    torch.set_num_threads(1)
    before = resident()
    trainer, inputs = (their_reward if case == "reward" else their_dpo)(folder, pairs, case)
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return timed(step, steps, before)


def their_dpo(folder: Path, pairs: Pairs, case: str) -> tuple[Any, Any]:
    """Return a DPOTrainer and the batch that it reads."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c"] * 2}
    given = case == "dpo_data"
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ref_model=None
        if given
        else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(beta=BETA, precompute_ref_log_probs=given, **settings(folder)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=words(folder),
    )
    examples = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in pairs
    ]
    inputs = trainer.data_collator(examples)
    if given:
        names = ("ref_chosen_logps", "ref_rejected_logps")
        inputs |= dict(
            zip(names, trainer.compute_ref_log_probs(trainer.model, inputs), strict=True)
        )
    return trainer, inputs


def their_reward(folder: Path, pairs: Pairs, case: str) -> tuple[Any, Any]:
    """Return a RewardTrainer and the batch that it reads."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in pairs
    ]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        args=RewardConfig(**settings(folder)),
        train_dataset=Dataset.from_list(rows),
        processing_class=words(folder),
    )
    return trainer, trainer.data_collator(rows)


def settings(folder: Path) -> dict[str, Any]:
    """Return what both of TRL's configs are given."""
    return {
        "output_dir": str(folder / "out"),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def words(folder: Path) -> Any:
    """Return a tokenizer, which TRL wants, and which reads no pair: they are tokens already."""
    from transformers import PreTrainedTokenizerFast

    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    path = folder / "words"
    special = {"special_tokens": ["<pad>", "</s>"], "eos_token": "</s>", "pad_token": "<pad>"}
    train_byte_level_bpe(path, ["a b c"], vocab_size=300, **special)
    return PreTrainedTokenizerFast.from_pretrained(path)


if __name__ == "__main__":
    main()
