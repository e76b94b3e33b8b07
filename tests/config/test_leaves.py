"""Every leaf of a composed config, given values of every kind: accepted by its type, or named."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nvmm.config.check import check, config_dir, to_plain
from nvmm.config.signatures import completed, signature

VALUES = [None, True, False, "text", "", [], [1], ["text"], {}, {"a": 1}, -1, 0, 1.5]
VALUES += [float("nan"), float("-inf")]
WORDS = {
    type(None): {"None"},
    bool: {"bool"},
    str: {"str"},
    list: {"list", "Sequence", "tuple"},
    dict: {"dict", "Mapping"},
    int: {"int", "float"},
    float: {"float"},
}
"""The words of an annotation that admit a value."""


def config(experiment: str) -> dict[str, Any]:
    """An experiment with a value at every key that it leaves open, and all defaults stated."""
    overrides = [f"experiment={experiment}", "tokenizer.path=t", "data.train.shards=a.tar"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("train", [*overrides, "init_from=null"])
    plain: dict[str, Any] = completed(to_plain(composed))
    return plain


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key that is not Hydra's own: leaves, and mappings without a `_target_`."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, name))
        elif not name.startswith("_"):
            yield (*path, name)


def annotation(plain: Mapping[str, Any], path: tuple[str, ...]) -> str | None:
    """The annotation of the constructor's parameter at a path, with its default's None."""
    owner: Any = plain
    for name in path[:-1]:
        owner = owner[name]
    if "_target_" not in owner:
        return None
    parameter = signature(owner["_target_"]).parameters.get(path[-1])
    if parameter is None or parameter.annotation is None:
        return None
    text = ast.unparse(parameter.annotation)
    return f"{text} | None" if parameter.nullable else text


def admits(text: str | None, value: Any) -> bool:
    """True unless the annotation consists of plain types, and none of them is the value's."""
    words = set(re.findall(r"[A-Za-z]\w*", text or "Any")) - {"Any"}
    if text is None or words - set().union(*WORDS.values()):
        return True  # a class, a Literal or anything: not for this test to say
    return bool(words & WORDS[type(value)])


def spoiled(plain: dict[str, Any], paths: list[tuple[str, ...]], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(plain)
    for path in paths:
        owner = changed
        for name in path[:-1]:
            owner = owner[name]
        owner[path[-1]] = copy.deepcopy(value)
    return changed


def named(problems: list[Any], path: tuple[str, ...]) -> bool:
    key = ".".join(path)
    return any(p.key == key or p.key.startswith((f"{key}.", f"{key}[")) for p in problems)


def silent(plain: dict[str, Any], paths: list[tuple[str, ...]], value: Any) -> list[str]:
    """The paths that got a value which their type does not admit, and no problem names."""
    problems = check(spoiled(plain, paths, value), world_size=1)
    assert all(str(problem).startswith(problem.key) for problem in problems)
    wrong = [path for path in paths if not admits(annotation(plain, path), value)]
    if isinstance(value, float) and not -1e300 < value < 1e300:
        wrong = paths
    return [".".join(path) for path in wrong if not named(problems, path)]


EXPERIMENTS = ["language/tiny", "nvlm_d/quickstart"]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_all_leaves_at_once(value: Any) -> None:
    plain = config("nvlm_d/quickstart")
    paths = list(leaves(plain))
    assert len(paths) > 100
    assert silent(plain, paths, value) == []


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_each_leaf_alone(experiment: str) -> None:
    plain = config(experiment)
    for path in leaves(plain):
        for value in VALUES:
            assert silent(plain, [path], value) == [], (path, value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", None, "seed=null must be int"),
        ("seed", True, "seed=True must be int"),
        ("seed", -1, "seed=-1 must be a whole number of at least 0"),
        ("backend", "cuda", "backend=cuda must be one of native, transformer_engine"),
        ("resume", None, "resume=null must be auto, never, or the folder"),
        ("resume", "false", "resume=false must be auto, never, or the folder"),
        ("resume", False, "resume=False must be str or null"),
        ("run", None, "run=null must be a mapping"),
        ("kernels", None, "kernels=null must be a mapping"),
        ("run.id", 7, "run.id=7 must be str or null"),
        ("run.id", "a/b", "run.id='a/b' must be the name of one folder"),
        ("run.id", "..", "run.id='..' must be the name of one folder"),
        ("run.name", "../x", "run.name='../x' must be folder names"),
        ("run.dir", "", "run.dir='' must name a folder"),
        ("init_from", "", "init_from='' must name a folder"),
        ("optim.freeze", [7], "optim.freeze[0]=7 must be str"),
        ("optim.clip_grad", float("nan"), "optim.clip_grad=nan must be a finite number"),
        ("trainer.validation_interval", 2, "trainer.validation_interval=2 must be null where data"),
        ("data.train", None, "data.train=null must be a mapping with the _target_ of a Dataset"),
        ("data.train.build", 7, "data.train.build=7 must be a mapping with the _target_ of a part"),
        (
            "data.train.build.tags",
            "1d",
            "data.train.build.tags=1d must be a mapping with the _targ",
        ),
        ("model.transformer", None, "model.transformer=null must be a mapping with the _target_"),
        ("trainer.max_skips", 0, "trainer.max_skips=0 must be at least 1"),
    ],
)
def test_refusals(key: str, value: Any, says: str) -> None:
    problems = check(spoiled(config("language/tiny"), [tuple(key.split("."))], value), world_size=1)
    assert any(str(problem).startswith(says) for problem in problems), list(map(str, problems))
