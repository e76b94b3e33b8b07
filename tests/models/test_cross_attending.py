"""NVLM-X and NVLM-H: against their own parts, by perturbation, at full size, in generation."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import ATTENDED_IMAGE, IMAGE, Batch, Sample, Text, TextMedia
from nvmm.data.collate import collate
from nvmm.inference.decoding import generate
from nvmm.modules.spans import query_spans
from nvmm.parallel.parameters import build_chunks, sharded_parameters
from nvmm.parallel.setup import Parallel, Precision
from nvmm.proof.equivalence import build_trainer, compare, run
from nvmm.proof.miniature import ONE_RANK, Layout
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from tests import tiny
from tests.models.parameter_names import build, golden_path, parameter_names
from tests.ranks import run_ranks

KINDS = {"x": "all", "h": "regular"}
PER_TILE = 4
LETTERS = 400


def model_of(config: dict[str, Any], parallel: Parallel | None = None) -> Any:
    """The one chunk of a tiny model, weights drawn by name; in eval mode."""
    partial = instantiate(config, _convert_="all")
    return build_chunks(partial, parallel or Parallel(), Precision(), seed=7)[0].eval()


def sample(kind: str, images: list[int], number: int = 0) -> Sample:
    """A sample with images of so many tiles, thumbnail included, as the builder lays them out."""
    generator = torch.Generator().manual_seed(40 + number)

    def words(count: int) -> list[int]:
        return torch.randint(0, LETTERS, (count,), generator=generator).tolist()

    tokens, placed, attended = words(3), [], []
    for item, count in enumerate(images):
        tokens += words(1)
        for tile in [0] if count == 1 else [*range(1, count), 0]:
            if kind == "h" and tile == 0:
                tokens += words(2)
                placed.append((len(tokens), item, tile))
                tokens += [508] * PER_TILE
            else:
                start = len(tokens)
                tokens += words(2) if kind == "x" else []
                attended.append((start, len(tokens), item, tile))
        tokens += words(4)

    def pixels(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)

    media = {}
    if placed:
        positions, items, tiles = torch.tensor(placed).unbind(1)
        media[IMAGE] = TextMedia(pixels(len(placed)), positions, items, tiles, 508, PER_TILE)
    if attended:
        positions, ends, items, tiles = torch.tensor(attended).unbind(1)
        tags = torch.tensor([words(2 if kind == "h" else 0) for _ in attended]).long()
        media[ATTENDED_IMAGE] = TextMedia(
            pixels(len(attended)),
            positions,
            items,
            tiles,
            -1,
            PER_TILE,
            ends=ends,
            tag_ids=tags.view(len(attended), -1),
        )
    size = len(tokens)
    text = Text(torch.tensor(tokens), torch.ones(size), media)
    return Sample((text,), number, f"sample {number}")


def hidden_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch, output="hidden")


def with_pixels(batch: Batch, kind: str, tile: int) -> Batch:
    """The batch with other pixels in one tile."""
    media = batch.media[kind]
    values = media.values.clone()
    values[tile] = 255 - values[tile]
    return batch.replace(media=batch.media | {kind: dataclasses.replace(media, values=values)})


# -- spans -----------------------------------------------------------------------------------


def test_spans_of_a_packed_row_and_of_padded_rows() -> None:
    """Two images, then a sample of one image, then none: who sees which of 4 keys a tile."""
    samples = [sample("x", [3, 1]), sample("x", [2], 1), sample("x", [], 2)]
    batch = collate(samples, pad_id=0, packed=True, pad_multiple=8)
    spans = query_spans(batch.media[ATTENDED_IMAGE], batch)[:, 0].tolist()
    text = [[0, 12]] * 5, [[0, 16]] * 4  # the second image's <Image> still sees the first alone
    first = [[0, 0]] * 4 + [[0, 4]] * 2 + [[4, 8]] * 2 + [[8, 12]] * 2 + text[0]
    first += [[12, 16]] * 2 + text[1]
    second = [[0, 0]] * 4 + [[16, 20]] * 2 + [[20, 24]] * 2 + [[16, 24]] * 4
    assert spans == first + second + [[0, 0]] * (batch.tokens.shape[1] - 33)
    padded = collate(samples, pad_id=0)
    rows = query_spans(padded.media[ATTENDED_IMAGE], padded)
    assert rows[:21, 0].tolist() == first and rows[:12, 1].tolist() == second
    assert not rows[:, 2].any()
    last = query_spans(batch.media[ATTENDED_IMAGE], batch, "last")[:, 0].tolist()
    assert last[10:15] == text[0] and last[17:21] == [[12, 16]] * 4
    tags = query_spans(batch.media[ATTENDED_IMAGE], batch, "nothing")[:, 0]
    seen = [t for t, (low, high) in enumerate(tags.tolist()) if low < high]
    assert seen == [4, 5, 6, 7, 8, 9, 15, 16, 25, 26, 27, 28]


def test_spans_count_the_tags_in_front_of_the_features() -> None:
    batch = collate([sample("h", [3])], pad_id=0)
    media = batch.media[ATTENDED_IMAGE]
    ids = media.tag_ids.clone()
    ids[1, 1] = -1
    spans = query_spans(dataclasses.replace(media, tag_ids=ids), batch)[:, 0].tolist()
    assert spans == [[0, 0]] * 4 + [[0, 11]] * (len(spans) - 4)  # 2 + 4, then 1 + 4 keys


def test_borders_beyond_32767() -> None:
    """Many tiles have more keys than 16 bits count."""
    batch = collate([sample("x", [3, 2]), sample("x", [2], 1)], pad_id=0, packed=True)
    media = dataclasses.replace(batch.media[ATTENDED_IMAGE], tokens_per_item=9001)
    spans = query_spans(media, batch)[:, 0].tolist()
    assert spans[12] == [0, 3 * 9001] and spans[22] == [0, 5 * 9001]
    assert spans[27] == [5 * 9001, 6 * 9001] and spans[-1] == [5 * 9001, 7 * 9001]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_may_end_with_its_tags(kind: str) -> None:
    """What is generated behind them sees the image, in the longer row and in the padded one."""
    samples = []
    for number, images in enumerate(([2], [3, 2])):
        whole = sample(kind, images, number)
        end = int(whole.text.media[ATTENDED_IMAGE].ends.max())
        text = dataclasses.replace(
            whole.text,
            tokens=whole.text.tokens[:end],
            weights=whole.text.weights[:end],
            media={ATTENDED_IMAGE: whole.text.media[ATTENDED_IMAGE]},
        )
        samples.append(dataclasses.replace(whole, texts=(text,)))
    batch = collate(samples, pad_id=0, padding="left")
    media, width = batch.media[ATTENDED_IMAGE], batch.tokens.shape[1]
    spans = query_spans(media, batch, num_following=3)
    assert spans.shape == (width + 3, 2, 2)
    per_tile = PER_TILE + 2 * (kind == "h")
    first, second = (2, 5) if kind == "x" else (1, 3)
    for row, (low, high) in enumerate(((0, first), (first, first + second))):
        behind = spans[width:, row].tolist()
        assert behind == [[low * per_tile, high * per_tile]] * 3
        if kind == "x":  # the last tag itself sees its own tile alone
            assert spans[width - 1, row].tolist() == [(high - 1) * per_tile, high * per_tile]


def test_tiles_out_of_order_are_refused() -> None:
    batch = collate([sample("x", [1, 1])], pad_id=0)
    media = dataclasses.replace(batch.media[ATTENDED_IMAGE], items=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"not in order: \(0, 1\), then \(0, 0\)"):
        query_spans(media, batch)


# -- what sees what, through the whole model -------------------------------------------------


@pytest.mark.usefixtures("world")
def test_a_tile_reaches_its_own_tag_and_the_text_behind_it() -> None:
    """One block, in the last layer: positions do not mix after it."""
    model = model_of(tiny.cross_attending(interval=4))
    batch = collate([sample("x", [3, 1]), sample("x", [2], 1)], pad_id=0, packed=True)
    before = hidden_of(model, batch)
    for tile, tag in enumerate([(4, 6), (6, 8), (8, 10), (15, 17), (25, 27), (27, 29)]):
        after = hidden_of(model, with_pixels(batch, ATTENDED_IMAGE, tile))
        changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
        text = [*range(10, 15), *range(17, 21)] if tile < 3 else [*range(17, 21)]
        text = text if tile < 4 else [*range(29, 33)]
        assert changed == sorted([*range(*tag), *text]), tile


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_neighbours_change_nothing(kind: str) -> None:
    model = model_of(tiny.cross_attending())
    samples = [sample(kind, [3, 1]), sample(kind, [], 1), sample(kind, [2], 2)]
    batch = collate(samples, pad_id=0, packed=True)
    before = hidden_of(model, batch)
    bounds = batch.cu_seqlens.tolist()
    for media_kind, media in batch.media.items():
        for tile, owner in enumerate(media.texts.tolist()):
            after = hidden_of(model, with_pixels(batch, media_kind, tile))
            changed = (before != after).flatten(1).any(1).nonzero().flatten()
            assert len(changed)
            assert bounds[owner] <= int(changed.min()) <= int(changed.max()) < bounds[owner + 1]
    alone = torch.cat([hidden_of(model, collate([s], pad_id=0)) for s in samples])
    torch.testing.assert_close(before, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("world")
def test_closed_gates_leave_x_the_text_backbone() -> None:
    model = model_of(tiny.cross_attending(initial_gate=0.0))
    plain = model_of(tiny.multimodal()["language"])
    plain.load_state_dict(model.language.state_dict(), strict=False)
    for packed in (False, True):
        batch = collate([sample("x", [3]), sample("x", [], 1)], pad_id=0, packed=packed)
        assert torch.equal(hidden_of(model, batch), hidden_of(plain, batch.replace(media={})))


@pytest.mark.usefixtures("world")
def test_closed_gates_leave_h_nvlm_d_of_the_thumbnails() -> None:
    """The encoder takes the thumbnails together with the tiles, row by row alike.

    But for rounding: a matrix product of more rows may add up in another order on some CPUs.
    """
    model = model_of(tiny.cross_attending(initial_gate=0.0))
    d = model_of(tiny.multimodal())
    d.load_state_dict(model.state_dict(), strict=False)
    batch = collate([sample("h", [3, 2]), sample("h", [1], 1)], pad_id=0)
    thumbnails = batch.replace(media={IMAGE: batch.media[IMAGE]})
    torch.testing.assert_close(
        hidden_of(model, batch), hidden_of(d, thumbnails), rtol=1e-5, atol=1e-5
    )


def _weights(trainer: Any) -> dict[str, Tensor]:
    return {p.name: p.parameter.detach().clone() for p in sharded_parameters(trainer.chunks)}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_moves_only_blocks_and_projector(kind: str, tmp_path: Path) -> None:
    """With closed gates the first step opens them, the second moves what stands behind."""
    config = tiny.config(
        tiny.cross_attending(initial_gate=0.0),
        attended=KINDS[kind],
        freeze=["vision.*", "language.*"],
        weight_decay=0.0,
    )
    data = SyntheticData(synthetic_steps(config, 2, 4))
    trainer = build_trainer(config, data, tmp_path, global_batch_size=8, micro_batch_size=2)
    start, moved = _weights(trainer), []
    for step, batches in enumerate(data.batches(rank=0, size=1, start=0)):
        trainer.train_step(step, batches, check=step == 0)
        now = _weights(trainer)
        moved.append({n for n in now if not torch.equal(now[n], start[n])})
        start = now
    gates = {f"cross_attention.layers.{layer}.gate" for layer in (1, 3)}
    connector = {n for n in start if n.startswith("connector.")} if kind == "h" else set()
    assert moved[0] == gates | connector
    trained = {n for n in start if n.startswith(("cross_attention.", "connector."))}
    assert moved[1] == trained


# -- full size -------------------------------------------------------------------------------

COUNTS = {
    "nvlm_x_34b": (1_174_476_810, 91_776_000),
    "nvlm_x_72b": (1_510_031_370, 104_883_200),
    "nvlm_h_34b": (1_174_476_810, 408_970_240),
    "nvlm_h_72b": (1_510_031_370, 620_717_056),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.usefixtures("world")
def test_full_size_parameter_counts(name: str) -> None:
    """Ten GQA blocks without an FFN: 1.17 B and 1.51 B, with ten norms and ten gates."""
    counts = {"cross_attention": 0, "connector": 0, "language": 0, "vision": 0}
    blocks = set()
    for parameter in sharded_parameters(build(name)):
        part, *rest = parameter.name.split(".")
        counts[part] += parameter.parameter.numel()
        if part == "cross_attention":
            blocks.add(int(rest[1]))
    layers = 60 if "34b" in name else 80
    assert sorted(blocks) == list(range(layers // 10 - 1, layers, layers // 10))
    assert (counts["cross_attention"], counts["connector"]) == COUNTS[name]
    assert counts["language"] == {60: 34_388_917_248, 80: 72_706_203_648}[layers]
    assert counts["vision"] == 5_536_496_000


@pytest.mark.parametrize("options", ["mha", "gqa_ffn", "mha_ffn"])
@pytest.mark.usefixtures("world")
def test_full_size_variants_have_the_counts_of_their_formula(options: str) -> None:
    """The other rows of the cost table: MHA 2.06/2.68 B, FFN 5.58/8.78 B, both 6.46/9.95 B."""
    expected = {
        "mha": (2.06, 2.68),
        "gqa_ffn": (5.58, 8.78),
        "mha_ffn": (6.46, 9.95),
    }[options]
    found = []
    for heads, width, ffn in ((56, 7168, 20480), (64, 8192, 29568)):
        changes = {"num_query_groups": heads} if "mha" in options else {}
        changes |= {"ffn_hidden_size": ffn} if "ffn" in options else {}
        config = _wide(heads, width, ffn)
        found.append(10 * _block_parameters(config, changes) / 1e9)
    assert found == pytest.approx(expected, abs=0.006)


def _wide(heads: int, width: int, ffn: int) -> dict[str, Any]:
    config = tiny.cross_attending(interval=1)
    config["language"]["transformer"] |= {
        "num_layers": 1,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_query_groups": 8,
        "kv_channels": 128,
        "ffn_hidden_size": ffn,
    }
    return config


def _block_parameters(config: dict[str, Any], changes: dict[str, Any]) -> int:
    from nvmm.parallel.setup import Chunk

    config["cross_attention"] |= changes
    chunk = Chunk(Parallel(), Precision("bf16"), meta=True)
    with torch.device("meta"):
        model = instantiate(config, _convert_="all")(chunk=chunk)
    return sum(p.numel() for p in model.decoder.layers[0].cross_attention.parameters())


@pytest.mark.parametrize(
    "name", ["nvlm_x_tiny", "nvlm_h_tiny", "xattn_dense_tiny", "audio_flamingo_tiny"]
)
@pytest.mark.usefixtures("world")
def test_golden_names(name: str, request: pytest.FixtureRequest) -> None:
    lines = parameter_names(name)
    path = golden_path(name)
    if request.config.getoption("--golden"):
        path.write_text("\n".join(lines) + "\n")
    assert path.read_text().splitlines() == lines


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.usefixtures("world")
def test_backbones_have_nvlm_d_s_names(name: str) -> None:
    """Freezing, converting and loading them need no other patterns, tables or checkpoints."""
    known = golden_path(f"nvlm_d_{name[-3:]}").read_text().splitlines()
    assert _backbones(parameter_names(name)) == _backbones(known)


def _backbones(lines: list[str]) -> set[str]:
    return {line for line in lines if line.startswith(("language.", "vision."))}


# -- generation, checkpoints -----------------------------------------------------------------


def _answers(
    rank: int, world: int, init: str, kind: str, use_cache: bool, tp: int, pp: int
) -> list[list[int]]:
    parallel = Parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    model = model_of(tiny.cross_attending(), parallel)
    prompts = [sample(kind, images, number) for number, images in enumerate([[3, 1], [], [1], [2]])]
    return generate([model], prompts, max_new_tokens=6, stop_ids=[], pad_id=0, use_cache=use_cache)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_the_whole_sequence_every_time(kind: str) -> None:
    """Left-padded prompts with several images, none, one tile; two tensor and pipeline ranks."""
    expected = run_ranks(_answers, 1, kind, False, 1, 1)[0]
    assert len({tuple(answer) for answer in expected}) == 4
    assert run_ranks(_answers, 1, kind, True, 1, 1)[0] == expected
    for answers in run_ranks(_answers, 4, kind, True, 2, 2):
        assert answers == expected


def same_logits_with_a_cache(
    model: torch.nn.Module, prompts: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that four greedy tokens of each prompt have one's logits with a cache and without."""
    seen: list[Tensor] = []

    def chosen(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    monkeypatch.setattr("nvmm.inference.decoding.choose", chosen)
    for use_cache in (True, False):
        generate([model], prompts, max_new_tokens=4, stop_ids=[], pad_id=0, use_cache=use_cache)
    cached, whole = torch.stack(seen[:4]), torch.stack(seen[4:])
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_the_whole_sequence_s(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens may stay the same where keys and values do not."""
    model = model_of(tiny.cross_attending())
    prompts = [sample(kind, images, number) for number, images in enumerate([[3, 1], [], [2]])]
    same_logits_with_a_cache(model, prompts, monkeypatch)


@pytest.mark.usefixtures("world")
def test_keys_are_computed_once_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny.cross_attending())
    calls: list[int] = []
    block = model.decoder.layers[1].cross_attention
    block.linear_kv.register_forward_hook(lambda module, inputs, output: calls.append(1))
    prompts = [sample("x", [3])]
    generate([model], prompts, max_new_tokens=4, stop_ids=[], pad_id=0)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_saved_by_pipeline_and_tensor_ranks_load_at_one(kind: str, tmp_path: Path) -> None:
    config = tiny.config(tiny.cross_attending(), attended=KINDS[kind])
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    layout = Layout("TP2+SPxPP2", 4, sizes | {"sequence_parallel": True})
    weights = tmp_path / "weights"
    found = run(config, layout, weights=weights)
    comparison = compare(run(config, ONE_RANK, reference=weights), found)
    assert comparison.equal, str(comparison)


def _fit(
    rank: int, world: int, init: str, run_dir: Path, until: int, layout: dict[str, Any]
) -> None:
    config = tiny.config(tiny.cross_attending(), attended="regular", decay_steps=4)
    config["parallel"] = layout
    Parallel(**layout).initialize(seed=1234, rank=rank, world_size=world, init_method=init)
    data = SyntheticData(synthetic_steps(config, 4, 2))
    run_dir.mkdir(exist_ok=True)
    options: Any = {"max_steps": until, "global_batch_size": 4, "micro_batch_size": 2}
    build_trainer(config, data, run_dir, log=rank == 0, **options).fit()


@pytest.mark.slow
def test_training_resumes_at_another_layout(tmp_path: Path) -> None:
    import json

    def losses(folder: str) -> list[float]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    sizes = {"pipeline_model_parallel_size": 2}
    run_ranks(_fit, 1, tmp_path / "whole", 4, {})
    run_ranks(_fit, 2, tmp_path / "moved", 2, sizes)
    run_ranks(_fit, 1, tmp_path / "moved", 4, {})
    assert losses("moved") == pytest.approx(losses("whole"), rel=1e-5)


# -- refusals and counts ---------------------------------------------------------------------


@pytest.mark.usefixtures("world")
def test_nvlm_d_refuses_attended_tiles() -> None:
    batch = collate([sample("x", [2])], pad_id=0)
    with pytest.raises(ValueError, match=r"data\.train\.build\.attended=none"):
        hidden_of(model_of(tiny.multimodal()), batch)


@pytest.mark.usefixtures("world")
def test_a_wrong_number_of_features_is_refused() -> None:
    batch = collate([sample("x", [2])], pad_id=0)
    media = dataclasses.replace(batch.media[ATTENDED_IMAGE], tokens_per_item=9)
    with pytest.raises(ValueError, match="2 tiles x 4 tokens, the batch has 2 attended tiles x 9"):
        hidden_of(model_of(tiny.cross_attending()), batch.replace(media={ATTENDED_IMAGE: media}))


def test_fixed_lengths_between_stages_are_refused() -> None:
    from nvmm.models.cross_attending import CrossAttendingModel
    from nvmm.parallel.setup import Chunk

    parallel = Parallel(pipeline_model_parallel_size=2, variable_seq_lengths=False)
    nothing: Any = functools.partial(copy.copy)
    with pytest.raises(ValueError, match="variable_seq_lengths=false must be true"):
        CrossAttendingModel(nothing, nothing, nothing, nothing, chunk=Chunk(parallel, Precision()))


@pytest.mark.usefixtures("world")
def test_flops_and_payload_of_a_batch() -> None:
    model = model_of(tiny.cross_attending()).train()
    batch = collate([sample("x", [3]), sample("x", [], 1)], pad_id=0)
    plain = model.flops(batch.replace(media={}))
    found = model.flops(batch)
    tokens, h, width = int(batch.lengths.sum()), 64, 64
    pairs = 3 * 2 * 4 + (batch.tokens.shape[1] - 10) * 12
    linear = h * (2 * width * tokens + 2 * 32 * 12)
    assert found["language"] - plain["language"] == 2 * 3 * (2 * linear + 4 * width * pairs)
    assert found["image"] > 0 == plain["image"]
    model.language.requires_grad_(False)
    for layer in (1, 3):
        model.decoder.layers[layer].cross_attention.requires_grad_(True)
    assert model.flops(batch)["language"] < found["language"]
    assert model.payload_bytes(batch) == (batch.tokens.numel() * h * 4, 12 * h * 4)
