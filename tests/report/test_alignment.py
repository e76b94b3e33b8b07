"""The page of the stages of alignment: self-contained, escaped, and with every number."""

from __future__ import annotations

import re

from nvmm.report.alignment import Curves, Example, Said, page
from nvmm.report.study import Table
from tests.report.test_retrieval import Checker


def made(curves: Curves) -> str:
    table = Table("Held-out prompts", "<note>", ["pass"], [("sft", ["41.5 ± 2.0"])])
    example = Example("Take <these> & go.", {"sft": Said("a <b>", True), "dpo": Said("", False)})
    return page("A <title>", ["one & two"], [table], curves, [example])


def test_it_is_whole_and_has_what_was_said() -> None:
    points = [(1.0, 4.5), (2.0, 3.0)]
    curves = Curves({"sft": points}, {"dpo": {"chosen": points, "rejected": [(1.0, -2.0)]}})
    text = made(curves)
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    for shown in ("A &lt;title&gt;", "one &amp; two", "&lt;note&gt;", "41.5 ± 2.0", "a &lt;b&gt;"):
        assert shown in text, shown
    assert "Take &lt;these&gt; &amp; go." in text and "(nothing)" in text
    assert checker.classes.count("right") == 1 and checker.classes.count("wrong") == 1
    assert re.findall("<h2>(.*?)</h2>", text) == [
        *("Scores", "Chosen and rejected answers", "Losses", "Answers"),
    ]
    assert 'class="line s1"' in text and "Log-probabilities, dpo" in text


def test_nothing_is_drawn_where_there_is_nothing() -> None:
    assert re.findall("<h2>(.*?)</h2>", made(Curves({}, {}))) == ["Scores", "Answers"]
