"""Who may import whom, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nvmm"
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
DOORS = {"train", "evaluate", "generate", "job", "__main__"}
"""Commands: they may import every room, and nobody imports them."""
QUICK = (
    *("main", "completion", "convert", "doctor", "inspect_batch", "kernels", "plan", "torchrun"),
    "verify_parallel",
)
"""Modules of nvmm/commands/ whose --help and refusals come without torch."""
ALLOWED: dict[str, set[str]] = {
    "batch": set(),
    # Commands are doors too; `commands.main` runs the others by name, without an import.
    "commands": {
        *("config", "convert", "data", "inference.trust", "jobs.parts", "kernels"),
        *("modules.flops", "parallel", "proof", "report", "version"),
    },
    "kernels": {"config.choices"},
    "convert.formats": {
        *(f"config.{name}" for name in ("nested", "rules.rope", "rules.transformer", "signatures")),
        *(f"convert.{name}" for name in ("files", "mapping", "pickles", "safetensors", "sources")),
    },
    "io": set(),
    "parallel": {"batch", "config.choices"},
    "data": {"batch", "config.batch_sizes", "config.choices", "io"},
    # Both are read without torch.
    "config": {"parallel.environment", "parallel.fp8_recipe", "version"},
    "modules": {"batch", "config.choices", "kernels", "parallel"},
    "models": {"batch", "config.choices", "modules", "parallel"},
    "objectives": {"batch", "config.choices", "data.collate", "parallel"},
    "checkpoint": {"config.choices", "config.moved", "config.parts", "io", "parallel"},
    "training": {
        "version",
        *("batch", "checkpoint", "config.batch_sizes", "config.changes", "config.choices"),
        *("config.nested", "io"),
        *("kernels", "modules", "objectives", "parallel"),
    },
    "inference": {"batch", "checkpoint", "config", "data", "modules", "parallel"},
    "convert": {
        *("batch", "checkpoint", "config.check", "config.parts", "config.tiles", "data"),
        *("inference.trust", "io", "modules", "parallel"),
    },
    # What the rank server loads beforehand is what the tests' ranks run.
    "proof.preload": {"models", "objectives", "parallel", "proof", "training"},
    "proof": {
        *("batch", "checkpoint", "config.compose", "config.nested", "config.tiles"),
        *("data.collate", "parallel", "training"),
    },
    "evaluation": {"batch", "config.choices", "config.nested", "data", "inference", "io"},
    "jobs": {
        *("batch", "checkpoint", "config.choices", "config.nested", "data", "evaluation"),
        *("inference", "io"),
    },
    "report": {"batch", "config.nested", "data"},
    "studies": {"io", "training.summary", "version"},
    "version": set(),
}
"""Room -> what else of nvmm it may import; a room may import itself, a longer name goes first."""


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


def rule_of(name: str) -> str | None:
    return max((room for room in ALLOWED if within(name, {room})), key=len, default=None)


def foreign(name: str, room: str) -> set[str]:
    """What a module of a room imports from outside that room."""
    return {other for other in ours(TREES[name]) if not within(other, {room})}


@pytest.mark.parametrize("name", sorted(TREES.keys() - DOORS - {"__init__", ""}))
def test_imports_follow_the_rules(name: str) -> None:
    room = rule_of(name)
    assert room is not None, f"nvmm/{name} has no rule: add one to ALLOWED"
    forbidden = {other for other in foreign(name, room) if not within(other, ALLOWED[room])}
    assert not forbidden, f"nvmm.{name} must not import {sorted(forbidden)}"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_no_room_may_import_what_it_does_not(room: str) -> None:
    used = set().union(*(foreign(n, room) for n in TREES if rule_of(n) == room))
    unused = {allowed for allowed in ALLOWED[room] if not any(within(u, {allowed}) for u in used)}
    assert not unused, f"ALLOWED[{room!r}] lists {sorted(unused)}, which nothing in it imports"


def test_no_import_cycles() -> None:
    edges = {name: ours(tree) & TREES.keys() - {name} for name, tree in TREES.items()}
    while leaves := [name for name, needed in edges.items() if not needed & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"import cycles among {sorted(edges)}"


def test_rooms_import_upwards_only() -> None:
    """The rooms as wholes have no cycle either, but for the torch-free files that config reads."""
    rooms = {name.partition(".")[0] for name in TREES} - DOORS
    edges = {
        room: {
            other.partition(".")[0]
            for name in TREES
            if within(name, {room})
            for other in ours(TREES[name])
            if not (room == "config" and within(other, ALLOWED["config"]))
        }
        - {room}
        for room in rooms
    }
    while leaves := [room for room, needed in edges.items() if not needed & edges.keys()]:
        for room in leaves:
            del edges[room]
    assert not edges, f"rooms import each other: {edges}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_who_may_name_what(name: str) -> None:
    tree = TREES[name]
    outside = {top for i in imports(tree) if (top := i.partition(".")[0]) in ("hydra", "omegaconf")}
    if name not in DOORS | {"proof.preload"}:
        may = within(name, {"config", "commands"})
        assert outside <= ({"hydra", "omegaconf"} if may else set())
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if not within(name, {"parallel", "kernels", "training.metrics"}):
        assert "torch.cuda" not in named, "ask nvmm.parallel for the device"
    if not within(
        name, {"parallel.environment", "config.compose", "commands", "kernels.build", *DOORS}
    ):
        assert not named & {"os.environ", "os.getenv"}, "ask nvmm.parallel.environment"


def test_doors_and_config_load_no_heavy_module() -> None:
    """What a refusal, --help and --cfg import must not reach torch or megatron.core."""
    loaded: set[str] = set()
    quick = {"config", *(f"commands.{name}" for name in QUICK)}
    pending = [*DOORS, *(name for name in TREES if within(name, quick))]
    while pending:
        name = pending.pop()
        if name in loaded:
            continue
        loaded.add(name)
        top_level = ast.Module([s for s in TREES[name].body if not _is_lazy(s)], [])
        heavy = {i.partition(".")[0] for i in imports(top_level)} & {"torch", "megatron"}
        assert not heavy, f"nvmm.{name} imports {heavy} at module level"
        pending += ours(top_level) & TREES.keys()


def _is_lazy(statement: ast.stmt) -> bool:
    """Definitions and imports for annotations alone run nothing when a module is loaded."""
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
        return True
    return isinstance(statement, ast.FunctionDef | ast.ClassDef)
