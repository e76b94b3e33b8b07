"""Reward models as Transformers' <Family>ForSequenceClassification: a decoder and `score.weight`.

The decoder's fields and rows are those of its family. Transformers reads the score at the rightmost
token that is not `pad_token_id`, so an export has a padding token that ends no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from nvmm.convert.formats import llama, mistral, nemotron, qwen2
from nvmm.convert.formats.config import only
from nvmm.convert.mapping import Row

TARGET = "nvmm.models.reward.RewardModel"
_HEAD = "score.weight"
ARCHITECTURES = {
    "LlamaForSequenceClassification": "llama_reward",
    "MistralForSequenceClassification": "mistral_reward",
    "NemotronForSequenceClassification": "nemotron_reward",
    "Qwen2ForSequenceClassification": "qwen2_reward",
}
"""Class of a config.json -> format."""


@dataclass(frozen=True)
class Reward:
    """The format of one family's reward models. family: the module of its decoders."""

    family: ModuleType

    def complete(self, hf: Mapping[str, Any], spec: Mapping[str, Tensor]) -> dict[str, Any]:
        """Add what the names and shapes tell, the number of outputs among it."""
        completed: dict[str, Any] = self.family.complete(hf, spec)
        if _HEAD in spec:
            completed["num_labels"] = spec[_HEAD].shape[0]
        return completed

    def to_model(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Turn config.json into our model config.

        The number of outputs is that of the head's rows, else of `id2label`, else Transformers'
        default of 2. Raises ValueError where rows and labels differ in number.
        """
        labels = hf.get("id2label")
        count = hf.get("num_labels") or len(labels or "ab")
        if labels is not None and len(labels) != count:
            raise ValueError(
                f"config.json: id2label has {len(labels)} labels, and the model {count} outputs"
            )
        only(hf, "problem_type", None, "regression")
        model: dict[str, Any] = self.family.to_model(hf)
        # Neither an output layer nor a tie to one is there.
        del model["share_embeddings_and_output_weights"]
        return {**model, "_target_": TARGET, "num_outputs": count}

    def from_model(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Turn our model config into config.json; ValueError for a model without a head."""
        if model.get("_target_") != TARGET:
            raise ValueError(
                f"--format of reward models needs model._target_={TARGET}, not"
                f" {model.get('_target_')}"
            )
        hf: dict[str, Any] = self.family.from_model(_language(model))
        count = model["num_outputs"]
        name = hf["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
        return hf | {
            "architectures": [name],
            "num_labels": count,
            "id2label": {str(number): f"LABEL_{number}" for number in range(count)},
            "label2id": {f"LABEL_{number}": number for number in range(count)},
            "problem_type": "regression",
        }

    def table(self, model: Mapping[str, Any], hf: Mapping[str, Any]) -> list[Row]:
        """Return the decoder's rows without lm_head, and the head's."""
        rows = self.family.table(_language(model), hf)
        decoder = [row for row in rows if row.ours != "output_layer.weight"]
        return [*decoder, Row("head.weight", (_HEAD,))]


FORMATS = {
    "llama_reward": Reward(llama),
    "mistral_reward": Reward(mistral),
    "nemotron_reward": Reward(nemotron),
    "qwen2_reward": Reward(qwen2),
}


def _language(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder as the language model that its family knows."""
    language = {key: value for key, value in model.items() if key != "num_outputs"}
    return {**language, "_target_": "nvmm.models.language.LanguageModel"}
