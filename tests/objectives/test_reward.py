"""Hand-worked numbers of the reward models' losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nvmm.batch import Batch
from nvmm.objectives.objective import Objective
from nvmm.objectives.reward import BradleyTerry, Regression

NAN = math.nan


def batch(owners: list[int], extras: dict[str, Any], ids: list[int] | None = None) -> Batch:
    """Texts of one token each, of the samples that `owners` says."""
    count, samples = len(owners), max(owners) + 1
    zeros = torch.zeros(count, 1, dtype=torch.int64)
    return Batch(
        tokens=zeros,
        labels=zeros,
        loss_mask=torch.zeros(count, 1),
        position_ids=zeros,
        lengths=torch.ones(count, dtype=torch.int32),
        sample_ids=torch.tensor(ids or list(range(samples))),
        owners=torch.tensor(owners),
        extras=extras,
    )


def labelled(labels: list[list[float]], ids: list[int] | None = None) -> Batch:
    return batch(list(range(len(labels))), {"attributes": torch.tensor(labels)}, ids)


def paired(rewards: list[float], chosen: list[int], ids: list[int] | None = None) -> Batch:
    extras = {"chosen": torch.tensor(chosen), "reward": torch.tensor(rewards)}
    return batch([i // 2 for i in range(len(chosen))], extras, ids)


def means(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items()}


NAMES = ["quality", "helpfulness", "verbosity"]


def test_the_regression_counts_labels_and_not_texts() -> None:
    """Errors 1, 2 and 3 of three labels; those missing, and the untrained output, count nothing."""
    output = torch.tensor([[9.0, 1.0, 2.0], [9.0, 5.0, 1.0]], requires_grad=True)
    labels = labelled([[4.0, 2.0, NAN], [0.0, 3.0, 4.0]])
    objective = Regression(NAMES, ["helpfulness", "verbosity"])
    total, count, metrics = objective.loss(output, labels)
    assert (total.item(), count.item(), count.dtype) == (1 + 4 + 9, 3, torch.int)
    assert metrics["loss"].tolist() == [14, 3]
    assert means(metrics) == {
        "helpfulness_error": 2.5,
        "verbosity_error": 9.0,
        "mean_score": pytest.approx(7 / 3),
        "mean_label": 3.0,
        "loss": pytest.approx(14 / 3),
    }
    total.backward()
    assert output.grad is not None
    assert output.grad.tolist() == [[0, -2, 0], [0, 4, -6]]


def test_labels_split_over_two_batches_give_the_same_mean() -> None:
    labels = [[1.0, NAN, NAN], [2.0, 3.0, 0.0], [NAN, 4.0, NAN]]
    output = torch.rand(3, 3)
    objective = Regression(NAMES)
    whole = objective.loss(output, labelled(labels))
    parts = [
        objective.loss(output[rows], labelled(labels[rows])) for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(
        whole[0] / whole[1], sum(part[0] for part in parts) / sum(part[1] for part in parts)
    )


def test_a_filling_sample_and_a_text_without_labels_count_nothing() -> None:
    output = torch.ones(3, 3, requires_grad=True)
    objective = Regression(NAMES)
    given = labelled([[2.0] * 3, [NAN] * 3, [7.0] * 3], ids=[0, 1, -1])
    total, count, _ = objective.loss(output, given)
    assert (total.item(), count.item()) == (3, 3)
    total, count, metrics = objective.loss(output[1:2], labelled([[NAN] * 3]))
    assert (total.item(), count.item(), metrics["loss"].tolist()) == (0, 0, [0, 0])
    total.backward()  # a rank without labels takes part in the reduction


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        ("none", [-log_sigmoid(1.5), -log_sigmoid(-0.5)]),
        ("margin", [-log_sigmoid(1.5 - 3), -log_sigmoid(-0.5 - 2)]),
        ("scaled", [-3 * log_sigmoid(1.5), -2 * log_sigmoid(-0.5)]),
    ],
)
def test_bradley_terry(margin: Any, expected: list[float]) -> None:
    """The second pair's rejected text comes first, and was judged better by 2."""
    output = torch.tensor([[0.0, 2.0], [0.0, 0.5], [0.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    given = paired([4, 1, 2, 0], [1, 0, 0, 1])
    total, count, metrics = BradleyTerry(margin, index=1).loss(output, given)
    assert total.item() == pytest.approx(sum(expected))
    assert (count.item(), count.dtype) == (2, torch.int)
    assert means(metrics) == {
        "loss": pytest.approx(sum(expected) / 2),
        "accuracy": 0.5,
        "chosen_score": 1.25,
        "rejected_score": 0.75,
    }
    weighted = BradleyTerry(margin, weights=[3.0, 1.0]).loss(output, given)
    assert weighted[0].item() == pytest.approx(sum(expected))


def test_a_pair_of_equal_scores_loses_log_two_and_is_not_right() -> None:
    output = torch.zeros(2, 1, requires_grad=True)
    total, _, metrics = BradleyTerry().loss(output, paired([NAN, NAN], [1, 0]))
    assert total.item() == pytest.approx(math.log(2))
    assert means(metrics)["accuracy"] == 0
    total.backward()
    assert output.grad is not None
    assert output.grad.tolist() == [[-0.5], [0.5]]


def test_a_hole_in_place_of_a_pair_adds_nothing() -> None:
    """Not 0.693: a sample that could not be used is one text of a negative id."""
    output = torch.tensor([[1.0], [0.0], [5.0]], requires_grad=True)
    extras = {"chosen": torch.tensor([1, 0, 1]), "reward": torch.full((3,), NAN)}
    total, count, _ = BradleyTerry().loss(output, batch([0, 0, 1], extras, ids=[7, -2]))
    assert count.item() == 1
    assert total.item() == pytest.approx(-log_sigmoid(1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Regression([]), r"objective\.attributes=\[\] must list different names"),
        (lambda: Regression(["a", "a"]), "must list different names"),
        (lambda: Regression(["a"], ["b"]), r"objective\.trained=\['b'\]: b must be among"),
        (lambda: Regression(["a"], []), r"objective\.trained=\(\) must list different names"),
        (lambda: BradleyTerry("cross"), r"objective\.margin=cross must be"),  # type: ignore[arg-type]
        (lambda: BradleyTerry(index=-1), r"objective\.index=-1 must be at least 0"),
        (lambda: BradleyTerry(index=1, weights=[1.0, 2.0]), r"index=1 does nothing beside"),
        (lambda: BradleyTerry(weights=[0.0]), "must have one that is not 0"),
        (
            lambda: BradleyTerry(index=2).loss(torch.zeros(2, 2), paired([1, 0], [1, 0])),
            r"objective\.index=2 must be below model\.num_outputs=2",
        ),
        (
            lambda: BradleyTerry(weights=[1.0]).loss(torch.zeros(2, 2), paired([1, 0], [1, 0])),
            r"objective\.weights has 1 numbers, model\.num_outputs=2",
        ),
        (
            lambda: BradleyTerry("margin").loss(torch.zeros(2, 1), paired([1, NAN], [1, 0], [5])),
            r"margin=margin needs the rewards of both answers; samples \[5\] lack them",
        ),
        (
            lambda: BradleyTerry().loss(torch.zeros(4, 1), paired([0] * 4, [1, 1, 1, 0], [8, 9])),
            r"samples \[8\] must each have one chosen and one rejected answer",
        ),
        (
            lambda: Regression(NAMES).loss(torch.zeros(1, 2), labelled([[1.0] * 3])),
            r"num_outputs=2, data\.train\.build\.attributes has 3 and objective.attributes 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_they_are_objectives() -> None:
    assert isinstance(Regression(NAMES), Objective)
    assert isinstance(BradleyTerry(), Objective)
