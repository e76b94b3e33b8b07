"""Texts of an exact number of tokens with sentences hidden at given depths."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm.data.samples.chat import IMAGE_MARKER
from nvmm.evaluation.benchmark import Settings
from nvmm.evaluation.items import count

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n(?=\S)")
_FILLERS = (" and", " so", ".", "\n", "a")
"""Short texts that make up for the last few tokens; one of them is a token in any vocabulary."""
_TRIES = 12


class Haystack:
    """The tokens of text files, repeated without end.

    Raises ValueError for files that are missing, hold no text, or have the marker of pictures.
    """

    def __init__(self, paths: Sequence[str], builder: Any) -> None:
        texts = []
        for path in paths:
            try:
                texts.append(Path(path).expanduser().read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"benchmark.haystack={path} is no text ({error})") from error
            if IMAGE_MARKER in texts[-1]:
                raise ValueError(
                    f"benchmark.haystack={path} has {IMAGE_MARKER}, which stands for a picture"
                )
        self.text = "\n\n".join(text.strip() for text in texts).strip() + "\n\n"
        self._words = builder.tokenizer
        self._ids = self._words.encode(self.text)
        if len(self._ids) < 2:
            raise ValueError(f"benchmark.haystack={list(paths)} has no text")

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def digest(self) -> str:
        """The sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def part(self, start: int, size: int) -> str:
        """Return the text of `size` tokens, from the sentence behind token `start` on."""
        ids = self._ids
        first = start % len(ids)
        span = ids[first:] + ids * ((size + first + _SKIPPED) // len(ids) + 1)
        text = self._words.decode(span[:_SKIPPED])
        end = _SENTENCE_END.search(text) if first else None
        # Without a sentence's end near by, it begins in the middle of one.
        skipped = 0 if end is None else len(self._words.encode(text[: end.end()]))
        if skipped > _SKIPPED // 2:
            skipped = 0
        return self._words.decode(span[skipped : skipped + size]).lstrip()


_SKIPPED = 400
"""Tokens among which the beginning of a sentence is looked for."""


def refuse_max_new_tokens(settings: Settings) -> None:
    """Raise ValueError where the command sets `max_new_tokens`, which the lengths contain."""
    if settings.max_new_tokens is not None:
        raise ValueError("max_new_tokens: set benchmark.max_new_tokens, which lengths contain")


def check_lengths(lengths: Sequence[int], model: Restored) -> None:
    """Raise ValueError for a length beyond the builder's or the model's longest sequence."""
    longest = min(model.builder.sequence_length, model.max_sequence_length)
    if max(lengths) > longest:
        raise ValueError(
            f"benchmark.lengths: {max(lengths)} tokens, and sequence_length={longest}; add"
            f" sequence_length={max(lengths)}"
        )


def hidden(text: str, needles: Sequence[tuple[float, str]]) -> str:
    """Return a text with sentences (depth, sentence) in it.

    Each stands behind `depth` of the text, in [0, 1], moved back to the end of a sentence: 0 is the
    very beginning, 1 the very end. Several at one place keep their order.
    """
    ends = [0, *(end.end() for end in _SENTENCE_END.finditer(text))]
    places: dict[int, list[str]] = {}
    for depth, needle in needles:
        place = len(text) if depth >= 1 else ends[bisect_right(ends, depth * len(text)) - 1]
        places.setdefault(place, []).append(needle)
    parts, done = [], 0
    for place, some in sorted(places.items()):
        parts += [text[done:place].strip(), *some]
        done = place
    return " ".join(part for part in (*parts, text[done:].strip()) if part)


def exactly(
    length: int, write: Callable[[int, str], str], builder: Any, most: int | None = None
) -> str:
    """Return a question whose prompt has `length` tokens, template and all.

    write: gives the question from a size of its haystack (tokens, or sentences) and a filler that
        it puts behind the haystack. most: the largest size; None: `length`.

    Raises ValueError where even the empty haystack is longer, or no filler gives the number.
    """

    def tokens(size: int, filler: str = "") -> int:
        return count(write(size, filler), builder)

    least = tokens(0)
    if least > length:
        raise ValueError(f"a question without a haystack has {least} tokens, more than {length}")
    # 1. The largest haystack that fits: the slope is known after two sizes.
    low, high = 0, length if most is None else most
    below = least
    for _ in range(4 * _TRIES):
        if high - low < 2:
            break
        slope = (below - least) / low if low else None
        guess = low + int((length - below) / slope) if slope else (length - least) // 2 or 1
        middle = min(max(guess, low + 1), high - 1)
        found = tokens(middle)
        if found <= length:
            low, below = middle, found
        else:
            high = middle
    # 2. A filler for what is left.
    missing = length - below
    if not missing:
        return write(low, "")
    for filler in _FILLERS:
        times = missing
        for _ in range(_TRIES):
            found = tokens(low, filler * times)
            if found == length:
                return write(low, filler * times)
            if found < length and times > 4 * missing:
                break
            times = max(1, times - (found - length))
    raise ValueError(f"no filler makes a prompt of {length} tokens, {missing} more than {below}")


def recall(*, prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that occur in the prediction, in any case, as RULER does."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers) if answers else 0.0
