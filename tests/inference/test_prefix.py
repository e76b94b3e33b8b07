"""A shared prefix that runs once: the same answers and scores as without, at every layout."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvmm.batch import IMAGE, Sample, Text, TextMedia
from nvmm.inference.decoding import generate, score_continuations
from nvmm.inference.limits import check_cache
from nvmm.inference.prefix import saved_tokens, shared_tokens
from tests.inference.test_decoding import CONTINUATIONS, PAD, prompt, tiny_model
from tests.ranks import run_ranks

PREFIX = [3, 14, 15, 9, 26, 5]
ENDS = ([35, 8], [9, 7, 9, 32, 3], [35], [])
"""Behind the prefix; a row of width 11 hides 3, 0 and 4 columns of it behind padding."""


def text(tokens: list[int], number: int = 0) -> Sample:
    return Sample((Text(torch.tensor(tokens), torch.zeros(len(tokens))),), number)


PROMPTS = [text(PREFIX + end, number) for number, end in enumerate(ENDS)]


def test_what_prompts_share() -> None:
    assert shared_tokens(PROMPTS[:3]) == 6
    assert shared_tokens(PROMPTS) == 5, "the shortest prompt keeps a token to run"
    assert shared_tokens([PROMPTS[0], PROMPTS[2]]) == 6, "35 is the last token of one"
    assert shared_tokens(PROMPTS[:1]) == 0
    assert shared_tokens([PROMPTS[0], text([9, 9, 9])]) == 0
    # The longest pays; the others run again what lies behind its prefix.
    assert saved_tokens(PROMPTS[:3]) == [3, 0, 2]
    assert saved_tokens([PROMPTS[1], PROMPTS[1]]) == [0, 10]


def test_prompts_with_media_share_nothing() -> None:
    zeros = torch.zeros(1, dtype=torch.int64)
    media = TextMedia(torch.zeros(1, 3, 2, 2), zeros, zeros, zeros, 3, 1)
    with_media = Sample((Text(torch.tensor(PREFIX), torch.zeros(6), {IMAGE: media}),))
    assert shared_tokens([with_media, with_media]) == 0


def both(rank: int, world: int, init: str, tp: int, pp: int) -> dict[str, Any]:
    """Answers and scores without sharing and with it; prompts that share nothing come too."""
    model = tiny_model(rank, world, init, tp, pp, "fp64")
    ask = functools.partial(generate, model, max_new_tokens=4, pad_id=PAD, stop_ids=())
    prompts = {"shared": PROMPTS, "apart": [prompt(5, 1), prompt(7, 2)], "one": PROMPTS[1:2]}
    runs: list[int] = []
    for chunk in model:
        chunk.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0].tokens.numel()))
    found: dict[str, Any] = {}
    for name, some in prompts.items():
        for share in (False, True):
            options: dict[str, Any] = {"share_prefix": share}
            runs.clear()
            table = score_continuations(model, some, CONTINUATIONS[:1], pad_id=PAD, **options)
            tokens = sum(runs)
            table = score_continuations(model, some, CONTINUATIONS, pad_id=PAD, **options)
            answers = ask(some, **options), ask(some, temperature=1.5, seed=5, **options)
            found[name, share] = (table.tolist(), answers, tokens)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    """What one rank finds."""
    found: dict[Any, Any] = run_ranks(both, 1, 1, 1)[0]
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_shared_prefix_changes_nothing(alone: dict[Any, Any], tp: int, pp: int) -> None:
    for found in run_ranks(both, tp * pp, tp, pp) if tp * pp > 1 else [alone]:
        for name in ("shared", "apart", "one"):
            plain, shared = found[name, False], found[name, True]
            torch.testing.assert_close(
                torch.tensor(shared[0]), torch.tensor(plain[0]), rtol=0, atol=1e-12
            )
            assert shared[1] == plain[1]
            assert shared[1] == alone[name, False][1]
        # 4 rows of 11 columns; with the prefix of 5 once and 4 rows of 6.
        assert found["shared", False][2] == 44
        assert found["shared", True][2] == 5 + 4 * 6
        assert found["apart", True][2] == found["apart", False][2]


def test_a_scaling_by_length_forbids_a_prefix_of_other_angles() -> None:
    """The prefix runs as a sequence of its own length."""
    scaling = SimpleNamespace(is_constant=lambda first, last: first > 100 or last <= 100)
    model: Any = [SimpleNamespace(rotary=SimpleNamespace(scaling=scaling))]
    check_cache(model, 120, 7, 10)
    check_cache(model, 120, 7, 10, first=101)
    check_cache(model, 90, 7, 11, first=50)
    with pytest.raises(ValueError, match=r"from 50 to 129 tokens; .* share_prefix must be false"):
        check_cache(model, 120, 7, 10, first=50)
    with pytest.raises(ValueError, match=r"from 99 to 101 tokens; .* use_cache must be false"):
        check_cache(model, 99, 7, 3)


def uncached(rank: int, world: int, init: str) -> None:
    model = tiny_model(rank, world, init)
    ask = functools.partial(generate, model, PROMPTS, max_new_tokens=1, stop_ids=(), pad_id=PAD)
    with pytest.raises(ValueError, match="share_prefix=true needs use_cache=true"):
        ask(share_prefix=True, use_cache=False)


def test_a_prefix_needs_the_cache() -> None:
    run_ranks(uncached, 1)
