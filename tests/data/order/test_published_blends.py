"""The blends of ChatQA, ChatQA 2 and RankRAG give the published ratios, normalised, to 0.1 %."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvmm.config.check import config_dir
from nvmm.data.loader import Data
from nvmm.data.order import sample_ids
from nvmm.data.samples.token_rows import TokenRows
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset, write_shards
from tests.test_configs import YAMLS

SHORT = {"drop": 0.069, "quoref": 0.026, "ropes": 0.026, "tatqa-others": 0.08, "sft": 0.2}
SHORT |= {"tatqa-arithmetic": 0.15}
"""What all three have in common."""
CHATQA = SHORT | dict.fromkeys(["narrativeqa", "squad1.1", "squad2.0", "newsqa"], 0.095)
CHATQA |= {"synthetic_convqa": 0.3}
RANKRAG = SHORT | dict.fromkeys(["narrativeqa", "newsqa"], 0.09) | {"synthetic_convqa": 0.2}
RANKRAG |= dict.fromkeys(["squad_answer", "webquestions_answer"], 0.09)
RANKRAG |= dict.fromkeys(["squad_relevance", "webquestions_relevance"], 0.02)
RANKRAG |= {"msmarco_ranking": 0.15, "convqa_ranking": 0.03}
PUBLISHED = {
    "chatqa_stage2": (CHATQA, 1.231),
    "chatqa2_stage3": (CHATQA | {"long_sft": 2.5, "narrativeqa_131072": 5.0}, 8.731),
    "rankrag_stage2": (RANKRAG, 1.331),
}
SAMPLES = 10_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_shares_of_ten_thousand_samples(name: str, tmp_path: Path, tiny: Tokenizer) -> None:
    raw, total = PUBLISHED[name]
    assert sum(raw.values()) == pytest.approx(total)
    blend: list[dict[str, Any]] = YAMLS[f"data/{name}.yaml"]["blend"]
    assert {entry["name"] for entry in blend} == raw.keys()
    [path] = write_shards(tmp_path, "a", [{"__key__": str(n), "json": b"{}"} for n in range(3)])
    entries = [{**entry, "shards": str(path), "build": None} for entry in blend]
    assert all(Path(entry["shards"]).match(f"{entry['name']}-*.tar") for entry in blend)
    train = Dataset(None, build=TokenRows)  # type: ignore[arg-type]
    data = Data(64, 0, train, blend=entries, tokenizer=tiny)
    order = data.order(SAMPLES // 10)
    ids = [number for k in range(10) for pack in order.batch(k) for number in pack.samples]
    assert len(ids) == SAMPLES
    given = Counter(np.asarray(sample_ids.split(np.array(ids))[0]).tolist())
    for number, entry in enumerate(entries):
        assert abs(given[number] / SAMPLES - raw[entry["name"]] / total) < 1e-3, entry["name"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_the_ratios_beside_them(name: str) -> None:
    raw, total = PUBLISHED[name]
    lines = (config_dir() / "data" / f"{name}.yaml").read_text().splitlines()
    names = [line.split()[-1] for line in lines if line.startswith("  - name: ")]
    weights = [line.split() for line in lines if line.startswith("    weight: ")]
    assert len(names) == len(raw)
    for entry, (_, weight, _, ratio) in zip(names, weights, strict=True):
        assert float(ratio) == raw[entry]
        assert abs(float(weight) - raw[entry] / total) < 1e-6
