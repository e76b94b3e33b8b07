"""RewardBench's subsets and weights, RewardBench 2's best of four and ties, and a checkpoint."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvmm.checkpoint.files import find
from nvmm.data.samples.chat import Turn
from nvmm.data.samples.instruct import InstructBuilder
from nvmm.evaluation.benchmark import Settings
from nvmm.evaluation.journal import Journal
from nvmm.evaluation.rewardbench import RewardBench, RewardBench2, read
from nvmm.evaluation.rewardbench_scores import CATEGORIES, Item, Scored, accuracies, best, ties
from nvmm.inference.scoring import NEMOTRON4_340B_REWARD, weights_of
from tests import reward_run
from tests.ranks import run_ranks

QUESTIONS = [Turn("user", "What is it?")]


def scored(right: list[float], wrong: list[float], name: str = "0", subset: str = "a") -> Scored:
    item = Item("row", name, subset, QUESTIONS, ["r"] * len(right), ["w"] * len(wrong))
    return Scored(item, right, wrong)


def test_there_are_23_subsets_and_2985_pairs() -> None:
    """Math's 447 pairs stand for 984, as many as the six languages have."""
    weights = [weight for group in CATEGORIES.values() for weight in group.values()]
    assert (len(weights), sum(weights) - 984 + 447) == (23, 2985)
    assert sum(CATEGORIES["reasoning"].values()) == 2 * 984


def test_a_category_is_weighted_by_pairs_and_the_whole_is_not() -> None:
    subsets = {name: 0.5 for group in CATEGORIES.values() for name in group}
    subsets |= {"math-prm": 1.0, "donotanswer": 0.0, "alpacaeval-easy": 1.0, "shp": 0.7}
    found = accuracies(subsets)
    assert found["reasoning"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["safety"] == pytest.approx(0.5 * (740 - 136) / 740)
    assert found["chat"] == pytest.approx(0.5 + 0.5 * 100 / 358)
    assert found["chat_hard"] == 0.5
    categories = [found[name] for name in CATEGORIES]
    assert found["overall"] == pytest.approx(sum(categories) / 4)
    assert "prior_sets" not in found and found["shp"] == 0.7
    prior = dict.fromkeys(("anthropic_helpful", "anthropic_hhh", "summarize"), 0.5)
    assert accuracies(subsets | prior)["prior_sets"] == pytest.approx((0.7 + 1.5) / 4)
    del subsets["math-prm"]
    assert accuracies(subsets)["reasoning"] == 0.5
    assert "overall" not in accuracies({"math-prm": 1.0})


def test_equal_scores_share_the_best_place_and_win_no_pair() -> None:
    assert best(scored([2.0], [1.0, 1.5, 0.0])) == 1
    assert best(scored([2.0], [2.0, 1.5, 2.0])) == pytest.approx(1 / 3)
    assert best(scored([1.0], [2.0, 1.5, 0.0])) == 0
    bench = RewardBench("x")
    pairs = [scored([1.0], [1.0], subset="shp"), scored([2.0], [1.0], subset="shp")]
    assert bench._summary(pairs) == {"shp": 0.5}


def test_ties() -> None:
    """Question 0 is right throughout; of question 1 the right answers lie too far apart."""
    group = [
        scored([5.0], [1.0], "ref:0"),
        scored([4.0, 4.5, 5.0], [1.0, 2.0], "tied:0"),
        scored([3.0], [2.5], "ref:1"),
        scored([3.0, 9.0], [1.0], "tied:1"),
        scored([0.0], [1.0], "ref:2"),
    ]
    margins = [math.tanh(2.0 / 1.0 - 1), math.tanh(0.5 / 6.0 - 1)]
    expected = 0.3 * 2 / 3 + 0.3 * 1 + 0.2 * 1 / 2 + 0.2 * 1 / 2 + 0.01 * sum(margins) / 2
    assert ties(group) == pytest.approx(expected)
    whole = RewardBench2("x")._summary([*(g for g in group), scored([1.0], [2.0], subset="Math")])
    assert whole["overall"] == pytest.approx((whole["a"] + whole["Math"]) / 2)
    assert ties([scored([1.0, 1.0], [0.0], "tied:0"), scored([1.0], [0.0], "ref:0")]) == (
        pytest.approx(1.01)
    )
    for wrong in ("tied", "third:1", "ref:0"):
        with pytest.raises(ValueError, match="must be ref:n or tied:n, once each"):
            ties([*group, scored([1.0], [0.0], wrong)])


def test_weights_of_the_outputs() -> None:
    assert weights_of(None, 1, "k").tolist() == [1]
    assert weights_of(None, 9, "k").tolist() == list(NEMOTRON4_340B_REWARD)
    with pytest.raises(ValueError, match="k must be given for a model of 5 outputs"):
        weights_of(None, 5, "k")
    with pytest.raises(ValueError, match=r"k=\[1.0\] must have 2 numbers"):
        weights_of([1.0], 2, "k")


ROW = {"id": 3, "prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "subset": "shp"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_read_of_either_file(kind: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi?"}]
    several = {"prompt": messages, "chosen": ["Yes."], "rejected": ["No.", "Why?"]}
    [first] = read(write(tmp_path / f"a.{kind}", [ROW]))
    [second] = read(write(tmp_path / f"b.{kind}", [ROW | several]))
    assert (first.id, first.subset, first.chosen, first.rejected) == ("3", "shp", ["Yes."], ["No."])
    assert first.prompt[0].text == second.prompt[0].text == "Hi?"
    assert [turns[-1].text for turns in second.conversations] == ["Yes.", "No.", "Why?"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": []}, r"a\.jsonl: row 0 \(id 3\): chosen must be an answer"),
        ({"rejected": None}, "rejected must be an answer, or a list of answers"),
        ({"prompt": [{"role": "user"}]}, "prompt must be a text, or a list of messages"),
        ({"subset": None}, "has no subset"),
        ({"subset": "chat"}, "subset 'chat' is none of"),
        ({"chosen": ["a", "b"]}, "must have one chosen and one rejected answer"),
    ],
)
def test_rows_that_are_none_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    builder: Any = InstructBuilder.__new__(InstructBuilder)
    model: Any = SimpleNamespace(builder=builder, path="x")
    journal: Any = None
    path = write(tmp_path / "a.jsonl", [ROW | changes])
    with pytest.raises(ValueError, match=message):
        RewardBench(path).run(model, Settings(), journal)


def test_several_right_answers_are_of_ties_alone(tmp_path: Path) -> None:
    several = ROW | {"chosen": ["a", "b"], "subset": "Math"}
    path = write(tmp_path / "a.jsonl", [several | {"subset": "Ties"}, several])
    with pytest.raises(ValueError, match=r"row 1 \(id 3\) has 2 chosen answers; only those of"):
        RewardBench2(path)._items()


def evaluate(
    rank: int,
    world: int,
    init: str,
    run: Path,
    benchmarks: list[Any],
    parallel: dict[str, int],
    options: dict[str, Any],
    output: Path,
    stop_after: int = 0,
) -> list[dict[str, Any]]:
    """Summaries of benchmarks; stop_after: questions after whose lines it dies."""
    import torch.distributed as dist

    from nvmm.inference.restore import restore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    model, found = restore(run, parallel=parallel), []
    for each in benchmarks:
        config = {"benchmark": {"weights": each.weights}}
        journal = Journal(output / each.name, config, find(run))
        if stop_after:
            journal.append = partial(die, journal.append, [], stop_after)  # type: ignore[method-assign]
        result = each.run(model, Settings(**options), journal)
        if rank == 0:
            journal.finish(result.summary, result.images())
        found.append(result.summary)
    return found


def die(append: Any, seen: list[Any], stop_after: int, predictions: Any, skipped: Any) -> None:
    """Write lines, and die behind a number of them."""
    append(predictions, skipped)
    seen += predictions
    if len(seen) >= stop_after:
        raise RuntimeError("killed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    config = reward_run.config_of(folder / "tokenizer")
    [scores] = run_ranks(reward_run.save, 1, {}, config, folder / "run", reward_run.TURNS)
    assert scores.shape == (2, 2)
    return folder / "run"


def benchmarks(folder: Path) -> list[Any]:
    """Pairs of all subsets, and four answers each; one question is too long for the model."""
    answers = ["A bird.", "It sings.", "A small bird that sings.", "What is it?"]
    subsets = [name for group in CATEGORIES.values() for name in group]
    pairs = [
        ROW | {"subset": name, "chosen": answers[i % 4], "rejected": answers[(i + 1 + i % 3) % 4]}
        for i, name in enumerate(subsets)
    ]
    pairs.append(ROW | {"prompt": "What is it? " * 60})
    groups = [
        {"id": f"{kind}:{i}", "prompt": "What is it?" * (i + 1), "subset": subset}
        | {"chosen": answers[: 2 if kind == "tied" else 1], "rejected": answers[2:]}
        for i in range(2)
        for kind, subset in (("tied", "Ties"), ("ref", "Ties"), ("x", "Math"))
    ]
    first = write(folder / "pairs.jsonl", pairs)
    second = write(folder / "groups.parquet", groups)
    return [RewardBench(first, [1.0, 0.5]), RewardBench2(second, [1.0, 0.5])]


@pytest.mark.parametrize(
    "layouts", [[{}], pytest.param([{"tensor_model_parallel_size": 2}], marks=pytest.mark.slow)]
)
def test_a_checkpoint_has_the_same_scores_at_any_layout(
    layouts: list[dict[str, int]], run: Path, tmp_path: Path
) -> None:
    made = benchmarks(tmp_path)
    [whole] = run_ranks(evaluate, 1, run, made, {}, {"batch_size": 64}, tmp_path / "whole")
    assert (whole[0]["num_samples"], whole[0]["num_bad"]) == (23, 1)
    assert "sequence_length=128" in whole[0]["skipped"][0]
    assert 0 < whole[0]["overall"] < 1 and 0 < whole[1]["overall"] < 1.01
    for layout in layouts:
        output = tmp_path / "-".join(["layout", *layout])
        found = run_ranks(evaluate, 2, run, made, layout, {"batch_size": 3}, output)
        for summaries in found:
            for there, here in zip(summaries, whole, strict=True):
                assert there["skipped"] == here["skipped"]
                scores = {name: value for name, value in here.items() if name != "skipped"}
                del there["skipped"]
                assert there == pytest.approx(scores)


def test_one_that_was_killed_goes_on(run: Path, tmp_path: Path) -> None:
    """With the lines that are there: no question is scored again, and the result is the same."""
    made, options = benchmarks(tmp_path)[:1], {"batch_size": 4}
    [whole] = run_ranks(evaluate, 1, run, made, {}, options, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run_ranks(evaluate, 1, run, made, {}, options, tmp_path / "parts", 8)
    lines = (tmp_path / "parts" / "rewardbench" / "predictions.jsonl").read_text()
    assert 8 <= len(lines.splitlines()) < 23
    # Scores that were there are believed: those of the first pair, changed, change its subset.
    first, *others = [json.loads(line) for line in lines.splitlines()]
    assert first["scores"][0] != first["scores"][1]
    assert len(first["scores"]) == 2
    swapped = first | {"scores": first["scores"][::-1]}
    path = tmp_path / "parts" / "rewardbench" / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [swapped, *others]))
    [parts] = run_ranks(evaluate, 1, run, made, {}, options, tmp_path / "parts")
    subset = first["kind"]
    assert parts[0][subset] == 1 - whole[0][subset]
    kept = {name for name in whole[0] if name in (set(CATEGORIES["safety"]) | {"safety"})}
    assert len(kept) == 6
    assert {name: parts[0][name] for name in kept} == {name: whole[0][name] for name in kept}
    assert (parts[0]["num_samples"], parts[0]["num_bad"]) == (23, 1)
    path.write_text(json.dumps(first | {"scores": [1.0]}) + "\n")
    with pytest.raises(RuntimeError, match="the line of question 0 is damaged"):
        run_ranks(evaluate, 1, run, made, {}, options, tmp_path / "parts")
    made = [RewardBench(made[0].path, [1.0, 0.0])]
    with pytest.raises(RuntimeError, match=r"holds an evaluation with benchmark\.weights"):
        run_ranks(evaluate, 1, run, made, {}, options, tmp_path / "parts")


def test_too_many_bad_questions_end_it(run: Path, tmp_path: Path) -> None:
    made = benchmarks(tmp_path)[:1]
    with pytest.raises(RuntimeError, match=r"1 of 24 questions of benchmark.path=.* are bad"):
        run_ranks(evaluate, 1, run, made, {}, {"max_bad_fraction": 0.0}, tmp_path)
    with pytest.raises(RuntimeError, match=r"temperature=1\.0 does nothing in this benchmark"):
        run_ranks(evaluate, 1, run, made, {}, {"temperature": 1.0}, tmp_path)
