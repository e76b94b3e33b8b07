"""The command's own checkpoint as a generator, and as a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.chat import Turn
from nvmm.jobs.synthesis.asking import Keep, Source
from nvmm.jobs.synthesis.records import Reply, Request

if TYPE_CHECKING:
    from nvmm.batch import Sample
    from nvmm.inference.restore import Restored


class _InProcess(Source):
    """What the ranks do together: each data-parallel group takes its share of a batch."""

    in_process = True
    batch_size: int

    def replies(
        self,
        requests: Sequence[tuple[str, Request]],
        keep: Keep,
        counts: Counter[str],
        model: Restored | None,
    ) -> list[Reply]:
        """Answer with the checkpoint, a batch of every data-parallel rank at a time; collective."""
        from megatron.core import parallel_state

        from nvmm.inference.decoding import gather, share

        if model is None:
            raise ValueError(f"a generator is {type(self).__name__}: give checkpoint=DIR")
        rank = parallel_state.get_data_parallel_rank()
        size = parallel_state.get_data_parallel_world_size()
        found: dict[int, Reply] = {}
        samples: dict[int, Sample] = {}
        # 1. Every rank builds all prompts: which of them are bad is known everywhere.
        for number, (key, request) in enumerate(requests):
            try:
                samples[number] = self._sample(key, request, model)
            except BadSample as error:
                found[number] = Reply("", str(error))
        # 2. Prompts of like length share a batch, and each batch is kept when it is there.
        order = sorted(samples, key=lambda number: (samples[number].num_tokens, number))
        step = self.batch_size * size
        for start in range(0, len(order), step):
            some = order[start : start + step]
            own = [some[i] for i in share(len(some), rank, size)]
            local = self._answers([samples[number] for number in own], model)
            for number, reply in zip(some, gather(local, len(some)), strict=True):
                found[number] = reply
                keep(requests[number][1], reply)
            counts["requests"] += len(some)
        for number in range(len(requests)):
            if number not in samples:
                keep(requests[number][1], found[number])
        return [found[number] for number in range(len(requests))]

    def _sample(self, key: str, request: Request, model: Restored) -> Sample:
        raise NotImplementedError

    def _answers(self, samples: Sequence[Sample], model: Restored) -> list[Reply]:
        raise NotImplementedError


def _conversation(request: Request, model: Restored, *, prompt: bool) -> Sample:
    """Return the messages of a request as the checkpoint's builder renders them."""
    from nvmm.data.samples.instruct import InstructBuilder

    if not isinstance(model.builder, InstructBuilder):
        raise ValueError(
            f"{model.path} reads no conversations: its data.train.build is"
            f" {type(model.builder).__name__}"
        )
    turns = [Turn(role, text) for role, text in request.messages]
    what = f"{request.generator}: prompt {request.prompt_digest[:12]}"
    return model.builder.conversation(turns, what, prompt=prompt)


@dataclass(frozen=True)
class Checkpoint(_InProcess):
    """Answers of the checkpoint that the command restores (`checkpoint=DIR`), at any layout.

    A sampled answer depends on the seed and on what is asked, not on batch or ranks. JSON is asked
    for by the prompt's words alone, and validated.

    Args:
        max_new_tokens: tokens of the longest answer. One that is cut there is an error, as of an
            endpoint: half an answer is no example.
        temperature, top_p: as of `nvmm.generate`.
        seed: seed of sampling.
        batch_size: prompts decoded together on a data-parallel rank.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 1234
    batch_size: int = 8

    @property
    def identity(self) -> dict[str, Any]:
        """The parameters of sampling; the pipeline adds the checkpoint's digest."""
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        return {"kind": "checkpoint", **{name: getattr(self, name) for name in names}}

    def _sample(self, key: str, request: Request, model: Restored) -> Sample:
        import dataclasses

        sample = _conversation(request, model, prompt=True)
        room = model.max_sequence_length - self.max_new_tokens
        if sample.num_tokens > room:
            raise BadSample(sample.source, f"{sample.num_tokens} tokens, at most {room}")
        # The answer is drawn from a generator of this number: the key's, which no other has.
        return dataclasses.replace(sample, sample_id=int(key[:15], 16))

    def _answers(self, samples: Sequence[Sample], model: Restored) -> list[Reply]:
        answers = model.generate_tokens(
            samples,
            self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        return [
            self._reply(model, tokens, sample.num_tokens)
            for tokens, sample in zip(answers, samples, strict=True)
        ]

    def _reply(self, model: Restored, tokens: list[int], input_tokens: int) -> Reply:
        text, error, finish = model.text_of(tokens), None, "stop"
        if len(tokens) == self.max_new_tokens:
            text, finish = "", "length"
            error = f"the answer was cut at max_new_tokens={self.max_new_tokens}"
        elif not text:
            error = "the answer is empty"
        return Reply(text, error, finish, input_tokens, len(tokens))


@dataclass(frozen=True)
class RewardCheckpoint(_InProcess):
    """Scores of the checkpoint, a reward model: the reply is `reward:NUMBER`.

    Args:
        weights: of its outputs; null: 1 of a single one, and those of Nemotron-4-340B-Reward's card
            of nine.
        batch_size: conversations scored together on a data-parallel rank.
    """

    weights: Sequence[float] | None = None
    batch_size: int = 8

    @property
    def identity(self) -> dict[str, Any]:
        """The weights; the pipeline adds the checkpoint's digest."""
        weights = None if self.weights is None else list(self.weights)
        return {"kind": "reward", "weights": weights}

    def _sample(self, key: str, request: Request, model: Restored) -> Sample:
        return _conversation(request, model, prompt=False)

    def _answers(self, samples: Sequence[Sample], model: Restored) -> list[Reply]:
        from nvmm.inference.scoring import scalars

        return [
            Reply(
                f"reward:{float(scalars(scores, self.weights, 'weights')[0])!r}",
                input_tokens=sample.num_tokens,
            )
            for scores, sample in zip(
                model.rewards(samples, len(samples) or 1), samples, strict=True
            )
        ]
