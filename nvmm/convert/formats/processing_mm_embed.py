"""MM-Embed's inputs: copied into exported folders, where `trust_remote_code` runs it.

It uses nothing of nvmm, and no torchvision: PyTorch makes a picture's pixels, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

TEMPLATE = "Instruct: {instruction}\nQuery: "
Masking = Literal["sentence_transformers", "nv_embed", "mm_embed", "none"]


class MMEmbedProcessor(ProcessorMixin):
    """Texts, pictures and both as input_ids, attention_mask, pool_mask, pixel_values.

    tokenizer: of the folder. image_token_id: a place of a picture; image_token: its text.
    image_seq_length: tokens of a picture; image_size: side of a picture in pixels; image_mean,
    image_std: of pixels in [0, 1]. masking: which tokens of an instruction are not pooled, as
    `data.train.build.masking` of nvmm has it. max_length: longest sequence; longer ones lose the
    end of their text.

    Raises ValueError for another masking.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        image_token_id: int = 0,
        image_token: str = "",
        image_seq_length: int = 576,
        image_size: int = 336,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        bos_token_id: int | None = None,
        eos_token_id: int = 2,
        masking: Masking = "mm_embed",
        max_length: int = 512,
        **kwargs: Any,
    ) -> None:
        if masking not in get_args(Masking):
            raise ValueError(f"masking={masking} must be one of {', '.join(get_args(Masking))}")
        self.image_token_id, self.image_token = image_token_id, image_token
        self.image_seq_length, self.image_size = image_seq_length, image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.masking, self.max_length = masking, max_length
        super().__init__(tokenizer, **kwargs)

    def __call__(  # type: ignore[override]
        self, items: Any, instruction: str | None = None, max_length: int | None = None
    ) -> BatchFeature:
        """Return the model's inputs of one item or several, padded on the right.

        items: each a text, a PIL image, or a dict of "text" and "image", or of one of them.
        instruction: put before every item; None for documents.

        Raises ValueError for another kind of item, a text with the picture's token, and a picture
        that does not fit into max_length.
        """
        if not isinstance(items, list | tuple):
            items = [items]
        parts = [_parts(item) for item in items]
        longest = max_length or self.max_length
        rows = [self._ids(text, image is not None, instruction, longest) for text, image in parts]
        size = max(len(ids) for ids, _ in rows)
        shape = len(rows), size
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full(shape, self.eos_token_id if pad is None else pad)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        pool_mask = torch.zeros(shape, dtype=torch.long)
        for number, (ids, start) in enumerate(rows):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            attention_mask[number, : len(ids)] = 1
            pool_mask[number, start : len(ids)] = 1
        data = {"input_ids": input_ids, "attention_mask": attention_mask, "pool_mask": pool_mask}
        images = [image for _, image in parts if image is not None]
        if images:
            data["pixel_values"] = torch.stack([self.pixels(image) for image in images])
        return BatchFeature(data)

    def pixels(self, image: Image.Image) -> Tensor:
        """Turn a picture into normalised pixels, fp32 [3, side, side]: a plain bicubic resize."""
        image = _upright(image)
        values = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
        values = values.permute(2, 0, 1)
        side = self.image_size
        if tuple(values.shape[1:]) != (side, side):
            values = torch.nn.functional.interpolate(
                values[None], size=(side, side), mode="bicubic", antialias=True
            )[0]
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return (values.expand(3, -1, -1).float() / 255 - mean) / std

    def _ids(
        self, text: str, has_image: bool, instruction: str | None, longest: int
    ) -> tuple[list[int], int]:
        """Return a row's ids, and the place of its first pooled token."""
        prefix = TEMPLATE.format(instruction=instruction) if instruction else ""
        if self.image_token and self.image_token in prefix + text:
            raise ValueError(f"a text has {self.image_token}, which stands for a picture")
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        if has_image:
            before = [*begin, *self._encode(prefix)]
            if len(before) + self.image_seq_length > longest - 1:
                raise ValueError(
                    f"a picture of {self.image_seq_length} tokens behind {len(before)} and before"
                    f" EOS does not fit into max_length={longest}"
                )
            places = [self.image_token_id] * self.image_seq_length
            ids = [*before, *places, *self._encode(f"\n{text}")]
        else:
            ids = [*begin, *self._encode(prefix + text)]
        ids = [*ids[: longest - 1], self.eos_token_id]
        start = 0
        if instruction and self.masking == "nv_embed":
            start = len(self._encode(prefix))
        elif instruction and self.masking == "sentence_transformers":
            start = len(begin) + len(self._encode(prefix))
        elif instruction and self.masking == "mm_embed":
            start = len(begin) + len(self._encode(prefix.removesuffix("\nQuery: "))) + 1
        return ids, min(start, len(ids) - 1)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _parts(item: Any) -> tuple[str, Image.Image | None]:
    """Return an item's text and picture."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, Image.Image):
        return "", item
    if isinstance(item, dict) and item and not set(item) - {"text", "image"}:
        text, image = item.get("text"), item.get("image")
        if isinstance(text, str | None) and isinstance(image, Image.Image | None):
            return text or "", image
    raise ValueError(
        "an item must be a text, a PIL image or a dict of text and image, got"
        f" {type(item).__name__} {item if isinstance(item, dict) else ''}"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Return a picture as training decodes it: upright, RGB or L, white where transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        clear = image.info.get("transparency")
        return Image.fromarray(
            grey if clear is None else np.where(values == clear, np.uint8(255), grey)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode[0] in "IF":
        raise ValueError(
            f"a picture of mode {image.mode} has no defined range; convert it to 8 bits"
        )
    return image.convert("RGB")
