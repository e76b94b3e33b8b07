"""Core attention on SDPA: padded and packed rows, key spans, KV caches, context parallelism."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nvmm.modules.masks import QUERY_BLOCK, bias_of, made_again
from nvmm.parallel.context_parallel import gather, in_order

_CAUSAL = (
    AttnMaskType.causal,
    AttnMaskType.padding_causal,
    AttnMaskType.causal_bottom_right,
)


def flash_varlen(query: Tensor) -> Callable[..., Tensor] | None:
    """Return flash-attn's kernel for packed rows where it is installed and takes `query`.

    Returns None elsewhere: it needs a GPU and half precision. It has not run on a GPU yet.
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


class CoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v, plugged into mcore's attention through its backend.

    The mask is never dense where the kernel can do without: causal and packed data use the
    kernel's own causal flag, and `attention_mask` is not a mask but an int tensor [b, 2] of each
    row's valid keys (first, last + 1), or None when every key is valid. Queries that see no key
    output 0. Whatever needs a mask works on blocks of queries, so that memory is flat per token.

    A layer with a window (`config.window_size=(n, 0)`, unless `window_attn_skip_freq` makes it a
    full one) lets a query see its own key and the n before it. A block of its queries reads the
    keys of their windows alone.

    Under context parallelism the queries are this rank's zigzag chunks, and keys and values of
    the whole sequence are gathered before groups are expanded: two calls a row or segment, since
    each chunk of queries sees the keys up to its own end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.cp_group = None
        if config.context_parallel_size > 1:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
            self.cp_group = groups.cp
        self.attn_mask_type = attn_mask_type
        self.window = layer_window(config, layer_number)
        if self.window is not None and attn_mask_type is not AttnMaskType.causal:
            raise ValueError(
                f"transformer.window_size={config.window_size} needs a causal mask, not"
                f" {attn_mask_type.name}"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], or [t, heads, d] packed; key, value likewise with their own
                length and number of groups (not expanded). Under context parallelism each is this
                rank's zigzag part, and `packed_seq_params` describes the whole row.
            attention_mask: int [b, 2] valid keys of each row, or None.
            attn_mask_type: causal or no mask; with fewer queries than keys, causal means that the
                last query sees the last key (decoding with a cache).

        Returns: [s, b, heads * d], or [t, heads * d] packed.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by the native backend")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type in _CAUSAL
        if self.cp_group is not None:
            if attention_mask is not None:
                raise ValueError(
                    f"parallel.context_parallel_size={self.cp_group.size()} must be 1 with key"
                    " spans (left-padded rows, as in generation)"
                )
            return self._context_parallel(query, key, value, packed_seq_params, causal)
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, causal)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v, causal, attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, causal: bool
    ) -> Tensor:
        varlen = flash_varlen(query)
        if varlen is not None:
            window = {} if self.window is None else {"window_size": (self.window, 0)}
            with self._dropout_generator():
                out = varlen(
                    query,
                    key,
                    value,
                    packed.cu_seqlens_q,
                    packed.cu_seqlens_kv,
                    packed.max_seqlen_q,
                    packed.max_seqlen_kv,
                    dropout_p=self.dropout if self.training else 0.0,
                    softmax_scale=self.softmax_scale,
                    causal=causal,
                    **window,
                )
            return out.flatten(1)
        lengths_q = torch.diff(packed.cu_seqlens_q).tolist()
        lengths_kv = torch.diff(packed.cu_seqlens_kv).tolist()
        segments = zip(
            query.split(lengths_q), key.split(lengths_kv), value.split(lengths_kv), strict=True
        )
        outputs = []
        for segment in segments:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in segment)
            outputs.append(self._attend(q, k, v, causal, None)[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def _context_parallel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedSeqParams | None,
        causal: bool,
    ) -> Tensor:
        """Attend as `forward` does, with keys and values of the whole sequence gathered first."""
        assert self.cp_group is not None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        gathered = gather(torch.cat([key, value], dim=-1), self.cp_group)
        if packed is None:
            lengths = [query.shape[0]]
        else:
            query = query.unsqueeze(1)
            gathered = gathered.unsqueeze(2)
            lengths = (torch.diff(packed.cu_seqlens_q) // size).tolist()
        outputs = []
        # One row or segment at a time: its local queries, and every rank's keys and values of it.
        for local, parts in zip(query.split(lengths), gathered.split(lengths, 1), strict=True):
            keys, values = in_order(parts).split([key.shape[-1], value.shape[-1]], dim=-1)
            k, v = (x.permute(1, 2, 0, 3) for x in (keys, values))
            # A rank has two chunks of the sequence; each sees the keys up to its own end.
            chunk = local.shape[0] // 2
            for number, part in zip((rank, 2 * size - 1 - rank), local.split(chunk), strict=True):
                q = part.permute(1, 2, 0, 3)
                seen = (number + 1) * chunk if causal else k.shape[2]
                out = self._attend(q, k[:, :, :seen], v[:, :, :seen], causal, None)
                outputs.append(out.permute(2, 0, 1, 3).flatten(2))
        attended = torch.cat(outputs)
        return attended if packed is None else attended.squeeze(1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, spans: Tensor | None
    ) -> Tensor:
        """Attend with q [b, heads, sq, d] to k and v [b, groups, sk, d]; the result is like q.

        Causal queries are the last ones: the last query is at the last key.
        """
        if k.shape[1] != q.shape[1]:
            repeat = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        first = k.shape[2] - q.shape[2]
        window = self.window if self._is_windowed(k) else None
        if spans is None and window is None:
            if not causal or q.shape[2] == 1 or first == 0:
                return self._attend_all(q, k, v, is_causal=causal and first == 0)
            if q.is_cuda:
                # The kernel's own bottom-right mask; on the CPU torch would make it dense.
                return self._attend_all(q, k, v, bias=causal_lower_right(q.shape[2], k.shape[2]))
        outputs = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            block = q[:, :, start : start + QUERY_BLOCK]
            low, end = 0, k.shape[2]
            if causal:
                end = first + start + block.shape[2]
            if window is not None:
                low = max(0, first + start - window)
            inside = None if spans is None else spans - low
            mask = functools.partial(
                _mask,
                queries=range(first + start - low, first + start - low + block.shape[2]),
                keys=end - low,
                causal=causal,
                spans=inside,
                window=window,
                device=q.device,
            )
            outputs.append(self._attend_block(block, k[:, :, low:end], v[:, :, low:end], mask))
        return torch.cat(outputs, dim=2)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, mask: Callable[[], Tensor]) -> Tensor:
        """Attend with a mask [b or 1, 1, sq, sk]; queries that see no key output 0."""
        seen = mask()
        empty = ~seen.any(-1, keepdim=True)
        bias = bias_of(seen | empty, q.dtype)
        del seen

        def again() -> Tensor:
            return bias_of(mask() | empty, q.dtype)

        with made_again(bias, again):
            out = self._attend_all(q, k, v, bias=bias)
        return out.masked_fill(empty, 0.0)

    def _is_windowed(self, keys: Tensor) -> bool:
        """Return True when the window hides some of keys [b, heads, sk, d] from the last query."""
        return self.window is not None and keys.shape[2] > self.window + 1

    def _attend_all(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend in one call, k and v expanded to q's heads."""
        with self._dropout_generator():
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                is_causal=is_causal,
                dropout_p=self.dropout if self.training else 0.0,
                scale=self.softmax_scale,
            )

    def _dropout_generator(self) -> contextlib.AbstractContextManager[None]:
        """Give TP ranks, which hold different heads, different dropout masks.

        Under sequence parallelism the whole block already runs in the tensor-parallel generator.
        """
        if self.training and self.dropout > 0 and not self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Return how many keys before its own a query of a layer, from 1, sees; None for all of them.

    Raises ValueError for a window that is not (n, 0): it would see keys ahead, or all behind.
    """
    size = config.window_size
    if size is not None and (len(size) != 2 or size[0] < 0 or size[1] != 0):
        raise ValueError(f"transformer.window_size={size} must be null or [n, 0] with n >= 0")
    skip: Any = config.window_attn_skip_freq
    return size[0] if size and is_layer_window_attention(size, skip, layer_number) else None


def visible_keys(config: TransformerConfig) -> list[int | None]:
    """Return how many keys a query of each layer sees at most; None for all of them."""
    windows = [layer_window(config, number + 1) for number in range(config.num_layers)]
    return [None if window is None else window + 1 for window in windows]


def _mask(
    queries: range,
    keys: int,
    causal: bool,
    spans: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Return a boolean mask [b or 1, 1, sq, sk], True where a query may look.

    queries: places of the queries among the keys, of which there are so many.
    """
    columns = torch.arange(keys, device=device)
    mask = torch.ones(1, 1, len(queries), keys, dtype=torch.bool, device=device)
    if causal:
        rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
        mask = mask & (columns <= rows)
        if window is not None:
            mask = mask & (columns >= rows - window)
    if spans is not None:
        start, end = (x[:, None, None, None] for x in spans.unbind(-1))
        mask = mask & (columns >= start) & (columns < end)
    return mask
