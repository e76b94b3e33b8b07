"""Files of torch.save that are damaged are refused by their name, whatever torch raises."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nvmm.convert.pickles import load


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    content = {"a": torch.ones(3, 4), "b": [1, {"c": 2.0}]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert load(path)["b"] == content["b"]
    whole, draw = path.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in range(0, min(len(whole), 600), 9)]
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.randrange(min(len(whole), 600))] = draw.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            load(path)
        except ValueError as error:  # Any other error ends this test.
            assert str(path) in str(error)
            refused += 1
    assert refused > 60
