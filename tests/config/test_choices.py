"""Enumerated parameters: their Literal is read from source, and no choice goes without one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from nvmm.config.check import check, config_dir
from nvmm.config.choices import require
from nvmm.config.signatures import Parameter, signature
from nvmm.parallel.fp8_recipe import RECIPES, Recipe

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted((ROOT / "nvmm").rglob("*.py"))
}
DEFINITIONS = {
    f"{module}.{node.name}": node
    for module, tree in MODULES.items()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
}


def is_plain_text(parameter: Parameter) -> bool:
    annotation = parameter.annotation
    return annotation is not None and ast.unparse(annotation) in ("str", "str | None")


def is_choice(node: ast.expr) -> bool:
    """Whether a comparison with `node` is one with fixed texts: literals, or a constant's name."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return all(is_choice(element) for element in node.elts)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return ast.unparse(node).rpartition(".")[2].isupper()


def compared(node: ast.AST, names: set[str]) -> set[str]:
    """Those of `names` that the body of a class, as `x` or `self.x`, compares with fixed texts.

    A text that is looked for in a parameter ("a" in mode) makes no choice of it.
    """
    found = set()
    for comparison in ast.walk(node):
        if isinstance(comparison, ast.Compare):
            sides = [comparison.left, *comparison.comparators]
            is_equality = isinstance(comparison.ops[0], ast.Eq | ast.NotEq)
            if any(map(is_choice, sides if is_equality else sides[1:])):
                found |= {ast.unparse(side).removeprefix("self.") for side in sides}
    return found & names


@pytest.mark.parametrize("target", sorted(DEFINITIONS))
def test_a_parameter_that_is_compared_with_fixed_texts_has_a_literal(target: str) -> None:
    texts = {p.name for p in signature(target).parameters.values() if is_plain_text(p)}
    lacking = compared(DEFINITIONS[target], texts)
    assert not lacking, f"annotate {sorted(lacking)} of {target} with a Literal"


def test_every_target_of_the_configs_is_looked_at() -> None:
    targets: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            targets.add(str(node.get("_target_", "")))
            node = list(node.values())
        for child in node if isinstance(node, list) else ():
            walk(child)

    for path in config_dir().rglob("*.yaml"):
        walk(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    ours = {t for t in targets if t.startswith("nvmm.") and not t.startswith("nvmm.evaluation.")}
    assert len(ours) > 20
    assert ours <= DEFINITIONS.keys()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mode not in ('a', 'b')", {"mode"}),
        ("self.mode == 'a'", {"mode"}),
        ("'a' == mode", {"mode"}),
        ("mode in MODES", {"mode"}),
        ("mode in module.MODES", {"mode"}),
        ("mode is None", set()),
        ("mode == other", set()),
        ("len(mode) == 'a'", set()),
        ("'a' in mode", set()),
        ("'a' not in self.mode", set()),
    ],
)
def test_what_counts_as_a_comparison(source: str, expected: set[str]) -> None:
    assert compared(ast.parse(source), {"mode"}) == expected


CROSS = {"_target_": "nvmm.modules.cross_attention.CrossAttention"}
SAMPLES = "nvmm.data.samples"
BUILD = {
    "_target_": f"{SAMPLES}.instruct.InstructBuilder",
    "_partial_": True,
    "tokens_per_tile": 4,
    "template": {"_target_": f"{SAMPLES}.chat.ChatTemplate"},
    "tags": {"_target_": f"{SAMPLES}.chat.ImageTags"},
    "form": {"_target_": f"{SAMPLES}.forms.Chat"},
}
RETRIEVAL = {
    "_target_": f"{SAMPLES}.retrieval.RetrievalBuilder",
    "_partial_": True,
    "num_negatives": 1,
    "in_batch_negatives": True,
}
VISION = {
    "_target_": "nvmm.modules.encoders.vision.VisionTransformer",
    "_partial_": True,
    "transformer": None,
    "image_size": 32,
    "patch_size": 8,
}
OPTIM = {"_target_": "nvmm.training.optim.Optim"}
PARALLEL = {"_target_": "nvmm.parallel.setup.Parallel"}
FP8 = {"dtype": "bf16", "fp8": {"_target_": "nvmm.parallel.fp8_recipe.Fp8"}}
DATASETS = {"train": "data.train", "validation": "data.validation", "an entry": "data.blend[0]"}


def at(key: str, node: Any) -> dict[str, Any]:
    """A config with `node` at `key`; `a[0]` stands for a list of one."""
    for part in reversed(key.split(".")):
        name, bracket, _ = part.partition("[")
        node = {name: [node] if bracket else node}
    return dict(node)


@pytest.mark.parametrize(
    ("where", "node", "name", "allowed"),
    [
        ("model.cross_attention", CROSS, "gate", "scalar, channel"),
        ("model.cross_attention", CROSS, "placement", "inside, before"),
        (
            "model.cross_attention",
            CROSS,
            "text_sees",
            "preceding, last, nothing, preceding_or_first",
        ),
        ("model.vision", VISION, "qk_norm", "joint, null"),
        *(
            (f"{dataset}.build", build, name, allowed)
            for dataset in DATASETS.values()
            for build, name, allowed in (
                (RETRIEVAL, "masking", "sentence_transformers, nv_embed, mm_embed, none"),
                (BUILD, "attended", "none, regular, all"),
                (BUILD, "tags.variant", "none, 1d, 2d_grid, 2d_bbox"),
                (BUILD, "tags.form", "megatron, hf"),
                (BUILD, "form.choice", "heaviest, drawn"),
            )
        ),
        ("data", {"_target_": "nvmm.data.loader.Data"}, "on_error", "skip, stop"),
        ("parallel", PARALLEL, "encoder", "replicated, sharded"),
        ("parallel", PARALLEL, "recompute_granularity", "full, selective, null"),
        ("parallel", PARALLEL, "recompute_method", "uniform, block, null"),
        ("precision", {"_target_": "nvmm.parallel.setup.Precision"}, "dtype", "fp32, bf16, fp64"),
        ("precision", FP8, "fp8.recipe", "delayed, current, blockwise, mxfp8"),
        ("precision", FP8, "fp8.format", "hybrid, e4m3, null"),
        ("precision", FP8, "fp8.amax_compute_algo", "max, most_recent"),
        ("kernels", {"_target_": "nvmm.kernels.library.Kernels"}, "rope", "auto, eager, fused"),
        (
            *("optim", OPTIM, "schedule"),
            "cosine, linear, minus_sqrt, exponential, inverse_sqrt, constant",
        ),
        ("optim", OPTIM, "moments_dtype", "fp32, bf16"),
        ("trainer", {"_target_": "nvmm.training.trainer.Trainer"}, "on_nonfinite", "stop, skip"),
        (
            "checkpoint",
            {"_target_": "nvmm.checkpoint.save.Checkpoint"},
            "optimizer",
            "fully_reshardable, dp_reshardable",
        ),
    ],
)
def test_another_value_is_refused_without_torch(
    where: str, node: dict[str, Any], name: str, allowed: str
) -> None:
    config = OmegaConf.create(at(where, node))
    OmegaConf.update(config, f"{where}.{name}".replace("[0]", ".0"), "foo")
    lines = [str(problem) for problem in check(config)]
    assert f"{where}.{name}=foo must be one of {allowed}" in lines, lines


def test_constructors_take_their_choices_from_the_type() -> None:
    with pytest.raises(ValueError, match=r"a\.b=row must be one of delayed, current, blockwise"):
        require("a.b", "row", Recipe)
    assert set(RECIPES) == set(get_args(Recipe))
