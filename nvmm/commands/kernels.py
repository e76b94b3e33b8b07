"""Compile the kernels, or say which there are: `nvmm kernels`, `nvmm kernels build`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nvmm.kernels import build


def main() -> int:
    """Return 0, or 1 where a library was asked for that there is not."""
    options = parser().parse_args()
    return compile_to(options) if options.command == "build" else say()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Without a command: which kernels this installation has."
    )
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("build", help="compile them, with nvcc's where it is found")
    command.add_argument("--to", type=Path, default=build.library(), help="default: %(default)s")
    command.add_argument("--cuda", action="store_true", help="with the CUDA kernels, or fail")
    command.add_argument("--require", action="store_true", help="fail where it cannot be built")
    return parser


def compile_to(options: argparse.Namespace) -> int:
    """Build, or say in one line why eager PyTorch will be used."""
    try:
        cuda = build.build(options.to, cuda=options.cuda or None)
    except build.BuildError as error:
        print(f"kernels are not built, eager PyTorch is used: {error}", file=sys.stderr)
        return 1 if options.require or options.cuda else 0
    print(f"{options.to}: CPU{' and CUDA' if cuda else ''}")
    return 0


def say() -> int:
    """Print where the library is and what it has; eager PyTorch takes the place of what is not."""
    from nvmm.kernels.library import MISSING, PATH, has_cuda

    if MISSING is not None:
        print(f"eager PyTorch: {MISSING}")
        return 1
    print(f"{PATH}: CPU{' and CUDA' if has_cuda() else ''}")
    return 0
