"""From the files of public data sets, by `tools/shard.py`, to the text of a published blend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from nvmm.commands import shard
from nvmm.config.check import config_dir, to_plain
from nvmm.data.loader import Data
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.samples import llama

ASKED = [{"role": "user", "content": "Who sings?"}]
SINGS = "the wren sings at dawn in the hedge"
CROW = "a crow eats what it finds near roads"
SHORT = (
    "Answer the following question with a short span. The answer needs to be just in a few words."
)
FORMULA = (
    "Answer the following question with a number from context or the math arithmetic using +, -, *,"
    " or /."
)
RANKING = (
    "For the question Who sings?, access whether the passage is relevant to the question. Return"
    " True if relevant, otherwise False."
)
LIST = (
    "For the question Who sings?, access whether the above passages are relevant to the question."
    " Return all the relevant passage id."
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of each layout, which is the current one."""
    monkeypatch.chdir(tmp_path)
    chatqa = {"document": SINGS, "messages": ASKED, "answers": ["A wren."]}
    qas = [{"id": "q", "question": "Who sings?", "answers": [], "is_impossible": True}]
    dpr = {
        "question": "Who sings?",
        "answers": ["wren"],
        "positive_ctxs": [{"title": "", "text": SINGS}],
        "hard_negative_ctxs": [{"text": f"{CROW} {n}"} for n in range(4)],
    }
    turns = [*ASKED, {"role": "assistant", "content": SINGS}]
    for name, content in {
        "chatqa.json": [chatqa],
        "sft.json": [{**chatqa, "document": ""}],
        "squad.json": {"data": [{"paragraphs": [{"context": CROW, "qas": qas}]}]},
        "dpr.json": [dpr],
        "dialogues.jsonl": {"_id": "d", "document_id": "b", "messages": turns},
        "documents.jsonl": {"_id": "b", "text": f"{SINGS} {CROW}"},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "triples.tsv").write_text(f"Who sings?\t{SINGS}\t{CROW}\n")
    return tmp_path


def write(monkeypatch: pytest.MonkeyPatch, command: str, to: str, name: str, *more: str) -> None:
    arguments = [*command.split(), "--to", to, "--name", name, *more]
    monkeypatch.setattr(sys, "argv", ["shard.py", *arguments])
    shard.main()


def texts(experiment: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Return the user's part and the trained text of each set's first sample."""
    tokenizer = llama.save(folder / "tokenizer")
    overrides = [f"experiment={experiment}", f"tokenizer.path={tokenizer}", "init_from=none"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = to_plain(compose("train", overrides))
    words: Tokenizer = instantiate(config["tokenizer"], _convert_="all")
    data: Data = instantiate(config["data"], _convert_="all")(tokenizer=words)
    found = {}
    for component in data.components:
        text = component.dataset[0].text
        whole = words.decode(text.tokens.tolist(), skip_special_tokens=False)
        trained = words.decode(text.tokens[text.weights > 0].tolist(), skip_special_tokens=False)
        head, _, asked = whole.partition("context.\n\n")
        assert head.startswith("<|begin_of_text|>System: This is a chat")
        found[component.name] = (asked.removesuffix(trained), trained)
    return found


def test_rankrag(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("drop", "narrativeqa", "quoref", "ropes", "newsqa", "tatqa-arithmetic"),
        *("tatqa-others", "synthetic_convqa"),
    ):
        write(monkeypatch, "chatqa --from chatqa.json", "data/chatqa", name)
    write(monkeypatch, "chatqa --from sft.json", "data/chatqa", "sft")
    for name in ("squad", "webquestions"):
        for task in ("answer", "relevance"):
            command = f"dpr --from dpr.json --to-train {task}"
            write(monkeypatch, command, "data/rankrag", f"{name}_{task}")
    write(monkeypatch, "msmarco --triples triples.tsv", "data/rankrag", "msmarco_ranking")
    pairs = "pairs --from dialogues.jsonl --documents documents.jsonl --words 8"
    write(monkeypatch, pairs, "data/rankrag", "convqa_ranking")
    found = texts("rankrag/stage2_8b", sources)

    asked = f"Passage: {SINGS}\n\nUser: {SHORT} Who sings?\n\nAssistant:"
    assert found["drop"] == (asked, " A wren.<|end_of_text|>")
    assert found["tatqa-arithmetic"][0] == asked.replace(SHORT, FORMULA)
    assert found["sft"][0] == "User: Who sings?\n\nAssistant:"
    for name in ("squad_answer", "webquestions_answer"):
        block, _, question = found[name][0].rpartition("\n\nUser: ")
        passages = block.split("\n\n")
        assert sorted(p.partition(": ")[0] for p in passages) == [
            f"Passage {n}" for n in range(1, 6)
        ]
        assert sorted(p.partition(": ")[2] for p in passages) == sorted(
            [SINGS, *(f"{CROW} {n}" for n in range(4))]
        )
        assert question == f"{SHORT} Who sings?\n\nAssistant:"
        assert found[name][1] == " wren<|end_of_text|>"
    listed, answer = found["squad_relevance"]
    assert f"\n\nUser: {LIST}\n\nAssistant:" in listed
    place = answer.strip().removesuffix("<|end_of_text|>")
    assert f"Passage {place}: {SINGS}" in listed
    for name in ("msmarco_ranking", "convqa_ranking"):
        asked = f"Passage: {SINGS}\n\nUser: {RANKING}\n\nAssistant:"
        assert found[name] == (asked, " True<|end_of_text|>")


def test_chatqa(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("drop", "narrativeqa", "quoref", "ropes", "newsqa", "squad1.1", "tatqa-arithmetic"),
        *("tatqa-others", "synthetic_convqa"),
    ):
        write(monkeypatch, "chatqa --from chatqa.json", "data/chatqa", name)
    write(monkeypatch, "chatqa --from sft.json", "data/chatqa", "sft")
    write(monkeypatch, "squad --from squad.json", "data/chatqa", "squad2.0")
    found = texts("chatqa/stage2_8b", sources)

    asked = f"{SINGS}\n\nUser: {SHORT} Who sings?\n\nAssistant:"
    assert found["drop"] == (asked, " A wren.<|end_of_text|>")
    full = "Please give a full and complete answer for the question."
    assert found["synthetic_convqa"][0] == asked.replace(SHORT, full)
    assert found["sft"][0] == "User: Who sings?\n\nAssistant:"
    assert found["squad2.0"] == (
        asked.replace(SINGS, CROW),
        " Sorry. I cannot find the answer based on the context.<|end_of_text|>",
    )
