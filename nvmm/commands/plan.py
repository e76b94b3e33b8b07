"""Print what a decoder's training takes on each GPU, on paper: gigabytes and seconds.

    nvmm plan llama3_8b_128k --tokens 131072 --rows 32 8x1x1x1 4x2x1x1 --recompute full

A layout is TP x CP x PP x DP, with sequence parallelism where TP is above 1. Gigabytes (1e9 bytes)
are the fullest rank's; those of activations are of `backend=native`, and tests/tools/test_memory.py
compares them with what a layer keeps. Seconds are the matrix products' at --flops and a pipeline's
bubble. Nothing was run on a GPU: allocator, NCCL and the kernels' own buffers come on top.
"offload" is the seconds that a micro-batch's activations take to the host at 25 GB/s; nvmm does not
move them there.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nvmm.config.check import config_dir

Recompute = Literal["none", "selective", "full"]
COLUMNS = 2048
"""Columns of logits that the chunked cross-entropy holds at a time."""
GB = 1e9
HEAD = (
    *("TP x CP x PP x DP", "GPUs", "weights", "gradients", "optimizer", "activations"),
    *("working", "loss", "sum", "s a step", "offload"),
)


@dataclass(frozen=True)
class Layout:
    """Sizes of the layout and what is recomputed."""

    tensor: int
    context: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: Recompute = "full"

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.tensor * self.context * self.pipeline * self.data


def layer_bytes(sizes: dict[str, Any], tokens: int, layout: Layout, size: int = 2) -> float:
    """Return the bytes that a layer keeps for backward of a row of so many tokens, on one rank.

    sizes: as `nvmm.modules.flops.language_flops` takes them. size: bytes of a number.
    """
    tp, cp = layout.tensor, layout.context
    own = tokens / cp
    hidden, ffn = sizes["hidden_size"] / tp, sizes["ffn_hidden_size"] / tp
    heads = sizes["num_attention_heads"] / tp
    query = heads * sizes["kv_channels"]
    group = sizes["num_query_groups"] * sizes["kv_channels"] / tp
    if layout.recompute == "full":
        return size * own * hidden
    # 1. The inputs of both norms and of the linears behind them, fc1's output and fc2's input.
    fc1 = (2 if sizes["gated_linear_unit"] else 1) * ffn
    kept = size * own * (4 * hidden + fc1 + ffn) + 8 * own
    # 2. The output of attention, which is the projection's input.
    kept += size * own * query
    if layout.recompute == "selective":
        # 3. Turned q and k, and v as a part of what the fused linear gave.
        return kept + size * own * (query + group + query + 2 * group)
    # 3. q, the softmax's sums, and k and v of all heads, for two chunks of queries, which together
    #    see 2 CP + 1 of the row's 2 CP chunks.
    seen = float(tokens)
    if cp > 1:
        seen = tokens * (2 * cp + 1) / (2 * cp)
        kept += size * own * query  # the two chunks' outputs, before they are one tensor
    return kept + size * own * query + 4 * own * heads + 2 * size * seen * query


def plan(
    sizes: dict[str, Any], vocab_size: int, tokens: int, rows: int, layout: Layout, flops: float
) -> dict[str, float]:
    """Return gigabytes of the fullest rank, and seconds of a step of `rows` rows, by name."""
    from nvmm.modules.flops import language_flops

    tp, cp, pp, dp = layout.tensor, layout.context, layout.pipeline, layout.data
    # 1. Parameters of a rank: its layers, and the embedding or the output layer of an end.
    hidden, layers = sizes["hidden_size"], sizes["num_layers"] / pp
    query = sizes["num_attention_heads"] * sizes["kv_channels"]
    groups = 2 * sizes["num_query_groups"] * sizes["kv_channels"]
    mlp = (3 if sizes["gated_linear_unit"] else 2) * hidden * sizes["ffn_hidden_size"]
    layer = hidden * (2 * query + groups) + mlp
    ends = vocab_size * hidden * (2 if pp == 1 else 1)
    parameters = (layers * layer + ends) / tp
    # 2. What a first stage keeps of the micro-batches that are on their way, and works on.
    held = min(pp, rows // dp)
    activations = layers * held * layer_bytes(sizes, tokens, layout)
    positions = 4 * tokens / cp * sizes["kv_channels"]
    whole = Layout(tp, cp, recompute="none")
    working = layer_bytes(sizes, tokens, whole) if layout.recompute != "none" else 0.0
    working += 2 * tokens / cp * 3 * sizes["ffn_hidden_size"] / tp + positions
    # 3. The loss, on the last stage: hidden states, their gradient in fp32 and a part of it, and
    #    columns of logits (docs/kernels.md).
    loss = tokens / cp * ((2 + 4 + 2) * hidden + 2 * COLUMNS) if pp == 1 else 0.0
    out = {
        "weights": 2 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 12 * parameters / (dp * cp),
        "activations": activations,
        "working": working,
        "loss": loss,
    }
    out = {name: value / GB for name, value in out.items()} | {"sum": sum(out.values()) / GB}
    # 4. Seconds: a third more where layers run forward twice, and the pipeline's bubble.
    step: float = language_flops(**sizes, vocab_size=vocab_size, segment_lengths=[tokens] * rows)
    again = language_flops(
        **sizes, vocab_size=0, segment_lengths=[tokens] * rows, training="frozen"
    )
    step += again if layout.recompute == "full" else 0.0
    micro_batches = rows / dp
    bubble = (micro_batches + pp - 1) / micro_batches
    seconds = step * bubble / (layout.gpus * flops)
    return out | {"s a step": seconds, "offload": activations / held / 25e9}


def sizes_of(model: str, folder: Path | None = None) -> tuple[dict[str, Any], int]:
    """Return a decoder's sizes, and rows of its embedding. Raises ValueError for another model.

    folder: more groups of configs, as of --config-dir.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    folders = [config_dir(), *([] if folder is None else [folder.resolve()])]
    if not any((each / "language" / f"{model}.yaml").is_file() for each in folders):
        raise ValueError(f"{model} is no language/*.yaml of {' or '.join(map(str, folders))}")
    more = [f"hydra.searchpath=[file://{each}]" for each in folders[1:]]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(f"language/{model}", more).language)
    names = (
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
        *("kv_channels", "ffn_hidden_size", "gated_linear_unit"),
    )
    return {name: config["transformer"][name] for name in names}, config["padded_vocab_size"]


def parsed(text: str, sizes: dict[str, Any], rows: int, recompute: Recompute) -> Layout:
    """Return the layout of "8x2x1x4". Raises ValueError for one that cannot be."""
    numbers = [int(part) if part.isdigit() else 0 for part in text.split("x")]
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(f"{text} must be TPxCPxPPxDP, four numbers of at least 1")
    tensor, context, pipeline, data = numbers
    layout = Layout(tensor, context, pipeline, data, recompute)
    for name, number, whole in (
        ("TP", layout.tensor, sizes["num_query_groups"]),
        ("PP", layout.pipeline, sizes["num_layers"]),
        ("DP", layout.data, rows),
    ):
        if whole % number:
            raise ValueError(f"{text}: {name}={number} must divide {whole}")
    return layout


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="of configs/language/")
    parser.add_argument("--config-dir", type=Path, help="more groups of configs, from your own")
    parser.add_argument("layouts", nargs="+", metavar="TPxCPxPPxDP")
    parser.add_argument("--tokens", type=int, default=131072, help="of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a step; a micro-batch is one")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="full")
    parser.add_argument("--flops", type=float, default=0.4 * 989e12, help="a GPU's, a second")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    try:
        sizes, vocab_size = sizes_of(arguments.model, arguments.config_dir)
        layouts = [
            parsed(text, sizes, arguments.rows, arguments.recompute) for text in arguments.layouts
        ]
    except ValueError as error:
        parser().error(str(error))
    print(" | ".join(("", *HEAD, "")).strip())
    print("|---" * len(HEAD) + "|")
    for layout in layouts:
        found = plan(sizes, vocab_size, arguments.tokens, arguments.rows, layout, arguments.flops)
        name = f"{layout.tensor} x {layout.context} x {layout.pipeline} x {layout.data}"
        cells = [name, str(layout.gpus)]
        for key in HEAD[2:]:
            cells.append(f"{found[key]:.{0 if key in ('sum', 's a step') else 1}f}")
        print(" | ".join(("", *cells, "")).strip())
