"""The base class of a dataset's `build`, which makes a Sample of a shard's members."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nvmm.batch import MediaKind, Sample, Text
from nvmm.data.samples.bad_sample import blamed
from nvmm.data.samples.decode import Limits
from nvmm.data.samples.record import PLAIN, Fields, Record, is_listed, is_picture
from nvmm.data.samples.tokenizer import Tokenizer


class Builder(ABC):
    """A builder makes samples from the members of a shard, which it reads through `record`.

    A builder's constructor takes `tokenizer` and `sequence_length` as keywords from the data. A
    subclass must write `__call__` alone; the other methods have the defaults below. Whatever a
    subclass's methods raise about members becomes a BadSample that names shard and key
    (`nvmm.data.samples.bad_sample.blamed`).

    extras: names of the `Text.extras` that its texts have.
    compares: whether the texts of a sample are compared: job=score then has a list for each.
    draws: whether it makes another sample in each pass; `Record.passing` then names the pass. It is
        empty in prompts, in validation and with packing, whose token counts hold for all passes.
    fields: our names of fields -> the data set's.
    unread: members (`.mask.png`, or `.*.npy` for several) and keys of the record (`image`) that
        samples may have and that nobody reads. A member that is neither read nor named here makes
        its sample bad.
    """

    extras: ClassVar[frozenset[str]] = frozenset()
    compares: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    unread: Sequence[str] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in (
            *("__call__", "prompt", "question", "references", "options", "heard"),
            *("measure", "scored"),
        ):
            if name in vars(cls):
                setattr(cls, name, _blaming(vars(cls)[name]))

    def __init__(
        self,
        fields: Fields | None = None,
        limits: Limits | None = None,
        unread: Sequence[str] = (),
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
    ) -> None:
        self.fields = fields or {}
        self.limits = limits or Limits()
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        if isinstance(unread, str):
            raise ValueError(f"build.unread={unread} must be a list, as [{unread}]")
        if unread:  # An attribute that is always there would change the digest of token counts.
            self.unread = tuple(unread)

    @property
    def media(self) -> frozenset[MediaKind]:
        """The kinds of media that its samples may have; none by default."""
        return frozenset()

    @property
    def most_texts(self) -> int:
        """The most texts that one of its samples may have; 1 by default."""
        return 1

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer to a prompt."""
        return [self.tokenizer.end_of_turn_id, self.tokenizer.eos_id]

    def record(self, members: Mapping[str, Any]) -> Record:
        """Return the members under our names of fields.

        members: extension -> bytes, and `__url__`, `__key__` (shard and key, as webdataset has).
            With `__plain__` they are a question to ask: `json` and pictures, whatever `fields` say.

        Raises BadSample for a member that this builder neither reads nor has in `unread`.
        """
        if PLAIN in members:
            record, reads = Record(members, {}, self.limits), self._takes
        else:
            record, reads = Record(members, self.fields, self.limits, self.unread), self.reads
        for member in record.members:
            if not reads(member):
                raise record.bad(
                    f"member {member} is not read, and a sample must not lose what it has; map it"
                    f" in build.fields, or leave it out by build.unread=[.{member}]"
                )
        return record

    def reads(self, member: str) -> bool:
        """Return whether samples are made of members of this name.

        By default it may be anything but a picture where the builder has no images. A builder that
        knows the names of its members says more.
        """
        return self._takes(member) and not is_listed(member, self.unread)

    def _takes(self, member: str) -> bool:
        """Return whether it is no picture, or the samples may have images."""
        return not is_picture(member) or any(kind.modality == "image" for kind in self.media)

    def named(self) -> set[str]:
        """Return the members that `fields` names, and that of the record."""
        places = {"record": ".json", **self.fields}.values()
        groups = [[place] if isinstance(place, str) else place for place in places]
        return {place[1:] for group in groups for place in group if place.startswith(".")}

    @abstractmethod
    def __call__(self, members: Mapping[str, Any]) -> Sample:
        """Return one training example. Raises BadSample naming shard and key when there is none."""

    def prompt(self, members: Mapping[str, Any], suffix: str = "") -> Sample:
        """Return the sample up to where an answer begins, or the question that members with
        `__plain__` are (see `record`).

        suffix: text behind the question; a builder that cannot put it there raises ValueError.

        Raises ValueError where the builder makes no prompts.
        """
        raise ValueError(f"{type(self).__name__} makes no prompts: there is nothing to answer")

    def question(self, members: Mapping[str, Any]) -> str:
        """Return the text that `prompt(members)` asks with, for a person to read."""
        return ""

    def references(self, members: Mapping[str, Any]) -> list[str]:
        """Return the accepted answers to `prompt(members)`; empty where there are none."""
        return []

    def options(self, members: Mapping[str, Any]) -> list[str]:
        """Return the labels that the answer to `prompt(members)` is one of; empty for any."""
        return []

    def answer_tokens(self, text: str) -> list[int]:
        """Return the tokens of an answer as they follow a prompt, without its end.

        Raises ValueError where the builder makes no prompts.
        """
        raise ValueError(f"{type(self).__name__} makes no prompts: there is nothing to answer")

    def heard(self, members: Mapping[str, Any]) -> list[Tensor]:
        """Return what an encoder hears of each sound of a sample, fp64 [n]; none by default.

        A builder of sounds has a `front_end`, at whose rate they are.
        """
        return []

    def measure(self, members: Mapping[str, Any]) -> tuple[int, int]:
        """Return tokens and tiles of the training example; by default it is built for that."""
        sample = self(members)
        tiles = sum(len(media.tiles) for text in sample.texts for media in text.media.values())
        return sample.num_tokens, tiles

    def blank(self, sample_id: int) -> Sample:
        """Return the sample that stands for a missing one: a token that is not supervised."""
        return Sample(
            (Text(torch.tensor([self.tokenizer.pad_id]), torch.zeros(1)),), sample_id, "blank"
        )


def _blaming(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a builder's method whose errors name the sample."""

    @functools.wraps(method)
    def blaming(self: Builder, members: Mapping[str, Any], *more: Any, **named: Any) -> Any:
        with blamed(f"{members.get('__url__', '')}:{members.get('__key__', '')}"):
            return method(self, members, *more, **named)

    return blaming
