"""A study of sounds as one HTML page: scores, losses, sounds to look at and to hear."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nvmm.report.alignment import Points, Said, chart, charts
from nvmm.report.study import Table, document, score_table

_STYLE = """
.sounds { display: flex; flex-wrap: wrap; gap: 12px; }
.sounds figure { margin: 0; width: 200px; }
.sounds img { width: 100%; height: 84px; image-rendering: pixelated; }
.sounds audio { width: 100%; height: 32px; }
.sounds figure.asked { border-left: 3px solid var(--rule); padding-left: 10px; }
.said { display: grid; gap: 2px 12px; grid-template-columns: max-content 1fr; margin-top: 8px; }
.said .right { color: var(--good); } .said .wrong { color: var(--bad); }
"""


@dataclass(frozen=True)
class Sound:
    """A sound with its name. flac: the file; png: its spectrogram, low frequencies below."""

    name: str
    flac: bytes
    png: bytes


@dataclass(frozen=True)
class Heard:
    """A question about a sound, the retrieved solved ones, and the answers by their ways."""

    asked: Sound
    solved: Sequence[Sound]
    answers: Mapping[str, Said]


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    losses: Mapping[str, Mapping[str, Points]],
    examples: Sequence[Heard],
) -> str:
    """Return the page. losses: stage -> line -> (step, loss)."""
    drawn = [chart(f"Loss, {stage}", lines, "loss") for stage, lines in losses.items()]
    sections = {
        "Scores": "".join(map(score_table, tables)),
        "Losses": charts(drawn),
        "Sounds": "".join(map(_card, examples)),
    }
    shown = {name: content for name, content in sections.items() if content}
    return document(title, "sound", notes, shown, _STYLE)


def _card(heard: Heard) -> str:
    """Return the solved sounds, the asked one, and what is said of it."""
    figures = "".join(_figure(sound) for sound in heard.solved)
    said = "".join(
        f"<b>{escape(way)}</b><span class={'right' if answer.right else 'wrong'}>"
        f"{escape(answer.text) or '(nothing)'}</span>"
        for way, answer in heard.answers.items()
    )
    return (
        f"<article class='card prompt'><div class=sounds>{figures}"
        f"{_figure(heard.asked, 'asked')}</div><div class=said>{said}</div></article>"
    )


def _figure(sound: Sound, kind: str = "solved") -> str:
    """Return a spectrogram with a player below it."""
    return (
        f"<figure class={kind}><figcaption>{escape(sound.name)}</figcaption>"
        f'<img alt="spectrogram" src="data:image/png;base64,{_text(sound.png)}">'
        f'<audio controls preload="none" src="data:audio/flac;base64,{_text(sound.flac)}"></audio>'
        "</figure>"
    )


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
