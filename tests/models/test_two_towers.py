"""Two towers against the single encoder; how a batch is divided; names and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.batch import NEGATIVE, POSITIVE, QUERY, Batch, Sample, Text
from nvmm.data.collate import collate
from nvmm.models.two_towers import take
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.models.parameter_names import build, golden_path, parameter_names

pytestmark = pytest.mark.usefixtures("world")
ROLES = (QUERY, POSITIVE, NEGATIVE, POSITIVE, QUERY)


@pytest.mark.parametrize("name", ["dragon", "two_towers_tiny"])
def test_golden_parameter_names(name: str, request: pytest.FixtureRequest) -> None:
    """Those of the encoder, once behind `query.` and once behind `context.`."""
    names = parameter_names(name)
    path = golden_path(name)
    if request.config.getoption("--golden"):
        path.write_text("\n".join(names) + "\n")
    assert path.read_text().splitlines() == names
    one = parameter_names({"dragon": "bert_base", "two_towers_tiny": "bert_tiny"}[name])
    assert names == [f"{tower}.{line}" for tower in ("query", "context") for line in one]


def test_dragon_has_the_size_of_two_encoders() -> None:
    model, one = build("dragon"), build("bert_base")
    count = sum(parameter.numel() for parameter in one.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * count
    assert count - 70 * 768 == 108_891_648  # without the padding of the vocabulary


def chunk(config: dict[str, Any], seed: int = 1) -> Any:
    constructor = instantiate(config, _convert_="all")
    return build_chunks(constructor, Parallel(), Precision("fp64"), seed=seed)[0]


def batch_of(roles: tuple[int, ...], packed: bool = False, multiple: int = 1) -> Batch:
    """Texts of 5, 6, 7 ... tokens, each a sample."""
    generator = torch.Generator().manual_seed(3)
    samples = [
        Sample(
            (
                Text(
                    torch.randint(0, 500, (5 + number,), generator=generator),
                    torch.ones(5 + number),
                    extras={"role": torch.tensor(role), "pool_from": torch.tensor(number % 3)},
                ),
            ),
            number,
        )
        for number, role in enumerate(roles)
    ]
    return collate(samples, pad_id=0, packed=packed, pad_multiple=multiple)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("roles", [ROLES, (QUERY,) * 3, (POSITIVE, NEGATIVE)], ids=str)
@pytest.mark.parametrize("kind", ["bidirectional", "decoder"])
def test_each_text_has_the_vector_of_its_role_s_encoder(
    kind: str, roles: tuple[int, ...], packed: bool
) -> None:
    """In the texts' order, whether a role is there or not."""
    language = tiny.embedder() if kind == "decoder" else tiny.bidirectional(**tiny.SYNTHETIC_WORDS)
    towers = chunk(tiny.two_towers(language)).eval()
    singles = {QUERY: chunk(language, seed=2), POSITIVE: chunk(language, seed=2)}
    singles[QUERY].load_state_dict(towers.query.state_dict())
    singles[POSITIVE].load_state_dict(towers.context.state_dict())
    batch = batch_of(roles, packed, multiple=4)
    found = towers(batch)
    for number, role in enumerate(roles):
        single = singles[QUERY if role == QUERY else POSITIVE].eval()
        torch.testing.assert_close(found[number], single(batch)[number], rtol=1e-6, atol=1e-6)
    assert len(found) == len(roles)
    if len({role == QUERY for role in roles}) == 2:
        alone = singles[QUERY](batch)
        assert not torch.allclose(found[1], alone[1], atol=1e-2), "the towers' weights differ"


def test_a_tower_without_texts_has_gradients_of_zero() -> None:
    towers = chunk(tiny.two_towers()).train()
    towers(batch_of((QUERY, QUERY))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in towers.parameters())
    assert not any(parameter.grad.any() for parameter in towers.context.parameters())
    assert any(parameter.grad.any() for parameter in towers.query.parameters())


def test_parts_of_a_packed_row_by_hand() -> None:
    """Five segments of 5, 6, 7, 8 and 9 tokens, and one of padding to a multiple of 8."""
    batch = batch_of(ROLES, packed=True, multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 18, 26, 35, 40]
    part = take(batch, torch.tensor([1, 3]), multiple=4, extras=("pool_from", "absent"))
    assert part.cu_seqlens.tolist() == [0, 6, 14, 16]
    assert part.lengths.tolist() == [6, 8, 0]
    assert part.position_ids[0].tolist() == [*range(6), *range(8), 0, 1]
    assert torch.equal(
        part.tokens[0, :14], torch.cat([batch.tokens[0, 5:11], batch.tokens[0, 18:26]])
    )
    assert part.owners.tolist() == [1, 3]
    assert part.extras.keys() == {"pool_from"} and part.extras["pool_from"].tolist() == [1, 0]
    assert part.tokens[0, 14:].tolist() == [0, 0] and not part.loss_mask[0, 14:].any()
    even = take(batch, torch.tensor([3]), multiple=4, extras=())
    assert even.cu_seqlens.tolist() == [0, 8] and even.lengths.tolist() == [8]
    rows = take(batch_of(ROLES), torch.tensor([0, 4]), multiple=4, extras=())
    assert rows.tokens.shape == (2, 9) and rows.lengths.tolist() == [5, 9]


def test_flops_are_those_of_each_text_once() -> None:
    """As much as one encoder computes, and less where a tower is frozen."""
    towers, single = chunk(tiny.two_towers()), chunk(tiny.two_towers()["language"])
    for packed in (False, True):
        batch = batch_of(ROLES, packed)
        assert towers.flops(batch) == pytest.approx(single.flops(batch))
    queries = single.flops(batch_of((QUERY,)))["language"]
    towers.context.requires_grad_(False)
    frozen = towers.flops(batch_of((QUERY, POSITIVE)))["language"]
    assert queries < frozen < single.flops(batch_of((QUERY, POSITIVE)))["language"]


def test_what_towers_do_not_take_is_named() -> None:
    towers = chunk(tiny.two_towers())
    batch = batch_of(ROLES)
    with pytest.raises(ValueError, match="need extras role"):
        towers(batch.replace(extras={}))
    with pytest.raises(ValueError, match="give output=embedding, not hidden"):
        towers(batch, output="hidden")
    with pytest.raises(ValueError, match="must be an embedder of texts alone"):
        chunk(tiny.two_towers(tiny.multimodal(language=tiny.embedder())))
    towers.variable_seq_lengths, towers.post_process = False, False
    with pytest.raises(ValueError, match="variable_seq_lengths=false must be true for packed"):
        towers(batch_of(ROLES, packed=True))
