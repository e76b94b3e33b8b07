"""The fp32 logits of either side of a conversion, on the same tokens and images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.batch import IMAGE, Batch, Sample, Text, TextMedia
from nvmm.convert.files import is_local
from nvmm.convert.formats import reward
from nvmm.convert.models import HubFolder, SavedModel
from nvmm.convert.sources import Source, read
from nvmm.data.collate import collate

_CLASSES = ("qwen2", "llama", "yi", "mistral", "nemotron")
"""Formats of language models that Transformers has a class for."""


def logits(
    side: HubFolder | SavedModel, tokens: Tensor, constructor: Callable[[Any], Any], seed: int = 0
) -> Tensor | None:
    """Compute logits [b, s, vocabulary] in fp32; return None for an encoder or an embedder.

    Of a reward model they are the scores of the rows, [b, 1, outputs].

    A language model's folder is run by Transformers, with its own class and `from_pretrained`;
    everything else by our model with the side's weights. A model with an encoder gets one random
    image from `seed` in front of each row of tokens, at the encoder's native size.

    constructor: makes a model's partial of its (trusted) config.
    """
    model = _config(side)
    language = model.get("language", model)
    if "vocab_size" not in language or "pooling" in language:
        return None
    if isinstance(side, SavedModel):
        return _ours(model, side.source, tokens, constructor, seed)
    if side.format in (*_CLASSES, *reward.FORMATS) and is_local(side.path):
        return _transformers(side, tokens)
    return _ours(model, side.to_ours(model), tokens, constructor, seed)


def token_rows(
    sides: Sequence[HubFolder | SavedModel], file: Path | None, limit: int, seed: int
) -> Tensor:
    """Return rows of token ids [b, s] for both sides: a JSON file's, or 2 x 32 random ones.

    A list of ids alone is one row. limit: random ids are below it, and below both vocabularies.
    Raises ValueError for rows of several lengths, and for what is no id of both.
    """
    rows = min(
        _config(side).get("language", _config(side)).get("vocab_size", limit) for side in sides
    )
    if file is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, min(limit, rows), (2, 32), generator=generator)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tokens = torch.tensor(content)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"--tokens {file} must be rows of ids, all of one length: {error}"
        ) from error
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"--tokens {file} must be a list of rows of ids, as [[1, 2], [3, 4]]")
    if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
        raise ValueError(f"--tokens {file}: ids must be at least 0 and below {rows}")
    return tokens


def _config(side: HubFolder | SavedModel) -> dict[str, Any]:
    return side.model if isinstance(side, SavedModel) else side.model()


def _transformers(folder: HubFolder, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = folder.format in reward.FORMATS
    family = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model, info = family.from_pretrained(
        folder.path,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if problems := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ValueError(f"{folder.path} does not fit Transformers' class: {', '.join(problems)}")
    with torch.no_grad():
        if not scores:
            return model.eval()(tokens).logits
        # Rows have one length: the score is the last token's, also where that is the padding.
        model.config.pad_token_id = None
        return torch.stack([model.eval()(row[None]).logits for row in tokens])


def _ours(
    config: dict[str, Any],
    source: Source,
    tokens: Tensor,
    constructor: Callable[[Any], Any],
    seed: int,
) -> Tensor:
    from nvmm.parallel.parameters import sharded_parameters
    from nvmm.parallel.setup import Parallel, Precision, prepare_backend, shutdown

    prepare_backend()
    from megatron.core import parallel_state

    alone = not parallel_state.model_parallel_is_initialized()
    if alone:
        Parallel().initialize(seed=0, rank=0, world_size=1)
    try:
        [chunk] = Parallel().chunks(Precision())
        model = constructor(config)(chunk=chunk).eval()
        with torch.no_grad():
            for entry in sharded_parameters(model):
                entry.parameter.copy_(read(source, entry.name))
            batch = _batch(model, tokens, seed)
            if "num_outputs" in config.get("language", config):
                return model(batch, output="score")[:, None]
            return model(batch, output="logits")
    finally:
        if alone:
            shutdown()


def _batch(model: Any, tokens: Tensor, seed: int) -> Batch:
    """Batch rows of tokens, each behind an image where the model takes any."""
    count = len(tokens)
    images: list[TextMedia] = []
    if IMAGE in model.reads:
        size = model.vision.image_size
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(
            0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator
        )
        rows, columns = model.vision.grid(values)
        # The connector itself is asked, whatever its class.
        blank = torch.zeros(1, rows * columns, model.vision.config.hidden_size)
        length = model.connector(blank, (rows, columns)).shape[1]
        # An id outside the vocabulary will do: features take the place of every placeholder.
        placeholder = model.language.unpadded_vocab_size
        first = torch.zeros(1, dtype=torch.int64)
        images = [TextMedia(v[None], first, first, first, placeholder, length) for v in values]
        tokens = torch.cat([torch.full((count, length), placeholder), tokens], dim=1)
    samples = [
        Sample((Text(row, torch.zeros(len(row)), {IMAGE: images[i]} if images else {}),), i)
        for i, row in enumerate(tokens)
    ]
    return collate(samples, pad_id=0)
