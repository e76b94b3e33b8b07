"""The weights that a run started from, for objectives that compare with them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.files import find
from nvmm.checkpoint.load import load_weights
from nvmm.modules.fp8_scales import Scaling


class Reference:
    """This rank's parameters as they were when the run started, in host memory.

    Only trained parameters have a copy: the others have not changed. In a LoRA run those are its
    adapters, whose B starts as zeros, and the names of `lora.train`: the reference is the base.

    Checkpoints hold no copy but say where it came from (`source`), and a resume loads that again,
    or draws it from the seed again: initial weights depend on seed and global name alone.

    Args:
        chunks: this rank's chunks, with the weights that the seed gives, frozen and wrapped.
        scaling: their FP8 scales. The reference is quantised with the scales of the current
            weights, and leaves neither an amax nor quantised weights behind.

    source: the checkpoint whose weights were loaded at the start, None where there was none.
    """

    def __init__(self, chunks: Sequence[Module], scaling: Scaling) -> None:
        self.chunks = chunks
        self.scaling = scaling
        self.source: BaseCheckpoint | None = None
        trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        # A device reads host memory fastest where it is pinned.
        self._copies: list[tuple[Parameter, Tensor]] = [
            (p, torch.empty_like(p.data, device="cpu", pin_memory=p.is_cuda).copy_(p.data))
            for p in trained
        ]

    def take(self, source: BaseCheckpoint | None) -> None:
        """Take the weights that the chunks have now, which `source` gave."""
        self.source = source
        for parameter, copy in self._copies:
            copy.copy_(parameter.data)

    def state(self) -> dict[str, Any]:
        """Return a checkpoint's record of the reference."""
        return {"reference": None if self.source is None else asdict(self.source)}

    def take_again(self, path: Path, state: dict[str, Any], moved: Path | None) -> None:
        """Take the weights that the run of a checkpoint started from; collective.

        The chunks have the seed's weights before, and the reference's afterwards. moved: the
        directory of the source if it has moved.

        Raises ValueError when the checkpoint at `path` does not say where its run started, or the
        source is gone or has other weights.
        """
        if "reference" not in state:
            raise ValueError(
                f"{path} does not say which weights its run started from, as the objective's"
                f" reference; start with init_from={path} instead of resuming"
            )
        source = None
        if state["reference"] is not None:
            what = "the reference that this run started from"
            source = BaseCheckpoint(**state["reference"]).located(moved, what)
            load_weights(Path(source.path), self.chunks, other_graph=True)
        self.take(source)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run the model with the reference's weights, in eval mode; the current ones come back.

        There is no second model on the device: each parameter changes places with its copy, in
        place, since parameters are views of the buffers that mcore gathers. Those must be complete,
        and nothing may gather them meanwhile.
        """
        modes = [chunk.training for chunk in self.chunks]
        self._swap()
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, copy in self._copies:
            current = parameter.data.clone()
            parameter.data.copy_(copy)
            copy.copy_(current)
        self.scaling.forget_weights()


def check_scores(config: Mapping[str, Any], init_from: str | None) -> None:
    """Check that the reference's log-probabilities in the data are of the weights of the start.

    Raises ValueError where `build.reference` of a data set names scores of another checkpoint.
    """
    data = config.get("data") or {}
    datasets = [data.get("train"), data.get("validation"), *(data.get("blend") or [])]
    for folder in dict.fromkeys(
        folder
        for dataset in datasets
        for folder in _listed(((dataset or {}).get("build") or {}).get("reference"))
    ):
        if init_from is None:
            raise ValueError(f"build.reference={folder} needs init_from, the checkpoint it is of")
        path = find(init_from)
        manifest = json.loads((Path(folder).expanduser() / "manifest.json").read_bytes())
        scored, own = manifest["identity"]["checkpoint"]["weights"], BaseCheckpoint.of(path).digest
        if scored != own:
            raise ValueError(
                f"build.reference={folder} has the scores of a checkpoint of digest {scored[:12]},"
                f" and init_from={path} is another, of {own[:12]}: score the shards by that one"
            )


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
