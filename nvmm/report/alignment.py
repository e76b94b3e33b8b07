"""Stages of alignment as one HTML page: scores, losses, log-probabilities, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nvmm.report.charts import Series, figure, legend, line_chart
from nvmm.report.study import Table, document, score_table

ANSWERS_STYLE = """
.said { display: grid; gap: 6px 12px; grid-template-columns: 60px 1fr; align-items: start; }
.said b { font-weight: 600; font-size: 13px; }
.said pre { margin: 0; padding: 4px 8px; border-left: 3px solid var(--bad); white-space: pre-wrap; }
.said pre.right { border-left-color: var(--good); }
.card.prompt { border-top-color: var(--rule); margin-bottom: 14px; }
"""

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Curves:
    """What is drawn of training.

    losses: stage -> (step, loss). likelihoods: stage -> answer (chosen, rejected) -> (step, its
    log-probability).
    """

    losses: Mapping[str, Points]
    likelihoods: Mapping[str, Mapping[str, Points]]


@dataclass(frozen=True)
class Said:
    """An answer, and whether it follows everything that its prompt asks."""

    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A prompt with the answer of every stage, by its name."""

    prompt: str
    answers: Mapping[str, Said]


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    curves: Curves,
    examples: Sequence[Example],
) -> str:
    """Return the page."""
    likelihoods = [
        chart(f"Log-probabilities, {stage}", sides, "log-probability of an answer")
        for stage, sides in curves.likelihoods.items()
    ]
    losses = [
        chart(f"Loss, {stage}", {"loss": points}, "loss") for stage, points in curves.losses.items()
    ]
    sections = {
        "Scores": "".join(map(score_table, tables)),
        "Chosen and rejected answers": charts(likelihoods),
        "Losses": charts(losses),
        "Answers": "".join(map(answer_card, examples)),
    }
    shown = {name: content for name, content in sections.items() if content}
    return document(title, "alignment", notes, shown, ANSWERS_STYLE)


def charts(some: Sequence[str]) -> str:
    """Return charts side by side, "" where none is drawn."""
    drawn = "".join(some)
    return f"<div class=charts>{drawn}</div>" if drawn else ""


def chart(title: str, lines: Mapping[str, Points], label: str) -> str:
    """Return a chart of lines by their names, "" without points."""
    series = [Series(name, points, number) for number, (name, points) in enumerate(lines.items())]
    drawn = line_chart(series, label=label)
    above = legend(series) if len(series) > 1 else ""
    return figure(title, above + drawn) if drawn else ""


def answer_card(example: Example) -> str:
    """Return a prompt with its answers; those that are right are marked."""
    said = "".join(
        f"<b>{escape(stage)}</b><pre class={'right' if answer.right else 'wrong'}>"
        f"{escape(answer.text) or '(nothing)'}</pre>"
        for stage, answer in example.answers.items()
    )
    return (
        f"<article class='card prompt'><p>{escape(example.prompt)}</p>"
        f"<div class=said>{said}</div></article>"
    )
