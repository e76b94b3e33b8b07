"""Every experiment composes, and its config passes every check once the user's paths are given;
no YAML repeats another, or a constructor."""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from nvmm.config.check import check, config_dir, resolve, to_plain
from nvmm.config.signatures import default_of, signature
from nvmm.proof.equivalence import ONE_RANK, run, shrink

SIZED = re.compile("34b|vila.*(13b|8b)")
EXPERIMENTS = sorted(
    str(path.relative_to(config_dir() / "experiment").with_suffix(""))
    for path in (config_dir() / "experiment").rglob("*.yaml")
)


SHRINKS_ALIKE = re.compile(
    "34b|70b|chatqa2/stage|rankrag/|vila.*(13b|8b)|audio_flamingo3/stage[234]_"
)
YAMLS = {
    str(path.relative_to(config_dir())): yaml.safe_load(path.read_text())
    for path in sorted(config_dir().rglob("*.yaml"))
}
STATED = {
    "job/rag.yaml": "lists what a user changes of a RAG run, with a word on each",
    "language/llama3_1_8b.yaml": "states all of Llama 3.1's published scaling",
    "template/jinja.yaml": "lists what a user changes of a template, with a word on each",
    "form/chatqa.yaml": "lists ChatQA's strings, which a user changes",
    "form/rankrag_ranking.yaml": "lists RankRAG's strings, which a user changes",
    "form/rankrag_list_ranking.yaml": "lists RankRAG's strings, which a user changes",
    "data/instruct.yaml": "lists what a user changes of data, with a word on each",
    "optim/adamw.yaml": "lists what a user changes of the optimizer",
    "trainer/default.yaml": "lists what a user changes of the loop",
    "checkpoint/default.yaml": "lists what a user changes of checkpoints",
    "logger/local.yaml": "lists the other loggers",
    "lora/default.yaml": "states LoRA's rank and strength, which every run must know",
    "model/nv_embed_7b.yaml": "states the paper's latents and heads",
    "job/data/beir.yaml": "lists the files of a retrieval set, with a word on each",
    "job/data/mbeir.yaml": "lists the files of a retrieval set, with a word on each",
}
"""YAMLs that may say what their constructors say anyway, and why."""


@functools.lru_cache
def composed(experiment: str):
    """The config of an experiment, and the keys that it leaves to the user."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"])
        unset = [problem.key for problem in resolve(config)[1]]
        given = {key: 65_536 if key == "trainer.max_steps" else "given" for key in unset}
        overrides = [f"experiment={experiment}", *(f"{k}={v}" for k, v in given.items())]
        return compose("train", overrides), unset


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_passes_every_check(experiment: str) -> None:
    config, _ = composed(experiment)
    assert check(config) == []
    assert to_plain(config)["run"]["name"] is None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_begins_with_its_command(experiment: str) -> None:
    """The first comment is a command that names the experiment and every key that is left open."""
    text = Path(config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    comments = [line for line in text.splitlines()[:8] if line.startswith("#")]
    command = next(line for line in comments if "nvmm train" in line)
    assert f"experiment={experiment}" in command
    _, unset = composed(experiment)
    missing = [key for key in unset if f"{key}=" not in " ".join(comments)]
    assert not missing, f"the command of {experiment} does not name {missing}"


@pytest.mark.parametrize("path", sorted(config_dir().rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_tabs_or_trailing_spaces(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert line == line.rstrip() and "\t" not in line, f"{path}:{number}"


@pytest.mark.parametrize(
    "experiment",
    # What is slow differs from another in sizes, which shrinking takes away, or in its data.
    [
        pytest.param(e, marks=pytest.mark.slow if SHRINKS_ALIKE.search(e) else ())
        for e in EXPERIMENTS
    ],
)
def test_experiment_trains_a_step_when_shrunk(experiment: str) -> None:
    config = shrink(to_plain(composed(experiment)[0]))
    result = run(config, ONE_RANK, num_steps=1)
    assert math.isfinite(result.losses[0])
    assert result.grad_norms[0] > 0


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from mappings(child)


def leaves(node: Any, key: str = "") -> set[tuple[str, str]]:
    if not isinstance(node, dict):
        return {(key, repr(node))}
    return {leaf for name, child in node.items() for leaf in leaves(child, f"{key}.{name}")}


def test_no_two_models_share_more_than_fifteen_leaves() -> None:
    """A part that two models have is a file of its own, which both name in their defaults."""
    groups = ("model/", "language/", "vision/", "audio/")
    parts = [
        (name, leaves(mapping))
        for name, config in YAMLS.items()
        if name.startswith(groups)
        for mapping in mappings(config)
    ]
    for (one, some), (other, others) in itertools.combinations(parts, 2):
        if one != other:
            assert len(some & others) <= 15, f"{one} and {other} share {sorted(some & others)}"


@pytest.mark.parametrize("name", sorted(YAMLS.keys() - STATED.keys()))
def test_no_leaf_says_what_its_constructor_says(name: str) -> None:
    """Of nvmm's own constructors: another package's defaults may change with its version."""
    for mapping in mappings(YAMLS[name]):
        target = str(mapping.get("_target_", ""))
        for key in mapping.keys() & (signature(target).parameters if target[:5] == "nvmm." else {}):
            if not signature(target).parameters[key].required:
                assert mapping[key] != default_of(target, key), f"{key} of {target}"


@pytest.mark.parametrize("name", sorted(STATED))
def test_exceptions_are_needed(name: str) -> None:
    with pytest.raises(AssertionError):
        test_no_leaf_says_what_its_constructor_says(name)


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_defaults_lists_have_one_style(name: str) -> None:
    """Another group is named from the root, and one's own values say when they come."""
    defaults = YAMLS[name].get("defaults", [])
    if defaults and YAMLS[name].keys() - {"defaults"}:
        assert "_self_" in defaults
    own = config_dir() / name.partition("/")[0]
    for entry in defaults if "/" in name else ():
        path = entry if isinstance(entry, str) else next(iter(entry)).removeprefix("override ")
        is_own = (own / f"{path}.yaml").is_file() or (own / path).is_dir()
        assert path.startswith(("/", "_self_")) or is_own, path
        assert "/" not in path.lstrip("/") or path.startswith("/"), path


def test_a_part_is_no_model() -> None:
    models = {name for name in YAMLS if name.startswith("model/")}
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for name in models:
            config = compose("train", [f"model={Path(name).stem}"])
            assert "vocab_size" in config.model.get("language", config.model), name


@pytest.mark.parametrize("entry", ["train", "evaluate", "generate", "job"])
def test_no_group_takes_the_name_of_a_key(entry: str) -> None:
    """`key=value` would choose from the group. compose.argument rewrites the two that do."""
    config = YAMLS[f"{entry}.yaml"]
    chosen = {next(iter(d)) for d in config["defaults"] if isinstance(d, dict)}
    taken = {key for key in config.keys() - chosen if (config_dir() / key).is_dir()}
    assert taken - {"hydra"} <= {"checkpoint", "tokenizer"}
