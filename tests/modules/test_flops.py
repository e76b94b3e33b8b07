import pytest
import torch

from nvmm.batch import Batch
from nvmm.modules.flops import (
    connector_flops,
    encoder_flops,
    language_flops,
    latent_attention_flops,
    segment_lengths,
    training_of,
)
from nvmm.training.metrics import peak_flops

NEMOTRON_340B = dict(
    num_layers=96,
    hidden_size=18432,
    num_attention_heads=96,
    num_query_groups=8,
    kv_channels=192,
    ffn_hidden_size=73728,
)
NEMOTRON_15B = dict(
    num_layers=32,
    hidden_size=6144,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    ffn_hidden_size=24576,
)


@pytest.mark.parametrize(
    ("sizes", "sequences", "gpus", "seconds", "derived", "printed"),
    [
        (NEMOTRON_340B, 768, 1536, 10.3, 42.3, 42.4),
        (NEMOTRON_340B, 1536, 3072, 10.3, 42.3, 42.3),
        (NEMOTRON_340B, 2304, 6144, 8.0, 40.9, 41.0),
        (NEMOTRON_15B, 384, 768, 0.57, 34.1, 34.3),
        (NEMOTRON_15B, 768, 1536, 0.58, 33.6, 33.3),
        (NEMOTRON_15B, 1152, 2304, 0.64, 30.4, 30.5),
    ],
)
def test_nemotron_4_mfu_tables(sizes, sequences, gpus, seconds, derived, printed):
    """Tables of 2406.11704 and 2402.16819; their seconds are rounded, hence the 0.3."""
    flops = sequences * language_flops(
        **sizes,
        gated_linear_unit=False,
        vocab_size=256000,
        segment_lengths=[4096],
        causal_attention_factor=1.0,
    )
    percent = 100 * flops / (seconds * gpus * peak_flops(torch.bfloat16, "NVIDIA H100 80GB HBM3"))
    assert round(percent, 1) == derived
    assert percent == pytest.approx(printed, abs=0.35)


TINY = dict(
    num_layers=1,
    hidden_size=4,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=3,
    ffn_hidden_size=5,
)
# By hand: q 4x6, k and v 4x3 each, proj 6x4, gate + up + down 3x(4x5) = 132 weights.
WEIGHTS = 132


def test_language_flops_by_hand():
    def count(**kwargs):
        return language_flops(
            **TINY, gated_linear_unit=True, vocab_size=7, segment_lengths=[10], **kwargs
        )

    linear = 2 * (WEIGHTS + 4 * 7) * 10
    attention = 4 * 6 * 10**2 // 2
    assert count(training="frozen") == linear + attention
    assert count(training="passed") == 2 * linear + 3 * attention
    assert count(training="trained") == 3 * (linear + attention)


def test_attention_is_quadratic_in_each_segment_alone():
    def count(lengths):
        return language_flops(
            **TINY, gated_linear_unit=True, vocab_size=7, segment_lengths=lengths, training="frozen"
        )

    assert count([10]) - count([4, 6]) == 4 * 6 * (100 - 16 - 36) / 2


def test_a_window_takes_off_what_lies_further_back():
    def count(windows):
        return language_flops(
            **TINY | {"num_layers": 2},
            gated_linear_unit=True,
            vocab_size=7,
            segment_lengths=[10, 3],
            windows=windows,
            training="frozen",
        )

    # One layer of the two sees 4 keys: of 10 tokens a triangle of 10 - 4 is left out, of 3 none.
    assert count([None, None]) - count([4, None]) == 4 * 6 * 6**2 / 2
    assert count([]) == count([None, None]) == count([10, 12])


def test_encoder_flops_by_hand():
    tokens, front_end = 2 * 2 + 1, 2 * 3 * 16 * 4 * 4
    flops = encoder_flops(
        **TINY,
        gated_linear_unit=False,
        num_tokens=tokens,
        front_end=front_end,
        num_tiles=3,
        training="frozen",
    )
    layer = 2 * (WEIGHTS - 20) * tokens + 4 * 6 * tokens**2
    assert flops == 3 * (layer + front_end)


def test_connector_flops():
    two = connector_flops(
        input_size=4, hidden_size=5, output_size=6, num_tokens=2, training="frozen"
    )
    one = connector_flops(input_size=4, hidden_size=None, output_size=6, num_tokens=2)
    assert two == 2 * (4 * 5 + 5 * 6) * 2
    assert one == 3 * 2 * (4 * 6) * 2


def test_latent_attention_flops_by_hand():
    sizes = dict(num_latents=5, num_heads=2, head_dim=3, ffn_hidden_size=7, hidden_size=4)
    forward = latent_attention_flops(**sizes, num_tokens=10, training="frozen")
    # q and proj 4x6, fc1 4x14 and fc2 7x4 for a token; k and v 4x6 for a latent.
    linear = 2 * (2 * 24 + 84) * 10 + 2 * (2 * 24) * 5
    assert forward == linear + 4 * 6 * 5 * 10
    assert latent_attention_flops(**sizes, num_tokens=10) == 3 * forward
    nv_embed = dict(num_latents=512, num_heads=8, head_dim=4096, ffn_hidden_size=16384)
    more = [latent_attention_flops(**nv_embed, hidden_size=4096, num_tokens=n) for n in (0, 1)]
    weights = 2 * 4096 * 32768 + 3 * 4096 * 16384
    assert more[1] - more[0] == 3 * (2 * weights + 4 * 32768 * 512)


def part(*trained: bool) -> torch.nn.Module:
    """A module of as many layers, of which some are trained."""
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in trained))
    for layer, is_trained in zip(module, trained, strict=True):
        layer.requires_grad_(is_trained)
    return module


def test_a_frozen_part_passes_gradients_only_to_what_is_trained_in_front_of_it() -> None:
    assert training_of(part(True, False), behind=False) == "trained"
    assert training_of(part(False, False), behind=True) == "passed"
    assert training_of(part(False, False), behind=False) == "frozen"


def test_segment_lengths_leave_padding_out():
    def batch(lengths, cu_seqlens=None):
        shape = (len(lengths), 8)
        zeros = torch.zeros(shape, dtype=torch.int64)
        if cu_seqlens is not None:
            zeros = zeros[:1]
        return Batch(
            tokens=zeros,
            labels=zeros,
            loss_mask=zeros.float(),
            position_ids=zeros,
            lengths=torch.tensor(lengths, dtype=torch.int32),
            sample_ids=torch.arange(len(lengths)),
            owners=torch.arange(len(lengths)),
            cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
        )

    assert segment_lengths(batch([8, 3])) == [8, 3]
    assert segment_lengths(batch([2, 4, 0], [0, 2, 6, 8])) == [2, 4]
    assert segment_lengths(batch([1, 4, 0], [0, 2, 6, 8])) == [1, 4]
    assert segment_lengths(batch([2, 6], [0, 2, 8])) == [2, 6]
