"""Single steps of pipelines, on records and answers made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvmm.jobs.synthesis.answering import Dialogue, without_politeness
from nvmm.jobs.synthesis.asking import parsed
from nvmm.jobs.synthesis.constraining import Constrain
from nvmm.jobs.synthesis.duplicates import Deduplicate
from nvmm.jobs.synthesis.genetic import Genetic
from nvmm.jobs.synthesis.judging import Best, Compare, Pair, Reward, Verify, last_number
from nvmm.jobs.synthesis.records import Answer, Failed, Made, Record, Reply, Request, child
from nvmm.jobs.synthesis.sources import Read
from nvmm.jobs.synthesis.step import Desk, Step
from nvmm.jobs.synthesis.writing import Compose, Expand, Strings, Threshold

PROMPTS = {
    "json": "JSON: {{ schema }}",
    "list": "{{ count }} of {{ topic }}",
    "extract": "extract {{ text }}",
    "user_turn": "{{ personality }}: {{ messages[-1].content }}",
    "compare": "{{ first }}|{{ second }}",
    "create_task": "create {{ tasks | join('+') }}",
    "mutate_task": "mutate {{ task }}: {{ mutation }}",
    "solve_task": "solve {{ task }}",
    "fitness": "fit {{ task }}",
    "constrained": "{{ prompt }} {{ instructions | join(' ') }}",
    "revise": "again: {{ instructions | join(' ') }}",
    "first": "1 {{ document }} {{ task }}",
    "second": "2 {{ task }} {{ document }}",
}
DESK = Desk("step", PROMPTS, 7)


def record(**fields: Any) -> Record:
    return child("test", [], fields)


def answers(*texts: str, **scores: list[float]) -> list[Record]:
    return [
        {
            "text": text,
            "generator": f"g{number}",
            "sample": 0,
            "scores": {name: values[number] for name, values in scores.items()},
        }
        for number, text in enumerate(texts)
    ]


def work(step: Step, item: Any, say: Any = None) -> tuple[Made, list[Request]]:
    """Run a step on an item; `say` gives the text of an answer, or an exception's text."""
    making, asked = step.make(item, DESK), []
    try:
        requests = next(making)
        while True:
            asked += requests
            replies = []
            for request in requests:
                text = say(request)
                value, error = None, None
                if isinstance(text, Failed):
                    text, error = "", str(text)
                elif request.schema is not None:
                    value, error = parsed(text, request.schema, request.generator)
                replies.append(Answer(request, Reply(text), value, error, [{"key": "k"}]))
            requests = making.send(replies)
    except StopIteration as stop:
        return stop.value, asked


def last(request: Request) -> str:
    return request.messages[-1][1]


def test_a_list_is_checked() -> None:
    step = Expand(prompt="list", into="sub", count=3, generator="g")
    item = record(topic="birds")
    said = json.dumps({"items": [" a ", "a", "", "b", "c", "d"]})
    made, [request] = work(step, item, lambda request: said)
    assert [one["sub"] for one in made.records] == ["a", "b", "c"]
    assert made.dropped == ["twice in a list: 'a'", "an empty text", "more than 3: 'd'"]
    assert last(request).startswith("3 of birds\n\nJSON: {") and request.schema is Strings
    assert all(one["topic"] == "birds" and one["parents"] == [item["id"]] for one in made.records)
    assert len({one["id"] for one in made.records}) == 3
    made, _ = work(step, item, lambda request: '{"items": []}')
    assert (made.records, made.dropped) == ([], ["the list is empty"])
    with pytest.raises(Failed, match="g: its answer is no Strings"):
        work(step, item, lambda request: '["a"]')


def test_a_list_that_is_copied_may_invent_nothing() -> None:
    step = Expand(prompt="list", into="sub", count=3, generator="g", listing="extract")

    def say(items: list[str]) -> Any:
        return lambda r: "1. red\n2. blue" if r.schema is None else json.dumps({"items": items})

    made, asked = work(step, record(topic="x"), say(["red", "blue"]))
    assert [one["sub"] for one in made.records] == ["red", "blue"]
    assert last(asked[1]).startswith("extract 1. red")
    made, _ = work(step, record(topic="x"), say(["red", "green"]))
    assert made == Made([], ["the list has 'green', and the text has not"])


def test_json_in_a_fence_is_json() -> None:
    assert parsed('```json\n{"items": ["a"]}\n```', Strings, "g")[0] == Strings(items=["a"])
    value, error = parsed('{"items": [1]}', Strings, "g")
    assert value is None and "valid string" in str(error)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Thanks! What about owls?", "What about owls?"),
        ("Thank you so much for that. Could you please go on?", "Could you go on?"),
        ("That's very helpful. please, say why", "Say why"),
        ("Are they thankful? I pleased her.", "Are they thankful? I pleased her."),
        ("Great, thanks.", ""),
    ],
)
def test_politeness_is_dropped(said: str, kept: str) -> None:
    assert without_politeness(said) == kept


def test_a_dialogue_of_three_turns() -> None:
    step = Dialogue(assistant="a", user="u", personalities=["curious", "terse"])

    def say(request: Request) -> str:
        return f"Thanks. More on {last(request)}" if request.generator == "u" else "Yes."

    made, asked = work(step, record(prompt="Birds?"), say)
    assert [request.generator for request in asked] == ["a", "u", "a", "u", "a"]
    assert [turn["role"] for turn in made.records[0]["messages"]] == ["user", "assistant"] * 3
    assert made.records[0]["messages"][2]["content"].startswith("More on ")
    assert "prompt" not in made.records[0]
    drawn = {
        work(step, record(prompt=f"Birds {n}?"), say)[0].records[0]["personality"] for n in range(9)
    }
    assert drawn == {"curious", "terse"}
    asks = Dialogue(assistant="a", user="u", personalities=["x"], turns=2, ends="user")
    assert len(work(asks, record(prompt="Birds?"), say)[0].records[0]["messages"]) == 3
    with pytest.raises(Failed, match="nothing but politeness"):
        work(step, record(prompt="Birds?"), lambda request: "Thank you!")


def test_a_judge_must_say_the_same_in_both_orders() -> None:
    item = record(prompt="p", answers=answers("long answer", "short"))
    fair, asked = work(
        Compare(judge="j"),
        item,
        lambda r: json.dumps({"better": "first" if last(r).startswith("long") else "second"}),
    )
    assert len(asked) == 2 and {last(one).split("\n")[0] for one in asked} == {
        *("long answer|short", "short|long answer"),
    }
    [kept] = fair.records
    assert [(one["text"], one["scores"]["judge"]) for one in kept["answers"]] == [
        *(("long answer", 1.0), ("short", 0.0)),
    ]
    biased, _ = work(Compare(judge="j"), item, lambda r: '{"better": "first"}')
    assert biased.records == [] and "j says first, then first" in biased.dropped[0]
    same = record(prompt="p", answers=answers("a", "a"))
    assert "no two different" in work(Compare(judge="j"), same)[0].dropped[0]


def test_rewards_are_read_and_weighed() -> None:
    item = record(prompt="p", answers=answers("a", "b"))
    step = Reward(judge="r", weights={"helpfulness": 2.0, "verbosity": -1.0})
    made, asked = work(step, item, lambda r: f"helpfulness:1.5, verbosity:{'ab'.index(last(r))}")
    assert [one["scores"]["reward"] for one in made.records[0]["answers"]] == [3.0, 2.0]
    assert asked[0].messages == (("user", "p"), ("assistant", "a"))
    mean, _ = work(Reward(judge="r"), item, lambda r: "reward:-1e-2 x:1")
    assert mean.records[0]["answers"][0]["scores"]["reward"] == pytest.approx(0.495)
    with pytest.raises(Failed, match="no verbosity"):
        work(step, item, lambda r: "helpfulness:1")


def test_a_reward_has_one_source() -> None:
    for options in ({}, {"judge": "r", "scores": "s"}):
        with pytest.raises(ValueError, match="give one of them"):
            Reward(**options)
    with pytest.raises(ValueError, match="job=reward has its own"):
        Reward(scores="s", weights={"a": 1.0})


def test_verifiers_score() -> None:
    rules = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    item = record(prompt="p", answers=answers("a, b", "a"), **rules)
    made, _ = work(Verify(), item)
    assert [one["scores"]["verifier"] for one in made.records[0]["answers"]] == [0.0, 1.0]
    # What binds all answers of a dialogue is verified in all of them.
    messages = [{"role": "assistant", "content": "x, y"}, {"role": "user", "content": "go on"}]
    item = record(messages=messages, binding="all", answers=answers("a"), **rules)
    assert work(Verify(), item)[0].records[0]["answers"][0]["scores"] == {"verifier": 0.0}
    item = record(prompt="p", reference="so #### 1,234", answers=answers("It is 1234.0", "12"))
    scores = [one["scores"]["verifier"] for one in work(Verify(), item)[0].records[0]["answers"]]
    assert scores == [1.0, 0.0]
    assert (last_number("none"), last_number("-3 or -4.5.")) == (None, -4.5)
    with pytest.raises(Failed, match="neither instructions nor reference"):
        work(Verify(), record(prompt="p", answers=answers("a")))


def test_pairs_have_a_margin_and_a_floor() -> None:
    item = record(prompt="p", answers=answers("a", "b", "c", reward=[1.0, 3.0, 2.5]))

    def pair(**options: Any) -> Any:
        made, _ = work(Pair(by="reward", **options), item)
        [*found] = made.records
        return (found[0]["chosen"], found[0]["rejected"]) if found else made.dropped[0]

    assert pair() == ("b", "a")
    assert pair(chosen_at_least=3.0) == ("b", "a")
    assert "the best reward is 3.0" in pair(chosen_at_least=3.1)
    assert "no answer is worse by 2.5" in pair(margin=2.5)
    assert pair(margin=1.0, rejected="drawn") == ("b", "a")
    equal = record(prompt="p", answers=answers("a", "b", reward=[1.0, 1.0]))
    assert work(Pair(by="reward"), equal)[0].records == []
    best, _ = work(Best(by="reward", at_least=2.0), item)
    assert best.records[0]["messages"][-1] == {"role": "assistant", "content": "b"}
    assert work(Best(by="reward", at_least=4.0), item)[0].records == []


def test_near_duplicates_go() -> None:
    texts = [
        "How do small birds find their way home in the dark of a winter night?",
        "how do small birds find their way home, in the dark of a winter night",
        "How do small birds find their way home in the dark of a summer night?",
        "Why do rivers bend?",
    ]
    step = Deduplicate(threshold=0.6)
    items = step.items([record(prompt=text, number=n) for n, text in enumerate(texts)], DESK)
    kept = [work(step, item)[0] for item in items]
    assert [len(made.records) for made in kept] == [1, 0, 0, 1]
    assert items[0][0]["id"] in kept[1].dropped[0]
    strict = Deduplicate(threshold=0.99).items([item[0] for item in items], DESK)
    assert [same is None for _, same in strict] == [True, False, True, True]


def test_colonies_grow_by_what_is_fit() -> None:
    seeds = [record(prompt=f"task {number}") for number in range(4)]
    step = Genetic(
        generator="g", judge="j", mutations=["harder"], colonies=2, offspring=4, seeds=2, examples=2
    )
    items = step.items(seeds, DESK)
    assert [number for number, _ in items] == [0, 1] and all(len(own) == 2 for _, own in items)

    def say(request: Request) -> Any:
        if request.schema is not None:
            return json.dumps({"correct": True, "quality": 3 if "create" in last(request) else 5})
        return Failed("lost") if request.sample == 1 else f"<{last(request)}>"[:200]

    made, asked = work(step, items[0], say)
    assert made.records and all("mutate" in one["prompt"] for one in made.records)
    assert "lost" in made.dropped and "unfit: correct=True quality=3" in made.dropped
    born = {one["id"] for one in made.records}
    known = {*born, *(seed["id"] for seed in items[0][1])}
    assert all(set(one["parents"]) <= known for one in made.records)
    assert {one["lineage"][-1]["generation"] for one in made.records} == {0, 1}
    assert len({request.sample for request in asked if "create" in last(request)[:6]}) > 1


def test_instructions_are_drawn_and_said() -> None:
    step = Constrain(
        instructions={
            "length_constraints:number_words": {
                "text": "{{ relation }} {{ num_words }} words.",
                "arguments": {"num_words": [5, 9], "relation": ["at least"]},
            },
            "combination:repeat_prompt": {
                "text": "Repeat {{ prompt_to_repeat }}",
                "arguments": {"prompt_to_repeat": ["{{ prompt }}"]},
                "alone": True,
            },
            "punctuation:no_comma": {"text": "No commas."},
        }
    )
    made = [work(step, record(prompt=f"Say {n}."))[0].records[0] for n in range(30)]
    for number, one in enumerate(made):
        names = one["instruction_id_list"]
        assert one["prompt"].startswith(f"Say {number}. ")
        if "combination:repeat_prompt" in names:
            assert len(names) == 1 and one["kwargs"] == [{"prompt_to_repeat": f"Say {number}."}]
        if "punctuation:no_comma" in names:
            assert "No commas." in one["prompt"]
    assert {len(one["kwargs"]) for one in made} == {1, 2}
    turns = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "It."}]
    again = Constrain(instructions={"punctuation:no_comma": {"text": "No commas."}})
    [revised] = work(again, record(messages=turns))[0].records
    assert revised["messages"][2:] == [{"role": "user", "content": "again: No commas."}]
    for bad, message in (
        ({"a:b": {"text": "x"}}, "unknown instruction"),
        ({"punctuation:no_comma": {"txt": "x"}}, "must have text"),
        ({"punctuation:no_comma": {"text": "x", "arguments": {"n": [1]}}}, "does not take"),
    ):
        with pytest.raises(ValueError, match=message):
            Constrain(instructions=bad)


def test_documents_become_closed_questions(tmp_path: Path) -> None:
    from nvmm.data.prepare.records import to_sample
    from nvmm.data.shards.dataset import write_shards

    write_shards(tmp_path, "d", [to_sample(f"k{n}", {"text": "word " * (n * 9)}) for n in range(3)])
    step = Read(files=str(tmp_path / "d-*.tar"), fields={"document": "text"}, longest=40)
    items = step.items([], DESK)
    made = [work(step, item)[0] for item in items]
    assert [len(one.records) for one in made] == [0, 1, 1]
    assert made[0].dropped == ["d-00000.tar:k0: no text"]
    assert len(made[2].records[0]["document"]) == 40
    join = Compose(prompts=["first", "second"], into="prompt", drop=["document"])
    joined = [
        work(join, record(document="D", task=f"T{n}"))[0].records[0]["prompt"] for n in range(8)
    ]
    assert {text[0] for text in joined} == {"1", "2"} and "D" in joined[0]
    with pytest.raises(ValueError, match="begins a pipeline"):
        step.items([record()], DESK)


def test_thresholds() -> None:
    keep = Threshold(field="prompt", at_least=3, at_most=5)
    kept = [bool(work(keep, record(prompt="x" * n))[0].records) for n in (2, 3, 5, 6)]
    assert kept == [False, True, True, False]
    assert work(Threshold(field="n", at_most=1.5), record(n=1.0))[0].records
    with pytest.raises(ValueError, match="has no text n; it has m"):
        work(keep.__class__(field="n"), record(m=1))
