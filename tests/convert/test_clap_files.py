"""The files of LAION-CLAP and Microsoft's CLAP: features of Transformers' encoder, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from nvmm.convert import models
from nvmm.convert.clap_files import ClapFile
from tests.convert import families
from tests.convert.test_clap import expected, ours
from tests.convert.test_families import exported, imported
from tools.convert import main

PREFIXES = {
    "laion": "module.audio_branch.",
    "clapcap": "clap.base.htsat.",
    "clap 2023": "audio_encoder.base.htsat.",
}


def encoder_of(reference: Any) -> dict[str, Tensor]:
    """HTS-AT's own names and tensors of Transformers' encoder, with its buffers and front end."""
    state = getattr(reference, "audio_model", reference).audio_encoder.state_dict()
    out: dict[str, Tensor] = {}
    for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        out[f"bn0.{part}"] = state[f"batch_norm.{part}"]
    for part in ("weight", "bias"):
        for name in ("patch_embed.proj", "patch_embed.norm", "norm"):
            out[f"{name}.{part}"] = state[f"{name}.{part}"]
        out[f"head.{part}"] = torch.ones(3)
    for stage, depth in enumerate(families.CLAP["depths"]):
        for block in range(depth):
            here = there = f"layers.{stage}.blocks.{block}."
            table = "relative_position_bias_table"
            out[f"{here}attn.{table}"] = state[f"{there}attention.self.{table}"]
            out[f"{here}attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
            if block % 2 and stage == 0:
                out[f"{here}attn_mask"] = torch.zeros(16, 16, 16)
            for part in ("weight", "bias"):
                qkv = [
                    state[f"{there}attention.self.{x}.{part}"] for x in ("query", "key", "value")
                ]
                out[f"{here}attn.qkv.{part}"] = torch.cat(qkv)
                out[f"{here}attn.proj.{part}"] = state[f"{there}attention.output.dense.{part}"]
                out[f"{here}norm1.{part}"] = state[f"{there}layernorm_before.{part}"]
                out[f"{here}norm2.{part}"] = state[f"{there}layernorm_after.{part}"]
                out[f"{here}mlp.fc1.{part}"] = state[f"{there}intermediate.dense.{part}"]
                out[f"{here}mlp.fc2.{part}"] = state[f"{there}output.dense.{part}"]
    for part in ("weight", "bias"):
        out[f"layers.0.downsample.norm.{part}"] = state[f"layers.0.downsample.norm.{part}"]
    reduction = "layers.0.downsample.reduction.weight"
    out[reduction] = state[reduction]
    out["spectrogram_extractor.stft.conv_real.weight"] = torch.ones(2)
    out["logmel_extractor.melW"] = torch.ones(2)
    out["tscam_conv.weight"] = torch.ones(2)
    return out


def write(path: Path, kind: str, reference: Any, **more: Any) -> dict[str, Tensor]:
    """Write a file of a kind in PREFIXES; return its projection's tensors."""
    prefix = PREFIXES[kind]
    state = {prefix + name: tensor for name, tensor in encoder_of(reference).items()}
    if kind == "laion":
        start, container = "module.audio_projection.", "state_dict"
        theirs = reference.audio_projection.state_dict()
        names = {"linear1": "0", "linear2": "2"}
        projection = {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in theirs.items()}
        state["module.text_branch.pooler.dense.weight"] = torch.ones(2)
        state["module.audio_transform.sequential.0.weight"] = torch.ones(2)
        more["metric"] = numpy.float64(0.5)
    else:
        start, container = prefix.removesuffix("base.htsat.") + "projection.", "model"
        generator = torch.Generator().manual_seed(4)
        sizes = {"linear1.weight": (12, 16), "linear2.weight": (12, 12), "layer_norm.weight": (12,)}
        sizes["layer_norm.bias"] = (12,)
        projection = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
        state["caption_encoder.base.wte.weight"] = torch.ones(2)
        state["logit_scale"] = torch.ones(())
    state |= {start + name: tensor for name, tensor in projection.items()}
    torch.save({"epoch": 3, container: state} | more, path)
    return projection


def clapcap(pooled: Tensor, projection: dict[str, Tensor]) -> Tensor:
    """Microsoft's projection, as msclap has it in evaluation."""
    first = pooled @ projection["linear1.weight"].T
    second = torch.nn.functional.gelu(first) @ projection["linear2.weight"].T
    norm = projection["layer_norm.weight"], projection["layer_norm.bias"]
    return torch.nn.functional.layer_norm(first + second, (12,), *norm)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", PREFIXES)
def test_a_file_gives_the_features_of_its_tensors(kind: str, tmp_path: Path) -> None:
    name = "projected" if kind == "laion" else "alone"
    reference = families.clap(name, tmp_path / "theirs")
    projection = write(tmp_path / "file.pt", kind, reference)
    model = imported(tmp_path / "file.pt", tmp_path / "ours")
    assert model["projection"] == ("laion" if kind == "laion" else "clapcap")
    assert (model["picture"], model["num_heads"], model["depths"]) == (64, [2, 4], [2, 3])
    wanted = expected(reference, 256)
    if kind != "laion":
        wanted = clapcap(wanted, projection)
    torch.testing.assert_close(ours(tmp_path / "ours", 256), wanted, atol=1e-4, rtol=1e-4)
    dropped = models.open_checkpoint(tmp_path / "ours").state["dropped"]
    other = "text_branch" if kind == "laion" else "caption_encoder"
    assert any(n.startswith(other) for n in dropped)
    assert any(n.endswith("logmel_extractor.melW") for n in dropped)
    # LAION's comes out as Transformers' folder, ClapCap's projection has no place in one.
    if kind == "laion":
        exported(tmp_path / "ours", tmp_path / "back", "clap")
        again = type(reference).from_pretrained(tmp_path / "back")
        assert torch.equal(expected(again.eval(), 256), expected(reference, 256))
    else:
        with pytest.raises(ValueError, match="Transformers' CLAP has LAION's projection or none"):
            exported(tmp_path / "ours", tmp_path / "back", "clap")


def test_parts_compose_the_start_of_audio_flamingo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OPT and ClapCap become what a run's init_from takes; the run starts the layers between."""
    reference = families.clap("alone", tmp_path / "theirs")
    write(tmp_path / "clapcap.pth", "clapcap", reference)
    families.language("opt", tmp_path / "opt")
    sources = ["--from", f"language={tmp_path / 'opt'}", "--from", f"audio={tmp_path}/clapcap.pth"]
    sizes = [f"{k}={v}" for k, v in encoder_sizes().items()]
    arguments = ["import", *sources, "--to", str(tmp_path / "ours"), "model=audio_flamingo_tiny"]
    assert main([*arguments, *sizes]) == 0
    out = capsys.readouterr().out
    assert "in no source, and started by the run that begins here: " in out
    saved = models.open_checkpoint(tmp_path / "ours")
    starts = {name.split(".")[0] for name in saved.source.spec}
    assert starts == {"language", "audio"}
    left = {name.split(".")[0] for name in saved.state["left_to_the_run"]}
    assert left == {"cross_attention", "audio_connector"}
    # Each part goes out again, in its own format or not at all.
    language = exported(tmp_path / "ours", tmp_path / "back", "opt", part="language")
    assert torch.equal(
        language["model.decoder.embed_positions.weight"],
        families.language("opt", tmp_path / "again").model.decoder.embed_positions.weight,
    )
    with pytest.raises(ValueError, match="not projection=clapcap"):
        exported(tmp_path / "ours", tmp_path / "none", "clap", part="audio")
    # Another encoder than the model's is refused by its sizes.
    assert main([*arguments[:-2], str(tmp_path / "other"), arguments[-1]]) == 2
    assert "audio: model.picture=64 in" in capsys.readouterr().err


def encoder_sizes() -> dict[str, Any]:
    """Overrides that give the tiny model OPT's and CLAP's sizes of `families`."""
    language, encoder = "model.language.", "model.encoders.audio.encoder."
    shape = {"hidden_size": 60, "num_attention_heads": 6, "num_query_groups": 6}
    shape |= {"kv_channels": 10, "ffn_hidden_size": 92}
    return {
        **{f"{language}transformer.{k}": v for k, v in shape.items()},
        f"{language}max_sequence_length": 20,
        f"{encoder}picture": 64,
        f"{encoder}hidden_size": 8,
        f"{encoder}depths": "[2,3]",
        f"{encoder}projection_size": 12,
        "model.cross_attention.kv_size": 12,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.blocks.1.attn_mask"), r"has no layers\.0\.blocks\.1\.attn_mask"),
        (lambda s: s.update({"mel_conv2d.weight": torch.ones(1)}), "fusion is not supported"),
        (lambda s: s.pop("patch_embed.proj.weight"), "has no HTS-AT of LAION-CLAP"),
        (lambda s: s.pop("bn0.weight"), "has no bn0.weight"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.ones(8, 16)}),
            r"patch_embed\.proj\.weight has shape \[8, 16\], must have 4 axes",
        ),
    ],
)
def test_another_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    reference = families.clap("alone", tmp_path / "theirs")
    state = encoder_of(reference)
    change(state)
    state = {f"audio_encoder.base.htsat.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        ClapFile(tmp_path / "file.pth")


def test_a_file_runs_nothing(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path(tmp_path / "ran").mkdir, ()

    torch.save({"model": {}, "extra": Planted()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="refused, nothing of it was run"):
        ClapFile(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pt").write_text("no pickle")
    with pytest.raises(ValueError, match=r"text\.pt: refused"):
        ClapFile(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"is not a folder, nor a file of CLAP \(\.pt, \.pth"):
        models.open_folder(tmp_path / "none.pt")
