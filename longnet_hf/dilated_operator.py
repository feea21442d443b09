"""Dilated attention as an operator: one dense reference, and the fast path in plain PyTorch that agrees with it.

Shapes: B batch, H query heads, Hkv key/value heads, Nq queries, N keys, D head size, K kept rows of a tile.

The mixture of the paper's branches is one softmax over all (query, key) pairs that any branch joins (see
`DilatedPattern.multiplicity`). The fast path therefore computes dense tiles of any branch with a flash kernel and
merges their outputs by their log-sum-exp; its backward gives every tile the *merged* output and log-sum-exp, from
which the tile's ordinary flash backward yields exactly its share of the gradients. Nothing per branch is saved.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from .dilated_pattern import DilatedPattern, Tile


try:
    from .dilated_kernels import MAX_HEAD_DIM, triton_backward, triton_forward
except ImportError:  # PyTorch without Triton: there are no GPUs to run it on
    MAX_HEAD_DIM = 0


# Most score entries that the kernel without flash attention holds at a time.
_MAX_SCORES = 1 << 24


def dilated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Dilated attention (LongNet, arXiv 2307.02486, section 2), in memory linear in N and time as `pattern.pairs`
    counts.

    Positions are counted inside each document, from its first real token on, and padding does not count: a row that is
    padded (left, right or inside) or packed gives what its documents give when each is computed alone.

    Args:
        query: `[B, H, Nq, D]`, the last Nq <= N positions of the sequence; any strides.
        key: `[B, Hkv, N, D]`, where Hkv divides H; the phase of a head belongs to its key/value head.
        value: `[B, Hkv, N, D]`.
        pattern: which pairs are joined, see [`DilatedPattern`].
        is_causal: hide later keys. A `"window"` branch looks both ways when not causal.
        scale: factor of the scores, default D ** -0.5.
        dropout: probability of dropping a (query, key) pair of a branch; the caller passes 0 in evaluation.
        attention_mask: `[B, N]`, nonzero at real tokens.
        position_ids: `[B, N]` or `[1, N]`; a document starts wherever they do not grow from one real token to the
            next.
        cu_seq_lens: `[documents + 1]`, boundaries of the documents in the flattened batch, from 0 to B * N.
        document_ids: `[B, N]` from [`find_documents`], in place of the three arguments before, to find them only once.
        return_lse: also return the log-sum-exp of the scores, with which the softmax can be continued over other keys.

    Returns:
        `[B, H, Nq, D]` in the dtype of `query`. Queries that no branch joins to any key, and padding, give zeros.
        With `return_lse` also `[B, H, Nq]` in float32 (of float64, float64), -inf for those; it carries no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    query, key, value = autocast_inputs(query, key, value)
    _check_inputs(query, key, value, pattern, scale, dropout)
    document_ids = _resolve_documents(key, attention_mask, position_ids, cu_seq_lens, document_ids)
    seed = torch.randint(2**62, (1,), dtype=torch.int64) if dropout > 0 else None
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    options = pattern.to_json(), is_causal, scale, float(dropout), seed
    output, lse = _forward_op(query, key, value, document_ids, *options)
    return (output, lse.detach()) if return_lse else output


def dilated_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The oracle: softmax(Q K^T * scale + log C) V with the dense matrix C of `pattern.multiplicity`.

    Arguments and output are those of [`dilated_attention`]; memory is O(B * H * Nq * N). Here dropout acts on a pair
    as a whole, also where several branches join it. With `return_weights`, also returns the weights `[B, H, Nq, N]`.
    """
    query, key, value = autocast_inputs(query, key, value)
    _check_inputs(query, key, value, pattern, scale, dropout)
    document_ids = _resolve_documents(key, attention_mask, position_ids, cu_seq_lens, document_ids)
    heads, queries, keys = key.shape[1], query.shape[2], key.shape[2]
    if document_ids is None:
        document_ids = torch.zeros(1, keys, dtype=torch.int32, device=key.device)

    together = (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids >= 0)[:, None, :]
    position = together.tril(-1).sum(-1)  # [B, N], inside the document
    n, m = position[:, None, keys - queries :, None], position[:, None, None, :]
    head = torch.arange(heads, device=key.device)[:, None, None]
    count = pattern.multiplicity(n, m, head, heads, is_causal) * together[:, None, keys - queries :]  # C

    group = query.shape[1] // heads
    value = value.masked_fill((document_ids < 0)[:, None, :, None], 0.0)  # padding may hold anything, NaN too
    count, key, value = (x.repeat_interleave(group, dim=1) for x in (count, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(count == 0, -torch.inf)
    scores = scores + count.clamp(min=1).to(_accumulator(query.dtype)).log()
    unjoined = (count == 0).all(-1, keepdim=True)
    weights = scores.masked_fill(unjoined, 0.0).softmax(-1, dtype=_accumulator(query.dtype))
    weights = F.dropout(weights.masked_fill(unjoined, 0.0).to(query.dtype), dropout)
    output = weights @ value
    return (output, weights) if return_weights else output


def find_documents(
    batch_size: int,
    length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Which document every token belongs to, from any of the three ways in which Transformers says it.

    Arguments as in [`dilated_attention`]. Returns int32 `[B, N]`, numbered from 0 in every row, -1 at padding; `None`
    if no argument is given, or if every row is one document without padding (not looked at under `torch.compile`).
    """
    if attention_mask is None and position_ids is None and cu_seq_lens is None:
        return None
    device = next(x.device for x in (attention_mask, position_ids, cu_seq_lens) if x is not None)
    if attention_mask is None:
        real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    elif attention_mask.shape != (batch_size, length):
        raise ValueError(
            f"`attention_mask` must be a 2-D padding mask of shape {(batch_size, length)} (batch, keys), got "
            f"{tuple(attention_mask.shape)}."
            + " Masks of more dimensions are not supported: the pattern decides who attends to whom."
            * (attention_mask.dim() > 2)
        )
    else:
        real = attention_mask != 0
    # Not the running sum of a mask without starts: Inductor makes int64 of the running sum of a constant
    ids = torch.zeros_like(real, dtype=torch.int32)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
            raise ValueError(
                f"`position_ids` must have shape {(batch_size, length)} or {(1, length)}, got "
                f"{tuple(position_ids.shape)}."
            )
        position_ids = position_ids.to(device).expand(batch_size, length)
        columns = torch.arange(length, device=device).expand(batch_size, length)
        last_real = columns.masked_fill(~real, -1).cummax(dim=1).values[:, :-1]
        before = position_ids.gather(1, last_real.clamp(min=0)).masked_fill(last_real < 0, -1)
        starts = (position_ids[:, 1:] <= before) & (last_real >= 0) & real[:, 1:]
        ids[:, 1:] = starts.cumsum(1, dtype=torch.int32)
    if cu_seq_lens is not None:
        if cu_seq_lens.dim() != 1:
            raise ValueError(f"`cu_seq_lens` must have one dimension, got shape {tuple(cu_seq_lens.shape)}.")
        if not torch.compiler.is_compiling():
            ends = [int(cu_seq_lens[0]), int(cu_seq_lens[-1])] if len(cu_seq_lens) else []
            if ends != [0, batch_size * length] or bool((cu_seq_lens.diff() < 0).any()):
                raise ValueError(
                    f"`cu_seq_lens` must grow from 0 to {batch_size * length}, the number of tokens in the batch, got "
                    f"{len(cu_seq_lens)} numbers from {ends[:1]} to {ends[1:]}."
                )
        flat = torch.arange(batch_size * length, device=device)
        document = torch.searchsorted(cu_seq_lens.to(device), flat, right=True).view(batch_size, length)
        ids = ids + (document - document[:, :1]).to(torch.int32)
    if not torch.compiler.is_compiling() and bool(real.all()) and bool((ids == 0).all()):
        return None
    return ids.masked_fill(~real, -1)


def _resolve_documents(key, attention_mask, position_ids, cu_seq_lens, document_ids) -> torch.Tensor | None:
    batch_size, _, length, _ = key.shape
    if document_ids is None:
        return find_documents(
            batch_size, length, attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens=cu_seq_lens
        )
    if any(x is not None for x in (attention_mask, position_ids, cu_seq_lens)):
        raise ValueError(
            "`document_ids` replaces `attention_mask`, `position_ids` and `cu_seq_lens`: give one or the other."
        )
    if document_ids.shape != (batch_size, length):
        raise ValueError(f"`document_ids` must have shape {(batch_size, length)}, got {tuple(document_ids.shape)}.")
    return document_ids.to(key.device)


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast does to PyTorch's own attention: bring the inputs to its dtype (rotary leaves them mixed)."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _check_inputs(query, key, value, pattern, scale, dropout) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"expected query [B, H, Nq, D] and key, value [B, Hkv, N, D], got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"batch and head sizes of query and key must be equal, got {shapes}.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {shapes}.")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"there must be at least as many keys as queries (the last positions), got {shapes}.")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(
            f"query, key and value need one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must share a device, got {query.device}, {key.device}, {value.device}."
        )
    if not hasattr(pattern, "multiplicity"):  # not isinstance: code loaded from the Hub has its own copy of the class
        raise ValueError(f"`pattern` must be a DilatedPattern, got {pattern!r}.")
    if scale is not None and (torch.is_tensor(scale) or not scale > 0):  # flash kernels give NaN for others
        raise ValueError(f"`scale` must be a number above 0 or None, got {scale!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1), got {dropout}.")


def adjacent_rows(x: torch.Tensor) -> torch.Tensor:
    """All kernels read a row of D numbers as adjacent, and PyTorch's do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the layout that results have: that of `x`, so that a model need not copy them."""
    return torch.empty_like(adjacent_rows(x))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def uses_triton(query: torch.Tensor, dropout: float) -> bool:
    """Whether the Triton kernels compute this; `LONGNET_TRITON=0` in the environment switches them off."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[-1] <= MAX_HEAD_DIM
        and dropout == 0
        and os.environ.get("LONGNET_TRITON", "1") != "0"
    )


def merge(output: torch.Tensor, lse: torch.Tensor, new_output: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Continue the softmax `output` `[..., D]`, `lse` `[..., 1]` over further keys, in place."""
    output.lerp_(new_output.to(output.dtype), torch.sigmoid(new_lse - lse))
    torch.logaddexp(lse, new_lse, out=lse)


# The fast path is a custom operator: torch.compile, checkpointing and FSDP see one opaque node. The namespace is the
# module's name, so that a second copy of this file (code that came with a model from the Hub) registers its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_ids: torch.Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged output `[B, H, Nq, D]` and log-sum-exp `[B, H, Nq]` of all tiles."""
    query, key, value = map(adjacent_rows, (query, key, value))
    if uses_triton(query, dropout):
        documents = _Documents.find(query, key, document_ids, in_place=True)
        q, k, v = documents.pack_queries(query), documents.pack_keys(key), documents.pack_keys(value)
        places = documents.places()
        output, lse = triton_forward(q, k, v, DilatedPattern.from_json(pattern), places, is_causal, scale)
        return documents.unpack_queries(output, query), documents.unpack_lse(lse)
    documents = _Documents.find(query, key, document_ids)
    q, k, v = documents.pack_queries(query), documents.pack_keys(key), documents.pack_keys(value)
    output = torch.zeros(q.shape, dtype=_accumulator(q.dtype), device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=output.dtype, device=q.device)
    kernel = TileKernel(query, scale, dropout, seed)
    for tile in documents.tiles(pattern, is_causal, k.shape[1]):
        with torch.autocast(q.device.type, enabled=False):
            tile_output, tile_lse = kernel.forward(tile.queries(q), tile.keys(k), tile.keys(v), tile.mask)
        merged_output, merged_lse = tile.rows(output), tile.rows(lse[..., None])
        merge(merged_output, merged_lse, tile.unfold(tile_output), tile.unfold(tile_lse[..., None]))
    return documents.unpack_queries(output, query), documents.unpack_lse(lse)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def backward_op(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    document_ids: torch.Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the merged output and log-sum-exp."""
    tensors = map(adjacent_rows, (grad_output, query, key, value, output))
    grad_output, query, key, value, output = tensors
    in_triton = uses_triton(query, dropout)
    documents = _Documents.find(query, key, document_ids, in_place=in_triton)
    q, o, do, l = (documents.pack_queries(x) for x in (query, output, grad_output, lse[..., None]))
    k, v = documents.pack_keys(key), documents.pack_keys(value)
    if in_triton:
        dq, dk, dv = triton_backward(
            do, q, k, v, o, l[..., 0], DilatedPattern.from_json(pattern), documents.places(), is_causal, scale
        )
        return documents.unpack_queries(dq, query), documents.unpack_keys(dk, key), documents.unpack_keys(dv, value)
    dq, dk, dv = (torch.zeros(x.shape, dtype=_accumulator(x.dtype), device=x.device) for x in (q, k, v))
    kernel = TileKernel(query, scale, dropout, seed)
    for tile in documents.tiles(pattern, is_causal, k.shape[1]):
        queries = (tile.queries(x) for x in (do, q, o, l))
        keys = (tile.keys(x) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            tile_dq, tile_dk, tile_dv = kernel.backward(*queries, *keys, tile.mask)
        tile.rows(dq).add_(tile.unfold(tile_dq))
        tile.columns(dk).add_(tile.unfold(tile_dk).sum(2, keepdim=True))
        tile.columns(dv).add_(tile.unfold(tile_dv).sum(2, keepdim=True))
    return documents.unpack_queries(dq, query), documents.unpack_keys(dk, key), documents.unpack_keys(dv, value)


@_forward_op.register_fake
def _(query, key, value, document_ids, pattern, is_causal, scale, dropout, seed):
    return _like(query), query.new_empty(query.shape[:3], dtype=_accumulator(query.dtype))


@backward_op.register_fake
def _(grad_output, query, key, value, output, lse, document_ids, pattern, is_causal, scale, dropout, seed):
    return tuple(map(_like, (query, key, value)))


def _save_for_backward(ctx, inputs, output):
    query, key, value, document_ids, *ctx.options, seed = inputs
    ctx.save_for_backward(query, key, value, *output, document_ids, seed)


def _backward(ctx, grad_output, _):
    query, key, value, output, lse, document_ids, seed = ctx.saved_tensors
    grads = backward_op(grad_output, query, key, value, output, lse, document_ids, *ctx.options, seed)
    return *grads, None, None, None, None, None, None


def _no_second_derivatives(ctx, *grads):
    raise NotImplementedError("Dilated attention has no second derivatives (`create_graph=True`).")


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)
backward_op.register_autograd(_no_second_derivatives)


class _Documents:
    """Where the documents of a batch lie, and how to lay them end to end without padding."""

    def __init__(self, query, key, bounds, query_rows=None, key_rows=None):
        self.shapes = query.shape, key.shape
        self.bounds = bounds  # per document: row of the batch, first query, first key, numbers of queries and of keys
        self.query_rows, self.key_rows = query_rows, key_rows  # into the flattened batch; None: left as it is

    @classmethod
    def find(
        cls, query: torch.Tensor, key: torch.Tensor, document_ids: torch.Tensor | None, in_place: bool = False
    ) -> "_Documents":
        """With `in_place`, documents without padding inside are left where they are."""
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        runs = [(row, 0, keys) for row in range(batch)] if document_ids is None else None
        if in_place and document_ids is not None:
            runs = _document_runs(document_ids)
        if runs is not None:
            skipped = keys - queries  # columns of keys before the first query
            bounds = [
                (row, max(0, start - skipped), start, max(0, min(length, start + length - skipped)), length)
                for row, start, length in runs
            ]
            return cls(query, key, bounds)
        row = torch.arange(batch, device=document_ids.device)[:, None]
        ids = (document_ids.long() + row * (document_ids.max() + 1)).flatten()
        real = (document_ids >= 0).flatten()
        key_rows = real.nonzero()[:, 0]
        key_rows = key_rows[ids[key_rows].argsort(stable=True)]
        column = key_rows % keys
        is_query = column >= keys - queries
        query_rows = (key_rows // keys * queries + column - (keys - queries))[is_query]
        _, document, key_counts = ids[key_rows].unique_consecutive(return_inverse=True, return_counts=True)
        query_counts = torch.zeros_like(key_counts).index_add_(0, document, is_query.to(key_counts.dtype))
        counts = torch.stack((query_counts, key_counts), dim=1)
        bounds = torch.cat((counts.cumsum(0) - counts, counts), dim=1).tolist()
        return cls(query, key, [(0, *bound) for bound in bounds], query_rows, key_rows)

    def places(self) -> tuple[tuple[int, ...], ...]:
        """The documents as the Triton kernels ask for them."""
        return tuple(
            (row, first_key, first_query - (keys - queries), keys, keys - queries)
            for row, first_query, first_key, queries, keys in self.bounds
        )

    def pack_queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._pack(x, self.query_rows)

    def pack_keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._pack(x, self.key_rows)

    def unpack_queries(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._unpack(x, self.query_rows, like)

    def unpack_keys(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._unpack(x, self.key_rows, like)

    def unpack_lse(self, x: torch.Tensor) -> torch.Tensor:
        if self.query_rows is None:
            return x
        like = x.new_empty((*self.shapes[0][:3], 1))
        return self._unpack(x[..., None], self.query_rows, like, -torch.inf)[..., 0]

    @staticmethod
    def _pack(x, rows):
        """`[B, H, N, D]` -> `[1, H, real tokens, D]`"""
        return x if rows is None else x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]

    @staticmethod
    def _unpack(x, rows, like, padding=0.0):
        """`[1, H, real tokens, D]` -> `[B, H, N, D]` in the layout and dtype of `like`"""
        if rows is None:
            return x if x.stride() == like.stride() and x.dtype == like.dtype else _like(like).copy_(x)
        batch, heads, length, size = like.shape
        flat = x.new_full((batch * length, heads, size), padding)
        flat[rows] = x[0].transpose(0, 1)
        return _like(like).copy_(flat.unflatten(0, (batch, length)).transpose(1, 2))

    def tiles(self, pattern: str, is_causal: bool, num_heads: int) -> Iterator["_PlacedTile"]:
        pattern = DilatedPattern.from_json(pattern)
        group = self.shapes[0][1] // num_heads
        # Rows that are one document each have the same tiles, which are then done for all rows at a time
        bounds = self.bounds if self.query_rows is not None else self.bounds[:1]
        for _, first_query, first_key, queries, keys in bounds:
            for tile in pattern.tiles(keys, num_heads, num_queries=queries, is_causal=is_causal):
                yield _PlacedTile(tile, num_heads, group, first_query - (keys - queries), first_key)


# Every layer asks for the documents of one batch
_known_runs = WeakTensorKeyDictionary()


def _document_runs(document_ids: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """Row, first column and length of every document; `None` if there is padding inside one."""
    version = None if document_ids.is_inference() else document_ids._version
    if version is not None and document_ids in _known_runs and _known_runs[document_ids][0] == version:
        return _known_runs[document_ids][1]
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    ids = document_ids.flatten()[starts]
    starts, ids = torch.stack((starts, ids.long())).tolist()
    ends = [*starts[1:], batch * length]
    runs = [(start // length, start % length, end - start) for start, end in zip(starts, ends, strict=True)]
    documents = [(row, document) for (row, _, _), document in zip(runs, ids, strict=True) if document >= 0]
    runs = [run for run, document in zip(runs, ids, strict=True) if document >= 0]
    if len(set(documents)) < len(documents):
        runs = None
    if version is not None:
        _known_runs[document_ids] = version, runs
    return runs


class _PlacedTile(NamedTuple):
    """A tile of one document, and where that document's positions begin among the packed queries and keys."""

    tile: Tile
    num_heads: int  # Hkv
    group: int  # H / Hkv
    query_offset: int
    key_offset: int

    @property
    def mask(self) -> str:
        return self.tile.mask

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's queries as a view: `[B, H, Nq, D]` -> `[B, heads, H / Hkv, repeats, K, D]`."""
        return self._view(x, self.tile.queries, self.query_offset)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's keys as a view: `[B, Hkv, N, D]` -> `[B, heads, 1, repeats, K, D]`."""
        return self._view(x, self.tile.keys, self.key_offset)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's queries for a kernel: `[B * repeats, heads * H / Hkv, K, D]`."""
        return self._fold(self.rows(x))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's keys for a kernel, repeated for every query head of a group."""
        x = self.columns(x)
        return self._fold(x.expand(-1, -1, self.group, -1, -1, -1))

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """A kernel's output in the form of `rows` (or of `columns`, before the sum over a group)."""
        repeats, heads = self.tile.repeats, len(self.tile.heads)
        return x.unflatten(0, (-1, repeats)).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4, 5)

    def _view(self, x, rows, offset):
        heads, start, step = self.tile.heads, rows.start + offset, rows.step
        x = x.unflatten(1, (self.num_heads, -1))[:, heads.start : heads.stop : heads.step]
        span = rows[-1] - rows[0] + 1
        stop = start + (self.tile.repeats - 1) * self.tile.period + span
        return x[:, :, :, start:stop].unfold(3, span, max(1, self.tile.period))[..., ::step].transpose(-1, -2)

    @staticmethod
    def _fold(x):
        return x.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1)


class TileKernel:
    """Softmax attention of one tile, with its log-sum-exp: PyTorch's flash kernels, or plain products where they do
    not apply (dropout, float32 and float64 on a GPU, other devices). Inputs are `[batch, heads, K, D]`."""

    def __init__(self, like: torch.Tensor, scale: float, dropout: float, seed: torch.Tensor | None):
        self.scale, self.dropout = scale, dropout
        self.generator = None
        if dropout > 0:  # the same seed draws the same numbers again in the backward pass
            self.generator = torch.Generator(like.device).manual_seed(int(seed))
        half = like.dtype in (torch.float16, torch.bfloat16)
        self.on_cpu = dropout == 0 and like.device.type == "cpu"
        self.on_cuda = dropout == 0 and like.device.type == "cuda" and half and like.shape[-1] <= 256

    def forward(self, q, k, v, mask: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of a tile."""
        if mask == "upper":  # in reverse order, an upper triangle is a lower one
            output, lse = self.forward(q.flip(2), k.flip(2), v.flip(2), "lower")
            return output.flip(2), lse.flip(2)
        is_causal = mask == "lower"
        if self.on_cpu:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, scale=self.scale
            )
        if self.on_cuda:
            padded = map(_pad_head, (q, k, v))
            output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                *padded, 0.0, is_causal, scale=self.scale
            )
            return output[..., : q.shape[-1]], lse
        q, k, v = (x.to(_accumulator(x.dtype)) for x in (q, k, v))
        output, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for rows, columns in self._chunks(q, k, is_causal):
            scores = self._scores(q, k, rows, columns, is_causal)
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = (scores - lse[:, :, rows, None]).exp_()
            if self.dropout:
                weights *= self._kept_weights(weights)
            output[:, :, rows] = weights @ v[:, :, columns]
        return output, lse

    def backward(self, do, q, o, lse, k, v, mask: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tile's share of the gradients, given the merged output `o` and log-sum-exp `[..., 1]` of its queries."""
        if mask == "upper":
            flipped = (x.flip(2) for x in (do, q, o, lse, k, v))
            return tuple(x.flip(2) for x in self.backward(*flipped, "lower"))
        is_causal, lse = mask == "lower", lse[..., 0]
        if self.on_cpu:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, is_causal, scale=self.scale
            )
        if self.on_cuda:
            padded = map(_pad_head, (do, q, k, v, o))
            no_random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *padded,
                lse.contiguous(),
                None,
                None,
                q.shape[2],
                k.shape[2],
                0.0,
                is_causal,
                no_random_state,
                no_random_state,
                scale=self.scale,
            )
            return tuple(x[..., : q.shape[-1]] for x in grads)
        do, q, k, v, o = (x.to(_accumulator(x.dtype)) for x in (do, q, k, v, o))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns in self._chunks(q, k, is_causal):
            weights = (self._scores(q, k, rows, columns, is_causal) - lse[:, :, rows, None]).exp_()
            grad_weights = do[:, :, rows] @ v[:, :, columns].transpose(-1, -2)
            kept = self._kept_weights(weights) if self.dropout else 1.0
            mean = (do[:, :, rows] * o[:, :, rows]).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights * kept - mean) * self.scale
            dq[:, :, rows] = grad_scores @ k[:, :, columns]
            dk[:, :, columns] += grad_scores.transpose(-1, -2) @ q[:, :, rows]
            dv[:, :, columns] += (weights * kept).transpose(-1, -2) @ do[:, :, rows]
        return dq, dk, dv

    @staticmethod
    def _chunks(q, k, is_causal) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, and the keys that any of them attends to, few enough to hold their scores."""
        size = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
        for start in range(0, q.shape[2], size):
            stop = min(start + size, q.shape[2])
            yield slice(start, stop), slice(0, stop if is_causal else k.shape[2])

    def _scores(self, q, k, rows, columns, is_causal):
        scores = q[:, :, rows] @ k[:, :, columns].transpose(-1, -2) * self.scale
        if is_causal:
            n, m = torch.arange(rows.start, rows.stop, device=q.device), torch.arange(columns.stop, device=q.device)
            scores = scores.masked_fill(m > n[:, None], -torch.inf)
        return scores

    def _kept_weights(self, weights):
        kept = torch.rand(weights.shape, device=weights.device, generator=self.generator) >= self.dropout
        return kept.to(weights.dtype) / (1 - self.dropout)


def _pad_head(x: torch.Tensor) -> torch.Tensor:
    """Flash attention on a GPU wants head sizes that are multiples of 8."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy
