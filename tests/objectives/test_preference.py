"""Hand-worked preference losses, their limits and gradients, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.objectives.kto import Kto
from nvmm.objectives.mismatch import mismatched
from nvmm.objectives.preference import Dpo, Ipo, Preference, Rpo, log_probabilities

NAN = float("nan")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def text(prompt: list[int], answer: list[int], chosen: int, reward: float = NAN) -> Text:
    return Text(
        torch.tensor(prompt + answer),
        torch.tensor([0.0] * len(prompt) + [1.0] * len(answer)),
        extras={"chosen": torch.tensor(chosen), "reward": torch.tensor(reward)},
    )


PAIRS = [
    Sample((text([1, 2], [3, 4, 5], 1, 2.0), text([1, 2], [6], 0, 0.5)), 7),
    Sample((text([1], [8, 9], 1, -1.0), text([1], [9, 8, 7, 6], 0, -1.5)), 9),
]


def batch_of(samples: list[Sample], reference: Any = 0.0, packed: bool = False) -> Batch:
    batch = collate(samples, pad_id=0, packed=packed)
    given = torch.as_tensor(reference, dtype=torch.float64).expand(len(batch.owners))
    return batch.replace(extras=batch.extras | {"reference": given})


def output_of(batch: Batch, *sums: float) -> Tensor:
    """Losses of tokens whose sums over each text's answer are `sums`; padding has others."""
    output = torch.full(batch.tokens.shape, 3.0, dtype=torch.float64)
    for number, total in enumerate(sums):
        if batch.cu_seqlens is None:
            row, columns = number, slice(None)
        else:
            row, columns = 0, slice(*batch.cu_seqlens[number : number + 2].tolist())
        mask = batch.loss_mask[row, columns] != 0
        output[row, columns][mask] = total / int(mask.sum())
    return output.requires_grad_()


SUMS = (2.0, 1.0, 6.0, 4.5)
"""Minus the log-probabilities of both pairs' answers."""


def losses(objective: Preference, samples: list[Sample] = PAIRS, packed: bool = False) -> float:
    """Its sum over the pairs, where the reference gives each answer -3."""
    batch = batch_of(samples, -3.0, packed)
    return float(objective.loss(output_of(batch, *SUMS), batch)[0].detach())


MARGINS = (0.5 * (1.0 - 2.0), 0.5 * (-3.0 + 1.5))
"""beta = 0.5 times the difference of gains: -sums + 3."""


@pytest.mark.parametrize("packed", [False, True])
def test_dpo_by_hand(packed: bool) -> None:
    expected = sum(-math.log(sigmoid(m)) for m in MARGINS)
    assert losses(Dpo(beta=0.5), packed=packed) == pytest.approx(expected, rel=1e-12)
    smoothed = sum(-0.8 * math.log(sigmoid(m)) - 0.2 * math.log(sigmoid(-m)) for m in MARGINS)
    assert losses(Dpo(0.5, label_smoothing=0.2), packed=packed) == pytest.approx(smoothed)
    with_sft = expected + 0.01 * (2.0 + 6.0)
    assert losses(Dpo(0.5, sft_weight=0.01), packed=packed) == pytest.approx(with_sft)
    per_token = expected + 0.01 * (2.0 / 3 + 6.0 / 2)
    assert losses(Dpo(0.5, sft_weight=0.01, sft_per_token=True)) == pytest.approx(per_token)
    normalised = [0.5 * (1 / 3 - 2 / 1), 0.5 * (-3 / 2 + 1.5 / 4)]
    expected = sum(-math.log(sigmoid(m)) for m in normalised)
    assert losses(Dpo(0.5, length_normalised=True), packed=packed) == pytest.approx(expected)


def test_ipo_by_hand() -> None:
    expected = sum((m / 0.5 - 1 / (2 * 0.5)) ** 2 for m in MARGINS)
    assert losses(Ipo(beta=0.5)) == pytest.approx(expected, rel=1e-12)


def test_rpo_by_hand() -> None:
    def kl(a: float, b: float) -> float:
        p, q = sigmoid(a), sigmoid(b)
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    targets = (2.0 * 1.5, 2.0 * 0.5)  # eta = 2
    pairs = list(zip(MARGINS, targets, strict=True))
    backward = losses(Rpo(0.5, eta=2.0))
    forward = losses(Rpo(0.5, eta=2.0, divergence="fwd_kl"))
    assert backward == pytest.approx(sum(kl(t, m) for m, t in pairs), rel=1e-9)
    assert forward == pytest.approx(sum(kl(m, t) for m, t in pairs), rel=1e-9)
    assert abs(backward - forward) > 0.01
    square = losses(Rpo(0.5, eta=2.0, divergence="sq"))
    assert square == pytest.approx(sum((m - t) ** 2 for m, t in pairs))


def of_margin(objective: Any, margin: float, target: float) -> tuple[float, float]:
    """Loss and gradient of a pair at a margin m, where the rewards' difference is the target."""
    m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    gains = torch.stack([m / objective.beta, torch.zeros_like(m)])
    rewards = torch.tensor([[target], [0.0]], dtype=torch.float64)
    loss = objective.per_pair(gains, rewards).sum()
    loss.backward()
    return float(loss.detach()), float(m.grad)


@pytest.mark.parametrize("margin", [-2.0, 0.0, 0.7, 30.0])
def test_rpo_is_0_at_its_target_and_its_gradient_is_the_difference_of_sigmoids(
    margin: float,
) -> None:
    loss, gradient = of_margin(Rpo(), margin, margin)
    assert abs(loss) < 1e-12 and abs(gradient) < 1e-12
    for target in (-1.5, 0.0, 4.0):
        loss, gradient = of_margin(Rpo(), margin, target)
        assert loss >= 0
        assert gradient == pytest.approx(sigmoid(margin) - sigmoid(target), abs=1e-12)


def test_rpo_tends_to_dpo_and_to_conservative_dpo() -> None:
    for margin in (-3.0, 0.0, 2.0):
        assert of_margin(Rpo(), margin, 60.0) == pytest.approx(of_margin(Dpo(), margin, 0.0))
        # A constant target of sigmoid(t) = 1 - e: cDPO's gradient, and its loss less the entropy.
        target = math.log(0.9 / 0.1)
        entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
        loss, gradient = of_margin(Rpo(), margin, target)
        expected, slope = of_margin(Dpo(label_smoothing=0.1), margin, 0.0)
        assert (loss, gradient) == pytest.approx((expected - entropy, slope))


def test_metrics_and_the_count_of_pairs() -> None:
    batch = batch_of([*PAIRS, Sample((text([1], [2], 0),), -4)], -3.0)
    output = output_of(batch, *SUMS)
    total, count, metrics = Dpo(beta=0.5).loss(output, batch)
    assert count.item() == 2 and count.dtype == torch.int
    means = {name: (value / n).item() for name, (value, n) in metrics.items()}
    assert {int(n) for _, n in metrics.values()} == {2}
    assert means == pytest.approx(
        {
            "loss": total.item() / 2,
            "reward_chosen": 0.5 * (1.0 - 3.0) / 2,
            "reward_rejected": 0.5 * (2.0 - 1.5) / 2,
            "margin": sum(MARGINS) / 2,
            "accuracy": 0.0,
            "log_probability_chosen": -4.0,
            "log_probability_rejected": -2.75,
            "kl": (1.0 + 2.0 - 3.0 - 1.5) / 4,
        }
    )
    total.backward()
    assert output.grad is not None and not output.grad[4].any(), "filling takes no part"


def test_a_micro_batch_of_filling_keeps_its_graph() -> None:
    batch = batch_of([Sample((text([1], [2], 0),), -4)])
    for objective in (Dpo(), Kto()):
        filled = batch.replace(extras=batch.extras | {"kl": torch.tensor(0.0)})
        total, count, metrics = objective.loss(output_of(filled, 1.0), filled)
        total.backward()
        assert total.item() == 0 and count.item() == 0
        assert all(value.tolist() == [0, 0] for value in metrics.values())


def test_two_batches_add_up_to_one() -> None:
    whole, halves = batch_of(PAIRS, -3.0), [batch_of([pair], -3.0) for pair in PAIRS]
    objective = Rpo(sft_weight=0.1)
    total, count, _ = objective.loss(output_of(whole, *SUMS), whole)
    parts = [
        objective.loss(output_of(half, *SUMS[2 * i : 2 * i + 2]), half)
        for i, half in enumerate(halves)
    ]
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item())
    assert sum(part[1].item() for part in parts) == count.item() == 2


def run_of(policy: dict[int, float], reference: dict[int, float]) -> Any:
    """A pass whose model says token k with the log-probability that is given of k."""

    def run(batches: list[Batch], weights: str = "current") -> list[Tensor]:
        table = policy if weights == "current" else reference
        values = torch.tensor([-table.get(k, 5.0) for k in range(10)], dtype=torch.float64)
        return [values[batch.labels.clamp(min=0)] for batch in batches]

    return run


def test_the_step_runs_the_reference_unless_the_data_give_it() -> None:
    batch = collate(PAIRS, pad_id=0)
    run = run_of({}, {3: -1.0, 4: -2.0, 5: -3.0, 6: -4.0})
    [prepared], metrics = Dpo().prepare(run, [batch])
    assert prepared.extras["reference"].tolist() == [-6.0, -4.0, 10.0, -4.0 + 15.0]
    assert metrics == {} and Dpo().needs_reference and "reference" not in Dpo().extras
    given = Dpo(reference="data")
    assert not given.needs_reference and given.extras == {"chosen", "reward", "reference"}
    assert given.prepare(run, [batch]) == ([batch], {})
    with pytest.raises(ValueError, match=r"objective\.reference=now must be one of step, data"):
        Dpo(reference="now")


@pytest.mark.parametrize("packed", [False, True])
def test_kto_by_hand(packed: bool) -> None:
    """Three answers in two micro-batches; the next sample's answers give the reference point."""
    single = [
        Sample((text([1, 2], [3, 4], 1),), 5),
        Sample((text([6], [7], 0),), 6),
        Sample((text([2], [8], 1),), 9),
    ]
    batches = [collate(some, pad_id=0, packed=packed) for some in (single[:2], single[2:])]
    policy, reference = {3: -1.0, 4: -1.0, 7: -2.0, 8: -3.0}, {3: -2.0, 4: -1.5, 7: -1.0, 8: -3.5}
    gains = {5: 1.5, 6: -1.0, 9: 0.5}  # of answers, by their sample
    objective = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    prepared, _ = objective.prepare(run_of(policy, reference), batches)
    # Each answer stands once behind another prompt, so that the point is the mean of the gains.
    point = sum(gains.values()) / 3
    assert [batch.extras["kl"].item() for batch in prepared] == pytest.approx([point] * 2)
    total = count = 0.0
    for batch in prepared:
        [output] = run_of(policy, reference)([batch])
        loss, number, metrics = objective.loss(output.requires_grad_(), batch)
        total, count = total + loss.item(), count + number.item()
    expected = [
        2.0 * (1 - sigmoid(0.5 * (gains[5] - point))),
        0.5 * (1 - sigmoid(0.5 * (point - gains[6]))),
        2.0 * (1 - sigmoid(0.5 * (gains[9] - point))),
    ]
    assert total == pytest.approx(sum(expected)) and count == 3
    assert metrics["reward_chosen"].tolist() == pytest.approx([0.25, 1.0])
    assert metrics["reward_rejected"].tolist() == [0, 0]
    # Of the data the answers' log-probabilities come; the reference runs on the others' alone.
    asked = []

    def run(some: list[Batch], weights: str = "current") -> list[Tensor]:
        asked.append((weights, [batch.tokens.tolist() for batch in some]))
        return run_of(policy, reference)(some, weights)

    scored = [
        each.replace(extras=each.extras | {"reference": torch.tensor(-9.0)}) for each in batches
    ]
    given = Kto(beta=0.5, reference="data")
    found, _ = given.prepare(run, scored)
    assert [batch.extras["kl"].item() for batch in found] == pytest.approx([point] * 2)
    assert [batch.extras["reference"].item() for batch in found] == [-9.0, -9.0]
    assert [weights for weights, _ in asked] == ["current", "reference"]
    assert all(tokens != [each.tokens.tolist() for each in batches] for _, tokens in asked)
    assert given.needs_reference and "reference" in given.extras
    # The estimate of a divergence is not negative.
    [low, _], _ = objective.prepare(run_of(reference, policy), batches)
    assert low.extras["kl"].item() == 0
    assert objective.samples_in_loss(8, 2, 2) == 8


@pytest.mark.parametrize("packed", [False, True])
def test_mismatched_texts_have_the_answers_of_the_next_sample(packed: bool) -> None:
    batches = [collate([*PAIRS[::-1]], pad_id=0, packed=packed, pad_multiple=4)]
    batches += [collate([Sample((text([4, 4, 4], [3], 1),), 8)], pad_id=0, packed=packed)]
    made = mismatched(batches)
    found = []
    for batch in made:
        starts = [0] * 9 if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        for number, length in enumerate(batch.lengths.tolist()[: len(batch.owners)]):
            row, start = (0, starts[number]) if packed else (number, 0)
            tokens = batch.tokens[row, start : start + length].tolist()
            mask = batch.loss_mask[row, start : start + length].tolist()
            found.append((tokens, mask.index(1.0) + 1))
        assert batch.tokens.shape[1] % 4 == 0 or len(batch.owners) == 1
    assert found == [
        ([1, 3, 4, 5], 1),  # sample 9 has those of sample 7, the first again
        ([1, 6], 1),
        ([1, 2, 3], 2),  # sample 7 has the only one of sample 8, twice
        ([1, 2, 3], 2),
        ([4, 4, 4, 8, 9], 3),  # sample 8 has the first of sample 9
    ]
    assert [batch.sample_ids.tolist() for batch in made] == [[9, 7], [8]]
    alone = [collate(PAIRS[:1], pad_id=0)]
    assert mismatched(alone) == []
    [prepared], _ = Kto().prepare(run_of({}, {}), alone)
    assert prepared.extras["kl"].item() == 0


def test_an_answer_of_another_prompt_is_cut_at_the_longest_text() -> None:
    samples = [Sample((text([1] * 6, [2], 1),), 1), Sample((text([1], [3, 4, 5, 6], 0),), 2)]
    [batch] = mismatched([collate(samples, pad_id=0)])
    assert batch.tokens[0].tolist() == [1] * 6 + [3]
    assert batch.tokens[1].tolist() == [1, 2, 0, 0, 0, 0, 0]


def test_sums_have_single_precision_at_least() -> None:
    batch = batch_of(PAIRS)
    output = torch.full(batch.tokens.shape, 1.0009765625, dtype=torch.bfloat16)
    assert log_probabilities(output, batch)[0].dtype == torch.float32
    assert log_probabilities(output.double(), batch)[0].dtype == torch.float64


def test_pairs_and_rewards_that_are_missing_are_refused_by_name() -> None:
    single = collate([PAIRS[0], Sample((text([1], [2], 1),), 12)], pad_id=0)
    for objective in (Dpo(), Ipo(), Rpo()):
        with pytest.raises(ValueError, match=r"a rejected answer, which samples \[12\] do not"):
            objective.prepare(run_of({}, {}), [single])
    bare = Sample((text([1], [2], 1), text([1], [3], 0)), 13)
    unrewarded = collate([*PAIRS, bare], pad_id=0)
    with pytest.raises(ValueError, match=r"Rpo needs rewards, and samples \[13\] have none"):
        Rpo().prepare(run_of({}, {}), [unrewarded])
    Dpo().prepare(run_of({}, {}), [unrewarded])


@pytest.mark.parametrize(
    ("objective", "options", "says"),
    [
        (Dpo, {"beta": 0.0}, "objective.beta=0.0"),
        (Dpo, {"label_smoothing": 0.5}, "label_smoothing=0.5"),
        (Dpo, {"sft_weight": -1.0}, "sft_weight=-1.0"),
        (Ipo, {"beta": NAN}, "objective.beta=nan"),
        (Rpo, {"eta": 0.0}, "objective.eta=0.0"),
        (Rpo, {"divergence": "kl"}, "objective.divergence=kl must be one of bwd_kl, fwd_kl, sq"),
        (Kto, {"undesirable_weight": -1.0}, "undesirable_weight"),
    ],
)
def test_impossible_options_are_refused(objective: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        objective(**options)


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = torch.randn(4, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = batch_of(PAIRS)
    s = batch.tokens.shape[1]
    labels = batch.labels.clamp(min=0)
    output = F.cross_entropy(logits[:, :s].flatten(0, 1), labels.flatten(), reduction="none")
    sums, numbers = log_probabilities(output.view_as(labels), batch)
    row = [math.log(float(logits[1, 1].softmax(-1)[6]))]
    assert float(sums[1]) == pytest.approx(sum(row))
    assert numbers.tolist() == [3, 1, 2, 4]
