"""Frequencies of every kind against Transformers', bit by bit, and how lengths decide them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nvmm.modules.rope_scaling import DynamicNTK, Linear, Llama3, LongRoPE, Scaling, YaRN
from nvmm.modules.rotary import Rotary
from tests.models.test_language import batch_of, rows_of

DIM, BASE, ORIGINAL = 128, 500000.0, 4096
SHORT, LONG = ([1 + i / 64 for i in range(64)], [2 + i / 2 for i in range(64)])
LENGTH = {"original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, tuple[str, type[Scaling], dict[str, Any]]] = {
    "linear": ("linear", Linear, {"factor": 3.0}),
    "llama3.1": (
        "llama3",
        Llama3,
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTH},
    ),
    "llama3.2": (
        "llama3",
        Llama3,
        {"factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, **LENGTH},
    ),
    "yarn": ("yarn", YaRN, {"factor": 4.0, **LENGTH}),
    "yarn_untruncated": (
        "yarn",
        YaRN,
        {"factor": 40.0, **LENGTH, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    ),
    "yarn_mscale": (
        "yarn",
        YaRN,
        {"factor": 40.0, **LENGTH, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "yarn_factor": ("yarn", YaRN, {"factor": 4.0, **LENGTH, "attention_factor": 1.25}),
    "dynamic": ("dynamic", DynamicNTK, {"factor": 2.5, **LENGTH}),
    "longrope": (
        "longrope",
        LongRoPE,
        {"short_factor": SHORT, "long_factor": LONG, **LENGTH, "factor": 32.0},
    ),
    "longrope_factor": (
        "longrope",
        LongRoPE,
        {"short_factor": SHORT, "long_factor": LONG, **LENGTH, "attention_factor": 1.5},
    ),
}
# ROPE_INIT_FUNCTIONS has the frequencies of one length, which a model keeps until another comes.
LENGTHS = (1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL + 7)


def theirs(kind: str, fields: dict[str, Any], length: int) -> tuple[Tensor, float]:
    rope = {"rope_type": kind, "rope_theta": BASE, **fields}
    longest = ORIGINAL if kind == "dynamic" else 32 * ORIGINAL
    config = LlamaConfig(head_dim=DIM, max_position_embeddings=longest, rope_parameters=rope)
    seq_len = torch.tensor(length) if length > ORIGINAL else None
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len)


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_transformers(name: str) -> None:
    kind, build, fields = KINDS[name]
    scaling = build(**fields)
    rotary = Rotary(BASE, DIM, scaling)
    found = rotary.frequencies(torch.tensor(LENGTHS))
    assert found.dtype == torch.float32
    plain = Rotary(BASE, DIM).frequencies(torch.tensor(1))
    for number, length in enumerate(LENGTHS):
        expected, magnitude = theirs(kind, fields, length)
        ours = found[number] if scaling.by_length else found
        assert torch.equal(ours, expected), length
        assert scaling.magnitude == magnitude
        if kind != "dynamic" or length > ORIGINAL:
            assert (ours < plain).any()
    assert scaling.by_length == (len({tuple(row) for row in found.view(-1, 64).tolist()}) > 1)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_change_only_where_it_is_said(name: str) -> None:
    """`is_constant` is what decides whether a cache may be used."""
    scaling = KINDS[name][1](**KINDS[name][2])
    for first in LENGTHS:
        for last in LENGTHS:
            both = scaling.frequencies(BASE, DIM, torch.tensor([first, last]))
            if first <= last:
                assert scaling.is_constant(first, last) == torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_row_and_segment_has_the_angles_of_its_own_length(name: str, packed: bool) -> None:
    """Not of the batch's longest, and not of its padding: a sample does not depend on others."""
    lengths = {"original_max_position_embeddings": 4}
    fields = {"short_factor": SHORT[:8], "long_factor": LONG[:8], "attention_factor": 1.5}
    scaling = DynamicNTK(4.0, **lengths) if name == "dynamic" else LongRoPE(**fields, **lengths)
    rotary = Rotary(BASE, 16, scaling)
    rows = rows_of(3, 9, 6)
    table = rotary.table(batch_of(rows, packed=packed))
    start = 0
    for number, row in enumerate(rows):
        alone = rotary.table(batch_of([row]))[:, 0]
        if packed:
            found = table[start : start + len(row), 0]
            start += len(row)
        else:
            found = table[: len(row), number]
        assert torch.equal(found, alone)
    assert not torch.equal(table[1, 0], rotary.table(batch_of(rows_of(9)))[1, 0])
