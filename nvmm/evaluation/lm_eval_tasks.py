"""Tasks of lm-evaluation-harness: MMLU, GSM8K, IFEval, RULER and whatever else it has.

The tasks, their data, prompts and metrics are the harness's (`lm-eval` extra), which reads data
sets as Hugging Face's `datasets` does: from its cache, or from local files that a task names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from nvmm.evaluation.benchmark import Benchmark, Result, Settings, refuse_settings
from nvmm.evaluation.token_work import follow, release
from nvmm.io.files import write

if TYPE_CHECKING:
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import Restored

_SETTINGS = ("batch_size", "num_samples", "use_cache", "seed")
SAMPLES = "samples.jsonl"
_SHOWN = 2000
"""Characters of a text that predictions.jsonl keeps, its end."""


@dataclass(frozen=True)
class LMEval(Benchmark):
    """Tasks of the harness, asked of a checkpoint; `num_samples` is its limit for each task.

    predictions.jsonl has a line a request with the model's result, so that an evaluation that was
    killed asks no request again; samples.jsonl has a line a document with its scores.

    Args:
        tasks: names of tasks and groups.
        include_path: folders with tasks of one's own.
        include_defaults: know the harness's tasks too; it reads some thousand files for that.
        num_fewshot: examples in the prompt; None: the task's.
        apply_chat_template: ask in the checkpoint's template, as conversations.
        fewshot_as_multiturn: make the examples turns of the conversation; needs the template.
        system_instruction: the system message of every prompt.
        gen_kwargs: generation options over the tasks' own: until, max_gen_toks, do_sample,
            temperature, top_p.
        add_bos: begin every text with BOS; None: where the checkpoint's template does.
        bootstrap_iters: resamplings for the standard errors; 0: no standard errors.
        metadata: what tasks are told, such as RULER's `max_seq_lengths` and `tokenizer`.
        name: name of the output directory.
        builder: parameters of the checkpoint's sample builder to change.
    """

    tasks: Sequence[str]
    include_path: Sequence[str] = ()
    include_defaults: bool = True
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_bos: bool | None = None
    bootstrap_iters: int = 100_000
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = "lm_eval"
    builder: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Restored, settings: Settings, journal: Journal) -> Result:
        """Run the tasks; rank 0 runs the harness, and all ranks do what it asks of the model."""
        refuse_settings(settings, _SETTINGS)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn=true needs apply_chat_template=true")
        if dist.get_rank():
            answer = follow(model)
        else:
            try:
                answer = self._evaluate(model, settings, journal)
            except (ValueError, OSError) as error:
                answer = str(error)
            except BaseException as error:
                release(f"rank 0 ended: {error}")
                raise
            # A refusal must reach every rank, or the others would wait for ever.
            release(answer)
        if isinstance(answer, str):
            raise ValueError(answer)
        return Result(*answer)

    def _evaluate(
        self, model: Restored, settings: Settings, journal: Journal
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Return summary, scores and text of the tasks, on rank 0."""
        try:
            harness = version("lm_eval")
        except PackageNotFoundError as error:
            raise ValueError("benchmark=lm_eval needs lm_eval: install nvmm[lm-eval]") from error
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from nvmm.evaluation.lm_eval_model import CheckpointLM

        kept = _Kept(journal, {"lm_eval": harness})
        checkpoint = CheckpointLM(
            model,
            settings.batch_size,
            self.add_bos,
            settings.use_cache,
            settings.seed,
            known=kept.known,
            done=kept.done,
        )
        manager = TaskManager(
            include_path=[str(Path(folder).expanduser()) for folder in self.include_path] or None,
            include_defaults=self.include_defaults,
            metadata=dict(self.metadata),
        )
        unknown = [name for name in self.tasks if not manager.match_tasks([name])]
        if unknown or not self.tasks:
            raise ValueError(
                f"benchmark.tasks={list(self.tasks)}: lm_eval has no {', '.join(unknown) or 'task'}"
                " (benchmark.include_path names folders of your own)"
            )
        results: Any = simple_evaluate(
            checkpoint,
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=settings.num_samples,
            bootstrap_iters=self.bootstrap_iters,
            system_instruction=self.system_instruction,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
            gen_kwargs=dict(self.gen_kwargs) or None,
            task_manager=manager,
        )
        lines = [
            json.dumps({"task": task} | _scored(sample), default=handle_non_serializable)
            for task, samples in results["samples"].items()
            for sample in samples
        ]
        write(journal.folder / SAMPLES, "".join(f"{line}\n" for line in lines))
        scores = {task: numbers(values) for task, values in results["results"].items()}
        summary = {
            "lm_eval": harness,
            "num_samples": {task: n["effective"] for task, n in results["n-samples"].items()},
            "results": scores,
        }
        return (
            summary,
            {f"{self.name}_{task}": s for task, s in scores.items()},
            make_table(results),
        )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task's results; `acc,none` of the harness becomes `acc`.

    Those of another filter keep its name, as `exact_match,strict-match`.
    """
    return {
        re.sub(",none$", "", name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    }


def _scored(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line says of a document: its number, target, answers and scores."""
    names = ("doc_id", "target", "filter", "filtered_resps", *sample.get("metrics", ()))
    return {name: sample[name] for name in names if name in sample}


class _Kept:
    """The results of requests that the journal has, and their way into it."""

    def __init__(self, journal: Journal, data: Any) -> None:
        lines, _ = journal.start(data)
        self._journal = journal
        self._results = {line["key"]: line["result"] for line in lines}
        self._count = len(lines)

    def known(self, call: str, request: Any) -> Any:
        """Return the result of a request, None where there is none yet."""
        return self._results.get(_key(call, request))

    def done(self, call: str, results: Sequence[tuple[Any, Any]]) -> None:
        """Write results of requests, each request once."""
        lines: list[dict[str, Any]] = []
        for request, result in results:
            key = _key(call, request)
            if key not in self._results:
                self._results[key] = result
                line = {"call": call, "key": key, "request": _shown(request), "result": result}
                lines.append({"sample_id": self._count + len(lines), **line})
        self._journal.append(lines, [])
        self._count += len(lines)


def _key(call: str, request: Any) -> str:
    """Return the digest of a request."""
    text = json.dumps([call, request], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _shown(request: Any) -> Any:
    """Return a request with the ends of its long texts alone: they may be whole books."""
    if isinstance(request, list):
        return [_shown(part) for part in request]
    return request[-_SHOWN:] if isinstance(request, str) else request
