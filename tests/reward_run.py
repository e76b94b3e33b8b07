"""A tiny reward model's checkpoint with its tokenizer and sample builder, for tests of readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.data.samples.chat import Turn
from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe
from tests import tiny
from tests.data.conftest import template

TURNS = [
    [Turn("user", "What is it?"), Turn("assistant", "A bird.")],
    [Turn("user", "What is it? " * 4), Turn("assistant", "A small bird that sings.")],
]
END = "<extra_id_2>"


def tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", END]
    train_byte_level_bpe(
        folder,
        ["What is it? A small bird that sings.\n<user assistant"],
        vocab_size=300,
        special_tokens=special,
        eos_token="<|im_end|>",
        pad_token=pad,
    )
    return Tokenizer(str(folder))


def config_of(folder: Path, *, pad: str = "<|endoftext|>", **build: Any) -> dict[str, Any]:
    """The config of a run of two attributes, as a checkpoint saves it; writes the tokenizer."""
    words = tokenizer(folder, pad=pad)
    model = tiny.reward(2, vocab_size=words.vocab_size, padded_vocab_size=384)
    model["transformer"] |= {"add_qkv_bias": False, "layernorm_epsilon": 1e-5}
    chatml = template()
    dialect = {
        "_target_": "nvmm.data.samples.chat.ChatTemplate",
        "special_tokens": list(chatml.special_tokens),
        "roles": {role: vars(affixes) for role, affixes in chatml.roles.items()},
    }
    return {
        "model": model,
        "seed": 3,
        "backend": "native",
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32"},
        "tokenizer": {
            "_target_": "nvmm.data.samples.tokenizer.Tokenizer",
            "path": str(folder),
        },
        "data": {
            "sequence_length": 128,
            "train": {
                "build": {
                    "_target_": "nvmm.data.samples.reward.RewardBuilder",
                    "_partial_": True,
                    "template": dialect,
                    "tags": {"_target_": "nvmm.data.samples.chat.ImageTags"},
                    "tokens_per_tile": 1,
                    "attributes": ["quality", "verbosity"],
                    "end": END,
                    **build,
                }
            },
        },
    }


def save(
    rank: int,
    world: int,
    init: str,
    layout: dict[str, int],
    config: dict[str, Any],
    to: Path,
    conversations: list[list[Turn]],
) -> Tensor:
    """Write a checkpoint of drawn weights; its scores of conversations, [texts, outputs]."""
    from nvmm.checkpoint.save import Checkpoint
    from nvmm.inference.restore import Restored
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision, shutdown
    from nvmm.training.optim import Optim
    from nvmm.training.optimizer import build_optimizer, wrap

    parallel, precision = Parallel(**layout), Precision()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    model = instantiate(config["model"], _convert_="all")
    chunks = build_chunks(model, parallel, precision, seed=config["seed"])
    optimizer = build_optimizer(wrap(chunks, parallel, precision), Optim(1e-3), precision, 1)
    checkpoint = Checkpoint(save_interval=None, directory=to / "checkpoints")
    words = Tokenizer(config["tokenizer"]["path"])
    state = {"config": config, "tokenizer_digest": words.digest, "step": 1}
    checkpoint.save(1, chunks, optimizer, state)
    checkpoint.finalize(blocking=True)
    make = instantiate(config["data"]["train"]["build"], _convert_="all")
    builder = make(tokenizer=words, sequence_length=config["data"]["sequence_length"])
    restored = Restored(to, [chunk.eval() for chunk in chunks], words, builder)
    samples = [builder.conversation(turns, "") for turns in conversations]
    found = torch.cat(restored.rewards(samples))
    shutdown()
    return found
