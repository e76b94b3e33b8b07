"""Every key of a config does something: changed, it changes a step of training or a batch, or it is
refused.

A leaf is a key of a composed config or a parameter of its constructors that a config may give. Its
other values follow from its type; a leaf that acts only beside another one has that in BESIDE.
A model, an objective or an optimizer shows it in three steps on synthetic batches, data in its
batches, and everything else in what a short run of `nvmm.train` prints and leaves.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException

from nvmm.config.check import _parameters, check, to_plain
from nvmm.config.compose import composed
from nvmm.config.signatures import default_of, signature
from nvmm.data.loader import Data
from nvmm.data.prepare import digits
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.kernels.library import Kernels
from nvmm.proof.equivalence import build_trainer, shrink
from nvmm.proof.synthetic import SyntheticData, synthetic_steps
from tests.data.conftest import image_bytes
from tests.data.samples.test_sounds import noise, wave
from tests.ranks import run_ranks

SYSTEMS = (
    "language/tiny",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("nvlm_d/quickstart", "nvlm_x/quickstart", "nvlm_h/quickstart"),
            *("nv_embed/tiny", "minilm/finetune"),
            *(f"preference/tiny{loss}" for loss in ("", " ipo", " rpo", " kto")),
        )
    ),
)
"""Experiments, some with another objective."""
SPECIAL = ("_target_", "_partial_")

_LOOKUP = "hydra.utils.get_method"
WAYS = {
    name: {"_target_": "nvmm.data.samples.augmentation.Augmentation", "prompt": f"{name}?"}
    for name in ("one", "other")
}
VALUES: dict[str, list[Any]] = {
    "activation_func.path": ["torch.nn.functional.relu"],
    "normalization": ["LayerNorm", "RMSNorm"],
    "optim.betas": [[0.5, 0.6]],
    "optim.clip_grad": [1e-3],
    "optim.decay_steps": [2],
    "optim.cooldown_steps": [1],
    "optim.warmup_tokens": [200],
    "optim.decay_tokens": [100],
    "optim.cooldown_tokens": [20],
    "optim.eps": [1e-2],
    "optim.freeze": [["*linear_qkv*"]],
    "optim.min_learning_rate": [1e-4],
    "optim.no_decay": [["*linear_qkv*"]],
    "optim.groups": [[{"pattern": "*linear_qkv*", "learning_rate": 1e-5}]],
    "image_mean": [[0.1, 0.2, 0.3]],
    "image_std": [[0.1, 0.2, 0.3]],
    "rope_scaling": [{"_target_": "nvmm.modules.rope_scaling.Linear", "factor": 2.0}],
    "matryoshka_dims": [[8]],
    "objective.attributes": [
        [*("verbosity", "complexity", "coherence", "correctness", "helpfulness"), *"abcd"]
    ],
    "objective.trained": [["helpfulness"]],
    "placement": ["before"],
    "connector.activation_func": [{"_target_": _LOOKUP, "path": "torch.nn.functional.relu"}],
    "cross_attention.offset": [0],
    "cross_attention.activation_func": [{"_target_": _LOOKUP, "path": "torch.nn.functional.relu"}],
    "template.system": ["Be brief."],
    "build.max_pixels": [1],
    "build.instruction": ["Find it."],
    "build.query_prefix": ["query: "],
    "build.document_prefix": ["passage: "],
    "build.fields": [{"question": "query"}],
    "build.form": [{"_target_": "nvmm.data.samples.forms.Document"}],
    "build.min_tiles": [6],
    "build.augment": [{"other": 1.0}],
    "build.augmentations": [{"one": WAYS["other"], "other": WAYS["one"]}],
    "build.most_clips": [8],
    "front_end.channel": ["mean"],
    "build.pad": [[1, 2, 3]],
    "data.sequence_length": [24],
    "checkpoint.save_interval": [2],
    "checkpoint.keep_last": [1],
    "trainer.max_minutes": [1e-6],
    "trainer.batch_ramp": [[{"global_batch_size": 4, "steps": 1}]],
    "trainer.profile": [[1, 2]],
    "trainer.validation_interval": [2],
    "tokenizer.extra_tokens": [["<extra>"]],
    "tokenizer.image_token": ["<|im_end|>"],
    "tokenizer.end_of_turn": ["<|endoftext|>"],
    "lora.targets": [["decoder.*linear_fc1"]],
    "lora.train": [["output_layer.*"]],
    "fp8.exclude": [["*linear_fc1*"]],
    "fp8.format": ["e4m3"],
    "precision.fp8": [{"_target_": "nvmm.parallel.fp8_recipe.Fp8"}],
}
"""End of a key -> values to try, where its type does not say enough."""
DRAWN = {"data.train.build.augmentations": WAYS, "data.train.build.augment": {"one": 1.0}}
BESIDE: dict[str, dict[str, Any]] = {
    "optim.decay_steps": {"optim.min_learning_rate": 1e-5},
    "optim.warmup_tokens": {"optim.warmup_steps": 0},
    "optim.decay_tokens": {"optim.warmup_steps": 0},
    "optim.cooldown_tokens": {"optim.warmup_steps": 0, "optim.decay_tokens": 200},
    "teacher_temperature": {"objective.distillation_weight": 1.0},
    "optim.weight_decay": {"optim.learning_rate": 0.1},
    "optim.no_decay": {"optim.weight_decay": 1.0},
    "build.augment": DRAWN,
    "build.augmentations": DRAWN,
    "build.min_tiles": {"data.train.build.max_tiles": 6, "data.validation.build.max_tiles": 6},
    "connector.activation_func": {"model.connector.hidden_size": 32},
    "build.use_thumbnail": {"data.train.build.max_tiles": 2, "data.validation.build.max_tiles": 2},
    "cross_attention.offset": {"model.cross_attention.interval": 2},
    "cross_attention.activation_func": {"model.cross_attention.ffn_hidden_size": 64},
    "position_offset": {
        "model.position_embedding_type": "learned_absolute",
        "model.language.position_embedding_type": "learned_absolute",
    },
    "data.window": {"data.pack": True},
    "sft_per_token": {"objective.sft_weight": 0.1},
    "precision.grad_reduce_in_fp32": {"precision.dtype": "bf16"},
}
"""End of a key -> what it needs to act, where the config has that key's parent."""
UNSEEN: dict[str, str] = {
    "padded_vocab_size": "rows of padding stay out of the softmax: the loss must not change",
    "max_sequence_length": "limits sequences: tests/config/test_rules.py",
    "tags.form": "is the same where each tag is one token: tests/data/samples/test_chat.py",
    "vision.qk_norm": "has one value: tests/modules/encoders/test_vision.py",
    "objective.grad_cache": "is another way to the same gradients",
    "objective.cross_rank_negatives": "acts between data-parallel ranks alone",
    "objective.reference": "is where the same numbers come from: tests/training/test_preference.py",
    "build.reference": "names scores: the same test",
    "data.num_workers": "must change nothing",
    "data.blend": "is other datasets altogether: tests/data/order/test_blend.py",
    "data.max_bad_fraction": "counts from 1,000 samples on: tests/data/test_loader.py",
    "data.log_samples": "is a column of metrics.jsonl: tests/training/test_trainer.py",
    "shards": "are files: another name finds none",
    "index_dir": "is where an index is kept: tests/data/shards/test_index.py",
    "storage": "is how remote shards are read: tests/data/shards/test_storage.py",
    "build.drop_images": "acts on several images: tests/data/samples/test_interleaved.py",
    "connector.pad_grid": "acts on a grid that does not divide: tests/modules/test_connector.py",
    "build.attended": "must fit the model: tests/data/samples/test_attended.py",
    "template.generation_prompt": "is of prompts alone: tests/data/samples/test_chat.py",
    "build.supervise": "is of several answers: tests/data/samples/test_contexts.py",
    "template.end_earlier": "is of several answers: the same test",
    "template.trim": "is of white space around texts: tests/data/samples/test_jinja_template.py",
    "parallel.overlap_grad_reduce": "gives the same sums sooner: tests/proof/test_equivalence.py",
    "parallel.overlap_param_gather": "gives the same weights sooner: the same test",
    "parallel.encoder": "lays out the same encoder over ranks: the same test",
    "parallel.recompute_granularity": "gives the same gradients in less memory: the same test",
    "parallel.variable_seq_lengths": "is what pipeline stages send: tests/parallel/test_setup.py",
    "parallel.timeout_minutes": "acts when a rank hangs: tests/parallel/test_setup.py",
    "checkpoint.async_save": "writes the same files: tests/checkpoint/test_checkpoint.py",
    "logger.wandb_project": "is the service's: tests/training/test_metrics.py",
    "trainer.on_nonfinite": "acts on a loss that is not finite: tests/training/test_trainer.py",
    "moments_dtype": "changes what a step stores, which the next ones read",
}
"""End of a key -> why one rank's steps on synthetic batches may not show it."""


def leaves(node: Any, key: str) -> Iterator[tuple[str, Any, ast.expr | None]]:
    """(key, value, annotation) of everything below `node` that a config may set."""
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = str(node["_target_"])
    accepted = _parameters(node) if target.startswith("nvmm.") else {}
    for name in [*node, *(name for name in accepted if name not in node)]:
        if name in SPECIAL:
            continue
        value = node[name] if name in node else default_of(target, name)
        if isinstance(value, dict) and "_target_" in value:
            yield from leaves(value, f"{key}.{name}")
        else:
            parameter = signature(target).parameters.get(name)
            yield f"{key}.{name}", value, parameter.annotation if parameter else None


def others(key: str, value: Any, annotation: ast.expr | None) -> list[Any]:
    """Other legal-looking values of a leaf."""
    for end, values in VALUES.items():
        if f".{key}".endswith(f".{end}"):
            return [other for other in values if other != value]
    text = ast.unparse(annotation) if annotation is not None else ""
    if "Literal" in text:
        words = [n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant)]
        return [word for word in words if word not in (value, None)]
    if isinstance(value, bool) or (value is None and "bool" in text):
        return [not value]
    if isinstance(value, int) or (value is None and "int" in text):
        number = value or 0
        return [number + 1, number * 2, number + 8, number - 1, number // 2]
    if isinstance(value, float) or (value is None and "float" in text):
        number = value or 0.0
        return [number * 2 + 0.1, number / 2, number + 1.0]
    if isinstance(value, str) or (value is None and "str" in text):
        return [f"{value}x"]
    return []


def placed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with `value` at `key`; unchanged where the key has no parent."""
    changed = copy.deepcopy(config)
    *parents, last = key.split(".")
    node: Any = changed
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[last] = value
    return changed


def beside(config: dict[str, Any], key: str) -> dict[str, Any]:
    for end, needs in BESIDE.items():
        if f".{key}".endswith(f".{end}"):
            for other, value in needs.items():
                parent: Any = config
                for part in other.split(".")[:-1]:
                    parent = parent.get(part, {}) if isinstance(parent, dict) else {}
                accepted = _parameters(parent) if isinstance(parent, dict) else {}
                if other.rpartition(".")[2] in accepted:
                    config = placed(config, other, value)
    return config


def digest_of(tensors: Any) -> str:
    """Of nested values and tensors, bit by bit."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(str((value.dtype, tuple(value.shape))).encode())
            total.update(value.detach().float().numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                add(str(name))
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif hasattr(value, "__dataclass_fields__"):
            add({name: getattr(value, name) for name in value.__dataclass_fields__})
        else:
            total.update(repr(value).encode())

    add(tensors)
    return total.hexdigest()


@functools.cache
def experiment(name: str) -> dict[str, Any]:
    given = ["tokenizer.path=given", "data.train.shards=given", "init_from=null"]
    name, *objective = name.split()
    given += [f"objective={other}" for other in objective]
    return to_plain(composed("train", [f"experiment={name}", "parallel=single", *given]))


def shrunk(name: str) -> dict[str, Any]:
    """Small enough to take three steps in a tenth of a second, with dropout as it is: none."""
    small = shrink(experiment(name))
    return {key: small[key] for key in small if key not in ("parallel",)}


def outcome(config: dict[str, Any], folder: Path) -> str:
    """What three optimizer steps see, compute and leave."""
    steps = synthetic_steps(config, 3, 2)
    trainer = build_trainer(config, SyntheticData(steps), folder, max_steps=4, global_batch_size=2)
    seen: list[Any] = []
    for step, batches in enumerate(steps):
        result = trainer.forward_backward(batches)
        seen += [result["loss"], trainer.update(step, result["loss"], batches)[0]]
    state = {name: value for name, value in trainer.chunks[0].state_dict().items()}
    return digest_of([seen, {n: v for n, v in state.items() if isinstance(v, torch.Tensor)}])


def _at(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def is_unseen(key: str) -> bool:
    return any(f".{key}".endswith(f".{end}") for end in UNSEEN)


def verdict(config: dict[str, Any], key: str, values: list[Any], observe: Any) -> str:
    """acts | refused | dead, of a leaf."""
    before = observe(config)
    known = {str(problem) for problem in check(config)}
    refused = True
    for value in [other for other in values if other != _at(config, key)]:
        changed = placed(config, key, value)
        if any(p.key == key and str(p) not in known for p in check(changed)):
            continue
        try:
            after = observe(changed)
        except (ValueError, TypeError, AssertionError, RuntimeError, InstantiationException):
            continue
        refused = False
        if after != before:
            return "acts"
    return "refused" if refused else "dead"


def training_leaves(name: str) -> list[tuple[str, Any, ast.expr | None]]:
    config = shrunk(name)
    sections = ("model", "objective", "optim")
    return [leaf for section in sections for leaf in leaves(config[section], section)]


@pytest.mark.parametrize(
    "name", [*SYSTEMS, pytest.param("nemotron4/reward_tiny", marks=pytest.mark.slow)]
)
def test_every_key_of_model_objective_and_optimizer_acts(
    world: None, name: str, tmp_path: Path
) -> None:
    Kernels.all("eager").install(log=False)
    observe = functools.lru_cache(maxsize=4)(lambda text: outcome(ast.literal_eval(text), tmp_path))
    dead, silent = [], []
    embeds = "pooling" in shrunk(name)["model"]
    for key, value, annotation in training_leaves(name):
        values = others(key, value, annotation)
        headless = embeds or "reward" in name
        if is_unseen(key) or (key == "model.vocab_size" and headless):
            continue  # without an output layer; the tokenizer is checked against it
        if not values:
            silent.append(key)
        else:
            config = beside(shrunk(name), key)
            if verdict(config, key, values, lambda c: observe(repr(c))) == "dead":
                dead.append(key)
    Kernels().install(log=False)
    assert not dead, f"{name}: these keys change nothing: {dead}"
    assert not silent, f"{name}: no other value is known of {silent}; add them to VALUES"


@functools.cache
def shards(folder: Path) -> Path:
    """The quickstart's strings with a damaged sample and a record under other names, and records of
    retrieval, in shards of a few."""
    from nvmm.data.shards.dataset import write_shards

    amounts = digits.Amounts(text=8, single=8, strings=40, validation=8, test=8)
    digits.build(str(folder), amounts)
    damaged = [{"__key__": f"bad{i}", "json": b"{"} for i in range(3)]
    for part in ("strings", "retrieval"):
        (folder / part).mkdir(exist_ok=True)
        write_shards(folder / part, "train-bad", damaged)
    records = [
        {
            "query": f"where is {i}",
            **({"instruction": "Find the place."} if i % 2 else {}),
            "positive": f"here is {i}",
            "negatives": [f"there is {j}" for j in range(i, i + 9)],
            "positive_ids": [f"id{j}" for j in range(i, i + 12)],
            "positive_image": "positive.png",
        }
        for i in range(24)
    ]
    write_shards(
        folder / "retrieval",
        "train",
        [
            {
                "__key__": f"k{i}",
                "json": json.dumps(r).encode(),
                "positive.png": image_bytes(200, 99),
            }
            for i, r in enumerate(records)
        ],
    )
    return folder


def sounds(folder: Path) -> None:
    """Clips whose samples every key of their builder changes: of two channels, longer than the most
    windows, many of them, and a text that is too long."""
    from nvmm.data.shards.dataset import write_shards

    (folder / "sounds").mkdir(exist_ok=True)
    both = np.stack([noise(2.0, 8000, 1), noise(2.0, 8000, 2)], axis=1)
    samples = []
    for i in range(12):
        count = 9 if i == 0 else 1 + i % 2
        clips = [
            {"sound": f"{n}.wav", "prompt": "What?" * (70 if i == 1 else 1), "answer": f"A Dog {n}"}
            for n in range(count)
        ]
        record = {"clips": clips, "task": "naming", "interleaved": "similar"}
        members = {clip["sound"]: wave(both * 0.5, 8000) for clip in clips}
        samples.append({"__key__": f"k{i}", "json": json.dumps(record).encode(), **members})
    write_shards(folder / "sounds", "train", samples)
    write_shards(folder / "sounds", "train-bad", [{"__key__": "bad", "json": b"{"}])


def batches_of(config: dict[str, Any], tokenizer: Tokenizer) -> str:
    from nvmm.config.compose import instantiate

    data: Data = instantiate(config["data"])(tokenizer=tokenizer, seed=1)
    seen: list[Any] = []
    for split in ("train", "validation") if config["data"].get("validation") else ("train",):
        steps = data.batches(
            split=split, global_batch_size=16, micro_batch_size=1 if data.pack else 2
        )
        seen += [batch for _, step in zip(range(3), steps, strict=False) for batch in step]
    return digest_of(seen)


@pytest.mark.parametrize(
    "name",
    (
        pytest.param("nvlm_d/quickstart", marks=pytest.mark.slow),
        "mm_embed/tiny",
        pytest.param("audio_flamingo/tiny", marks=pytest.mark.slow),
    ),
)
def test_every_key_of_the_data_acts(name: str, tmp_path: Path) -> None:
    folder = shards(tmp_path)
    config = copy.deepcopy({"data": experiment(name)["data"]})
    tokenizer = Tokenizer(str(folder / "tokenizer"))
    part = "strings" if "nvlm" in name else "retrieval"
    if "audio" in name:
        sounds(folder)
        extra = ("<audio>", "<SEP>", "<|endofchunk|>", "</s>")
        tokenizer, part = Tokenizer(str(folder / "tokenizer"), extra_tokens=extra), "sounds"
        config["data"]["train"]["build"]["front_end"]["most_windows"] = 4
    config["data"]["num_workers"] = 0
    config["data"]["train"]["shards"] = [str(folder / part / "train-*.tar")]
    if config["data"].get("validation"):
        config["data"]["validation"]["shards"] = [str(folder / part / "validation-*.tar")]
    dead = []
    for key, value, annotation in leaves(config["data"], "data"):
        values = others(key, value, annotation)
        if values and not is_unseen(key):
            near = beside(config, key)
            if verdict(near, key, values, lambda c: batches_of(c, tokenizer)) == "dead":
                dead.append(key)
    assert not dead, f"{name}: these keys change nothing: {dead}"


# -- what is left of a run ------------------------------------------------------------------------

NUMBERS = (
    "step",
    "loss",
    "validation_loss",
    "grad_norm",
    "num_tokens",
    "num_samples",
    "skipped_steps",
    "datasets",
)
ROOMS = ("kernels", "tokenizer", "parallel", "precision", "lora", "checkpoint", "trainer", "logger")


def run(rank: int, world_size: int, init: str, config: dict[str, Any], folder: Path) -> str:
    """Train; digest what that prints and leaves, but for times, paths and the config itself."""
    from nvmm import train
    from nvmm.config.compose import Job

    shutil.rmtree(folder, ignore_errors=True)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        train.train(Job(config | {"run": config["run"] | {"dir": str(folder)}}, []))
    records = [
        {key: record.get(key) for key in NUMBERS}
        for name in ("metrics.jsonl", "validation.jsonl")
        if (folder / name).exists()
        for record in map(json.loads, (folder / name).read_text().splitlines())
    ]
    states = [json.loads(file.read_text()) for file in sorted(folder.rglob("state.json"))]
    files = [
        (str(file.relative_to(folder)), file.stat().st_size if file.suffix == ".distcp" else 0)
        for file in sorted(folder.rglob("*"))
        if "events.out" not in file.name
    ]
    words = [word for word in printed.getvalue().split() if not re.search(r"[\d/]", word)]
    tokenizers = [state["state"]["tokenizer_digest"] for state in states]
    return digest_of([records, files, words, tokenizers])


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("precision=fp8", "lora=default")], ids=["plain", "fp8"])
def test_every_key_of_a_run_acts(options: tuple[str, ...], tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    overrides = [
        *("experiment=language/tiny", "parallel=single", f"tokenizer.path={folder}/tokenizer"),
        *(f"data.train.shards={folder}/text/train-*.tar", "trainer.max_steps=4", *options),
        *("trainer.global_batch_size=2", "trainer.micro_batch_size=2", "optim.warmup_steps=1"),
        *(
            "checkpoint.save_interval=1",
            "trainer.validation_interval=1",
            *(["lora.targets=[decoder.*linear_*]"] * bool(options)),
        ),
    ]
    config = to_plain(composed("train", overrides))
    config["data"]["validation"] = copy.deepcopy(config["data"]["train"])
    dead, silent = [], []
    observe = functools.lru_cache(maxsize=4)(
        lambda text: run_ranks(run, 1, ast.literal_eval(text), tmp_path / "run")[0]
    )
    for key, value, annotation in (leaf for room in ROOMS for leaf in leaves(config[room], room)):
        values = others(key, value, annotation)
        if is_unseen(key):
            continue
        if not values:
            silent.append(key)
        elif verdict(beside(config, key), key, values, lambda c: observe(repr(c))) == "dead":
            dead.append(key)
    assert not dead, f"these keys change nothing: {dead}"
    assert not silent, f"no other value is known of {silent}; add them to VALUES"
