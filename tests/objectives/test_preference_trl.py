"""Losses, log-probabilities and gradients are TRL's, on the same pairs and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.objectives.kto import Kto
from nvmm.objectives.preference import Dpo, Ipo, Preference

pytestmark = pytest.mark.slow
TEXT = "the small bird sings of a long green river and then it goes home again"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    special = ["<s>", "</s>", "<pad>"]
    folder = train_byte_level_bpe(
        tmp_path_factory.mktemp("tokenizer"),
        WORDS,
        vocab_size=300,
        special_tokens=special,
        eos_token="</s>",
        pad_token="<pad>",
    )
    return PreTrainedTokenizerFast.from_pretrained(folder)


def model(seed: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config)


def near(policy: Any) -> Any:
    """A reference that is not far from the policy: gains of about one."""
    reference = model(0)
    reference.load_state_dict(policy.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return reference


def sample(tokenizer: Any, number: int, labels: tuple[int, ...]) -> Sample:
    """A prompt with one answer for each label."""
    texts = []
    for place, label in enumerate(labels):
        prompt = tokenizer(" ".join(WORDS[number : number + 4]))["input_ids"]
        first = 2 * number + 3 * place
        answer = tokenizer(" " + " ".join(WORDS[first % 9 :][: 2 + place + number % 3]))
        answer = [*answer["input_ids"], tokenizer.eos_token_id]
        texts.append(
            Text(
                torch.tensor(prompt + answer),
                torch.tensor([0.0] * len(prompt) + [1.0] * len(answer)),
                extras={"chosen": torch.tensor(label), "reward": torch.tensor(float("nan"))},
            )
        )
    return Sample(tuple(texts), number)


def parts(text: Text) -> tuple[list[int], list[int]]:
    first = int(text.weights.argmax())
    return text.tokens[:first].tolist(), text.tokens[first:].tolist()


def outputs(of: Any, batch: Batch) -> Tensor:
    """The loss of each token, as our models give it."""
    logits = of(batch.tokens).logits
    labels = batch.labels.clamp(min=0)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def ours(objective: Preference, policy: Any, reference: Any, samples: list[Sample]) -> Any:
    """Mean loss, its metrics, and the gradients."""

    def run(batches: list[Batch], weights: str = "current") -> list[Tensor]:
        chosen = policy if weights == "current" else reference
        with torch.no_grad():
            return [outputs(chosen, batch) for batch in batches]

    [batch], _ = objective.prepare(run, [collate(samples, pad_id=0)])
    total, count, metrics = objective.loss(outputs(policy, batch), batch)
    (total / count).backward()
    means = {name: float(value / number) for name, (value, number) in metrics.items()}
    return means | {"loss": float(total.detach() / count)}, gradients(policy)


def gradients(policy: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def trainer(kind: str, tokenizer: Any, reference: Any, folder: Path, **options: Any) -> Any:
    """TRL's, over a data set of its own: only its loss is asked for."""
    import trl
    from datasets import Dataset

    rows: dict[str, list[Any]] = {"prompt": ["the small bird"] * 4}
    if kind == "KTO":
        rows |= {"completion": [" sings", " goes"] * 2, "label": [True, False] * 2}
    else:
        rows |= {"chosen": [" sings"] * 4, "rejected": [" goes"] * 4}
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        **options,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model(1),
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def compared(found: Any, made: Any, inputs: Any, trl_metrics: dict[str, str]) -> None:
    """TRL's loss, metrics and gradients of `inputs` are those that were found."""
    means, gradient = found
    loss = made._compute_loss(made.model, inputs, False)
    loss.backward()
    assert means["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    logged = made._metrics["train"]
    for name, theirs in trl_metrics.items():
        assert means[name] == pytest.approx(logged[theirs][-1], rel=1e-5, abs=1e-5), name
    expected = gradients(made.model)
    assert gradient.keys() == expected.keys() and len(expected) > 10
    scale = max(float(value.square().mean().sqrt()) for value in expected.values())
    assert scale > 1e-4
    for name, value in expected.items():
        error = float((gradient[name] - value).square().mean().sqrt())
        assert error <= 1e-5 * scale, name


PAIRWISE: list[tuple[Preference, dict[str, Any]]] = [
    (Dpo(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    (
        Dpo(beta=0.3, length_normalised=True),
        {"loss_type": ["sigmoid_norm"], "beta": 0.3},
    ),
    (Ipo(beta=0.3, length_normalised=True), {"loss_type": ["ipo"], "beta": 0.3}),
]


@pytest.mark.parametrize(("objective", "options"), PAIRWISE, ids=["dpo", "dpo_norm", "ipo"])
def test_pairs(objective: Preference, options: Any, tokenizer: Any, tmp_path: Path) -> None:
    reference = near(model(1))
    made = trainer("DPO", tokenizer, reference, tmp_path, **options)
    samples = [sample(tokenizer, number, (1, 0)) for number in range(4)]
    found = ours(objective, model(1), reference, samples)
    examples = []
    for each in samples:
        (prompt, chosen), (_, rejected) = map(parts, each.texts)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    names = {"log_probability_chosen": "logps/chosen", "log_probability_rejected": "logps/rejected"}
    if not objective.length_normalised:  # type: ignore[attr-defined]
        names |= {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        names |= {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"}
    compared(found, made, made.data_collator(examples), names)


def test_kto(tokenizer: Any, tmp_path: Path) -> None:
    policy = model(1)
    reference = near(policy)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    made = trainer("KTO", tokenizer, reference, tmp_path, **weights)
    samples = [sample(tokenizer, number, (number % 2,)) for number in range(4)]
    objective = Kto(**weights)
    found = ours(objective, policy, reference, samples)
    examples = []
    for number, each in enumerate(samples):
        prompt, answer = parts(each.text)
        other = parts(samples[(number + 1) % 4].text)[1]
        longest = max(len(each.text.tokens) for each in samples)
        example = {"prompt_ids": prompt, "completion_ids": answer, "label": bool(number % 2)}
        examples.append(example | {"KL_completion_ids": other[: longest - len(prompt)]})
    compared(found, made, made.data_collator(examples), {"kl": "kl"})
    assert found[0]["kl"] > 0.01
