"""tools/ablate_tiles.py: its variants are valid runs, differ in what they should, and report."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate

from nvmm.batch import IMAGE
from nvmm.config.check import check, to_plain
from nvmm.config.compose import composed
from nvmm.data.loader import Data
from nvmm.data.prepare import digits
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from tools import ablate_tiles


def configs(name: str, regime: str, system: str = "d") -> list[dict]:
    """The composed configs of a variant's three stages."""
    made = ablate_tiles.variant(name, 5, ablate_tiles.REGIMES[regime], Path("runs/x"), 100, system)
    found = []
    for command in made.commands[:3]:
        config = composed("train", command.arguments[4:])
        assert check(config) == [], name
        found.append(to_plain(config))
    return found


@pytest.mark.parametrize("regime", ablate_tiles.REGIMES)
def test_variants_compose_and_differ_in_the_last_stage_alone(regime: str) -> None:
    stages = {name: configs(name, regime) for name in ablate_tiles.VARIANTS}
    texts = [[stage[0] for stage in stages.values()], [stage[1] for stage in stages.values()]]
    assert all(each == group[0] for group in texts for each in group)
    last = {name: stage[2] for name, stage in stages.items()}
    builds = {name: config["data"]["train"].pop("build") for name, config in last.items()}
    assert builds["low_res"]["max_tiles"] == 1
    for name in ("none", "1d", "2d_grid", "2d_bbox"):
        assert builds[name]["tags"]["variant"] == name
        assert builds[name]["max_tiles"] == 6
        last[name]["run"] = last["none"]["run"]
        assert last[name] == last["none"]
    assert last["none"]["init_from"] == "runs/x/seed5/align"
    tags = "1d" if regime == "tagged" else "none"
    assert stages["none"][1]["data"]["train"]["build"]["tags"]["variant"] == tags
    assert all(stage["seed"] == 5 for stage in stages["none"])


@pytest.mark.parametrize(("system", "attended"), [("x", "all"), ("h", "regular")])
def test_variants_of_the_attending_systems(system: str, attended: str) -> None:
    for name in ("none", "1d"):
        last = configs(name, "strings", system)[2]
        assert last["data"]["train"]["build"]["attended"] == attended
        assert last["data"]["train"]["build"]["tags"]["variant"] == name
        assert last["model"]["language"]["vocab_size"] == 334


def test_regimes_read_the_data_that_they_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {}

    def build(folder, amounts=None, form=None):
        built[folder] = (amounts or digits.Amounts(), form or digits.Form())

    monkeypatch.setattr(ablate_tiles, "DATA", tmp_path)
    monkeypatch.setattr(digits, "build", build)
    for regime in ablate_tiles.REGIMES.values():
        regime.build_data()
        amounts, form = built[regime.text]
        assert amounts.text > 0
        assert form.tags == regime.tags
        amounts, form = built[regime.strings]
        assert amounts.strings > 0 and amounts.test == ablate_tiles.QUESTIONS
        assert form.max_images == regime.max_images


def test_report_has_our_numbers_beside_the_papers() -> None:
    def seed(score: float) -> dict[str, float]:
        kinds = {f"exact_match_{kind}": score for kind in digits.KINDS}
        numbers = {"tokens_per_sample": 40.0, "tiles_per_sample": 5.0, "cpu_seconds": 99.0}
        return {"exact_match": score, **kinds, **numbers}

    found = {"none": [seed(0.5), seed(0.6)], "1d": [seed(0.6), seed(0.8)]}
    text = ablate_tiles.report(found)
    assert "| none    | 2     | 0.550 ± 0.071 |" in text
    assert "1d - none: 0.150 ± 0.071 (standard error of the questions 0.015)" in text
    assert text.index("NVLM-D 34B") < text.index("806") < text.index("NVLM-X 34B")
    assert "2d_grid" not in text


def test_samples_of_several_images_fit(tmp_path: Path) -> None:
    """The longest tags, on the regime with the most images, leave no sample out."""
    amounts = digits.Amounts(text=200, single=0, strings=200, validation=0, test=50)
    digits.build(tmp_path, amounts, form=digits.Form("2d_bbox", 3))
    config = configs("2d_bbox", "images")[2]
    extra = config["tokenizer"]["extra_tokens"]
    tokenizer = Tokenizer(str(tmp_path / "tokenizer"), extra_tokens=extra)
    assert tokenizer.vocab_size == config["model"]["language"]["vocab_size"]
    build = instantiate(config["data"]["train"]["build"])
    for part in ("text/train", "strings/train", "strings/test"):
        dataset = Dataset(str(tmp_path / f"{part}-*.tar"), build)
        data = Data(config["data"]["sequence_length"], 0, dataset, tokenizer=tokenizer).train
        samples = [data[number] for number in range(len(data))]
        assert max(len(sample.text.tokens) for sample in samples) > 200
        if part != "text/train":
            images = {int(sample.text.media[IMAGE].items.max()) + 1 for sample in samples}
            assert images == {1, 2, 3}
            assert max(int(s.text.media[IMAGE].tiles.max()) for s in samples) > 3
