"""tools/ablate_interleaved.py: its data, its arms differ in their choice alone, and it runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import webdataset

from nvmm import studies
from nvmm.config.check import check, to_plain
from nvmm.config.compose import argument, composed
from nvmm.data.prepare import vila_demo
from nvmm.data.prepare.number_words import LANGUAGES
from nvmm.data.prepare.wordnet import fetch, read_nouns
from tests.tools.demo_script import ROOT, run_script
from tools import ablate_interleaved as study

RUNS = Path("runs/x")
OPPOSITE = ["pairs-frozen-visual", "interleaved-trained-blended"]
AMOUNTS = dict(
    text=30, validation=4, numbers=30, captions=40, documents=20, questions=60, words=30
) | dict(shots=40, test=60)


def nouns(path: Path, count: int = 40) -> Path:
    """Write a data.noun of so many synsets: thing0 is the first word of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["  1 This is the licence.\n"]
    for number in range(count):
        words = f"thing{number} 0 other_thing{number} 0"
        gloss = f'a thing of kind {number}; "its example"'
        lines.append(f"{number:08d} 03 n 02 {words} 001 @ 00000001 n 0000 | {gloss}\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data as the experiments read them, in small."""
    folder = tmp_path_factory.mktemp("vila_demo")
    amounts = vila_demo.Amounts(**AMOUNTS)
    source = nouns(folder / "data.noun")
    assert vila_demo.build(folder / study.DATA, source, amounts)
    assert not vila_demo.build(folder / study.DATA, source, amounts)
    return folder


def records(
    data: Path, part: str, split: str = "train"
) -> list[tuple[dict[str, Any], list[bytes]]]:
    """The records of a part with their pictures."""
    paths = [str(path) for path in sorted((data / study.DATA / part).glob(f"{split}-*.tar"))]
    found = []
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        pictures = [value for name, value in sample.items() if name.endswith("png")]
        found.append((json.loads(sample["json"]), pictures))
    return found


def test_nouns_are_read_with_their_words_and_definitions(tmp_path: Path) -> None:
    target = nouns(tmp_path / "wordnet/usr/share/wordnet/data.noun", count=2)
    assert fetch(tmp_path) == target
    first, second = read_nouns(target)
    assert first.words == "thing0, other thing0" and first.gloss == "a thing of kind 0"
    assert second.parents == ("00000001",)


def test_documents_and_pairs_are_the_same_pictures_and_sentences(data: Path) -> None:
    documents, pairs = records(data, "documents"), records(data, "pairs")
    assert len(documents) == 20 and {len(p) for _, p in documents} <= {2, 3, 4, 5, 6}
    singly = [
        (sentence, picture)
        for record, pictures in documents
        for sentence, picture in zip(record["text_list"], pictures, strict=True)
    ]
    assert [(record["caption"], picture) for record, [picture] in pairs] == singly
    for record, _ in documents:
        said = {
            name
            for name, language in LANGUAGES.items()
            if all(s in map(language.say, range(10)) for s in record["text_list"])
        }
        assert said, "a document is of one language"


def test_what_is_held_out_is_in_no_training_data(data: Path) -> None:
    asked = records(data, "questions")
    hidden_question = LANGUAGES[vila_demo.HELD_OUT].question
    assert hidden_question not in {record["question"] for record, _ in asked}
    shots, test = (records(data, "benchmark", name) for name in ("shots", "test"))
    for some in (shots, test):
        kinds = [(record["kind"], record["question"] == hidden_question) for record, _ in some]
        assert set(kinds) == {("seen", False), ("unseen", True)}
        assert abs(sum(unseen for _, unseen in kinds) - len(kinds) / 2) < len(kinds) / 4
    trained = {
        p
        for part in ("documents", "captions", "questions")
        for _, ps in records(data, part)
        for p in ps
    }
    assert not {p for _, ps in test for p in ps} & (trained | {p for _, ps in shots for p in ps})
    hidden = {
        line.partition(",")[0]
        for r, _ in records(data, "text", "validation")
        for line in r["text"].split("\n")
    }
    known = {
        line.partition(",")[0] for r, _ in records(data, "text") for line in r["text"].split("\n")
    }
    words = {
        r["question"].removeprefix("What is the meaning of ").removesuffix("?")
        for r, _ in records(data, "words")
    }
    assert (
        len(hidden) == 8
        and not hidden & (known | words)
        and words <= {f"thing{n}" for n in range(40)}
    )


def test_every_stage_reads_its_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of each experiment are built, and say what they should."""
    from hydra.utils import instantiate

    monkeypatch.chdir(data)
    texts: dict[tuple[str, str], str] = {}
    pictures = {}
    image = vila_demo.SPECIAL_TOKENS.index("<image>")
    for name in ("text", "align", "pairs", "interleaved", "sft", "sft_text"):
        start = [] if name == "text" else ["init_from=x"]
        config = to_plain(composed("train", [f"experiment=vila_demo/{name}", *start]))
        tokenizer = instantiate(config["tokenizer"], _convert_="all")
        made = instantiate(config["data"], _convert_="all")(tokenizer=tokenizer)
        for component in made.components:
            assert all(len(component.dataset[n].text.tokens) <= 256 for n in range(20))
            tokens = component.dataset[0].text.tokens.tolist()
            place = (name, component.name)
            texts[place], pictures[place] = tokenizer.decode(tokens), tokens.count(image)
    assert pictures["interleaved", "train"] in (8, 12, 16, 20, 24), "4 tokens a picture"
    single = [("pairs", "train"), ("align", "train"), ("sft", "train"), ("sft_text", "visual")]
    assert {pictures[place] for place in single} == {4}
    assert {pictures[place] for place in texts if place[1] in ("glosses", "numbers", "words")} == {
        0
    }
    assert "USER: What is the meaning of" in texts["sft_text", "words"]
    assert texts["sft", "train"] == texts["sft_text", "visual"]


def plan(steps: int = 77) -> dict[tuple[str, int], studies.Variant]:
    made = study.plan(RUNS, [5, 6], study.Steps(*[steps] * 4))
    return {(variant.name, variant.seed): variant for variant in made}


def config(command: studies.Command) -> dict[str, Any]:
    """The checked config of a command `python -m nvmm.KIND`."""
    kind = command.arguments[3].removeprefix("nvmm.")
    entry: Any = {} if kind == "train" else {"entry": kind, "world_size": 1}
    found = composed(kind, [argument(text) for text in command.arguments[4:]])
    assert check(found, **entry) == [], command.folder
    return to_plain(found)


def test_two_opposite_arms_differ_in_the_choices_alone() -> None:
    made = plan()
    first, last = ([config(c) for c in made[name, 5].commands[2:4]] for name in OPPOSITE)
    differences: dict[str, list[Any]] = {}
    for stage, one, other in zip(("stage 1", "stage 2"), first, last, strict=True):
        for each in (one, other):
            del each["run"], each["init_from"], each["trainer"]["micro_batch_size"]
        for place in (
            "data.train.shards",
            "data.blend",
            "optim.freeze",
            "trainer.global_batch_size",
        ):
            pair = []
            for each in (one, other):
                *above, key = place.split(".")
                pair.append(functools.reduce(dict.__getitem__, above, each).pop(key))
            differences[f"{stage} {place}"] = pair
        assert one == other and one["seed"] == 5
        assert one["trainer"]["validation_interval"] == 77
    pictures, documents = differences["stage 1 trainer.global_batch_size"]
    assert pictures == documents * sum(vila_demo.PICTURES) / 2, "as many pictures a step"
    assert differences["stage 1 optim.freeze"] == [["vision.*", "language.*"], ["vision.*"]]
    assert differences["stage 1 data.train.shards"] == [
        f"{study.DATA}/{part}/train-*.tar" for part in ("pairs", "documents")
    ]
    assert differences["stage 1 data.blend"] == [None, None]
    visual, blended = differences["stage 2 trainer.global_batch_size"]
    assert blended == 2 * visual, "as many questions about pictures a step"
    assert differences["stage 2 optim.freeze"] == [["vision.*"]] * 2
    assert differences["stage 2 data.blend"][0] is None
    assert [part["weight"] for part in differences["stage 2 data.blend"][1]] == [1, 1]


def test_arms_share_the_start_and_read_what_is_made_before() -> None:
    made = plan()
    assert len(made) == 16 and len(study.ARMS) == 8
    folders = set()
    for (name, seed), variant in made.items():
        corpus, decoder, blend = name.split("-")
        commands = variant.commands
        before: set[str] = set()
        for command in commands:
            own = ("output=", "run.dir=")
            words = [t for t in command.arguments if str(RUNS) in t and not t.startswith(own)]
            assert {text.partition("=")[2] for text in words} <= before, command.folder
            before.add(str(command.folder))
        folders |= before
        shared = made["pairs-frozen-visual", 5].commands[:2]
        assert [c.arguments for c in commands[:2]] == [c.arguments for c in shared]
        first, last, zero, four = (set(command.arguments) for command in commands[2:])
        assert f"experiment=vila_demo/{corpus}" in first and {f"seed={seed}"} <= first & last
        assert ("optim.freeze=[vision.*,language.*]" in first) == (decoder == "frozen")
        assert f"experiment=vila_demo/{'sft' if blend == 'visual' else 'sft_text'}" in last
        assert f"checkpoint={study.run_folder(RUNS, seed, name)}" in zero & four
        assert len(zero - four) == len(four - zero) == 2, "shots and output"
    assert len(folders) == 2 + 2 * (4 + 3 * 8)
    start = [config(command) for command in shared]
    assert [each["optim"]["freeze"] for each in start] == [
        *(["vision.*", "connector.*"], ["language.*"])
    ]
    evaluations = [config(c) for c in made["pairs-frozen-visual", 5].commands[-2:]]
    assert tuple(each["benchmark"]["shots"] for each in evaluations) == study.SHOTS


def test_tables_have_every_number() -> None:
    def seed(name: str, plus: float) -> dict[str, float]:
        value = 0.1 * study.ARMS[name].name.count("interleaved") + plus
        kinds = {f"{s} {k}": value for s in study.SHOTS for k in ("seen", "unseen")}
        text = 3.0 - 0.5 * name.endswith("blended")
        return kinds | {"0": value, "4": value + 0.2, "text": text, "0 questions": 60}

    results = {name: [seed(name, 0.3), seed(name, 0.5)] for name in study.ARMS}
    arms, effects, losses, paper = study.tables(results, {"text": [4.0]})
    assert arms.rows[0] == (
        "pairs-frozen-visual",
        ["0.400 ± 0.141", "0.600 ± 0.141", "3.000 ± 0.000", *["0.400 ± 0.141"] * 4],
    )
    assert [name for name, _ in effects.rows] == [
        *("interleaved - pairs", "trained - frozen", "blended - visual")
    ]
    assert effects.rows[0][1][:3] == ["0.100 ± 0.000", "0.100 ± 0.000", "0.000 ± 0.000"]
    assert effects.rows[2][1][:3] == ["0.000 ± 0.000", "0.000 ± 0.000", "-0.500 ± 0.000"]
    assert losses.rows == [("text", ["4.000"])]
    assert paper.rows[2] == ("interleaved (MMC4), frozen, visual", ["66.8", "57.6", "-"])


@pytest.mark.slow
def test_the_whole_chain_runs_in_miniature(tmp_path: Path) -> None:
    """Two opposite arms, few steps of one seed on small data; a second call runs nothing."""
    nouns(tmp_path / study.DATA / "wordnet/usr/share/wordnet/data.noun")
    script = tmp_path / "small.py"
    script.write_text(
        "from nvmm.data.prepare import vila_demo\n"
        f"small = vila_demo.Amounts(**{AMOUNTS | {'test': 12}})\n"
        "build = vila_demo.build\n"
        "vila_demo.build = lambda folder, nouns: build(folder, nouns, small)\n"
        "from tools import ablate_interleaved as study\n"
        f"study.ARMS = {{name: study.ARMS[name] for name in {OPPOSITE}}}\n"
        "study.main()\n"
    )
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    options = [*(f"--{name}-steps=20" for name in vars(study.Steps())), "--seeds=1", "--to=runs"]

    assert run_script(script, options, tmp_path).count("attempt 1") == 2 + 2 * 4
    results = json.loads((tmp_path / "runs/results.json").read_text())["results"]
    assert list(results["arms"]) == OPPOSITE
    assert results["arms"]["pairs-frozen-visual"][0]["4 questions"] == 12
    assert results["text_loss"]["pairs-frozen"][0] > 0
    assert "Answers behind 4 examples" in (tmp_path / "runs/report.html").read_text()
    assert "attempt" not in run_script(script, options, tmp_path)
