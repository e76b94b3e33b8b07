"""A multimodal embedder's checkpoint -> a folder, and back; folders that compose one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvmm.commands.convert import main
from nvmm.convert import embedders, exporting, importing, models
from nvmm.convert.formats import clip, mm_embed
from nvmm.convert.formats.processing_mm_embed import Masking, MMEmbedProcessor, _upright
from nvmm.convert.sources import read
from nvmm.data.samples import retrieval
from nvmm.data.samples.images import decode_image
from nvmm.inference.embedding import TextAndImage
from tests import tiny
from tests.convert import families
from tests.convert.test_nv_embed import INSTRUCTION, TEXTS, config_of, save
from tests.convert.test_nv_embed import tokenizer as tokenizer
from tests.ranks import run_ranks

PREFIX = f"Instruct: {INSTRUCTION}\nQuery: "
TOWER = {"model_type": "clip_vision_model", **families._ENCODER}


def model_of(**changes: Any) -> dict[str, Any]:
    """MM-Embed in small: 16 tokens a picture of 16 pixels."""
    language = config_of(Path("none"))["model"] | changes
    return {
        "_target_": "nvmm.models.multimodal.MultimodalModel",
        "_partial_": True,
        "language": language,
        "vision": clip.to_model(TOWER),
        "connector": {
            "_target_": "nvmm.modules.connector.MLPConnector",
            "_partial_": True,
            "downsample": 1,
            "hidden_size": 64,
            "layernorm": False,
            "bias": True,
            "init_method_std": 0.2,
        },
    }


def multimodal_config(folder: Path, **build: Any) -> dict[str, Any]:
    config = config_of(folder) | {"model": model_of()}
    picture = "<|vision_pad|>"  # Its id lies outside the vocabulary.
    config["tokenizer"] |= {"image_token": picture, "extra_tokens": [picture]}
    config["data"]["train"]["build"] |= {
        "masking": "mm_embed",
        "tokens_per_tile": 16,
        "tile_size": 16,
        "max_tiles": 1,
        **build,
    }
    return config


def pictures(folder: Path) -> list[Path]:
    """Pictures of all kinds that are decoded, none of them square, all noise."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (23, 31, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(folder / "rgb.png")
    Image.fromarray(noise).save(folder / "clear.png")
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise[..., :3]).quantize(20).save(folder / "palette.png")
    Image.fromarray(noise[..., :3]).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(noise[..., 0].astype(np.uint16) << 8).save(folder / "deep.png")
    return sorted(folder.glob("*.*"))


def items_of(files: list[Path]) -> list[Any]:
    both = [TextAndImage(TEXTS[n % 3], file) for n, file in enumerate(files)]
    return [*TEXTS, *(TextAndImage("", file) for file in files), *both]


def foreign(item: Any) -> Any:
    """An item as the exported folder takes it."""
    if isinstance(item, str):
        return item
    image = Image.open(item.image)
    return {"text": item.text, "image": image} if item.text else image


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder of a checkpoint that two tensor-parallel ranks wrote, items, and our vectors."""
    to = tmp_path_factory.mktemp("run")
    (to / "images").mkdir()
    items = items_of(pictures(to / "images"))
    layout, config = {"tensor_model_parallel_size": 2}, multimodal_config(tokenizer)
    [vectors, _] = run_ranks(save, 2, layout, config, to, items)
    exporting.export(models.open_checkpoint(to), to / "hf", "mm_embed")
    return to / "hf", items, vectors


def test_transformers_gives_our_vectors(exported: tuple[Path, Any, Any]) -> None:
    import transformers

    folder, items, expected = exported
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for instruction, ours in zip((INSTRUCTION, None), expected, strict=True):
        inputs = processor([foreign(item) for item in items], instruction=instruction)
        with torch.no_grad():
            found = model(**inputs).pooler_output
            torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
            alone = model(**processor("the bird", instruction=instruction)).pooler_output
        torch.testing.assert_close(alone[0], ours[1], rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).norm(dim=1).min() > 1e-2, "an instruction changes a vector"
    assert (ours[3] - ours[5]).norm() > 1e-2, "a picture changes a vector"


def test_the_processor_has_the_maskings_of_training_and_no_other() -> None:
    assert get_args(Masking) == get_args(retrieval.Masking)
    with pytest.raises(ValueError, match="masking=foo must be one of sentence_transformers, nv_e"):
        MMEmbedProcessor(masking="foo")  # type: ignore[arg-type]


@pytest.mark.slow
def test_sentence_transformers_gives_our_vectors(
    exported: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    """Texts, pictures, both, and all of them in one batch; pictures by their path too."""
    from sentence_transformers import SentenceTransformer

    folder, items, expected = exported
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    given = [foreign(item) for item in items]
    assert model.supports("image") and model.supports(("image", "text"))
    assert model.get_embedding_dimension() == 64 and model.max_seq_length == 64
    for name, ours in zip(("query", "document"), expected, strict=True):
        for part in (slice(0, 3), slice(3, 9), slice(9, 15), slice(0, 15)):
            found = model.encode(
                given[part], prompt_name=name, batch_size=4, convert_to_tensor=True
            )
            torch.testing.assert_close(found, ours[part], rtol=0, atol=1e-5)
    [ours] = model.encode([str(items[3].image)], convert_to_tensor=True)
    torch.testing.assert_close(ours, expected[1][3], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a prompt must be 'Instruct: '"):
        model.encode(["a"], prompt="query: ")
    # What sentence-transformers saves, after training say, is such a folder again.
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    found = again.encode(given, prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)


def test_a_picture_has_the_pixels_of_training(tmp_path: Path) -> None:
    for file in pictures(tmp_path):
        ours = decode_image(file.read_bytes(), source=file.name)
        assert np.array_equal(np.array(_upright(Image.open(file))), np.array(ours)), file.name


def test_bad_inputs_are_refused_by_name(exported: tuple[Path, Any, Any]) -> None:
    import transformers

    folder, items, _ = exported
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = foreign(items[3])
    for item, message in (
        ({"text": "a", "video": 1}, "must be a text, a PIL image or a dict of text and image"),
        ({"text": ["a"]}, "must be a text, a PIL image or a dict"),
        (3, "got int"),
        ("a <|vision_pad|>", r"has <\|vision_pad\|>, which stands for a picture"),
        (picture.convert("F"), "mode F has no defined range"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(item)
    with pytest.raises(ValueError, match=r"16 tokens behind 1 .* max_length=17"):
        processor(picture, max_length=17)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    inputs = processor([picture, picture])
    with pytest.raises(ValueError, match="32 places of pictures in input_ids, 16 features"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})


def test_the_folder_comes_back_bit_equal(exported: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """With its data, so that the import embeds at once and is exported to the same files."""
    folder = exported[0]
    assert main(["import", "--from", str(folder), "--to", str(tmp_path / "ours")]) == 0
    assert main(["verify", "--a", str(folder), "--b", str(tmp_path / "ours")]) == 0
    saved = models.open_checkpoint(tmp_path / "ours")
    assert saved.model["language"]["pooling"]["num_latents"] == 6
    assert saved.state["config"]["data"]["sequence_length"] == 64
    exporting.export(saved, tmp_path / "hf", "mm_embed")
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "README.md":
            there = tmp_path / "hf" / file.relative_to(folder)
            if file.suffix == ".json":
                assert json.loads(there.read_text()) == json.loads(file.read_text()), file.name
            else:
                assert there.read_bytes() == file.read_bytes(), file.name
    for file in folder.glob("*.py"):
        lines = file.read_text().splitlines()
        assert not any(line.startswith(("import nvmm", "from nvmm")) for line in lines), file.name
    names = load_file(folder / "model.safetensors").keys()
    for start in ("vision_tower.vision_model.", "multi_modal_projector.linear_1."):
        assert any(name.startswith(start) for name in names)
    assert "language_model.embed_tokens.weight" in names and "lm_head.weight" not in names


def embed(
    rank: int, world: int, init: str, checkpoint: Path, layout: dict[str, int], items: list[Any]
) -> list[Tensor]:
    """The vectors of a checkpoint, as the commands restore it."""
    import torch.distributed as dist

    from nvmm.inference.restore import restore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    encoder = restore(checkpoint, parallel=layout).encoder(batch_size=4)
    return [encoder(items, INSTRUCTION), encoder(items)]


def test_an_import_embeds_at_once(exported: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """With the sample builder that its folder describes, at a layout of its own."""
    folder, items, expected = exported
    assert main(["import", "--from", str(folder), "--to", str(tmp_path / "ours")]) == 0
    layout = {"pipeline_model_parallel_size": 2}
    for vectors in run_ranks(embed, 2, tmp_path / "ours", layout, items):
        for a, b in zip(vectors, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def released(folder: Path, to: Path, **changes: Any) -> dict[str, Tensor]:
    """An export as the release is laid out: all layers of CLIP, and LLaVA-NeXT's config.json."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.py", "modules.json"))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    last = "vision_tower.vision_model.encoder.layers.2."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[name.replace("layers.2.", "layers.3.")] = tensors[name] * 2
    tensors["image_newline"] = torch.ones(64)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    text = config["text_config"] | {"rope_theta": 1e6, "vocab_size": 364}
    llava = {
        "model_type": "llava_next",
        "architectures": ["NVMMEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvmmembed.NVMMEmbedModel"},
        "retriever": "nvidia/NV-Embed-v1",
        "global_image_patch_only": True,
        "add_eos_token": True,
        "padding_side": "right",
        "image_token_index": 300,
        "image_grid_pinpoints": [[336, 672]],
        "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": config["vision_config"] | {"num_hidden_layers": 4},
        # The release has the code's own: 8 heads.
        "latent_attention_config": {"num_cross_heads": 4},
    }
    (to / "config.json").write_text(json.dumps(llava | changes))
    return tensors


def test_the_released_layout_is_read(
    exported: tuple[Path, Any, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """RoPE is the retriever's, the vocabulary the embedding's; what is left out is listed."""
    tensors = released(exported[0], tmp_path / "theirs")
    ours = tmp_path / "ours"
    assert main(["import", "--from", str(tmp_path / "theirs"), "--to", str(ours)]) == 0
    saved = models.open_checkpoint(ours)
    language, vision = saved.model["language"], saved.model["vision"]
    assert language["rotary_base"] == 10_000 and language["vocab_size"] == 300
    assert language["pooling"]["head_dim"] == 24 and language["pooling"]["num_heads"] == 4
    assert vision["transformer"]["num_layers"] == 3
    assert "text_config's (1000000.0) is not the model's" in caplog.text
    assert "image_newline is not used" in caplog.text
    out = capsys.readouterr().out
    assert "left out: image_newline" in out
    assert "left out: vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight" in out
    head = read(saved.source, "language.pooling.latents")
    assert torch.equal(head, tensors["latent_attention_model.latents"])
    # Its vectors are those of the model that it was made of.
    exporting.export(saved, tmp_path / "hf", "mm_embed")
    back, before = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", exported[0]))
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in back)


def test_a_released_folder_is_refused_by_what_is_not_known(
    exported: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    released(exported[0], tmp_path / "a", retriever="mine")
    with pytest.raises(ValueError, match=r"retriever='mine' .* add retriever_rope_theta"):
        models.open_folder(tmp_path / "a")
    released(exported[0], tmp_path / "b", retriever="mine", retriever_rope_theta=500.0)
    model = models.open_folder(tmp_path / "b").model()
    assert model["language"]["rotary_base"] == 500
    released(exported[0], tmp_path / "c", global_image_patch_only=False)
    with pytest.raises(ValueError, match="global_image_patch_only=False is not supported"):
        models.open_folder(tmp_path / "c").model()
    released(exported[0], tmp_path / "d", tomorrow=1)
    with pytest.raises(ValueError, match="tomorrow=1 would not be read"):
        models.open_folder(tmp_path / "d").model()


@pytest.mark.usefixtures("world")
def test_folders_compose_a_model(
    exported: tuple[Path, Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CLIP without its last layer, LLaVA's projector, and a text embedder's decoder and pooling."""
    families.tower("clip_whole", tmp_path / "clip")
    families.llava_next(tmp_path / "llava")
    embedder = exporting.export
    run = exported[0].parent
    embedder(models.open_checkpoint(run), tmp_path / "text", "nv_embed", part="language")
    sources = [f"vision={tmp_path / 'clip'}", f"connector={tmp_path / 'llava'}"]
    sources += [f"language={tmp_path / 'text'}"]
    given = [argument for source in sources for argument in ("--from", source)]
    assert main(["import", *given, "--to", str(tmp_path / "bad")]) == 2
    assert "connector.linear_fc2" in capsys.readouterr().err, "LLaVA's decoder has another width"

    tensors = load_file(tmp_path / "llava" / "model.safetensors")
    shape = {"1.weight": (64, 60), "1.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    for name, size in shape.items():
        tensors[f"multi_modal_projector.linear_{name}"] = torch.randn(size)
    save_file(tensors, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    assert main(["import", *given, "--to", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "initialised" not in out and "left out: text_projection.weight" in out
    saved = models.open_checkpoint(tmp_path / "ours")
    assert saved.model["vision"]["transformer"]["num_layers"] == 2
    build = saved.state["config"]["data"]["train"]["build"]
    assert (build["masking"], build["tokens_per_tile"], build["tile_size"]) == ("mm_embed", 16, 16)
    there = read(saved.source, "connector.linear_fc1.weight")
    assert torch.equal(there, tensors["multi_modal_projector.linear_1.weight"])
    latents = load_file(exported[0] / "model.safetensors")["latent_attention_model.latents"]
    assert torch.equal(read(saved.source, "language.pooling.latents"), latents)
    exporting.export(saved, tmp_path / "hf", "mm_embed")
    # A given model says the same, with a layer less than the folder or with all.
    folders = {"vision": models.open_folder(tmp_path / "clip")}
    for layers in (2, 3):
        model = saved.model | {
            "vision": saved.model["vision"]
            | {"transformer": saved.model["vision"]["transformer"] | {"num_layers": layers}}
        }
        importing.check_given(importing.opened(folders, model), model)
    with pytest.raises(ValueError, match="gives no projector"):
        importing.opened({"connector": folders["vision"]}, None)


def test_what_the_format_cannot_express_is_named(tokenizer: Path) -> None:
    model = model_of()
    assert mm_embed.to_model(mm_embed.from_model(model))["vision"]["image_size"] == 16
    vision = model["vision"]
    for change, message in (
        ({"language": tiny.language()}, "needs a model of vision, connector and an embedder"),
        ({"connector": model["connector"] | {"layernorm": True}}, r"layernorm=True in this model"),
        ({"connector": model["connector"] | {"downsample": 2}}, r"downsample=2 in this model"),
        ({"connector": model["connector"] | {"hidden_size": None}}, "hidden_size=None"),
        ({"encoders": {"sound": {}}}, "cannot express model.encoders"),
        ({"vision": vision | {"image_mean": [0, 0, 0]}}, "image_mean"),
        ({"vision": tiny.multimodal()["vision"]}, "cannot express"),
        ({"language": model_of(**tiny.embedder("EOS"))["language"]}, "EOS"),
    ):
        with pytest.raises(ValueError, match=message):
            mm_embed.from_model(model | change)
    for key, value in (("max_tiles", 4), ("tile_size", 32), ("tokens_per_tile", 4)):
        config = multimodal_config(tokenizer, **{key: value})
        with pytest.raises(ValueError, match=f"build.{key}={value}; it can"):
            embedders.check(config, "mm_embed", config["model"])
