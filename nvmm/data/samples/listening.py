"""Sounds and text in turn become a `Sample`: one clip and its question, or solved ones before it.

The record lists `clips`, the one that is asked about last, or it is itself one clip:

    {"clips": [{"sound": "0.wav", "start": 0, "prompt": "What is heard?", "answer": "a dog"}, ...],
     "task": "event classification", "interleaved": "similar", "options": ["a cat", "a dog"]}

`sound` names a member of the sample; without one the clip is text alone, as the later turns of a
dialogue are. `task` is told by a sentence of the template, or `prefix` is one as it stands;
`interleaved` says how earlier clips were chosen, `options` from which labels the last one's answer
is; `answers` are all that are accepted for it. Text of a sample:

    begin few_shot task [marker user prompt ask answer end close behind] ... finish

The loss is on every answer with `end` and `close`, and on `finish` (Audio Flamingo,
arXiv:2402.01831).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvmm.batch import ATTENDED, SEQUENCE, MediaKind, Sample, Text, TextMedia
from nvmm.config.choices import require
from nvmm.data.samples.augmentation import Augmentation, Augmentations
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.builder import Builder
from nvmm.data.samples.clip_shots import CLIP, joined
from nvmm.data.samples.clip_words import Clip, Interleaved, Wording, Words, texts, written_words
from nvmm.data.samples.record import PLAIN, Fields, Record, check_fields
from nvmm.data.samples.sounds import MARGIN, FrontEnd
from nvmm.data.samples.tokenizer import Tokenizer

Placement = Literal["attended", "sequence"]
TooLong = Literal["first", "last"]


@dataclass(frozen=True)
class ListeningTemplate:
    """The text around clips; the defaults are those that Audio Flamingo trains with.

    begin, finish: of the whole text. OPT's begins with two `</s>`, its tokenizer's and its own.
    few_shot: for a record with `interleaved`, where more than one clip is left; {interleaved} is
        that word. task: for a record with `task`, which {task} is.
    marker: one special token, where a clip is. user: in front of a prompt. ask: between a prompt
        and its answer. end: one special token behind an answer; generation stops there. close:
        behind every end, trained. behind: behind that, not trained.
    lower: write prompts, answers and options of records in lower case.
    """

    begin: str = "</s></s>"
    few_shot: str = "Here are {interleaved} examples. "
    task: str = "The task is {task}. "
    marker: str = "<audio>"
    user: str = ""
    ask: str = "\nAnswer:<SEP>"
    end: str = "<|endofchunk|>"
    close: str = ""
    behind: str = ""
    finish: str = "</s>"
    lower: bool = True

    def written(self, text: str) -> str:
        """Return a record's text as it stands in a sample."""
        return text.lower() if self.lower else text


class SoundBuilder(Builder):
    """A builder of clips with their text (see the top of this file).

    front_end: what the encoder hears of a sound.
    template: the text around the clips.
    placement: attended: cross-attention reads the windows, and text sees a clip from its marker on;
        sequence: placeholders stand in the marker's place.
    tokens_per_window: features of a window, after the model's connector.
    most_clips: a sample with more sounds is refused.
    augmentations, augment: ways to word a clip by name, and the probability of each, which sum to
        1; clips stay as they are where there are none. Every clip draws by its place and the
        sample's key, anew in each pass, and a prompt takes the likeliest way.
    task_probability: of the sentence that tells the task; prompts have it unless that is 0.
    fields, unread: see `Builder`.
    too_long: the clips that an over-long sample loses with their text, counted as `dropped`: the
        first ones, or the last. One of which no clip fits is refused, and so is a prompt that would
        lose what it asks.
    """

    names: ClassVar[tuple[str, ...]] = (
        *("clips", "prefix", "task", "interleaved", "options", "answers"),
        *CLIP,
    )
    draws: ClassVar[bool] = True

    def __init__(
        self,
        front_end: FrontEnd,
        template: ListeningTemplate,
        placement: Placement = "attended",
        tokens_per_window: int = 1,
        most_clips: int = 16,
        augmentations: Mapping[str, Augmentation] | None = None,
        augment: Mapping[str, float] | None = None,
        task_probability: float = 1.0,
        too_long: TooLong = "first",
        fields: Fields | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        require("build.placement", placement, Placement)
        require("build.too_long", too_long, TooLong)
        if not 0 <= task_probability <= 1:
            raise ValueError(f"build.task_probability={task_probability} must be in [0, 1]")
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
        ways = Augmentations(augmentations or {}, augment or {})
        self.wording = Wording(template, ways, task_probability)
        self.too_long = too_long
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
        return self._sample(record, clips)

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample up to where the last clip's answer begins, without supervision.

        suffix: text behind the last prompt and its options.
        """
        record = self.record(members)
        clips = self._clips(record)
        if any(clip.answer is None for clip in clips[:-1]):
            raise record.bad("a clip before the last one has no answer")
        return self._sample(record, clips, suffix)

    def question(self, members: Mapping[str, Any]) -> str:
        """Return the last clip's prompt."""
        return self._clips(self.record(members))[-1].prompt

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """Return the record's `answers`, else the last clip's, as the template writes them."""
        record = self.record(members)
        answers = texts(record, "answers")
        last = self._clips(record)[-1].answer
        given = answers or ([] if last is None else [last])
        return [self.template.written(answer) for answer in given]

    def options(self, members: Mapping[str, Any]) -> list[str]:
        """Return the labels that the last clip's answer is one of, as the template writes them."""
        record = self.record(members)
        return [self.template.written(label) for label in texts(record, "options")]

    def answer_tokens(self, text: str) -> list[int]:
        """Return the tokens of an answer as they follow a prompt, without its end."""
        written = [self.template.ask, self.template.written(text)]
        tokens, pieces = self.tokenizer.encode_pieces(written)
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

    def _clips(self, record: Record) -> list[Clip]:
        """Return the clips of a record; raise BadSample where they are malformed."""
        listed = record.get("clips")
        if listed is None:
            listed = [{name: record.get(name) for name in CLIP}]
        if not isinstance(listed, list) or not listed:
            raise record.bad(f"clips must be a list that is not empty, got {listed!r}")
        clips = []
        for item in listed:
            if not isinstance(item, dict) or item.keys() - set(CLIP):
                raise record.bad(f"a clip must be an object of {', '.join(CLIP)}, got {item!r}")
            prompt = record.checked_text("prompt", item.get("prompt"))
            answer = item.get("answer")
            if answer is not None:
                answer = record.checked_text("answer", answer)
            start = item.get("start")
            clips.append(Clip(item.get("sound"), 0 if start is None else start, prompt, answer))
        sounds = sum(clip.sound is not None for clip in clips)
        if sounds > self.most_clips:
            raise record.bad(f"{sounds} sounds are more than build.most_clips={self.most_clips}")
        return clips

    def _check_members(self, record: Record, clips: Sequence[Clip]) -> None:
        """Raise BadSample for a member that no clip names, and for pictures of the record."""
        record.sizes()
        named = {*(clip.sound for clip in clips), *self.named()}
        lost = [member for member in record.members if member not in named]
        if lost:
            raise record.bad(f"no clip names {', '.join(sorted(lost))}; its record lists them")

    def _sample(self, record: Record, clips: Sequence[Clip], suffix: str | None = None) -> Sample:
        """Return the sample of as many clips as fit; a prompt's where there is a suffix."""
        words = written_words(record, clips, self.wording, suffix)
        windows = [self._windows(record, clip) for clip in clips]
        self._check_members(record, clips)
        # A prompt must not lose its end, which it asks.
        tries = 1 if self.too_long == "last" and suffix is not None else len(clips)
        for lost in range(tries):
            kept = slice(lost, None) if self.too_long == "first" else slice(len(clips) - lost)
            heard = [w for w in windows[kept] if w is not None]
            written = [(w is not None, *text) for w, text in zip(windows, words.clips, strict=True)]
            tokens, weights, markers = self._tokens(record, words, written[kept], len(heard))
            if self.placement == "sequence":
                tokens, weights, markers = self._spread(tokens, weights, markers, heard)
            if len(tokens) <= self.sequence_length:
                media = {self._kind: self._media(heard, markers)} if heard else {}
                text = Text(torch.tensor(tokens), torch.tensor(weights), media)
                return Sample((text,), source=record.source, dropped=lost)
        takes = {"first": "its last clip takes", "last": "its first clip takes"}[self.too_long]
        takes = takes if tries == len(clips) else "its clips take"
        raise record.bad(
            f"{takes} {len(tokens)} tokens, and data.sequence_length={self.sequence_length}"
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
        self,
        record: Record,
        words: Words,
        clips: Sequence[tuple[bool, str, str | None]],
        num_sounds: int,
    ) -> tuple[list[int], list[float], list[int]]:
        """Return tokens, their weights and the places of the markers.

        clips: of each, whether it has a sound, its prompt, and its answer, which a prompt lacks.
        """
        template = self.template
        pieces: list[tuple[str, bool]] = [
            (template.begin, False),
            (words.few_shot if len(clips) > 1 else "", False),
            (words.task, False),
        ]
        for has_sound, prompt, answer in clips:
            marker = template.marker if has_sound else ""
            pieces += [(text, False) for text in (marker, template.user, prompt, template.ask)]
            if answer is not None:
                pieces += [(text, True) for text in (answer, template.end, template.close)]
                pieces.append((template.behind, False))
        trained = clips[-1][2] is not None
        if trained:
            pieces.append((template.finish, True))
        tokens, numbers = self.tokenizer.encode_pieces([text for text, _ in pieces])
        weights = [float(pieces[number][1] and trained) for number in numbers]
        markers = [i for i, token in enumerate(tokens) if token == self.marker_id]
        if len(markers) != num_sounds:
            raise record.bad(
                f"{len(markers)} markers {template.marker} for {num_sounds} sounds; the text must"
                " not contain the marker itself"
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
