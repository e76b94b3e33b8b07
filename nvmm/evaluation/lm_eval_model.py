"""A checkpoint as a model of lm-evaluation-harness, which has the field's tasks (`lm-eval` extra).

Importing this file registers the model `nvmm`. Rank 0 runs the harness: it turns requests into
tokens, and sends each call's work to all ranks (`nvmm.evaluation.token_work`), at any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nvmm.data.samples.chat import Turn
from nvmm.evaluation.token_work import order

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored

Known = Callable[[str, Any], Any]
Done = Callable[[str, Sequence[tuple[Any, Any]]], None]
_MAX_NEW_TOKENS = 256
"""The harness's own default where a task does not say."""


@register_model("nvmm")
class CheckpointLM(TemplateLM):
    """A restored checkpoint behind the harness's three calls, on rank 0.

    Texts are encoded without special tokens but a BOS: tokens are then those that Transformers'
    tokenizer of the exported folder gives. Results depend on no batch size and no layout, but for
    rounding.

    Args:
        model: a restored checkpoint, or a checkpoint's folder, which is restored on one rank.
        batch_size: rows of a forward pass, on each data-parallel rank.
        add_bos: begin every text with BOS; None: where the checkpoint's template does.
        use_cache: decode with a KV cache.
        seed: a drawn answer depends on the seed, the prompt and nothing else.
        known: returns the result of a request that an evaluation before this one has, else None.
        done: takes (call, [(request, result)]) as they come.
    """

    backend = "causal"

    def __init__(
        self,
        model: Restored | str,
        batch_size: int = 8,
        add_bos: bool | None = None,
        use_cache: bool = True,
        seed: int = 1234,
        known: Known = lambda call, request: None,
        done: Done = lambda call, results: None,
    ) -> None:
        from nvmm.inference.restore import restore

        super().__init__()
        self._model = restore(model) if isinstance(model, str) else model
        self._model.require_answers()
        self._words = self._model.tokenizer
        self._size = int(batch_size)
        template: Any = getattr(self._model.builder, "template", None)
        self._bos = bool(getattr(template, "bos", False)) if add_bos is None else add_bos
        if self._bos and self._words.bos_id is None:
            raise ValueError("add_bos=true, and the checkpoint's tokenizer names no BOS")
        self._options = {"use_cache": use_cache, "seed": seed}
        self._known, self._done = known, done

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows: BOS, where there is none EOS."""
        return self._words.eos_id if self._words.bos_id is None else self._words.bos_id

    @property
    def max_length(self) -> int:
        """The tokens of the longest input."""
        return self._model.max_sequence_length

    @property
    def max_gen_toks(self) -> int:
        """The tokens of the longest answer where a task does not say."""
        return _MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template from others, for the harness's caches."""
        return f"nvmm-{self._words.digest[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the harness notes as the template: that of the checkpoint has no text."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template={chat_template}: a checkpoint has one template; use true"
            )
        return repr(getattr(self._model.builder, "template", None)) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation in the checkpoint's template, up to where the answer begins.

        Raises ValueError where the text does not have the tokens that the template gives.
        """
        builder: Any = self._model.builder
        if not add_generation_prompt:
            raise ValueError("answers that are begun for the model (gen_prefix) are not built here")
        if not hasattr(builder, "conversation"):
            raise ValueError(f"{type(builder).__name__} has no template of conversations")
        turns = [Turn(message["role"], message["content"], False) for message in chat_history]
        tokens = builder.conversation(turns, "conversation", prompt=True).text.tokens.tolist()
        text = self._words.decode(tokens, skip_special_tokens=False)
        if self.tok_encode(text) != tokens:
            raise ValueError(f"the tokens of a conversation are not those of its text {text!r}")
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Return token ids, with BOS in front unless `add_special_tokens` is false or it is there.

        options: left_truncate_len, the number of last tokens that are kept.
        """
        tokens = self._words.encode(string)
        first = self._words.bos_id
        if self._bos and add_special_tokens is not False and tokens[:1] != [first]:
            tokens = [first, *tokens]  # type: ignore[list-item]
        left = options.get("left_truncate_len")
        return tokens[-left:] if left else tokens

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._words.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows of the longest input."""

        def windows(text: str) -> list[tuple[list[int], int]]:
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            return [
                (before + after, len(after)) for before, after in map(make_disjoint_window, pairs)
            ]

        texts = [request.args[0] for request in requests]
        found = self._scored("loglikelihood_rolling", texts, list(map(windows, texts)))
        return [sum(value for value, _ in rows) for rows in found]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of continuations; long contexts are cut."""
        keys = [list(texts) for texts, _, _ in requests]
        rows = []
        for texts, before, after in requests:
            if not after or len(after) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(after)} tokens, and max_length={self.max_length}:"
                    f" {texts[1][:80]!r}"
                )
            rows.append([((before + after)[-(self.max_length + 1) :], len(after))])
        found = self._scored("loglikelihood", keys, rows)
        return [(float(value), bool(greedy)) for [(value, greedy)] in found]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return answers up to the first stop string, EOS or end of a turn; requests alike share
        a batch. The text is cut in front of the string, wherever tokens end.
        """
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            known = self._known("generate_until", list(request.args))
            if known is not None:
                found[number] = known
            else:
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
            options = generation(requests[numbers[0]].args[1], eos)
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={options['max_new_tokens']} leaves no room for a prompt in"
                    f" max_length={self.max_length}"
                )
            # A text without a token follows what a text without a context follows.
            prompts = {
                n: self.tok_encode(requests[n].args[0])[-room:] or [self.prefix_token_id]
                for n in numbers
            }
            longest_first = sorted(numbers, key=lambda n: -len(prompts[n]))
            for some in self._portions(longest_first):
                rows = [prompts[n] for n in some]
                texts = order(self._model, "generate", rows, options | self._options, self._size)
                found |= dict(zip(some, texts, strict=True))
                self._done("generate_until", [(list(requests[n].args), found[n]) for n in some])
        return [found[number] for number in range(len(requests))]

    def _scored(
        self, call: str, requests: Sequence[Any], rows: Sequence[list[tuple[list[int], int]]]
    ) -> list[list[tuple[float, bool]]]:
        """Return the results of each request's rows, the longest requests first."""
        found = {number: self._known(call, request) for number, request in enumerate(requests)}
        missing = [number for number, known in found.items() if known is None]

        def length(number: int) -> int:
            return max((len(tokens) for tokens, _ in rows[number]), default=0)

        for some in self._portions(sorted(missing, key=length, reverse=True)):
            wanted = [row for n in some for row in rows[n]]
            results = iter(order(self._model, "score", wanted, {}, self._size))
            found |= {number: list(islice(results, len(rows[number]))) for number in some}
            self._done(call, [(requests[number], found[number]) for number in some])
        return [found[number] for number in range(len(requests))]

    def _portions(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """Return the numbers in portions of a batch for each data-parallel rank."""
        from megatron.core import parallel_state

        size = self._size * parallel_state.get_data_parallel_world_size()
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def generation(asked: Mapping[str, Any], eos: str) -> dict[str, Any]:
    """Return a task's generation options as ours: stop strings, max_new_tokens, temperature, top_p.

    Without `do_sample` or with temperature 0 the likeliest token is taken. Raises ValueError for an
    option that decoding does not have.
    """
    options = dict(asked)
    until = handle_stop_sequences(options.pop("until", None), eos=eos)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [value for name in names if (value := options.pop(name, None)) is not None]
    temperature = float(options.pop("temperature", None) or 0.0)
    sample = options.pop("do_sample", temperature > 0)
    top_p = float(options.pop("top_p", 1.0))
    left = {name: value for name, value in options.items() if (name, value) != ("num_beams", 1)}
    if left:
        raise ValueError(
            f"generation options {left} are not built: use until, max_gen_toks, do_sample,"
            " temperature and top_p"
        )
    if sample and not temperature:
        temperature = 1.0
    return {
        "until": [text for text in until if text],
        "max_new_tokens": int(limits[0]) if limits else _MAX_NEW_TOKENS,
        "temperature": temperature if sample else 0.0,
        "top_p": top_p,
    }
