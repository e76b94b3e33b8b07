"""Retrieval-augmented generation: chunk, encode, search, rerank, generate, and compare.

Every stage is a job with a folder of its own in the output:

    chunks/  vectors/corpus/  vectors/queries/  searched/  reranked/  answers/NAME/

so that a run which was killed goes on, and makes no row twice. At the end metrics.json has the
numbers, table.json the tables and traces.jsonl, question by question, chunks, scores, prompts and
answers; `nvmm report` shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch.distributed as dist

from nvmm.config.choices import require
from nvmm.data.samples.contexts import ContextChat
from nvmm.data.samples.dialogue import Dialogue
from nvmm.inference.restore import restore
from nvmm.io import files
from nvmm.jobs import job as jobs
from nvmm.jobs.encode import Encode
from nvmm.jobs.job import Job, file_digest
from nvmm.jobs.parts import Parts
from nvmm.jobs.rag import table
from nvmm.jobs.rag.answering import Answer, Shown
from nvmm.jobs.rag.chunks import Chunk as ChunkJob
from nvmm.jobs.rag.chunks import Chunking, chunk_id
from nvmm.jobs.rag.contexts import Contexts
from nvmm.jobs.rag.questions import (
    Chunk,
    Chunks,
    Question,
    Relevance,
    read_documents,
    read_questions,
)
from nvmm.jobs.rag.ranking import Rank, Ranking
from nvmm.jobs.search import Search, rankings_of

if TYPE_CHECKING:
    from nvmm.inference.restore import Restored


_COUNTS = (
    *("max_new_tokens", "searched", "batch_size"),
    *("encode_batch_size", "part_size", "corpus_part_size"),
)


@dataclass(frozen=True)
class Rag:
    """A run. The command's checkpoint reranks and answers.

    Args:
        documents, questions: .jsonl files (`nvmm.jobs.rag.questions`).
        retriever: checkpoint or run directory of an embedder, run at the command's layout.
        form: the form of the final prompt.
        answers: name -> contexts; each is a row of the table. Sweeps are more of them.
        ranking: how the best chunks are ranked anew; None: they are not.
        chunking: how documents are cut.
        dialogue: the form of the retriever's queries, with earlier turns; None: the latest
            question alone.
        searched: chunks of a search (N).
        relevance: what makes a chunk relevant in recall: its place is gold, or it has an answer.
        cutoffs: k of recall@k.
        candidates: N of recall after reranking, beside `ranking.top`.
        max_new_tokens: tokens of the longest answer.
        share_prefixes: prompts with the same beginning run it once.
        batch_size: prompts of a forward pass. encode_batch_size: texts of the retriever's.
        part_size: questions of a part file. corpus_part_size: documents or chunks of one.
    """

    documents: str
    questions: str
    retriever: str
    form: ContextChat
    answers: Mapping[str, Contexts]
    ranking: Ranking | None = None
    chunking: Chunking = field(default_factory=Chunking)
    dialogue: Dialogue | None = None
    searched: int = 100
    relevance: Relevance = "gold"
    cutoffs: Sequence[int] = (1, 5, 10, 20)
    candidates: Sequence[int] = ()
    max_new_tokens: int = 64
    share_prefixes: bool = True
    batch_size: int = 8
    encode_batch_size: int = 32
    part_size: int = 32
    corpus_part_size: int = 1024
    name: str = "rag"
    build: Mapping[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        require("job.relevance", self.relevance, Relevance)
        top = 0 if self.ranking is None else self.ranking.top
        if not self.answers:
            raise ValueError("job.answers must name at least one way of answering")
        for name, contexts in self.answers.items():
            if Path(name).name != name or name.startswith("."):
                raise ValueError(f"job.answers.{name}: the name must be one of a folder")
            if not isinstance(contexts, Contexts):
                target = f"{Contexts.__module__}.{Contexts.__name__}"
                raise ValueError(f"job.answers.{name}={contexts} needs _target_={target}")
            if contexts.source == "reranked" and not top:
                raise ValueError(f"job.answers.{name}: source=reranked needs job.ranking")
            if (contexts.k or 0) > self.searched or (contexts.candidates or 0) > top:
                raise ValueError(
                    f"job.answers.{name}: k={contexts.k} must be at most"
                    f" job.searched={self.searched}, and candidates={contexts.candidates} at most"
                    f" job.ranking.top={top}"
                )
        if any(not 0 < number <= top for number in self.candidates):
            raise ValueError(
                f"job.candidates={list(self.candidates)} must be from 1 to job.ranking.top={top}"
            )
        for key in _COUNTS:
            if (value := getattr(self, key)) < 1:
                raise ValueError(f"job.{key}={value} must be at least 1")
        if not self.cutoffs or any(not 0 < k <= self.searched for k in self.cutoffs):
            raise ValueError(
                f"job.cutoffs={list(self.cutoffs)} must be from 1 to job.searched={self.searched}"
            )
        if top > self.searched:
            raise ValueError(f"job.ranking.top={top} must be at most job.searched={self.searched}")

    def run(
        self, settings: Mapping[str, Any], model: Restored | None, output: str | Path
    ) -> dict[str, Any]:
        """Make the rows that are missing, stage by stage; collective.

        Returns the summary of `nvmm.jobs.job.run`, over all stages.

        Raises ValueError where the folder belongs to another run, or another process works in it.
        """
        if model is None:
            raise ValueError("job=rag needs checkpoint=DIR")
        documents = read_documents(self.documents)
        questions = read_questions(self.questions, documents)
        run = _Stages(Path(output).expanduser(), settings)
        # 1. Chunks, and the vectors of chunks and questions.
        cut = ChunkJob(documents, self.chunking, self.corpus_part_size)
        with_model = model if self.chunking.unit == "tokens" else None
        rows = run.stage("chunks", cut, with_model, "chunking")
        chunks = _chunks(rows, documents)
        if not chunks:
            raise ValueError(f"{self.documents} has no text")
        data = Chunks(chunks, questions, self.dialogue)
        self._encode(run, data)
        # 2. Rankings.
        vectors = run.folder / "vectors"
        search = Search(
            data=data,
            queries=str(vectors / "queries"),
            corpus=str(vectors / "corpus"),
            k=self.searched,
            part_size=self.part_size,
        )
        found = run.stage("searched", search, None, "searched")
        searched = rankings_of(found)
        scores: dict[str, dict[str, float | None]] = {}
        if self.ranking is not None:
            rank = Rank(
                self.ranking,
                questions,
                chunks,
                [searched[question.id] for question in questions],
                file_digest(run.folder / "searched" / "manifest.json"),
                self.share_prefixes,
                self.batch_size,
                self.part_size,
            )
            ranked = run.stage("reranked", rank, model, "ranking", "share_prefixes", "batch_size")
            scores = {
                row["query_id"]: dict(zip(row["ids"], row["scores"], strict=True))
                for row in ranked.to_pylist()
            }
        # 3. Answers, one way after the other.
        made: dict[str, pa.Table] = {}
        for name, contexts in self.answers.items():
            answer = Answer(
                questions,
                [
                    self._shown(contexts, question, documents, chunks, searched, scores)
                    for question in questions
                ],
                self.form,
                self.max_new_tokens,
                self.share_prefixes,
                self.batch_size,
                self.part_size,
            )
            keys = ("form", "max_new_tokens", "share_prefixes", "batch_size")
            made[name] = run.stage(f"answers/{name}", answer, model, *keys)
        # 4. What they are worth.
        results = table.Results(
            questions, chunks, self.relevance, found, scores, made, self.form.unanswerable
        )
        tops = [] if self.ranking is None else sorted({*self.candidates, self.ranking.top})
        tables = results.tables(self.cutoffs, tops)
        metrics = results.metrics(tables, run.tables)
        if dist.get_rank() == 0:
            for file, content in (("table.json", tables), ("metrics.json", metrics)):
                files.write(run.folder / file, json.dumps(content, indent=2) + "\n")
            traces = map(json.dumps, results.traces())
            files.write(run.folder / "traces.jsonl", "".join(f"{line}\n" for line in traces))
        return run.summary(metrics)

    def _encode(self, run: _Stages, data: Chunks) -> None:
        """Embed chunks and questions, with a retriever that is let go afterwards."""
        from megatron.core import parallel_state

        sizes = {
            "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        }
        retriever = restore(self.retriever, parallel=sizes)
        for side, size in (("corpus", self.corpus_part_size), ("queries", self.part_size)):
            encode = Encode(
                data=data,
                side=side,  # type: ignore[arg-type]
                batch_size=self.encode_batch_size,
                part_size=size,
            )
            run.stage(f"vectors/{side}", encode, retriever, "encode_batch_size", side=side)

    def _shown(
        self,
        contexts: Contexts,
        question: Question,
        documents: Mapping[str, str],
        chunks: Mapping[str, Chunk],
        searched: Mapping[str, Sequence[str]],
        scores: Mapping[str, Mapping[str, float | None]],
    ) -> Shown:
        """Return what stands before a question."""
        if contexts.source == "none":
            return Shown([], [])
        if contexts.source == "document":
            if question.document is None:
                return Shown([], [], "its record names no whole document")
            return Shown([question.document], [documents[question.document]])
        if contexts.source == "gold":
            if question.contexts:
                return Shown([], question.contexts)
            gold = [name for name, one in chunks.items() if question.finds(one, self.relevance)]
            if not gold:
                return Shown([], [], "no chunk is relevant")
            return Shown(gold, [chunks[name].text for name in gold])
        ranking = list(searched[question.id])
        if contexts.source == "reranked":
            ranking = table.reranked(ranking, scores[question.id], contexts.candidates)
        best = contexts.ordered(ranking, question.id)
        if not best:
            return Shown([], [], "the search found nothing")
        return Shown(best, [chunks[name].text for name in best])


class _Stages:
    """The stages of a run, each a job in a folder below the output's."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.tables: dict[str, pa.Table] = {}
        self._job = settings["job"]
        self._command = {key: value for key, value in settings.items() if key != "job"}
        self._summaries: list[dict[str, Any]] = []

    def stage(
        self, name: str, job: Job, model: Restored | None, *keys: str, **more: Any
    ) -> pa.Table:
        """Make the rows of a job that are missing, and return all.

        keys: of the run's config that the rows depend on. more: what else they do.
        """
        facts = {"job": {key: self._job.get(key) for key in keys} | more}
        facts |= self._command if model is not None else {}
        self._summaries.append(jobs.run(job, facts, model, self.folder / name))
        rows = self.tables[name] = Parts(self.folder / name).read(verify=False)
        return rows

    def summary(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the summary of all stages."""
        errors = [one["first_error"] for one in self._summaries if one["first_error"]]
        return {
            "folder": str(self.folder),
            **{key: sum(one[key] for one in self._summaries) for key in ("rows", "written", "bad")},
            "first_error": errors[0] if errors else None,
            "metrics": metrics,
        }


def _chunks(rows: pa.Table, documents: Mapping[str, str]) -> dict[str, Chunk]:
    """Return chunk id -> chunk of the rows of job=chunk."""
    return {
        chunk_id(row["id"], span): Chunk(row["id"], *span, documents[row["id"]][slice(*span)])
        for row in rows.to_pylist()
        for span in zip(row["starts"], row["ends"], strict=True)
    }
