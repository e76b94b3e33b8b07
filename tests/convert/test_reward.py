"""Reward models as Transformers' ForSequenceClassification: bit-equal, and the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from nvmm.batch import Batch, Sample, Text
from nvmm.checkpoint.load import load_weights
from nvmm.commands.convert import main
from nvmm.convert.formats import reward
from nvmm.convert.formats.all import FORMATS, detect
from nvmm.data.collate import collate
from nvmm.parallel.setup import Parallel, Precision
from tests import oracle, reward_run
from tests.convert import families
from tests.convert.test_families import assert_equal, exported, imported
from tests.data.conftest import template
from tests.ranks import run_ranks

PAD = 3
KINDS = {
    "Llama": {"rms_norm_eps": 1e-5},
    "Mistral": {"sliding_window": 4},
    "Nemotron": {"partial_rotary_factor": 0.4, "hidden_act": "relu2"},
    "Qwen2": {"tie_word_embeddings": True},
}


def save(kind: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny <kind>ForSequenceClassification of three labels; returns Transformers' model."""
    import transformers

    shape = families._SHAPE | KINDS[kind] | {"num_labels": 3, "pad_token_id": PAD} | changes
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    oracle.randomize(model, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def rows(lengths: tuple[int, ...] = (12, 5, 9)) -> list[Tensor]:
    return [torch.arange(n) * 37 % 400 + 5 for n in lengths]


def batch_of(texts: list[Tensor], **options: Any) -> Batch:
    samples = [Sample((Text(text, torch.zeros(len(text))),)) for text in texts]
    return collate(samples, pad_id=PAD, **options)


def build(model: dict[str, Any], path: Path) -> Any:
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(model, _convert_="all")(chunk=chunk).eval()
    assert load_weights(path, [module]) == []
    return module


def theirs(model: Any, batch: Batch) -> Tensor:
    mask = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        return model(batch.tokens, attention_mask=mask.long()).logits


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_weights_come_back(kind: str, tmp_path: Path) -> None:
    """Padded on the right in one batch, and packed in ours; then written as they were."""
    import transformers

    reference = save(kind, tmp_path / "theirs")
    name = f"{kind.lower()}_reward"
    hf = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert detect(hf, tmp_path) == name
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    assert (model["_target_"], model["num_outputs"]) == ("nvmm.models.reward.RewardModel", 3)
    module = build(model, tmp_path / "ours")
    batch = batch_of(rows())
    expected = theirs(reference, batch)
    with torch.no_grad():
        torch.testing.assert_close(module(batch), expected, atol=1e-5, rtol=1e-5)
        packed = module(batch_of(rows(), packed=True, pad_multiple=8))
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).min() > 0.01, "the scores tell the texts apart"

    back = exported(tmp_path / "ours", tmp_path / "back", name)
    assert_equal(back, load_file(tmp_path / "theirs" / "model.safetensors"))
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.problem_type == "regression"
    assert (again.config.num_labels, again.config.pad_token_id) == (3, PAD)
    assert torch.equal(theirs(again.eval(), batch), expected)
    both = ["--a", str(tmp_path / "back"), "--b", str(tmp_path / "ours")]
    assert main(["verify", *both, "--tolerance", "1e-5"]) == 0


@pytest.mark.usefixtures("world")
def test_a_base_model_s_checkpoint_begins_a_reward_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its output layer is named as left out, and the head as drawn."""
    families.language("llama3", tmp_path / "theirs")
    language = imported(tmp_path / "theirs", tmp_path / "ours")
    for key in ("share_embeddings_and_output_weights", "_target_"):
        del language[key]
    model = language | {"_target_": "nvmm.models.reward.RewardModel", "num_outputs": 2}
    [chunk] = Parallel().chunks(Precision())
    module = instantiate(model, _convert_="all")(chunk=chunk)
    assert load_weights(tmp_path / "ours", [module]) == ["head.weight"]
    assert "has weights this model does not have: output_layer.weight" in caplog.text


def test_what_a_config_says_of_labels_is_read() -> None:
    family = FORMATS["llama_reward"]
    plain = families._SHAPE | {"model_type": "llama"}

    def outputs(**fields: Any) -> int:
        return family.to_model(plain | fields)["num_outputs"]

    assert outputs() == 2, "Transformers' default"
    assert outputs(num_labels=1) == 1
    assert outputs(id2label={"0": "a", "1": "b", "2": "c"}, num_labels=3) == 3
    assert family.complete(plain, {"score.weight": torch.empty(5, 60)})["num_labels"] == 5
    with pytest.raises(ValueError, match="id2label has 1 labels, and the model 2 outputs"):
        outputs(id2label={"0": "a"}, num_labels=2)
    with pytest.raises(ValueError, match="problem_type='multi_label_classification' is not"):
        outputs(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"needs model\._target_=nvmm\.models\.reward"):
        family.from_model({"_target_": "nvmm.models.language.LanguageModel"})
    assert set(reward.ARCHITECTURES.values()) == reward.FORMATS.keys()


@pytest.mark.parametrize("pad", ["<extra_id_2>", "<|endoftext|>"])
def test_an_export_after_training_gives_our_scores_of_conversations(
    pad: str, tmp_path: Path
) -> None:
    """Also where the tokenizer pads with the token that texts end with: another one then pads."""
    import transformers

    config = reward_run.config_of(tmp_path / "tokenizer", pad=pad)
    [ours] = run_ranks(reward_run.save, 1, {}, config, tmp_path / "run", reward_run.TURNS)
    back = tmp_path / "back"
    arguments = ["--from", str(tmp_path / "run"), "--to", str(back), "--format", "llama_reward"]
    assert main(["export", *arguments]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(back).eval()
    words = transformers.AutoTokenizer.from_pretrained(back)
    assert theirs.config.id2label == {0: "quality", 1: "verbosity"}
    # What vLLM reads: the class, whose head is one linear without a bias, and that its outputs are
    # numbers of their own, which it would turn into probabilities else.
    said = json.loads((back / "config.json").read_text())
    assert said["architectures"] == ["LlamaForSequenceClassification"]
    assert (said["num_labels"], said["problem_type"]) == (2, "regression")
    assert said["pad_token_id"] == words.pad_token_id
    tensors = [name for file in back.glob("*.safetensors") for name in load_file(file)]
    assert "score.weight" in tensors and "score.bias" not in tensors
    assert theirs.config.pad_token_id == words.pad_token_id != words.encode("<extra_id_2>")[-1]
    chats = [
        [{"role": turn.role, "content": turn.text} for turn in turns] for turns in reward_run.TURNS
    ]
    inputs = words.apply_chat_template(
        chats, padding=True, padding_side="right", return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        scores = theirs(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(scores, ours, atol=1e-5, rtol=1e-5)


def test_padding_is_a_token_that_ends_no_text(tmp_path: Path) -> None:
    from nvmm.convert.chat_template import Conversation
    from nvmm.convert.scoring import padding

    tokenizer = reward_run.tokenizer(tmp_path, pad="<extra_id_2>")
    talk = Conversation(tokenizer, tmp_path, template(), True, "<extra_id_2>")
    assert padding(talk, 300) == tokenizer.image_id
    with pytest.raises(ValueError, match="has no token to pad with"):
        padding(talk, tokenizer.image_id)
    plain = Conversation(tokenizer, tmp_path, template(), True)
    assert padding(plain, 300) == tokenizer.token_id("<extra_id_2>")
