"""The retrieval set of openmoji as a folder: pictures, M-BEIR's files, a tokenizer, a data card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvmm.data.prepare import openmoji, openmoji_tasks
from nvmm.data.prepare.once import once
from nvmm.data.samples.retrieval import TEMPLATE
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.io.files import write

FORMAT = 1
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
VOCAB_SIZE = 2048


@dataclass(frozen=True)
class Settings:
    """size: pixels of a picture's side. seed: of the split and of every draw."""

    size: int = 64
    seed: int = 1234


def build(folder: str | Path, settings: Settings = Settings(), package: Path | None = None) -> bool:
    """Write the set, its card and its tokenizer; return False if it was there already.

    The same arguments give the same bytes. package: see `openmoji.fetch`.

    Raises ValueError where the package cannot be had, or drawn.
    """
    folder = Path(folder)

    def make() -> None:
        source = openmoji.fetch(folder / "package", package)
        write_set(source, folder, settings, processes=os.cpu_count() or 1)

    return once(folder, {"format": FORMAT, "package": openmoji.SHA256, **asdict(settings)}, make)


def write_set(package: Path, folder: Path, settings: Settings, *, processes: int) -> None:
    """Write the set from an unpacked package; see `build`. processes: that draw at a time."""
    entries, failed = openmoji.build_entries(
        package,
        openmoji.read(package),
        folder,
        size=settings.size,
        seed=settings.seed,
        processes=processes,
    )
    counts = openmoji_tasks.write_all(entries, folder, settings.seed)
    texts = [entry.caption for entry in entries if entry.split == "train"]
    texts += [openmoji_tasks.TONE.format(tone) for tone in openmoji.TONES] * 100
    texts += [openmoji_tasks.BLACK_AND_WHITE] * 100
    prompts = [prompt for each in openmoji_tasks.INSTRUCTIONS.values() for prompt in each]
    texts += [TEMPLATE.format(instruction=prompt) for prompt in prompts] * 100
    train_byte_level_bpe(
        folder / "tokenizer",
        texts,
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    write(folder / "README.md", _card(counts, failed, settings))


def _card(counts: Mapping[str, Mapping[str, int]], failed: list[str], settings: Settings) -> str:
    columns = list(next(iter(counts.values())))
    head = f"| split | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
    rows = "".join(
        f"| {split} | {' | '.join(str(found[column]) for column in columns)} |\n"
        for split, found in counts.items()
    )
    return _CARD.format(
        table=head + rows,
        failed=", ".join(failed) or "none",
        most=openmoji.MOST_NAMES,
        dataset=openmoji_tasks.DATASET,
        sha256=openmoji.SHA256,
        **asdict(settings),
    )


_CARD = """# openmoji as a retrieval set in M-BEIR's layout

Made by `tools/openmoji_data.py` of nvmm (seed {seed}); the same arguments give the same bytes.

## Source and licence
All emoji designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org),
licence CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). npm's package openmoji
17.0.0, sha256 {sha256}.
Changes: each SVG is drawn on white at {size} x {size} pixels by cairosvg. Whoever passes these
pictures on passes them on under the same licence.

## What is in it
- A picture in colour of every emoji, and a drawing in black of those without a skin tone, as tones
  look alike in black. Emoji of two skin tones are left out. Pictures of equal pixels are one
  candidate with several names; one of more than {most} names (a flag in black) is left out. Not
  drawn by cairosvg: {failed}.
- A caption of every name: the name and up to four tags. Emoji of one name share a caption.
- Four tasks, with M-BEIR's numbers: 0 text to picture, 3 picture to text, 4 picture to another
  picture of the base emoji (in black, in another skin tone), 7 picture and text to picture ("the
  same with dark skin tone", "the same in black and white"). The id of the set is {dataset}.
- `pos_cand_list` and qrels have every right candidate. `neg_cand_list` has the query's own picture
  (tasks 4 and 7), other skin tones, and emoji of the same subgroup. A query's own picture stays in
  the pools.
- Splits are by concept: emoji that share a base (whatever the skin tone or gender), a name or a
  picture are in one split. Concepts are split 80 : 5 : 15. Pools have their split's candidates
  alone.
- Captions and texts are made by rule; the instructions are nvmm's.

{table}
## Files
`query/SPLIT/`, `qrels/SPLIT/`, `cand_pool/local/` (one task), `cand_pool/global/` (all),
`instructions/query_instructions.tsv` and `images/`, as UniIR publishes M-BEIR. `mbeir_union_SPLIT`
has the queries of all tasks. `negatives/random.jsonl` has, for each training query, candidates of
the training pool drawn at random. `tokenizer/` is a byte-level BPE of the training captions.
"""
