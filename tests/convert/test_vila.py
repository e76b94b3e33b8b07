"""LLaVA, VILA 1.0 and VILA 1.5: folders -> ours -> folders, and Transformers' logits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nvmm.batch import IMAGE, Batch, Sample, Text, TextMedia
from nvmm.checkpoint.load import load_weights
from nvmm.convert import exporting, models
from nvmm.convert.chat_template import conversation
from nvmm.convert.formats import llava as llava_format
from nvmm.convert.formats import towers, vila_projector
from nvmm.convert.formats import vila as vila_format
from nvmm.data.collate import collate
from nvmm.data.samples.record import plain_question
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.parallel.setup import Parallel, Precision
from tests import oracle
from tests.convert import families
from tests.convert.test_families import as_trained, assert_equal, imported

ID = families.VOCABULARY - 1
"""The placeholder's id."""
LLAMA = families._SHAPE | {"model_type": "llama", "num_key_value_heads": 6, "rms_norm_eps": 1e-5}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": families._ENCODER | {"model_type": "clip_vision_model"},
    # 384 / 14 in small: 14 pixels are 3 patches of 4 and 2 pixels that are dropped.
    "siglip": families._ENCODER | {"model_type": "siglip_vision_model", "image_size": 14},
}
TOWERS["siglip"]["vision_use_head"] = False


def llava(tower: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny LLaVA of Transformers' class; returns it."""
    import transformers

    strategy = "default" if tower == "clip" else "full"
    options = {"image_token_index": ID, "vision_feature_select_strategy": strategy, **changes}
    config = transformers.LlavaConfig(vision_config=TOWERS[tower], text_config=LLAMA, **options)
    model = transformers.LlavaForConditionalGeneration(config)
    oracle.randomize(model, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def pixels(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch_of(tokens: list[int], tiles: Tensor) -> Batch:
    """A row with one tile at each run of placeholders."""
    per_tile = tokens.count(ID) // len(tiles)
    places = [i for i, token in enumerate(tokens) if token == ID][::per_tile]
    media = TextMedia(
        values=tiles,
        positions=torch.tensor(places),
        items=torch.arange(len(tiles)),
        tiles=torch.zeros(len(tiles), dtype=torch.int64),
        placeholder_id=ID,
        tokens_per_item=per_tile,
    )
    text = Text(torch.tensor(tokens), torch.ones(len(tokens)), {IMAGE: media})
    return collate([Sample((text,))], pad_id=0)


def ours(model: dict[str, Any], path: Path) -> Any:
    [chunk] = [
        instantiate(model, _convert_="all")(chunk=c).eval() for c in Parallel().chunks(Precision())
    ]
    assert load_weights(path, [chunk]) == []
    return chunk


def normalised(tiles: Tensor, model: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(model["vision"][f"image_{k}"]).view(3, 1, 1) for k in ("mean", "std"))
    return (tiles / 255 - mean) / std


def interleaved(tokens_per_tile: int) -> list[int]:
    pads = [ID] * tokens_per_tile
    return [1, *pads, 7, 8, *pads, 9, 10, 11]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("tower", "per_tile"), [("clip", 16), ("siglip", 9)])
def test_llava_s_logits_are_ours_both_ways(tower: str, per_tile: int, tmp_path: Path) -> None:
    """Two images in a text; the export is loaded by Transformers, and generates as the original."""
    import transformers

    theirs = llava(tower, tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    assert model["vision"]["transformer"]["num_layers"] == 2
    tokens = interleaved(per_tile)
    tiles = pixels(2, model["vision"]["image_size"])
    inputs = {"input_ids": torch.tensor([tokens]), "pixel_values": normalised(tiles, model)}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        found = ours(model, tmp_path / "ours")(batch_of(tokens, tiles), output="logits")
    assert (
        expected[0, -1] - theirs(input_ids=torch.tensor([tokens[-3:]])).logits[0, -1]
    ).abs().max() > 1e-2
    torch.testing.assert_close(found[..., : families.VOCABULARY], expected, atol=1e-4, rtol=0)

    exporting.export(models.open_checkpoint(tmp_path / "ours"), tmp_path / "back", "llava")
    back = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**inputs).logits, expected, atol=1e-6, rtol=0)
        answers = [
            m.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
            for m in (theirs, back)
        ]
    assert torch.equal(*answers)
    # Every tensor that ours has comes back bit-equal, and a second way changes nothing.
    original = load_file(tmp_path / "theirs" / "model.safetensors")
    renamed = {
        name.replace("vision_tower.vision_model.", "vision_tower."): value
        for name, value in load_file(tmp_path / "back" / "model.safetensors").items()
    }
    made = {name for name in renamed if "post_layernorm" in name}
    assert {n for n in original if "encoder.layers.2." not in n} == set(renamed)
    assert_equal(*({n: t[n] for n in renamed if n not in made} for t in (renamed, original)))
    imported(tmp_path / "back", tmp_path / "again")
    exporting.export(models.open_checkpoint(tmp_path / "again"), tmp_path / "third", "llava")
    assert_equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("back", "third")))


# -- their own folders: VILA 1.0 (one), VILA 1.5 (three) ---------------------------------------


def projector(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights by the names of their Sequential."""
    shapes = {
        "linear": {"weight": (60, 60), "bias": (60,)},
        "mlp2x_gelu": {f"{n}.{k}": s for n in (0, 2) for k, s in _LINEAR.items()},
        "mlp_downsample": {
            **{f"1.{k}": (240,) for k in _LINEAR},
            "2.weight": (60, 240),
            "2.bias": (60,),
            **{f"4.{k}": s for k, s in _LINEAR.items()},
        },
    }
    shapes["mlp_downsample_2x2_fix"] = shapes["mlp_downsample"]
    return {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes[kind].items()}


_LINEAR = {"weight": (60, 60), "bias": (60,)}


def projected(kind: str, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """What base_projector.py computes, written token by token."""
    if not kind.startswith("mlp_downsample"):
        if kind == "linear":
            return F.linear(features, weights["weight"], weights["bias"])
        x = F.gelu(F.linear(features, weights["0.weight"], weights["0.bias"]))
        return F.linear(x, weights["2.weight"], weights["2.bias"])
    side = round(features.shape[1] ** 0.5)
    half = (side + 1) // 2
    zero = features.new_zeros(features.shape[0], features.shape[2])

    def at(row: int, column: int) -> Tensor:
        return features[:, row * side + column] if row < side and column < side else zero

    places = [(row, column) for row in range(half) for column in range(half)]
    if kind == "mlp_downsample":
        places = [(row, column) for column, row in places]
    blocks = [
        torch.cat(
            [
                at(2 * r, 2 * c),
                at(2 * r, 2 * c + 1),
                at(2 * r + 1, 2 * c),
                at(2 * r + 1, 2 * c + 1),
            ],
            -1,
        )
        for r, c in places
    ]
    x = F.layer_norm(torch.stack(blocks, 1), (240,), weights["1.weight"], weights["1.bias"])
    x = F.gelu(F.linear(x, weights["2.weight"], weights["2.bias"]))
    return F.linear(x, weights["4.weight"], weights["4.bias"])


class Reference:
    """Transformers' tower and Llama, with a projector between them as their code has it."""

    def __init__(self, tower: str, kind: str) -> None:
        import transformers

        classes = {"clip": "CLIP", "siglip": "Siglip"}[tower]
        config = getattr(transformers, f"{classes}VisionConfig")(**TOWERS[tower])
        self.tower = getattr(transformers, f"{classes}VisionModel")(config)
        self.llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        for model in (self.tower, self.llm):
            oracle.randomize(model, std=0.1)
            model.eval()
        self.kind, self.weights = kind, projector(kind, torch.Generator().manual_seed(5))

    def logits(self, tokens: list[int], images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.tower(images, output_hidden_states=True).hidden_states[-2]
            if hasattr(self.tower, "embeddings") and hasattr(
                self.tower.embeddings, "class_embedding"
            ):
                features = features[:, 1:]
            rows = projected(self.kind, self.weights, features).flatten(0, 1)
            ids = torch.tensor([tokens])
            hidden = self.llm.get_input_embeddings()(ids)
            hidden[ids == ID] = rows
            return self.llm(inputs_embeds=hidden).logits


def names_of(tower: Any, prefix: str) -> dict[str, Tensor]:
    """The tower's weights in the names of Transformers before version 5, as in their folders."""
    state = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    return {f"{prefix}vision_model.{k}": v for k, v in state.items() if "position_ids" not in k}


def vila(reference: Reference, tower: str, folder: Path) -> Path:
    tensors = dict(reference.llm.state_dict())
    tensors |= {f"model.mm_projector.{k}": v for k, v in reference.weights.items()}
    tensors |= names_of(reference.tower, "model.vision_tower.vision_tower.")
    config = LLAMA | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "somebody/tiny",
        "mm_projector_type": reference.kind,
        "mm_hidden_size": 60,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch" if tower == "clip" else "cls_patch",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 4096,
        "vision_config": TOWERS[tower],
    }
    return families.save(folder, config, tensors)


def vila15(reference: Reference, tower: str, folder: Path) -> Path:
    projector = {f"layers.{k}": v for k, v in reference.weights.items()}
    kind = {"model_type": "v2l_projector", "mm_projector_type": reference.kind}
    parts = {
        "llm": (LLAMA | {"model_max_length": 4096}, dict(reference.llm.state_dict())),
        "vision_tower": (TOWERS[tower], names_of(reference.tower, "")),
        "mm_projector": (kind, projector),
    }
    for name, (config, tensors) in parts.items():
        families.save(folder / name, config, tensors)
    top = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": "./llm",
        "vision_tower_cfg": "./vision_tower",
        "mm_projector_cfg": "./mm_projector",
        "mm_hidden_size": 60,
        "hidden_size": 60,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch" if tower == "siglip" else "patch",
        "image_aspect_ratio": "resize",
        "s2": False,
    }
    (folder / "config.json").write_text(json.dumps(top))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    parts = [folder] if (folder / "model.safetensors").is_file() else sorted(folder.glob("*/"))
    return {
        f"{part.name if part != folder else ''}/{name}": value
        for part in parts
        for name, value in load_file(part / "model.safetensors").items()
    }


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("write", "tower", "kind", "per_tile"),
    [
        (vila, "clip", "linear", 16),
        (vila, "clip", "mlp2x_gelu", 16),
        (vila15, "siglip", "mlp_downsample", 4),
        (vila15, "siglip", "mlp_downsample_2x2_fix", 4),
        (vila15, "clip", "mlp2x_gelu", 16),
    ],
)
def test_vila_s_folders_compute_what_their_code_does(
    write: Any, tower: str, kind: str, per_tile: int, tmp_path: Path
) -> None:
    reference = Reference(tower, kind)
    write(reference, tower, tmp_path / "theirs")
    model = imported(tmp_path / "theirs", tmp_path / "ours")
    tokens, tiles = interleaved(per_tile), pixels(2, model["vision"]["image_size"])
    expected = reference.logits(tokens, normalised(tiles, model))
    with torch.no_grad():
        found = ours(model, tmp_path / "ours")(batch_of(tokens, tiles), output="logits")
    torch.testing.assert_close(found[..., : families.VOCABULARY], expected, atol=1e-4, rtol=0)
    # Back: what ours has is bit-equal, and the folder is read as the same model.
    name = write.__name__
    exporting.export(models.open_checkpoint(tmp_path / "ours"), tmp_path / "back", name)
    original, back = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert {n for n in original if "encoder.layers.2." not in n} == set(back)
    kept = [n for n in back if "post_layernorm" not in n]
    assert_equal({n: back[n] for n in kept}, {n: original[n] for n in kept})
    assert imported(tmp_path / "back", tmp_path / "again") == model
    exporting.export(models.open_checkpoint(tmp_path / "again"), tmp_path / "third", name)
    assert_equal(tensors_of(tmp_path / "third"), back)


# -- the files beside the weights --------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an imported LLaVA whose tokenizer has `<image>`, as if a run had left it."""
    folder = tmp_path_factory.mktemp("llava") / "theirs"
    llava("clip", folder, image_token_index=3)
    train_byte_level_bpe(
        folder,
        ["USER: What is it? ASSISTANT: A cat, I think. assistant gives helpful answers"],
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    imported(folder, folder.parent / "ours")
    return as_trained(folder.parent / "ours")


def picture(width: int, height: int) -> Image.Image:
    """Something smooth, as a photograph is."""
    values = np.random.default_rng(width).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.usefixtures("world")
def test_transformers_prepares_what_we_do(talking: Path, tmp_path: Path) -> None:
    """Tokens of a chat of two images and, of images that need no resizing, every logit; of others
    every pixel to 2 levels of 255, padding included."""
    import transformers

    saved = models.open_checkpoint(talking)
    exporting.export(saved, tmp_path / "back", "llava")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    talk = conversation(saved, None)
    assert talk is not None
    build = instantiate(saved.state["config"]["data"]["train"]["build"], _convert_="all")
    build = build(tokenizer=talk.tokenizer, sequence_length=512)
    image = {"type": "image"}
    content = [
        image,
        {"type": "text", "text": " is a cat. "},
        image,
        {"type": "text", "text": " Is it?"},
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pixels = []
    for sizes in (((16, 16), (16, 16)), ((40, 23), (9, 31))):
        images = [picture(*size) for size in sizes]
        inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
        members = plain_question(
            "<image> is a cat. <image> Is it?", [png(i) for i in images], "test"
        )
        sample = build.prompt(members)
        assert inputs["input_ids"][0].tolist() == sample.text.tokens.tolist()
        media = sample.text.media[IMAGE]
        pixels.append((inputs["pixel_values"], normalised(media.values, saved.model)))
        if sizes[0] == (16, 16):
            with torch.no_grad():
                expected = theirs(**inputs).logits
                found = ours(saved.model, talking)(collate([sample], pad_id=0), output="logits")
            torch.testing.assert_close(
                found[..., : families.VOCABULARY], expected, atol=1e-4, rtol=0
            )
    torch.testing.assert_close(*pixels[0], atol=1e-5, rtol=0)
    gap = (pixels[1][0] - pixels[1][1]).abs()
    assert gap.max() < 2.1 / 255 / 0.26 and gap.mean() < 0.5 / 255 / 0.26
    # The margins are of the mean colour: all but black.
    assert pixels[1][1][0, :, 0].abs().max() < 1 / 255 / 0.26


@pytest.mark.usefixtures("world")
def test_what_a_format_cannot_say_is_refused(talking: Path, tmp_path: Path) -> None:
    saved = models.open_checkpoint(talking)
    with pytest.raises(ValueError, match="leaves out token 3"):
        exporting.export(saved, tmp_path / "x", "llava", vocab_size=3)
    state = json.loads(json.dumps(saved.state))
    state["config"]["data"]["train"]["build"]["pad"] = [0, 0, 0]
    other = models.SavedModel(saved.path, state, saved.source)
    with pytest.raises(ValueError, match=r"pads with the mean colour \[122, 116, 104\] alone"):
        exporting.export(other, tmp_path / "x", "llava")
    with pytest.raises(ValueError, match="mm_vision_tower='a/b' is not known here"):
        vila_format.to_model({**LLAMA, "model_type": "llava_llama", "mm_vision_tower": "a/b"})
    with pytest.raises(ValueError, match="mm_projector_type='mlp3x_gelu' is not supported"):
        vila_projector.to_model("mlp3x_gelu", 60)
    with pytest.raises(ValueError, match="its tower is a/b, a folder of its own"):
        vila_format.complete({"mm_vision_tower": "a/b"}, {})
    model = saved.model
    with pytest.raises(ValueError, match=r"model\.vision\.image_mean"):
        towers.from_model({**model["vision"], "image_mean": [0, 0, 0]})
    shuffled = {**model["connector"], "downsample": 2, "token_order": "rows"}
    with pytest.raises(ValueError, match="--format llava cannot express this model"):
        llava_format.from_model({**model, "connector": shuffled})
