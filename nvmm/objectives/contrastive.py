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

    Scores are dot products of unit vectors over a temperature. Candidates of a query are its own
    documents and, where `in_batch` says so, every other document of the loss, of all data-parallel
    ranks. One loss covers a micro-batch of every rank, or with `grad_cache` the global batch.

    Args:
        temperature: divides the scores. NV-Embed's paper gives none; 0.02 is E5-Mistral's.
        cross_rank_negatives: take other data-parallel ranks' documents as candidates.
        mask_false_negatives: drop candidates that are a positive of the same query text, by
            document id or by text, or one of the query's `answers`.
        symmetric: average with the loss of choosing the query for each positive, where there are
            other queries to choose from.
        matryoshka_dims: prefixes of the vector, each normalised anew, whose losses are averaged
            (arXiv:2205.13147); () is the whole vector.
        distillation_weight: of KL(teacher || model) over a query's own documents, against 1 minus
            it of the rest; a query without teacher scores has no such term.
        teacher_temperature: divides the teacher's scores.
        grad_cache: a first pass without gradients embeds all micro-batches, the loss of the whole
            batch is differentiated with respect to the embeddings, and the training pass
            propagates that. With one micro-batch a rank it changes nothing and is left out.
    """

    output = "embedding"
    extras = frozenset({"role", "document_id", "text_hash", "answers", "in_batch", "teacher"})

    def __init__(
        self,
        temperature: float = 0.02,
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
        self.cross_rank_negatives = cross_rank_negatives
        self.mask_false_negatives = mask_false_negatives
        self.symmetric = symmetric
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.distillation_weight = distillation_weight
        self.teacher_temperature = teacher_temperature
        self.grad_cache = grad_cache

    def prepare(self, run: Run, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """GradCache's first pass: extras["gradient"], d loss / d embedding of the whole batch."""
        if not self.grad_cache or len(batches) == 1:
            return batches, {}
        outputs = run(batches)
        if not outputs:
            return batches, {}  # not the last pipeline stage
        embeddings = torch.cat([output.detach() for output in outputs]).requires_grad_()
        with torch.enable_grad():
            queries = self.per_query(embeddings, batches)
            (gradient,) = torch.autograd.grad(queries[:, 0].sum(), embeddings)
        gradients = gradient.split([len(output) for output in outputs])
        parts = queries.detach().split([int(_is_query(batch).sum()) for batch in batches])
        return [
            batch.replace(extras=batch.extras | {"gradient": gradient, "queries": part})
            for batch, gradient, part in zip(batches, gradients, parts, strict=True)
        ], {}

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum over this rank's queries, their number, metrics).

        output: unit vectors [texts, h].
        accuracy: share of queries whose positive scores highest; negatives: candidates a query has
        beside its positive.
        """
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
        """METRICS of each of this rank's queries, [queries, 3]; the first has a gradient.

        Collective over data-parallel ranks, forward and backward: gradients of an embedding come
        back from every rank that used it, so that the sum over ranks is exact and nobody scales.

        embeddings: [texts, h], those of all `batches` in order.
        """
        texts = _texts(embeddings, batches)
        if self.cross_rank_negatives:
            texts = _all_ranks(texts)
        found = _Candidates(texts, self.mask_false_negatives)
        dims = self.matryoshka_dims or (embeddings.shape[1],)
        if max(dims) > embeddings.shape[1]:
            raise ValueError(
                f"objective.matryoshka_dims={list(dims)} must be at most the embedding's"
                f" {embeddings.shape[1]}"
            )
        losses = [self._loss(texts, found, dim) for dim in dims]
        scores = found.scores(texts.embeddings.detach()).masked_fill(~found.mask, -torch.inf)
        correct = scores.argmax(1) == found.target
        negatives = found.mask.sum(1) - 1
        return torch.stack([torch.stack(losses).mean(0), correct.float(), negatives.float()], dim=1)

    def _loss(self, texts: _Texts, found: _Candidates, dim: int) -> Tensor:
        """fp32 [own queries], on the first `dim` axes."""
        embeddings = F.normalize(texts.embeddings[:, :dim], dim=-1)
        scores = found.scores(embeddings) / self.temperature
        loss = _choose(scores, found.mask, found.target)
        if self.symmetric:
            positives = embeddings[found.positives[found.own]]
            backward = positives @ embeddings[found.queries].t() / self.temperature
            both = (loss + _choose(backward, found.reverse_mask, found.own)) / 2
            loss = torch.where(found.reverse_mask.sum(1) > 1, both, loss)
        if self.distillation_weight:
            weight = self.distillation_weight * found.is_taught
            loss = (1 - weight) * loss + weight * self._distillation(scores, texts, found)
        return loss

    def _distillation(self, scores: Tensor, texts: _Texts, found: _Candidates) -> Tensor:
        teacher = texts.teacher[found.documents].expand_as(scores) / self.teacher_temperature
        teacher = teacher.masked_fill(~found.same_sample, -torch.inf).nan_to_num(nan=0.0)
        wanted = teacher.masked_fill(~found.same_sample, -torch.inf).log_softmax(1)
        given = scores.masked_fill(~found.same_sample, -torch.inf).log_softmax(1)
        terms = wanted.exp() * (wanted - given)
        return terms.masked_fill(~found.same_sample, 0).sum(1)


@dataclass(frozen=True)
class _Texts:
    """The texts of one loss: embeddings [n, h], answers [n, k], and [n] each of the others.

    sample: number of the sample; is_own: on this rank; is_valid: not of a sample that only fills
    the batch.
    """

    embeddings: Tensor
    role: Tensor
    sample: Tensor
    document_id: Tensor
    text_hash: Tensor
    answers: Tensor
    in_batch: Tensor
    is_valid: Tensor
    is_own: Tensor
    teacher: Tensor


class _Candidates:
    """Who competes with whom.

    queries, documents, positives: indices of the valid texts; positives[k] belongs to queries[k].
    own: places in `queries` of this rank's. mask: bool [own, documents]; target: int64 [own], the
    positive's place in documents. reverse_mask: bool [own, queries].
    """

    def __init__(self, texts: _Texts, mask_false_negatives: bool) -> None:
        def where(mask: Tensor) -> Tensor:
            return (mask & texts.is_valid).nonzero()[:, 0]

        def same(name: str, first: Tensor, second: Tensor) -> Tensor:
            values = getattr(texts, name)
            return values[first][:, None] == values[second]

        self.queries = where(texts.role == QUERY)
        self.documents = where(texts.role != QUERY)
        self.positives = where(texts.role == POSITIVE)
        self.own = texts.is_own[self.queries].nonzero()[:, 0]
        asked = self.queries[self.own]
        self.same_sample = same("sample", asked, self.documents)
        is_positive = texts.role[self.documents] == POSITIVE
        self.target = (self.same_sample & is_positive).int().argmax(1)
        others = texts.in_batch[asked][:, None]
        mask, reverse = self.same_sample | others, others.expand(-1, len(self.queries))
        if mask_false_negatives:
            asked_alike = same("sample", asked, self.queries) | same(
                "text_hash", asked, self.queries
            )
            is_answer = same("document_id", self.positives, self.documents) | same(
                "text_hash", self.positives, self.documents
            )
            # A query's positives are those of every query with its text.
            mask = mask & ~(asked_alike.float() @ is_answer.float()).bool()
            mask = mask & ~_answered(texts, asked, self.documents)
            own = self.positives[self.own]
            answers_too = same("document_id", own, self.positives) | same(
                "text_hash", own, self.positives
            )
            reverse = reverse & ~asked_alike & ~answers_too
            reverse = reverse & ~_answered(texts, self.queries, own).t()
        self.mask = mask.scatter(1, self.target[:, None], True)
        self.reverse_mask = reverse.scatter(1, self.own[:, None], True)
        known = ~texts.teacher[self.documents].isnan()
        self.is_taught = (known | ~self.same_sample).all(1)
        self._asked = asked

    def scores(self, embeddings: Tensor) -> Tensor:
        """Dot products [own queries, documents]."""
        return embeddings[self._asked] @ embeddings[self.documents].t()


def _answered(texts: _Texts, queries: Tensor, documents: Tensor) -> Tensor:
    """bool [queries, documents]: the document is among the query's `answers`."""
    ids = texts.document_id[documents]
    found = torch.zeros(len(queries), len(ids), dtype=torch.bool, device=ids.device)
    for answer in texts.answers[queries].unbind(1):
        found |= answer[:, None] == ids
    return found


def _choose(scores: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy [rows] of the target among the candidates of each row."""
    return F.cross_entropy(scores.masked_fill(~mask, -torch.inf), target, reduction="none")


def _is_query(batch: Batch) -> Tensor:
    """bool [texts]: queries of real samples."""
    return (batch.extras["role"] == QUERY) & (batch.sample_ids >= 0)[batch.owners]


def _texts(embeddings: Tensor, batches: Sequence[Batch]) -> _Texts:
    """This rank's texts, samples numbered from 0."""

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
        is_own=torch.ones_like(sample, dtype=torch.bool),
        teacher=joined("teacher"),
    )


def _all_ranks(texts: _Texts) -> _Texts:
    """The texts of all data-parallel ranks; ranks may have different numbers of them."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return texts
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
        is_own=ranks == group.rank(),
        teacher=gathered(texts.teacher),
    )
