"""Conversations about sounds become a `Sample` (Audio Flamingo 3, arXiv:2507.08128).

    {"id": "7", "sound": "a.wav",
     "conversations": [{"from": "human", "value": "<sound>\nWhat is it?"},
                       {"from": "gpt", "value": "A dog."}]}

The turns are those of `nvmm.data.samples.forms.Chat`. A sound is a member of the sample: those that
the record names (`sound`: one name or a list), or else as many, in the order of the numbers that
their names end with (`wav`; `0.wav`, `1.wav`; `sound.wav`, `sound1.wav`, as nvmm shard packs
what the released files name by path). In the text `<sound>` stands for the next one, or
`<sound-1>`, `<sound-2>` ... for each by its number; a conversation without any has its sounds at
the beginning of the user's first turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nvmm.batch import SEQUENCE, MediaKind, Sample, Text, TextMedia
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.chat import Template, Turn
from nvmm.data.samples.decode import SOUNDS
from nvmm.data.samples.forms import Chat
from nvmm.data.samples.record import Fields, Record, check_fields, is_sound
from nvmm.data.samples.rendered import Rendered, Writer
from nvmm.data.samples.shots import unanswered
from nvmm.data.samples.sounds import MARGIN, FrontEnd
from nvmm.data.samples.tokenizer import Tokenizer

AUDIO = MediaKind("audio", SEQUENCE)
SOUND_MARKER = "<sound>"
_NUMBERED = re.compile(r"(|.*\D)(\d{0,9})")
_MARKER = re.compile(r"<sound(?:-([1-9]\d{0,3}))?>")


@dataclass(frozen=True)
class Heard:
    """The windows of one sound.

    values: [n, bins, frames]. extents: int64 [n], frames that hold sound. counts: the features of
    each window.
    """

    values: Tensor
    extents: Tensor
    counts: list[int]


class SoundChatBuilder(Builder):
    """A builder of conversations about sounds (see the top of this file).

    template: see `nvmm.data.samples.chat`. The placeholder of a feature is `tokenizer.image_token`.
    front_end: what the encoder hears of a sound.
    tokens_per_window: features of a whole window, after the encoder's pooling.
    mask_padding: a window that ends in silence, because the sound does, has as many features as
        its sound, and the encoder looks at nothing behind. false: every window is whole.
    fields, unread: see `Builder`.
    sequence_length: an over-long conversation loses its end. No sound is cut: one that does not fit
        makes its sample bad.
    """

    placement: ClassVar[Literal["sequence"]] = "sequence"
    names: ClassVar[tuple[str, ...]] = (*Chat.names, "sound")

    def __init__(
        self,
        template: Template,
        front_end: FrontEnd,
        tokens_per_window: int,
        mask_padding: bool = True,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        tokens = -(-front_end.frames // 2)
        pool = tokens // max(tokens_per_window, 1)
        if not pool or tokens // pool != tokens_per_window:
            raise ValueError(
                f"build.tokens_per_window={tokens_per_window} must be {tokens}, half the"
                f" {front_end.frames} frames of build.front_end, or that divided by a whole number"
            )
        template = template.bound(tokenizer)
        super().__init__(
            fields, unread=unread, tokenizer=tokenizer, sequence_length=sequence_length
        )
        check_fields(self.fields, self.names, unread)
        self.template = template
        self.front_end = front_end
        self.tokens_per_window = tokens_per_window
        self.mask_padding = mask_padding
        self.pool = pool

    @property
    def media(self) -> frozenset[MediaKind]:
        """Sounds in the sequence."""
        return frozenset({AUDIO})

    @property
    def stop_ids(self) -> list[int]:
        """The template's end of an answer, and the tokenizer's ends."""
        return list(dict.fromkeys([self.template.end_token(self.tokenizer)[1], *super().stop_ids]))

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training example; the loss is where the template has it."""
        record = self.record(members)
        turns = self._turns(record)
        sample = self._sample(record, turns, prompt=False)
        if not any(sample.text.weights[1:]):
            raise record.bad("no supervised token; a sample needs an assistant turn that fits")
        return sample

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample up to where its last assistant turn begins, without supervision.

        suffix: text behind the last turn of a user; BadSample where that is not the last one.
        """
        record = self.record(members)
        turns = unanswered(self._turns(record))
        if not turns or turns[-1].role != "user":
            raise record.bad("no user's turn to answer")
        turns = [*turns[:-1], replace(turns[-1], text=turns[-1].text + suffix)]
        return self._sample(record, turns, prompt=True)

    def question(self, members: Mapping[str, Any]) -> str:
        """Return the text of the last turn of a user, without markers."""
        asked = [turn.text for turn in self._turns(self.record(members)) if turn.role == "user"]
        return _MARKER.sub("", asked[-1]).strip() if asked else ""

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """Return the accepted answers to `prompt(members)`; empty where the sample has none."""
        return Chat()(self.record(members), []).accepted

    def answer_tokens(self, text: str) -> list[int]:
        """Return the tokens of an answer as they follow a prompt, without its end."""
        ahead = self.template.lead(self.tokenizer)[1]
        return self.tokenizer.encode_pieces([ahead + text], continued=True)[0]

    def heard(self, members: Mapping[str, Any]) -> list[Tensor]:
        """Return what the encoder hears of each sound, fp64 [n] at its rate."""
        record = self.record(members)
        return [self._samples(record, member) for member in self._sounds(record)]

    def _turns(self, record: Record) -> list[Turn]:
        """Return the turns, with a marker for every sound.

        Raises BadSample where they differ, and for members and pictures that nobody reads.
        """
        record.sizes()  # Raises for pictures that the record names.
        read = self.named()
        if lost := [name for name in record.members if not is_sound(name) and name not in read]:
            raise record.bad(
                f"{', '.join(sorted(lost))} is no sound of {', '.join(SOUNDS)}, and a sample must"
                " not lose what it has; leave it out by build.unread"
            )
        turns = Chat()(record, []).turns
        number = len(self._sounds(record))
        if any(turn.role == "assistant" and _MARKER.search(turn.text) for turn in turns):
            raise record.bad("<sound> in an assistant turn")
        markers = [found for turn in turns for found in _MARKER.findall(turn.text)]
        if number and not markers:
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
            if first is None:
                raise record.bad(f"{number} sounds, and no turn of a user to hear them")
            turns[first] = replace(turns[first], text=SOUND_MARKER * number + turns[first].text)
        elif len(markers) != number:
            raise record.bad(
                f"the text has {len(markers)} <sound> markers, the sample {number} sounds"
            )
        elif any(markers) and markers != [str(place + 1) for place in range(number)]:
            named = ", ".join(f"<sound-{mark}>" if mark else "<sound>" for mark in markers)
            raise record.bad(f"markers {named} must be <sound-1>, <sound-2> ... in order")
        return turns

    def _sounds(self, record: Record) -> list[str]:
        """Return the members that are sounds, in order; raise BadSample where they are not those
        that the record names."""
        members = [name for name in record.members if is_sound(name)]
        named = record.get("sound")
        listed = [] if named is None else named if isinstance(named, list) else [named]
        if listed and all(isinstance(name, str) and name in members for name in listed):
            ordered = list(listed)
        else:
            ordered = self._numbered(record, members)
        if sorted(ordered) != sorted(members) or (listed and len(listed) != len(members)):
            raise record.bad(
                f"sound={named!r} names other sounds than its members, {', '.join(members)}"
            )
        return ordered

    def _numbered(self, record: Record, members: Sequence[str]) -> list[str]:
        """Return sounds in the order of the numbers that their names end with."""
        names = [_NUMBERED.fullmatch(name.rpartition(".")[0]) for name in members]
        stems = {name[1] for name in names if name}
        numbers = [int(name[2] or -1) if name else -2 for name in names]
        if None in names or len(stems) > 1 or len(set(numbers)) < len(numbers):
            raise record.bad(
                f"the order of sounds {', '.join(members)} is ambiguous; number them, or list them"
                " in the record's sound"
            )
        return [name for _, name in sorted(zip(numbers, members, strict=True))]

    def _sample(self, record: Record, turns: Sequence[Turn], prompt: bool) -> Sample:
        heard = [self._heard(record, member) for member in self._sounds(record)]
        rendered = self._render(turns, heard, record.source, prompt)
        length = len(rendered.tokens)
        if length > self.sequence_length:
            counts = [number for sound in heard for number in sound.counts]
            needed = max(map(sum, zip(rendered.positions, counts, strict=True)), default=0)
            if prompt or needed > self.sequence_length:
                raise record.bad(
                    f"{length} tokens, {sum(counts)} of them sound, do not fit in"
                    f" data.sequence_length={self.sequence_length}"
                )
        tokens = torch.tensor(rendered.tokens[: self.sequence_length])
        weights = torch.tensor(rendered.weights[: self.sequence_length])
        if prompt:
            weights = torch.zeros_like(weights)
        media = {AUDIO: self._media(heard, rendered.positions)} if heard else {}
        return Sample((Text(tokens, weights, media),), source=record.source)

    def _samples(self, record: Record, member: str) -> Tensor:
        """Return what is heard of a sound [n]."""
        front = self.front_end
        sound = record.sound("sound", member, 0, front.seconds + MARGIN, front.channel)
        return front.waveform(sound, f"{record.source}: member {member}")

    def _heard(self, record: Record, member: str) -> Heard:
        """Return a sound's windows; raise BadSample for one without a feature."""
        front = self.front_end
        samples = self._samples(record, member)
        values = front.log_mel(front.windows(samples))
        extents = front.extents(len(samples))
        if not self.mask_padding:
            extents = torch.full_like(extents, front.frames)
        counts = ((extents + 1) // 2 // self.pool).tolist()
        if not sum(counts):
            raise record.bad(f"{member} has {len(samples)} samples, too few for a feature")
        return Heard(values, extents, counts)

    def _render(
        self, turns: Sequence[Turn], heard: Sequence[Heard], source: str, prompt: bool
    ) -> Rendered:
        """Return tokens and weights, with a run of placeholders in the place of each marker."""
        out, place = Writer(self.tokenizer), count()
        for piece in self.template.pieces(turns, self.tokenizer, prompt=prompt, source=source):
            if piece.ids:
                out.flush()
                out.ids(piece.ids, piece.weight)
            write = out.alone if piece.alone else out.text
            end = 0
            for marker in _MARKER.finditer(piece.text):
                write(piece.text[end : marker.start()], piece.weight)
                end = marker.end()
                number = next(place)
                if number >= len(heard):
                    raise BadSample(source, "the template itself writes <sound>")
                for features in heard[number].counts:
                    out.tile("", features, alone=True)
            write(piece.text[end:], piece.weight)
        out.flush()
        if self.tokenizer.image_id in (tokens := out.out.tokens):
            written = tokens.count(self.tokenizer.image_id)
            if written != sum(sum(sound.counts) for sound in heard):
                raise BadSample(source, f"{self.tokenizer.image_token} is written in the text")
        return out.out

    def _media(self, heard: Sequence[Heard], positions: Sequence[int]) -> TextMedia:
        numbers = torch.tensor([len(sound.counts) for sound in heard])
        return TextMedia(
            values=torch.cat([sound.values for sound in heard]),
            positions=torch.tensor(positions),
            items=torch.repeat_interleave(torch.arange(len(heard)), numbers),
            tiles=torch.cat([torch.arange(1, len(sound.counts) + 1) for sound in heard]),
            placeholder_id=self.tokenizer.image_id,
            tokens_per_item=self.tokens_per_window,
            extents=torch.cat([sound.extents for sound in heard]) if self.mask_padding else None,
            counts=torch.tensor([number for sound in heard for number in sound.counts])
            if self.mask_padding
            else None,
        )
