"""The console command: `nvmm train experiment=NAME`, `nvmm --help`.

The module of a command is imported when the command is called, so that --help, --version,
completion and the refusal of an unknown command import neither torch nor Hydra.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from difflib import get_close_matches
from typing import NoReturn

BAD_COMMAND = 2
COMMANDS = {
    "train": ("nvmm.train", "train a model, or go on with a run"),
    "evaluate": ("nvmm.evaluate", "score a checkpoint by a benchmark"),
    "generate": ("nvmm.generate", "answer one prompt"),
    "job": ("nvmm.job", "vectors, rankings, answers, scores, synthetic data"),
    "report": ("nvmm.report.page", "write a run as one HTML page"),
    "convert": ("nvmm.commands.convert", "Hugging Face folders to checkpoints and back"),
    "shard": ("nvmm.commands.shard", "turn data into shards, and index shards"),
    "inspect": ("nvmm.commands.inspect_batch", "show a batch as training sees it"),
    "verify-parallel": ("nvmm.commands.verify_parallel", "prove that a layout equals one rank"),
    "plan": ("nvmm.commands.plan", "memory and seconds of a layout, on paper"),
    "kernels": ("nvmm.commands.kernels", "compile the kernels, or say which there are"),
    "doctor": ("nvmm.commands.doctor", "what is installed here, and what is missing for what"),
    "completion": ("nvmm.commands.completion", "print the completion of bash or zsh"),
    "torchrun": ("nvmm.commands.torchrun", "torchrun, without its trace of a refused config"),
}
"""Command -> module, whose `main` reads sys.argv, and what it does."""


def main() -> NoReturn:
    """Run the command that the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
        sys.exit(0)
    if name in ("--version", "-V") or (name in COMMANDS and "--version" in rest):
        from nvmm.version import line

        print(line())
        sys.exit(0)
    if name not in COMMANDS:
        closest = get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"; did you mean {closest[0]}?" if closest else ""
        print(f"nvmm: {name} is no command{hint} (nvmm --help lists them)", file=sys.stderr)
        sys.exit(BAD_COMMAND)
    run(name, rest)


def run(name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code.

    arguments: None for those of the process.
    """
    # Python puts the current folder, in which a user's own package is, before a module's names
    # (-m), but a script's folder before a script's.
    if not sys.flags.safe_path and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    sys.argv = [f"nvmm {name}", *(sys.argv[1:] if arguments is None else arguments)]
    # mcore warns of their absence in every module; `backend` decides what runs, and says so.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    from nvmm.config.compose import failures

    with failures(f"nvmm {name}"):
        sys.exit(importlib.import_module(COMMANDS[name][0]).main())


def help_text() -> str:
    """Return the list of the commands."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "nvmm trains the multimodal LLM systems of NVIDIA Research on megatron-core.\n\n"
        f"usage: nvmm COMMAND [...]      nvmm COMMAND --help      nvmm --version\n\n{listed}\n\n"
        "Ranks: torchrun --standalone --nproc-per-node 8 -m nvmm train experiment=NAME ...\n"
        "A package in the current folder can be named in configs (_target_: my_package.Thing)."
    )
