"""The answers of an evaluation on disk, as they come, so that one that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nvmm.config.nested import differences
from nvmm.io.files import lock, write

IDENTITY, PREDICTIONS, SKIPPED = "evaluation.json", "predictions.jsonl", "skipped.jsonl"
IMAGES, METRICS = "images.jsonl", "metrics.json"

_LAYOUT = (
    *("parallel", "kernels", "batch_size", "num_samples", "max_bad_fraction", "use_cache"),
    *("checkpoint", "tokenizer", "base", "output", "trust_config"),
)
"""Keys of the config that no answer depends on: layout, paths, and how many are asked."""


class Journal:
    """The folder of one evaluation.

    - evaluation.json: what its answers depend on: config, checkpoint, data.
    - predictions.jsonl: a line an answer, in the order of the questions.
    - skipped.jsonl: a line for each question that has no score, with the reason.
    - images.jsonl: the images of the first answers, for the report.
    - metrics.json: the result, written in the end.

    Lines are appended whole. An evaluation in a folder that has lines of the same identity goes on
    behind them, with any number of ranks; one of another identity is refused. `num_samples` is no
    part of it: more questions go on too.

    config: the command's. checkpoint: folder of the checkpoint that answers.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], checkpoint: Path) -> None:
        self.folder = folder
        facts = {key: value for key, value in config.items() if key not in _LAYOUT}
        digest = hashlib.sha256()
        for name in ("state.json", "weights.json"):
            file = checkpoint / name
            digest.update(file.read_bytes() if file.is_file() else b"")
        self._lock = ExitStack()
        self._identity = {"config": facts, "checkpoint": digest.hexdigest()}

    def start(self, data: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Begin, or go on; return the lines that are there: (predictions, skipped).

        Called on one rank. The folder is locked until `finish`, or the end of this object.

        data: what tells these questions from others, as JSON.

        Raises ValueError for a folder that holds another evaluation, damaged lines, or lines that
        another process is writing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.enter_context(lock(self.folder / ".lock", wait=False, required=False))
        except BlockingIOError as error:
            raise ValueError(
                f"another evaluation is writing to {self.folder}; name another with output=DIR"
            ) from error
        identity = json.loads(json.dumps({**self._identity, "data": data}))
        if not (self.folder / IDENTITY).exists():
            held = [name for name in (PREDICTIONS, METRICS) if (self.folder / name).exists()]
            if held:
                raise ValueError(
                    f"{self.folder} has {held[0]} of an evaluation that does not say what its"
                    f" answers depend on (no {IDENTITY}); {_ELSEWHERE}"
                )
            write(self.folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
            return [], []
        try:
            saved = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / IDENTITY} is damaged; {_ELSEWHERE}") from error
        for key, old, new in differences(saved, identity, in_lists=True):
            key = key.removeprefix("config.")
            raise ValueError(
                f"{self.folder} holds an evaluation with {key}={old}, not {new}; {_ELSEWHERE}"
            )
        return self._lines(PREDICTIONS), self._lines(SKIPPED)

    def append(
        self, predictions: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write lines behind those that are there, and bring them to the disk."""
        (self.folder / METRICS).unlink(missing_ok=True)
        for name, lines in ((PREDICTIONS, predictions), (SKIPPED, skipped)):
            if lines:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                with open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())

    def finish(self, summary: Mapping[str, Any], images: Iterator[Mapping[str, Any]]) -> None:
        """Write the result and the images that the report draws."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line) + "\n" for line in images]
        if lines:
            write(self.folder / IMAGES, "".join(lines))
        write(self.folder / METRICS, json.dumps(summary, indent=2) + "\n")
        self._lock.close()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file; cut off a last one that was not written whole."""
        file = self.folder / name
        if not file.exists():
            return []
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = []
        seen: set[int] = set()
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(line))
                if lines[-1]["sample_id"] in seen:
                    raise ValueError("a second answer")
                seen.add(lines[-1]["sample_id"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{file}: line {number} is damaged ({error}); {_ELSEWHERE}"
                ) from error
        if len(whole) < len(content):
            os.truncate(file, len(whole))
        return lines


_ELSEWHERE = "remove the folder to begin anew, or name another with output=DIR"
