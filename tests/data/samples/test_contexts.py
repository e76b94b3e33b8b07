"""ChatQA's and RankRAG's samples, to the byte: text, ids, loss mask; and what gives way."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tokenizers import Tokenizer as Backend

from nvmm.batch import Sample
from nvmm.config.check import config_dir
from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.contexts import ContextChat, ListRanking, Ranking
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.data.samples.passages import Passages
from nvmm.data.samples.record import members_of
from nvmm.data.samples.tables import table_text
from nvmm.data.samples.tokenizer import Tokenizer
from tests.data.samples import llama

SYSTEM = (
    "System: This is a chat between a user and an artificial intelligence assistant. The assistant"
    " gives helpful, detailed, and polite answers to the user's questions based on the context. The"
    " assistant should also indicate when the answer cannot be found in the context."
)
BOS, END = "<|begin_of_text|>", "<|end_of_text|>"
SPAN = "Answer the following question with a short span."
TURNS = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "Its capital?"},
    {"role": "assistant", "content": "Paris"},
]
CHATQA = {"messages": TURNS, "contexts": ["One chunk.\nTwo lines.", "Another."]}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = llama.save(tmp_path_factory.mktemp("llama"))
    return Tokenizer(
        str(folder), image_token="<|reserved_special_token_0|>", end_of_turn="<|end_of_text|>"
    )


@cache
def config(group: str) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = compose(group)
    for name in group.split("/")[:-1]:
        node = node[name]
    return node


def form(name: str, **changes: Any) -> Any:
    return instantiate(config(f"form/{name}"), _convert_="all", **changes)


def builder(words: Tokenizer, form: Any = None, length: int = 4096) -> InstructBuilder:
    """The builder of data=chatqa, with another form."""
    build = instantiate(config("data/chatqa").train.build, _convert_="all")
    changed = {} if form is None else {"form": form}
    made: InstructBuilder = build(tokenizer=words, sequence_length=length, **changed)
    return made


def text_of(words: Tokenizer, sample: Sample, trained: bool = False) -> str:
    kept = sample.text.weights > 0 if trained else slice(None)
    return words.decode(sample.text.tokens[kept].tolist(), skip_special_tokens=False)


def check(words: Tokenizer, build: InstructBuilder, record: Any, text: str, answer: str) -> None:
    """Compare a record's text, ids, mask and prompt; `text` is that of the prompt without BOS."""
    whole = build(members_of(record, "r"))
    assert text_of(words, whole) == f"{BOS}{text} {answer}{END}"
    backend = Backend.from_file(f"{words.path}/tokenizer.json")
    expected = backend.encode(f"{BOS}{text} {answer}{END}", add_special_tokens=False).ids
    assert whole.text.tokens.tolist() == expected
    assert text_of(words, whole, trained=True) == f" {answer}{END}"
    prompt = build.prompt(members_of(record, "r"))
    assert text_of(words, prompt) == BOS + text and not prompt.text.weights.any()
    assert whole.text.tokens[: len(prompt.text.tokens)].tolist() == prompt.text.tokens.tolist()
    begun = [*prompt.text.tokens.tolist(), *build.answer_tokens(answer)]
    assert begun == whole.text.tokens[:-1].tolist()
    assert build.measure(members_of(record, "r")) == (len(whole.text.tokens), 0)


@pytest.mark.parametrize(
    "text", ["one two \U0001f600\U0001f600\U0001f600", "日本語の文章", "é" * 9]
)
def test_a_context_is_cut_between_characters(words: Tokenizer, text: str) -> None:
    """A character of several tokens goes as a whole, so that every cut shortens the text."""
    block = Passages().block([text])
    for excess in range(1, len(words.encode(text)) + 1):
        cut = block.shortened(excess, words)
        assert cut is None or len(words.encode(cut.text)) <= len(words.encode(text)) - excess
        assert cut is None or text.startswith(cut.text)


def test_stage_2_of_chatqa(words: Tokenizer) -> None:
    """The context behind the system line, the instruction in front of the first question alone."""
    text = (
        f"{SYSTEM}\n\nOne chunk.\nTwo lines.\n\nAnother.\n\nUser: {SPAN} Where is it?\n\n"
        "Assistant: In France.\n\nUser: Its capital?\n\nAssistant:"
    )
    check(words, builder(words, form("chatqa", instruction=SPAN)), CHATQA, text, "Paris")
    # A record's own instruction goes before that of its data set.
    own = CHATQA | {"instruction": "Say."}
    text = text.replace(SPAN, "Say.")
    check(words, builder(words, form("chatqa", instruction=SPAN)), own, text, "Paris")


def test_stage_1_has_neither_context_nor_instruction(words: Tokenizer) -> None:
    text = (
        f"{SYSTEM}\n\nUser: Where is it?\n\nAssistant: In France.\n\nUser: Its capital?\n\n"
        "Assistant:"
    )
    check(words, builder(words), {"messages": TURNS}, text, "Paris")
    check(words, builder(words), {"messages": TURNS, "contexts": []}, text, "Paris")
    system = [{"role": "system", "content": "Be brief."}, *TURNS[2:]]
    text = "System: Be brief.\n\nA chunk.\n\nUser: Its capital?\n\nAssistant:"
    check(words, builder(words), {"messages": system, "contexts": ["A chunk."]}, text, "Paris")
    question = {"question": "Its capital?", "answers": ["Paris", "Paris", "The city"]}
    text = f"{SYSTEM}\n\nUser: Its capital?\n\nAssistant:"
    check(words, builder(words), question, text, "Paris")


def test_golden_ids_of_a_real_vocabulary(tmp_path: Path) -> None:
    """Mistral's, a SentencePiece BPE as Llama 2's: pieces written out by hand."""
    common = pytest.importorskip("mistral_common")
    pieces = pytest.importorskip("sentencepiece")
    data = Path(common.__file__).parent / "data"
    model = (data / "tokenizer.model.v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    words = Tokenizer(str(tmp_path), image_token="<unk>", end_of_turn="</s>")
    sample = builder(words)(members_of({"messages": TURNS[2:], "contexts": ["A chunk."]}, "r"))
    ids = sample.text.tokens.tolist()
    reference = pieces.SentencePieceProcessor(model_proto=model)
    written = [reference.id_to_piece(i) for i in ids]
    assert written[:4] == ["<s>", "System", ":", "▁This"]
    tail = "<0x0A> <0x0A> A ▁chunk . <0x0A> <0x0A> User : ▁Its ▁capital ? <0x0A> <0x0A>"
    tail += " Ass istant : ▁Paris </s>"  # codespell:ignore istant
    assert " ".join(written).endswith(tail)
    assert [
        reference.id_to_piece(i) for i, w in zip(ids, sample.text.weights, strict=True) if w
    ] == [
        "▁Paris",
        "</s>",
    ]


def test_passages_of_rankrag(words: Tokenizer) -> None:
    record = {"messages": TURNS[2:], "contexts": ["One."]}
    ask = "User: Its capital?\n\nAssistant:"
    text = f"{SYSTEM}\n\nPassage: One.\n\n{ask}"
    check(words, builder(words, form("rankrag")), record, text, "Paris")
    record["contexts"] = [f"P{number}." for number in "abcde"]
    text = f"{SYSTEM}\n\nPassage 1: Pa.\n\nPassage 2: Pb.\n\nPassage 3: Pc.\n\nPassage 4: Pd."
    text += f"\n\nPassage 5: Pe.\n\n{ask}"
    check(words, builder(words, form("rankrag")), record, text, "Paris")
    asked = text.replace(
        "Its capital?", "Its capital?. Answer the above question with a short phrase."
    )
    check(words, builder(words, form("rankrag_openqa")), record, asked, "Paris")
    asked = text.replace(
        "Its capital?",
        "Answer the following question with True or False. Is the claim 'Its capital?' correct?",
    )
    check(words, builder(words, form("rankrag_fever")), record, asked, "Paris")


def test_ranking_prompts(words: Tokenizer) -> None:
    record = {"question": "who?", "passages": ["He."], "relevant": [0]}
    prompt = (
        "For the question who?, access whether the passage is relevant to the question. Return True"
        " if relevant, otherwise False."
    )
    text = f"{SYSTEM}\n\nPassage: He.\n\nUser: {prompt}\n\nAssistant:"
    check(words, builder(words, form("rankrag_ranking")), record, text, "True")
    check(words, builder(words, Ranking()), record | {"relevant": []}, text, "False")
    # The turns of a dialogue stand in front; only the ranking is trained.
    record["messages"] = TURNS[:2]
    earlier = "User: Where is it?\n\nAssistant: In France.\n\n"
    check(words, builder(words, Ranking()), record, text.replace("User", earlier + "User"), "True")
    claim = {"question": "It is so", "passages": ["He."], "relevant": []}
    prompt = (
        "For the claim It is so, access whether the passage is relevant to the claim. Return True"
        " if relevant, otherwise False."
    )
    text = f"{SYSTEM}\n\nPassage: He.\n\nUser: {prompt}\n\nAssistant:"
    check(words, builder(words, form("rankrag_fever_ranking")), claim, text, "False")


def test_ranking_of_lists(words: Tokenizer) -> None:
    record = {"question": "who?", "passages": ["Pa.", "Pb.", "Pc."], "relevant": [2, 0]}
    prompt = (
        "For the question who?, access whether the above passages are relevant to the question."
        " Return all the relevant passage id."
    )
    block = "Passage 1: Pa.\n\nPassage 2: Pb.\n\nPassage 3: Pc."
    text = f"{SYSTEM}\n\n{block}\n\nUser: {prompt}\n\nAssistant:"
    plain = form("rankrag_list_ranking", passages={"shuffle": False})
    check(words, builder(words, plain), record, text, "1, 3")
    check(words, builder(words, plain), record | {"relevant": []}, text, "None")


def test_yaml_and_classes_have_the_same_texts() -> None:
    assert form("chatqa") == ContextChat()
    assert form("rankrag_ranking") == Ranking()
    assert form("rankrag_list_ranking") == ListRanking()


def test_shuffling_is_of_the_key_and_moves_the_answer(words: Tokenizer) -> None:
    texts = [f"P{number}." for number in range(5)]
    record = {"question": "who?", "passages": texts, "relevant": [3]}
    build = builder(words, ListRanking())
    orders, places = set(), []
    for number in range(40):
        members = members_of(record, "r") | {"__key__": f"{number:05d}"}
        text = text_of(words, build(members))
        assert text == text_of(words, build(members))
        order = tuple(texts.index(line.partition(": ")[2]) for line in text.split("\n\n")[1:6])
        assert text_of(words, build(members), trained=True) == f" {order.index(3) + 1}{END}"
        orders.add(order)
        places.append(order.index(3))
    # Forty draws of 120 orders: by chance 34 different ones; the gold passage is at every place.
    assert len(orders) > 25 and set(places) == set(range(5))
    chat = builder(words, form("rankrag_shuffled"))
    members = members_of({"messages": TURNS[2:], "contexts": texts}, "r")
    shown = text_of(words, chat.prompt(members)).split("\n\n")[1:6]
    order = tuple(Passages(shuffle=True).order(5, ""))
    assert shown == [f"Passage {place}: {texts[n]}" for place, n in enumerate(order, 1)]


def test_unanswerable(words: Tokenizer) -> None:
    text = f"{SYSTEM}\n\nA chunk.\n\nUser: Its capital?\n\nAssistant:"
    sorry = "Sorry. I cannot find the answer based on the context."
    for messages in (TURNS[2:], TURNS[2:3], [TURNS[2], {"role": "assistant", "content": ""}]):
        record = {"messages": messages, "contexts": ["A chunk."], "answerable": False}
        check(words, builder(words), record, text, sorry)
        assert builder(words).references(members_of(record, "r")) == [sorry]
    record = {"question": "Its capital?", "contexts": ["A chunk."], "answerable": False}
    check(words, builder(words), record, text, sorry)
    check(words, builder(words, form("chatqa", unanswerable="No.")), record, text, "No.")
    record = {"messages": TURNS[2:], "answers": ["Paris", "the city"], "answerable": True}
    assert builder(words).references(members_of(record, "r")) == ["Paris", "the city"]
    assert builder(words).question(members_of(record, "r")) == "Its capital?"


def test_tables() -> None:
    rows = [["2019", 12.5, "a|b"], ["2020", "", "c\nd"]]
    text = "| 2019 (Year) | Revenue: 12.5 | a\\|b |\n| 2020 (Year) |  | c d |"
    assert table_text(["Year", "Revenue", ""], rows) == text
    with pytest.raises(ValueError, match="row 1 of a table has 1 cells, its header 2"):
        table_text(["a", "b"], [["1", "2"], ["3"]])


def test_a_table_is_a_context(words: Tokenizer) -> None:
    table = {"header": ["Year", "Profit"], "rows": [[2019, 3], [2020, 4]]}
    record = {"messages": TURNS[2:], "contexts": ["Before.", table]}
    text = f"{SYSTEM}\n\nBefore.\n\n| 2019 (Year) | Profit: 3 |\n| 2020 (Year) | Profit: 4 |\n\n"
    text += "User: Its capital?\n\nAssistant:"
    check(words, builder(words), record, text, "Paris")


def test_contexts_give_way_at_their_end(words: Tokenizer) -> None:
    """The last chunks first, then the end of the last that is left; turns stay as they are."""
    chunks = [" ".join(f"{letter}{n}" for n in range(30)) for letter in "abc"]
    members = members_of({"messages": TURNS, "contexts": chunks}, "r")
    full = builder(words)(members)
    bare = len(builder(words)(members_of({"messages": TURNS}, "r")).text.tokens)
    size = len(full.text.tokens)
    head, tail = text_of(words, full).split(" a0 ")[0], text_of(words, full).split("c29")[1]
    seen = set()
    for length in range(bare + 12, size, 13):
        build = builder(words, length=length)
        sample = build(members)
        assert length - 2 <= len(sample.text.tokens) <= length, length
        text = text_of(words, sample)
        assert text.endswith(tail) and text_of(words, sample, trained=True) == f" Paris{END}"
        block = text.removesuffix(tail).removeprefix(f"{BOS}{SYSTEM}\n\n")
        assert "\n\n".join(chunks).startswith(block) and block
        assert not block.endswith("\n")
        seen.add(block.count("\n\n"))
        # A prompt leaves room for its answer, by the same rule.
        asks = build.asking(reserve=3).prompt(members)
        assert len(asks.text.tokens) <= length - 3
        assert text_of(words, asks).endswith("User: Its capital?\n\nAssistant:")
    assert seen == {0, 1, 2} and head
    with pytest.raises(
        BadSample, match=r"r:: needs \d+ tokens.*would cut its turns and lose every"
    ):
        builder(words, length=bare)(members)
    with pytest.raises(BadSample, match=f"needs {bare} tokens.*would cut its turns$"):
        builder(words, length=bare - 1)(members_of({"messages": TURNS}, "r"))


def test_no_passage_of_a_list_is_cut(words: Tokenizer) -> None:
    record = {"question": "who?", "passages": ["one", "two"], "relevant": [1]}
    size = len(builder(words, ListRanking())(members_of(record, "r")).text.tokens)
    with pytest.raises(BadSample, match="would cut its turns and lose every context"):
        builder(words, ListRanking(), length=size - 1)(members_of(record, "r"))
    long = {"question": "who?", "passages": ["one " * 50], "relevant": [0]}
    cut = builder(words, Ranking(), length=size)(members_of(long, "r"))
    assert len(cut.text.tokens) <= size and "Passage: one one" in text_of(words, cut)


def test_all_answers_may_be_trained(words: Tokenizer) -> None:
    build = instantiate(config("data/chatqa").train.build, _convert_="all", supervise="all")
    sample = build(tokenizer=words, sequence_length=4096)(members_of(CHATQA, "r"))
    # Llama's splitter makes one token of the stop and the blank line, which is the separator's.
    assert text_of(words, sample, trained=True) == f" In France Paris{END}"


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (None, {"messages": TURNS, "contexts": "text"}, "contexts must be a list, got 'text'"),
    (None, {"messages": TURNS, "contexts": [3]}, "context must be text, got 3"),
    (None, {"messages": TURNS, "contexts": [" "]}, "context is empty"),
    (None, {"messages": TURNS, "contexts": [{"rows": []}]}, "a context is no table: .* got rows"),
    (None, {"messages": TURNS, "ctxs": ["x"]}, "ctxs is not read: contexts are a list under"),
    (None, {"messages": TURNS, "context": "x"}, r"build.fields.contexts=context"),
    (None, {"messages": TURNS, "answerable": 1}, "answerable must be true or false, got 1"),
    (None, {"messages": TURNS, "instruction": ""}, "instruction is empty"),
    (None, {"messages": TURNS, "answers": "x"}, "answers must be a list"),
    (None, {"messages": TURNS, "question": "x"}, "it has messages and question"),
    (None, {"messages": TURNS[1:2]}, "must end with a user's turn"),
    (None, {"messages": [*TURNS, TURNS[1]]}, "must end with a user's turn"),
    (None, {"messages": TURNS[:3]}, "no supervised token; a sample needs an .* at its end"),
    (Ranking(), {"question": "a", "passages": ["x", "y"]}, "2 passages; each is ranked"),
    (Ranking(), {"question": "a", "passages": ["x"], "relevant": [1]}, "numbers from 0 to 0"),
    (Ranking(), {"question": "a", "passages": ["x"], "relevant": True}, "relevant must list"),
    (Ranking(), {"question": "a", "passages": ["x"]}, "no supervised token"),
    (Ranking(), {"question": "a", "passages": []}, "passages must be a list that is not empty"),
    (
        Ranking(),
        {"question": "a", "passages": ["x"], "messages": TURNS[:1]},
        "end with a user's",
    ),
]


@pytest.mark.parametrize(("form", "record", "message"), BAD)
def test_bad_records_are_named(
    words: Tokenizer, form: Any, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadSample, match=f"^shard.tar:.*{message}"):
        builder(words, form)(members_of(record, "shard.tar"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextChat(question="x"), "form.question='x' must have"),
        (lambda: ContextChat(unanswerable=" "), "form.unanswerable"),
        (lambda: Ranking(prompt="x"), "form.prompt='x' must have"),
        (lambda: Ranking(relevant="a", irrelevant="a"), "are both 'a'"),
        (lambda: ListRanking(item="x"), "form.item='x' must have"),
        (lambda: ListRanking(none=""), "form.none"),
        (lambda: Passages(one="x"), "form.passages.one='x' must have"),
        (lambda: Passages(several="{text}{text}"), "form.passages.several="),
    ],
)
def test_bad_forms_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_asking_needs_room(words: Tokenizer) -> None:
    with pytest.raises(ValueError, match="4096 tokens for an answer"):
        builder(words).asking(reserve=4096)
