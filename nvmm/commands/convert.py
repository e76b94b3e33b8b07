"""Convert weights between Hugging Face folders and checkpoints of ours, and compare them.

nvmm convert import --from QWEN_DIR --to CKPT
nvmm convert import --from language=QWEN_DIR --from vision=INTERNVIT_DIR --to CKPT \
    model=nvlm_d_7b
nvmm convert import --from language=NV_EMBED_DIR --from vision=CLIP_DIR \
    --from connector=LLAVA_NEXT_DIR --to CKPT model=mm_embed_8b
nvmm convert import --from language=OPT_DIR --from audio=CLAPCAP.pth --to CKPT \
    model=audio_flamingo
nvmm convert import --from query=BERT_DIR --from context=BERT_DIR --to CKPT
nvmm convert export --from RUN_DIR --to HF_DIR --format nvlm_d
nvmm convert verify --a HF_DIR --b CKPT
nvmm convert inspect CKPT_OR_HF_DIR
nvmm convert inspect CKPT --verify
nvmm convert average --from CKPT --from CKPT --to CKPT
nvmm convert reshard --from CKPT --to CKPT --dtype bf16
nvmm convert merge --from LORA_RUN --to CKPT
nvmm convert adapter export --from LORA_RUN --to PEFT_DIR --format qwen2 --part language
nvmm convert adapter import --from PEFT_DIR --base CKPT --to CKPT --format qwen2

Sources and targets may be URLs of any fsspec file system.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nvmm.convert.files import at

BAD_INPUT = 2
"""Exit code of a refused conversion: starting again cannot help."""
WRITTEN = (
    *("qwen2", "qwen3", "llama", "yi", "mistral", "nemotron", "internvit", "internvl"),
    *("internvl_vision", "clip", "clap", "siglip", "opt", "whisper", "nvlm_d", "llava", "vila"),
    *("vila15", "audio_flamingo3", "nv_embed", "mm_embed", "bert"),
    *("llama_reward", "mistral_reward", "nemotron_reward", "qwen2_reward"),
)
"""The formats of `export`; the formats themselves need torch."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, 1 when `verify` finds a difference or damage, or BAD_INPUT."""
    options = parser().parse_args(arguments)
    if (missing := _missing_path(options)) is not None:
        print(f"convert {options.command}: {missing} does not exist", file=sys.stderr)
        return BAD_INPUT
    from hydra.errors import InstantiationException

    try:
        return options.run(options)
    except (ValueError, OSError, InstantiationException) as error:
        print(f"convert {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT


def _missing_path(options: argparse.Namespace) -> str | None:
    """Return a local folder or file of the command line that is not there, if there is one.

    It is looked for before anything heavy is imported.
    """
    names = [getattr(options, key, None) for key in ("source", "path", "a", "b", "tokens")]
    names.append(getattr(options, "tokenizer", None))
    if options.command != "adapter" or options.direction == "import":
        names.append(getattr(options, "base", None))  # of an export it may be a name on a hub
    for text in filter(None, [*names, *getattr(options, "sources", ())]):
        paths = [Path(text), Path(text.partition("=")[2] or text)]  # PART=FOLDER, or a folder
        if "://" not in text and not any(path.expanduser().exists() for path in paths):
            return str(text)
    return None


def import_(options: argparse.Namespace) -> int:
    """Import Hugging Face folders as a checkpoint of ours."""
    from nvmm.convert.importing import check_given, derive, import_folders, opened
    from nvmm.convert.models import DTYPES, SOURCES, TOWERS, open_checkpoint, open_folder

    folders = {}
    for text in options.sources:
        part, equals, name = text.partition("=")
        part, name = (part, name) if equals and part in (*SOURCES, *TOWERS) else ("", text)
        if part in folders:
            raise ValueError(f"--from {text}: that part has a source already")
        folders[part] = open_folder(at(name))
    config = _composed(options.overrides, options.config_dir) if options.overrides else {}
    folders = opened(folders, config.get("model"))
    if config:
        check_given(folders, config["model"])
    for folder in folders.values():
        for file in getattr(folder.source, "unread", ()):
            print(f"not read: {folder.path / file}")
    model = config.get("model") or derive(folders)
    initialised = import_folders(
        folders,
        model,
        _constructor(model),
        at(options.to),
        config={name: config[name] for name in ("tokenizer", "data") if config.get(name)},
        dtype=DTYPES.get(options.dtype),
        seed=options.seed,
        workers=options.workers,
    )
    for name in initialised:
        print(f"initialised from seed {options.seed}: {name}")
    state = open_checkpoint(at(options.to)).state
    for name in state["dropped"]:
        print(f"left out: {name}")
    if left := state["left_to_the_run"]:
        print(f"in no source, and started by the run that begins here: {len(left)} parameters")
    print(options.to)
    return 0


def export(options: argparse.Namespace) -> int:
    """Export a checkpoint of ours as a Hugging Face folder."""
    from nvmm.convert.exporting import export
    from nvmm.convert.models import DTYPES, open_checkpoint

    [source] = options.sources
    export(
        open_checkpoint(at(source)),
        at(options.to),
        options.format,
        part=options.part,
        dtype=DTYPES.get(options.dtype),
        vocab_size=options.vocab_size,
        tokenizer=at(options.tokenizer) if options.tokenizer else None,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        ranker=options.ranker,
    )
    print(options.to)
    return 0


def rewrite(options: argparse.Namespace) -> int:
    """Write a weights-only copy of one checkpoint (reshard), or the mean of several (average)."""
    from nvmm.convert.exporting import rewrite
    from nvmm.convert.models import DTYPES, open_checkpoint

    if (options.command == "average") != (len(options.sources) > 1):
        raise ValueError("reshard takes one --from, average several")
    rewrite(
        [open_checkpoint(at(source)) for source in options.sources],
        at(options.to),
        dtype=DTYPES.get(options.dtype),
        workers=options.workers,
    )
    print(options.to)
    return 0


def merge(options: argparse.Namespace) -> int:
    """Merge a LoRA checkpoint and its base to one checkpoint without adapters."""
    from nvmm.convert.adapters import merge
    from nvmm.convert.models import DTYPES, open_checkpoint

    [source] = options.sources
    saved = open_checkpoint(Path(source).expanduser())
    merge(
        saved,
        Path(options.to).expanduser(),
        _constructors(options)(saved.model),
        base=Path(options.base).expanduser() if options.base else None,
        dtype=DTYPES.get(options.dtype),
        workers=options.workers,
    )
    print(options.to)
    return 0


def adapter(options: argparse.Namespace) -> int:
    """Export a LoRA checkpoint's adapters as a PEFT folder, or import one."""
    from nvmm.convert.adapters import export_adapter, import_adapter
    from nvmm.convert.models import open_checkpoint

    source, to = Path(options.source).expanduser(), Path(options.to).expanduser()
    if options.direction == "import" and options.base is None:
        raise ValueError("adapter import needs --base, the checkpoint that the adapter is for")
    export = options.direction == "export"
    saved = open_checkpoint(source if export else Path(options.base).expanduser())
    constructor = _constructors(options)(saved.model)
    if export:
        export_adapter(saved, to, options.format, constructor, part=options.part, base=options.base)
    else:
        import_adapter(source, saved, to, options.format, constructor, part=options.part)
    print(options.to)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print names, shapes, dtypes, config and layout; no tensor is loaded.

    With --verify every tensor is read, and nothing is printed but whether it is as it was saved.
    """
    from nvmm.convert.verify import inspect, open_side, verified

    if options.verify:
        whole, text = verified(at(options.path))
        print(text)
        return 0 if whole else 1
    about = inspect(open_side(at(options.path)))
    if options.json:
        print(json.dumps(about, indent=1))
        return 0
    for name, (dtype, shape) in about.pop("tensors").items():
        print(f"{name}  {dtype} {shape}")
    about |= {"parameters": f"{about['parameters']:,}", "bytes": f"{about['bytes']:,}"}
    for key, value in about.items():
        print(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare tensors through the mapping, then logits; the report lies beside b's weights."""
    from nvmm.convert.logits import logits, token_rows
    from nvmm.convert.verify import aligned, compare_logits, compare_tensors, open_side

    a, b = aligned(*(open_side(at(name)) for name in (options.a, options.b)))
    report: dict[str, Any] = {"a": str(a.path), "b": str(b.path), **compare_tensors(a, b)}
    same = report["equal"] == report["tensors"] and not report["only_in_a"] + report["only_in_b"]
    if options.logits:
        file = Path(options.tokens) if options.tokens else None
        tokens = token_rows((a, b), file, options.max_token, options.seed)
        make = _constructors(options)
        outputs = [logits(side, tokens, make, options.seed) for side in (a, b)]
        report["logits"] = "not compared: the model gives none"
        if outputs[0] is not None and outputs[1] is not None:
            report["logits"] = compare_logits(outputs[0], outputs[1])
            same = same and report["logits"]["max_difference"] <= options.tolerance
    report["same"] = same
    text = json.dumps(report, indent=1)
    (b.path / "verify.json").write_text(text + "\n")
    print(text)
    return 0 if same else 1


def _composed(overrides: list[str], folder: str | None) -> dict[str, Any]:
    """Compose `model=NAME` or `experiment=NAME` with overrides, for its model and data."""
    from nvmm.config import check, compose

    groups = [text for text in overrides if text.startswith(("model=", "experiment="))]
    if len(groups) != 1:
        raise ValueError("give one of model=NAME and experiment=NAME, then overrides of it")
    plain, problems = check.resolve(compose.composed("train", overrides, folder))
    # An experiment's unset data and run settings are of no concern here.
    missing = [str(problem) for problem in problems if problem.key.startswith("model.")]
    if missing:
        raise ValueError("\n".join(missing))
    return plain if groups[0].startswith("experiment=") else {"model": plain["model"]}


def _constructor(model: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(model, _convert_="all")


def _constructors(options: argparse.Namespace) -> Any:
    """Return the function that makes a constructor of a checkpoint's config, if it is trusted."""
    from nvmm.inference.trust import require_trusted

    def trusted(model: Any) -> Any:
        if not options.trust_config:
            require_trusted(model, Path("the checkpoint"))
        return _constructor(model)

    return trusted


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("import", help="Hugging Face folders -> our checkpoint")
    command.set_defaults(run=import_)
    _common(
        command,
        "folder, or language=, vision=, connector= and audio=FOLDER, or query=FOLDER and"
        " context=FOLDER; CLAP's own file in the place of its folder",
        workers=True,
    )
    command.add_argument("--seed", type=int, default=1234, help="of what no folder gives")
    command.add_argument("--config-dir", help="more groups of configs, from your own folder")
    command.add_argument("overrides", nargs="*", help="model=NAME or experiment=NAME, and changes")

    command = commands.add_parser("export", help="our checkpoint -> a Hugging Face folder")
    command.set_defaults(run=export)
    _common(command, "checkpoint or run directory", workers=False)
    _format(command)
    command.add_argument("--vocab-size", type=int, help="rows of the exported vocabulary")
    command.add_argument("--tokenizer", help="folder of the model's tokenizer, if it has moved")
    command.add_argument("--max-shard-gb", type=float, default=5.0)
    command.add_argument(
        "--ranker",
        action="store_true",
        help="as a ranker by P(True): a classifier of one score (--format llama_reward, ...), or a"
        " language model with vLLM's settings to score it (--format llama, ...)",
    )

    for name, text in (
        ("reshard", "a weights-only copy, in one piece"),
        ("average", "the mean of several checkpoints"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=rewrite)
        _common(command, "checkpoint or run directory", workers=True)

    command = commands.add_parser("merge", help="a LoRA checkpoint's adapters into its weights")
    command.set_defaults(run=merge)
    _common(command, "LoRA checkpoint or run directory", workers=True)
    command.add_argument("--base", help="where its base is, if it has moved")
    _trust(command)

    command = commands.add_parser("adapter", help="LoRA adapters to and from PEFT's folders")
    command.set_defaults(run=adapter)
    command.add_argument("direction", choices=("export", "import"))
    command.add_argument("--from", dest="source", required=True, help="LoRA checkpoint, or folder")
    command.add_argument("--to", required=True, help="folder to write; it must not exist")
    command.add_argument(
        "--base",
        help="import: the checkpoint that the adapter is for; export: folder or hub name of the"
        " base in Hugging Face's format, which PEFT's Auto classes load",
    )
    _trust(command)
    _format(command)

    command = commands.add_parser("inspect", help="what a checkpoint or folder holds")
    command.set_defaults(run=inspect)
    command.add_argument("path")
    command.add_argument("--json", action="store_true")
    command.add_argument("--verify", action="store_true", help="read all of it; 1 for damage")

    command = commands.add_parser("verify", help="whether two models are the same")
    command.set_defaults(run=verify)
    command.add_argument("--a", required=True, help="checkpoint or folder")
    command.add_argument("--b", required=True, help="the same; verify.json is written there")
    command.add_argument("--no-logits", dest="logits", action="store_false")
    command.add_argument("--tokens", help="JSON file of rows of token ids, all of one length")
    command.add_argument("--max-token", type=int, default=256, help="random ids are below it")
    command.add_argument("--tolerance", type=float, default=1e-3, help="largest logit difference")
    command.add_argument("--seed", type=int, default=0)
    _trust(command)
    return parser


def _trust(command: argparse.ArgumentParser) -> None:
    text = "run constructors of the checkpoint's config outside nvmm, mcore and torch"
    command.add_argument("--trust-config", action="store_true", help=text)


def _format(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", required=True, choices=WRITTEN)
    parts = ("language", "vision", "audio", "query", "context")
    command.add_argument("--part", choices=parts, help="one part of the model")


def _common(command: argparse.ArgumentParser, source: str, *, workers: bool) -> None:
    command.add_argument("--from", dest="sources", action="append", required=True, help=source)
    command.add_argument("--to", required=True, help="folder to write; it must not exist")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as it is")
    if workers:
        command.add_argument("--workers", type=int, default=1, help="threads, one file each")
