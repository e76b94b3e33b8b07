"""Answer one prompt: `nvmm generate checkpoint=DIR image=FILE prompt=TEXT`.

It runs alone or under torchrun, at any tensor and pipeline parallel size; rank 0 prints the answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nvmm.config import compose, machine
from nvmm.config.compose import refusals
from nvmm.parallel import environment

_QUOTES = ("'", '"')


def main() -> None:
    """Compose, check, answer. Exits with compose.BAD_CONFIG when the config is refused."""
    sys.argv[1:] = [quoted(compose.argument(text)) for text in sys.argv[1:]]
    job = compose.load("generate")
    if job is None:
        return
    keys = ("checkpoint.path", "base", "tokenizer.path", "image")
    if problems := [*machine.missing_folders(job.config, keys)]:
        compose.refuse("generate", problems)
    with compose.failures("generate"):
        from torch.distributed.elastic.multiprocessing.errors import record

        record(generate)(job)


def generate(job: compose.Job) -> str:
    """Answer the job's prompt on all ranks; return the text."""
    from nvmm.inference.restore import restore_from
    from nvmm.parallel import setup

    compose.log_to_stderr()
    config = job.config
    system = {} if config["system"] is None else {"template": {"system": config["system"]}}
    with refusals("generate"):
        restored = restore_from(config, system)
        prompt = restored.builder.prompt(members(config["prompt"], config["image"]))
        options = ("temperature", "top_p", "seed", "use_cache")
        [text] = restored.generate(
            [prompt], config["max_new_tokens"], **{name: config[name] for name in options}
        )
    if environment.rank() == 0:
        print(text)
    setup.shutdown()
    return text


def members(prompt: str, images: str | Sequence[str] | None) -> dict[str, bytes | str]:
    """Return the prompt and its images as members of a sample, under our own names of fields.

    Raises ValueError for an image that cannot be read.
    """
    from nvmm.data.samples.record import plain_question

    paths = [images] if isinstance(images, str) else list(images or [])
    data = []
    for path in paths:
        try:
            data.append(Path(path).expanduser().read_bytes())
        except OSError as error:
            raise ValueError(f"image={path} cannot be read ({error.strerror})") from error
    return plain_question(prompt, data, "prompt")


def quoted(text: str) -> str:
    """Put `prompt=` and `system=` in the quotes that Hydra's grammar wants around , and :."""
    key, equals, value = text.partition("=")
    if key not in ("prompt", "system") or not equals or value[:1] in _QUOTES or value == "null":
        return text
    # Hydra reads backslashes as escapes before a quote and nowhere else.
    escaped = re.sub(r"(\\*)'", lambda match: f"{match[1] * 2}\\'", value)
    escaped = re.sub(r"\\+$", lambda match: match[0] * 2, escaped)
    return f"{key}='{escaped}'"


if __name__ == "__main__":
    main()
