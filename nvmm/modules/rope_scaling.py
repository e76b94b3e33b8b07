"""Ways to stretch RoPE past the length of pretraining: one value of `model.rope_scaling` each.

Names, defaults and arithmetic are those of Transformers' modeling_rope_utils, operation by
operation: at position 100,000 the last bit of a frequency turns a channel by half a degree.
`nvmm.config.rules.rope` says which values are allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


def wavelengths(base: float, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return base^(2 i / dim), the positions of one radian of each pair of channels, [dim / 2]."""
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return base**exponents


@dataclass(frozen=True)
class Scaling:
    """What all kinds have."""

    by_length: ClassVar[bool] = False
    """Whether the frequencies depend on the length of the sequence."""

    @property
    def magnitude(self) -> float:
        """Factor of every cosine and sine: of queries and of keys, so its square of all logits."""
        return 1.0

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return radians per position of the dim / 2 pairs of channels, float32.

        lengths: int64 [...], tokens of the sequences; only kinds `by_length` read the values.

        Returns: [dim / 2], or [..., dim / 2] of kinds `by_length`, on the device of `lengths`.
        """
        raise NotImplementedError

    def is_constant(self, first: int, last: int) -> bool:
        """Return whether sequences of `first` to `last` tokens have the same frequencies."""
        return True


@dataclass(frozen=True)
class Linear(Scaling):
    """All frequencies divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return [dim / 2]."""
        return 1.0 / wavelengths(base, dim, lengths.device) / self.factor


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: slow channels divided by `factor`, fast ones kept, a ramp between (2407.21783).

    Args:
        factor: of channels that turn less than low_freq_factor times in the original length.
        low_freq_factor, high_freq_factor: turns in the original length where the ramp begins and
            where it ends; from there channels are kept.
        original_max_position_embeddings: tokens of pretraining.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return [dim / 2]."""
        plain = 1.0 / wavelengths(base, dim, lengths.device)
        original, low, high = (
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )
        period = 2 * math.pi / plain
        kept = (original / period - low) / (high - low)
        between = (1 - kept) * plain / self.factor + kept * plain
        slow, fast = period > original / low, period < original / high
        return torch.where(slow, plain / self.factor, torch.where(fast, plain, between))


@dataclass(frozen=True)
class YaRN(Scaling):
    """NTK by parts and a temperature of attention (Peng et al. 2023, arXiv:2309.00071).

    Args:
        factor: by which channels are divided that turn less than beta_slow times in the original
            length; those that turn more than beta_fast times are kept.
        original_max_position_embeddings: tokens of pretraining.
        attention_factor: `magnitude`; None for 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: where both are given, the default of attention_factor is
            (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1), as DeepSeek has it.
        truncate: round the ends of the ramp to whole channels, as the paper does.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """Factor of every cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return [dim / 2]."""
        positions = wavelengths(base, dim, lengths.device)
        low, high = (self._channel(turns, base, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        channels = torch.arange(dim // 2, dtype=torch.float32, device=lengths.device)
        kept = 1 - ((channels - low) / width).clamp(0, 1)
        return 1.0 / (self.factor * positions) * (1 - kept) + 1.0 / positions * kept

    def _temperature(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def _channel(self, turns: float, base: float, dim: int) -> float:
        """Return the pair of channels, a fraction, that turns so often in the original length."""
        period = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(base))


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """A base that grows with the sequence's length beyond the original one (NTK-aware scaling).

    Args:
        factor: 1 makes the base grow as length / original to the power dim / (dim - 2).
        original_max_position_embeddings: tokens up to which nothing is scaled.
    """

    factor: float
    original_max_position_embeddings: int
    by_length: ClassVar[bool] = True

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return [..., dim / 2]."""
        original = self.original_max_position_embeddings
        longer = lengths > original
        growth = self.factor * lengths.float() / original - (self.factor - 1)
        bases = torch.where(longer, base * growth.clamp(min=1) ** (dim / (dim - 2)), base)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
        return 1.0 / bases.unsqueeze(-1) ** exponents

    def is_constant(self, first: int, last: int) -> bool:
        """Return whether sequences of `first` to `last` tokens have the same frequencies."""
        return first == last or last <= self.original_max_position_embeddings


@dataclass(frozen=True)
class LongRoPE(Scaling):
    """A searched factor for each pair of channels (Ding et al. 2024, arXiv:2402.13753; Phi-3).

    Args:
        short_factor, long_factor: divisors of the dim / 2 frequencies, in sequences of up to
            original_max_position_embeddings tokens and in longer ones.
        factor: longest length / original length, which only `magnitude` reads.
        attention_factor: `magnitude`, in short and in long sequences; None for
            sqrt(1 + ln(factor) / ln(original_max_position_embeddings)).
    """

    short_factor: list[float]
    long_factor: list[float]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    by_length: ClassVar[bool] = True

    @property
    def magnitude(self) -> float:
        """Factor of every cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1:
            return 1.0
        original = self.original_max_position_embeddings
        return math.sqrt(1 + math.log(self.factor) / math.log(original))

    def frequencies(self, base: float, dim: int, lengths: Tensor) -> Tensor:
        """Return [..., dim / 2]."""
        positions = wavelengths(base, dim, lengths.device)
        short, long = (positions.new_tensor(x) for x in (self.short_factor, self.long_factor))
        longer = (lengths > self.original_max_position_embeddings).unsqueeze(-1)
        return 1.0 / (torch.where(longer, long, short) * positions)

    def is_constant(self, first: int, last: int) -> bool:
        """Return whether sequences of `first` to `last` tokens have the same frequencies."""
        original = self.original_max_position_embeddings
        return (first > original) == (last > original)
