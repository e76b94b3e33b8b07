"""The score of a text is read at its last valid token; sizes and names of the configured models."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from nvmm.batch import Batch, Sample, Text
from nvmm.config.rules.all import violations
from nvmm.data.collate import collate
from nvmm.modules.lora import Lora
from nvmm.parallel.parameters import build_chunks
from nvmm.parallel.setup import Parallel, Precision
from tests import tiny
from tests.models.parameter_names import build, golden_path, parameter_names

pytestmark = pytest.mark.usefixtures("world")
PAD = 7


def texts(*lengths: int) -> list[Text]:
    """Texts whose last token is the padding's."""
    rows = [torch.arange(n) * 37 % 500 for n in lengths]
    return [Text(torch.cat([row[:-1], torch.tensor([PAD])]), torch.zeros(len(row))) for row in rows]


def batch_of(found: list[Text], **options: object) -> Batch:
    return collate([Sample((text,)) for text in found], pad_id=PAD, **options)  # type: ignore[arg-type]


def scores(model: torch.nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch)
    return found


def test_neither_padding_nor_company_changes_a_score() -> None:
    """Alone, in a padded batch, packed, and behind padding of other ids."""
    [model] = build_chunks(
        instantiate(tiny.reward(), _convert_="all"), Parallel(), Precision(), seed=1
    )
    given = texts(9, 4, 12, 1)
    alone = torch.cat([scores(model, batch_of([text])) for text in given])
    assert alone.shape == (4, 3) and alone.dtype == torch.float32
    padded = batch_of(given, pad_multiple=16)
    garbage = padded.tokens.clone()
    beyond = torch.arange(16) >= padded.lengths[:, None]
    garbage[beyond] = 99
    for batch in (
        padded,
        padded.replace(tokens=garbage),
        batch_of(given, packed=True),
        batch_of(given, packed=True, pad_multiple=32, segment_multiple=4),
    ):
        torch.testing.assert_close(scores(model, batch), alone, atol=1e-6, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_there_is_no_other_output() -> None:
    [model] = build_chunks(instantiate(tiny.reward(), _convert_="all"), Parallel(), Precision())
    for output in ("loss", "logits"):
        with pytest.raises(ValueError, match=f"has scores, and no output '{output}'"):
            model(batch_of(texts(4)), output=output)
    with pytest.raises(ValueError, match=r"model\.num_outputs=0 must be at least 1"):
        instantiate(tiny.reward(0), _convert_="all")(chunk=Parallel().chunks(Precision())[0])


def test_golden_parameter_names(request: pytest.FixtureRequest) -> None:
    names = parameter_names("reward_tiny")
    path = golden_path("reward_tiny")
    if request.config.getoption("--golden"):
        path.write_text("\n".join(names) + "\n")
    assert path.read_text().splitlines() == names
    assert "head.weight [9, 128]" in names
    assert not any(line.startswith(("output_layer", "head.bias")) for line in names)


@pytest.mark.parametrize(
    ("name", "embedding", "decoder", "head"),
    [
        # 2402.16819 and 2406.11704: all but the output layer, whose rows are the embedding's.
        ("nemotron4_15b_reward", 1_572_864_000, 12_483_047_424, 9 * 6144),
        ("nemotron4_340b_reward", 4_718_592_000, 331_592_011_776, 9 * 18432),
        ("llama3_8b_reward", 128256 * 4096, 8_030_261_248 - 2 * 128256 * 4096, 4096),
    ],
)
def test_published_sizes(name: str, embedding: int, decoder: int, head: int) -> None:
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == embedding + decoder + head


def test_flops_are_those_of_the_decoder_without_its_output_layer() -> None:
    def count(config: dict, lora: Lora | None = None) -> float:
        adapt = None if lora is None else lora.attach
        chunks = build_chunks(
            instantiate(config, _convert_="all"), Parallel(), Precision(), adapt=adapt
        )
        if lora is not None:
            lora.freeze(chunks)
        return chunks[0].flops(batch_of(texts(9, 4)))["language"]

    whole = count(tiny.reward())
    logits, head = 3 * 2 * 64 * 509 * 13, 3 * 2 * 64 * 3 * 2
    assert whole == count(tiny.language()) - logits + head
    assert count(tiny.reward(), Lora(["decoder.*linear*"], train=["head.*"])) < 0.75 * whole


def test_model_objective_and_data_fit_before_torch_is_imported() -> None:
    def problems(**changes: object) -> list[str]:
        config = {
            "model": tiny.reward(2),
            "objective": {
                "_target_": "nvmm.objectives.reward.Regression",
                "attributes": ["a", "b"],
            },
            "data": {"train": {"build": {"attributes": ["a", "b"]}}},
        }
        return [str(problem) for problem in violations(config | changes)]

    assert problems() == []
    [wrong] = problems(model=tiny.language())
    assert "Regression needs a model with num_outputs; model._target_=nvmm.models.lang" in wrong
    [wrong] = problems(objective={"_target_": "nvmm.objectives.next_token.NextToken"})
    assert "model.num_outputs=2 needs an objective of scores" in wrong
    [wrong] = problems(data={"train": {"build": {"attributes": ["a"]}}})
    assert "model.num_outputs=2 must be 1, as many as data.train.build.attributes lists" in wrong
    pairs = {"_target_": "nvmm.objectives.reward.BradleyTerry"}
    [wrong] = problems(objective=pairs | {"index": 2})
    assert "objective.index=2 must be below model.num_outputs=2" in wrong
    [wrong] = problems(objective=pairs | {"weights": [1.0]})
    assert "must be 1, as many as objective.weights lists" in wrong
