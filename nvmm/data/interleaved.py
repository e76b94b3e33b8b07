"""Documents, all of whose text is trained: plain text, or text with pictures between.

Flamingo's and MMC4's idea: the model predicts the text after a picture from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nvmm.data.chat import DOCUMENT, IMAGE_MARKER, Turn
from nvmm.data.forms import Example
from nvmm.data.images import Picture
from nvmm.data.record import Record


@dataclass(frozen=True)
class Document:
    """One of three forms:

    - `texts` and `images` of one length, in each place one of them null (OBELICS);
    - `text_list`, and `image_info` whose `matched_text_index` names the sentence that a picture
      comes before (MMC4);
    - `text` alone, with `<image>` where its pictures go.

    Picture 0 is that of the first `image_info`, or of the first image that is not null. What is
    longer than data.sequence_length is cut at the end, whole pictures too.

    separator: between texts.
    """

    separator: str = "\n"
    names: ClassVar[tuple[str, ...]] = ("text", "texts", "images", "text_list", "image_info")

    def __call__(self, record: Record, pictures: Sequence[Picture]) -> Example:
        if record.get("texts") is not None:
            parts = self._alternating(record)
        elif record.get("text_list") is not None:
            parts, order = self._matched(record)
            if len(order) != len(pictures):
                raise record.bad(
                    f"image_info lists {len(order)} images, the sample {len(pictures)}"
                )
            pictures = [pictures[number] for number in order]
        else:
            parts = [record.text("text")]
        text = self.separator.join(parts)
        if not text.replace(IMAGE_MARKER, "").strip():
            raise record.bad("the document has no text")
        return Example([Turn(DOCUMENT, text)], pictures, [])

    def _alternating(self, record: Record) -> list[str]:
        texts, images = record.sequence("texts"), record.sequence("images")
        if len(texts) != len(images):
            raise record.bad(f"{len(texts)} texts and {len(images)} images; they must alternate")
        parts = []
        for text, image in zip(texts, images, strict=True):
            if (text is None) == (image is None):
                raise record.bad("each place of texts and images needs one of the two")
            parts.append(IMAGE_MARKER if text is None else self._plain(record, text))
        return parts

    def _matched(self, record: Record) -> tuple[list[str], list[int]]:
        """The parts of the document, and the numbers of the pictures between them."""
        sentences = [self._plain(record, text) for text in record.sequence("text_list")]
        infos = record.get("image_info") or []
        before: list[list[int]] = [[] for _ in sentences]
        for number, info in enumerate(infos):
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(sentences):
                raise record.bad(f"image_info[{number}] matches none of {len(sentences)} sentences")
            before[place].append(number)
        parts = []
        for text, numbers in zip(sentences, before, strict=True):
            parts += [*[IMAGE_MARKER] * len(numbers), text]
        return parts, [number for numbers in before for number in numbers]

    def _plain(self, record: Record, text: Any) -> str:
        plain = record.checked_text("text", text)
        if IMAGE_MARKER in plain:
            raise record.bad(f"{IMAGE_MARKER} is written in a text")
        return plain
