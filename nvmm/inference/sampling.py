"""The next token of a row: the likeliest, or a draw that depends on no other row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, top_p: float, uniforms: Sequence[float]) -> Tensor:
    """Choose a token for each row of logits [b, vocab]: the likeliest, or a draw from the nucleus.

    uniforms: for each row a number in [0, 1) that decides the draw.

    Returns: int64 [b].
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    # A token is in the nucleus when those before it do not reach top_p yet; the first always is.
    inside = probabilities.cumsum(-1) - probabilities < top_p
    inside[:, 0] = True
    mass = torch.where(inside, probabilities, 0.0).cumsum(-1)
    targets = torch.tensor(uniforms, device=logits.device)[:, None] * mass[:, -1:]
    index = torch.searchsorted(mass, targets, right=True)
    index = torch.minimum(index, inside.sum(-1, keepdim=True) - 1)
    return order.gather(-1, index)[:, 0]


def generator(seed: int, sample_id: int) -> torch.Generator:
    """Return a generator that depends on the seed and the sample alone."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
