"""Old names of constructors, so that saved configs and users' YAMLs with them go on working."""

from __future__ import annotations

from typing import Any

MOVED = {
    "nvmm.checkpoint.Checkpoint": "nvmm.checkpoint.save.Checkpoint",
    "nvmm.data.chat.ChatTemplate": "nvmm.data.samples.chat.ChatTemplate",
    "nvmm.data.chat.ImageTags": "nvmm.data.samples.chat.ImageTags",
    "nvmm.data.forms.Caption": "nvmm.data.samples.forms.Caption",
    "nvmm.data.forms.Chat": "nvmm.data.samples.forms.Chat",
    "nvmm.data.forms.MultipleChoice": "nvmm.data.samples.forms.MultipleChoice",
    "nvmm.data.forms.Ocr": "nvmm.data.samples.forms.Ocr",
    "nvmm.data.instruct.InstructBuilder": "nvmm.data.samples.instruct.InstructBuilder",
    "nvmm.data.interleaved.Document": "nvmm.data.samples.forms.Document",
    "nvmm.data.retrieval.RetrievalBuilder": "nvmm.data.samples.retrieval.RetrievalBuilder",
    "nvmm.data.shards.Dataset": "nvmm.data.shards.dataset.Dataset",
    "nvmm.data.storage.Storage": "nvmm.data.shards.storage.Storage",
    "nvmm.data.tokenizer.Tokenizer": "nvmm.data.samples.tokenizer.Tokenizer",
    "nvmm.evaluation.benchmark.Benchmark": "nvmm.evaluation.benchmark.Questions",
    "nvmm.metrics.Logger": "nvmm.training.logger.Logger",
    "nvmm.modules.audio.AudioEncoder": "nvmm.modules.encoders.audio.AudioEncoder",
    "nvmm.modules.vision.VisionTransformer": "nvmm.modules.encoders.vision.VisionTransformer",
    "nvmm.optim.Optim": "nvmm.training.optim.Optim",
    "nvmm.parallel.fp8.Fp8": "nvmm.parallel.fp8_recipe.Fp8",
    "nvmm.trainer.Trainer": "nvmm.training.trainer.Trainer",
}
"""Every `_target_` that a config could name before it moved -> where it is now."""


def renamed(config: Any) -> Any:
    """Return a copy of a plain config in which every `_target_` and its keys have new names."""
    if isinstance(config, list):
        return [renamed(item) for item in config]
    if not isinstance(config, dict):
        return config
    copy = {key: renamed(value) for key, value in config.items()}
    if copy.get("_target_") in MOVED:
        copy["_target_"] = MOVED[copy["_target_"]]
    if "rope_scaling_factor" in copy or isinstance(copy.get("rope_scaling"), bool):
        copy = _rope(copy)
    if copy.get("_target_") == _TEMPLATE and "roles" not in copy:
        return _dialect(copy)
    return copy


_ROPE = "nvmm.modules.rope_scaling."


def _rope(old: dict[str, Any]) -> dict[str, Any]:
    """Return the present form of a language model that had three keys of its RoPE's scaling."""
    keys = ("rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor")
    new = {key: value for key, value in old.items() if key not in keys}
    llama3, divisor = old.get("rope_scaling"), old.get("seq_len_interpolation_factor")
    if llama3:
        new["rope_scaling"] = {
            "_target_": f"{_ROPE}Llama3",
            "factor": old.get("rope_scaling_factor", 8.0),
        }
    elif divisor is not None:
        new["rope_scaling"] = {"_target_": f"{_ROPE}Linear", "factor": divisor}
    return new


_TEMPLATE = "nvmm.data.samples.chat.ChatTemplate"


def _dialect(old: dict[str, Any]) -> dict[str, Any]:
    """Return the present form of a ChatTemplate that named its style."""
    style = old.get("style", "chatml")
    turn, end = old.get("turn_start", "<|im_start|>"), "{end}\n"
    new: dict[str, Any] = {"_target_": _TEMPLATE, "system": old.get("system")}
    if style == "pretraining":
        return new | {"roles": {"system": {}, "user": {}, "assistant": {}}, "separator": "\n"}
    suffixes = {"system": end, "user": end, "assistant": "\n"}
    new["roles"] = {
        role: {"prefix": f"{turn}{role}\n", "suffix": suffix} for role, suffix in suffixes.items()
    }
    new |= {"special_tokens": [turn], "supervise_suffix": old.get("supervise_newline", False)}
    return new | ({"bos": True} if style == "yi" else {})
