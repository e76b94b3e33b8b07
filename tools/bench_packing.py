"""Tokens/s of padded, packed and planned rows on a CPU: python tools/bench_packing.py

Forward and backward of one small decoder over the same samples, at three skews of length: padded
rows, one packed row a micro-batch, rows planned by nvmm.data.order.packing, and Transformers' model
of the same sizes with its padding-free collator (sdpa; its flash attention needs a GPU). Ways take
turns within a round; the medians of the rounds are printed. Tokens are valid ones, pads do
not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from nvmm.batch import Sample, Text
from nvmm.data.collate import collate
from nvmm.data.order.packing import plan

VOCABULARY = 2048
SIZES = {"num_layers": 4, "hidden_size": 256, "heads": 8, "groups": 2, "ffn_hidden_size": 768}
SKEWS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "even (0.8 to 1.2 x mean)": lambda rng, n: rng.uniform(0.8, 1.2, n),
    "skewed (log-normal, 0.7)": lambda rng, n: rng.lognormal(0.0, 0.7, n),
    "long tail (log-normal, 1.3)": lambda rng, n: rng.lognormal(0.0, 1.3, n),
}


def samples_of(skew: str, count: int, mean: int, capacity: int) -> list[Sample]:
    """Return samples of random tokens; every token is supervised."""
    rng = np.random.default_rng(0)
    draws = SKEWS[skew](rng, count)
    lengths = np.clip(draws / draws.mean() * mean, 8, capacity).astype(int)
    return [
        Sample((Text(torch.from_numpy(rng.integers(0, VOCABULARY, n)), torch.ones(n)),), i)
        for i, n in enumerate(lengths.tolist())
    ]


def our_model() -> Any:
    """Return a LanguageModel of SIZES in a world of this process."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nvmm.models.language import LanguageModel
    from nvmm.parallel.parameters import initialize
    from nvmm.parallel.setup import Parallel, Precision

    parallel = Parallel()
    parallel.initialize(seed=1)
    transformer = partial(
        TransformerConfig,
        num_layers=SIZES["num_layers"],
        hidden_size=SIZES["hidden_size"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        ffn_hidden_size=SIZES["ffn_hidden_size"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    chunk = parallel.chunks(Precision())[0]
    model = LanguageModel(transformer, VOCABULARY, VOCABULARY, chunk=chunk)
    initialize(model, seed=1)
    return model


def their_model() -> Any:
    """Return Transformers' Qwen2 of the same sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=SIZES["hidden_size"],
            intermediate_size=SIZES["ffn_hidden_size"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["groups"],
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def ours(model: Any, micro_batches: list[list[Sample]], packed: bool) -> float:
    """Return the summed loss of one pass; gradients are computed and dropped."""
    total = 0.0
    for samples in micro_batches:
        batch = collate(samples, pad_id=0, packed=packed)
        loss = (model(batch) * batch.loss_mask).sum()
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return total


def theirs(model: Any, collator: Any, micro_batches: list[list[Sample]]) -> None:
    """Do the same work by Transformers."""
    for samples in micro_batches:
        batch = collator([{"input_ids": sample.tokens} for sample in samples])
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad()


def main() -> None:
    from transformers import DataCollatorWithFlattening

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--mean", type=int, default=192, help="mean length in tokens")
    parser.add_argument("--capacity", type=int, default=1024, help="tokens of a planned row")
    options = parser.parse_args()
    model, their, collator = our_model(), their_model(), DataCollatorWithFlattening()
    size = options.capacity // options.mean
    print(f"{torch.get_num_threads()} threads, micro-batches of {size}; tokens/s")
    for skew in SKEWS:
        samples = samples_of(skew, options.samples, options.mean, options.capacity)
        dealt = [samples[i : i + size] for i in range(0, len(samples), size)]
        packs = plan([len(sample.tokens) for sample in samples], options.capacity)
        planned = [[samples[i] for i in pack.samples] for pack in packs]
        ways: dict[str, Callable[[], Any]] = {
            "padded": partial(ours, model, dealt, False),
            "packed": partial(ours, model, dealt, True),
            "planned": partial(ours, model, planned, True),
            "Transformers, padding-free": partial(theirs, their, collator, dealt),
            "Transformers, planned rows": partial(theirs, their, collator, planned),
        }
        losses = [ways[name]() for name in ("padded", "packed", "planned")]
        if max(losses) - min(losses) > 1e-4 * losses[0]:
            raise RuntimeError(f"padded, packed and planned rows have different losses: {losses}")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - begin)
        tokens = sum(len(sample.tokens) for sample in samples)
        places = sum(len(part) * max(len(s.tokens) for s in part) for part in dealt)
        fill = tokens / (len(packs) * options.capacity)
        print(
            f"{skew}: {tokens} tokens; padded rows {tokens / places:.0%} full, planned {fill:.1%}"
        )
        for name, values in times.items():
            print(f"  {name:28} {tokens / statistics.median(values):9.0f}")


if __name__ == "__main__":
    main()
