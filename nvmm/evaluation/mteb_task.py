"""mteb 2 offline: an embedder behind its encoder interface, a BEIR folder as its task.

It needs the `embed` extra. mteb downloads nothing here, as it gets data and model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvmm.batch import POSITIVE, QUERY
from nvmm.evaluation.benchmark import Encode, finite


def evaluate(
    encode: Encode,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    name: str = "Custom",
    instruction: str | None = None,
    ignore_identical_ids: bool = False,
) -> dict[str, float]:
    """Return mteb's scores of a retrieval task.

    The arguments are those of `nvmm.evaluation.beir.evaluate`.
    """
    import mteb

    task = _task(corpus, queries, qrels, name, instruction)
    task.ignore_identical_ids = ignore_identical_ids
    results = mteb.evaluate(
        _encoder(encode),
        task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 256},
    )
    scores = results.task_results[0].scores["test"][0]
    # Names of subsets and languages stand among them.
    return {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}


def _encoder(encode: Encode) -> Any:
    """Return an encoder as mteb wants it."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType

    class Model(AbsEncoder):
        """An encoder whose queries' instructions go to `encode`, which knows their template."""

        # The dot product ranks unit vectors as the cosine does, and others as they were trained.
        mteb_model_meta = ModelMeta.create_empty(
            {
                "name": "nvmm/checkpoint",
                "revision": "local",
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,
            }
        )

        def encode(
            self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **options: Any
        ) -> Any:
            """Return the vectors of all batches of `inputs`, [n, h]."""
            texts = [text for batch in inputs for text in batch["text"]]
            prompt = (task_metadata.prompt or {}).get("query")
            query = prompt_type == PromptType.query
            role = QUERY if query else POSITIVE
            vectors = encode(texts, prompt if query else None, role)
            return finite(vectors, "queries" if query else "documents").numpy()

    return Model()


def _task(
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    name: str,
    instruction: str | None,
) -> Any:
    """Return the texts and qrels as a task of mteb."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    def rows(texts: Mapping[str, str]) -> Any:
        return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})

    class Task(AbsTaskRetrieval):
        """The texts as one subset of one split."""

        metadata = TaskMetadata(
            name=name,
            description="texts given to nvmm",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "local/local", "revision": "local"},
            prompt={"query": instruction} if instruction else None,
        )

        def load_data(self, **options: Any) -> None:
            """Make the data set of the texts, without a download."""
            split = {
                "queries": rows({query: queries[query] for query in qrels}),
                "corpus": rows(corpus),
                "relevant_docs": {query: dict(known) for query, known in qrels.items()},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Task()
