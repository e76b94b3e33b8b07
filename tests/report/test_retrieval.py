"""The page of a comparison of retrievers: self-contained, escaped, and with every number."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

from nvmm.report.retrieval import Example, Shown, Table, page

PICTURE = b"\x89PNG picture"


class Checker(HTMLParser):
    """Collects tags, and asserts that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.classes += str(dict(attributes).get("class") or "").split()
        if tag not in ("meta", "img", "line", "circle", "polyline", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "line", "circle", "polyline", "rect"):
            assert self.open.pop() == tag


def made() -> str:
    table = Table("text to image", "<all>", ["hit@1", "hit@5"], [("mined", ["12.5", "50.0 ± 1.0"])])
    found = {
        "random": [Shown("", PICTURE, True), Shown("a <b>")],
        "mined": [Shown("c", None, True), Shown("d"), Shown("e")],
    }
    example = Example("text to image", "Find & show.", Shown("violin"), found)
    other = Example("image to text", "Name it.", Shown("same", PICTURE), {"random": found["mined"]})
    losses = {"random": [(1.0, 4.5), (2.0, 3.0)], "mined": [(1.0, 4.0), (2.0, None)]}
    return page("A <title>", ["one & two"], [table], losses, [example, other])


def test_it_is_whole_and_needs_nothing_else() -> None:
    text = made()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert "<b>" not in text.replace("<b>Find &amp; show.</b>", "").replace(
        "<b>random</b>", ""
    ).replace("<b>mined</b>", "").replace("<b>Name it.</b>", "")
    for shown in ("A &lt;title&gt;", "one &amp; two", "a &lt;b&gt;", "50.0 ± 1.0", "violin"):
        assert shown in text, shown


def test_pictures_and_verdicts_are_those_of_the_candidates() -> None:
    text = made()
    assert text.count(f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}") == 2
    checker = Checker()
    checker.feed(text)
    assert checker.classes.count("right") == 3 and checker.classes.count("wrong") == 5
    assert checker.classes.count("query") == 2
    assert re.findall(r"<h2>(Best candidates: [a-z ]+)</h2>", text) == [
        "Best candidates: text to image",
        "Best candidates: image to text",
    ]


def test_losses_are_drawn_where_there_are_any() -> None:
    assert "<h2>Training</h2>" in made() and 'class="line s1"' in made()
    assert "<h2>Training</h2>" not in page("a", [], [], {}, [])
