"""CLAP's audio encoder: sizes that do not fit, FLOPs, the shift's mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nvmm.modules.encoders.htsat import HTSAT, relative_index, shift_bias
from nvmm.parallel.setup import Parallel, Precision

TINY: dict[str, Any] = {
    **{"num_mel_bins": 16, "picture": 32, "patch_size": 4, "hidden_size": 8, "depths": (2, 2)},
    **{"num_heads": (2, 4), "window_size": 4, "projection_size": 24},
}


def encoder(**changes: Any) -> HTSAT:
    [chunk] = Parallel().chunks(Precision())
    return HTSAT(**{**TINY, **changes}, chunk=chunk).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2,)}, r"depths=\[2\] and num_heads=\[2, 4\] must be lists of one length"),
        ({"num_mel_bins": 12}, "picture=32 must be a multiple of num_mel_bins=12"),
        ({"picture": 48}, r"picture=48 must be a multiple of patch_size \* window_size \*"),
        ({"num_heads": (3, 4)}, "3 must divide the stage's width 8"),
        ({"projection": "mlp"}, "projection=mlp"),
    ],
)
@pytest.mark.usefixtures("world")
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**changes)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("projection", ["none", "laion", "clapcap"])
def test_flops_are_those_that_torch_counts(projection: str) -> None:
    model = encoder(projection=projection)
    windows = torch.randn(3, 16, 64)
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel, FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(windows)
    assert out.shape == (3, 1, 16 if projection == "none" else 24)
    assert model.flops(windows, "frozen") == counter.get_total_flops()
    assert model.flops(windows, "trained") == 3 * counter.get_total_flops()


@pytest.mark.usefixtures("world")
def test_windows_of_other_sizes_are_refused_and_short_ones_stretched() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"12 bins x 64 frames must have .*num_mel_bins=16"):
        model(torch.zeros(1, 12, 64))
    with pytest.raises(ValueError, match="at most 64 frames"):
        model(torch.zeros(1, 16, 65))
    assert model(torch.zeros(1, 16, 50)).shape == (1, 1, 24)


def test_pairs_of_one_offset_share_a_bias_and_shifted_neighbours_are_apart() -> None:
    index = relative_index(3)
    assert index[0, 1] == index[4, 5] == index[7, 8] != index[1, 0]
    assert index[0, 3] == index[2, 5] and len(index.unique()) == 25
    bias = shift_bias(4, 2, 1)
    assert bias.shape == (4, 4, 4) and not bias[0].any()
    # The last window holds the picture's four corners.
    assert bias[3].eq(0).tolist() == torch.eye(4).bool().tolist()
