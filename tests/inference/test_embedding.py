"""The encoder of texts and pictures: what it keeps in memory, and what it sends to other ranks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from nvmm.batch import IMAGE, Sample, Text, TextMedia
from nvmm.inference import embedding
from nvmm.inference.embedding import TextAndImage, TextEncoder


class Fake(TextEncoder):
    """Its samples have a tile each; it keeps the windows that it embeds."""

    windows: ClassVar[list[list[int]]] = []

    def _sample(self, item: Any, instruction: str | None, role: int) -> Sample:
        if not item.text:
            raise ValueError("empty")
        tile = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
        none = torch.zeros(1, dtype=torch.int64)
        media = {IMAGE: TextMedia(tile, none, none, none, 0, 1)}
        return Sample((Text(torch.zeros(1).long(), torch.ones(1), media),))

    def _embed(self, samples: Any, result: Tensor) -> None:
        self.windows.append(list(samples))
        for number in samples:
            result[number] = number

    @property
    def size(self) -> int:
        return 64


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Fake:
    builder: Any = None
    monkeypatch.setattr(Fake, "windows", [])
    monkeypatch.setattr(embedding, "_BATCHES", 4)
    return Fake([], builder, batch_size=2)


def test_windows_end_by_number_and_by_bytes(encoder: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [TextAndImage("a", Path("x"))] * 11
    encoder.local(items)
    assert encoder.windows == [list(range(8)), [8, 9, 10]]
    encoder.windows.clear()
    monkeypatch.setattr(embedding, "_BYTES", 700)  # three tiles, which end with their batch
    items[1] = TextAndImage("")
    errors: dict[int, str] = {}
    vectors = encoder.local(items, errors=errors)
    assert encoder.windows == [[0, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert errors == {1: "empty"} and bool(vectors[1].isnan().all())
    assert vectors[2:, 0].tolist() == list(range(2, 11))


def test_ranks_exchange_each_vector_once(encoder: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a tensor is pickled with the whole tensor: n rows would be n x n vectors."""
    sent = []

    def gather(rows: list[Any], count: int) -> list[Any]:
        sent.append(len(pickle.dumps(rows)))
        return rows

    monkeypatch.setattr(embedding, "gather", gather)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 1)
    vectors = encoder([TextAndImage("a")] * 300)
    assert vectors.shape == (300, 64) and vectors[:, 5].tolist() == list(range(300))
    assert sent[0] < 2 * vectors.nbytes
