"""Audio Flamingo 3: Transformers' features and logits, whole windows and short ones, and back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from nvmm.batch import MediaKind, Sample, Text, TextMedia
from nvmm.checkpoint.load import load_weights
from nvmm.commands.convert import main as convert
from nvmm.convert import exporting, models
from nvmm.convert.chat_template import conversation
from nvmm.convert.formats.audio_flamingo3 import from_model, table, to_model
from nvmm.convert.importing import parameters
from nvmm.convert.sources import read
from nvmm.convert.table import ToTheirs
from nvmm.data.collate import collate
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.parallel.setup import Parallel, Precision
from tests import oracle
from tests.convert.test_families import as_trained, assert_equal, exported, imported
from tests.convert.test_full_size import Names, config_of
from tests.data.samples.test_sounds import noise, wave

SOUND = 508
FRAMES, TOKENS = 22, 5  # 11 tokens, of which pairs become one, the last is left over
AUDIO: dict[str, Any] = {
    **{"num_mel_bins": 7, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5},
    **{"intermediate_size": 92, "max_source_positions": 11},
}
TEXT: dict[str, Any] = {
    **{"model_type": "qwen2", "vocab_size": 509, "hidden_size": 60, "intermediate_size": 92},
    **{"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
}
EXTENTS = [[22, 9], [], [3], [22, 21]]
"""Frames of sound in the windows of four texts: 5 + 2, none, 1 and 5 + 5 features."""


def folder(path: Path, sound_id: int = SOUND, **audio: Any) -> Any:
    """Save a tiny model of Transformers; returns it."""
    import transformers

    config = transformers.AudioFlamingo3Config(
        audio_config=AUDIO | audio, text_config=dict(TEXT), audio_token_id=sound_id
    )
    model = transformers.AudioFlamingo3ForConditionalGeneration(config).eval()
    oracle.randomize(model, std=0.1)
    model.save_pretrained(path)
    return model


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for number, extents in enumerate(EXTENTS):
        counts = [(frames + 1) // 2 // 2 for frames in extents]
        words = torch.randint(0, SOUND, (9,), generator=generator)
        sound = torch.full((sum(counts),), SOUND)
        tokens = torch.cat([words[:3], sound, words[3:]])
        media = {}
        if extents:
            starts = 3 + torch.tensor([0, *counts]).cumsum(0)[:-1]
            media[MediaKind("audio")] = TextMedia(
                values=torch.randn(len(extents), 7, FRAMES, generator=generator),
                positions=starts,
                items=torch.zeros(len(extents), dtype=torch.int64),
                tiles=torch.arange(len(extents)) + 1,
                placeholder_id=SOUND,
                tokens_per_item=TOKENS,
                extents=torch.tensor(extents),
                counts=torch.tensor(counts),
            )
        made.append(Sample((Text(tokens, torch.ones(len(tokens)), media),), number, "s"))
    return made


def inputs(sample: Sample) -> dict[str, Tensor]:
    """A sample's sounds as Transformers takes them."""
    media = sample.text.media.get(MediaKind("audio"))
    if media is None:
        return {}
    assert media.extents is not None
    mask = torch.arange(FRAMES) < media.extents[:, None]
    return {"input_features": media.values, "input_features_mask": mask.long()}


def opened(path: Path) -> Any:
    [chunk] = Parallel().chunks(Precision())
    model = instantiate(models.open_checkpoint(path).model, _convert_="all")(chunk=chunk).eval()
    assert load_weights(path, [model]) == []
    return model


@pytest.mark.usefixtures("world")
def test_it_comes_back_bit_equal_with_transformers_features_and_logits(tmp_path: Path) -> None:
    reference = folder(tmp_path / "theirs")
    config = imported(tmp_path / "theirs", tmp_path / "ours")
    assert config["encoders"]["audio"]["encoder"]["pool"] == 2
    ours = opened(tmp_path / "ours")
    texts = samples()
    batch = collate(texts, pad_id=0)
    with torch.no_grad():
        # 1. Features of each window, in one list as Transformers has them.
        media = batch.media[MediaKind("audio")]
        found = ours.encode("audio", [media])
        kept = torch.arange(TOKENS) < media.num_features[:, None]
        heard = [inputs(text) for text in texts if text.text.media]
        theirs = [reference.get_audio_features(**x).pooler_output for x in heard]
        assert kept.sum().item() == len(torch.cat(theirs)) == 18
        torch.testing.assert_close(found[kept], torch.cat(theirs), atol=1e-4, rtol=0)
        # 2. Logits, padded and packed.
        expected = [reference(t.text.tokens[None], **inputs(t)).logits[0] for t in texts]
        rows = ours(batch, output="logits")
        for row, logits in zip(rows, expected, strict=True):
            torch.testing.assert_close(row[: len(logits)], logits, atol=1e-4, rtol=0)
        packed = ours(collate(texts, pad_id=0, packed=True), output="logits")[0]
        torch.testing.assert_close(packed, torch.cat(expected), atol=1e-4, rtol=0)
    # 3. And back.
    back = exported(tmp_path / "ours", tmp_path / "back", "audio_flamingo3", max_shard_bytes=10**9)
    assert_equal(back, load_file(tmp_path / "theirs" / "model.safetensors"))
    again, info = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        logits = again.eval()(texts[0].text.tokens[None], **inputs(texts[0])).logits[0]
    assert torch.equal(logits, expected[0])


@pytest.mark.usefixtures("world")
def test_transformers_prepares_what_we_do(tmp_path: Path) -> None:
    """The export of a trained model, its processor on sound files of 2.3 s and 0.9 s in windows of
    one second: every token, spectrograms, and logits."""
    import transformers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>"]
    texts = ["system You are a helpful assistant.\nuser\nassistant\nWhat is it? A cat, I think."]
    train_byte_level_bpe(
        tmp_path / "theirs",
        texts,
        vocab_size=400,
        special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    folder(tmp_path / "theirs", special.index("<sound>"), num_mel_bins=16, max_source_positions=50)
    imported(tmp_path / "theirs", tmp_path / "ours")
    saved = models.open_checkpoint(as_trained(tmp_path / "ours"))
    exporting.export(saved, tmp_path / "back", "audio_flamingo3")
    theirs = transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert theirs.config.audio_token_id == special.index("<sound>")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    talk = conversation(saved, None)
    assert talk is not None
    build = instantiate(saved.state["config"]["data"]["train"]["build"], _convert_="all")
    build = build(tokenizer=talk.tokenizer, sequence_length=512)
    for seconds, windows in ((2.3, 3), (0.9, 1)):
        sound = noise(seconds, 16_000, 3).astype(np.float32)
        sound /= np.abs(sound).max()  # which leaves our scaling to +-1 nothing to do
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=text, audio=[sound], return_tensors="pt")
        record = {"conversations": [{"from": "human", "value": "<sound>What is it?"}]}
        members = {"__url__": "s", "__key__": "k", "json": json.dumps(record).encode()}
        members |= {"wav": wave(sound, 16_000, subtype="FLOAT")}
        sample = build.prompt(members)
        assert sample.text.tokens.tolist() == inputs["input_ids"][0].tolist()
        media = sample.text.media[MediaKind("audio")]
        assert media.extents is not None and len(media.values) == windows
        assert media.extents.tolist() == inputs["input_features_mask"].sum(-1).tolist()
        torch.testing.assert_close(media.values, inputs["input_features"], atol=1e-4, rtol=0)
        with torch.no_grad():
            expected = theirs.eval()(**inputs).logits
            found = opened(tmp_path / "ours")(collate([sample], pad_id=0), output="logits")
        torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("world")
def test_the_silence_behind_a_sound_is_not_looked_at(tmp_path: Path) -> None:
    """Frames that neither a kept token nor a kernel beside it has change nothing."""
    folder(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    encoder = opened(tmp_path / "ours").audio
    windows = samples()[0].text.media[MediaKind("audio")].values[1:]
    louder = windows.clone()
    louder[..., 13:] += 5
    extents = torch.tensor([9])
    with torch.no_grad():
        before, after = encoder(windows, extents), encoder(louder, extents)
        assert torch.equal(before[:, :2], after[:, :2])
        assert not torch.allclose(encoder(windows)[:, :2], before[:, :2], atol=1e-3)


@pytest.mark.usefixtures("world")
def test_counts_that_are_not_the_encoders_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    batch = collate(samples()[:1], pad_id=0)
    media = batch.media[MediaKind("audio")]
    wrong = type(media)(**{**vars(media), "extents": torch.tensor([22, 13])})
    batch = batch.replace(media={MediaKind("audio"): wrong})
    with pytest.raises(ValueError, match=r"have \[5, 3\] features, and the data \[5, 2\]"):
        opened(tmp_path / "ours")(batch, output="logits")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu' is not supported"),
        ({"text_config": {**TEXT, "model_type": "llama"}}, "model_type='llama' is not supported"),
        ({"text_config": {**TEXT, "tie_word_embeddings": True}}, "tie_word_embeddings=True is not"),
        ({"audio_config": {**AUDIO, "activation_function": "relu"}}, "activation_function='relu'"),
    ],
)
def test_what_our_model_has_not_is_refused(fields: dict[str, Any], message: str) -> None:
    hf = {"model_type": "audioflamingo3", "text_config": TEXT, "audio_config": AUDIO, **fields}
    with pytest.raises(ValueError, match=message):
        to_model(hf)


def test_what_the_format_has_not_is_refused() -> None:
    model = to_model({"model_type": "audioflamingo3", "text_config": TEXT, "audio_config": AUDIO})
    model["encoders"]["audio"]["encoder"]["pool"] = 1
    with pytest.raises(ValueError, match=r"cannot express .*encoder\.pool=1; it has 2"):
        from_model(model)
    with pytest.raises(ValueError, match="needs a model of language and Whisper's encoder"):
        from_model({"language": model["language"]})


def test_names_of_whispers_sizes_are_read_too() -> None:
    """As folders of older versions of Transformers spell them."""
    old = {"d_model": 60, "encoder_layers": 2, "encoder_attention_heads": 5, "encoder_ffn_dim": 92}
    spelt = {**old, "num_mel_bins": 7, "max_source_positions": 11}
    hf = {"model_type": "audioflamingo3", "text_config": TEXT}
    assert to_model({**hf, "audio_config": spelt}) == to_model({**hf, "audio_config": AUDIO})


def test_full_size_has_transformers_names_and_shapes() -> None:
    """Whisper large-v3's encoder of 637 M, a projector of 17 M and Qwen2.5-7B."""
    import transformers

    ours = config_of("audio_flamingo3_7b")
    hf = from_model(ours)
    published = transformers.AudioFlamingo3EncoderConfig().to_dict()
    assert {k: published[k] for k in hf["audio_config"]} == hf["audio_config"]
    shapes = {
        name: list(spec.shape)
        for name, spec in parameters(instantiate(ours, _convert_="all")).items()
    }
    counts = {"audio.": 636_968_960 + 32 * 1280, "audio_connector.": 17_439_744}
    counts |= {"language.": 7_615_616_512}
    for part, count in counts.items():
        of_part = [shape for name, shape in shapes.items() if name.startswith(part)]
        assert sum(map(math.prod, of_part)) == count, part
    there = ToTheirs(Names(shapes), table(ours, hf)).spec
    with torch.device("meta"):
        reference = transformers.AudioFlamingo3ForConditionalGeneration(
            transformers.AudioFlamingo3Config.from_dict(hf)
        )
    theirs = {}
    for name, value in reference.state_dict().items():
        name = re.sub("^model.language_model", "language_model.model", name)
        name = re.sub("^lm_head", "language_model.lm_head", name.removeprefix("model."))
        theirs[name] = list(value.shape)
    assert {name: list(spec.shape) for name, spec in there.items()} == theirs


@pytest.mark.usefixtures("world")
def test_backbones_compose_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2's folder and Whisper's, as a config has them; the projector is left to the run."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    ours = config_of("audio_flamingo3_tiny")
    theirs = from_model(ours)
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(theirs["text_config"]))
    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 128, "num_mel_bins": 16, "max_source_positions": 50}
    whisper = WhisperEncoder(transformers.WhisperConfig(**sizes, init_std=0.07))
    for name, model in (("qwen", qwen), ("whisper", whisper)):
        oracle.randomize(model)
        model.save_pretrained(tmp_path / name)
    command = ["import", "--from", f"language={tmp_path / 'qwen'}"]
    command += ["--from", f"audio={tmp_path / 'whisper'}", "--to", str(tmp_path / "ours")]
    assert convert([*command, "model=audio_flamingo3_tiny"]) == 0, capsys.readouterr().err
    saved = models.open_checkpoint(tmp_path / "ours")
    assert saved.model["encoders"]["audio"]["encoder"]["pool"] == 2
    assert all(name.startswith("audio_connector.") for name in saved.state["left_to_the_run"])
    norm = read(saved.source, "audio.decoder.final_layernorm.weight")
    assert torch.equal(norm, whisper.layer_norm.weight)
