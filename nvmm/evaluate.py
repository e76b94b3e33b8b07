"""Score a checkpoint: `python -m nvmm.evaluate checkpoint=DIR benchmark=NAME`.

Alone or under torchrun. Any tensor and pipeline parallel size serves, whatever the checkpoint was
trained with; what is left of the world is data parallel and shares the questions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm import entry
from nvmm.rules import violations

if TYPE_CHECKING:
    from torch.nn import Module

    from nvmm.batch import Sample
    from nvmm.data.tokenizer import Tokenizer
    from nvmm.evaluation.benchmark import Benchmark, Prediction

_TRUSTED = (
    *("nvmm.models.", "nvmm.modules.", "nvmm.data.", "nvmm.parallel.setup.", "nvmm.parallel.fp8."),
    *("nvmm.kernels.library.", "megatron.core."),
)
# Functions of torch say that they live in one of these.
_TRUSTED_FUNCTIONS = ("torch", "torch.nn.functional", "torch._C._nn")
_KERNELS = "nvmm.kernels.library.Kernels"
_GET_METHOD = "hydra.utils.get_method"
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Restored:
    """A checkpoint ready to answer.

    path: the checkpoint's folder; model: this rank's one chunk, in eval mode; builder: the sample
    builder that trained it.
    """

    path: Path
    model: list[Module]
    tokenizer: Tokenizer
    builder: Any

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.tokenizer.end_of_turn_id, self.tokenizer.eos_id]

    def texts(
        self, prompts: list[Sample], max_new_tokens: int, config: Mapping[str, Any]
    ) -> list[str]:
        """An answer to each prompt; config: temperature, top_p, seed, use_cache."""
        from nvmm.decoding import generate

        outputs = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_id,
            temperature=config["temperature"],
            top_p=config["top_p"],
            seed=config["seed"],
            use_cache=config["use_cache"],
        )
        return [self.tokenizer.decode(tokens).strip() for tokens in outputs]


def main() -> None:
    """Compose, check, evaluate. Exits with entry.BAD_CONFIG when the config is refused."""
    sys.argv[1:] = [argument(text) for text in sys.argv[1:]]
    job = entry.load("evaluate")
    if job is None:
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(evaluate)(job)


def argument(text: str) -> str:
    """`checkpoint=DIR` as the key it means: alone it would choose from training's group."""
    return re.sub(r"^checkpoint=", "checkpoint.path=", text)


def evaluate(job: entry.Job) -> dict[str, Any]:
    """Answer and score one benchmark on all ranks; returns the summary that metrics.json holds."""
    from nvmm.data.shards import Dataset
    from nvmm.evaluation.benchmark import summarize, table
    from nvmm.metrics import update_summary
    from nvmm.parallel import setup
    from nvmm.report import write_report

    entry.log_to_stderr()
    config = job.config
    with refusals("evaluate"):
        benchmark = _instantiate(config["benchmark"])
        if config["max_new_tokens"] is not None:
            benchmark = replace(benchmark, max_new_tokens=config["max_new_tokens"])
        restored = restore(config, benchmark.builder)
        dataset = Dataset(benchmark.shards, restored.builder)
        num_samples = len(dataset)
        if config["num_samples"] is not None:
            num_samples = min(num_samples, config["num_samples"])
    predictions = answer(restored, benchmark, dataset, num_samples, config)
    summary = {
        "benchmark": benchmark.name,
        "checkpoint": str(restored.path),
        **summarize(predictions),
    }
    if entry.rank() == 0:
        folder = output_folder(config["output"], restored.path, benchmark.name)
        _write(folder, predictions, summary, _pictures(restored, dataset, predictions))
        run_dir = restored.path.parent.parent
        if (run_dir / "summary.json").exists():
            kinds = {kind: part["score"] for kind, part in summary["kinds"].items()}
            scores = {"overall": summary["score"], **kinds}
            update_summary(run_dir, **{f"{benchmark.name}_{benchmark.metric_name}": scores})
            write_report(run_dir)
        print(f"{table(summary, benchmark.name)}\n{folder}")
    setup.shutdown()
    return summary


def answer(
    restored: Restored,
    benchmark: Benchmark,
    dataset: Any,
    num_samples: int,
    config: Mapping[str, Any],
) -> list[Prediction]:
    """The first `num_samples` questions answered by all ranks together, in order on every rank."""
    from megatron.core import parallel_state

    from nvmm.decoding import deal, gather
    from nvmm.evaluation.benchmark import Prediction

    mine = deal(
        num_samples,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    found: list[Prediction] = []
    say = _Progress(len(mine))
    for start in range(0, len(mine), config["batch_size"]):
        numbers = mine[start : start + config["batch_size"]]
        examples = [benchmark.ask(dataset.members(number)) for number in numbers]
        prompts = [
            replace(restored.builder.prompt(example.members), sample_id=number)
            for example, number in zip(examples, numbers, strict=True)
        ]
        texts = restored.texts(prompts, benchmark.max_new_tokens, config)
        for prompt, example, text in zip(prompts, examples, texts, strict=True):
            answers = restored.builder.references(example.members)
            found.append(
                Prediction(
                    sample_id=prompt.sample_id,
                    source=prompt.source,
                    kind=example.kind,
                    question=example.question,
                    answers=answers,
                    prediction=text,
                    score=benchmark.score(text, answers, example.kind),
                )
            )
        say(len(found))
    return gather(found, num_samples)


def restore(config: Mapping[str, Any], builder_changes: Mapping[str, Any]) -> Restored:
    """Build the model of `config["checkpoint"]` in this command's layout and load its weights.

    Sequence and virtual pipeline parallelism are off: decoding has one new token a step.
    builder_changes: parameters of the saved sample builder to exchange.

    Raises ValueError when the checkpoint is missing or incomplete, its config is not trusted, the
    layout does not fit the model, or the tokenizer on disk is not the checkpoint's.
    """
    from nvmm.parallel.setup import device_type, prepare_backend

    prepare_backend()
    from nvmm.checkpoint import find, load_scales, load_weights, read_state
    from nvmm.modules.scaling import Scaling

    path = find(config["checkpoint"]["path"])
    state = read_state(path)
    saved = state["config"]
    build = _builder_config(saved, builder_changes)
    sections = {"model": saved["model"], "tokenizer": dict(saved["tokenizer"]), "build": build}
    sections["precision"] = config["precision"] or saved["precision"]
    sections["lora"] = saved.get("lora")
    sections["kernels"] = {
        "_target_": _KERNELS,
        **(saved.get("kernels") or {}),
        **(config.get("kernels") or {}),
    }
    if config["tokenizer"] is not None:
        sections["tokenizer"]["path"] = config["tokenizer"]
    if not config["trust_config"]:
        require_trusted(sections, path)
    layout = config["parallel"] | {
        "sequence_parallel": False,
        "virtual_pipeline_model_parallel_size": None,
        "recompute_granularity": None,
    }
    size = layout.get("context_parallel_size", 1)
    if size != 1:
        raise ValueError(
            f"parallel.context_parallel_size={size} must be 1 in evaluation and generation"
        )
    backend = config["backend"] or saved["backend"]
    problems = violations(
        {"model": saved["model"], "parallel": layout, "backend": backend}, entry.world_size()
    )
    if problems:
        raise ValueError("; ".join(str(problem) for problem in problems))

    tokenizer = _instantiate(sections["tokenizer"])
    if tokenizer.digest != state["tokenizer_digest"]:
        raise ValueError(
            f"tokenizer.path={tokenizer.path} is not the tokenizer that {path} was trained with"
            f" (digest {tokenizer.digest[:12]}, not {state['tokenizer_digest'][:12]});"
            " name its folder with tokenizer=DIR"
        )
    sequence_length = config["sequence_length"] or saved["data"]["sequence_length"]
    builder = _build(build, tokenizer=tokenizer, sequence_length=sequence_length)
    parallel = _instantiate(layout)
    _instantiate(sections["kernels"]).install(device_type(), log=entry.rank() == 0)
    parallel.initialize(seed=config["seed"])
    constructor = _instantiate(sections["model"])
    precision = _instantiate(sections["precision"])
    model = [constructor(chunk=chunk) for chunk in parallel.chunks(precision, backend)]
    if sections["lora"] is not None:
        _instantiate(sections["lora"]).attach(model)
    for chunk in model:
        chunk.eval().requires_grad_(False)
    base = config.get("base")
    missing = load_weights(path, model, Path(base).expanduser() if base else None)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} parameters: {', '.join(missing[:10])}")
    fresh = load_scales(path, Scaling(model, precision.fp8))
    if fresh:
        raise ValueError(
            f"{path} lacks {len(fresh)} FP8 scales ({fresh[0]} ...); use the precision that it was"
            " trained with, precision=bf16, or another precision.fp8.recipe"
        )
    return Restored(path, model, tokenizer, builder)


def require_trusted(config: Any, path: Path) -> None:
    """Refuse a checkpoint's config that would run anything but nvmm's and mcore's constructors.

    Raises ValueError naming every such `_target_`, and every interpolation: a saved config is
    resolved and has none.
    """
    foreign = sorted(set(_foreign(config)))
    if foreign:
        raise ValueError(
            f"{path}: its config would run {', '.join(foreign)}; if you trust whoever wrote it,"
            " add trust_config=true"
        )


def _foreign(node: Any) -> Iterator[str]:
    if isinstance(node, str) and "${" in node:
        yield node
    if isinstance(node, list):
        for item in node:
            yield from _foreign(item)
    if not isinstance(node, Mapping):
        return
    for value in node.values():
        yield from _foreign(value)
    target = str(node.get("_target_", ""))
    if target == _GET_METHOD:
        if _home(str(node.get("path")), ("torch.",)) not in _TRUSTED_FUNCTIONS:
            yield f"{_GET_METHOD}({node.get('path')})"
    elif target and not f"{_home(target, _TRUSTED)}.".startswith(_TRUSTED):
        yield target


def _home(name: str, prefixes: tuple[str, ...]) -> str:
    """Module that defines what `name` leads to, empty where `name` has none of the prefixes.

    A name alone says little: `torch.nn.functional.torch.os.system` is os.system.
    """
    if not name.startswith(prefixes):
        return ""
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    path = module
    for part in rest.split("."):
        path = f"{path}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return ""
        found = getattr(found, part, None)
    return str(getattr(found, "__module__", "")) if callable(found) else ""


def output_folder(given: str | None, checkpoint: Path, name: str) -> Path:
    """Where results go: `given`, else beside the run's checkpoints."""
    if given is not None:
        return Path(given).expanduser()
    inside = checkpoint.parent.name == "checkpoints"
    run = checkpoint.parent.parent if inside else Path("runs")
    return run / "evaluation" / name / checkpoint.name


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turns a ValueError, also one behind Hydra's, into the exit that a bad config gets."""
    from hydra.errors import InstantiationException

    try:
        yield
    except ValueError as error:
        entry.refuse(name, [error])
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        entry.refuse(name, [error.__cause__])


def _instantiate(node: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, _convert_="all")


def _builder_config(saved: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    train = (saved.get("data") or {}).get("train") or {}
    if not isinstance(train.get("build"), Mapping):
        raise ValueError("the checkpoint's data.train.build names no sample builder to ask with")
    return _merged(train["build"], changes)


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{name: _merged(base.get(name), value) for name, value in changes.items()}}


def _build(node: Mapping[str, Any], **options: Any) -> Any:
    partial: Callable[..., Any] = _instantiate(node)
    try:
        builder = partial(**options)
    except TypeError as error:
        raise ValueError(f"the sample builder does not take its parameters: {error}") from error
    if not hasattr(builder, "prompt"):
        raise ValueError(f"the checkpoint's data.train.build={node['_target_']} makes no prompts")
    return builder


def _pictures(
    restored: Restored, dataset: Any, predictions: Sequence[Prediction]
) -> dict[int, dict[str, Any]]:
    """Pictures and tiles of the first few samples that have any, for the report."""
    import torch

    from nvmm.batch import ATTENDED, IMAGE
    from nvmm.report import MAX_PICTURES, picture_fields

    fields = {}
    for prediction in predictions[:MAX_PICTURES]:
        members = dataset.members(prediction.sample_id)
        # Tiles may be in the sequence or outside of it; a thumbnail comes after its tiles.
        media = restored.builder.prompt(members).media
        parts = [media[kind] for kind in (ATTENDED, IMAGE) if kind in media]
        if parts:
            names = ("values", "items", "tiles")
            whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
            fields[prediction.sample_id] = picture_fields(members, replace(parts[0], **whole))
    return fields


def _write(
    folder: Path,
    predictions: Sequence[Prediction],
    summary: Mapping[str, Any],
    pictures: Mapping[int, Mapping[str, Any]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in predictions:
            line = asdict(prediction) | dict(pictures.get(prediction.sample_id, {}))
            file.write(json.dumps(line) + "\n")
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


class _Progress:
    """Says how far rank 0 is, at most every ten seconds and at the end."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.started = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if entry.rank() or (now - self.last < _LINE_SECONDS and done < self.total):
            return
        self.last = now
        left = (now - self.started) / done * (self.total - done)
        print(f"evaluate: {done}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
