"""Generation and scoring: the single rank without cache is the oracle."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE, Batch, Sample, Text, TextMedia
from nvmm.data.collate import collate
from nvmm.inference.decoding import (
    gather,
    generate,
    left_padded,
    score,
    score_continuations,
    share,
)
from nvmm.inference.sampling import choose
from tests.ranks import run_ranks

VOCAB = 61
PAD = 60
LENGTHS = (3, 9, 1, 6)
NEW = 7


def prompt(length: int, sample_id: int) -> Sample:
    generator = torch.Generator().manual_seed(100 + sample_id)
    tokens = torch.randint(0, PAD, (length,), generator=generator)
    return Sample((Text(tokens, torch.zeros(length)),), sample_id, f"prompt {sample_id}")


PROMPTS = [prompt(length, index) for index, length in enumerate(LENGTHS)]


def tiny_model(
    rank: int, world: int, init: str, tp: int = 1, pp: int = 1, dtype: Any = "fp32"
) -> list[Any]:
    from nvmm.parallel.setup import Parallel, Precision

    parallel = Parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nvmm.models.language import LanguageModel
    from nvmm.parallel.parameters import initialize

    transformer = functools.partial(
        TransformerConfig,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        init_method_std=0.3,
        window_size=(2, 0),
        window_attn_skip_freq=2,  # layers 1 and 3 have the window, 2 and 4 see everything
    )
    model = [
        LanguageModel(transformer, VOCAB, 64, max_sequence_length=16, chunk=chunk).eval()
        for chunk in parallel.chunks(Precision(dtype))
    ]
    initialize(model, 7)
    return model


def texts() -> list[Batch]:
    """Two padded batches of different widths, and one packed row with a padding segment."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, width in ((2, 11), (3, 5)):
        tokens = torch.randint(0, PAD, (rows, width + 1), generator=generator)
        mask = (torch.rand(rows, width, generator=generator) < 0.6).float() * 0.5
        mask[0, 2] = 1.0
        batches.append(
            Batch(
                tokens[:, :-1].contiguous(),
                tokens[:, 1:].contiguous(),
                mask,
                torch.arange(width).expand(rows, width),
                torch.full((rows,), width, dtype=torch.int32),
                torch.arange(rows),
                torch.arange(rows),
            )
        )
    first = batches[0]
    flat = [x.reshape(1, -1) for x in (first.tokens, first.labels, first.loss_mask)]
    padded = [torch.nn.functional.pad(x, (0, 4)) for x in flat]
    position_ids = torch.cat([torch.arange(11), torch.arange(11), torch.arange(4)])[None]
    batches.append(
        Batch(
            *padded,
            position_ids,
            torch.tensor([11, 11, 0], dtype=torch.int32),
            torch.arange(2),
            torch.arange(2),
            cu_seqlens=torch.tensor([0, 11, 22, 26], dtype=torch.int32),
        )
    )
    return batches


def everything(rank: int, world: int, init: str, tp: int, pp: int) -> dict[str, Any]:
    model = tiny_model(rank, world, init, tp, pp)
    ask = functools.partial(generate, model, max_new_tokens=NEW, pad_id=PAD, stop_ids=())
    greedy = ask(PROMPTS)
    stop = greedy[1][3]
    return {
        "greedy": greedy,
        "uncached": ask(PROMPTS, use_cache=False),
        "one by one": [ask([sample])[0] for sample in PROMPTS],
        "stopped": (stop, ask(PROMPTS, stop_ids=[stop])),
        "sampled": ask(PROMPTS, temperature=1.5, top_p=0.9, seed=5),
        "sampled again": ask(PROMPTS[2:], temperature=1.5, top_p=0.9, seed=5),
        "other seed": ask(PROMPTS, temperature=1.5, top_p=0.9, seed=6),
        "scores": score(model, texts()),
        "continuations": score_continuations(model, PROMPTS, CONTINUATIONS, pad_id=PAD).tolist(),
        "behind the prompt": score(
            model,
            [
                collate([followed(p, c) for c in CONTINUATIONS for p in PROMPTS], pad_id=PAD),
            ],
        ),
    }


CONTINUATIONS = ([5], [7, 30, 2], [7, 31], [40, 1, 1, 9])


def followed(sample: Sample, continuation: list[int]) -> Sample:
    """The prompt with a continuation behind it, which alone is supervised."""
    [text] = sample.texts
    tokens = torch.cat([text.tokens, torch.tensor(continuation)])
    weights = (torch.arange(len(tokens)) >= len(text.tokens)).float()
    return replace(sample, texts=(Text(tokens, weights),))


@functools.cache
def layout(tp: int, pp: int) -> list[dict[str, Any]]:
    return run_ranks(everything, tp * pp, tp, pp)


def test_the_cache_does_not_change_greedy_tokens() -> None:
    found = layout(1, 1)[0]
    assert [len(answer) for answer in found["greedy"]] == [NEW] * 4
    assert len({token for answer in found["greedy"] for token in answer}) > 5
    assert found["greedy"] == found["uncached"]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_continuations_share_the_cache_of_their_prompt(tp: int, pp: int) -> None:
    results = layout(tp, pp)
    count = len(PROMPTS)
    whole = [total for total, _ in layout(1, 1)[0]["behind the prompt"]]
    expected = torch.tensor(whole, dtype=torch.float64).view(-1, count).t()
    for rank in results:
        scores = torch.tensor(rank["continuations"], dtype=torch.float64)
        torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)


def too_long(rank: int, world: int, init: str) -> list[str]:
    model = tiny_model(rank, world, init)
    ask = functools.partial(generate, model, pad_id=PAD, stop_ids=())
    ask(PROMPTS, max_new_tokens=7)
    messages = []
    for call in (
        lambda: ask(PROMPTS, max_new_tokens=8),
        lambda: score(model, [collate([prompt(16, 4), prompt(17, 5)], pad_id=PAD)]),
    ):
        with pytest.raises(ValueError, match="max_sequence_length=16") as error:
            call()
        messages.append(str(error.value))
    score(model, [collate([prompt(16, 4)], pad_id=PAD)])
    return messages


def test_sequences_longer_than_the_model_s_are_refused() -> None:
    generated, scored = run_ranks(too_long, 1)[0]
    assert generated.startswith("sample 1: 9 tokens and max_new_tokens=8 are more than")
    assert scored.startswith("sample [4, 5]: 17 tokens are more than")


def test_a_ragged_batch_equals_one_by_one() -> None:
    found = layout(1, 1)[0]
    assert found["greedy"] == found["one by one"]


def test_generation_stops_before_a_stop_id() -> None:
    found = layout(1, 1)[0]
    stop, stopped = found["stopped"]
    for answer, full in zip(stopped, found["greedy"], strict=True):
        assert answer == (full[: full.index(stop)] if stop in full else full)
    assert len(stopped[1]) <= 3


def test_sampling_depends_on_seed_and_sample_alone() -> None:
    found = layout(1, 1)[0]
    assert found["sampled"][2:] == found["sampled again"]
    assert found["sampled"] != found["other seed"]
    assert found["sampled"] != found["greedy"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_layouts_equal_one_rank(tp: int, pp: int) -> None:
    expected = layout(1, 1)[0]
    for found in layout(tp, pp):
        scores = found["scores"]
        assert [count for _, count in scores] == [count for _, count in expected["scores"]]
        assert [total for total, _ in scores] == pytest.approx(
            [total for total, _ in expected["scores"]], rel=1e-5
        )
        for name in set(expected) - {"scores", "continuations", "behind the prompt"}:
            assert found[name] == expected[name], name


def losses(rank: int, world: int, init: str) -> list[Any]:
    from nvmm.objectives.next_token import NextToken

    model = tiny_model(rank, world, init)
    objective = NextToken()
    totals = []
    for batch in texts():
        batch = batch.replace(loss_mask=(batch.loss_mask != 0).float())
        total, count, _ = objective.loss(objective.forward(model[0], batch), batch)
        totals.append((total.item(), count.item()))
    return totals


def test_scores_are_the_training_loss() -> None:
    scores = layout(1, 1)[0]["scores"]
    expected = run_ranks(losses, 1)[0]
    sums = [(-sum(t for t, _ in part), sum(n for _, n in part)) for part in _parts(scores)]
    assert [n for _, n in sums] == [n for _, n in expected]
    assert [t for t, _ in sums] == pytest.approx([t for t, _ in expected], rel=1e-5)
    # The packed row holds the first batch's samples.
    assert [t for t, _ in scores[5:]] == pytest.approx([t for t, _ in scores[:2]], rel=1e-5)


def _parts(scores: list[Any]) -> list[list[Any]]:
    return [scores[:2], scores[2:5], scores[5:]]


def gathered(rank: int, world: int, init: str) -> list[Any]:
    tiny_model(rank, world, init)
    return [gather([10 * i for i in share(n, rank, world)], n) for n in (5, 2, 1, 0)]


def test_odd_counts_are_dealt_and_gathered_in_order() -> None:
    for found in run_ranks(gathered, 2):
        assert found == [[0, 10, 20, 30, 40], [0, 10], [0], []]


def refusals(rank: int, world: int, init: str) -> list[str]:
    model = tiny_model(rank, world, init)
    messages = []
    for change in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        arguments: dict[str, Any] = {"max_new_tokens": 1, "stop_ids": (), "pad_id": PAD} | change
        with pytest.raises(ValueError) as error:
            generate(model, PROMPTS, **arguments)
        messages.append(str(error.value))
    model[0].train()
    for call in (
        lambda: generate(model, PROMPTS, max_new_tokens=1, stop_ids=(), pad_id=PAD),
        lambda: score(model, texts()),
    ):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    model[0].eval().config.sequence_parallel = True
    with pytest.raises(ValueError) as error:
        generate(model, PROMPTS, max_new_tokens=1, stop_ids=(), pad_id=PAD)
    return [*messages, str(error.value)]


def test_bad_arguments_are_named() -> None:
    found = run_ranks(refusals, 1)[0]
    starts = ("max_new_tokens=0", "temperature=-1.0", "top_p=0.0", "generate needs", "score needs")
    for message, start in zip(found, (*starts, "parallel.sequence_parallel"), strict=True):
        assert message.startswith(start)


def test_top_p_keeps_the_nucleus() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05 at ids 2, 0, 3, 1.
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    grid = [(i + 0.5) / 200 for i in range(200)]

    def drawn(top_p: float, temperature: float = 1.0) -> list[int]:
        rows = logits.expand(200, 4)
        return choose(rows, temperature, top_p, grid).tolist()

    assert set(drawn(0.5)) == {2}
    assert set(drawn(0.51)) == {2, 0}
    assert set(drawn(0.81)) == {2, 0, 3}
    assert set(drawn(1e-6)) == {2}
    counts = [drawn(1.0).count(i) for i in (2, 0, 3, 1)]
    assert counts == [100, 60, 30, 10]
    # Renormalised inside the nucleus: 0.5 / 0.8 of 200.
    assert drawn(0.8 - 1e-4).count(2) == 125
    # Half the temperature squares the odds: 25 : 9 : 2.25 : 0.25.
    assert drawn(1.0, 0.5).count(2) == pytest.approx(200 * 25 / 36.5, abs=1)
    assert choose(logits, 0.0, 1.0, [0.99]).tolist() == [2]


def test_left_padding_moves_media() -> None:
    def picture(length: int, position: int, sample_id: int) -> Sample:
        media = TextMedia(
            values=torch.full((1, 3, 2, 2), sample_id, dtype=torch.uint8),
            positions=torch.tensor([position]),
            items=torch.tensor([0]),
            tiles=torch.tensor([1]),
            placeholder_id=7,
            tokens_per_item=2,
        )
        tokens = torch.arange(length) + 20
        tokens[position : position + 2] = 7
        return Sample((Text(tokens, torch.zeros(length), {IMAGE: media}),), sample_id)

    batch, spans = left_padded([picture(4, 1, 5), prompt(2, 6), picture(6, 3, 7)], PAD)
    assert spans is not None
    assert spans.tolist() == [[2, 6], [4, 6], [0, 6]]
    assert batch.tokens[0].tolist() == [PAD, PAD, 20, 7, 7, 23]
    assert batch.position_ids[0].tolist() == [0, 0, 0, 1, 2, 3]
    assert batch.lengths.tolist() == [4, 2, 6]
    assert batch.sample_ids.tolist() == [5, 6, 7]
    media = batch.media[IMAGE]
    assert media.rows.tolist() == [0, 2]
    assert media.positions.tolist() == [3, 3]
    assert media.values[:, 0, 0, 0].tolist() == [5, 7]
    for row, column in zip(media.rows, media.positions, strict=True):
        assert batch.tokens[row, column : column + 2].tolist() == [7, 7]
    assert left_padded([prompt(3, 0), prompt(3, 1)], PAD)[1] is None
    with pytest.raises(ValueError, match=r"prompt 9 \(sample 9\): a text has no tokens"):
        left_padded([prompt(2, 0), prompt(0, 9)], PAD)
