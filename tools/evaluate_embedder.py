"""Score an embedder's checkpoint on a folder in BEIR's layout.

python tools/evaluate_embedder.py --checkpoint RUN --beir FOLDER [--mteb] [--instruction TEXT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nvmm.parallel import environment


def main() -> None:
    options = _parser().parse_args()
    from nvmm.config.compose import refusals
    from nvmm.data.prepare import retrieval_sets
    from nvmm.evaluation import beir, mteb_task
    from nvmm.parallel import setup

    with refusals("evaluate_embedder"):
        corpus = retrieval_sets.read_corpus(options.beir)
        queries = retrieval_sets.read_queries(options.beir)
        qrels = retrieval_sets.read_qrels(options.beir, options.split)
        encode = load(options.checkpoint, options.tensor_parallel, options.batch_size, options.base)
        runner: Any = mteb_task if options.mteb else beir
        scores: dict[str, Any] = runner.evaluate(
            encode,
            corpus,
            queries,
            qrels,
            instruction=options.instruction or encode.builder.instruction,
            ignore_identical_ids=options.ignore_identical_ids,
        )
    if environment.rank() == 0:
        text = json.dumps(scores, indent=1, default=str)
        print(text)
        if options.output:
            Path(options.output).write_text(text + "\n")
    setup.shutdown()


def load(
    checkpoint: str, tensor_parallel: int = 1, batch_size: int = 32, base: str | None = None
) -> Any:
    """The encoder of a checkpoint or run directory; base: where a LoRA run's base lies now."""
    from nvmm.inference.embedding import Encoder
    from nvmm.inference.restore import restore

    parallel = {
        "_target_": "nvmm.parallel.setup.Parallel",
        "tensor_model_parallel_size": tensor_parallel,
    }
    config = {
        "checkpoint": {"path": checkpoint},
        "parallel": parallel,
        "base": base,
        "seed": 1234,
        "tokenizer": {"path": None},
        **dict.fromkeys(("precision", "backend", "sequence_length")),
        "trust_config": False,
    }
    restored = restore(config, {})
    return Encoder(restored.model, restored.builder, batch_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint or run directory")
    parser.add_argument("--beir", required=True, help="corpus.jsonl, queries.jsonl, qrels/")
    parser.add_argument("--split", default="test")
    parser.add_argument("--instruction", help="before queries; default: the training's")
    parser.add_argument("--mteb", action="store_true", help="let mteb score it (embed extra)")
    parser.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="leave out the document that has the query's id (ArguAna, Quora, ...)",
    )
    parser.add_argument("--base", help="where the checkpoint that a LoRA run started from lies")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--output", help="file for the scores")
    return parser


if __name__ == "__main__":
    main()
