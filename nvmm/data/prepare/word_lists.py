"""Lists of words to write under verifiable instructions: prompts, demonstrations, splits.

A prompt names words and says which of them to write, in which order, case and form:

    Take the first 3 of these words: river, lamp, stone, apple. Put them in alphabetical order. Use
    capital letters.

Every demand has an exact verifier of `nvmm.evaluation.instruction_following`. The files are in
IFEval's layout (`prompt`, `instruction_id_list`, `kwargs`, `key`), and demonstrations are shards of
conversations.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from nvmm.data.prepare.once import once
from nvmm.data.prepare.records import to_sample
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.data.shards.dataset import write_shards
from nvmm.io.files import write

Order = Literal["given", "ascending", "descending"]
Case = Literal["given", "capital"]
Form = Literal["plain", "bullets", "quoted"]
CARELESS = 0.25
"""The probability that a demonstration overlooks a demand, as people's do."""
FORMAT = 2
"""A number that is increased when the data made from the same arguments change."""
WORDS = tuple(
    re.findall(
        r"\w+",
        """anchor bread candle desert engine forest garden hammer island jacket kettle ladder market
        needle orange pencil quarry rabbit school tunnel umbrella valley window yellow coffee dragon
        lemon mirror parrot river silver zebra""",
    )
)
"""None of them stands in another one, or in a prompt's sentences: `keywords:existence` is exact."""
LENGTHS = (3, 5)
"""The fewest and the most words of a prompt."""
SHARES = {"sft": 0.6, "preference": 0.75, "rpo": 0.9, "heldout": 1.0}
"""Split -> where its share of all sets of words ends."""
TUNED_ON = 500
"""The prompts of the last split that the experiments' settings were chosen on."""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")
VOCAB_SIZE = 1024
_SENTENCES = {
    "ascending": "Put them in alphabetical order.",
    "descending": "Put them in reverse alphabetical order.",
    "capital": "Use capital letters.",
    "bullets": "Begin a line with * for each.",
    "quoted": "Put the answer in double quotation marks.",
}


@dataclass(frozen=True)
class Amounts:
    """The number of demonstrations and of the prompts of each split, and the seed."""

    sft: int = 16_000
    preference: int = 5_000
    rpo: int = 5_000
    heldout: int = 500
    seed: int = 1234


@dataclass(frozen=True)
class Task:
    """Words, how many of the first are wanted, and in which order, case and form."""

    words: tuple[str, ...]
    count: int
    order: Order = "given"
    case: Case = "given"
    form: Form = "plain"

    @property
    def sentences(self) -> list[str]:
        """What is asked for beside the words."""
        asked = (self.order, self.case, self.form)
        return [_SENTENCES[name] for name in asked if name in _SENTENCES]

    @property
    def instructions(self) -> list[tuple[str, dict[str, Any]]]:
        """The verifiers of every demand, with their arguments."""
        named = list(self.words[: self.count])
        number = "length_constraints:number_words"
        rules: list[tuple[str, dict[str, Any]]] = [
            ("keywords:existence", {"keywords": named}),
            (number, {"num_words": self.count, "relation": "at least"}),
            (number, {"num_words": self.count + 1, "relation": "less than"}),
        ]
        if self.order != "given":
            rules.append(("order:alphabetical", {"direction": self.order}))
        if self.case == "capital":
            rules.append(("change_case:english_capital", {}))
        if self.form == "bullets":
            rules.append(("detectable_format:number_bullet_lists", {"num_bullets": self.count}))
        elif self.form == "quoted":
            rules.append(("startend:quotation", {}))
        return rules

    @property
    def answer(self) -> str:
        """An answer that follows; words that no order is asked of stand as they are given."""
        words = list(self.words[: self.count])
        if self.order != "given":
            words.sort(reverse=self.order == "descending")
        if self.case == "capital":
            words = [word.upper() for word in words]
        if self.form == "bullets":
            return "\n".join(f"* {word}" for word in words)
        text = " ".join(words)
        return f'"{text}"' if self.form == "quoted" else text


def overlooked(task: Task, rng: random.Random) -> Task:
    """Return what a careless writer makes of a task: each demand is left out now and then."""

    def kept(wanted: Any, plain: Any) -> Any:
        return plain if rng.random() < CARELESS else wanted

    return Task(
        task.words,
        kept(task.count, len(task.words)),
        kept(task.order, "given"),
        kept(task.case, "given"),
        kept(task.form, "plain"),
    )


def split_of(words: tuple[str, ...]) -> str:
    """Return the split of a set of words, whatever their order."""
    digest = hashlib.sha256(" ".join(sorted(words)).encode()).hexdigest()
    place = int(digest[:13], 16) / 16**13
    return next(name for name, end in SHARES.items() if place < end)


def tasks(split: str, amount: int, seed: int) -> Iterator[tuple[str, Task]]:
    """Yield prompts and their tasks; no prompt comes twice, and none of another split."""
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    while len(seen) < amount:
        words = tuple(rng.sample(WORDS, rng.randint(*LENGTHS)))
        count = rng.randint(2, len(words) - 1) if rng.random() < 0.5 else len(words)
        task = Task(
            words,
            count,
            rng.choice(get_args(Order)),
            rng.choice(get_args(Case)),
            rng.choice(get_args(Form)),
        )
        prompt = _prompt(task, rng)
        if split_of(words) == split and task.sentences and prompt not in seen:
            seen.add(prompt)
            yield prompt, task


def demonstrations(amount: int, seed: int) -> Iterator[tuple[str, Task, str]]:
    """Yield prompts, their tasks, and careless answers."""
    rng = random.Random(f"{seed}/careless")
    for prompt, task in tasks("sft", amount, seed):
        yield prompt, task, overlooked(task, rng).answer


def _prompt(task: Task, rng: random.Random) -> str:
    part = "" if task.count == len(task.words) else f"the first {task.count} of "
    sentences = task.sentences
    rng.shuffle(sentences)
    return " ".join([f"Take {part}these words: {', '.join(task.words)}.", *sentences])


def build(folder: str | Path, amounts: Amounts = Amounts()) -> bool:
    """Write shards, prompts, tokenizer and a data card; return False if they were there already.

    folder/sft/train-*.tar, folder/{preference,rpo,heldout}.jsonl, folder/tokenizer. The same
    arguments give the same bytes.
    """
    folder = Path(folder)
    return once(folder, {"format": FORMAT, **asdict(amounts)}, partial(_write, folder, amounts))


def _write(folder: Path, amounts: Amounts) -> None:
    samples = (
        to_sample(f"sft{number:06d}", {"messages": _messages(prompt, answer)})
        for number, (prompt, _, answer) in enumerate(demonstrations(amounts.sft, amounts.seed))
    )
    write_shards(folder / "sft", "train", samples, samples_per_shard=2000)
    for split in ("preference", "rpo", "heldout"):
        amount = getattr(amounts, split)
        # Settings were chosen on the first held-out prompts; results are of those behind them.
        first = TUNED_ON if split == "heldout" else 0
        drawn = itertools.islice(tasks(split, first + amount, amounts.seed), first, None)
        lines = [
            json.dumps(_record(f"{split}{number}", prompt, task))
            for number, (prompt, task) in enumerate(drawn)
        ]
        write(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    _train_tokenizer(folder / "tokenizer", amounts.seed)
    rows = "\n".join(f"| {split} | {getattr(amounts, split)} |" for split in SHARES)
    write(
        folder / "README.md",
        _CARD.format(rows=rows, seed=amounts.seed, words=len(WORDS), careless=CARELESS),
    )


def _messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _record(key: str, prompt: str, task: Task) -> dict[str, Any]:
    names, arguments = zip(*task.instructions, strict=True)
    return {
        "key": key,
        "prompt": prompt,
        "instruction_id_list": list(names),
        "kwargs": list(arguments),
    }


def _train_tokenizer(folder: Path, seed: int) -> None:
    """Train a byte-level BPE in which every word is a token of each form that it is written in."""
    texts = ["system\nuser\nassistant\n"] * 100
    for prompt, task in tasks("sft", 2000, seed):
        texts += [prompt, task.answer]
    train_byte_level_bpe(
        folder,
        texts,
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


_CARD = """# Lists of words under verifiable instructions

Made by `tools/demo_alignment.py` of nvmm (seed {seed}); the same arguments give the same bytes. All
of it is made by rule, of {words} English words that nvmm lists; nothing is of another source.

A prompt names 3 to 5 words and asks for all or the first of them, in an order, a case and a form.
Each demand has an exact verifier (IFEval's, and `order:alphabetical` of nvmm). A set of words is in
one split, whatever the order and the demands.

Demonstrations are careless: each of the four demands is overlooked with probability {careless}, and
such answers are wrong.

| split | prompts |
|---|---|
{rows}

`sft/train-*.tar` has demonstrations too. The .jsonl files have prompts and verifiers in IFEval's
layout, and no answers. `tokenizer/` is a byte-level BPE in the Hugging Face format.
"""
