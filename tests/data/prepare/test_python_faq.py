"""Questions of a small FAQ, dialogues made of them by hand, and whole chapters held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvmm.data.prepare.python_faq import (
    dialogues,
    documents,
    faq_sections,
    first_sentence,
    plain,
    split,
    topics,
)

FAQ = """:tocdepth: 2

===========
Small FAQ
===========

.. contents::

Lists
=====

How do I copy a list?
---------------------

.. index:: copy

Use :meth:`~list.copy`, or a ``slice``.  See `the tutorial <https://x>`_.

More words.

How do I sort a list-like thing quickly?
----------------------------------------

Call :func:`sorted`
with a key.

What is Python?
---------------

A language.

Files
=====

How do I copy a file?
---------------------

Use shutil::

    shutil.copy(a, b)

How do I delete a file?
-----------------------

A language.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("faq", FAQ), ("tutorial", "Intro\n=====\n\nWelcome.\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "small.rst.txt").write_text(text)
    return tmp_path


def test_questions_with_their_chapters_and_plain_answers(folder: Path) -> None:
    found = faq_sections(folder)
    assert [(s.document, s.question) for s in found] == [
        ("faq/small/Lists", "How do I copy a list?"),
        ("faq/small/Lists", "How do I sort a list-like thing quickly?"),
        ("faq/small/Lists", "What is Python?"),
        ("faq/small/Files", "How do I copy a file?"),
    ], "an answer that is there already is left out with its question"
    assert found[0].answer == "Use list.copy, or a slice.  See the tutorial.\n\nMore words."
    assert "shutil.copy(a, b)" in found[3].answer
    assert plain("**a** `b <c>`__ :ref:`d`") == "a b d"
    with pytest.raises(ValueError, match="has no questions"):
        faq_sections(folder / "tutorial")


def test_documents_are_chapters_without_their_questions(folder: Path) -> None:
    texts = {line["_id"]: line["text"] for line in documents(faq_sections(folder), folder)}
    assert list(texts) == ["faq/small/Lists", "faq/small/Files", "tutorial/small"]
    assert texts["faq/small/Lists"].endswith("Call sorted\nwith a key.\n\nA language.")
    assert not any("How do I" in text for text in texts.values())


def test_whole_chapters_are_held_out(folder: Path) -> None:
    sections = faq_sections(folder)
    training, held_out = split(sections, 0.2)
    assert {s.document for s in training}.isdisjoint(s.document for s in held_out)
    assert sorted(map(id, training + held_out)) == sorted(map(id, sections))
    assert len(held_out) >= 1 and training and split(sections, 0.0) == (sections, [])


def test_a_dialogue_by_hand(folder: Path) -> None:
    sections = faq_sections(folder)
    assert topics(sections)["How do I copy a list?"] == ["list", "copy"], "copy is in two questions"
    assert topics(sections)["How do I sort a list-like thing quickly?"][:2] == ["sort", "list-like"]
    made = list(dialogues(sections, sections, 2))
    assert [line["_id"] for line in made] == [
        "000-0",
        "000-1",
        "001-0",
        "001-1",
        "002-0",
        "003-0",
        "003-1",
    ]
    spoken = [f"{turn['role']}: {turn['content']}" for turn in made[2]["messages"]]
    assert spoken == [
        "user: How do I copy a list?",
        "agent: Use list.copy, or a slice.",
        "user: I have a question about sort.",
        "agent: What would you like to know about sort?",
        "user: How do I it a list-like thing quickly?",
        "agent: Call sorted with a key.",
    ]
    evidence = [turn.get("evidence") for turn in made[2]["messages"]]
    assert evidence == [None, "", None, "", None, "Call sorted with a key."]
    # The first question of a chapter follows none; a question of common words keeps them.
    assert len(made[0]["messages"]) == 4
    assert [turn["content"] for turn in made[4]["messages"]][-2] == "What is Python?"
    [alone] = [d for d in dialogues(sections, sections, 1, form="last_turn") if d["_id"] == "001-0"]
    assert [turn["content"] for turn in alone["messages"]] == [
        "How do I it a list-like thing quickly?",
        "Call sorted with a key.",
    ]
    whole = list(dialogues(sections, sections, 1, form="question"))
    assert whole[1]["messages"][0]["content"] == "How do I sort a list-like thing quickly?"


def test_first_sentences() -> None:
    assert first_sentence("Yes. No.") == "Yes."
    assert first_sentence("Use 3.5\nor so\n\nThen") == "Use 3.5 or so"
    assert len(first_sentence("word " * 99).split()) == 40
