"""Bradley-Terry's loss and gradients are TRL's, on the same pairs and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.batch import Sample, Text
from nvmm.data.collate import collate
from nvmm.objectives.reward import BradleyTerry
from tests.convert import test_reward
from tests.convert.test_families import imported

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("world")]


def pair(number: int) -> tuple[Text, Text]:
    """A better and a worse answer, 1 + number apart; none ends with the padding."""
    texts = []
    for chosen in (1, 0):
        length = 5 + (3 * number + 4 * chosen) % 7
        extras = {
            "chosen": torch.tensor(chosen),
            "reward": torch.tensor(float(1 + number) * chosen),
        }
        tokens = (torch.arange(length) * (31 + number) + 11 * chosen) % 400 + 5
        texts.append(Text(tokens, torch.ones(length), extras=extras))
    return texts[0], texts[1]


@pytest.mark.parametrize("margin", ["none", "margin"])
def test_loss_and_gradients_are_trl_s(
    margin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    from nvmm.data.samples.tokenizer import train_byte_level_bpe

    monkeypatch.chdir(tmp_path)
    test_reward.save("Llama", tmp_path / "theirs", num_labels=1)
    pairs = [pair(number) for number in range(3)]
    # 1. Ours: the mean over pairs, as the schedule takes it.
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    module = test_reward.build(model, tmp_path / "ours").train()
    batch = collate([Sample(texts, i) for i, texts in enumerate(pairs)], pad_id=0)
    total, count, metrics = BradleyTerry(margin).loss(module(batch), batch)
    (total / count).backward()
    # 2. TRL's trainer, which loads the folder as it loads any reward model.
    words = train_byte_level_bpe(
        tmp_path / "words",
        ["a"],
        vocab_size=300,
        special_tokens=["</s>", "<x>", "<y>", "<pad>"],
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
    assert tokenizer.pad_token_id == test_reward.PAD
    rows: list[dict[str, Any]] = [
        {"chosen_ids": better.tokens.tolist(), "rejected_ids": worse.tokens.tolist()}
        for better, worse in pairs
    ]
    if margin == "margin":
        rows = [row | {"margin": float(1 + number)} for number, row in enumerate(rows)]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    trainer = RewardTrainer(
        theirs,
        RewardConfig(
            str(tmp_path / "out"), use_cpu=True, report_to=[], bf16=False, disable_tqdm=True
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(theirs.train(), trainer.data_collator(rows))
    loss.backward()
    assert float(total.detach() / count) == pytest.approx(float(loss.detach()), rel=1e-5)
    accuracy = trainer._metrics["train"]["accuracy"][-1]
    assert float(metrics["accuracy"][0] / metrics["accuracy"][1]) == pytest.approx(accuracy)
    for ours, their in (
        (module.head.weight, theirs.score.weight),
        (module.decoder.final_layernorm.weight, theirs.model.norm.weight),
        (
            module.decoder.layers[0].mlp.linear_fc2.weight,
            theirs.model.layers[0].mlp.down_proj.weight,
        ),
    ):
        torch.testing.assert_close(ours.grad, their.grad, rtol=1e-4, atol=1e-6)
    assert theirs.score.weight.grad.abs().max() > 1e-2
