"""The encoder of sounds of a checkpoint, alone: a vector of each sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.config.compose import instantiate
from nvmm.data.samples.sounds import FrontEnd
from nvmm.inference.trust import require_trusted

_PREFIX = "audio"
"""What the encoder of a whole model is called in its checkpoints."""


@dataclass(frozen=True)
class SoundEncoder:
    """An encoder in eval mode, with what it hears of a sound.

    path: of its checkpoint. module: a `MediaEncoder`. weights: a digest of its checkpoint's.
    """

    path: Path
    module: Any
    front_end: FrontEnd
    weights: str

    @property
    def size(self) -> int:
        """The numbers of a vector."""
        return int(self.module.config.hidden_size)

    def __call__(self, sounds: Sequence[Tensor]) -> Tensor:
        """Return the mean over windows and features of each sound, fp32 [sounds, h] on the CPU.

        sounds: log-mel windows [n, bins, frames] of each; one forward pass runs them all.
        """
        device = next(self.module.parameters()).device
        features = self.module(torch.cat(list(sounds)).to(device)).float().mean(1)
        return torch.stack([x.mean(0) for x in features.split([len(x) for x in sounds])]).cpu()


def restore_sound_encoder(
    checkpoint: str | Path, front_end: FrontEnd | None, parallel: Mapping[str, Any]
) -> SoundEncoder:
    """Build the sound encoder of a checkpoint and load its weights; collective.

    It is the encoder that was imported alone, or that of `model.encoders.audio`.

    front_end: what it hears; None: the front end of training.
    parallel: sizes of `nvmm.parallel.setup.Parallel`, which are initialised already.

    Raises ValueError where the checkpoint is not whole, not trusted, or has no such encoder, and
    where the front end is not known, or is not that of training.
    """
    from megatron.core.transformer.module import MegatronModule

    from nvmm.checkpoint.base import BaseCheckpoint
    from nvmm.checkpoint.files import find, read_state
    from nvmm.checkpoint.load import load_weights
    from nvmm.checkpoint.record import check_files, read_record
    from nvmm.modules.encoders.base import MediaEncoder
    from nvmm.parallel.setup import Parallel

    # 1. Take the encoder's config out of the saved one.
    path = find(checkpoint)
    check_files(path, read_record(path))
    saved = read_state(path)["config"]
    model = saved["model"]
    audio = (model.get("encoders") or {}).get("audio")
    config = model if audio is None else audio["encoder"]
    heard = (saved.get("data") or {}).get("train") or {}
    trained = (heard.get("build") or {}).get("front_end")
    advice = "sounds are encoded by nvmm's own classes alone"
    require_trusted([config, saved["precision"], trained or {}], path, advice)
    front_end = _front_end(front_end, trained, path)
    # 2. Build it.
    [chunk] = Parallel(**parallel).chunks(instantiate(saved["precision"]), "native")
    chunk = replace(chunk, pre_process=True)
    module = instantiate(config)(chunk=chunk)
    if not isinstance(module, MediaEncoder):
        raise ValueError(f"{path} is {config.get('_target_')}, which is no encoder of sounds")
    bins = getattr(module, "num_mel_bins", front_end.bins)
    if bins != front_end.bins:
        raise ValueError(f"{path} hears {bins} bins, and its front end has {front_end.bins}")
    # 3. Load its weights under the names of the whole.
    whole: Any = module
    if audio is not None:
        whole = MegatronModule(config=module.config)
        setattr(whole, _PREFIX, module)
    module.eval().requires_grad_(False)
    missing = load_weights(path, [whole], part=audio is not None)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} parameters: {', '.join(missing[:10])}")
    return SoundEncoder(path, module, front_end, BaseCheckpoint.of(path).digest)


def _front_end(given: FrontEnd | None, trained: Any, path: Path) -> FrontEnd:
    """Return the front end of training, else the given one."""
    if trained is None:
        if given is None:
            raise ValueError(
                f"{path} does not say what its encoder hears: give front_end@job.front_end=clapcap"
                " or laion_clap, or a front end of your own"
            )
        return given
    own: FrontEnd = instantiate(trained)
    if given is not None and given != own:
        raise ValueError(
            f"{path} was trained with another front end than job.front_end; leave that out, and its"
            " own is taken"
        )
    return own
