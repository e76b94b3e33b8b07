"""Vectors of the candidates or queries of a retrieval set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from numpy.typing import NDArray

from nvmm.batch import POSITIVE, QUERY
from nvmm.config.choices import require
from nvmm.data.prepare.layouts import RetrievalSet
from nvmm.evaluation.mbeir import content
from nvmm.inference.restore import Restored
from nvmm.jobs.job import Job, Work, digest, items_digest, pictures_digest
from nvmm.jobs.parts import Parts

Side = Literal["corpus", "queries"]
Dtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Encode(Job):
    """Embed a side of a retrieval set with an embedder.

    A row has `id`, `vector`, of length 1 where the model says so, and `error`: why it has no
    vector, else null. It has none for a picture that cannot be read, values that are not finite,
    and a query of M-BEIR of which no judgement says what it looks for. Of two towers, queries go
    through the query tower and the corpus through the context tower.

    Args:
        data: the retrieval set.
        side: "corpus", or "queries", which get an instruction.
        instruction: text before all queries; None: each query's of M-BEIR's table, and for BEIR the
            checkpoint's of training.
        dtype: number format of the vectors in the file.
        batch_size: items of a forward pass.
        part_size: items of a part file.
    """

    data: RetrievalSet
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
        """Read the items; ValueError for a checkpoint that is no embedder."""
        if (split := getattr(self.data, "split", None)) is not None:
            raise ValueError(
                f"job.data.split={split} is of judgements; job=encode embeds all of its side, so"
                " leave it out"
            )
        encoder = self.require(model).encoder(self.batch_size)
        items = self.data.documents if self.side == "corpus" else self.data.questions
        ids = list(items)
        role = QUERY if self.side == "queries" else POSITIVE
        prompts = self._prompts(encoder.builder.instruction)

        def rows(numbers: range) -> pa.Table:
            chosen = [ids[number] for number in numbers]
            vectors = torch.zeros(len(chosen), encoder.size)
            errors: dict[int, str] = {}
            # Items of one instruction share forward passes.
            groups: dict[str | None, list[int]] = {}
            for place, name in enumerate(chosen):
                if isinstance(prompts, Mapping) and name not in prompts:
                    errors[place] = f"query {name}: no judgement says what it looks for"
                else:
                    prompt = prompts[name] if isinstance(prompts, Mapping) else prompts
                    groups.setdefault(prompt, []).append(place)
            for prompt, places in groups.items():
                bad: dict[int, str] = {}
                contents = [content(items[chosen[place]]) for place in places]
                vectors[places] = encoder.local(contents, prompt, role, bad)
                errors |= {places[number]: message for number, message in bad.items()}
            number_format = torch.float16 if self.dtype == "fp16" else torch.float32
            written = vectors.to(number_format)
            for place in (~torch.isfinite(written)).any(1).nonzero()[:, 0].tolist():
                fits = bool(torch.isfinite(vectors[place]).all())
                why = "has no place in job.dtype=fp16; take fp32" if fits else "is not finite"
                errors.setdefault(place, f"{chosen[place]}: its vector {why}")
            written[list(errors)] = 0
            return _table(chosen, written.numpy(), errors)

        inputs = {
            "items": items_digest(items),
            "instructions": digest(prompts),
            "pictures": pictures_digest([item.image for item in items.values()]),
        }
        return Work(len(ids), inputs, rows)

    def _prompts(self, default: str | None) -> str | Mapping[str, str] | None:
        """Return the instruction of all items, or of each by its id."""
        if self.side == "corpus":
            return None
        if self.instruction is not None:
            return self.instruction
        prompts = self.data.prompts
        return default if prompts is None else dict(prompts)


def _table(ids: list[str], vectors: NDArray[Any], errors: Mapping[int, str]) -> pa.Table:
    mask = pa.array([place in errors for place in range(len(ids))])
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.reshape(-1)), vectors.shape[1], mask=mask if errors else None
    )
    faults = pa.array([errors.get(place) for place in range(len(ids))], pa.string())
    return pa.table({"id": ids, "vector": column, "error": faults})


@dataclass(frozen=True)
class Vectors:
    """The output of an `encode` job.

    identity: what the vectors depend on. ids: of the items that have a vector. chunks: their
    vectors in parts [rows, h], memory-mapped. errors: id -> why an item has no vector.
    """

    identity: dict[str, Any]
    ids: list[str]
    chunks: list[NDArray[Any]]
    errors: dict[str, str]

    @staticmethod
    def read(folder: str | Path) -> Vectors:
        """Read an output; ValueError where it is not whole, or is another job's."""
        parts = Parts(Path(folder).expanduser())
        table = parts.read()
        if not {"id", "vector", "error"} <= set(table.column_names):
            raise ValueError(f"{folder} is no output of job=encode: it has {table.column_names}")
        size = table.schema.field("vector").type.list_size
        bad = table.filter(table["error"].is_valid())
        return Vectors(
            parts.manifest["identity"],
            table.filter(table["vector"].is_valid())["id"].to_pylist(),
            [chunk.flatten().to_numpy().reshape(-1, size) for chunk in table["vector"].chunks],
            dict(zip(bad["id"].to_pylist(), bad["error"].to_pylist(), strict=True)),
        )
