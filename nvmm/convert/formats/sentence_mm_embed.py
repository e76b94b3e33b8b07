"""MM-Embed for sentence-transformers: copied into exported folders, run by `trust_remote_code`.

It uses nothing of nvmm: the import below becomes one of the file beside it. One
module reads texts, pictures and both, and gives unit vectors.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules.input_module import InputModule
from transformers import AutoProcessor

from nvmm.convert.formats.modeling_mm_embed import MMEmbedModel

PREFIX, SUFFIX = "Instruct: ", "\nQuery: "
KINDS = ("text", "image", ("image", "text"))


class MMEmbedSentences(InputModule):
    """The model and its processor as sentence-transformers' only module."""

    def __init__(self, auto_model: MMEmbedModel, processor: Any, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.auto_model = auto_model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_seq_length = processor.max_length

    @property
    def modalities(self) -> list[Any]:
        """Texts, pictures and both; a batch of several kinds is called a message."""
        return [*KINDS, "message"]

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return the model's inputs; a picture may be the path of a file that ends as pictures do.

        Raises ValueError for a prompt of another form than the model's, and other kinds of inputs.
        """
        instruction = None
        if prompt:
            if not (prompt.startswith(PREFIX) and prompt.endswith(SUFFIX)):
                raise ValueError(
                    f"a prompt must be {PREFIX!r}, an instruction, {SUFFIX!r}: {prompt!r}"
                )
            instruction = prompt.removeprefix(PREFIX).removesuffix(SUFFIX)
        items = [_opened(item) for item in inputs]
        return dict(self.processor(items, instruction=instruction, max_length=self.max_seq_length))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add sentence_embedding, unit vectors [b, h]."""
        names = ("input_ids", "attention_mask", "pool_mask", "pixel_values")
        inputs = {name: features[name] for name in names if name in features}
        output = self.auto_model(**inputs)
        return features | {
            "sentence_embedding": output.pooler_output,
            "token_embeddings": output.last_hidden_state,
        }

    def get_embedding_dimension(self) -> int:
        """Return the width of a vector."""
        return int(self.auto_model.config.hidden_size)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the folder's model, processor and code. Raises ValueError for one of the hub's."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no local folder whose code could be copied")
        self.auto_model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        for file in [*self.folder.glob("*.py"), self.folder / "processor_config.json"]:
            shutil.copy(file, Path(output_path) / file.name)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> MMEmbedSentences:
        """Load the folder's model and processor."""
        options = {
            key: kwargs[key] for key in ("token", "revision", "local_files_only") if key in kwargs
        }
        model = MMEmbedModel.from_pretrained(
            model_name_or_path, **options, **(kwargs.get("model_kwargs") or {})
        )
        processor = AutoProcessor.from_pretrained(
            model_name_or_path, trust_remote_code=True, **options
        )
        return cls(model, processor, Path(model_name_or_path))


def _opened(item: Any) -> Any:
    """Return an input with its picture opened."""
    kind = infer_modality(item, supported_modalities=list(KINDS))
    if kind not in KINDS:
        raise ValueError(f"an input must be a text, a picture or both, got {kind}: {item!r}")
    if isinstance(item, dict) and isinstance(item.get("image"), str):
        return {**item, "image": Image.open(Path(item["image"]))}
    if isinstance(item, str) and kind == "image":
        return Image.open(Path(item))
    return item
