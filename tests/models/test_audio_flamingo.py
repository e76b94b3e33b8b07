"""Audio Flamingo's graph: its layers over windows, who hears what, cached generation, sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from nvmm.batch import ATTENDED, Batch, MediaKind, Sample, Text, TextMedia
from nvmm.config.check import config_dir
from nvmm.data.collate import collate
from nvmm.modules.spans import query_spans
from nvmm.modules.window_transformer import WindowTransformer
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests.models.parameter_names import build
from tests.models.test_cross_attending import same_logits_with_a_cache

AUDIO = MediaKind("audio", ATTENDED)
BINS, FRAMES = 16, 60
MARKER = 400


def tiny(language: str | None = None, **blocks: Any) -> dict[str, Any]:
    """configs/model/audio_flamingo_tiny.yaml with open gates; language: another decoder's name."""
    overrides = [f"language@model.language={language}"] if language else []
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = compose("model/audio_flamingo_tiny", overrides)["model"]
    config: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    config["cross_attention"] |= {"initial_gate": 0.5, **blocks}
    return config


def model_of(config: dict[str, Any]) -> Any:
    partial = instantiate(config, _convert_="all")
    return build_chunks(partial, Parallel(), Precision(), seed=7)[0].eval()


def sample(clips: list[int], number: int = 0) -> Sample:
    """Two words, then for each clip of so many windows its marker and four words."""
    generator = torch.Generator().manual_seed(40 + number)

    def words(count: int) -> list[int]:
        return torch.randint(0, MARKER, (count,), generator=generator).tolist()

    tokens, places = words(2), []
    for item, count in enumerate(clips):
        places += [(len(tokens), item, tile) for tile in range(1, count + 1)]
        tokens += [MARKER, *words(4)]
    media = {}
    if places:
        positions, items, tiles = torch.tensor(places).unbind(1)
        values = 20 * torch.randn(len(places), BINS, FRAMES, generator=generator) - 30
        no_tags = torch.zeros(len(places), 0, dtype=torch.int64)
        media[AUDIO] = TextMedia(
            values, positions, items, tiles, -1, 1, ends=positions, tag_ids=no_tags
        )
    return Sample((Text(torch.tensor(tokens), torch.ones(len(tokens)), media),), number, "s")


def hidden_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch, output="hidden")


def louder(batch: Batch, clip: int) -> Batch:
    """The batch with other values in every window of a clip."""
    media = batch.media[AUDIO]
    values = torch.where((media.items == clip)[:, None, None], -media.values, media.values)
    return batch.replace(media={AUDIO: dataclasses.replace(media, values=values)})


@pytest.mark.parametrize("packed", [False, True])
def test_words_before_the_first_clip_hear_it(packed: bool) -> None:
    samples = [sample([2, 1]), sample([], 1), sample([3], 2)]
    batch = collate(samples, pad_id=0, packed=packed)
    spans = query_spans(batch.media[AUDIO], batch, "preceding_or_first")
    rows = [[[0, 2]] * 7 + [[0, 3]] * 5, [[0, 0]] * 2, [[3, 6]] * 7]
    for number, row in enumerate(rows):
        start = sum(map(len, rows[:number])) if packed else 0
        column = spans[start : start + len(row), 0 if packed else number].tolist()
        assert column == row


@pytest.mark.usefixtures("world")
def test_a_clip_changes_nothing_before_it() -> None:
    """Through the whole model: from its own marker on every position changes, none before."""
    model = model_of(tiny())
    batch = collate([sample([2, 1, 4])], pad_id=0)
    before = hidden_of(model, batch)
    for clip, start in enumerate([0, 7, 12]):
        after = hidden_of(model, louder(batch, clip))
        changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == list(range(start, 17)), clip


@pytest.mark.usefixtures("world")
def test_with_the_released_codes_scope_a_later_clip_changes_earlier_text() -> None:
    """The hazard that scope=clip takes away: text hears what comes after it."""
    config = tiny()
    config["encoders"]["audio"]["connector"]["scope"] = "text"
    model = model_of(config)
    batch = collate([sample([2, 1, 4])], pad_id=0)
    assert not torch.equal(hidden_of(model, batch)[:3], hidden_of(model, louder(batch, 2))[:3])


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("scope", ["clip", "text"])
def test_packed_neighbours_hear_nothing_of_each_other(scope: str) -> None:
    config = tiny()
    config["encoders"]["audio"]["connector"]["scope"] = scope
    model = model_of(config)
    samples = [sample([2, 1]), sample([], 1), sample([3], 2)]
    packed = hidden_of(model, collate(samples, pad_id=0, packed=True))
    alone = torch.cat([hidden_of(model, collate([s], pad_id=0)) for s in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("world")
def test_layers_over_windows_are_torchs_post_norm_layers() -> None:
    """torch.nn's encoder layer without attention biases; each clip by itself."""
    [chunk] = Parallel().chunks(Precision())
    sizes = {"num_layers": 2, "num_heads": 4, "head_size": 8, "ffn_size": 48}
    ours = WindowTransformer(**sizes, input_size=32, output_size=32, chunk=chunk)
    generator = torch.Generator().manual_seed(1)
    theirs = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 4, 48, 0.0, layer_norm_eps=1e-6, batch_first=True), 2
    )
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        for parameter in layer.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        qkv = (layer.query, layer.key, layer.value)
        other.self_attn.in_proj_weight.data = torch.cat([x.weight for x in qkv]).detach()
        other.self_attn.in_proj_bias.data.zero_()
        other.self_attn.out_proj.bias.data.zero_()
        pairs = [(other.self_attn.out_proj, layer.proj), (other.norm1, layer.attention_norm)]
        pairs += [(other.linear1, layer.fc1), (other.linear2, layer.fc2)]
        for target, source in [*pairs, (other.norm2, layer.ffn_norm)]:
            target.weight.data = source.weight.detach()
            if source.bias is not None:
                target.bias.data = source.bias.detach()
    features = torch.randn(5, 1, 32, generator=generator)
    items = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [1, 2, 3, 1, 1]])
    place = torch.tensor([0.0, 1, 2])
    angles = place[:, None] / 10_000 ** (torch.arange(0, 32, 2) / 32)
    table = torch.zeros(3, 32)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    out = ours(features, (1, 1), items)
    for first, last in ((0, 3), (3, 4), (4, 5)):
        x = features[first:last, 0] * 32**0.5 + table[: last - first]
        x = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
        torch.testing.assert_close(out[first:last, 0], theirs(x[None])[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 x 4 features a window has no layers over windows"):
        ours(features, (1, 4), items)
    inside = ours.flops(5, (1, 1), "frozen", items)
    assert ours.flops(5, (1, 1), "frozen") - inside == 2 * 2 * 2 * 32 * (25 - 11)


@pytest.mark.usefixtures("world")
def test_attention_over_windows_drops_out_in_training_alone() -> None:
    """Every draw is another, their mean is near what evaluation gives, and 1 is refused."""
    [chunk] = Parallel().chunks(Precision())
    sizes = {"num_layers": 1, "num_heads": 2, "head_size": 8, "ffn_size": 16}
    sizes |= {"input_size": 16, "output_size": 16}
    plain = WindowTransformer(**sizes, chunk=chunk)
    ours = WindowTransformer(**sizes, attention_dropout=0.1, chunk=chunk)
    generator = torch.Generator().manual_seed(3)
    for parameter, other in zip(plain.parameters(), ours.parameters(), strict=True):
        other.data = parameter.data.normal_(0, 0.5, generator=generator)
    features = torch.randn(6, 1, 16, generator=generator)
    expected = plain.train()(features, (1, 1))
    assert torch.equal(ours.eval()(features, (1, 1)), expected)
    ours.train()
    torch.manual_seed(5)
    drawn = torch.stack([ours(features, (1, 1)) for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    scale = (drawn - expected).abs().mean()
    assert 0 < (drawn.mean(0) - expected).abs().mean() < scale
    with pytest.raises(ValueError, match=r"attention_dropout=1\.0 must be at least 0 and less"):
        WindowTransformer(**sizes, attention_dropout=1.0, chunk=chunk)


@pytest.mark.usefixtures("world")
def test_cached_generation_equals_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 1, 2 and 5 clips and of none, padded on the left: new tokens hear all clips."""
    model = model_of(tiny())
    prompts = [sample(clips, i) for i, clips in enumerate([[2], [1, 3], [1, 2, 1, 1, 2], []])]
    same_logits_with_a_cache(model, prompts, monkeypatch)


@pytest.mark.usefixtures("world")
def test_another_decoder_is_a_choice_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2's kind, with RoPE, GQA and SwiGLU: the blocks keep their own feed-forward part."""
    model = model_of(tiny(language="tiny"))
    assert model.language.rotary is not None and model.config.gated_linear_unit
    block = model.decoder.layers[0].cross_attention_block
    assert block.ffn.linear_fc1.weight.shape == (512, 128)
    prompts = [sample(clips, i) for i, clips in enumerate([[2, 1], []])]
    same_logits_with_a_cache(model, prompts, monkeypatch)


@pytest.mark.usefixtures("world")
def test_closed_gates_leave_the_language_model() -> None:
    model = model_of(tiny(initial_gate=0.0))
    batch = collate([sample([2, 1])], pad_id=0)
    assert torch.equal(hidden_of(model, batch), hidden_of(model, louder(batch, 0)))


@pytest.mark.usefixtures("world")
def test_full_sizes_have_the_published_counts() -> None:
    """36.7 M a block and 881 M in 24 of them, 25.2 M over the windows, OPT-1.3B: 2.25 B."""
    model = build("audio_flamingo")

    def count(start: str, inside: str = "") -> int:
        named = model.named_parameters()
        return sum(p.numel() for n, p in named if n.startswith(start) and inside in n)

    block = 2048 * 512 * 2 + 1024 * 1024 + 2 * 2048 * 8192 + 4 * 2048 + 2
    assert count("language.", ".cross_attention_block.") == 24 * block == 881_000_496
    layers = 3 * (4 * 1024**2 + 2 * 1024 * 2048 + 2048 + 5 * 1024) + 2 * 1024
    assert count("audio_connector.") == layers == 25_189_376
    # 32 rows of the embedding are padding.
    opt = count("language.") - 24 * block
    assert opt - 32 * 2048 == 1_315_758_080, "facebook/opt-1.3b's"
    assert count("audio.") == 29_371_672
    assert count("") == 2_251_385_160


@pytest.mark.usefixtures("world")
def test_full_size_flops_are_those_of_its_matrices() -> None:
    """A clip of 10 s (3 windows) and 60 tokens, forward: every weight once a token or window."""
    model = build("audio_flamingo").requires_grad_(False)
    text = sample([3]).text
    media = dataclasses.replace(text.media[AUDIO], values=torch.zeros(3, 64, 700))
    tokens = torch.cat([text.tokens, torch.zeros(60 - len(text.tokens), dtype=torch.int64)])
    batch = collate([Sample((Text(tokens, torch.ones(60), {AUDIO: media}),))], pad_id=0)
    flops = model.flops(batch)
    decoder = 24 * (4 * 2048**2 + 2 * 2048 * 8192) * 60 + 24 * 2 * 2048 * (60 * 60 / 2)
    output = 50272 * 2048 * 60
    block = (2 * 2048 * 512 + 2 * 2048 * 8192) * 60 + 1024 * 1024 * 3 + 2 * 512 * 60 * 3
    expected = 2.0 * (decoder + output + 24 * block)
    assert flops["language"] == pytest.approx(expected, rel=2e-3)
    windows = 3 * (4 * 1024**2 + 2 * 1024 * 2048) * 3 + 3 * 2 * 1024 * 9
    assert flops["audio"] == model.audio.flops(media.values, "frozen") + 2.0 * windows


@pytest.mark.usefixtures("world")
def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_size=32 must be 64, the width of the encoder's"):
        model_of(tiny(kv_size=32))
    config = tiny(kv_size=256)
    config["encoders"]["audio"]["encoder"]["projection_size"] = 256
    with pytest.raises(
        ValueError, match="kv_size=256 must be at most the decoder's hidden_size=128"
    ):
        model_of(config)


@pytest.mark.usefixtures("world")
def test_sounds_in_the_sequence_are_refused_where_features_have_another_width() -> None:
    model = model_of(tiny())
    batch = collate([sample([2])], pad_id=0)
    placed = batch.replace(media={MediaKind("audio"): batch.media[AUDIO]})
    with pytest.raises(ValueError, match=r"give audio \(sequence\), which model\._target_=Cross"):
        model(placed, output="hidden")


@pytest.mark.usefixtures("world")
def test_a_step_counts_samples_sounds_windows_and_flops() -> None:
    """What metrics.jsonl has: three samples, two of them with sounds, of 3 and 3 windows."""
    from nvmm.training.accounting import Accounting

    class Uncounted:
        """Data without counters of its own."""

        def counter_names(self, modalities: Any) -> list[str]:
            return []

        def count(self, batches: Any, modalities: Any) -> dict[str, float]:
            return {}

    model = model_of(tiny())
    batch = collate([sample([2, 1]), sample([], 1), sample([3], 2)], pad_id=0)
    counts = Accounting(Uncounted(), model, None).count([batch])  # type: ignore[arg-type]
    assert (counts["samples"], counts["audio.items"], counts["audio.tiles"]) == (3, 3, 6)
    media = batch.media[AUDIO]
    encoder, connector = model.encoders["audio"]
    expected = encoder.flops(media.values, "trained")
    alone = [connector.flops(n, (1, 1), "trained", torch.zeros(3, n).long()) for n in (2, 1, 3)]
    assert counts["flops/audio"] == pytest.approx(expected + sum(alone))
    assert expected > sum(alone) > 0
    text = Accounting(Uncounted(), model, None).count(  # type: ignore[arg-type]
        [collate([sample([], 1)], pad_id=0)]
    )
    assert text["flops/audio"] == text["audio.tiles"] == 0 < text["flops/language"]
