"""Ways to word a prompt and its answer, one of which is drawn for every clip in every pass.

All texts are config (Audio Flamingo, arXiv:2402.01831, whose released code draws them so).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nvmm.config.choices import require

Rewritten = Literal["as_is", "one_sentence", "sentences", "labels", "shuffled_labels"]
_BETWEEN_LABELS = ", "


@dataclass(frozen=True)
class Augmentation:
    """One way to word a clip.

    prompt: stands in the place of the record's. `{labels}` becomes "1 label", "2 labels" ..., as
        many as its answer has.
    replace: texts of the record's prompt -> what stands for them.
    options: stands behind the prompt of the clip that is asked about, and of no earlier one; ""
        for nothing. `{options}` becomes the labels to choose from.
    separator: between two of them.
    labels: those labels, in this order; null: the record's `options`.
    sort: put them in alphabetical order.
    closed: write them only where every label of the answer is one of them.
    answer: as_is; one_sentence: full stops become semicolons, but the last; sentences: semicolons
        become full stops; labels: without a full stop at the end; shuffled_labels: those between
        commas in a drawn order.
    """

    prompt: str | None = None
    replace: Mapping[str, str] = field(default_factory=dict)
    options: str = ""
    separator: str = ".\n - "
    labels: Sequence[str] | None = None
    sort: bool = True
    closed: bool = False
    answer: Rewritten = "as_is"

    def __post_init__(self) -> None:
        require("augmentations.answer", self.answer, Rewritten)
        if self.options and self.options.count("{options}") != 1:
            raise ValueError(f"augmentations.options={self.options!r} must have {{options}} once")
        if self.prompt is not None and self.replace:
            raise ValueError(
                f"augmentations.replace={dict(self.replace)} does nothing beside prompt="
                f"{self.prompt!r}, which stands for the record's"
            )
        if not self.options and (self.labels is not None or self.closed):
            raise ValueError(
                f"augmentations.labels={self.labels} and closed={self.closed} do nothing without"
                " augmentations.options, the text that lists them"
            )

    def prompted(self, prompt: str, answer: str | None) -> str:
        """Return the prompt without its options.

        Raises ValueError where it counts the labels of an answer that is not there.
        """
        if self.prompt is None:
            for old, new in self.replace.items():
                prompt = prompt.replace(old, new)
            return prompt
        if "{labels}" not in self.prompt:
            return self.prompt
        if answer is None:
            raise ValueError("the prompt says how many labels its answer has, and there is none")
        count = len(_labels(answer))
        return self.prompt.replace("{labels}", f"{count} label{'' if count == 1 else 's'}")

    def choices(self, given: Sequence[str], answer: str | None) -> str:
        """Return the text of the options, "" where it writes none.

        given: the record's. Raises ValueError where it needs some and there are none.
        """
        if not self.options:
            return ""
        labels = list(given if self.labels is None else self.labels)
        if not labels:
            raise ValueError("the prompt lists the options, and the record has none")
        if self.closed and (answer is None or not {*_labels(answer)} <= {*labels}):
            return ""
        listed = self.separator.join(sorted(labels) if self.sort else labels)
        return self.options.replace("{options}", listed)

    def answered(self, answer: str, *key: str) -> str:
        """Return the answer as it is trained; `key` decides a drawn order."""
        answer = answer.strip()
        if self.answer == "one_sentence":
            before, stop, behind = answer.rpartition(".")
            return before.replace(".", ";") + stop + behind
        if self.answer == "sentences":
            return answer.replace(";", ".")
        if self.answer == "labels":
            return answer.removesuffix(".")
        if self.answer == "shuffled_labels":
            labels = _labels(answer)
            places = sorted(range(len(labels)), key=lambda n: draw(*key, "label", str(n)))
            return _BETWEEN_LABELS.join(labels[n] for n in places)
        return answer


def _labels(answer: str) -> list[str]:
    """Return the labels of an answer such as "a dog, a cat."."""
    return answer.strip().removesuffix(".").split(_BETWEEN_LABELS)


@dataclass(frozen=True)
class Augmentations:
    """Ways to word clips, and how often each is drawn.

    known: name -> way. shares: name -> probability, which sum to 1; empty: clips stay as they are.

    Raises ValueError for a share of no known way, and for shares that are no probabilities.
    """

    known: Mapping[str, Augmentation]
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            if name not in self.known:
                listed = ", ".join(sorted(self.known)) or "there is none"
                raise ValueError(f"build.augment.{name} is no key of build.augmentations: {listed}")
            if not 0 <= share <= 1:
                raise ValueError(f"build.augment.{name}={share} must be in [0, 1]")
        if self.shares and abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(
                f"build.augment={dict(self.shares)} must sum to 1, not {sum(self.shares.values())}"
            )

    def drawn(self, *key: str) -> Augmentation:
        """Return a way that `key` alone decides."""
        place = draw(*key, "augment")
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return self.known[name]
        return self.likeliest  # There are none, or their sum is rounded.

    @property
    def likeliest(self) -> Augmentation:
        """The most probable way, the first of several."""
        name = max(self.shares, key=lambda each: self.shares[each], default=None)
        return Augmentation() if name is None else self.known[name]


def draw(*key: str) -> float:
    """Return a number in [0, 1) that `key` alone decides."""
    content = "\0".join(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
