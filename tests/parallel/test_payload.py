"""Named tensors behind the hidden states: there and back, with their gradients."""

import pytest
import torch

from nvmm.parallel.payload import pack, unpack


def test_what_is_packed_comes_out_and_gradients_come_back() -> None:
    hidden, media, more = (torch.randn(n, 2, 3, requires_grad=True) for n in (5, 4, 1))
    packed = pack(hidden, {"media": media, "more": more})
    assert packed.shape == (10, 2, 3) and packed._base is None
    states, tensors = unpack(packed, {"media": 4, "more": 1})
    assert torch.equal(states, hidden)
    assert torch.equal(tensors["media"], media) and torch.equal(tensors["more"], more)
    (2 * states.sum() + 3 * tensors["media"].sum()).backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
    assert media.grad is not None and torch.equal(media.grad, torch.full_like(media, 3.0))
    assert more.grad is not None and not more.grad.any()


def test_nothing_to_carry_is_the_hidden_states_alone() -> None:
    hidden = torch.randn(5, 2, 3)
    states, tensors = unpack(pack(hidden, {}), {"media": 0})
    assert torch.equal(states, hidden) and tensors["media"].shape == (0, 2, 3)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 1, 3), torch.zeros(4, 2, 5), torch.zeros(4, 2, 3).bfloat16()]
)
def test_another_batch_width_or_type_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="payload media is"):
        pack(torch.zeros(5, 2, 3), {"media": tensor})


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="4 rows arrived"):
        unpack(torch.zeros(4, 2, 3), {"media": 4})
