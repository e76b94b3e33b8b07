"""mteb 2 offline: an embedder behind its encoder interface, a retrieval set as its task.

It needs the `embed` extra. mteb downloads nothing here, as it gets data and model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nvmm.data.samples.retrieval import Content
from nvmm.evaluation.benchmark import finite

Items = Mapping[str, Any]
"""Id -> a text, or a `Content`, which is a text, a picture or both."""


def evaluate(
    encode: Callable[[Sequence[Any], str | None], Tensor],
    corpus: Items,
    queries: Items,
    qrels: Mapping[str, Mapping[str, int]],
    *,
    name: str = "Custom",
    instruction: str | Mapping[str, str] | None = None,
    ignore_identical_ids: bool = False,
) -> dict[str, float]:
    """Return mteb's scores of a retrieval task, of its type Any2AnyRetrieval if there are pictures.

    encode: takes texts, or items of `Content` where there are pictures, and their instruction.
    instruction: of all queries, or of each by its id.
    The other arguments are those of `nvmm.evaluation.beir.evaluate`.
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


def _encoder(encode: Callable[[Sequence[Any], str | None], Tensor]) -> Any:
    """Return an encoder as mteb wants it."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    class Model(AbsEncoder):
        """An encoder whose queries' instructions go to `encode`, which knows their template."""

        mteb_model_meta = ModelMeta.create_empty({"name": "nvmm/checkpoint", "revision": "local"})

        def encode(
            self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **options: Any
        ) -> Any:
            """Return the vectors of all batches of `inputs`, [n, h]."""
            query = prompt_type == PromptType.query
            prompt = (task_metadata.prompt or {}).get("query") if query else None
            items: list[Any] = []
            prompts: list[str | None] = []
            for batch in inputs:
                # mteb puts a query's own instruction behind `text`, and keeps the text as `query`.
                own = batch.get("instruction") if query else None
                texts = batch["text"] if own is None else batch["query"]
                prompts += [prompt] * len(texts) if own is None else own
                items += map(Content, texts, batch["image"]) if "image" in batch else texts
            vectors = torch.empty(0)
            for some in dict.fromkeys(prompts):
                places = [place for place, own in enumerate(prompts) if own == some]
                found = encode([items[place] for place in places], some)
                if not len(vectors):
                    vectors = found.new_empty(len(items), found.shape[1])
                vectors[places] = found
            return finite(vectors, "queries" if query else "documents").numpy()

    return Model()


def _task(
    corpus: Items,
    queries: Items,
    qrels: Mapping[str, Mapping[str, int]],
    name: str,
    instruction: str | Mapping[str, str] | None,
) -> Any:
    """Return the items and qrels as a task of mteb."""
    from datasets import Dataset, Features, Image, Value
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    asked = {query: queries[query] for query in qrels}
    pictures = any(
        isinstance(item, Content) and item.image is not None
        for item in (*corpus.values(), *asked.values())
    )

    def rows(items: Items, instructions: Mapping[str, str] | None = None) -> Any:
        contents = [Content(item) if isinstance(item, str) else item for item in items.values()]
        columns: dict[str, list[Any]] = {
            "id": list(items),
            "text": [content.text for content in contents],
        }
        features = Features({column: Value("string") for column in columns})
        if pictures:
            columns["image"] = [content.image for content in contents]
            features["image"] = Image()
        if instructions is not None:
            columns["instruction"] = [instructions[query] for query in items]
            features["instruction"] = Value("string")
        return Dataset.from_dict(columns, features)

    class Task(AbsTaskRetrieval):
        """The items as one subset of one split."""

        metadata = TaskMetadata(
            name=name,
            description="items given to nvmm",
            type="Any2AnyRetrieval" if pictures else "Retrieval",
            category="it2it" if pictures else "t2t",
            modalities=["image", "text"] if pictures else ["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "local/local", "revision": "local"},
            prompt={"query": instruction} if isinstance(instruction, str) else None,
        )

        def load_data(self, **options: Any) -> None:
            """Make the data set of the items, without a download."""
            own = instruction if isinstance(instruction, Mapping) else None
            split = {
                "queries": rows(asked, own),
                "corpus": rows(corpus),
                "relevant_docs": {query: dict(known) for query, known in qrels.items()},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Task()
