"""Text from a model: batched generation with a KV cache, and scoring of given continuations.

Both run the training schedule forward-only, at any tensor and pipeline parallel size. Prompts of
different lengths are padded on the LEFT, so that every row's next token has one cache slot. A row's
positions begin behind its padding, and the pad keys are masked, so no answer depends on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from nvmm.batch import IGNORE_INDEX, Batch, Sample
from nvmm.data.collate import collate
from nvmm.inference.prefix import prefill
from nvmm.inference.sampling import choose, generator
from nvmm.parallel import schedule


def left_padded(samples: Sequence[Sample], pad_id: int) -> tuple[Batch, Tensor | None]:
    """Collate prompts to one Batch, padded on the left with `pad_id`; return it with key spans.

    In the batch, tokens are [b, s] and media columns are moved by the padding. Key spans are int32
    [b, 2], first and last + 1 of the valid keys of each row, or None when all have one length.
    """
    batch = collate(samples, pad_id=pad_id, padding="left")
    width = batch.tokens.shape[1]
    firsts = width - batch.lengths
    if not firsts.any():
        return batch, None
    return batch, torch.stack([firsts, torch.full_like(firsts, width)], dim=1).int()


def generate(
    model: Sequence[Module],
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    share_prefix: bool = False,
    ended: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt; collective over a model-parallel group, which gets the result.

    Args:
        model: this rank's one chunk, in eval mode, built without sequence, context and virtual
            pipeline parallelism.
        prompts: samples up to where the answer begins. Media take part in the prompt pass.
        stop_ids: tokens that end an answer; they are not part of it.
        pad_id: a token that is no media placeholder.
        temperature: 0 for the most likely token, else the softmax's temperature.
        top_p: sample from the smallest set of tokens with at least this probability
            (Holtzman et al. 2019, arXiv:1904.09751).
        seed: a sampled answer depends on the seed and its prompt's `sample_id`, not on the batch
            that it is decoded in.
        use_cache: False runs the whole sequence for every token (to check the cache).
        share_prefix: run tokens that all prompts begin with once (`nvmm.inference.prefix`).
        ended: says of an answer's tokens whether they are enough, for stop strings for instance.

    Returns: the new tokens of each prompt, at most `max_new_tokens`.

    Raises ValueError for a layout that cannot decode, for options out of range, for a prompt whose
    answer could end behind the model's longest sequence, and as `check_cache` does.
    """
    if share_prefix and not use_cache:
        raise ValueError("share_prefix=true needs use_cache=true: the prefix is kept in the cache")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    _check_layout(model)
    for prompt in prompts:
        _check_length(model, prompt.num_tokens, prompt.sample_id, max_new_tokens)
        if use_cache:
            check_cache(model, prompt.num_tokens, prompt.sample_id, max_new_tokens)
    # 1. Pad prompts on the left, so that the next tokens of all rows take one slot of the cache.
    batch, spans = left_padded(prompts, pad_id)
    device = next(model[0].parameters()).device
    batch = batch.to(device)
    spans = None if spans is None else spans.to(device)
    context = None
    if use_cache:
        from megatron.core.inference.contexts import StaticInferenceContext

        rows, width = batch.tokens.shape
        context = StaticInferenceContext(rows, width + max_new_tokens)
        if share_prefix:
            batch = prefill(model, prompts, batch, context)
    # Each row draws from a generator of its own, so that its answer depends on no other row.
    generators = [generator(seed, int(i)) for i in batch.sample_ids]
    stops = set(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))

    for _ in range(max_new_tokens):
        # 2. Run the prompts, then one token a row. The last stage chooses for the whole group.
        outputs = _forward(
            model, [batch], "logits", key_spans=spans, inference_context=context, last_only=True
        )
        chosen = torch.empty(len(prompts), dtype=torch.long, device=device)
        if outputs:
            uniforms = [float(torch.rand((), generator=g)) for g in generators]
            chosen.copy_(choose(outputs[0], temperature, top_p, uniforms))
        _broadcast_from_last_stage(chosen)
        # 3. Rows that have ended go on in the batch, but their tokens are dropped.
        for row in sorted(running):
            token = int(chosen[row])
            if token in stops:
                running.remove(row)
            else:
                answers[row].append(token)
                if ended is not None and ended(answers[row]):
                    running.remove(row)
        if not running:
            break
        # 4. With a cache only the new tokens are run next, without one all tokens again.
        if context is not None:
            context.sequence_len_offset += batch.tokens.shape[1]
            context.enable_decode_mode()
        batch, spans = _advance(batch, spans, chosen, keep=context is None)
    return answers


def score(
    model: Sequence[Module], batches: Sequence[Batch], by_text: bool = False
) -> list[tuple[float, int]]:
    """Return the log-probability of each sample's supervised tokens, (sum, number), in order.

    by_text: of each text instead.

    Positions count where `loss_mask` is not 0, whatever its weight there. Rows may be packed or
    padded. It is collective over a model-parallel group, which gets the result.

    Raises ValueError unless the model is in eval mode, and for a sequence that it is too short for.
    """
    if model[0].training:
        raise ValueError("score needs the model in eval mode")
    for batch in batches:
        longest = int(batch.lengths.max())
        _check_length(model, longest, batch.sample_ids.tolist())
    device = next(model[0].parameters()).device
    batches = [batch.to(device) for batch in batches]
    if by_text:
        batches = [_texts_as_samples(batch) for batch in batches]
    sizes = [len(batch.sample_ids) for batch in batches]
    table = torch.zeros(sum(sizes), 2, dtype=torch.float64, device=device)
    losses = [output for batch in batches for output in _forward(model, [batch], "loss")]
    if losses:
        rows = [_per_sample(loss, batch) for loss, batch in zip(losses, batches, strict=True)]
        table.copy_(torch.cat(rows))
    _broadcast_from_last_stage(table)
    return [(float(total), int(count)) for total, count in table.tolist()]


def score_continuations(
    model: Sequence[Module],
    prompts: Sequence[Sample],
    continuations: Sequence[Sequence[int]],
    *,
    pad_id: int,
    share_prefix: bool = False,
) -> Tensor:
    """Return fp64 [prompts, continuations]: log-probability of each continuation after each prompt.

    The prompts run once; the continuations are fed one token at a time behind their keys and values
    in the cache. It is collective over a model-parallel group, which gets the result.

    continuations: token ids, at least one each, the same for all prompts. share_prefix: run tokens
    that all prompts begin with once (`nvmm.inference.prefix`).

    Raises ValueError for a prompt that the model is too short for, with a continuation, and as
    `check_cache` does.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    _check_layout(model)
    most = max(map(len, continuations))
    for prompt in prompts:
        _check_length(model, prompt.num_tokens, prompt.sample_id, most)
        check_cache(model, prompt.num_tokens, prompt.sample_id, most)
    device = next(model[0].parameters()).device
    batch, spans = left_padded(prompts, pad_id)
    batch = batch.to(device)
    spans = None if spans is None else spans.to(device)
    rows, width = batch.tokens.shape
    context = StaticInferenceContext(rows, width + most)
    if share_prefix:
        batch = prefill(model, prompts, batch, context)

    def forward(step: Batch, keys: Tensor | None) -> Tensor | None:
        """Return the log-probabilities of the next token [b, vocab], on the last stage."""
        options = {"key_spans": keys, "inference_context": context, "last_only": True}
        outputs = _forward(model, [step], "logits", **options)
        return torch.log_softmax(outputs[0].double(), -1) if outputs else None

    table = torch.zeros(rows, len(continuations), dtype=torch.float64, device=device)
    after_prompt = forward(batch, spans)
    context.enable_decode_mode()
    for column, continuation in enumerate(continuations):
        # Later keys are overwritten: each continuation begins behind the prompt.
        context.sequence_len_offset = width
        step, keys, logs = batch, spans, after_prompt
        for number, token in enumerate(continuation):
            if logs is not None:
                table[:, column] += logs[:, token]
            if number + 1 < len(continuation):
                chosen = torch.full((rows,), token, device=device)
                step, keys = _advance(step, keys, chosen, keep=False)
                logs = forward(step, keys)
                context.sequence_len_offset += 1
    _broadcast_from_last_stage(table)
    return table.cpu()


def embed(model: Sequence[Module], batches: Sequence[Batch]) -> Tensor:
    """Return fp32 [texts, h], the vectors of an embedder for the texts of all batches.

    It is collective over a model-parallel group, which gets the result.
    """
    _check_layout(model)
    for batch in batches:
        _check_length(model, int(batch.lengths.max()), batch.sample_ids.tolist())
    outputs = _forward(model, batches, "embedding")
    count = sum(int((batch.lengths > 0).sum()) for batch in batches)
    config: Any = model[0].config
    device = batches[0].tokens.device
    vectors = torch.empty(count, config.hidden_size, device=device)
    if outputs:
        vectors = torch.cat(outputs)
    _broadcast_from_last_stage(vectors)
    return vectors


def rewards(model: Sequence[Module], batches: Sequence[Batch]) -> Tensor:
    """Return [texts, outputs], the scores that a reward model gives to the texts of all batches.

    They are fp32, or fp64 of a model in double precision. It is collective over a model-parallel
    group, which gets the result.

    Raises ValueError for a model that is no reward model, and for a text that it is too short for.
    """
    _check_layout(model)
    chunk: Any = model[0]
    outputs = getattr(getattr(chunk, "language", chunk), "num_outputs", None)
    if outputs is None:
        raise ValueError("the checkpoint has no scores: it is no reward model")
    for batch in batches:
        _check_length(model, int(batch.lengths.max()), batch.sample_ids.tolist())
    scores = _forward(model, batches, "score")
    count = sum(batch.owners.numel() for batch in batches)
    dtype = torch.promote_types(next(chunk.parameters()).dtype, torch.float32)
    table = torch.empty(count, outputs, dtype=dtype, device=batches[0].tokens.device)
    if scores:
        table = torch.cat(scores)
    _broadcast_from_last_stage(table)
    return table


def share(num_samples: int, rank: int, size: int) -> range:
    """Return the indices of the samples that data-parallel rank `rank` of `size` evaluates."""
    return range(rank, num_samples, size)


def gather(local: Sequence[Any], num_samples: int) -> list[Any]:
    """Gather the results of all data-parallel ranks' `share`, in the samples' order."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    size = dist.get_world_size(group)
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, list(local), group=group)
    results: list[Any] = [None] * num_samples
    for rank, rank_results in enumerate(shares):
        results[rank::size] = rank_results
    return results


def _check_layout(model: Sequence[Module]) -> None:
    """Raise ValueError for a layout that cannot run one new token a step."""
    if len(model) != 1:
        raise ValueError(
            "parallel.virtual_pipeline_model_parallel_size must be null in generation, not"
            f" {len(model)}"
        )
    if model[0].training:
        raise ValueError("generate needs the model in eval mode")
    config: Any = model[0].config
    if config.sequence_parallel:
        raise ValueError("parallel.sequence_parallel must be false in generation (one new token)")
    if config.context_parallel_size > 1:
        raise ValueError(
            f"parallel.context_parallel_size={config.context_parallel_size} must be 1 in generation"
        )


def longest(model: Sequence[Module]) -> int:
    """Return the tokens of the model's longest sequence."""
    chunk: Any = model[0]
    return int(getattr(chunk, "language", chunk).max_sequence_length)


def _check_length(
    model: Sequence[Module], tokens: int, samples: int | list[int], new_tokens: int = 0
) -> None:
    """Raise ValueError for a sequence that is longer than the model's longest."""
    limit = longest(model)
    if tokens + new_tokens > limit:
        answer = f" and max_new_tokens={new_tokens}" if new_tokens else ""
        raise ValueError(
            f"sample {samples}: {tokens} tokens{answer} are more than the model's"
            f" max_sequence_length={limit}"
        )


def check_cache(
    model: Sequence[Module], tokens: int, sample: int, new_tokens: int, first: int | None = None
) -> None:
    """Raise ValueError where keys of a cache would have other angles than without a cache.

    A RoPE scaling by the sequence's length gives all keys new angles as the sequence grows; those
    in a cache keep their old ones.

    tokens: of the whole prompt; new_tokens: the last one is never fed. first: tokens that are in
        the cache before the rest of the prompt runs; None where the prompt runs in one pass.
    """
    chunk: Any = model[0]
    rotary = getattr(chunk, "language", chunk).rotary
    last, first = tokens + new_tokens - 1, tokens if first is None else first
    if rotary.scaling is not None and not rotary.scaling.is_constant(first, last):
        raise ValueError(
            f"sample {sample}: {type(rotary.scaling).__name__} scales RoPE by the length, which"
            f" grows from {first} to {last} tokens; a cache would keep the angles of the shorter"
            " one, so use_cache must be false"
        )


def _advance(
    batch: Batch, spans: Tensor | None, chosen: Tensor, *, keep: bool
) -> tuple[Batch, Tensor | None]:
    """Return the next step's batch: only the new tokens, or with `keep` the sequence with them."""
    new = chosen[:, None]
    tokens = torch.cat([batch.tokens, new], 1) if keep else new
    positions = batch.position_ids[:, -1:] + 1
    step = replace(
        batch,
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        loss_mask=torch.zeros(tokens.shape, device=tokens.device),
        position_ids=torch.cat([batch.position_ids, positions], 1) if keep else positions,
        lengths=batch.lengths + 1,
        media=batch.media if keep else {},
    )
    if spans is not None:
        spans = torch.stack([spans[:, 0], spans[:, 1] + 1], dim=1)
    return step, spans


def _forward(
    model: Sequence[Module],
    batches: Sequence[Batch],
    output: str,
    *,
    last_only: bool = False,
    **keywords: Any,
) -> list[Tensor]:
    """Run one forward-only pass; return outputs on the last pipeline stage, nothing elsewhere.

    last_only: keep the last position of each output.
    """
    return schedule.outputs(
        model,
        batches,
        lambda chunk, batch: chunk(batch, output=output, **keywords),
        keep=(lambda value: value[:, -1].clone()) if last_only else (lambda value: value),
    )


def _broadcast_from_last_stage(tensor: Tensor) -> None:
    """Fill `tensor` on the whole model-parallel group from a rank of its last pipeline stage."""
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    dist.broadcast(tensor, dist.get_process_group_ranks(group)[-1], group=group)


def _texts_as_samples(batch: Batch) -> Batch:
    """Return a batch in which each text is a sample of its own."""
    texts = torch.arange(batch.owners.numel(), device=batch.owners.device)
    return batch.replace(owners=texts, sample_ids=batch.sample_ids[batch.owners])


def _per_sample(loss: Tensor, batch: Batch) -> Tensor:
    """Sum a per-token loss [b, s] to [num_samples, 2]: log-probability, number of tokens."""
    num_texts = batch.owners.numel()
    if batch.cu_seqlens is None:
        texts = torch.arange(num_texts, device=loss.device)[:, None].expand_as(loss)
    else:
        segments = torch.diff(batch.cu_seqlens).long()
        texts = torch.arange(len(segments), device=loss.device).repeat_interleave(segments)[None]
    counted = (batch.loss_mask != 0) & (texts < num_texts)
    owners = batch.owners[texts[counted]]
    table = torch.zeros(len(batch.sample_ids), 2, dtype=torch.float64, device=loss.device)
    table[:, 0].index_add_(0, owners, -loss[counted].double())
    table[:, 1].index_add_(0, owners, torch.ones_like(owners, dtype=torch.float64))
    return table
