"""Interleaved documents as VILA trains them (arXiv:2312.07533 section 2.3, released code v1.0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from nvmm.data.samples.chat import DOCUMENT, IMAGE_MARKER, Turn
from nvmm.data.samples.forms import Document, Example
from nvmm.data.samples.images import ImageOrSize
from nvmm.data.samples.record import Record


@dataclass(frozen=True)
class Interleaved(Document):
    """A document of MMC4: `text_list`, and `image_info` with `matched_text_index`.

    An image stands immediately before its sentence, with no white space on either side of it; all
    text is trained. `<image>` written in a sentence is text, in upper case. A blank sentence is
    left out, and so is an image behind which no text follows.

    separator: between sentences.
    max_images: the first so many of `image_info`, in the order in which it lists them.
    """

    separator: str = " "
    max_images: int = 6
    names: ClassVar[tuple[str, ...]] = ("text_list", "image_info")

    def __post_init__(self) -> None:
        if self.max_images < 1:
            raise ValueError(f"form.max_images={self.max_images} must be at least 1")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        sentences = record.sequence("text_list")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise record.bad("text_list must hold texts alone")
        places = self._places(record, len(sentences))
        if len(places) != len(images):
            raise record.bad(f"image_info lists {len(places)} images, the sample {len(images)}")
        chosen = sorted(range(len(places))[: self.max_images], key=places.__getitem__)
        pieces, order = [], []
        for number, sentence in enumerate(sentences):
            before = [image for image in chosen if places[image] == number]
            text = sentence.strip().replace(IMAGE_MARKER, IMAGE_MARKER.upper())
            if before or text:
                pieces.append(IMAGE_MARKER * len(before) + text)
                order += before
        text = self.separator.join(pieces)
        for spaced in (f"{IMAGE_MARKER}{self.separator}", f"{self.separator}{IMAGE_MARKER}"):
            # A blank sentence may leave several in a row.
            while spaced in text and self.separator:
                text = text.replace(spaced, IMAGE_MARKER)
        while text.endswith(IMAGE_MARKER):
            text = text.removesuffix(IMAGE_MARKER)
            order.pop()
        if not text:
            raise record.bad("the document has no text")
        return Example([Turn(DOCUMENT, text)], [images[number] for number in order], [])

    def _places(self, record: Record, num_sentences: int) -> list[int]:
        """Return the sentence that each image comes before; BadSample for one that is not there."""
        infos = record.get("image_info") or []
        if not isinstance(infos, list):
            raise record.bad(f"image_info must be a list, got {infos!r}")
        places = []
        for number, info in enumerate(infos):
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if type(place) is not int or not 0 <= place < num_sentences:
                raise record.bad(f"image_info[{number}] matches none of {num_sentences} sentences")
            places.append(place)
        return places
