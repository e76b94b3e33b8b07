"""Generation past the original length: a cache where it gives the same tokens, else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from nvmm.batch import Sample, Text
from nvmm.checkpoint.load import load_weights
from nvmm.inference.decoding import generate, score_continuations
from nvmm.parallel.setup import Parallel, Precision
from tests.convert import families
from tests.convert.test_families import imported

pytestmark = pytest.mark.usefixtures("world")
# The original length of all of them is 8.
SHORT, LONG = torch.arange(5) * 37 % 509, torch.arange(12) * 37 % 509


def prompt(tokens: torch.Tensor, number: int = 0) -> Sample:
    return Sample((Text(tokens, torch.zeros(len(tokens))),), number)


def both(name: str, folder: Path) -> tuple[Any, Any]:
    reference = families.language(name, folder / "theirs")
    model = imported(folder / "theirs", folder / "ours")
    module = instantiate(model, _convert_="all")(chunk=Parallel().chunks(Precision())[0]).eval()
    assert load_weights(folder / "ours", [module]) == []
    return module, reference


def continued(model: Any, *prompts: torch.Tensor, new: int = 8, cache: bool) -> list[list[int]]:
    samples = [prompt(tokens, number) for number, tokens in enumerate(prompts)]
    options = {"max_new_tokens": new, "stop_ids": [], "pad_id": 0}
    return generate([model], samples, use_cache=cache, **options)


@pytest.mark.parametrize("name", ["llama3_1", "qwen2_yarn", "llama_dynamic", "llama_longrope"])
def test_generation_without_a_cache_is_transformers(name: str, tmp_path: Path) -> None:
    """From below the original length to beyond it, rows of several lengths in one batch."""
    model, reference = both(name, tmp_path)
    found = continued(model, SHORT, LONG, cache=False)
    for tokens, ours in zip((SHORT, LONG), found, strict=True):
        theirs = reference.generate(
            tokens[None], max_new_tokens=8, do_sample=False, eos_token_id=-1, use_cache=False
        )
        assert theirs[0, len(tokens) :].tolist() == ours
    if name in ("llama3_1", "qwen2_yarn"):
        assert continued(model, SHORT, LONG, cache=True) == found


def test_a_cache_is_refused_where_keys_would_keep_old_angles(tmp_path: Path) -> None:
    model, _ = both("llama_dynamic", tmp_path / "dynamic")
    says = r"sample 0: DynamicNTK scales RoPE by the length, which grows from 12 to 19 tokens"
    with pytest.raises(ValueError, match=says + r".* use_cache must be false"):
        continued(model, LONG, cache=True)
    # The last new token is never fed: one token after a long prompt, or all within the length.
    for tokens, new in ((LONG, 1), (SHORT, 4)):
        found = continued(model, tokens, new=new, cache=True)
        assert found == continued(model, tokens, new=new, cache=False)
    with pytest.raises(ValueError, match="DynamicNTK scales RoPE by the length"):
        score_continuations([model], [prompt(LONG)], [[1, 2]], pad_id=0)
    assert score_continuations([model], [prompt(LONG)], [[1]], pad_id=0).shape == (1, 1)

    model, _ = both("llama_longrope", tmp_path / "longrope")
    with pytest.raises(ValueError, match=r"LongRoPE .* grows from 5 to 12 tokens"):
        continued(model, SHORT, cache=True)
    assert continued(model, LONG, cache=True) == continued(model, LONG, cache=False)
