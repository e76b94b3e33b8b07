"""A small RAG run: two checkpoints of random weights, documents and questions, and its config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from nvmm.jobs.rag.pipeline import Rag
from tests import tiny
from tests.convert import test_nv_embed
from tests.ranks import run_ranks
from tests.test_evaluate import NoOptimizer

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = "the red bird sings loud. a small cat sleeps under trees! True False Passage question"
DOCUMENTS = {
    "birds": "The red bird sings loud. It eats worms.\n\nA small bird sleeps under trees.",
    "cats": "A small cat sleeps all day. The red cat eats birds! It never sings.",
    "trees": "Trees are green. Under trees it is dark.",
}
QUESTIONS = [
    {"id": "q1", "question": "Who sings?", "answers": ["the bird"], "relevant": ["birds"]},
    {
        "id": "q2",
        "messages": [
            {"role": "user", "content": "Who sleeps?"},
            {"role": "assistant", "content": "The cat."},
            {"role": "user", "content": "And who else?"},
        ],
        "answers": ["a small bird", "bird"],
        "relevant": [{"document": "birds", "start": 41, "end": 73}],
    },
    {"id": "q3", "question": "What is green?", "answers": ["Trees"], "instruction": "Be short."},
    {"id": "q4", "question": "Who drives?", "answerable": False, "document": "cats"},
]
CHAT = "nvmm.jobs.rag.contexts.Contexts"


def form(name: str) -> dict[str, Any]:
    """One of configs/form, without its defaults."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / "form" / f"{name}.yaml").read_text())
    return content


def generator_config(folder: Path) -> dict[str, Any]:
    """The config of a tiny Llama that talks as ChatQA, whose tokenizer is trained here."""
    from nvmm.data.samples.tokenizer import Tokenizer, train_byte_level_bpe

    chatqa = yaml.safe_load((CONFIGS / "template" / "chatqa.yaml").read_text())
    texts = [WORDS, *DOCUMENTS.values(), chatqa["system"], form("rankrag_ranking")["prompt"]]
    train_byte_level_bpe(
        folder,
        texts * 4,
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>", "<picture>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    options = {"image_token": "<picture>", "end_of_turn": "</s>"}
    size = Tokenizer(str(folder), **options).vocab_size
    return {
        "model": tiny.language(vocab_size=size, padded_vocab_size=448, max_sequence_length=512),
        "tokenizer": {
            "_target_": "nvmm.data.samples.tokenizer.Tokenizer",
            "path": str(folder),
            **options,
        },
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp64"},
        "backend": "native",
        "data": {
            "sequence_length": 400,
            "train": {
                "_target_": "nvmm.data.shards.dataset.Dataset",
                "shards": "gone/*.tar",
                "build": {
                    "_target_": "nvmm.data.samples.instruct.InstructBuilder",
                    "_partial_": True,
                    "template": chatqa,
                    "tags": {"_target_": "nvmm.data.samples.chat.ImageTags"},
                    "tokens_per_tile": 1,
                    "supervise": "last",
                    "form": form("rankrag_ranking"),
                },
            },
        },
    }


def save_generator(rank: int, world: int, init: str, config: dict[str, Any], to: Path) -> None:
    from hydra.utils import instantiate

    from nvmm.checkpoint.save import Checkpoint
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision

    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    config["model"]["transformer"]["init_method_std"] = 0.3
    model = instantiate(config["model"], _convert_="all")
    chunks = build_chunks(model, parallel, Precision("fp64"), seed=5)
    tokenizer = instantiate(config["tokenizer"])
    state = {"config": config, "tokenizer_digest": tokenizer.digest}
    Checkpoint(directory=to / "checkpoints").save(3, chunks, NoOptimizer(), state)


def prepare(folder: Path) -> dict[str, Any]:
    """Write checkpoints, documents and questions; return the run's config."""
    run_ranks(save_generator, 1, generator_config(folder / "words"), folder / "generator")
    retriever = test_nv_embed.config_of(folder / "words")
    retriever["model"] |= {"vocab_size": 420, "padded_vocab_size": 448}
    retriever["tokenizer"] |= {"image_token": "<picture>"}
    retriever["data"]["sequence_length"] = 128
    run_ranks(test_nv_embed.save, 1, {}, retriever, folder / "retriever")
    documents = [{"_id": name, "text": text} for name, text in DOCUMENTS.items()]
    for name, lines in (("documents", documents), ("questions", QUESTIONS)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return {
        "_target_": "nvmm.jobs.rag.pipeline.Rag",
        "documents": str(folder / "documents.jsonl"),
        "questions": str(folder / "questions.jsonl"),
        "retriever": str(folder / "retriever"),
        "form": form("chatqa"),
        "chunking": {
            "_target_": "nvmm.jobs.rag.chunks.Chunking",
            "unit": "sentences",
            "size": 1,
        },
        "dialogue": {"_target_": "nvmm.data.samples.dialogue.Dialogue"},
        "ranking": {
            "_target_": "nvmm.jobs.rag.ranking.Ranking",
            "form": form("rankrag_ranking"),
            "top": 4,
        },
        "answers": {
            "none": {"_target_": CHAT, "source": "none"},
            "document": {"_target_": CHAT, "source": "document"},
            "gold": {"_target_": CHAT, "source": "gold"},
            "searched": {"_target_": CHAT, "source": "searched", "k": 2, "order": "reverse"},
            "reranked": {"_target_": CHAT, "source": "reranked", "k": 2, "candidates": 3},
        },
        "searched": 6,
        "cutoffs": [1, 3],
        "candidates": [2],
        "max_new_tokens": 5,
        "batch_size": 3,
        "part_size": 2,
        "corpus_part_size": 2,
    }


def run(
    rank: int,
    world: int,
    init: str,
    options: dict[str, Any],
    generator: Path,
    output: Path,
    layout: dict[str, int] | None = None,
    dies: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Run on this rank; it is killed after so many parts of the stage that `dies` names."""
    import signal

    import torch.distributed as dist
    from hydra.utils import instantiate

    from nvmm.inference.restore import restore
    from nvmm.jobs.parts import Parts

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    write, made = Parts.write, 0

    def write_and_die(self: Parts, part: int, rows: Any) -> None:
        nonlocal made
        write(self, part, rows)
        made += dies is not None and str(self.folder).endswith(dies[0])
        if dies is not None and made == dies[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    Parts.write = write_and_die  # type: ignore[method-assign]
    model = restore(generator, parallel=layout)
    job: Rag = instantiate(options, _convert_="all")
    return job.run({"job": options}, model, output)
