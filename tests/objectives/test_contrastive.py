"""Hand-worked numbers of InfoNCE, what is masked, and its options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch
from nvmm.objectives.contrastive import Contrastive
from nvmm.objectives.objective import Objective
from nvmm.parallel.setup import Parallel
from tests.ranks import run_ranks


def batch_of(roles: list[int], num_samples: int, **extras: Any) -> Batch:
    n = len(roles)
    zeros = torch.zeros(n, 2, dtype=torch.long)
    given = {
        "role": torch.tensor(roles),
        "document_id": torch.arange(n),
        "text_hash": torch.arange(n),
        "answers": torch.full((n, 2), -1),
        "in_batch": torch.ones(n, dtype=torch.bool),
        "teacher": torch.full((n,), float("nan")),
    }
    changed = {name: torch.as_tensor(value) for name, value in extras.items()}
    ids = changed.pop("sample_ids", torch.arange(num_samples))
    owners = torch.tensor(roles).eq(0).cumsum(0) - 1
    return Batch(
        zeros, zeros, zeros.float(), zeros, torch.full((n,), 2), ids, owners, extras=given | changed
    )


def vectors(*angles: float) -> Tensor:
    """Unit vectors of two axes."""
    turned = torch.tensor(angles) * math.pi / 180
    return torch.stack([turned.cos(), turned.sin()], dim=1)


def cosine(degrees: float, temperature: float = 1.0) -> float:
    return math.exp(math.cos(math.radians(degrees)) / temperature)


# Two samples: query, positive, hard negative at these angles.
ROLES = [0, 1, 2, 0, 1, 2]
ANGLES = (0.0, 10.0, 50.0, 90.0, 120.0, 200.0)


def local(**options: Any) -> Contrastive:
    return Contrastive(cross_rank_negatives=False, **{"temperature": 1.0, **options})


def losses(objective: Contrastive, batch: Batch, embeddings: Tensor) -> list[float]:
    return objective.per_query(embeddings, [batch])[:, 0].tolist()


def test_in_batch_and_hard_negatives_by_hand() -> None:
    batch = batch_of(ROLES, 2)
    total, count, metrics = local().loss(vectors(*ANGLES), batch)
    first = -math.log(cosine(10) / sum(map(cosine, (10, 50, 120, 200))))
    second = -math.log(cosine(30) / sum(map(cosine, (80, 40, 30, 110))))
    assert total.item() == pytest.approx(first + second, rel=1e-6)
    assert count.item() == 2 and count.dtype == torch.int
    assert metrics["negatives"].tolist() == [6.0, 2.0]
    assert metrics["accuracy"].tolist() == [2.0, 2.0]
    assert isinstance(local(), Objective)


def test_a_query_without_in_batch_negatives_sees_its_own_documents() -> None:
    batch = batch_of(ROLES, 2, in_batch=[False] * 3 + [True] * 3)
    found = losses(local(), batch, vectors(*ANGLES))
    assert found[0] == pytest.approx(-math.log(cosine(10) / (cosine(10) + cosine(50))))
    assert found[1] == pytest.approx(
        -math.log(cosine(30) / sum(map(cosine, (80, 40, 30, 110)))), rel=1e-6
    )


@pytest.mark.parametrize("field", ["document_id", "text_hash"])
def test_another_sample_s_copy_of_the_positive_is_no_negative(field: str) -> None:
    batch = batch_of(ROLES, 2, **{field: [0, 1, 2, 3, 4, 1]})
    found = losses(local(), batch, vectors(*ANGLES))
    assert found[0] == pytest.approx(-math.log(cosine(10) / sum(map(cosine, (10, 50, 120)))))
    unmasked = losses(local(mask_false_negatives=False), batch, vectors(*ANGLES))
    assert unmasked[0] > found[0]


def test_every_positive_of_one_query_text_is_spared() -> None:
    batch = batch_of(ROLES, 2, text_hash=[7, 1, 2, 7, 4, 5])
    found = losses(local(), batch, vectors(*ANGLES))
    assert found[0] == pytest.approx(-math.log(cosine(10) / sum(map(cosine, (10, 50, 200)))))
    assert found[1] == pytest.approx(-math.log(cosine(30) / sum(map(cosine, (40, 30, 110)))))


def test_a_sample_that_fills_the_batch_takes_no_part() -> None:
    filled = batch_of(ROLES, 2, sample_ids=torch.tensor([4, -1]))
    total, count, _ = local().loss(vectors(*ANGLES), filled)
    assert count.item() == 1
    assert total.item() == pytest.approx(-math.log(cosine(10) / (cosine(10) + cosine(50))))


def test_symmetric_averages_both_directions() -> None:
    batch = batch_of([0, 1, 0, 1], 2)
    found = losses(local(symmetric=True, temperature=0.5), batch, vectors(0, 10, 90, 120))
    forward = -math.log(cosine(10, 0.5) / (cosine(10, 0.5) + cosine(120, 0.5)))
    backward = -math.log(cosine(10, 0.5) / (cosine(10, 0.5) + cosine(80, 0.5)))
    assert found[0] == pytest.approx((forward + backward) / 2, rel=1e-5)


def backward_candidates(batch: Batch, **options: Any) -> list[int]:
    """Queries among which each positive must find its own, worked out from the loss alone.

    All documents are alike and all queries are alike: each direction's loss is log(candidates).
    """
    objective = local(symmetric=True, **options)
    embeddings = torch.ones(len(batch.extras["role"]), 4) / 2
    both = objective.per_query(embeddings, [batch])
    one = local(**options).per_query(embeddings, [batch])
    return [round(math.exp(2 * b - a)) for a, b in zip(one[:, 0], both[:, 0], strict=True)]


def test_which_queries_compete_for_a_positive() -> None:
    roles = [0, 1] * 4
    assert backward_candidates(batch_of(roles, 4)) == [4] * 4
    alike = batch_of(roles, 4, text_hash=[9, 1, 9, 3, 4, 5, 6, 7])
    assert backward_candidates(alike) == [3, 3, 4, 4], "a query of the same text answers too"
    answer = batch_of(roles, 4, document_id=[0, 1, 2, 1, 4, 5, 6, 7])
    assert backward_candidates(answer) == [3, 3, 4, 4], "a query of the same positive fits too"
    known = torch.full((8, 2), -1)
    known[4, 1] = 1  # the third query has document 1 among its answers
    assert backward_candidates(batch_of(roles, 4, answers=known)) == [3, 4, 4, 4]
    assert backward_candidates(alike, mask_false_negatives=False) == [4] * 4


def test_a_query_on_its_own_has_one_direction() -> None:
    batch = batch_of(ROLES, 2, in_batch=[False] * 3 + [True] * 3)
    plain = losses(local(), batch, vectors(*ANGLES))
    found = losses(local(symmetric=True), batch, vectors(*ANGLES))
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    backward = -math.log(cosine(30) / (cosine(30) + cosine(120)))
    assert found[1] == pytest.approx((plain[1] + backward) / 2, rel=1e-5)


def test_a_known_answer_is_no_negative() -> None:
    known = torch.full((6, 2), -1)
    known[0] = torch.tensor([4, 77])  # the other sample's positive answers the first query too
    batch = batch_of(ROLES, 2, answers=known)
    found = losses(local(), batch, vectors(*ANGLES))
    assert found[0] == pytest.approx(-math.log(cosine(10) / sum(map(cosine, (10, 50, 200)))))
    assert found[1] == pytest.approx(-math.log(cosine(30) / sum(map(cosine, (80, 40, 30, 110)))))


def test_matryoshka_averages_normalised_prefixes() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(6, 8, generator=generator), dim=-1)
    batch = batch_of(ROLES, 2)
    prefix = F.normalize(embeddings[:, :3], dim=-1)
    wanted = [
        (a + b) / 2
        for a, b in zip(
            losses(local(), batch, embeddings), losses(local(), batch, prefix), strict=True
        )
    ]
    found = losses(local(matryoshka_dims=[3, 8]), batch, embeddings)
    assert found == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[9\] must be at most"):
        losses(local(matryoshka_dims=[9]), batch, embeddings)


def test_raw_dot_products_keep_the_lengths_of_vectors() -> None:
    """By hand: the query's products with its positive and the other documents are 6, 1, 4, -3."""
    embeddings = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.5, 0.0], [0, 1.0], [1.0, 2.0], [0, -3.0]])
    batch = batch_of(ROLES, 2)
    raw = local(normalize=False)
    found = losses(raw, batch, embeddings)
    assert found[0] == pytest.approx(-6 + math.log(sum(map(math.exp, (6, 1, 4, -3)))), rel=1e-6)
    assert found[1] == pytest.approx(-2 + math.log(sum(map(math.exp, (0, 0, 2, -3)))), rel=1e-6)
    # Of unit vectors the second query's positive has the cosine 2 / sqrt(5), and a prefix is raw.
    unit, cos = losses(local(), batch, embeddings), 2 / math.sqrt(5)
    assert unit[1] == pytest.approx(-cos + math.log(2 + math.exp(cos) + math.exp(-1)), rel=1e-6)
    prefix = losses(local(normalize=False, matryoshka_dims=[1]), batch, embeddings)
    assert prefix[0] == pytest.approx(-6 + math.log(sum(map(math.exp, (6, 1, 2, 0)))), rel=1e-6)


def test_accuracy_ranks_by_the_scores_of_the_loss() -> None:
    """The longest vector wins by its length alone."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [9.0, 9.0], [0, 1.0], [0, 2.0], [0, -0.5]])
    batch = batch_of(ROLES, 2)
    for normalize, wanted in ((True, [1.0, 1.0]), (False, [0.0, 0.0])):
        accuracy = local(normalize=normalize).per_query(embeddings, [batch])[:, 1]
        assert accuracy.tolist() == wanted


def test_distillation_from_a_teacher_s_scores() -> None:
    nan = float("nan")
    batch = batch_of(ROLES, 2, teacher=torch.tensor([nan, 2.0, 1.0, nan, 1.0, nan]))
    objective = local(distillation_weight=0.25)
    found = losses(objective, batch, vectors(*ANGLES))
    plain = losses(local(), batch, vectors(*ANGLES))
    teacher = torch.softmax(torch.tensor([2.0, 1.0]), 0)
    student = torch.softmax(torch.tensor([10.0, 50.0]).deg2rad().cos(), 0)
    divergence = float((teacher * (teacher / student).log()).sum())
    assert found[0] == pytest.approx(0.75 * plain[0] + 0.25 * divergence, rel=1e-5)
    assert found[1] == pytest.approx(plain[1]), "an incomplete teacher teaches nothing"


def test_gradcache_gives_the_whole_batch_s_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator, requires_grad=True)
    halves = [batch_of(ROLES[:3], 1), batch_of(ROLES[:3], 1, document_id=[3, 4, 5])]
    whole = batch_of(ROLES, 2, text_hash=[0, 1, 2, 0, 1, 2])

    def embed(x: Tensor) -> Tensor:
        return F.normalize(x @ weight, dim=-1)

    objective = local()
    total, _, metrics = objective.loss(embed(inputs), whole)
    (expected,) = torch.autograd.grad(total, weight)
    parts = dict(zip(map(id, halves), inputs.split(3), strict=True))
    prepared, more = objective.prepare(lambda b: [embed(parts[id(x)]).detach() for x in b], halves)
    assert more == {}
    outputs = [
        objective.loss(embed(x), batch) for x, batch in zip(inputs.split(3), prepared, strict=True)
    ]
    (found,) = torch.autograd.grad(outputs[0][0] + outputs[1][0], weight)
    torch.testing.assert_close(found, expected)
    means = sum(m["loss"] for *_, m in outputs)
    torch.testing.assert_close(means, metrics["loss"])


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"distillation_weight": 2.0}])
def test_impossible_options_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Contrastive(**option)


def _filled(rank: int, world_size: int, init: str, slots: list[list[int]]) -> Tensor:
    """Each rank's loss of its samples, of which negative ids only fill the batch."""
    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init)
    angles = torch.arange(6 * len(slots)).float() * 17
    embeddings = vectors(*angles.tolist())[6 * rank : 6 * rank + 6]
    names = torch.arange(6) + 6 * rank
    batch = batch_of(
        ROLES, 2, sample_ids=torch.tensor(slots[rank]), document_id=names, text_hash=names
    )
    objective = Contrastive(symmetric=True, temperature=1.0)
    return objective.per_query(embeddings, [batch])


def test_fillings_of_other_ranks_are_neither_queries_nor_documents() -> None:
    """Three real samples of two ranks give what one rank gives for them alone."""
    first, second = run_ranks(_filled, 2, [[0, 1], [2, -1]])
    assert (len(first), len(second)) == (2, 1)
    roles, angles = ROLES + ROLES[:3], [17.0 * k for k in range(9)]
    objective = Contrastive(symmetric=True, temperature=1.0, cross_rank_negatives=False)
    expected = objective.per_query(vectors(*angles), [batch_of(roles, 3)])
    assert torch.allclose(torch.cat([first, second]), expected, rtol=1e-6)
    assert expected[:, 2].tolist() == [5.0] * 3
