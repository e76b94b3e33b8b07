"""InternVL of Transformers: folders -> ours -> folders, logits over tiles, and the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from nvmm.batch import IMAGE
from nvmm.config import check, compose
from nvmm.convert import exporting, models
from nvmm.convert.chat_template import conversation
from nvmm.convert.formats import internvl as internvl_format
from nvmm.convert.formats import internvl_vision
from nvmm.convert.formats.all import detect
from nvmm.data.collate import collate
from nvmm.data.samples.record import plain_question
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.inference.restore import restore
from tests import oracle
from tests.convert import families
from tests.convert.test_families import as_trained, assert_equal, imported
from tests.convert.test_vila import batch_of, normalised, ours, picture, pixels, png

ID = families.VOCABULARY - 1
"""The placeholder's id."""
VISION = {
    "hidden_size": 80,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": [16, 16],
    "patch_size": [4, 4],
}
VISIONS = {
    "300m": VISION | {"attention_bias": True},
    "6b": VISION | {"use_qk_norm": True, "norm_type": "rms_norm"},
}
TEXTS = {
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama"},
}


def internvl(vision: str, text: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny InternVL of Transformers' class; returns it."""
    import transformers

    options = {"image_token_id": ID, "image_seq_length": 4, "tie_word_embeddings": False}
    config = transformers.InternVLConfig(
        vision_config=dict(VISIONS[vision]),
        text_config=families._SHAPE | TEXTS[text],
        **(options | changes),
    )
    model = transformers.InternVLForConditionalGeneration(config)
    oracle.randomize(model, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("vision", "text", "changes"),
    [
        ("300m", "qwen2", {}),
        pytest.param("6b", "qwen3", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("6b", "llama", {"downsample_ratio": 0.25}, marks=pytest.mark.slow),
    ],
)
def test_logits_over_tiles_are_transformers_both_ways(
    vision: str, text: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Two pictures of two tiles; the folder comes back bit-equal, in one file or in several."""
    import transformers

    per_tile = 1 if changes.get("downsample_ratio") else 4
    changes = changes | {"image_seq_length": per_tile}
    theirs = internvl(vision, text, tmp_path / "theirs", **changes)
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    pads = [ID] * per_tile
    tokens = [1, *pads, *pads, 7, 8, *pads, *pads, 9, 10, 11]
    tiles = pixels(4, 16)
    inputs = {
        "input_ids": torch.tensor([tokens]),
        "pixel_values": normalised(tiles, {"vision": MEANS}),
    }
    with torch.no_grad():
        expected = theirs(**inputs).logits
        found = ours(model, tmp_path / "ours")(batch_of(tokens, tiles), output="logits")
        swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
        assert (theirs(**swapped).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(found[..., : families.VOCABULARY], expected, atol=1e-4, rtol=0)

    saved = models.open_checkpoint(tmp_path / "ours")
    exporting.export(saved, tmp_path / "back", "internvl", max_shard_bytes=100_000)
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 1
    back = {name: value for file in files for name, value in load_file(file).items()}
    assert_equal(back, load_file(tmp_path / "theirs" / "model.safetensors"))
    loaded, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
    assert imported(tmp_path / "back", tmp_path / "again") == model


@pytest.mark.usefixtures("world")
def test_the_encoder_alone_comes_back(tmp_path: Path) -> None:
    import transformers

    config = transformers.InternVLVisionConfig(**VISIONS["6b"])
    theirs = transformers.InternVLVisionModel(config)
    oracle.randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    tiles = pixels(2, 16)
    with torch.no_grad():
        expected = theirs(normalised(tiles, {"vision": MEANS})).last_hidden_state[:, 1:]
        torch.testing.assert_close(
            ours(model, tmp_path / "ours")(tiles), expected, atol=1e-4, rtol=0
        )
    saved = models.open_checkpoint(tmp_path / "ours")
    exporting.export(saved, tmp_path / "back", "internvl_vision")
    assert_equal(*(load_file(tmp_path / x / "model.safetensors") for x in ("back", "theirs")))


MEANS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WORDS = ["user system assistant What is this? A cat, I think.\n" + "helpful answers are short"]
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an imported InternVL, as if a run had left it."""
    folder = tmp_path_factory.mktemp("internvl") / "theirs"
    internvl("300m", "qwen2", folder, image_token_id=5)
    train_byte_level_bpe(
        folder,
        WORDS,
        vocab_size=400,
        special_tokens=SPECIAL,
        eos_token="<|im_end|>",
        pad_token="<unk>",
    )
    imported(folder, folder.parent / "ours")
    return as_trained(folder.parent / "ours")


def processor_of(folder: Path) -> Any:
    """The folder's processor; its part of videos, which needs torchvision, is a stand-in."""
    from transformers import AutoImageProcessor, AutoTokenizer, InternVLProcessor

    class WithoutVideos(InternVLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = json.loads((folder / "processor_config.json").read_text())
    assert content.pop("processor_class") == InternVLProcessor.__name__
    return WithoutVideos(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer,
        None,
        chat_template=tokenizer.chat_template,
        **content,
    )


@pytest.mark.usefixtures("world")
def test_transformers_prepares_and_answers_as_we_do(talking: Path, tmp_path: Path) -> None:
    """A chat of two pictures: tokens, grids and thumbnails; of those that need no resizing every
    logit, of others every pixel to 2 levels of 255; and the answer."""
    import transformers

    saved = models.open_checkpoint(talking)
    exporting.export(saved, tmp_path / "back", "internvl")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "back").eval()
    processor = processor_of(tmp_path / "back")
    talk = conversation(saved, None)
    assert talk is not None
    build = instantiate(saved.state["config"]["data"]["train"]["build"], _convert_="all")
    build = build(tokenizer=talk.tokenizer, sequence_length=512)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    for sizes, tiles in (([(16, 16), (16, 16)], 2), ([(32, 16), (16, 48)], 7), ([(40, 23)] * 2, 0)):
        images = [picture(*size) for size in sizes]
        inputs = processor(text=text, images=images, return_tensors="pt")
        sample = build.prompt(plain_question("What is this?", [png(i) for i in images], "test"))
        assert inputs["input_ids"][0].tolist() == sample.text.tokens.tolist()
        found = normalised(sample.text.media[IMAGE].values, {"vision": MEANS})
        gap = (inputs["pixel_values"] - found).abs()
        assert len(gap) == (tiles or len(gap)) and gap.max() < 2.1 / 255 / 0.22
        assert gap.mean() < 0.5 / 255 / 0.22
        with torch.no_grad():
            expected = theirs(**inputs).logits
            logits = ours(saved.model, talking)(collate([sample], pad_id=0), output="logits")
        tolerance = 1e-4 if sizes[0] == (16, 16) else 0.1
        torch.testing.assert_close(
            logits[..., : families.VOCABULARY], expected, atol=tolerance, rtol=0
        )
    assert theirs.generation_config.eos_token_id == talk.tokenizer.end_of_turn_id
    # The answer, of nvmm.generate's own decoding, to a picture that is cut without resizing.
    image = picture(16, 16)
    inputs = processor(
        text=text.replace("<IMG_CONTEXT>\n", "", 1), images=[image], return_tensors="pt"
    )
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        answer = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[0, start:]
    restored = restore(talking)
    prompt = restored.builder.prompt(plain_question("What is this?", [png(image)], "test"))
    [tokens] = restored.generate_tokens([prompt], 6)
    assert len(tokens) > 1 and tokens == answer.tolist()[: len(tokens)]


def test_an_experiment_trains_for_the_format() -> None:
    """As docs/conversion.md says; the command's own weights and data alone are missing."""
    typed = ["experiment=nvlm_d/sft_7b", "model=internvl3_8b", "tokenizer=internvl"]
    typed += ["builder@data.train.build=internvl", "data.sequence_length=4096"]
    config = compose.composed("train", typed)
    missing = {problem.key for problem in check.check(config, entry="train", world_size=8)}
    assert missing == {"init_from", "tokenizer.path", "data.train.shards"}
    assert config.data.train.build.tags.image_start == internvl_format.IMAGE_START


def test_what_the_format_cannot_say_is_refused(talking: Path, tmp_path: Path) -> None:
    saved = models.open_checkpoint(talking)

    def state(**build: Any) -> models.SavedModel:
        content = json.loads(json.dumps(saved.state))
        content["config"]["data"]["train"]["build"] |= build
        return models.SavedModel(saved.path, content, saved.source)

    # A run's number of tiles counts more than that of the folder of its tokenizer.
    folder = Path(saved.state["config"]["tokenizer"]["path"])
    old = {"image_processor": {"max_patches": 12}, "image_seq_length": 9}
    (folder / "processor_config.json").write_text(json.dumps(old))
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_patches": 12}))
    exporting.export(state(max_tiles=3), tmp_path / "three", "internvl")
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    recipe = json.loads((tmp_path / "three" / "preprocessor_config.json").read_text())
    assert recipe["max_patches"] == 3 and recipe["crop_to_patches"]
    content = json.loads((tmp_path / "three" / "processor_config.json").read_text())
    assert content == {"processor_class": "InternVLProcessor", "image_seq_length": 4}

    tags = saved.state["config"]["data"]["train"]["build"]["tags"]
    for build, message in (
        ({"use_thumbnail": False}, "use_thumbnail=False must be True"),
        ({"pad": [0, 0, 0], "tile_size": 8}, r"pad=\[0, 0, 0\] must be None; .*tile_size=8 must"),
        ({"tags": tags | {"variant": "1d"}}, r"tags\.variant=1d must be none"),
        ({"tags": tags | {"image_start": "<Image>"}}, "start_image_token='<Image>' must be a tok"),
    ):
        with pytest.raises(ValueError, match=message):
            exporting.export(state(**build), tmp_path / "x", "internvl")
    with pytest.raises(ValueError, match="leaves out token 5"):
        exporting.export(saved, tmp_path / "x", "internvl", vocab_size=5)
    model = saved.model
    for part, key, value in (
        ("connector", "hidden_size", 128),
        ("connector", "layernorm_epsilon", 1e-6),
        ("connector", "bias", False),
        ("vision", "layer_scale", None),
        ("vision", "post_layernorm", True),
    ):
        changed = {**model, part: {**model[part], key: value}}
        with pytest.raises(ValueError, match=f"cannot express.*{key}|(?s:{key})"):
            internvl_format.from_model(changed)
    hf = {"model_type": "internvl", "text_config": {"model_type": "qwen2"}}
    for change, message in (
        ({"vision_feature_layer": -2}, "vision_feature_layer=-2"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy='full'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio=0.3"),
        ({"text_config": {"model_type": "gpt_oss"}}, "model_type='gpt_oss'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type='clip_vision_model'"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling=False"),
    ):
        with pytest.raises(ValueError, match=message):
            internvl_format.to_model(hf | change)
    with pytest.raises(ValueError, match="model_type='llava_onevision' has no table"):
        detect({"model_type": "llava_onevision"}, tmp_path)
    with pytest.raises(ValueError, match=r"image_size=\[8, 16\].* must be square"):
        internvl_vision.to_model({"image_size": [8, 16]})
