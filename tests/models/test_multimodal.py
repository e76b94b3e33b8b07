"""The whole graph: against Transformers' InternVL, in every kind of batch, at full size."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import IMAGE, Batch, Media
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.equivalence import build_trainer
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from tests import oracle, tiny
from tests.models.parameter_names import build, golden_path, parameter_names
from tests.models.test_language import CONFIG, batch_of
from tests.ranks import run_ranks

X = 508  # the placeholder; a 16-pixel tile becomes 2 x 2 tokens


def multimodal(parallel: Parallel | None = None, chunk: int = 0, **changes: Any) -> Any:
    config = tiny.multimodal()
    for part, change in changes.items():
        config[part] |= change
    chunks = (parallel or Parallel()).chunks(Precision())
    return instantiate(config, _convert_="all")(chunk=chunks[chunk])


def with_tiles(batch: Batch, rows: list[int], positions: list[int], seed: int = 0) -> Batch:
    """The batch with a 16 x 16 tile at each (row, position)."""
    tokens = batch.tokens.clone()
    for row, position in zip(rows, positions, strict=True):
        tokens[row, position : position + 4] = X
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (len(rows), 3, 16, 16), dtype=torch.uint8, generator=generator)
    media = Media(
        values=values,
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        texts=torch.tensor(rows),
        items=torch.zeros(len(rows), dtype=torch.long),
        tiles=torch.arange(len(rows)),
        placeholder_id=X,
        tokens_per_item=4,
    )
    return dataclasses.replace(batch, tokens=tokens, labels=tokens, media={IMAGE: media})


def rows_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, X, (n,), generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def model(world: None) -> Any:
    from nvmm.parallel.parameters import initialize

    model = multimodal().eval()
    initialize(model, seed=6)
    return model


@pytest.mark.usefixtures("world")
def test_logits_equal_transformers_internvl() -> None:
    """Encoder, pixel shuffle, projector, merge and decoder in one; InternVL's shuffle is v2."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision_config = {
        "hidden_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 128,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
        "image_size": (16, 16),
        "patch_size": (4, 4),
    }
    config = InternVLConfig(
        vision_config=vision_config,
        text_config={"model_type": "qwen2"} | CONFIG,
        image_token_id=X,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    reference = InternVLForConditionalGeneration(config)
    oracle.randomize(reference, std=0.1)
    ours = multimodal(
        connector={"hidden_size": 64, "bias": True, "layernorm_epsilon": 1e-5},
    ).eval()
    state = reference.state_dict()
    weights = oracle.internvit_weights(state, 2, 5, "model.vision_tower.", "vision.")
    weights |= oracle.decoder_weights(reference, "language.", "model.language_model.")
    for kind in ("weight", "bias"):
        projector = "model.multi_modal_projector."
        weights |= {
            f"connector.linear_fc1.layer_norm_{kind}": state[f"{projector}layer_norm.{kind}"],
            f"connector.linear_fc1.{kind}": state[f"{projector}linear_1.{kind}"],
            f"connector.linear_fc2.{kind}": state[f"{projector}linear_2.{kind}"],
        }
    oracle.load(ours, weights)
    batch = with_tiles(batch_of(rows_of(14, 14)), [0, 1, 1], [3, 1, 8])
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (ours.vision.image_mean, ours.vision.image_std)
    )
    pixels = (batch.media[IMAGE].values.float() / 255 - mean) / std
    with torch.no_grad():
        theirs = reference(input_ids=batch.tokens, pixel_values=pixels).logits
        torch.testing.assert_close(ours(batch, output="logits"), theirs, atol=1e-4, rtol=0)


def test_rows_of_one_micro_batch_are_as_alone(model: Any) -> None:
    """Two tiles, text alone, one tile; each row as if it were the batch."""
    rows = rows_of(13, 9, 13)
    batch = with_tiles(batch_of(rows), [0, 2, 0], [2, 5, 8])
    media = batch.media[IMAGE]
    with torch.no_grad():
        together = model(batch, output="logits")
        for row, tokens in enumerate(rows):
            mine = media.rows == row
            alone = batch_of([batch.tokens[row, : len(tokens)]])
            if mine.any():
                picked = {
                    name: getattr(media, name)[mine]
                    for name in ("values", "rows", "positions", "texts", "items", "tiles")
                }
                picked["rows"] = torch.zeros_like(picked["rows"])
                alone = alone.replace(media={IMAGE: dataclasses.replace(media, **picked)})
            expected = model(alone, output="logits")[0]
            torch.testing.assert_close(together[row, : len(tokens)], expected, atol=1e-5, rtol=0)


def test_packed_samples_with_images_are_as_alone(model: Any) -> None:
    rows = rows_of(9, 5, 12)
    packed = with_tiles(batch_of(rows, packed=True), [0, 0], [2, 18])
    tiles = packed.media[IMAGE]
    changed = tiles.values.clone()
    changed[1] = 255 - changed[1]
    other = packed.replace(media={IMAGE: dataclasses.replace(tiles, values=changed)})
    with torch.no_grad():
        first, second = (model(x, output="logits")[0] for x in (packed, other))
    assert torch.equal(first[:14], second[:14])
    assert not torch.equal(first[18:], second[18:])
    alone = with_tiles(batch_of([rows[0]]), [0], [2])
    alone = alone.replace(
        media={IMAGE: dataclasses.replace(alone.media[IMAGE], values=tiles.values[:1])}
    )
    with torch.no_grad():
        expected = model(alone, output="logits")[0]
    torch.testing.assert_close(first[:9], expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("world")
def test_the_placeholder_may_lie_outside_the_vocabulary(model: Any) -> None:
    """Yi has no spare row: id 64000 of 64000."""
    batch = with_tiles(batch_of(rows_of(9)), [0], [2])
    far = {IMAGE: dataclasses.replace(batch.media[IMAGE], placeholder_id=600)}
    moved = batch.replace(tokens=batch.tokens.masked_fill(batch.tokens == X, 600), media=far)
    with torch.no_grad():
        assert torch.equal(model(batch, output="logits"), model(moved, output="logits"))


# -- what mcore asks of a wrapper ------------------------------------------------------------


def _wrapper(rank: int, world: int, init: str) -> list[dict[str, Any]]:
    """What each chunk of a tied model at PP2xVPP2 exposes."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.utils import get_attr_wrapped_model, get_model_config

    parallel = Parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    found = []
    for index in range(2):
        chunk = multimodal(parallel, index, language={"share_embeddings_and_output_weights": True})
        wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
        owner = get_attr_wrapped_model(wrapped, "pre_process", return_model_obj=True)
        tied = owner.share_embeddings_and_output_weights and (
            owner.pre_process or owner.post_process
        )
        found.append(
            {
                "owner": owner is chunk,
                "config": get_model_config(wrapped) is chunk.language.config,
                "ends": (owner.pre_process, owner.post_process),
                "encoder": (chunk.vision is not None, chunk.connector is not None),
                "vp_stage": get_attr_wrapped_model(wrapped, "vp_stage"),
                "tied": owner.shared_embedding_or_output_weight().shape if tied else None,
                "layers": len(
                    get_attr_wrapped_model(wrapped, "decoder", return_model_obj=True).decoder.layers
                ),
                "model_type": get_attr_wrapped_model(wrapped, "model_type")
                == chunk.language.model_type,
            }
        )
    return found


def test_wrapper_exposes_what_mcore_reads() -> None:
    first, last = run_ranks(_wrapper, 2)
    for chunks in (first, last):
        for index, chunk in enumerate(chunks):
            assert chunk["owner"] and chunk["config"] and chunk["model_type"]
            assert chunk["vp_stage"] == index and chunk["layers"] == 1
    assert [c["encoder"] for c in first + last] == [(True, True)] + [(False, False)] * 3
    assert [c["ends"] for c in first + last] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert first[0]["tied"] == last[1]["tied"] == (512, 64)


# -- batches without images ------------------------------------------------------------------


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("frozen_encoder", [False, True])
def test_a_text_batch_touches_every_parameter_when_gradients_overlap(frozen_encoder: bool) -> None:
    """mcore's overlapped reduction waits for a gradient of each; a frozen encoder stays idle."""
    from nvmm.parallel.parameters import initialize

    results = {}
    for overlap in (False, True):
        model = multimodal(Parallel(overlap_grad_reduce=overlap)).train()
        initialize(model, seed=6)
        model.vision.requires_grad_(not frozen_encoder)
        calls: list[int] = []
        model.vision.register_forward_hook(lambda *args: calls.append(1))  # noqa: B023
        loss = model(batch_of(rows_of(6))).sum()
        loss.backward()
        missing = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None}
        results[overlap] = (loss.detach(), missing)
        assert len(calls) == (overlap and not frozen_encoder)
        if overlap:
            parts = (model.connector,) if frozen_encoder else (model.connector, model.vision)
            assert all(p.grad.abs().max() == 0 for part in parts for p in part.parameters())
    assert results[False][1] == {"vision", "connector"}
    assert results[True][1] == ({"vision"} if frozen_encoder else set())
    assert torch.equal(results[False][0], results[True][0])


@pytest.mark.usefixtures("world")
def test_a_frozen_encoder_keeps_no_activations() -> None:
    """Counted: tensors kept for backward do not depend on the encoder when it is frozen."""
    kept = {}
    for frozen in (False, True):
        model = multimodal().train()
        model.vision.requires_grad_(not frozen)
        tiles = with_tiles(batch_of(rows_of(9)), [0], [2]).media[IMAGE].values
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # noqa: B023
            features = model.vision(tiles)
        kept[frozen] = (len(saved), features.requires_grad)
    assert kept[True] == (0, False)
    assert kept[False][0] > 20 and kept[False][1]


def test_flops_count_the_real_heads_and_what_trains(model: Any) -> None:
    batch = with_tiles(batch_of(rows_of(20, 16)), [0, 0, 1], [2, 8, 3])
    counts = model.flops(batch)
    assert counts["language"] > 0 and counts["image"] > 0
    assert model.flops(batch.replace(media={}))["image"] == 0
    model.vision.requires_grad_(False)
    frozen = model.flops(batch)
    model.vision.requires_grad_(True)
    assert frozen["language"] == counts["language"] and frozen["image"] < counts["image"]


# -- training --------------------------------------------------------------------------------


def _fit(
    rank: int, world: int, init: str, run_dir: Path, until: int, layout: dict[str, Any]
) -> None:
    config = tiny.config(tiny.multimodal(), decay_steps=4) | {"parallel": layout}
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world, init_method=init)
    data = SyntheticData(synthetic_steps(config, 4, 2))
    run_dir.mkdir(exist_ok=True)
    options: Any = {"max_steps": until, "global_batch_size": 4, "micro_batch_size": 2}
    build_trainer(config, data, run_dir, log=rank == 0, **options).fit()


def _losses(run_dir: Path) -> list[tuple[float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


@pytest.mark.slow
def test_training_resumes_in_the_other_encoder_mode(tmp_path: Path) -> None:
    """Weights and optimizer state of a trained 5-head encoder: whole, padded to 6, to 8, whole."""
    run_ranks(_fit, 1, tmp_path / "whole", 4, {})
    stages = [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "encoder": "sharded"}),
        (4, {"tensor_model_parallel_size": 4, "encoder": "sharded"}),
        (1, {}),
    ]
    for until, (size, layout) in enumerate(stages, 1):
        run_ranks(_fit, size, tmp_path / "parts", until, layout)
    expected, found = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# -- full size -------------------------------------------------------------------------------

COUNTS = {
    "nvlm_d_72b": {"language": 72_706_203_648, "vision": 5_536_496_000, "connector": 620_717_056},
    "nvlm_d_34b": {"language": 34_388_917_248, "vision": 5_536_496_000, "connector": 408_970_240},
    "nvlm_d_7b": {"language": 7_615_616_512, "vision": 304_012_288, "connector": 145_498_112},
}


TINY = ("nvlm_d_tiny", "vila_tiny", "audio_flamingo3_tiny", "language_tiny")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", [*COUNTS, *TINY])
def test_golden_names_shapes_and_counts(name: str, request: pytest.FixtureRequest) -> None:
    """Counts of the fact sheets (NVLM 72B: 78.86 B, 34B: 40.33 B); names as in tests/golden."""
    names = parameter_names(name)
    if request.config.getoption("--golden"):
        golden_path(name).write_text("\n".join(names) + "\n")
    assert names == golden_path(name).read_text().splitlines()
    counts: dict[str, int] = {}
    for line in names:
        key, shape = line.split(" ", 1)
        part = key.split(".")[0]
        counts[part] = counts.get(part, 0) + math.prod(ast.literal_eval(shape))
    if name in COUNTS:
        assert counts == COUNTS[name]


@pytest.mark.usefixtures("world")
def test_full_size_encoder_is_internvit() -> None:
    vision = build("nvlm_d_34b").vision
    attention = vision.decoder.layers[0].self_attention
    assert (vision.num_attention_heads, attention.hidden_size_per_attention_head) == (25, 128)
    assert attention.linear_qkv.bias is None and attention.linear_proj.bias is not None
    assert attention.q_norm.weight.shape == (3200,)
    assert vision.decoder.final_layernorm is None
    assert vision.position_embeddings.weight.shape == (1025, 3200)
