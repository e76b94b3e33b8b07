"""BERT-like encoders against Transformers' BertModel, their sizes and global names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.convert.formats import bert
from nvmm.convert.sources import read
from nvmm.convert.table import ToOurs
from nvmm.models.bidirectional import BidirectionalEncoder
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.models.parameter_names import build, golden_path, parameter_names
from tests.modules.test_pooling import batch_of

pytestmark = pytest.mark.usefixtures("world")
LENGTHS = (7, 12, 3)


@pytest.mark.parametrize("name", ["bert_base", "bert_tiny", "minilm_l6"])
def test_golden_parameter_names(name: str, request: pytest.FixtureRequest) -> None:
    names = parameter_names(name)
    path = golden_path(name)
    if request.config.getoption("--golden"):
        path.write_text("\n".join(names) + "\n")
    assert path.read_text().splitlines() == names


@pytest.mark.parametrize(("name", "count"), [("bert_base", 108_891_648), ("minilm_l6", 22_565_376)])
def test_configured_encoders_have_the_published_sizes(name: str, count: int) -> None:
    """As many parameters as Transformers' BertModel has without its pooler, and padding rows."""
    from transformers import BertConfig, BertModel

    model = build(name)
    padding = (model.embedding.word_embeddings.num_embeddings - 30522) * model.config.hidden_size
    assert sum(p.numel() for p in model.parameters()) - padding == count
    sizes = bert.from_model(config_of(name))
    with torch.device("meta"):
        theirs = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    assert sum(p.numel() for p in theirs.parameters()) == count
    source = Given(theirs.state_dict())
    converted = ToOurs(source, bert.table(config_of(name), bert.complete(sizes, source.spec)))
    assert {f"{key} {list(value.shape)}" for key, value in converted.spec.items()} == set(
        golden_path(name).read_text().splitlines()
    )


def config_of(name: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nvmm.config.check import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(f"model/{name}")["model"], resolve=True)


def pair(pooling: str = "CLS", **changes: Any) -> tuple[Any, BidirectionalEncoder]:
    """A random BertModel, and ours with its weights."""
    from transformers import BertConfig, BertModel

    config = tiny.bidirectional(pooling, **changes)
    hf = bert.from_model(config)
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(**hf), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = Given(theirs.state_dict())
    hf = bert.complete(hf, source.spec)
    converted = ToOurs(source, bert.table(config, hf))
    [ours] = build_chunks(instantiate(config, _convert_="all"), Parallel(), Precision())
    ours.load_state_dict({name: read(converted, name) for name in converted.spec}, strict=False)
    return theirs, ours.eval()


class Given:
    """Tensors in memory as a source."""

    def __init__(self, spec: dict[str, Tensor]) -> None:
        self.spec = spec

    def blocks(self, name: str) -> Any:
        yield self.spec[name]


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 150, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_and_vectors_equal_transformers(packed: bool) -> None:
    """Rows padded to 15 or packed with padding behind them, with token types of both kinds."""
    theirs, ours = pair()
    rows = rows_of()
    width = 15 if not packed else sum(LENGTHS) + 4
    batch = batch_of(rows, [0, 0, 0], packed=packed, width=width)
    types = torch.randint(0, 2, batch.tokens.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        hidden = ours(batch, output="hidden", token_types=types).transpose(0, 1)
        vectors = ours(batch, token_types=types)
        start = 0
        for number, row in enumerate(rows):
            place = (0, slice(start, start + len(row))) if packed else (number, slice(len(row)))
            expected = theirs(input_ids=row[None], token_type_ids=types[place][None])
            expected = expected.last_hidden_state[0]
            torch.testing.assert_close(hidden[place], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(vectors[number], expected[0], atol=1e-5, rtol=0)
            start += len(row)


@pytest.mark.parametrize("normalize", [False, True])
def test_means_equal_transformers_with_a_mask(normalize: bool) -> None:
    theirs, ours = pair("Mean", normalize=normalize)
    batch = batch_of(rows_of(), [0, 0, 0])
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        hidden = theirs(input_ids=batch.tokens, attention_mask=mask).last_hidden_state
        expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(ours(batch), expected, atol=1e-5, rtol=0)


def test_gradients_equal_transformers_and_none_flow_without_grad() -> None:
    theirs, ours = pair()
    batch = batch_of(rows_of(), [0, 0, 0])
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    weights = torch.randn(3, ours.config.hidden_size, generator=torch.Generator().manual_seed(5))
    hidden = theirs(input_ids=batch.tokens, attention_mask=mask).last_hidden_state
    (hidden[:, 0] * weights).sum().backward()
    (ours(batch) * weights).sum().backward()
    for name, theirs_name in {
        "embedding.position_embeddings.weight": "embeddings.position_embeddings.weight",
        "embedding.layernorm.bias": "embeddings.LayerNorm.bias",
        "decoder.layers.0.post_mlp_layernorm.weight": "encoder.layer.0.output.LayerNorm.weight",
        "decoder.layers.1.mlp.linear_fc1.weight": "encoder.layer.1.intermediate.dense.weight",
    }.items():
        expected = theirs.get_parameter(theirs_name).grad
        torch.testing.assert_close(ours.get_parameter(name).grad, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not ours(batch).requires_grad


def test_a_text_longer_than_the_positions_is_refused() -> None:
    _, ours = pair(max_sequence_length=8)
    ours(batch_of(rows_of((8, 3)), [0, 0], width=16))  # padding may be longer
    with pytest.raises(ValueError, match=r"9 tokens.*model\.max_sequence_length=8"):
        ours(batch_of(rows_of((9, 3)), [0, 0]))


def test_flops_are_those_of_the_layers_with_the_whole_attention() -> None:
    _, ours = pair()
    n, h, f = 12, ours.config.hidden_size, ours.config.ffn_hidden_size
    batch = batch_of(rows_of((n,)), [0])
    forward = ours.config.num_layers * (2 * n * (4 * h * h + 2 * h * f) + 4 * n * n * h)
    assert ours.flops(batch) == {"language": 3.0 * forward}
    ours.requires_grad_(False)
    assert ours.flops(batch) == {"language": forward}


def test_keys_are_those_of_the_constructor() -> None:
    """A field of the decoder's that these layers would not read is refused."""
    from nvmm.config.rules.all import violations

    config = {"model": tiny.bidirectional()}
    for name, value in {"no_rope_freq": 2, "qk_layernorm": True, "window_size": [4, 0]}.items():
        changed = {"transformer": config["model"]["transformer"] | {name: value}}
        problems = [p.key for p in violations({"model": config["model"] | changed})]
        assert f"model.transformer.{name}" in problems
    assert "rotary_base" not in inspect.signature(BidirectionalEncoder).parameters
