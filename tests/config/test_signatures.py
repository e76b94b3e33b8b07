"""Constructor signatures read from source: equal to inspect's, and nothing is imported."""

import ast
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nvmm.config.changes import compare
from nvmm.config.signatures import (
    UNREADABLE,
    UnknownTargetError,
    completed,
    default_of,
    signature,
)

PACKAGE = {
    "__init__.py": """
        from .parts import Part as Renamed
        from .stars import *
        from . import parts as alias
        try:
            from missing_package import Fallback
        except ImportError:
            from .parts import Fallback
        Assigned = alias.Part
        made_at_run_time = alias.make()
    """,
    "parts.py": """
        import dataclasses
        from dataclasses import KW_ONLY, InitVar, dataclass, field
        from typing import ClassVar, NamedTuple, overload
        from .base import Base

        class Part:
            def __init__(self, size: int, /, depth, *rest, flag=False, other=None): ...
            @classmethod
            def build(cls, path: str, strict=True): ...
            @staticmethod
            def plain(value): ...
            class Nested:
                def __init__(self, inside): ...

        class Inherits(Part):
            pass

        class Anything:
            def __init__(self, **options): ...

        class Nothing:
            pass

        class Fallback:
            def __init__(self, fallback): ...

        class Pair(NamedTuple):
            left: int
            right: int = 0

        @dataclass(frozen=True)
        class Config(Base):
            required: int
            registry: ClassVar[dict] = {}
            made: int = field(init=False, default=3)
            values: list = field(default_factory=list)
            start: InitVar[int] = 0
            shared: int = 7
            _: KW_ONLY
            late: int
            later: int = dataclasses.field(default=1, kw_only=True)

        class PlainChild(Config):
            pass

        @overload
        def function(a): ...
        @overload
        def function(a, b): ...
        def function(a, b=None, *, c, **options): ...
        def make(): ...
    """,
    "base.py": """
        import dataclasses
        @dataclasses.dataclass
        class Base:
            shared: int = 1
            inherited: str = "x"
    """,
    "words.py": """
        from typing import Literal
        Mode = Literal["a", "b"]
        SIZES = (1, 2)
        MOST = 7
        Other = dict[str, int]
    """,
    "worded.py": """
        from dataclasses import dataclass
        from typing import Literal
        from .words import MOST, SIZES, Other
        from .words import Mode as Way
        Here = Literal["c"]

        @dataclass
        class Worded:
            here: Here = "c"
            there: Way | None = None
            sizes: tuple[int, ...] = SIZES

        def function(way: Way, other: Other, most: int = -MOST, late: float = 1e-3): ...
    """,
    "stars.py": "class Starred:\n    def __init__(self, star): ...\n",
    "lazy.py": "def __getattr__(name): ...\n",
    "explodes.py": "class Safe:\n    def __init__(self, a): ...\nraise SystemExit('imported')\n",
}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("path")
    (folder / "sig_package").mkdir()
    for name, text in PACKAGE.items():
        (folder / "sig_package" / name).write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("target", "names", "required"),
    [
        ("parts.Part", "size depth flag other", "size depth"),
        ("Renamed", "size depth flag other", "size depth"),
        ("Assigned", "size depth flag other", "size depth"),
        ("alias.Inherits", "size depth flag other", "size depth"),
        ("Starred", "star", "star"),
        ("Fallback", "fallback", "fallback"),
        ("parts.Part.build", "path strict", "path"),
        ("parts.Inherits.build", "path strict", "path"),
        ("parts.Part.plain", "value", "value"),
        ("parts.Part.Nested", "inside", "inside"),
        ("parts.Nothing", "", ""),
        ("parts.Pair", "left right", "left"),
        ("parts.Config", "shared inherited required values start late later", "required late"),
        ("parts.PlainChild", "shared inherited required values start late later", "required late"),
        ("parts.function", "a b c", "a c"),
        ("explodes.Safe", "a", "a"),
    ],
)
def test_reads_parameters_without_importing(target: str, names: str, required: str) -> None:
    found = signature(f"sig_package.{target}")
    assert list(found.parameters) == names.split()
    assert [p.name for p in found.parameters.values() if p.required] == required.split()
    assert "sig_package" not in sys.modules


def test_open_and_unreadable_signatures() -> None:
    assert signature("sig_package.parts.Anything").any_keyword
    assert signature("sig_package.parts.function").any_keyword
    assert signature("sig_package.parts.Part").any_positional
    assert not signature("sig_package.parts.Part").any_keyword
    for target in ("sig_package.lazy.Anything", "sig_package.made_at_run_time", "math.sqrt"):
        assert signature(target) is UNREADABLE


def test_positions_and_defaults() -> None:
    parameters = signature("sig_package.parts.Config").parameters
    assert [p.name for p in parameters.values() if not p.positional] == ["late", "later"]
    assert signature("sig_package.parts.function").parameters["b"].nullable


def test_names_of_literals_and_constants_are_followed() -> None:
    fields = signature("sig_package.worded.Worded").parameters
    assert ast.unparse(fields["here"].annotation) == "Literal['c']"
    assert ast.unparse(fields["there"].annotation) == "Literal['a', 'b'] | None"
    parameters = signature("sig_package.worded.function").parameters
    assert ast.unparse(parameters["way"].annotation) == "Literal['a', 'b']"
    assert ast.unparse(parameters["other"].annotation) == "Other"


@pytest.mark.parametrize(
    ("target", "name", "default"),
    [
        ("sig_package.worded.Worded", "here", "c"),
        ("sig_package.worded.Worded", "there", None),
        ("sig_package.worded.Worded", "sizes", [1, 2]),
        ("sig_package.worded.Worded", "missing", None),
        ("sig_package.worded.function", "late", 1e-3),
        ("sig_package.worded.function", "most", -7),
        ("sig_package.no_such", "x", None),
    ],
)
def test_defaults_are_read_as_a_config_says_them(target: str, name: str, default: object) -> None:
    assert default_of(target, name) == default


@pytest.mark.parametrize(
    ("target", "missing", "suggested"),
    [
        ("sig_package.parts.Patr", "Patr", "Part"),
        ("sig_package.partz.Part", "partz", "parts"),
        ("sig_package.parts.Part.biuld", "biuld", "build"),
        ("no_such_package.Part", "no_such_package", "nvmm"),
        ("sig_package.parts", "parts", None),
    ],
)
def test_unknown_targets(target: str, missing: str, suggested: str | None) -> None:
    with pytest.raises(UnknownTargetError) as caught:
        signature(target)
    assert caught.value.missing == missing
    assert suggested is None or suggested in caught.value.names


def test_agrees_with_inspect_on_installed_classes() -> None:
    """Over standard-library and Hydra classes that are cheap to import."""
    for target in (
        "argparse.ArgumentParser",
        "logging.handlers.SocketHandler",
        "fractions.Fraction",
    ):
        owner, _, name = target.rpartition(".")
        found = signature(target)
        real = inspect.signature(getattr(__import__(owner, fromlist=["_"]), name)).parameters
        assert list(found.parameters) == [n for n, p in real.items() if p.kind < 4 and p.kind != 2]


@pytest.mark.slow
def test_agrees_with_inspect_on_transformer_config() -> None:
    target = "megatron.core.transformer.transformer_config.TransformerConfig"
    found = signature(target)
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert list(found.parameters) == list(inspect.signature(TransformerConfig).parameters)


def test_transformer_config_without_megatron() -> None:
    code = (
        "import sys; from nvmm.config.signatures import signature;"
        "t = 'megatron.core.transformer.transformer_config.TransformerConfig';"
        "p = signature(t).parameters;"
        "print(len(p), 'num_layers' in p, 'tensor_model_parallel_size' in p,"
        " {'torch', 'megatron', 'megatron.core'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split(maxsplit=3)
    assert int(output[0]) > 200
    assert output[1:] == ["True", "True", "set()\n"]


def test_a_run_keeps_what_its_constructors_say_by_themselves() -> None:
    """A default that changes later does not change what a checkpoint was trained with."""
    optim = {"_target_": "nvmm.training.optim.Optim", "learning_rate": 1e-3}
    foreign = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}
    stated = completed({"optim": optim, "list": [foreign]})
    assert stated["optim"] | optim == stated["optim"]
    assert stated["optim"]["schedule"] == "cosine" and stated["optim"]["betas"] == [0.9, 0.95]
    assert stated["list"] == [foreign]
    assert completed(stated) == stated
    assert compare({"optim": optim}, {"optim": stated["optim"]}) == ([], [])
