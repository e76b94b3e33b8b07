"""Write Hugging Face folders as a weights-only checkpoint of ours, checked against its model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvmm.config.check import option
from nvmm.convert.files import publish
from nvmm.convert.formats import nvlm_d
from nvmm.convert.formats.all import copy_tokenizer
from nvmm.convert.formats.config import mismatches
from nvmm.convert.models import (
    PARTS,
    SOURCES,
    TOWERS,
    TWO_TOWERS,
    HubFolder,
    part_of,
    write_state,
    write_weights,
)
from nvmm.convert.sources import Cast, Merged, Renamed, compare_shapes
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.parallel.parameters import draw_row

_BLOCK = 16_777_216  # elements drawn at a time
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
_PLACEHOLDER = "<|vision_pad|>"
_STARTED_BY_THE_RUN = ("cross_attention.", "audio_connector.")
_TAGS = "nvmm.data.samples.chat.ImageTags"


def derive(folders: Mapping[str, HubFolder]) -> dict[str, Any]:
    """Return our model config of one folder (part "") or of several that compose a model.

    Raises ValueError when the parts are not those of NVLM-D, MM-Embed or two towers, and for towers
    of two models.
    """
    if "" in folders:
        if len(folders) > 1:
            raise ValueError("several --from need their parts: --from language=DIR --from ...")
        return folders[""].model()
    if set(folders) == set(TOWERS):
        first, second = (folders[part] for part in TOWERS)
        query = first.model()
        lines = mismatches(query, second.model(), str(first.path), str(second.path))
        if lines:
            raise ValueError("both towers must be one model:\n  " + "\n  ".join(lines))
        return {"_target_": TWO_TOWERS, "_partial_": True, "language": query}
    if not set(PARTS) <= set(folders) <= {*PARTS, "connector"}:
        raise ValueError(
            f"--from gives {', '.join(sorted(folders))}; without model= or experiment= it must give"
            f" {' and '.join(PARTS)}, for MM-Embed connector too, or {' and '.join(TOWERS)}"
        )
    models = {part: folders[part].model() for part in SOURCES if part in folders}
    if "connector" not in models:
        width = models["language"]["transformer"]["ffn_hidden_size"]
        models["connector"] = nvlm_d.connector(width, 1e-6)
    target = "nvmm.models.multimodal.MultimodalModel"
    return {"_target_": target, "_partial_": True, **models}


def opened(
    folders: Mapping[str, HubFolder], model: Mapping[str, Any] | None
) -> dict[str, HubFolder]:
    """Return the folders of parts as the composed model takes them.

    A connector is read alone out of its folder. Beside one, or where the given model has a layer
    less than the folder, CLIP's last layer is left out, as LLaVA leaves it.
    """
    parts = dict(folders)
    if "connector" in parts:
        parts["connector"] = parts["connector"].connector()
    vision = parts.get("vision")
    if vision is not None and vision.format == "clip":
        if model is None:
            shorter = "connector" in parts
        else:
            layers = (model.get("vision") or {}).get("transformer", {}).get("num_layers")
            shorter = layers == vision.model()["transformer"]["num_layers"] - 1
        if shorter:
            parts["vision"] = vision.before_last_layer()
    return parts


def check_given(folders: Mapping[str, HubFolder], model: Mapping[str, Any]) -> None:
    """Compare a given model config with the sources' config.json, part by part.

    Raises ValueError naming every key that differs, with both values.
    """
    problems: list[str] = []
    for part, folder in folders.items():
        where = f"--from {part}={folder.path}: the given model"
        configured = part_of(model, part, where) if part else model
        derived = folder.model()
        derived |= {k: configured[k] for k in folder.unsaid() if k in configured}
        lines = mismatches(derived, configured, str(folder.path), "the given config")
        problems += [f"{part}: {line}" if part else line for line in lines]
    if problems:
        raise ValueError("the sources are not the given model:\n  " + "\n  ".join(problems))


def import_folders(
    folders: Mapping[str, HubFolder],
    model: Mapping[str, Any],
    constructor: Callable[..., Any],
    to: Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 1234,
    workers: int = 1,
) -> list[str]:
    """Write a weights-only checkpoint of ours; return the names that no source gave and that begin
    here as in a run.

    Cross-attention's blocks and the layers over windows are left out where no source gives them:
    the run that takes the checkpoint as its `init_from` starts them, and says so.

    Args:
        folders: part ("" for the whole model) -> folder.
        model: the model's config; constructor: its partial, to build it on the meta device.
        config: more of the config to save beside `model` (data, tokenizer).
        dtype: of the written weights; None keeps them.

    Raises ValueError listing every key that does not fit, before anything is written.
    """
    _check_tokenizers(folders, model)
    # 1. Every folder under our names; the tables account for each of their keys.
    converted = {
        part: folder.to_ours(part_of(model, part, "the model") if part else model)
        for part, folder in folders.items()
    }
    imported = Merged(
        [Renamed(ours, f"{part}." if part else "") for part, ours in converted.items()]
    )
    expected = parameters(constructor)
    # 2. A new connector, and the output layer that a base model lacks, start as a run would.
    missing = {name: tensor for name, tensor in expected.items() if name not in imported.spec}
    left_out = {name for name in missing if name.startswith(_STARTED_BY_THE_RUN)}
    missing = {name: tensor for name, tensor in missing.items() if name not in left_out}
    expected = {name: tensor for name, tensor in expected.items() if name not in left_out}
    first = next(iter(imported.spec.values()))
    source = Merged([imported, Initial(missing, seed, model, first.dtype)])
    compare_shapes(source.spec, expected, "the sources", "the model")
    # 3. The config that is saved beside the weights, and the record of where they come from.
    cast = Cast(source, dtype)
    saved = {
        "backend": "native",
        "seed": seed,
        "precision": {
            "_target_": "nvmm.parallel.setup.Precision",
            "dtype": "fp32" if next(iter(cast.spec.values())).dtype == torch.float32 else "bf16",
        },
        "tokenizer": None,
        "data": None,
        **(config or {}),
        "model": dict(model),
    }
    sources = {
        part: {
            "folder": str(folder.path),
            "format": folder.format,
            "config": folder.published(),
        }
        for part, folder in folders.items()
    }
    # 4. Weights, tokenizer and state.json, which completes the checkpoint.
    language_folder = next((folders[p] for p in ("", *PARTS[:1], *TOWERS) if p in folders), None)
    if language_folder is not None:
        given = language_folder.saved(model)
        saved |= {key: value for key, value in given.items() if saved[key] is None}
    with publish(to) as temporary:
        write_weights(temporary, cast, "import", workers)
        digest = None
        if language_folder is not None and copy_tokenizer(
            language_folder.tokenizer, temporary / "tokenizer"
        ):
            saved, digest = _with_tokenizer(saved, language_folder, to / "tokenizer")
        write_state(
            temporary,
            {
                "config": saved,
                "tokenizer_digest": digest,
                "sources": sources,
                "initialised": sorted(missing),
                "left_to_the_run": sorted(left_out),
                "dropped": [name for ours in converted.values() for name in ours.dropped]
                + [x for f in folders.values() for x in getattr(f.source, "left_out", ())],
            },
        )
    return sorted(missing)


def _check_tokenizers(folders: Mapping[str, HubFolder], model: Mapping[str, Any]) -> None:
    """Raise ValueError where two towers, which get the same ids, have two tokenizers."""
    digests = {}
    for folder in (folders[part] for part in TOWERS if part in folders):
        if (folder.path / "tokenizer.json").is_file():
            given = {"data": None, "tokenizer": None, "model": model, **folder.saved(model)}
            digests[folder.path] = _with_tokenizer(given, folder, folder.path)[1]
    if len(set(digests.values())) > 1:
        raise ValueError(f"{' and '.join(map(str, digests))} have two tokenizers, towers share one")


def _with_tokenizer(
    saved: Mapping[str, Any], source: HubFolder, final: Path
) -> tuple[dict[str, Any], str]:
    """Return the saved config with its tokenizer, and the tokenizer's digest.

    A sample builder is added if the tokenizer has ChatML's tokens, or the model is LLaVA's.
    """
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        copy_tokenizer(source.tokenizer, here)
        image_id = source.config.get("image_token_index", source.config.get("audio_token_id"))
        return _with_local_tokenizer(saved, here, final, image_id, source.format)


def _with_local_tokenizer(
    saved: Mapping[str, Any],
    here: Path,
    final: Path,
    image_id: int | None,
    format_name: str,
) -> tuple[dict[str, Any], str]:
    configured = dict(saved["tokenizer"] or {"_target_": "nvmm.data.samples.tokenizer.Tokenizer"})
    options = {k: v for k, v in configured.items() if k not in ("_target_", "path")}
    if not options:
        options = _tokenizer_options(here, image_id)
    tokenizer = Tokenizer(str(here), **options)
    out = {**saved, "tokenizer": configured | options | {"path": str(final.resolve())}}
    if out["data"] is None and tokenizer.token_id("<|im_start|>") is not None:
        hears = format_name == "audio_flamingo3"
        out["data"] = _sound_chat(saved["model"]) if hears else _chat(saved["model"])
    elif out["data"] is None and format_name in ("llava", "vila") and tokenizer.bos_id is not None:
        vision, out["data"] = saved["model"]["vision"], (data := _chat(saved["model"]))
        data["train"]["build"] |= {
            "template": option("template", "vicuna"),
            "tags": {"_target_": _TAGS, "variant": "none", "image_start": "", "image_end": ""},
            "max_tiles": 1,
            "pad": [int(255 * mean) for mean in vision["image_mean"]],
        }
    return out, tokenizer.digest


def _tokenizer_options(folder: Path, image_id: int | None) -> dict[str, Any]:
    """Return the tokens of a turn's end and of a picture: the folder's, or one that is added."""
    vocabulary = Tokenizer(str(folder), end_of_turn=_PLACEHOLDER, extra_tokens=[_PLACEHOLDER])
    ends = [token for token in _TURN_ENDS if vocabulary.token_id(token) is not None]
    if not ends:
        eos = [vocabulary.decode([vocabulary.eos_id], skip_special_tokens=False)]
        ends = eos if vocabulary.token_id(eos[0]) is not None else [_PLACEHOLDER]
    image = "" if image_id is None else vocabulary.decode([image_id], skip_special_tokens=False)
    if image != _PLACEHOLDER and vocabulary.token_id(image) == image_id is not None:
        return {"image_token": image, "end_of_turn": ends[0]}
    return {
        "image_token": _PLACEHOLDER,
        "end_of_turn": ends[0],
        "extra_tokens": [_PLACEHOLDER],
    }


def _chat(model: Mapping[str, Any]) -> dict[str, Any]:
    language = model.get("language", model)
    build: dict[str, Any] = {
        "_target_": "nvmm.data.samples.instruct.InstructBuilder",
        "_partial_": True,
        "template": option("template", "chatml"),
        "tags": {"_target_": _TAGS},
        "tokens_per_tile": 1,
    }
    if "vision" in model:
        size = model["vision"]["image_size"]
        grid = size // model["vision"]["patch_size"]
        side = -(-grid // model["connector"].get("downsample", 2))  # an odd grid is padded
        build |= {"tile_size": size, "tokens_per_tile": side * side}
    length = language.get("max_sequence_length", 4096)
    return {"sequence_length": length, "train": {"build": build}}


def _sound_chat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of conversations about sounds, in windows that fill the encoder."""
    encoder = model["encoders"]["audio"]["encoder"]
    front_end = option("front_end", "whisper")
    positions = encoder["max_source_positions"]
    seconds = 2 * positions * front_end["frame_hop"] / front_end["rate"]
    front_end |= {"bins": encoder["num_mel_bins"], "window": seconds, "hop": seconds}
    build = {
        "_target_": "nvmm.data.samples.sound_chat.SoundChatBuilder",
        "_partial_": True,
        "template": option("template", "chatml") | {"system": "You are a helpful assistant."},
        "front_end": front_end | {"most_windows": 20},
        "tokens_per_window": positions // encoder["pool"],
    }
    length = model["language"].get("max_sequence_length", 4096)
    return {"sequence_length": length, "train": {"build": build}}


def parameters(constructor: Callable[..., Any]) -> dict[str, Tensor]:
    """Return every parameter of a model, whole, as a meta tensor under its global name."""
    from nvmm.parallel.parameters import sharded_parameters

    with on_meta(constructor) as model:
        shapes = {p.name: p.global_shape for p in sharded_parameters(model)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextmanager
def on_meta(constructor: Callable[..., Any]) -> Iterator[Any]:
    """Build the whole model on the meta device, in a world of one rank."""
    from nvmm.parallel.setup import Chunk, Parallel, Precision, prepare_backend, shutdown

    prepare_backend()
    from megatron.core import parallel_state

    alone = not parallel_state.model_parallel_is_initialized()
    if alone:
        Parallel().initialize(seed=0, rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = constructor(chunk=Chunk(Parallel(), Precision(), meta=True))
        yield model
    finally:
        if alone:
            shutdown()


class Initial:
    """The values that a run from this seed would begin with, where no source gives any.

    They are a connector's and an output layer's. model: its config, for the spread of the linears;
    norms begin as ones, biases as zeros. Raises ValueError for other parameters.
    """

    def __init__(
        self, missing: Mapping[str, Tensor], seed: int, model: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.seed = seed
        self.model = model
        self.spec = {name: tensor.to(dtype) for name, tensor in missing.items()}
        known = ("connector.", "output_layer.", "language.output_layer.")
        others = [name for name in missing if not name.startswith(known)]
        if others:
            raise ValueError("no source gives " + ", ".join(others))

    def _std(self, name: str) -> float:
        language = self.model.get("language", self.model)
        part = self.model if name.startswith("connector.") else language
        key = "connector" if name.startswith("connector.") else "transformer"
        return float((part.get(key) or {}).get("init_method_std", 0.02))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield rows, drawn one by one, some megabytes at a time."""
        spec = self.spec[name]
        if spec.dim() == 1:
            yield torch.full(
                spec.shape, 1.0 if name.endswith("layer_norm_weight") else 0.0, dtype=spec.dtype
            )
            return
        rows, width = spec.shape
        step = max(1, _BLOCK // width)
        for first in range(0, rows, step):
            yield torch.stack(
                [
                    draw_row(self.seed, name, row, width, self._std(name)).to(spec.dtype)
                    for row in range(first, min(first + step, rows))
                ]
            )
