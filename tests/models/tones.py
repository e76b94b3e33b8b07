"""A second modality in one file: its builder, its encoder. Nothing else knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nvmm.batch import MediaKind, Sample, Text, TextMedia
from nvmm.data.samples.builder import Builder
from nvmm.modules.encoders.base import Encoder, empty
from nvmm.parallel.setup import Chunk

TONES = MediaKind("tones")
FRAMES, BINS = 6, 8
PLACEHOLDER = 508


class ToneBuilder(Builder):
    """A sound (`.wav`), cut into windows, then a text of letters.

    A window is [BINS, 2 * FRAMES] in float32 and takes FRAMES places.
    """

    @property
    def media(self) -> frozenset[MediaKind]:
        return frozenset({TONES})

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        record = self.record(members)
        values = record.get(".wav").values[0]
        windows = values[: len(values) // (2 * FRAMES * BINS) * 2 * FRAMES * BINS]
        windows = windows.view(-1, BINS, 2 * FRAMES)
        letters = [3 + ord(letter) % 100 for letter in record.text("text")]
        places = [PLACEHOLDER] * (FRAMES * len(windows))
        numbers = torch.arange(len(windows))
        text = Text(
            torch.tensor([1, *places, *letters]),
            torch.tensor([0.0] * (1 + len(places)) + [1.0] * len(letters)),
            {
                TONES: TextMedia(
                    windows, 1 + FRAMES * numbers, 0 * numbers, 1 + numbers, PLACEHOLDER, FRAMES
                )
            }
            if len(windows)
            else {},
        )
        return Sample((text,), source=record.source)


class ToneEncoder(Encoder):
    """Pairs of frames, projected, and a bidirectional block."""

    def __init__(self, transformer: Callable[..., Any], *, chunk: Chunk) -> None:
        super().__init__(
            transformer,
            "encoders.tones",
            qk_norm=None,
            layer_scale=None,
            post_layernorm=True,
            chunk=chunk,
        )
        self.weight = Parameter(empty(self.config, self.config.hidden_size, 2 * BINS))
        self.config.init_method(self.weight)
        self.mark_replicated()

    def grid(self, media: Tensor) -> tuple[int, int]:
        return 1, media.shape[2] // 2

    def blank(self, device: torch.device) -> Tensor:
        return torch.zeros(1, BINS, 2 * FRAMES, device=device)

    def front_end_flops(self, media: Tensor) -> float:
        return 2.0 * self.weight.numel() * self.grid(media)[1]

    def encode(self, media: Tensor) -> Tensor:
        pairs = media.to(self.config.params_dtype).unflatten(2, (-1, 2))
        return self.transform(pairs.permute(0, 2, 1, 3).flatten(2) @ self.weight.t())
