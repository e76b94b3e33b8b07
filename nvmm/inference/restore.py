"""A checkpoint as a model that answers, at any tensor and pipeline parallel size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm.config.compose import instantiate
from nvmm.config.rules.all import violations
from nvmm.inference.trust import require_trusted
from nvmm.parallel import environment

if TYPE_CHECKING:
    from torch.nn import Module

    from nvmm.batch import Sample
    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.tokenizer import Tokenizer
_KERNELS = "nvmm.kernels.library.Kernels"


@dataclass(frozen=True)
class Restored:
    """A checkpoint ready to answer.

    path: the checkpoint's folder; model: this rank's one chunk, in eval mode; builder: the sample
    builder that trained it.
    """

    path: Path
    model: list[Module]
    tokenizer: Tokenizer
    builder: Builder

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return self.builder.stop_ids

    def texts(
        self, prompts: list[Sample], max_new_tokens: int, config: Mapping[str, Any]
    ) -> list[str]:
        """An answer to each prompt; config: temperature, top_p, seed, use_cache."""
        from nvmm.inference.decoding import generate

        outputs = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_id,
            temperature=config["temperature"],
            top_p=config["top_p"],
            seed=config["seed"],
            use_cache=config["use_cache"],
        )
        return [self.tokenizer.decode(tokens).strip() for tokens in outputs]


def restore(config: Mapping[str, Any], builder_changes: Mapping[str, Any]) -> Restored:
    """Build the model of `config["checkpoint"]` in this command's layout and load its weights.

    Sequence and virtual pipeline parallelism are off: decoding has one new token a step.
    builder_changes: parameters of the saved sample builder to exchange.

    Raises ValueError when the checkpoint is missing or incomplete, its config is not trusted, the
    layout does not fit the model, or the tokenizer on disk is not the checkpoint's.
    """
    from nvmm.parallel.setup import device_type, prepare_backend

    prepare_backend()
    from nvmm.checkpoint.files import find, read_state
    from nvmm.checkpoint.load import load_scales, load_weights
    from nvmm.modules.fp8_scales import Scaling

    path = find(config["checkpoint"]["path"])
    state = read_state(path)
    saved = state["config"]
    build = _builder_config(saved, builder_changes)
    sections = {"model": saved["model"], "tokenizer": dict(saved["tokenizer"]), "build": build}
    sections["precision"] = config["precision"] or saved["precision"]
    sections["lora"] = saved.get("lora")
    sections["kernels"] = {
        "_target_": _KERNELS,
        **(saved.get("kernels") or {}),
        **(config.get("kernels") or {}),
    }
    if config["tokenizer"]["path"] is not None:
        sections["tokenizer"]["path"] = config["tokenizer"]["path"]
    if not config["trust_config"]:
        require_trusted(sections, path)
    layout = config["parallel"] | {
        "sequence_parallel": False,
        "virtual_pipeline_model_parallel_size": None,
        "recompute_granularity": None,
    }
    size = layout.get("context_parallel_size", 1)
    if size != 1:
        raise ValueError(
            f"parallel.context_parallel_size={size} must be 1 in evaluation and generation"
        )
    backend = config["backend"] or saved["backend"]
    problems = violations(
        {"model": saved["model"], "parallel": layout, "backend": backend}, environment.world_size()
    )
    if problems:
        raise ValueError("; ".join(str(problem) for problem in problems))

    tokenizer = instantiate(sections["tokenizer"])
    if tokenizer.digest != state["tokenizer_digest"]:
        raise ValueError(
            f"tokenizer.path={tokenizer.path} is not the tokenizer that {path} was trained with"
            f" (digest {tokenizer.digest[:12]}, not {state['tokenizer_digest'][:12]});"
            " name its folder with tokenizer=DIR"
        )
    sequence_length = config["sequence_length"] or saved["data"]["sequence_length"]
    builder = _build(build, tokenizer=tokenizer, sequence_length=sequence_length)
    parallel = instantiate(layout)
    instantiate(sections["kernels"]).install(device_type(), log=environment.rank() == 0)
    parallel.initialize(seed=config["seed"])
    constructor = instantiate(sections["model"])
    precision = instantiate(sections["precision"])
    model = [constructor(chunk=chunk) for chunk in parallel.chunks(precision, backend)]
    if sections["lora"] is not None:
        instantiate(sections["lora"]).attach(model)
    for chunk in model:
        chunk.eval().requires_grad_(False)
    base = config.get("base")
    missing = load_weights(path, model, Path(base).expanduser() if base else None)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} parameters: {', '.join(missing[:10])}")
    fresh = load_scales(path, Scaling(model, precision.fp8))
    if fresh:
        raise ValueError(
            f"{path} lacks {len(fresh)} FP8 scales ({fresh[0]} ...); use the precision that it was"
            " trained with, precision=bf16, or another precision.fp8.recipe"
        )
    return Restored(path, model, tokenizer, builder)


def _builder_config(saved: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    train = (saved.get("data") or {}).get("train") or {}
    if not isinstance(train.get("build"), Mapping):
        raise ValueError("the checkpoint's data.train.build names no sample builder to ask with")
    return _merged(train["build"], changes)


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{name: _merged(base.get(name), value) for name, value in changes.items()}}


def _build(node: Mapping[str, Any], **options: Any) -> Any:
    partial: Callable[..., Any] = instantiate(node)
    try:
        builder = partial(**options)
    except TypeError as error:
        raise ValueError(f"the sample builder does not take its parameters: {error}") from error
    return builder
