"""Documents become rows of one length for context extension, long documents drawn more often.

Long-Context Data Engineering (arXiv:2402.10171), which ChatQA 2 follows: a document that is
estimated to be short is kept with a small probability, a long one always, and every source gets its
share of the tokens, so that the mix of domains stays. ChatQA 2 puts the characters `<s>` between
documents, as ordinary text, in place of BOS and EOS. Rows are cut from one stream without padding:

    document a | <s> | document b ......... | ... b goes on | <s> | document c
    row 0, `length` tokens                  | row 1

A row is {"tokens", "spans": [{"source", "start", "end"}], "begins"}; separators are in no span.
`begins` is the text of the first tokens, which shows a builder that it has another tokenizer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nvmm.data.prepare.records import read_lines, to_sample
from nvmm.data.prepare.resume import Resumed
from nvmm.data.samples.token_rows import BEGINS
from nvmm.data.samples.tokenizer import Tokenizer

SLIMPAJAMA = {
    "RedPajamaCommonCrawl": 0.534,
    "RedPajamaC4": 0.266,
    "RedPajamaGithub": 0.050,
    "RedPajamaArXiv": 0.043,
    "RedPajamaBook": 0.041,
    "RedPajamaWikipedia": 0.034,
    "RedPajamaStackExchange": 0.032,
}
"""The shares of SlimPajama's sources, by its `meta.redpajama_set_name`."""


@dataclass(frozen=True)
class Rules:
    """What is drawn, and how rows are cut.

    tokens: of all rows together. mix: source -> share of them. length: tokens of a row.
    long_tokens: a document of fewer, estimated as characters / chars_per_token, is short.
    keep_short: the probability of keeping a short one.
    separator: the text between two documents.
    """

    tokens: int
    mix: Mapping[str, float] = field(default_factory=lambda: dict(SLIMPAJAMA))
    length: int = 131072
    long_tokens: int = 4096
    keep_short: float = 0.1
    chars_per_token: float = 3.68
    separator: str = "<s>"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 2 or self.tokens < self.length:
            raise ValueError(
                f"length={self.length}, tokens={self.tokens}: need 2 <= length <= tokens"
            )
        if not 0 <= self.keep_short <= 1 or self.chars_per_token <= 0:
            raise ValueError(
                f"keep_short={self.keep_short} must be in [0, 1] and"
                f" chars_per_token={self.chars_per_token} above 0"
            )
        if not self.mix or any(share <= 0 for share in self.mix.values()):
            raise ValueError(f"mix={dict(self.mix)}: every source needs a share above 0")
        if abs(sum(self.mix.values()) - 1) > 1e-6:
            raise ValueError(f"mix={dict(self.mix)}: the shares sum to {sum(self.mix.values())}")

    def budgets(self) -> dict[str, int]:
        """Return the tokens that each source gives."""
        return {source: round(self.tokens * share) for source, share in self.mix.items()}

    def keeps(self, number: int, text: str) -> bool:
        """Return whether the document of this number is drawn."""
        if len(text) / self.chars_per_token >= self.long_tokens:
            return True
        digest = hashlib.blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.keep_short


@dataclass
class Stream:
    """Where the stream of tokens is: JSON throughout, so that a killed call goes on from it.

    documents: read so far. used: tokens that each source has given. left_out: documents, by why.
    tokens, spans: what is not cut into a row yet.
    """

    documents: int = 0
    used: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    def row(self, length: int) -> dict[str, Any]:
        """Cut off a row of the first `length` tokens; documents that go on are in the next too."""
        record = {
            "tokens": self.tokens[:length],
            "spans": [
                {**span, "end": min(span["end"], length)}
                for span in self.spans
                if span["start"] < length
            ],
        }
        self.tokens = self.tokens[length:]
        self.spans = [
            {
                "source": span["source"],
                "start": max(0, span["start"] - length),
                "end": span["end"] - length,
            }
            for span in self.spans
            if span["end"] > length
        ]
        return record


def documents(paths: Iterable[str | Path], key: str) -> Iterator[tuple[str, str]]:
    """Yield source and text of the documents of .jsonl files.

    key: where the source stands, with dots between nested keys (`meta.redpajama_set_name`).
    """
    for path in paths:
        for number, record in enumerate(read_lines(path), 1):
            source: Any = record
            for part in key.split("."):
                source = source.get(part) if isinstance(source, Mapping) else None
            text = record.get("text")
            if not isinstance(source, str) or not isinstance(text, str):
                raise ValueError(f"{path}: document {number} needs a text and a {key}")
            yield source, text


def separator_ids(tokenizer: Tokenizer, separator: str) -> list[int]:
    """Return the separator's tokens; ValueError where it is a special token, and no text."""
    ids = tokenizer.encode(separator)
    if tokenizer.token_id(separator) is not None and len(ids) == 1:
        raise ValueError(
            f"separator={separator} is one token of {tokenizer.path}; it must be ordinary text"
        )
    return ids


def rows(
    texts: Iterable[tuple[str, str]],
    encode: Callable[[str], list[int]],
    separator: list[int],
    rules: Rules,
    stream: Stream,
    told: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield rows until every source has given its tokens; the rest of the stream is left out.

    encode: text -> tokens, without BOS and EOS. separator: its tokens.
    stream: where to go on; it is always behind the row that was yielded last.
    told: gets the counts of what was left out of the whole stream, in the end.

    Raises ValueError for a source that the mix does not name, and in the end for sources that had
    too few documents: the mix would be another one.
    """
    budgets = rules.budgets()
    counts = Counter(stream.left_out)
    while len(stream.tokens) >= rules.length:
        yield stream.row(rules.length)
    for number, (source, text) in enumerate(texts):
        if source not in budgets:
            raise ValueError(f"document {number}: source {source!r} is none of {list(budgets)}")
        if number < stream.documents:
            continue
        stream.documents, stream.left_out = number + 1, counts
        room = budgets[source] - stream.used.get(source, 0)
        if not room:
            counts["of a source that has given its tokens"] += 1
            if all(stream.used.get(name, 0) >= budget for name, budget in budgets.items()):
                break
            continue
        if not rules.keeps(number, text):
            counts["short and not drawn"] += 1
            continue
        tokens = encode(text)[:room]
        if not tokens:
            continue
        if stream.tokens or stream.used:
            stream.tokens += separator
        start = len(stream.tokens)
        stream.tokens += tokens
        stream.spans.append({"source": source, "start": start, "end": len(stream.tokens)})
        stream.used[source] = stream.used.get(source, 0) + len(tokens)
        while len(stream.tokens) >= rules.length:
            yield stream.row(rules.length)
    lacking = {
        source: f"{stream.used.get(source, 0)} of {budget}"
        for source, budget in budgets.items()
        if stream.used.get(source, 0) < budget
    }
    if lacking:
        raise ValueError(f"too few documents for the mix: tokens by source {lacking}")
    for why, count in counts.items():
        told(f"{count} documents: {why}")
    told(f"{len(stream.tokens)} tokens at the end, which fill no row")


def samples(
    read: Callable[[], Iterable[tuple[str, str]]],
    tokenizer: Tokenizer,
    rules: Rules,
    told: Callable[[str], None],
) -> Callable[[Any], Resumed]:
    """Return rows as samples for `write_steps`; what was tokenised before is not so again."""
    separator = separator_ids(tokenizer, rules.separator)

    def make(state: Any) -> Resumed:
        done = state["rows"] if state else 0
        stream = Stream(**state["stream"]) if state else Stream()
        cut = rows(read(), tokenizer.encode, separator, rules, stream, told)
        for number, row in enumerate(cut, done):
            row["begins"] = tokenizer.decode(row["tokens"][:BEGINS])
            reached = partial(_reached, number + 1, stream)
            yield to_sample(f"{number:08d}", row), reached

    return make


def _reached(count: int, stream: Stream) -> dict[str, Any]:
    return {"rows": count, "stream": vars(stream)}
