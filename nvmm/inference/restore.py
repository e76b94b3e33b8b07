"""A checkpoint as a model that answers, at any tensor and pipeline parallel size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmm.config.compose import instantiate
from nvmm.config.nested import merged
from nvmm.config.problem import View
from nvmm.config.rules.all import violations
from nvmm.config.signatures import signature
from nvmm.inference.trust import require_trusted
from nvmm.parallel import environment

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from nvmm.batch import Sample
    from nvmm.data.samples.builder import Builder
    from nvmm.data.samples.tokenizer import Tokenizer
    from nvmm.inference.embedding import TextEncoder

_KERNELS = "nvmm.kernels.library.Kernels"
_PARALLEL = "nvmm.parallel.setup.Parallel"


@dataclass(frozen=True)
class Restored:
    """A checkpoint ready to answer: `generate`, `score`, `score_continuations`, `embed`, `rewards`.

    Every rank of the world calls them alike. Samples are shared by the data-parallel ranks: the
    caller does so (`nvmm.inference.decoding.share`) for all but `embed`.

    path: the checkpoint's folder. model: this rank's one chunk, in eval mode. builder: the sample
    builder that trained it.
    """

    path: Path
    model: list[Module]
    tokenizer: Tokenizer
    builder: Builder

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self.builder.stop_ids

    @property
    def max_sequence_length(self) -> int:
        """The tokens of the longest sequence, a prompt and its answer."""
        from nvmm.inference.limits import longest

        return longest(self.model)

    @property
    def reads_pictures(self) -> bool:
        """Whether the model takes pictures."""
        chunk: Any = self.model[0]
        return any(kind.modality == "image" for kind in chunk.reads)

    def require_answers(self) -> None:
        """Raise ValueError for an embedder, which has no words to answer with."""
        from nvmm.data.samples.retrieval import RetrievalBuilder

        if isinstance(self.builder, RetrievalBuilder):
            raise ValueError(f"{self.path} is an embedder and answers nothing; try benchmark=beir")

    def generate(
        self,
        prompts: Sequence[Sample],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 1234,
        use_cache: bool = True,
        share_prefix: bool = False,
    ) -> list[str]:
        """Return an answer to each prompt; the options are `nvmm.inference.decoding.generate`'s.

        Raises ValueError for an embedder, which has no words to answer with.
        """
        outputs = self.generate_tokens(
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            use_cache=use_cache,
            share_prefix=share_prefix,
        )
        return [self.text_of(tokens) for tokens in outputs]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return self.tokenizer.decode(tokens).strip()

    def generate_tokens(
        self,
        prompts: Sequence[Sample],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 1234,
        use_cache: bool = True,
        share_prefix: bool = False,
    ) -> list[list[int]]:
        """Return the tokens of each answer; one that did not end has `max_new_tokens` of them.

        As `generate` otherwise.
        """
        from nvmm.inference.decoding import generate

        self.require_answers()
        if not prompts:
            return []
        return generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            use_cache=use_cache,
            share_prefix=share_prefix,
        )

    def score(self, samples: Sequence[Sample], batch_size: int = 8) -> list[tuple[float, int]]:
        """Return log-probability and number of each sample's supervised tokens, in order."""
        from nvmm.data.collate import collate
        from nvmm.inference.decoding import score

        pad_id = self.tokenizer.pad_id
        rows: list[tuple[float, int]] = []
        for start in range(0, len(samples), batch_size):
            batch = collate(samples[start : start + batch_size], pad_id=pad_id)
            rows += score(self.model, [batch])
        return rows

    def score_texts(
        self, samples: Sequence[Sample], batch_size: int = 8
    ) -> list[list[tuple[float, int]]]:
        """Return log-probability and number of supervised tokens of each text of each sample."""
        from nvmm.data.collate import collate
        from nvmm.inference.decoding import score

        rows: list[list[tuple[float, int]]] = []
        for start in range(0, len(samples), batch_size):
            some = samples[start : start + batch_size]
            batch = collate(some, pad_id=self.tokenizer.pad_id)
            texts = iter(score(self.model, [batch], by_text=True))
            rows += [list(islice(texts, len(sample.texts))) for sample in some]
        return rows

    def rewards(self, samples: Sequence[Sample], batch_size: int = 8) -> list[Tensor]:
        """Return the scores [texts, outputs] of each sample's texts, on the CPU, in order.

        Samples of like length share a forward pass. Raises ValueError for a checkpoint that is no
        reward model.
        """
        from nvmm.data.collate import collate
        from nvmm.inference.decoding import rewards

        device = next(self.model[0].parameters()).device
        order = sorted(range(len(samples)), key=lambda i: samples[i].num_tokens)
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([samples[i] for i in chosen], pad_id=self.tokenizer.pad_id)
            scores = rewards(self.model, [batch.to(device)]).cpu()
            sizes = [len(samples[i].texts) for i in chosen]
            found |= dict(zip(chosen, scores.split(sizes), strict=True))
        return [found[i] for i in range(len(samples))]

    def score_continuations(
        self,
        prompts: Sequence[Sample],
        continuations: Sequence[Sequence[int]],
        *,
        share_prefix: bool = False,
    ) -> Tensor:
        """Return log-probabilities, fp64 [prompts, continuations], of token ids after prompts.

        share_prefix: see `nvmm.inference.decoding.score_continuations`.
        """
        from nvmm.inference.decoding import score_continuations

        pad_id = self.tokenizer.pad_id
        return score_continuations(
            self.model, prompts, continuations, pad_id=pad_id, share_prefix=share_prefix
        )

    def embed(
        self,
        texts: Sequence[str],
        instruction: str | None = None,
        batch_size: int = 32,
        role: int | None = None,
    ) -> Tensor:
        """Return vectors of texts, fp32 [texts, h] on the CPU, the same on every rank.

        instruction: the task's instruction, put before every text; None for documents.
        role: `nvmm.batch.QUERY` for queries; None for documents. Both may have prefixes.

        Raises ValueError for a checkpoint that is no embedder.
        """
        roles = {} if role is None else {"role": role}
        return self.encoder(batch_size)(texts, instruction, **roles)

    def encoder(self, batch_size: int = 32) -> TextEncoder:
        """Return an encoder of texts. Raises ValueError for a checkpoint that is no embedder."""
        from nvmm.data.samples.retrieval import RetrievalBuilder
        from nvmm.inference.embedding import TextEncoder

        if not isinstance(self.builder, RetrievalBuilder):
            raise ValueError(
                f"{self.path} is no embedder: its data.train.build is"
                f" {type(self.builder).__name__}, not RetrievalBuilder"
            )
        return TextEncoder(self.model, self.builder, batch_size)


def restore(
    checkpoint: str | Path,
    *,
    parallel: Mapping[str, Any] | None = None,
    precision: Mapping[str, Any] | None = None,
    backend: str | None = None,
    kernels: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    base: str | Path | None = None,
    sequence_length: int | None = None,
    build: Mapping[str, Any] | None = None,
    seed: int = 1234,
    trust_config: bool = False,
) -> Restored:
    """Build the model of a checkpoint in a layout of this command's own and load its weights.

    Sequence and virtual pipeline parallelism are off: decoding has one new token a step.

    Args:
        checkpoint: a checkpoint's folder, or a run directory for its newest.
        parallel: sizes of `nvmm.parallel.setup.Parallel`; one rank by default.
        precision, backend, kernels, sequence_length: values that replace the checkpoint's.
        tokenizer: folder of the checkpoint's tokenizer, where that has moved.
        base: folder of a LoRA checkpoint's base, where that has moved.
        build: parameters of the saved sample builder to exchange; with another `_target_`, that
            builder gets the saved parameters that it has.
        trust_config: run constructors of the checkpoint's config outside nvmm, mcore and torch.

    Raises ValueError when the checkpoint is missing, incomplete or damaged, its config is not
    trusted, the layout does not fit the model, or the tokenizer on disk is not the checkpoint's.
    """
    from nvmm.parallel.setup import device_type, prepare_backend

    prepare_backend()
    from nvmm.checkpoint.files import find, read_state, run_tokenizer
    from nvmm.checkpoint.load import load_scales, load_weights
    from nvmm.checkpoint.record import check_files, read_record
    from nvmm.data.samples.jinja_template import JinjaTemplate
    from nvmm.modules.fp8_scales import Scaling

    # 1. Take the saved config with this command's changes, if it is trusted.
    path = find(checkpoint)
    check_files(path, read_record(path))
    state = read_state(path)
    if base is not None and not state.get("base"):
        raise ValueError(f"base={base} is of LoRA checkpoints, and {path} is none; leave it out")
    saved = state["config"]
    train = (saved.get("data") or {}).get("train") or {}
    if not isinstance(train.get("build"), Mapping):
        raise ValueError("the checkpoint's data.train.build names no sample builder to ask with")
    sections = {
        "model": saved["model"],
        "tokenizer": dict(saved["tokenizer"]),
        "build": _exchanged(train["build"], build or {}),
        "precision": precision or saved["precision"],
        "lora": saved.get("lora"),
        "kernels": {"_target_": _KERNELS, **(saved.get("kernels") or {}), **(kernels or {})},
    }
    if "reference" in sections["build"]:
        # Training alone compares with scores, which may be gone.
        sections["build"] |= {"reference": None}
    if tokenizer is not None:
        sections["tokenizer"]["path"] = tokenizer
    elif (path / "tokenizer").is_dir():
        # An import carries its tokenizer, wherever it has been moved since.
        sections["tokenizer"]["path"] = str(path / "tokenizer")
    elif not Path(str(sections["tokenizer"].get("path"))).expanduser().is_dir():
        if run_tokenizer(path).is_dir():  # the run has moved, or its tokenizer has
            sections["tokenizer"]["path"] = str(run_tokenizer(path))
    if not trust_config:
        require_trusted(sections, path)

    # 2. Refuse a layout that does not fit the model.
    layout = {"_target_": _PARALLEL, **(parallel or {})} | {
        "sequence_parallel": False,
        "virtual_pipeline_model_parallel_size": None,
        "recompute_granularity": None,
    }
    size = layout.get("context_parallel_size", 1)
    if size != 1:
        raise ValueError(
            f"parallel.context_parallel_size={size} must be 1 in evaluation and generation"
        )
    backend = backend or saved["backend"]
    problems = violations(
        {"model": saved["model"], "parallel": layout, "backend": backend}, environment.world_size()
    )
    if problems:
        raise ValueError("; ".join(str(problem) for problem in problems))

    # 3. Make the tokenizer, which must be that of training, and the sample builder.
    words = instantiate(sections["tokenizer"])
    if not words.is_of(state["tokenizer_digest"]):
        raise ValueError(
            f"tokenizer.path={words.path} is not the tokenizer that {path} was trained with"
            f" (digest {words.digest[:12]}, not {state['tokenizer_digest'][:12]});"
            " name its folder with tokenizer=DIR"
        )
    length = sequence_length or saved["data"]["sequence_length"]
    limit = View({"model": saved["model"]}).max_sequence_length
    if limit is not None and length > limit:
        raise ValueError(
            f"sequence_length={length} must be at most the model's max_sequence_length={limit}; add"
            f" sequence_length={limit}"
        )
    make_builder: Callable[..., Any] = instantiate(sections["build"])
    try:
        builder = make_builder(tokenizer=words, sequence_length=length)
    except TypeError as error:
        raise ValueError(f"the sample builder does not take its parameters: {error}") from error

    template = getattr(builder, "template", None)
    if isinstance(template, JinjaTemplate) and "template" not in (build or {}):
        template.require_that_of(path, state)

    # 4. Build the model, frozen, and load its weights.
    sizes = instantiate(layout)
    instantiate(sections["kernels"]).install(device_type(), log=environment.rank() == 0)
    sizes.initialize(seed=seed)
    constructor = instantiate(sections["model"])
    numbers = instantiate(sections["precision"])
    model = [constructor(chunk=chunk) for chunk in sizes.chunks(numbers, backend)]
    if sections["lora"] is not None:
        instantiate(sections["lora"]).attach(model)
    for chunk in model:
        chunk.eval().requires_grad_(False)
    missing = load_weights(path, model, Path(base).expanduser() if base else None)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} parameters: {', '.join(missing[:10])}")
    fresh = load_scales(path, Scaling(model, numbers.fp8))
    if fresh:
        raise ValueError(
            f"{path} lacks {len(fresh)} FP8 scales ({fresh[0]} ...); use the precision that it was"
            " trained with, precision=bf16, or another precision.fp8.recipe"
        )
    return Restored(path, model, words, builder)


def _exchanged(build: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved builder's config with changes, for another builder without what it has not.

    Those parameters say how its own samples are trained or cut (supervise, drop_images, ...).
    """
    changed: dict[str, Any] = merged(build, changes)
    if changed.get("_target_") == build.get("_target_"):
        return changed
    taken = signature(changed["_target_"]).parameters
    return {
        name: value
        for name, value in changed.items()
        if name in changes or name in taken or name.startswith("_")
    }


RESTORE_KEYS = (
    *("parallel", "precision", "backend", "kernels", "base", "sequence_length", "seed"),
    "trust_config",
)


def restore_from(config: Mapping[str, Any], build: Mapping[str, Any] | None = None) -> Restored:
    """Restore the checkpoint that a command's composed config names (configs/evaluate.yaml)."""
    return restore(
        config["checkpoint"]["path"],
        tokenizer=config["tokenizer"]["path"],
        build=build,
        **{key: config[key] for key in RESTORE_KEYS if key in config},
    )
