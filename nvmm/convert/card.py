"""README.md of an exported folder: what a model is, its stages and their data, and its scores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvmm.checkpoint.files import find, read_state
from nvmm.convert.files import is_local
from nvmm.convert.models import SavedModel

_MOST_STAGES = 20
"""A chain of so many checkpoints is cut: it may lead back to its start."""


def card(saved: SavedModel, format_name: str, part: str | None, count: int) -> str:
    """Return the model card of a checkpoint's export. count: its parameters."""
    whole = "" if part is None else f" (the {part} part)"
    head = (
        "---\nlibrary_name: transformers\ntags: [nvmm]\n---\n\n"
        f"# {saved.path.name}\n\n"
        f"{count:,} parameters{whole} in the {format_name} layout, exported by nvmm on"
        f" {time.strftime('%Y-%m-%d')} from `{saved.path}`, training step"
        f" {saved.state.get('step', 0)}.\n"
    )
    stages = list(_stages(saved))
    trained = [line for state, where in stages for line in _stage(state, where)]
    sections = {
        "Imported from": _sources(stages[-1][0] or {}) or _sources(saved.state),
        "Training, the last stage first": trained,
        "Evaluation": list(_scores(saved.path)),
    }
    return head + "".join(
        f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines
    )


def _stages(saved: SavedModel) -> Iterator[tuple[Mapping[str, Any] | None, str]]:
    """Yield the state and place of a checkpoint and of those that it started from, one after
    another; the state is None where one is not here."""
    state: Mapping[str, Any] | None = saved.state
    where = str(saved.path)
    for _ in range(_MOST_STAGES):
        yield state, where
        before = ((state or {}).get("config") or {}).get("init_from")
        if not isinstance(before, str):
            return
        where = before
        try:
            state = read_state(find(before))
        except (ValueError, OSError):
            state = None


def _stage(state: Mapping[str, Any] | None, where: str) -> list[str]:
    """Return the lines of one stage, none for weights that were imported."""
    if state is None:
        return [f"- `{where}`, which is not here"]
    config = state.get("config") or {}
    if "sources" in state and "merged_from" not in state:
        return []
    run, objective = config.get("run") or {}, config.get("objective") or {}
    name = run.get("name") or where
    facts = {
        "steps": state.get("step"),
        "global batch size": (config.get("trainer") or {}).get("global_batch_size"),
        "learning rate": (config.get("optim") or {}).get("learning_rate"),
        "frozen": ", ".join((config.get("optim") or {}).get("freeze") or ()) or None,
        "objective": str(objective.get("_target_", "")).rpartition(".")[2] or None,
        "LoRA rank": (config.get("lora") or {}).get("rank"),
    }
    said = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    return [f"- **{name}**: {said or 'nothing is known of it'}", *_data(config.get("data") or {})]


def _data(data: Mapping[str, Any]) -> list[str]:
    """Return the lines of a stage's data: its shards, or those of each entry of its blend."""
    entries = data.get("blend") or []
    if not isinstance(entries, list) or not entries:
        entries = [data.get("train") or {}]
    lines = []
    for entry in entries:
        shards = entry.get("shards")
        texts = [shards] if isinstance(shards, str) else shards or []
        weight = entry.get("weight")
        share = "" if weight is None else f", weight {weight}"
        name = f"{entry['name']}: " if entry.get("name") else ""
        if texts:
            lines.append(f"  - data: {name}{', '.join(f'`{text}`' for text in texts)}{share}")
    return lines


def _sources(state: Mapping[str, Any]) -> list[str]:
    sources = state.get("sources") or {}
    return [f"- {name or 'model'}: {entry['folder']}" for name, entry in sources.items()]


def _scores(checkpoint: Path) -> Iterator[str]:
    """Yield a table of what `nvmm.evaluate` wrote beside a run's checkpoint of this step."""
    if not is_local(checkpoint) or checkpoint.parent.name != "checkpoints":
        return
    folder = checkpoint.parent.parent / "evaluation"
    rows = []
    for file in sorted(folder.glob(f"*/{checkpoint.name}/metrics.json")):
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        benchmark = metrics.get("benchmark", file.parent.parent.name)
        rows += [f"| {benchmark} | {name} | {value:g} |" for name, value in _numbers(metrics)]
    if rows:
        yield from ("| benchmark | metric | value |", "|---|---|---|", *rows)


def _numbers(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a result, those of nested mappings under joined names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{name}", value
