"""Sounds and text in turn become a `Sample`: one clip and its question, or solved ones before it.

The record lists `clips`, the one that is asked about last, or it is itself one clip:

    {"clips": [{"sound": "0.wav", "start": 0, "prompt": "What is heard?", "answer": "a dog"}, ...],
     "prefix": "The task is event classification. "}

`sound` names a member of the sample; without one the clip is text alone. Text of a sample:

    begin prefix [marker prompt ask answer end] ... finish

The loss is on every answer with its `end`, and on `finish` (Audio Flamingo, arXiv:2402.01831).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvmm.batch import ATTENDED, SEQUENCE, MediaKind, Sample, Text, TextMedia
from nvmm.config.choices import require
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.clip_shots import Interleaved, joined
from nvmm.data.samples.record import PLAIN, Fields, Record, check_fields
from nvmm.data.samples.sounds import MARGIN, FrontEnd
from nvmm.data.samples.tokenizer import Tokenizer

Placement = Literal["attended", "sequence"]
_CLIP = ("sound", "start", "prompt", "answer")


@dataclass(frozen=True)
class ListeningTemplate:
    """The text around clips; the defaults are those that Audio Flamingo trains with.

    begin, finish: of the whole text. OPT's begins with two `</s>`, its tokenizer's and its own.
    marker: one special token, where a clip is. ask: between a prompt and its answer. end: behind an
        answer; generation stops there. few_shot: stands first where there is more than one clip.
    lower: write prompts and answers in lower case.
    """

    begin: str = "</s></s>"
    marker: str = "<audio>"
    ask: str = "\nAnswer:<SEP>"
    end: str = "<|endofchunk|>"
    finish: str = "</s>"
    few_shot: str = ""
    lower: bool = True


@dataclass(frozen=True)
class Clip:
    """A sound (None: text alone), from its second `start` on, its prompt and answer."""

    sound: Any
    start: Any
    prompt: str
    answer: str | None


class SoundBuilder(Builder):
    """A builder of clips with their text (see the top of this file).

    front_end: what the encoder hears of a sound.
    template: the text around the clips.
    placement: attended: cross-attention reads the windows, and text sees a clip from its marker on;
        sequence: placeholders stand in the marker's place.
    tokens_per_window: features of a window, after the model's connector.
    most_clips: a sample with more is refused.
    fields, unread: see `Builder`.
    sequence_length: an over-long sample loses its first clips with their text, counted as
        `dropped`; one whose last clip does not fit is refused.
    """

    names: ClassVar[tuple[str, ...]] = ("clips", "prefix", *_CLIP)

    def __init__(
        self,
        front_end: FrontEnd,
        template: ListeningTemplate,
        placement: Placement = "attended",
        tokens_per_window: int = 1,
        most_clips: int = 8,
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("build.placement", placement, Placement)
        if tokens_per_window < 1 or most_clips < 1:
            raise ValueError(
                f"build.tokens_per_window={tokens_per_window}, most_clips={most_clips}: both must"
                " be at least 1"
            )
        super().__init__(
            fields, unread=unread, tokenizer=tokenizer, sequence_length=sequence_length
        )
        check_fields(self.fields, self.names, unread)
        self.front_end = front_end
        self.template = template
        self.placement = placement
        self.tokens_per_window = tokens_per_window
        self.most_clips = most_clips
        self.marker_id = self._one_token("marker")
        self.end_id = self._one_token("end")

    def _one_token(self, name: str) -> int:
        text = getattr(self.template, name)
        token = self.tokenizer.token_id(text)
        if token is None:
            raise ValueError(
                f"build.template.{name}={text} is no token; list it in tokenizer.extra_tokens"
            )
        return token

    @property
    def media(self) -> frozenset[MediaKind]:
        """Sounds, where `placement` says."""
        return frozenset({self._kind})

    @property
    def _kind(self) -> MediaKind:
        return MediaKind("audio", ATTENDED if self.placement == "attended" else SEQUENCE)

    @property
    def stop_ids(self) -> list[int]:
        """The template's end of an answer, and the tokenizer's ends."""
        return list(dict.fromkeys([self.end_id, *super().stop_ids]))

    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training example; the loss is on the answers of all its clips."""
        record = self.record(members)
        clips = self._clips(record)
        for clip in clips:
            if clip.answer is None:
                raise record.bad("a clip has no answer")
        return self._sample(record, clips, prompt=False)

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample up to where the last clip's answer begins, without supervision.

        suffix: text behind the last prompt.
        """
        record = self.record(members)
        *solved, last = self._clips(record)
        if any(clip.answer is None for clip in solved):
            raise record.bad("a clip before the last one has no answer")
        asked = Clip(last.sound, last.start, last.prompt + suffix, None)
        return self._sample(record, [*solved, asked], prompt=True)

    def question(self, members: Mapping[str, Any]) -> str:
        """Return the last clip's prompt."""
        return self._clips(self.record(members))[-1].prompt

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """Return the last clip's answer, as the template writes it."""
        answer = self._clips(self.record(members))[-1].answer
        return [] if answer is None else [self._written(answer)]

    def answer_tokens(self, text: str) -> list[int]:
        """Return the tokens of an answer as they follow a prompt, without its end."""
        written = text.lower() if self.template.lower else text
        tokens, pieces = self.tokenizer.encode_pieces([self.template.ask, written])
        return [token for token, piece in zip(tokens, pieces, strict=True) if piece]

    def few_shot(
        self,
        members: Mapping[str, Any],
        shots: Sequence[Mapping[str, Any]],
        *,
        suffix: str = "",
        interleaved: Interleaved = "random",
    ) -> Sample:
        """Return a sample's prompt behind the clips of solved samples, in their order.

        shots: members of samples that each have one clip and an answer. suffix: text behind the
        last prompt. interleaved: how they were chosen.

        Raises BadSample where a clip would be lost to `sequence_length`.
        """
        solved = [self.record(shot) for shot in shots]
        together = joined(self.record(members), solved, interleaved)
        place = {name: members.get(name, "") for name in ("__url__", "__key__")}
        sample = self.prompt({**place, PLAIN: "", **together}, suffix)
        if sample.dropped:
            raise BadSample(
                sample.source,
                f"{sample.dropped} of its {len(shots)} examples do not fit"
                f" data.sequence_length={self.sequence_length}",
            )
        return sample

    def _written(self, text: str) -> str:
        return text.lower() if self.template.lower else text

    def _clips(self, record: Record) -> list[Clip]:
        """Return the clips of a record; raise BadSample where they are malformed."""
        listed = record.get("clips")
        if listed is None:
            listed = [{name: record.get(name) for name in _CLIP}]
        if not isinstance(listed, list) or not 1 <= len(listed) <= self.most_clips:
            raise record.bad(f"clips must be a list of 1 to {self.most_clips}, got {listed!r}")
        clips = []
        for item in listed:
            if not isinstance(item, dict) or item.keys() - set(_CLIP):
                raise record.bad(f"a clip must be an object of {', '.join(_CLIP)}, got {item!r}")
            prompt = record.checked_text("prompt", item.get("prompt"))
            answer = item.get("answer")
            if answer is not None:
                answer = record.checked_text("answer", answer)
            start = item.get("start")
            clips.append(Clip(item.get("sound"), 0 if start is None else start, prompt, answer))
        return clips

    def _check_members(self, record: Record, clips: Sequence[Clip]) -> None:
        """Raise BadSample for a sound that no clip names."""
        named = {*(clip.sound for clip in clips), *self.named()}
        lost = [member for member in record.members if member not in named]
        if lost:
            raise record.bad(f"no clip names {', '.join(sorted(lost))}; its record lists them")

    def _sample(self, record: Record, clips: Sequence[Clip], prompt: bool) -> Sample:
        """Return the sample of as many of the last clips as fit."""
        prefix = record.get("prefix")
        if prefix is not None and not isinstance(prefix, str):
            raise record.bad(f"prefix must be text, got {prefix!r}")
        windows = [self._windows(record, clip) for clip in clips]
        self._check_members(record, clips)
        for first in range(len(clips)):
            tokens, weights, markers = self._tokens(record, clips[first:], prefix or "", prompt)
            heard = [w for w in windows[first:] if w is not None]
            if self.placement == "sequence":
                tokens, weights, markers = self._spread(tokens, weights, markers, heard)
            if len(tokens) <= self.sequence_length:
                media = {self._kind: self._media(heard, markers)} if heard else {}
                text = Text(torch.tensor(tokens), torch.tensor(weights), media)
                return Sample((text,), source=record.source, dropped=first)
        raise record.bad(
            f"its last clip takes {len(tokens)} tokens, and data.sequence_length="
            f"{self.sequence_length}"
        )

    def heard(self, members: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return what the encoder hears of each clip with a sound, fp64 [n] at its rate."""
        record = self.record(members)
        clips = [clip for clip in self._clips(record) if clip.sound is not None]
        return [self._heard(record, clip) for clip in clips]

    def _windows(self, record: Record, clip: Clip) -> torch.Tensor | None:
        """Return a clip's log-mel windows [n, bins, frames], None without a sound."""
        if clip.sound is None:
            return None
        return self.front_end.log_mel(self.front_end.windows(self._heard(record, clip)))

    def _heard(self, record: Record, clip: Clip) -> torch.Tensor:
        front = self.front_end
        most = front.seconds + MARGIN
        sound = record.sound("sound", clip.sound, clip.start, most, front.channel)
        return front.waveform(sound, f"{record.source}: member {clip.sound}")

    def _tokens(
        self, record: Record, clips: Sequence[Clip], prefix: str, prompt: bool
    ) -> tuple[list[int], list[float], list[int]]:
        """Return tokens, their weights and the places of the markers."""
        template = self.template
        pieces: list[tuple[str, bool]] = [
            (template.begin, False),
            (template.few_shot if len(clips) > 1 else "", False),
            (prefix, False),
        ]
        for clip in clips:
            marker = "" if clip.sound is None else template.marker
            pieces += [(marker, False), (self._written(clip.prompt), False), (template.ask, False)]
            if clip.answer is not None:
                pieces += [(self._written(clip.answer), True), (template.end, True)]
        if not prompt:
            pieces.append((template.finish, True))
        tokens, numbers = self.tokenizer.encode_pieces([text for text, _ in pieces])
        weights = [float(pieces[number][1] and not prompt) for number in numbers]
        markers = [i for i, token in enumerate(tokens) if token == self.marker_id]
        expected = sum(clip.sound is not None for clip in clips)
        if len(markers) != expected:
            raise record.bad(
                f"{len(markers)} markers {template.marker} for {expected} sounds; the text must not"
                " contain the marker itself"
            )
        return tokens, weights, markers

    def _spread(
        self,
        tokens: list[int],
        weights: list[float],
        markers: list[int],
        heard: Sequence[torch.Tensor],
    ) -> tuple[list[int], list[float], list[int]]:
        """Put the placeholders of each clip in its marker's place; return the first of each too."""
        counts = dict(zip(markers, (len(w) * self.tokens_per_window for w in heard), strict=True))
        spread: list[int] = []
        scaled: list[float] = []
        places = []
        for place, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
            if place in counts:
                places.append(len(spread))
            spread += [token] * counts.get(place, 1)
            scaled += [weight] * counts.get(place, 1)
        return spread, scaled, places

    def _media(self, heard: Sequence[torch.Tensor], markers: Sequence[int]) -> TextMedia:
        """Return the windows of all clips; attended ones have no tags."""
        counts = torch.tensor([len(windows) for windows in heard])
        tiles = torch.cat([torch.arange(1, len(windows) + 1) for windows in heard])
        positions = torch.repeat_interleave(torch.tensor(markers), counts)
        attended = self.placement == "attended"
        if not attended:
            positions = positions + (tiles - 1) * self.tokens_per_window
        return TextMedia(
            values=torch.cat(list(heard)),
            positions=positions,
            items=torch.repeat_interleave(torch.arange(len(heard)), counts),
            tiles=tiles,
            placeholder_id=-1 if attended else self.marker_id,
            tokens_per_item=self.tokens_per_window,
            ends=positions.clone() if attended else None,
            tag_ids=torch.zeros(len(tiles), 0, dtype=torch.int64) if attended else None,
        )
