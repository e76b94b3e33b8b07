"""Who may import whom, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nvmm"
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
TREES = {
    name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in FILES.items()
}
ENTRY_POINTS = {"train", "evaluate", "generate", "entry", "equivalence", "report"}
PARALLEL = {"parallel", "batch"}
# Module or folder -> what of nvmm it may import; longer names go first.
ALLOWED: dict[str, set[str]] = {
    "parallel.setup": {"parallel"},
    "parallel.cpu": {"parallel"},
    "parallel": PARALLEL,
    "kernels": {"kernels"},
    "batch": set(),
    "convert": {"convert"},
    "conversion": {
        "base",
        "batch",
        "checkpoint",
        "conversion",
        "convert",
        *("data.retrieval", "data.tokenizer"),
        "metadata",
        "modules.lora",
        *PARALLEL,
    },
    "modules": {"modules", "kernels", *PARALLEL},
    "models": {"models", "modules", "flops", *PARALLEL},
    "objectives": {"objectives", "kernels", *PARALLEL},
    "data": {"data", "batch"},
    "base": set(),
    "checkpoint": {"base", "metadata", "optim", *PARALLEL},
    "optim": {"kernels", *PARALLEL},
    "metrics": {"flops", "kernels", *PARALLEL},
    "flops": {"batch"},
    "metadata": set(),
    "inspection": {"batch", "data", "report_style"},
    "miniature": set(),
    "arms": {"metrics"},
    "charts": set(),
    "report_style": set(),
    "resume": set(),
    "signatures": set(),
    "problems": set(),
    "rules": {"data_rules", "precision_rules", "problems"},
    "data_rules": {"problems"},
    "precision_rules": {"parallel.fp8", "problems"},  # which is torch-free too
    "synthetic": PARALLEL,
    "config": {"problems", "rules", "signatures"},
    "decoding": PARALLEL,
    "embedding": {"data", "decoding", *PARALLEL},
    "evaluation": {"evaluation", "batch", "decoding"},
    "jobs": {"jobs", "batch", "data", "decoding", "parallel", "checkpoint"},
    "trainer": {
        "base",
        "checkpoint",
        "flops",
        "metrics",
        "modules.lora",
        "modules.scaling",
        "objectives.objective",
        "optim",
        "resume",
        *PARALLEL,
    },
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names a module imports, inside functions and for annotations too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("nvmm.")
                yield f"nvmm.{whole}" if whole in TREES else str(node.module)


def within(name: str, names: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def ours(tree: ast.AST) -> set[str]:
    return {name.removeprefix("nvmm.") for name in imports(tree) if name.startswith("nvmm.")}


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_follow_the_rules(name: str) -> None:
    if name == "__init__" or name in ENTRY_POINTS:
        return
    rule = max((r for r in ALLOWED if within(name, {r})), key=len, default=None)
    assert rule is not None, f"nvmm/{name} has no rule: add one to ALLOWED"
    forbidden = {other for other in ours(TREES[name]) if not within(other, ALLOWED[rule])}
    assert not forbidden, f"nvmm.{name} must not import {sorted(forbidden)}"


def test_no_import_cycles() -> None:
    edges = {name: ours(tree) & TREES.keys() - {name} for name, tree in TREES.items()}
    while leaves := [name for name, needed in edges.items() if not needed & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"import cycles among {sorted(edges)}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_who_may_name_what(name: str) -> None:
    tree = TREES[name]
    outside = {top for i in imports(tree) if (top := i.partition(".")[0]) in ("hydra", "omegaconf")}
    if name not in ENTRY_POINTS:
        assert outside <= ({"omegaconf"} if name == "config" else set())
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if not within(name, {"parallel", "kernels", "metrics"}):
        assert "torch.cuda" not in named, "ask nvmm.parallel for the device"
    if not within(name, {"parallel.setup", *ENTRY_POINTS}):
        assert not named & {"os.environ", "os.getenv"}, "read the environment in an entry point"


def test_entry_points_load_no_heavy_module() -> None:
    """What a refusal, --help and --cfg import must not reach torch or megatron.core."""
    for name in ("entry", "config", "problems", "rules", "signatures", "train"):
        top_level = ast.Module([s for s in TREES[name].body if not _is_definition(s)], [])
        heavy = {i.partition(".")[0] for i in imports(top_level)} & {"torch", "megatron"}
        assert not heavy, f"nvmm.{name} imports {heavy} at module level"


def _is_definition(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.ClassDef)
