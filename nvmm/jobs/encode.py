"""Vectors of the documents or queries of a retrieval set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nvmm.batch import POSITIVE, QUERY
from nvmm.config.choices import require
from nvmm.data.prepare import retrieval_sets
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, file_digest
from nvmm.jobs.parts import Parts

Side = Literal["corpus", "queries"]
Dtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Encode(Job):
    """Embed a side of a folder in BEIR's layout with an embedder.

    A row has `id` and `vector`, of unit length where the model says so. Of two towers, queries go
    through the query tower and the corpus through the context tower.

    Args:
        folder: folder with corpus.jsonl and queries.jsonl.
        side: "corpus", or "queries", which get the instruction.
        instruction: text before queries; None: the checkpoint's of training.
        dtype: number format of the vectors in the file.
        batch_size: texts of a forward pass.
        part_size: texts of a part file.
    """

    folder: str
    side: Side
    instruction: str | None = None
    dtype: Dtype = "fp32"
    batch_size: int = 32
    part_size: int = 4096
    name: str = "encode"

    def __post_init__(self) -> None:
        require("job.side", self.side, Side)
        require("job.dtype", self.dtype, Dtype)
        if self.instruction is not None and self.side == "corpus":
            raise ValueError("job.instruction is for job.side=queries; documents get none")

    def prepare(self, model: Restored | None) -> Work:
        """Read the texts; ValueError for a checkpoint that is no embedder."""
        encoder = self.require(model).encoder(self.batch_size)
        read = {"corpus": retrieval_sets.read_corpus, "queries": retrieval_sets.read_queries}
        texts = read[self.side](self.folder)
        ids = list(texts)
        instruction, role = None, QUERY if self.side == "queries" else POSITIVE
        if self.side == "queries":
            instruction = self.instruction or encoder.builder.instruction
        number_format: Any = np.float16 if self.dtype == "fp16" else np.float32

        def rows(numbers: range) -> pa.Table:
            chosen = [ids[number] for number in numbers]
            vectors = encoder.local([texts[name] for name in chosen], instruction, role).numpy()
            flat = pa.array(vectors.astype(number_format).reshape(-1))
            return pa.table(
                {
                    "id": chosen,
                    "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
                }
            )

        return Work(len(ids), file_digest(Path(self.folder) / f"{self.side}.jsonl"), rows)


def read_vectors(folder: str | Path) -> tuple[list[str], list[NDArray[Any]]]:
    """Return ids, and vectors in parts [rows, h], memory-mapped, of an `encode` job's output.

    Raises ValueError where it is not whole, or is another job's.
    """
    table = Parts(Path(folder).expanduser()).read()
    if "vector" not in table.column_names:
        raise ValueError(f"{folder} is no output of job=encode: it has {table.column_names}")
    size = table.schema.field("vector").type.list_size
    chunks = [chunk.flatten().to_numpy().reshape(-1, size) for chunk in table["vector"].chunks]
    return table["id"].to_pylist(), chunks
