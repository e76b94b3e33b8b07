"""InfoNCE over texts: in-batch, cross-rank and hard negatives, at any batch size by GradCache.

NV-Embed (arXiv:2405.17428) section 3.2; GradCache (arXiv:2101.06983). A sample is a query, its
positive document and its hard negatives, described by `Batch.extras`, one entry a text, in order:

- role: int64, QUERY, POSITIVE or NEGATIVE of `nvmm.batch`;
- document_id, text_hash: int64, equal for one document under two texts, or one text twice;
- answers: int64 [texts, n], on a query: document ids that answer it beside its positive's;
- in_batch: bool, on a query: whether other samples' documents are its negatives;
- teacher: float32, on a document: another model's score for its query (NaN: none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvmm.batch import POSITIVE, QUERY, Batch
from nvmm.objectives.objective import Objective, Run
from nvmm.parallel.context_parallel import gather

METRICS = ("loss", "accuracy", "negatives")


class Contrastive(Objective):
    """Mean over queries of -log softmax of the positive's score among its candidates.

    Scores are dot products over a temperature, of unit vectors unless `normalize` is false.
    Candidates of a query are its own documents and, where `in_batch` says so, every other document
    of the loss, of all data-parallel ranks. One loss covers a micro-batch of every rank, or with
    `grad_cache` the global batch.

    Args:
        temperature: divisor of the scores. NV-Embed's paper gives none; 0.02 is E5-Mistral's.
        normalize: bring every vector to length 1. False takes the model's vectors as they are: with
            `model.normalize=false` and temperature 1, Dragon's dot product (arXiv:2302.07452).
        cross_rank_negatives: take other data-parallel ranks' documents as candidates.
        mask_false_negatives: drop candidates that are a positive of the same query text, by
            document id or by text, or one of the query's `answers`.
        symmetric: average with the loss of choosing the query for each positive, where there are
            other queries to choose from.
        matryoshka_dims: prefixes of the vector, each normalised anew unless `normalize` is false,
            whose losses are averaged (arXiv:2205.13147); () is the whole vector.
        distillation_weight: weight of KL(teacher || model) over a query's own documents; the rest
            has 1 minus it. A query without teacher scores has no such term.
        teacher_temperature: divisor of the teacher's scores.
        grad_cache: a first pass without gradients embeds all micro-batches, the loss of the whole
            batch is differentiated with respect to the embeddings, and the training pass
            propagates that. With one micro-batch a rank it changes nothing and is left out.
    """

    output = "embedding"
    extras = frozenset({"role", "document_id", "text_hash", "answers", "in_batch", "teacher"})

    def __init__(
        self,
        temperature: float = 0.02,
        normalize: bool = True,
        cross_rank_negatives: bool = True,
        mask_false_negatives: bool = True,
        symmetric: bool = False,
        matryoshka_dims: Sequence[int] = (),
        distillation_weight: float = 0.0,
        teacher_temperature: float = 1.0,
        grad_cache: bool = True,
    ) -> None:
        if temperature <= 0 or teacher_temperature <= 0:
            raise ValueError(
                f"objective.temperature={temperature} and teacher_temperature="
                f"{teacher_temperature} must be above 0"
            )
        if not 0 <= distillation_weight <= 1:
            raise ValueError(
                f"objective.distillation_weight={distillation_weight} must be from 0 to 1"
            )
        if any(dim < 1 for dim in matryoshka_dims):
            raise ValueError(f"objective.matryoshka_dims={list(matryoshka_dims)} must be positive")
        self.temperature = temperature
        self.normalize = normalize
        self.cross_rank_negatives = cross_rank_negatives
        self.mask_false_negatives = mask_false_negatives
        self.symmetric = symmetric
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.distillation_weight = distillation_weight
        self.teacher_temperature = teacher_temperature
        self.grad_cache = grad_cache

    def samples_in_loss(self, global_batch: int, micro_batch: int, data_parallel: int) -> int:
        """Return a micro-batch, a rank's share of the batch, or those of all ranks together."""
        samples = global_batch // data_parallel if self.grad_cache else micro_batch
        return samples * data_parallel if self.cross_rank_negatives else samples

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """Run GradCache's first pass; return batches with what their training pass needs.

        extras["gradient"]: [texts, h], d loss of the global batch / d embedding.
        extras["queries"]: [queries, 3], METRICS of the micro-batch's queries.
        """
        if not self.grad_cache or len(batches) == 1:
            return batches, {}
        outputs = run(batches)
        if not outputs:
            return batches, {}  # This is not the last pipeline stage.
        embeddings = torch.cat([output.detach() for output in outputs]).requires_grad_()
        with torch.enable_grad():
            queries = self.per_query(embeddings, batches)
            (gradient,) = torch.autograd.grad(queries[:, 0].sum(), embeddings)
        gradients = gradient.split([len(output) for output in outputs])
        num_queries = [int(_is_query(batch).sum()) for batch in batches]
        return [
            batch.replace(extras=batch.extras | {"gradient": gradient, "queries": metrics})
            for batch, gradient, metrics in zip(
                batches, gradients, queries.detach().split(num_queries), strict=True
            )
        ], {}

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum over this rank's queries, their number, metrics).

        output: [texts, h], the vectors of the texts.

        The metric accuracy is the share of queries whose positive scores highest; negatives is the
        number of candidates that a query has beside its positive.
        """
        # After GradCache's first pass, output x gradient has the gradient of the whole loss.
        if "gradient" in batch.extras:
            total = (output * batch.extras["gradient"]).sum()
            queries = batch.extras["queries"]
        else:
            queries = self.per_query(output, [batch])
            # Zero times the output keeps the graph of a batch that is all filling.
            total = queries[:, 0].sum() + 0 * output.sum()
        count = torch.tensor(len(queries), dtype=torch.int, device=output.device)
        sums = queries.detach().sum(0)
        return (
            total,
            count,
            {
                name: torch.stack([value, count.float()])
                for name, value in zip(METRICS, sums, strict=True)
            },
        )

    def per_query(self, embeddings: Tensor, batches: Sequence[Batch]) -> Tensor:
        """Return [queries, 3], METRICS of each of this rank's queries; the first has a gradient.

        It is collective over data-parallel ranks, forward and backward: gradients of an embedding
        come back from every rank that used it, so that the sum over ranks is exact and nobody
        scales.

        embeddings: [texts, h], those of all `batches` in order.

        Raises ValueError when matryoshka_dims exceed h.
        """
        texts = _texts(embeddings, batches)
        if self.cross_rank_negatives:
            texts = _all_ranks(texts)
        candidates = _Candidates(texts, self.mask_false_negatives)
        dims = self.matryoshka_dims or (embeddings.shape[1],)
        if max(dims) > embeddings.shape[1]:
            raise ValueError(
                f"objective.matryoshka_dims={list(dims)} must be at most the embedding's"
                f" {embeddings.shape[1]}"
            )
        losses = [self._loss(texts, candidates, dim) for dim in dims]
        scores = candidates.scores(self._vectors(texts.embeddings.detach()))
        scores = scores.masked_fill(~candidates.mask, -torch.inf)
        correct = scores.argmax(1) == candidates.target
        negatives = candidates.mask.sum(1) - 1
        return torch.stack([torch.stack(losses).mean(0), correct.float(), negatives.float()], dim=1)

    def _loss(self, texts: _Texts, candidates: _Candidates, dim: int) -> Tensor:
        """Return fp32 [local queries], the loss on the first `dim` axes."""
        embeddings = self._vectors(texts.embeddings[:, :dim])
        scores = candidates.scores(embeddings) / self.temperature
        loss = _choose(scores, candidates.mask, candidates.target)
        if self.symmetric:
            positives = embeddings[candidates.positives[candidates.local]]
            backward = positives @ embeddings[candidates.queries].t() / self.temperature
            reverse_loss = _choose(backward, candidates.reverse_mask, candidates.local)
            has_choice = candidates.reverse_mask.sum(1) > 1
            loss = torch.where(has_choice, (loss + reverse_loss) / 2, loss)
        if self.distillation_weight:
            weight = self.distillation_weight * candidates.is_taught
            loss = (1 - weight) * loss + weight * self._distillation(scores, texts, candidates)
        return loss

    def _vectors(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def _distillation(self, scores: Tensor, texts: _Texts, candidates: _Candidates) -> Tensor:
        """Return fp32 [local queries], KL(teacher || model) over each query's own documents."""
        others = ~candidates.same_sample
        teacher = texts.teacher[candidates.documents].expand_as(scores) / self.teacher_temperature
        # Queries without a teacher have NaN here, which a weight of 0 would not remove.
        teacher = teacher.masked_fill(others, -torch.inf).nan_to_num(nan=0.0)
        teacher = teacher.masked_fill(others, -torch.inf).log_softmax(1)
        model = scores.masked_fill(others, -torch.inf).log_softmax(1)
        terms = teacher.exp() * (teacher - model)
        return terms.masked_fill(others, 0).sum(1)


@dataclass(frozen=True)
class _Texts:
    """The texts of one loss: embeddings [n, h], answers [n, k], and [n] each of the others.

    sample: number of the sample. is_local: whether the text is this rank's. is_valid: False for a
    text of a sample that only fills the batch.
    """

    embeddings: Tensor
    role: Tensor
    sample: Tensor
    document_id: Tensor
    text_hash: Tensor
    answers: Tensor
    in_batch: Tensor
    is_valid: Tensor
    is_local: Tensor
    teacher: Tensor


class _Candidates:
    """The documents that each of this rank's queries chooses from, and the queries in reverse.

    queries, documents, positives: indices of the valid texts; positives[k] belongs to queries[k].
    local: places in `queries` of this rank's. same_sample: bool [local, documents], the query's own
    documents. mask: bool [local, documents], the candidates. target: int64 [local], the positive's
    place in `documents`. reverse_mask: bool [local, queries], candidates of the positive.
    is_taught: bool [local], whether all own documents have a teacher's score.
    """

    def __init__(self, texts: _Texts, mask_false_negatives: bool) -> None:
        def valid(mask: Tensor) -> Tensor:
            return (mask & texts.is_valid).nonzero()[:, 0]

        def same(name: str, first: Tensor, second: Tensor) -> Tensor:
            values = getattr(texts, name)
            return values[first][:, None] == values[second]

        self.queries = valid(texts.role == QUERY)
        self.documents = valid(texts.role != QUERY)
        self.positives = valid(texts.role == POSITIVE)
        self.local = texts.is_local[self.queries].nonzero()[:, 0]
        self.local_queries = self.queries[self.local]
        queries = self.local_queries
        # 1. A query chooses its positive among its own documents: positive and hard negatives.
        self.same_sample = same("sample", queries, self.documents)
        is_positive = texts.role[self.documents] == POSITIVE
        self.target = (self.same_sample & is_positive).int().argmax(1)
        # 2. Where its data set says so, all other samples' documents are negatives too.
        in_batch = texts.in_batch[queries][:, None]
        mask, reverse = self.same_sample | in_batch, in_batch.expand(-1, len(self.queries))
        if mask_false_negatives:
            # 3. Two samples may ask the same: the positives of every query with this text answer
            # this query, whether they are known by their id or their text.
            same_query = same("sample", queries, self.queries) | same(
                "text_hash", queries, self.queries
            )
            is_answer = same("document_id", self.positives, self.documents) | same(
                "text_hash", self.positives, self.documents
            )
            mask = mask & ~(same_query.float() @ is_answer.float()).bool()
            # 4. The data may know more answers than the positive.
            mask = mask & ~_answered(texts, queries, self.documents)
            # 5. In reverse a positive chooses its query: not among queries with the same text, nor
            # those with the same positive, nor those that name it among their answers.
            positives = self.positives[self.local]
            same_positive = same("document_id", positives, self.positives) | same(
                "text_hash", positives, self.positives
            )
            reverse = reverse & ~same_query & ~same_positive
            reverse = reverse & ~_answered(texts, self.queries, positives).t()
        # 6. The masks above drop the target as well, which always stays.
        self.mask = mask.scatter(1, self.target[:, None], True)
        self.reverse_mask = reverse.scatter(1, self.local[:, None], True)
        has_teacher = ~texts.teacher[self.documents].isnan()
        self.is_taught = (has_teacher | ~self.same_sample).all(1)

    def scores(self, embeddings: Tensor) -> Tensor:
        """Return dot products [local queries, documents]."""
        return embeddings[self.local_queries] @ embeddings[self.documents].t()


def _answered(texts: _Texts, queries: Tensor, documents: Tensor) -> Tensor:
    """Return bool [queries, documents], whether the document is among the query's `answers`."""
    ids = texts.document_id[documents]
    answered = torch.zeros(len(queries), len(ids), dtype=torch.bool, device=ids.device)
    for answer in texts.answers[queries].unbind(1):
        answered |= answer[:, None] == ids
    return answered


def _choose(scores: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Return [rows], the cross-entropy of the target among the candidates of each row."""
    return F.cross_entropy(scores.masked_fill(~mask, -torch.inf), target, reduction="none")


def _is_query(batch: Batch) -> Tensor:
    """Return bool [texts], True for queries of real samples."""
    return (batch.extras["role"] == QUERY) & (batch.sample_ids >= 0)[batch.owners]


def _texts(embeddings: Tensor, batches: Sequence[Batch]) -> _Texts:
    """Return this rank's texts, with samples numbered from 0."""

    def joined(name: str) -> Tensor:
        return torch.cat([batch.extras[name] for batch in batches])

    firsts = torch.tensor([0, *(batch.sample_ids.numel() for batch in batches[:-1])]).cumsum(0)
    owners = [batch.owners + first for batch, first in zip(batches, firsts.tolist(), strict=True)]
    sample = torch.cat(owners)
    return _Texts(
        embeddings=embeddings.float(),
        role=joined("role"),
        sample=sample,
        document_id=joined("document_id"),
        text_hash=joined("text_hash"),
        answers=joined("answers"),
        in_batch=joined("in_batch").bool(),
        is_valid=(torch.cat([batch.sample_ids for batch in batches]) >= 0)[sample],
        is_local=torch.ones_like(sample, dtype=torch.bool),
        teacher=joined("teacher"),
    )


def _all_ranks(texts: _Texts) -> _Texts:
    """Gather the texts of all data-parallel ranks, which may have different numbers of them."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return texts
    # Ranks are padded to the most texts for the collective; `held` marks the real ones after it.
    count = len(texts.role)
    counts = gather(torch.tensor([count], device=texts.role.device), group)[:, 0]
    missing = int(counts.max()) - count
    held = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]

    def gathered(x: Tensor) -> Tensor:
        return gather(F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)), group)[held]

    ranks = torch.arange(group.size(), device=counts.device)[:, None].expand_as(held)[held]
    return _Texts(
        embeddings=gathered(texts.embeddings),
        role=gathered(texts.role),
        # A rank has fewer samples than texts, so no number is given twice.
        sample=gathered(texts.sample) + ranks * int(counts.max()),
        document_id=gathered(texts.document_id),
        text_hash=gathered(texts.text_hash),
        answers=gathered(texts.answers),
        in_batch=gathered(texts.in_batch.long()).bool(),
        is_valid=gathered(texts.is_valid.long()).bool(),
        is_local=ranks == group.rank(),
        teacher=gathered(texts.teacher),
    )
