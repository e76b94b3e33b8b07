"""A small real text: the language reference that Python brings along, as passages in shards.

`pydoc_data.topics`, which `help("topics")` reads, holds 79 topics in Python 3.11, 465,000
characters of English, grammar and code. Every eighth is held out. A SentencePiece model is trained
on the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvmm.data.shards.dataset import write_shards

HELD_OUT = 8
"""Of so many topics, by name, one is held out."""
PASSAGE = 800
"""Characters after which a passage ends at the next blank line."""
SYMBOLS = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
"""The tokens of Nemotron-4's dialogues and of its reward model's texts."""


def topics() -> dict[str, list[tuple[str, str]]]:
    """Return name and text of each topic, of `train` and of `validation`."""
    from pydoc_data.topics import topics as texts

    named = sorted(texts.items())
    return {
        "train": [topic for i, topic in enumerate(named) if i % HELD_OUT],
        "validation": named[::HELD_OUT],
    }


def passages(text: str) -> Iterator[str]:
    """Yield a text in pieces of paragraphs, of PASSAGE characters or more but for the last."""
    pending: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        pending.append(paragraph)
        if sum(map(len, pending)) >= PASSAGE:
            yield "\n\n".join(pending)
            pending = []
    if pending:
        yield "\n\n".join(pending)


def build(folder: str | Path, vocab_size: int = 1024) -> None:
    """Write `train-*.tar`, `validation-*.tar` and `tokenizer/topics.model` into a folder.

    The same Python gives the same passages. The tokenizer is of Nemotron-4's kind: BPE, white space
    kept, every digit a token, bytes for what it does not know.

    Raises ValueError without the package sentencepiece.
    """
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError as error:
        raise ValueError(
            f"the tokenizer needs pip install 'nvmm[sentencepiece]' ({error})"
        ) from error
    split = topics()
    for name, texts in split.items():
        samples = [
            {"__key__": f"{topic.replace('.', '_')}-{number:03d}", "txt": passage.encode()}
            for topic, text in texts
            for number, passage in enumerate(passages(text))
        ]
        write_shards(folder, name, samples)
    tokenizer = Path(folder) / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    lines = (line for _, text in split["train"] for line in text.splitlines())
    with (tokenizer / "topics.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            user_defined_symbols=list(SYMBOLS),
            num_threads=1,
            minloglevel=2,
        )
