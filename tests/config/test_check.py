"""Checks against constructors, and what a user sees on the command line."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from nvmm.config.check import accepts, check, digest, resolve, suggestion, to_plain
from nvmm.config.compose import composed

ROOT = Path(__file__).parents[2]
MODULE = """
    from dataclasses import dataclass
    from typing import Any, Literal, Optional

    class Part:
        def __init__(
            self, size: int, rate: float = 0.1, mode: Literal["a", "b"] | None = None,
            flag: bool = False, name: str = None, items: Optional[list[int]] = None, any=None,
            options: dict[str, int] | None = None, free=None, open=None,
        ): ...

    @dataclass
    class Base:
        width: int = 1

    @dataclass
    class Child(Base):
        depth: int = 2

    def open_ended(path: str, **options): ...
    def many(*values: int): ...
"""


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory: pytest.TempPathFactory):
    """A module of the user's own, found on sys.path and never imported."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_parts.py").write_text(textwrap.dedent(MODULE) + "\nraise SystemExit\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    assert "user_parts" not in sys.modules


def lines(node: Any) -> list[str]:
    """Problems of a config whose component `objective` is `node`, those of other keys left out."""
    config = OmegaConf.create({"objective": node})
    return [str(p) for p in check(config) if p.key.startswith("objective")]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("Part", {"size": 1}, None),
        ("Part", {"siz": 1, "size": 1}, "objective.siz=1 is not a parameter of user_parts.Part; d"),
        ("Part", {}, "objective.size=null must be given: user_parts.Part requires it"),
        ("Part", {"_partial_": True}, None),
        ("Part", {"_args_": [1]}, None),
        ("Part", {"_args_": [0] * 11}, "objective._args_=[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] must"),
        ("Part", {"size": "1"}, "objective.size='1' must be int"),
        ("Part", {"size": True}, "objective.size=True must be int"),
        ("Part", {"size": 1.5}, "objective.size=1.5 must be int"),
        ("Part", {"size": 1, "rate": 1}, None),
        ("Part", {"size": 1, "mode": "c"}, "objective.mode=c must be one of a, b, null"),
        ("Part", {"size": 1, "mode": None, "name": None, "items": [1]}, None),
        ("Part", {"size": 1, "flag": 1}, "objective.flag=1 must be bool"),
        ("Part", {"size": 1, "items": 3}, "objective.items=3 must be a list or null"),
        ("Part", {"size": 1, "any": {"free": ["form"]}}, None),
        ("Part", {"size": 1, "_recursive_": False, "_convert_": "all"}, None),
        ("Child", {"width": 1, "depth": 2}, None),
        (
            "Child",
            {"widht": 1},
            "objective.widht=1 is not a parameter of user_parts.Child; did you",
        ),
        ("open_ended", {"path": "x", "whatever": 1}, None),
        ("many", {"_args_": [1, 2, 3]}, None),
        (
            "Prt",
            {},
            "objective._target_=user_parts.Prt does not exist: user_parts has no 'Prt'; did",
        ),
    ],
)
def test_a_target_is_checked_against_its_constructor(
    name: str, values: dict[str, Any], expected: str | None
) -> None:
    found = lines({"_target_": f"user_parts.{name}", **values})
    assert [line[: len(expected)] for line in found] == [expected] if expected else found == []


def test_nested_targets_and_lists_are_checked() -> None:
    part = {"_target_": "user_parts.Part", "sizee": 1, "size": 1}
    found = lines({"_target_": "user_parts.open_ended", "path": "x", "a": [{"b": part}], "c": part})
    assert [line.partition("=")[0] for line in found] == [
        "objective.a[0].b.sizee",
        "objective.c.sizee",
    ]


def test_a_looked_up_function_must_exist() -> None:
    node = {"_target_": "hydra.utils.get_method", "path": "torch.nn.functional.sillu"}
    assert lines(node) == [
        "objective.path=torch.nn.functional.sillu does not exist: torch.nn.functional has no "
        "'sillu'; did you mean silu?"
    ]


def test_a_partial_of_ours_needs_what_the_code_does_not_add() -> None:
    """In nvmm the code adds keyword-only parameters; a YAML must give the others."""
    node = {"_target_": "nvmm.models.language.LanguageModel", "_partial_": True, "transformer": 1}
    assert [line.partition("=")[0] for line in lines(node)] == [
        "objective.vocab_size",
        "objective.padded_vocab_size",
    ]


def test_words_of_other_trainers_are_understood() -> None:
    node = {"_target_": "nvmm.parallel.setup.Parallel", "tp": 2}
    assert "did you mean tensor_model_parallel_size?" in lines(node)[0]


def test_keys_outside_every_constructor() -> None:
    config = OmegaConf.create({"sed": 1, "run": {"name": "x", "idd": 3}, "objective": {"a": 1}})
    found = {p.key: p.allowed for p in check(config)}
    assert "did you mean seed?" in found["sed"]
    assert "did you mean id?" in found["run.idd"]
    assert found["objective._target_"] == "must name a class or function"


def test_every_missing_value_is_listed_once() -> None:
    config = OmegaConf.create(
        {"a": "???", "b": {"c": "???", "d": "${a}", "e": ["???", 1]}, "f": "${b.c}"}
    )
    plain, problems = resolve(config)
    assert [p.key for p in problems] == ["a", "b.c", "b.e[0]"]
    assert plain["b"]["d"] == "???"
    with pytest.raises(ValueError, match=r"b\.c=\?\?\?"):
        to_plain(config)


def test_a_dangling_reference_is_a_problem() -> None:
    _, problems = resolve(OmegaConf.create({"a": {"b": "${no.such}"}}))
    assert [(p.key, p.value) for p in problems] == [("a.b", "${no.such}")]


def test_digest_depends_on_values_alone() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert to_plain(OmegaConf.create({"a": 1, "b": "${a}"})) == {"a": 1, "b": 1}


def test_suggestion_looks_into_constructors() -> None:
    config = {"model": {"_target_": "user_parts.Part", "size": 1}}
    assert suggestion("model.rat", config) == "model.rate"
    assert suggestion("modl.size", config) == "model"


# ---- the command line: one process each

HEAVY = """
import atexit, runpy, sys
heavy = lambda: [m for m in ("torch", "megatron.core", "transformers") if m in sys.modules]
atexit.register(lambda: print("HEAVY", heavy()))
sys.argv = ["nvmm.train", *sys.argv[1:]]
runpy.run_module("nvmm.train", run_name="__main__", alter_sys=True)
"""


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m nvmm.train` in another process, in an empty folder, reporting what it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=60,
    )
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    if "--multirun" not in arguments:
        assert list(cwd.iterdir()) == [], "Hydra left files behind"
    return done


def test_help_shows_groups_and_examples(tmp_path: Path) -> None:
    done = train("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "experiment/language: tiny" in done.stdout
    assert "torchrun --standalone" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--cfg", "job"], "micro_batch_size: 8"),
        (["--cfg", "job", "--package", "optim", "--resolve"], "learning_rate: 0.003"),
        (["--cfg", "hydra"], "output_subdir: null"),
        (["--info", "defaults"], "experiment/language/tiny"),
    ],
)
def test_hydra_shows_the_config(tmp_path: Path, arguments: list[str], shows: str) -> None:
    done = train("experiment=language/tiny", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert shows in done.stdout + done.stderr


def test_a_refusal_lists_everything(tmp_path: Path) -> None:
    done = train(
        "experiment=language/tiny",
        "optim.learnin_rate=1",
        "seeed=1",
        "+fooo=1",
        "+optim.lr=1",
        "model.transformer.qk_layernorm=true",
        "data.seed=5",
        "+data.tokenizer=x",
        "data.train.storage.cache_dir=x",
        "+model.transformer.num_layer=2",
        "optim.warmup_steps=1000",
        "parallel.tensor_model_parallel_size=3",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    for line in (
        "optim.learnin_rate=1 does not exist; did you mean optim.learning_rate?",
        "seeed=1 does not exist; did you mean seed?",
        "fooo=1 is not a key of configs/train.yaml",
        "optim.lr=1 is not a parameter of nvmm.training.optim.Optim; did you mean learning_rate?",
        "data.seed=5 does not exist",
        "data.train.storage.cache_dir=x does not exist",
        "data.tokenizer=x must not be given: nvmm itself gives it",
        "did you mean num_layers?",
        "optim.warmup_steps=1000 must be at most trainer.max_steps=200",
        "num_attention_heads=4 must be divisible by parallel.tensor_model_parallel_size=3",
        "tokenizer.path=??? is not set",
        "WORLD_SIZE=1 must be divisible",
    ):
        assert line in done.stderr


def test_a_parameter_that_no_yaml_names_needs_no_plus(tmp_path: Path) -> None:
    given = [
        "data.pack=true",
        "model.transformer.qk_layernorm=true",
        "data.train.build.fields.question=query",
        "+data.train.build.max_pixels=7",
    ]
    done = train("experiment=language/tiny", *given, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("pack: true", "qk_layernorm: true", "question: query", "max_pixels: 7"):
        assert line in done.stdout


LOAD = """
import sys
from nvmm.config.compose import load
sys.argv = ["nvmm.train", *sys.argv[1:]]
job = load("train")
print(sys.argv[1:] == job.overrides, job.config["data"]["pack"], "torch" in sys.modules)
"""


def test_overrides_are_kept_as_they_were_typed(tmp_path: Path) -> None:
    """So that a resume can be told them again."""
    paths = ["tokenizer.path=t", "data.train.shards=a.tar", "+model.transformer.qk_layernorm=true"]
    command = [sys.executable, "-c", LOAD, "experiment=language/tiny", "data.pack=true", *paths]
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        assert done.stdout == "True True False\n", done.stderr


def test_lora_null_takes_an_experiments_adapters_away(tmp_path: Path) -> None:
    """With the options that the experiment gives them."""
    script = LOAD.replace('["data"]["pack"]', '["lora"]')
    given = [
        "init_from=a",
        "tokenizer.path=t",
        "data.train.shards=a.tar",
        "parallel=single",
        "lora=null",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, "experiment=nv_embed/stage1", *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "True None False\n", done.stderr
    assert composed("train", ["experiment=nv_embed/stage1", "lora=null"]).lora is None
    shown = train("experiment=nv_embed/stage1", "lora=null", "--cfg", "job", cwd=tmp_path)
    assert "Hydra shows adapters that lora=null leaves out" in shown.stderr
    with pytest.raises(ValueError, match="lora=default contradicts lora=null"):
        composed("train", ["experiment=language/tiny", "lora=default", "lora=null"])


def test_a_sweep_over_a_parameter_that_no_yaml_names(tmp_path: Path) -> None:
    done = train("--multirun", "data.pack=true,7", "experiment=language/tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert "data.train.shards=??? is not set" in done.stderr
    assert "data.pack" not in done.stderr


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        ("part.rate", True),
        ("part.rat", False),
        ("part.rate.deeper", False),
        ("part.options.any.key", True),
        ("part.any", True),
        ("part.any.key", False),
        ("part.free.new", True),
        ("part.free.new.deeper", True),
        ("part.open.whatever", True),
        ("plain.new", False),
        ("new", False),
        ("part.size.deeper", False),
        ("data.seed", False),
        ("data.pack", True),
    ],
)
def test_which_keys_a_config_may_have(key: str, accepted: bool) -> None:
    part = {"_target_": "user_parts.Part", "size": 1, "free": {"a": 1}}
    part["open"] = {"_target_": "user_parts.open_ended", "path": "x"}
    data = {"_target_": "nvmm.data.loader.Data", "_partial_": True}
    assert accepts(key, {"part": part, "plain": {"a": 1}, "data": data}) == accepted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "model=??? is not chosen; add experiment=..."),
        (["data=null"], "data=null does not exist"),
        (["experiment=language/tini"], "did you mean language/tiny?"),
        (["model=langage_tiny"], "did you mean language_tiny?"),
        (["model=internvit_6b"], "model=internvit_6b does not exist"),
        (["language=qwen2_72b"], "language=qwen2_72b does not exist"),
        (["modle=language_tiny"], "modle=language_tiny does not exist; did you mean model?"),
        (["seed=", "1"], "no spaces around ="),
        (["--multirun", "seed=1,2", "precision.dtype=fp16"], "one of fp32, bf16"),
        (["--resolve"], "--resolve"),
        (["experiment=nv_embed/stage1", "lora=null", "lora.rank=8"], "lora.rank=8 contradicts"),
        (["experiment=language/tiny", "seed=1.5"], "seed=1.5 must be"),
        (["experiment=language/tiny", "seed=${sede}"], "seed=${sede} cannot be resolved"),
    ],
)
def test_other_refusals(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = train(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr


def test_groups_of_the_users_own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = tmp_path_factory.mktemp("groups")
    (folder / "optim").mkdir()
    (folder / "optim" / "mine.yaml").write_text("defaults: [adamw]\nlearning_rate: 0.125\n")
    for where in (["--config-dir", str(folder)], [f"hydra.searchpath=[file://{folder}]"]):
        done = train(*where, "optim=mine", "--cfg", "job", "--package", "optim", cwd=tmp_path)
        assert "learning_rate: 0.125" in done.stdout
    done = train("--config-dir", str(folder), "optim=mime", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean mine?" in done.stderr


def test_other_ranks_say_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvmm.config import compose

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        compose.refuse("train", ["first", "second"])
    assert stopped.value.code == compose.BAD_CONFIG


TEXTS = """
import json, sys
from nvmm.config.compose import load
sys.argv = ["nvmm.train", *sys.argv[1:]]
job = load("train")
fields = job.config["data"]["train"]["build"]["fields"]
print(json.dumps([job.config["run"], job.config["tokenizer"]["path"], fields, job.overrides]))
"""


def test_text_is_kept_to_the_character(tmp_path: Path) -> None:
    """Hydra reads numbers, booleans and null in it."""
    typed = ["run.id=007", "run.name=1_000", "run.note=Null", "run.dir=1e5", "tokenizer.path=true"]
    typed += ["data.train.build.fields.question=1.50", "data.train.shards=7"]
    command = [sys.executable, "-c", TEXTS, "experiment=language/tiny", *typed]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    run, path, fields, overrides = json.loads(done.stdout or "[]") or pytest.fail(done.stderr)
    assert run == {"id": "007", "name": "1_000", "note": "Null", "dir": "1e5"}
    assert path == "true" and fields == {"question": "1.50"}
    assert overrides == ["experiment=language/tiny", *typed]


def test_a_sweep_keeps_its_texts() -> None:
    from nvmm.config import compose

    texts = compose._swept_texts(["run.id=x,1e5,1_000,Null", "seed=1,2", "a=[1,2]", "b='1,2'"])
    changed = {job: typed for job, typed in texts.items() if job != typed}
    assert changed == {
        "run.id=100000.0": "run.id=1e5",
        "run.id=1000": "run.id=1_000",
        "run.id=null": "run.id=Null",
    }


SLURM = [({"SLURM_NTASKS": "2"}, "Slurm"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR")]
SLURM += [({"SLURM_PROCID": "1"}, "SLURM_PROCID=1 must be below"), ({"RANK": "x"}, "RANK=x in")]
SLURM += [({"MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "MASTER_PORT=abc in")]
SLURM += [({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None)]
SLURM += [({"SLURM_NTASKS": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None)]


@pytest.mark.parametrize(("variables", "says"), SLURM)
def test_a_launcher_that_is_half_there_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str | None
) -> None:
    from nvmm.parallel import environment

    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    problem = environment.launch_problem()
    assert problem is None if says is None else says in str(problem)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "nvmm.train: interrupted"),
        (OSError(28, "No space left on device", "/full"), 1, "/full: No space left on device"),
        (OSError(2, "No such file or directory", "/nope"), 2, "/nope: No such file"),
        (OSError(30, "Read-only file system", "/a"), 2, "/a: Read-only file system"),
        (OSError(17, "File exists", "/a/file"), 2, "/a/file: File exists"),
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), 2, "'faiss': install the"),
        (FloatingPointError("step 3: loss nan"), 1, "nvmm.train: step 3: loss nan"),
        (TimeoutError("ranks [1] did not come"), 1, "ranks [1]"),
        (InstantiationException("Error in call\nfull_key: model"), 2, "full_key: model"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), 1, "data.num_workers"),
    ],
)
def test_a_failure_is_a_sentence(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, says: str
) -> None:
    from nvmm.config import compose

    with pytest.raises(SystemExit) as stopped, compose.failures("train"):
        raise error from AssertionError("a library's own check")
    assert stopped.value.code == code
    assert says in capsys.readouterr().err


def test_a_value_error_of_ours_is_a_refusal_and_a_fault_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nvmm.config import compose
    from nvmm.config.choices import require

    with pytest.raises(SystemExit) as stopped, compose.failures("train"):
        require("optim.schedule", "wsd", Literal["cosine", "linear"])
    assert stopped.value.code == compose.BAD_CONFIG
    assert "optim.schedule=wsd" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a fault"), compose.failures("train"):
        raise ValueError("a fault")


@pytest.mark.parametrize("key", ["seed", "resume", "run", "kernels"])
def test_a_key_that_was_taken_away_is_missing(key: str) -> None:
    from nvmm.config.compose import composed

    given = ["experiment=language/tiny", "tokenizer.path=t", "data.train.shards=a.tar"]
    problems = [str(problem) for problem in check(composed("train", [*given, f"~{key}"]))]
    assert f"{key}=null is missing; leave out the ~" in problems


def test_where_configs_are_is_an_override_too() -> None:
    """So that overrides.yaml, the jobs of a sweep and a resume have it; the order is free."""
    from nvmm.config.compose import _options_first, _sources

    typed = ["a=1", "--config-dir", "conf", "hydra.searchpath=[file://x]", "--info", "defaults"]
    ordered = ["--config-dir", "conf", "--info", "defaults", "a=1", "hydra.searchpath=[file://x]"]
    assert _options_first([*typed, "--resolve"]) == [*ordered[:4], "--resolve", *ordered[4:]]
    assert _sources(ordered) == ["--config-dir=conf", "hydra.searchpath=[file://x]"]
    assert _sources(["a=1", "-m"]) == []
