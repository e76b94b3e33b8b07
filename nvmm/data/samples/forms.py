"""Forms read the turns of a sample: conversations, questions, captions, choices, boxed words.

A form turns a `Record` and its images into an `Example`; `names` are the fields it reads. Where
a question holds no `<image>`, its images come first.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from nvmm.config.choices import require
from nvmm.data.samples.chat import DOCUMENT, IMAGE_MARKER, Turn
from nvmm.data.samples.images import ImageOrSize
from nvmm.data.samples.passages import Contexts
from nvmm.data.samples.record import Record, num_named

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
TOOL_RESULT = "<tool_response>\n{text}\n</tool_response>"
"""A tool's result in the turn of a user, as Qwen's template writes it."""
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_UNREAD_PARTS = (
    *("tool_calls", "function_call", "video", "videos", "audio", "audios"),
    *("refusal", "reasoning_content", "reasoning", "thinking"),
)
"""Keys of a turn that would be lost, as nothing reads them."""
_UNREAD_BESIDE = ("system", "tools", "functions", "history")
"""Keys beside the turns that would be lost."""
_CONTENTS = ("question", "conversations", "messages")
_TRAINED = ("weight", "loss", "train", "trainable", "loss_weight")
"""Keys of a turn that say whether it is trained."""
Choice = Literal["heaviest", "drawn"]
AnswerIs = Literal["letter", "number", "choice"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    """A sample to render.

    turns: they have one `<image>` for each of `images`. accepted: every right answer to the last
    turn. contexts: what the answer rests on; their turn is put in when the sample is made to fit.
    whole: whether the turns are never cut.
    """

    turns: list[Turn]
    images: Sequence[ImageOrSize]
    accepted: list[str]
    contexts: Contexts | None = None
    whole: bool = False


class Form(Protocol):
    """A function from the fields of a sample to its conversation; `names` are these fields."""

    names: ClassVar[tuple[str, ...]]

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example: ...


def asked(question: str, answer: str | None, num_images: int) -> list[Turn]:
    """Return a question with its images as a turn, and the answer where there is one."""
    if IMAGE_MARKER not in question:
        question = f"{IMAGE_MARKER}\n" * num_images + question
    answers = [] if answer is None else [Turn("assistant", answer)]
    return [Turn("user", question), *answers]


@dataclass(frozen=True)
class Chat:
    """Turns (`conversations` or `messages`), or `question` with `answer` or `answers`.

    A turn's text may be a list of parts (`{"type": "text"}`, `{"type": "image"}`), as in OpenAI's
    API; one of `weight` 0 is not trained. The result of a tool stands in a user's turn.

    An answer is a text or `{"answer": text}` (VQAv2); `weights` go with `answers`, 1 each by
    default, and those of equal answers add up.

    choice: the answer that is trained: heaviest (the first on a tie), or drawn, by weight and
        always the same for a key.
    """

    choice: Choice = "heaviest"
    names: ClassVar[tuple[str, ...]] = (
        "conversations",
        "messages",
        "question",
        "answer",
        "answers",
        "weights",
    )

    def __post_init__(self) -> None:
        require("form.choice", self.choice, Choice)

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        check_beside(record)
        given = [name for name in _CONTENTS if record.get(name) is not None]
        if len(given) > 1:
            raise record.bad(
                f"it has {' and '.join(given)}; leave out what is not to be trained by build.unread"
            )
        if given == ["question"]:
            answers, weights = self._answers(record)
            answer = self._choose(answers, weights, record) if answers else None
            question = record.text("question")
            return Example(asked(question, answer, len(images)), images, answers)
        turns = self._turns(record)
        last = turns[-1]
        return Example(turns, images, [last.text] if last.role == "assistant" else [])

    def _turns(self, record: Record) -> list[Turn]:
        """Return the turns of a conversation; raise BadSample where it is malformed."""
        messages = record.get("conversations")
        if messages is None:
            messages = record.get("messages")
        if messages is None:
            raise record.missing("conversations, messages or question")
        return turns_of(record, messages)

    def _answers(self, record: Record) -> tuple[list[str], list[float]]:
        """Return the accepted answers and their weights; raise BadSample where they disagree."""
        answers = record.get("answers")
        if answers is None and not record.maps("answers"):
            answers = record.get("answer")
        if answers is None:
            return [], []
        answers = answers if isinstance(answers, list) else [answers]
        texts = [
            record.checked_text(
                "answer", answer.get("answer") if isinstance(answer, dict) else answer
            )
            for answer in answers
        ]
        weights = record.get("weights")
        weights = [1.0] * len(texts) if weights is None else weights
        if not isinstance(weights, list) or len(weights) != len(texts):
            raise record.bad(f"weights must be a list of {len(texts)} numbers, got {weights!r}")
        if not all(_is_number(weight) and weight >= 0 for weight in weights):
            raise record.bad(f"weights {weights!r} must be numbers from 0 on")
        return texts, weights

    def _choose(self, answers: list[str], weights: list[float], record: Record) -> str:
        """Return the answer to train; equal answers count with the sum of their weights."""
        sums: dict[str, float] = {}
        for answer, weight in zip(answers, weights, strict=True):
            sums[answer] = sums.get(answer, 0.0) + weight
        total = sum(sums.values())
        if total <= 0:
            raise record.bad("every answer has weight 0")
        if self.choice == "heaviest":
            return max(sums, key=lambda answer: sums[answer])
        digest = hashlib.blake2b(record.key.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64 * total
        return list(sums)[bisect.bisect(list(itertools.accumulate(sums.values())), place)]


def check_beside(record: Record, read: Sequence[str] = ()) -> None:
    """Raise BadSample for keys beside a record's turns that would be lost, but for `read`."""
    lost = record.lost([key for key in _UNREAD_BESIDE if key not in read])
    if lost:
        raise record.bad(
            f"{', '.join(lost)} beside the turns is not read; make it a turn, or leave it out"
            f" by build.unread=[{','.join(lost)}]"
        )


def turns_of(record: Record, messages: Any) -> list[Turn]:
    """Return the turns of a list of messages; raise BadSample where it is malformed."""
    if not isinstance(messages, list) or not messages:
        raise record.bad(f"a conversation must be a list that is not empty, got {messages!r}")
    return [_turn(record, message) for message in messages]


def _turn(record: Record, message: Any) -> Turn:
    """Return a turn of a conversation; raise BadSample where it is malformed."""
    if not isinstance(message, dict):
        raise record.bad(f"a turn must be an object, got {message!r}")
    name = _either(record, message, "from", "role")
    if not isinstance(name, str) or name not in ROLES:
        raise record.bad(f"role {name!r} is unknown; use one of {', '.join(ROLES)}")
    lost = [key for key in _UNREAD_PARTS if message.get(key)]
    if lost:
        raise record.bad(f"a turn has {', '.join(lost)}, which are not read")
    text = _either(record, message, "value", "content")
    if isinstance(text, list):
        text = _joined(record, text)
    if not isinstance(text, str):
        raise record.bad(f"turn must be text, got {text!r}")
    # Pictures that a turn lists, without a mark of their place, come first.
    count = sum(
        num_named(key, value) for key, value in message.items() if key in ("image", "images")
    )
    markers = text.count(IMAGE_MARKER)
    if count > markers > 0:
        raise record.bad(f"a turn names {count} pictures, and its text has {markers} markers")
    if count and not markers:
        text = f"{IMAGE_MARKER}\n" * count + text
    role = ROLES[name]
    if role == "assistant" and not text.strip():
        raise record.bad("an assistant turn is empty")
    if role == "tool":
        return Turn("user", TOOL_RESULT.format(text=text))
    return Turn(role, text, _is_trained(record, message))


def _either(record: Record, message: dict[str, Any], first: str, second: str) -> Any:
    """Return the value of two keys of one meaning, of which tables leave one null."""
    values = [message[key] for key in (first, second) if message.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise record.bad(f"a turn has {first} and {second}, which differ")
    return values[0] if values else None


def _joined(record: Record, parts: list[Any]) -> str:
    """Return the text of a message's parts, as OpenAI's API has them; an image is a marker.

    Texts follow one another as they are; a line is begun between a text and an image.
    """
    text = ""
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _IMAGE_PARTS:
            piece = IMAGE_MARKER
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            piece = part["text"]
            if IMAGE_MARKER in piece:
                raise record.bad(f"{IMAGE_MARKER} is written in the text of a part")
        else:
            raise record.bad(f"part {part!r} of a turn is neither a text nor an image")
        beside = IMAGE_MARKER in (piece, text[-len(IMAGE_MARKER) :])
        space = text[-1:].isspace() or piece[:1].isspace()
        text += f"\n{piece}" if text and beside and not space else piece
    return text


def _is_trained(record: Record, message: dict[str, Any]) -> bool:
    """Return whether the loss is on a turn: not with `weight` 0 (OpenAI's) or `loss` false."""
    trained = True
    for key in _TRAINED:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise record.bad(f"{key} {value!r} of a turn must be 0 or 1")
        trained = trained and value != 0
    return trained


@dataclass(frozen=True)
class Caption:
    """An image and its `caption`. prompt: the question; null: the images alone."""

    prompt: str | None = None
    names: ClassVar[tuple[str, ...]] = ("caption",)

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        if not images:
            raise record.bad("a caption needs an image")
        caption = record.text("caption")
        markers = "\n".join([IMAGE_MARKER] * len(images))
        question = markers if self.prompt is None else f"{markers}\n{self.prompt}"
        turns = [Turn("user", question), Turn("assistant", caption)]
        return Example(turns, images, [caption])


@dataclass(frozen=True)
class MultipleChoice:
    """`question`, `choices` and `answer`: a letter, a number from 0 on, or the choice itself.

    The answer is the letter. instruction: the last line of the question. A `hint` comes first.

    An answer that is a choice, and at the same time the letter or number of another one, is bad,
    unless answer_is says what answers are. A number may be a text, as in AI2D.
    """

    instruction: str = "Answer with the option's letter from the given choices directly."
    answer_is: AnswerIs | None = None
    names: ClassVar[tuple[str, ...]] = ("question", "choices", "answer", "hint")

    def __post_init__(self) -> None:
        if self.answer_is is not None:
            require("form.answer_is", self.answer_is, AnswerIs)

    def __repr__(self) -> str:
        # Token counts are kept by this text: a default that came later is left out of it.
        more = "" if self.answer_is is None else f", answer_is={self.answer_is!r}"
        return f"MultipleChoice(instruction={self.instruction!r}{more})"

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        choices = [record.checked_text("choice", choice) for choice in record.sequence("choices")]
        if len(choices) > len(LETTERS):
            raise record.bad(f"{len(choices)} choices; at most {len(LETTERS)} have a letter")
        lines = [f"{LETTERS[number]}. {choice}" for number, choice in enumerate(choices)]
        hint = record.get("hint")
        first = [record.text("hint")] if hint else []
        question = "\n".join([*first, record.text("question"), *lines, self.instruction])
        answer = self._letter(record, choices)
        accepted = [] if answer is None else [answer]
        return Example(asked(question, answer, len(images)), images, accepted)

    def _letter(self, record: Record, choices: list[str]) -> str | None:
        """Return the letter of the right choice, None where the sample has no answer."""
        answer = record.get("answer")
        if answer is None:
            return None
        # 1. Read it in every way in which it can be meant, or in the one that is named.
        letters = LETTERS[: len(choices)]
        found: dict[str, str] = {}
        if isinstance(answer, str) and len(answer) == 1 and answer in letters:
            found["letter"] = answer
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        if is_number or (isinstance(answer, str) and re.fullmatch("[0-9]{1,3}", answer)):
            if 0 <= int(answer) < len(letters):
                found["number"] = letters[int(answer)]
        if choices.count(answer) > 1 and self.answer_is in (None, "choice"):
            raise record.bad(f"answer {answer!r} is more than one of {choices}")
        if answer in choices:
            found["choice"] = letters[choices.index(answer)]
        if self.answer_is is not None:
            found = {kind: letter for kind, letter in found.items() if kind == self.answer_is}
        # 2. They must agree.
        if len(set(found.values())) > 1:
            raise record.bad(
                f"answer {answer!r} may be {' or '.join(found)}, which differ; say which with"
                " build.form.answer_is"
            )
        if not found:
            raise record.bad(f"answer {answer!r} is none of {len(choices)} choices")
        return next(iter(found.values()))


@dataclass(frozen=True)
class Ocr:
    """`words` and their `boxes`; the answer has lines `word<box>(x0,y0),(x1,y1)</box>`.

    A box is [x0, y0, x1, y1] or a polygon [x, y, ...] in pixels of the upright image; it is
    written in units of 1 / `box_scale` of the image's sides. Without boxes the words come alone.
    """

    prompt: str = "Read the text in the image, with a box for each word."
    box_scale: int = 1000
    names: ClassVar[tuple[str, ...]] = ("words", "boxes")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        if len(images) != 1:
            raise record.bad(f"{len(images)} images; reading takes one")
        words = [record.checked_text("word", word) for word in record.sequence("words")]
        boxes = record.get("boxes")
        if boxes is not None:
            if not isinstance(boxes, list) or len(boxes) != len(words):
                raise record.bad(f"boxes must be a list of {len(words)}, as words")
            size = (images[0].width, images[0].height)
            marks = [self._box(record, box, size) for box in boxes]
            words = [f"{word}{mark}" for word, mark in zip(words, marks, strict=True)]
        answer = "\n".join(words)
        return Example(asked(self.prompt, answer, 1), images, [answer])

    def _box(self, record: Record, box: Any, size: tuple[int, int]) -> str:
        """Return a box as text; size: (width, height) of the image in pixels."""
        numbers = box if isinstance(box, list) else []
        if len(numbers) < 4 or len(numbers) % 2 or not all(map(_is_number, numbers)):
            raise record.bad(f"box {box!r} must be [x0, y0, x1, y1] or a polygon")
        across, down = numbers[::2], numbers[1::2]
        x0, y0, x1, y1 = min(across), min(down), max(across), max(down)
        if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
            raise record.bad(f"box {box!r} leaves the image of {size[0]}x{size[1]} pixels")
        x0, x1 = (round(x * self.box_scale / size[0]) for x in (x0, x1))
        y0, y1 = (round(y * self.box_scale / size[1]) for y in (y0, y1))
        return f"<box>({x0},{y0}),({x1},{y1})</box>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Document:
    """A document, in one of three forms:

    - `texts` and `images` of one length, in each place one of them null (OBELICS);
    - `text_list`, and `image_info` whose `matched_text_index` names the sentence that an image
      comes before (MMC4);
    - `text` alone, with `<image>` where its images go.

    Image 0 is that of the first `image_info`, or of the first image that is not null. A document
    longer than data.sequence_length is cut at the end, whole images too.

    separator: between texts.
    """

    separator: str = "\n"
    names: ClassVar[tuple[str, ...]] = ("text", "texts", "images", "text_list", "image_info")

    def __call__(self, record: Record, images: Sequence[ImageOrSize]) -> Example:
        if record.get("texts") is not None:
            pieces = self._alternating(record)
        elif record.get("text_list") is not None:
            pieces, order = self._matched(record)
            if len(order) != len(images):
                raise record.bad(f"image_info lists {len(order)} images, the sample {len(images)}")
            images = [images[number] for number in order]
        else:
            pieces = [record.text("text")]
        text = self.separator.join(pieces)
        if not text.replace(IMAGE_MARKER, "").strip():
            raise record.bad("the document has no text")
        return Example([Turn(DOCUMENT, text)], images, [])

    def _alternating(self, record: Record) -> list[str]:
        """Return texts and image markers in the order of `texts` and `images`."""
        texts, images = record.sequence("texts"), record.sequence("images")
        if len(texts) != len(images):
            raise record.bad(f"{len(texts)} texts and {len(images)} images; they must alternate")
        pieces = []
        for text, image in zip(texts, images, strict=True):
            if (text is None) == (image is None):
                raise record.bad("each place of texts and images needs one of the two")
            pieces.append(IMAGE_MARKER if text is None else self._plain(record, text))
        return pieces

    def _matched(self, record: Record) -> tuple[list[str], list[int]]:
        """Return sentences and image markers in order, and the numbers of these images."""
        sentences = [self._plain(record, text) for text in record.sequence("text_list")]
        infos = record.get("image_info") or []
        if not isinstance(infos, list):
            raise record.bad(f"image_info must be a list, got {infos!r}")
        before: list[list[int]] = [[] for _ in sentences]
        for number, info in enumerate(infos):
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(sentences):
                raise record.bad(f"image_info[{number}] matches none of {len(sentences)} sentences")
            before[place].append(number)
        pieces = []
        for text, numbers in zip(sentences, before, strict=True):
            pieces += [*[IMAGE_MARKER] * len(numbers), text]
        return pieces, [number for numbers in before for number in numbers]

    def _plain(self, record: Record, text: Any) -> str:
        """Return a text; raise BadSample when an image marker is written in it."""
        plain = record.checked_text("text", text)
        if IMAGE_MARKER in plain:
            raise record.bad(f"{IMAGE_MARKER} is written in a text")
        return plain
