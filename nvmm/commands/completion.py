"""Shell completion: put `eval "$(nvmm completion bash)"` into ~/.bashrc, or zsh's into ~/.zshrc.

It completes commands, groups, options and keys of configs (Hydra's own completion, with those of
--config-dir), subcommands and their options, and files elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from nvmm.commands.main import COMMANDS

ENTRIES = {name: name for name in ("train", "evaluate", "generate", "job")}
ENTRIES |= {"inspect": "train", "verify-parallel": "train"}
"""Command that takes overrides -> its config."""
WITH_PARSERS = ("convert", "shard", "kernels", "plan")
"""Commands whose module has a function `parser`."""

BASH = """\
_nvmm() {
    local line=${COMP_LINE:0:COMP_POINT} word
    word=${line##*[[:space:]]}
    mapfile -t COMPREPLY < <(compgen -W "$(nvmm completion query "$line" 2>/dev/null)" -- "$word")
    # Bash replaces what is behind the last of COMP_WORDBREAKS alone.
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    fi
}
complete -o nospace -o default -F _nvmm nvmm"""
ZSH = """\
_nvmm() {
    local -a choices
    choices=(${=$(nvmm completion query "${(j: :)words[1,CURRENT]}" 2>/dev/null)})
    if (( $#choices )); then compadd -Q -S '' -- $choices; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _nvmm nvmm"""


def main() -> None:
    """Print a shell's function, or (query) the words that may stand at the end of a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shells = parser.add_subparsers(dest="shell", required=True)
    shells.add_parser("bash", help="print bash's function")
    shells.add_parser("zsh", help="print zsh's function")
    query = shells.add_parser("query", help="what the functions call at every completion")
    query.add_argument("line", help="the command line up to the cursor")
    options = parser.parse_args()
    if options.shell == "query":
        print(" ".join(choices(options.line)))
    else:
        print(BASH if options.shell == "bash" else ZSH)


def choices(line: str) -> Iterable[str]:
    """Return what may stand where a line ends; Hydra prints its part by itself."""
    words = line.split() + [""] * line[-1:].isspace()
    word, given = words[-1], words[1:-1]
    if not given:
        return [name for name in (*COMMANDS, "--help", "--version") if name.startswith(word)]
    command, *arguments = given
    if command in WITH_PARSERS:
        return [each for each in _of_parser(command, arguments) if each.startswith(word)]
    if command not in ENTRIES:
        return []
    folders = _config_folders(arguments)
    group, equals, _ = word.partition("=")
    if equals and any((folder / group.lstrip("+")).is_dir() for folder in folders):
        return [each for each in _options(group, folders) if each.startswith(word)]
    _of_config(ENTRIES[command], [*arguments, word], folders[1:])
    return []


def _of_parser(command: str, arguments: list[str]) -> list[str]:
    """Return the subcommands and options that a command's parser takes after `arguments`."""
    parser = importlib.import_module(COMMANDS[command][0]).parser()
    while True:
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        options = [*parser._option_string_actions]
        if not below:
            return options
        if not arguments or arguments[0] not in below[0].choices:
            return [*below[0].choices, *options]
        parser = below[0].choices[arguments.pop(0)]


def _config_folders(arguments: list[str]) -> list[Path]:
    """Return the folder of nvmm's configs, and the user's that a line names with --config-dir."""
    from nvmm.config.check import config_dir

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    with contextlib.suppress(argparse.ArgumentError):
        if (folder := parser.parse_known_args(arguments)[0].config_dir) is not None:
            return [config_dir(), folder]
    return [config_dir()]


def _options(group: str, folders: list[Path]) -> list[str]:
    """Return `group=option` for the options in the folders, below other folders too."""
    names = {
        path.relative_to(folder / group.lstrip("+")).with_suffix("").as_posix()
        for folder in folders
        for path in (folder / group.lstrip("+")).rglob("*.yaml")
    }
    return [f"{group}={name}" for name in sorted(names)]


def _of_config(entry: str, arguments: list[str], folders: list[Path]) -> None:
    """Let Hydra print the groups and keys that fit the last argument."""
    from nvmm.config import compose

    more = [text for folder in folders for text in ("--config-dir", str(folder))]
    os.environ |= {"COMP_LINE": " ".join([entry, *arguments]), "COMP_POINT": "0"}
    sys.argv = [entry, "-sc", "query=bash", *more]
    compose.load(entry)
