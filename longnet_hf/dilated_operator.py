"""Dilated attention as an operator: one dense reference, and the fast path that agrees with it.

Shapes: B batch, H query heads, Hkv key/value heads, Nq queries, N keys, D head size.

The mixture of the paper's branches is one softmax over all (query, key) pairs that any branch joins (see
`DilatedPattern.multiplicity`). The fast path computes it in parts, by the Triton kernels of dilated_kernels.py or by
the dense tiles of dilated_tiles.py, which are merged by their log-sum-exp.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .dilated_pattern import DilatedPattern, check_segment_padding
from .dilated_tiles import (
    DocumentTile,
    TileKernel,
    accumulator,
    adjacent_rows,
    attend_to_tiles,
    in_groups,
    tile_gradients,
)
from .documents import BatchDocuments, positions_in_documents, resolve_documents
from .full_heads import attend_with_full_heads, find_full_heads
from .input_checks import check_flag, check_number, check_tensor
from .kernel_launch import runs_in_triton
from .operators import Operator, is_watched
from .recompute import keep_for_second


try:
    from .dilated_kernels import MAX_HEAD_DIM, Attention, triton_backward, triton_forward
except ImportError:  # PyTorch without Triton: there are no GPUs to run it on
    MAX_HEAD_DIM = 0


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
    segment_padding: str = "none",
    return_lse: bool = False,
    kept: dict | None = None,
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
        segment_padding: `"zeros"` for encoders trained with torchscale, which attend to the keys and values of zeros
            that fill up the last segment: see [`~DilatedPattern.padding_keys`]. Not causal, without windows or shift.
        return_lse: also return the log-sum-exp of the scores, with which the softmax can be continued over other keys.
        kept: for layers whose backward pass computes them again: a dict that takes the result of the first call, and
            gives it to the second one, of the same inputs, which need not compute it. Without dropout; and left
            empty where something looks at operators (compilers, tracers, modes of dispatch).

    Returns:
        `[B, H, Nq, D]` in the dtype of `query`. Queries that no branch joins to any key, and padding, give zeros.
        With `return_lse` also `[B, H, Nq]` in float32 (of float64, float64), -inf for those; it carries no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or if `segment_padding` has no meaning.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, "numbers")
    query, key, value = autocast_inputs(query, key, value)
    _check_inputs(query, key, value, pattern, scale, dropout, is_causal)
    if kept is not None and (not isinstance(kept, dict) or dropout > 0):
        raise ValueError(f"`kept` must be a dict, with a `dropout` of 0, or None, got {kept!r} and {dropout}.")
    refuse_forward_mode(query, key, value)
    check_segment_padding(pattern, segment_padding, is_causal)
    given = dict(attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens=cu_seq_lens)
    document_ids = _documents_of(key, document_ids, **given)
    if torch.onnx.is_in_onnx_export() and not return_lse:  # ONNX knows plain operations alone
        options = dict(is_causal=is_causal, scale=scale, dropout=dropout, segment_padding=segment_padding)
        return dilated_attention_reference(query, key, value, pattern, document_ids=document_ids, **options)
    seed = torch.randint(2**62, (1,), dtype=torch.int64) if dropout > 0 else None
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    def attend(pattern: DilatedPattern) -> tuple[torch.Tensor, torch.Tensor]:
        options = pattern.to_json(), is_causal, scale, float(dropout), seed, segment_padding == "zeros"
        inputs = query, key, value, document_ids, *options
        if kept is None or is_watched(query, key, value):
            return _forward_op(*inputs)
        result = keep_for_second(kept, lambda: _forward_op(*inputs))
        return _Recall.apply(*result, *inputs), result[1]

    if document_ids is None and dropout == 0 and not return_lse:
        heads = find_full_heads(query, key, pattern)
        if heads:
            return attend_with_full_heads(
                query, key, value, pattern, heads, is_causal, scale, lambda others: attend(others)[0], kept
            )
    output, lse = attend(pattern)
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
    segment_padding: str = "none",
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The oracle: softmax(Q K^T * scale + log C) V with the dense matrix C of `pattern.multiplicity`.

    Arguments and output are those of [`dilated_attention`]; memory is O(B * H * Nq * N). Here dropout acts on a pair
    as a whole, also where several branches join it. With `return_weights`, also returns the weights `[B, H, Nq, N]`;
    those of padding keys are left out.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, "numbers")
    query, key, value = autocast_inputs(query, key, value)
    _check_inputs(query, key, value, pattern, scale, dropout, is_causal)
    given = dict(attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens=cu_seq_lens)
    document_ids = _documents_of(key, document_ids, **given)
    rows = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)
    options = dict(is_causal=is_causal, scale=scale, document_ids=document_ids, segment_padding=segment_padding)
    weights = dilated_attention_weights(query, key, pattern, rows, **options)
    weights = F.dropout(weights.to(query.dtype), dropout)
    if document_ids is not None:  # padding may hold anything, NaN too
        value = value.masked_fill((document_ids < 0)[:, None, :, None], 0.0)
    output = weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (output, weights) if return_weights else output


def dilated_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: DilatedPattern,
    rows: torch.Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    document_ids: torch.Tensor | None = None,
    segment_padding: str = "none",
) -> torch.Tensor:
    """Which weights chosen queries give to all keys: rows of softmax(Q K^T * scale + log C), see
    [`dilated_attention_reference`].

    Args:
        query: `[B, H, R, D]`, the chosen queries only.
        key: `[B, Hkv, N, D]`.
        rows: `[R]`, integers: where in the sequence of N the queries stand.
        pattern, is_causal, scale, document_ids, segment_padding: those of [`dilated_attention`].

    Returns:
        `[B, H, R, N]` in float32 (of float64, float64). A row sums to 1, less what goes to keys of zeros; rows of
        padding, and queries that no branch joins to any key, are zero.
    """
    check_segment_padding(pattern, segment_padding, is_causal)
    heads, keys = key.shape[1], key.shape[2]
    if document_ids is None:
        document_ids = torch.zeros(key.shape[0], keys, dtype=torch.int32, device=key.device)
    position = positions_in_documents(document_ids)
    of_rows = document_ids[:, rows, None]
    together = (of_rows == document_ids[:, None, :]) & (of_rows >= 0)  # [B, R, N]
    n, m = position[:, None, rows, None], position[:, None, None, :]
    head = torch.arange(heads, device=key.device)[:, None, None]
    count = pattern.multiplicity(n, m, head, heads, is_causal) * together[:, None]  # C
    group = query.shape[1] // heads
    count, key = (x.repeat_interleave(group, dim=1) for x in (count, key))
    dtype = accumulator(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(count == 0, -torch.inf)
    scores = scores + count.clamp(min=1).to(dtype).log()
    if segment_padding == "zeros":  # one more key, whose score is 0
        length = together.sum(-1, keepdim=True).clamp(min=1)[:, None]
        zeros = pattern.padding_keys(n, length, head, heads).repeat_interleave(group, dim=1)
        scores = torch.cat((scores, zeros.to(dtype).log()), dim=-1)
    unjoined = (count == 0).all(-1, keepdim=True)
    weights = scores.masked_fill(unjoined, 0.0).softmax(-1, dtype=dtype).masked_fill(unjoined, 0.0)
    return weights[..., :keys]


def _documents_of(key: torch.Tensor, document_ids: torch.Tensor | None, **given) -> torch.Tensor | None:
    document_ids = resolve_documents(key.shape[0], key.shape[2], document_ids, **given)
    return None if document_ids is None else document_ids.to(key.device)


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What autocast does to PyTorch's own attention: bring the inputs to its dtype (rotary leaves them mixed)."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _check_inputs(query, key, value, pattern, scale, dropout, is_causal) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"expected query [B, H, Nq, D] and key, value [B, Hkv, N, D], got {shapes}.")
    if 0 in (query.shape[1], key.shape[1], query.shape[3]):
        raise ValueError(f"there must be at least one head, of at least one number, got {shapes}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"batch and head sizes of query and key must be equal, got {shapes}.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {shapes}.")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"there must be at least as many keys as queries (the last positions), got {shapes}.")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value need one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must share a device, got {query.device}, {key.device}, {value.device}."
        )
    if not hasattr(pattern, "multiplicity"):  # not isinstance: code loaded from the Hub has its own copy of the class
        raise ValueError(f"`pattern` must be a DilatedPattern, got {pattern!r}.")
    if scale is not None:  # for others flash kernels give NaN, and 1 / scale is infinite
        check_number("scale", scale, at_least=torch.finfo(torch.float32).tiny)
    check_number("dropout", dropout, at_least=0, below=1)
    check_flag("is_causal", is_causal)


def refuse_forward_mode(*tensors: torch.Tensor) -> None:
    """A custom operator drops tangents without a word, which would then be 0."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "Dilated attention has no forward-mode derivatives (`torch.func.jvp`, `jacfwd`): use "
            '`attn_implementation="eager"` of a LongNet, or `dilated_attention_reference`, which has them.'
        )


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the layout that results have: that of `x`, so that a model need not copy them."""
    return torch.empty_like(adjacent_rows(x))


def uses_triton(query: torch.Tensor, dropout: float) -> bool:
    """Whether the Triton kernels compute this."""
    return query.shape[-1] <= MAX_HEAD_DIM and dropout == 0 and runs_in_triton(query)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_ids: torch.Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    pads_segments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged output `[B, H, Nq, D]` and log-sum-exp `[B, H, Nq]` of all branches."""
    query, key, value = map(adjacent_rows, (query, key, value))
    in_triton = uses_triton(query, dropout)
    documents = BatchDocuments.find(query, key, document_ids, in_place=in_triton, is_causal=is_causal)
    q, k, v = documents.pack_queries(query), documents.pack_keys(key), documents.pack_keys(value)
    if in_triton:
        attention = Attention(q, k, v, DilatedPattern.from_json(pattern), documents.documents, is_causal, scale)
        output, lse = triton_forward(attention)
    else:
        output = torch.zeros(q.shape, dtype=accumulator(q.dtype), device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=output.dtype, device=q.device)
        tensors = (in_groups(x, k.shape[1]) for x in (output, lse[..., None], q, k, v))
        tiles = _tiles(documents, pattern, is_causal)
        attend_to_tiles(*tensors, tiles, TileKernel(query, scale, dropout, seed))
    if pads_segments:
        _attend_to_zeros(output, lse, documents, DilatedPattern.from_json(pattern))
    return documents.unpack_queries(output, query), documents.unpack_lse(lse)


def _attend_to_zeros(
    output: torch.Tensor, lse: torch.Tensor, documents: BatchDocuments, pattern: DilatedPattern
) -> None:
    """Continue the softmax, in place, over the keys of zeros of `segment_padding="zeros"`.

    Their scores and values are 0: C of them add C to the denominator and nothing else. From the continued output and
    log-sum-exp, the backward pass gives the gradients of the continued softmax, as it does for merged branches.
    """
    heads = documents.key_shape[1]
    head = torch.arange(heads, device=output.device)[:, None]
    for document in documents.documents:
        n = torch.arange(document.first_query, document.length, device=output.device)
        count = pattern.padding_keys(n, document.length, head, heads)
        log_count = count.repeat_interleave(output.shape[1] // heads, dim=0).to(lse.dtype).log()
        columns = slice(document.query_column + document.first_query, document.query_column + document.length)
        part, part_lse = output[document.row, :, columns], lse[document.row, :, columns]
        kept = torch.where(log_count == -torch.inf, 1.0, torch.sigmoid(part_lse - log_count))
        part.mul_(kept[..., None])
        part_lse.copy_(torch.logaddexp(part_lse, log_count))


def _gradients(
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
    documents = BatchDocuments.find(query, key, document_ids, in_place=in_triton, is_causal=is_causal)
    q, o, do, l = (documents.pack_queries(x) for x in (query, output, grad_output, lse[..., None]))
    k, v = documents.pack_keys(key), documents.pack_keys(value)
    if in_triton:
        attention = Attention(q, k, v, DilatedPattern.from_json(pattern), documents.documents, is_causal, scale)
        dq, dk, dv = triton_backward(attention, do, o, l[..., 0])
    else:
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in (q, k, v))
        sums = [in_groups(x, k.shape[1]) for x in (dq, dk, dv)]
        tensors = (in_groups(x, k.shape[1]) for x in (do, q, o, l, k, v))
        tiles = _tiles(documents, pattern, is_causal)
        for tile, *grads in tile_gradients(*tensors, tiles, TileKernel(query, scale, dropout, seed)):
            tile.add_to_queries(sums[0], grads[0])
            tile.add_to_keys(sums[1], grads[1])
            tile.add_to_keys(sums[2], grads[2])
    return documents.unpack_queries(dq, query), documents.unpack_keys(dk, key), documents.unpack_keys(dv, value)


def _tiles(documents: BatchDocuments, pattern: str, is_causal: bool) -> Iterator[DocumentTile]:
    """All tiles of a batch, document by document."""
    pattern, num_heads = DilatedPattern.from_json(pattern), documents.key_shape[1]
    # Rows that are one document each have the same tiles, which are then done for all rows at a time
    for document in documents.documents if documents.is_end_to_end else documents.documents[:1]:
        num_queries = document.length - document.first_query
        for tile in pattern.tiles(document.length, num_heads, num_queries=num_queries, is_causal=is_causal):
            yield DocumentTile(tile, document.query_column, document.key_column)


def _fake_forward(query, key, value, document_ids, pattern, is_causal, scale, dropout, seed, pads_segments):
    return _like(query), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))


def _fake_gradients(
    grad_output, query, key, value, output, lse, document_ids, pattern, is_causal, scale, dropout, seed
):
    return tuple(map(_like, (query, key, value)))


def _save_for_backward(ctx, inputs, output):
    query, key, value, document_ids, *ctx.options, seed, _ = inputs
    ctx.save_for_backward(query, key, value, *output, document_ids, seed)


def _backward(ctx, grad_output, _):
    query, key, value, output, lse, document_ids, seed = ctx.saved_tensors
    grads = backward_op(grad_output, query, key, value, output, lse, document_ids, *ctx.options, seed)
    return *grads, None, None, None, None, None, None, None


class _Recall(torch.autograd.Function):
    """The output of an earlier call of the operator, with the gradients that it has."""

    @staticmethod
    def forward(ctx, output, lse, *inputs):
        _save_for_backward(ctx, inputs, (output, lse))
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, *_backward(ctx, grad_output, None)


def _forward_flops(query, key, value, document_ids, pattern, is_causal, *options) -> int:
    """4 per joined pair and channel: two products."""
    if isinstance(document_ids, FakeTensor):  # whose numbers are not known: as if each row were one document
        document_ids = None
    pattern, pairs = DilatedPattern.from_json(pattern), 0
    for document in BatchDocuments.find(query, key, document_ids).documents:
        queries = document.length - document.first_query
        pairs += pattern.pairs(document.length, key.shape[1], num_queries=queries, is_causal=is_causal)
    return 4 * query.shape[-1] * (query.shape[1] // key.shape[1]) * pairs


def _gradient_flops(grad_output, query, key, value, output, lse, document_ids, pattern, is_causal, *options) -> int:
    """Five products."""
    return _forward_flops(query, key, value, document_ids, pattern, is_causal) * 5 // 2


# They find out where the documents lie, and the kernels keep tables of that
_forward_op = Operator(
    "forward",
    __name__,
    _forward,
    _fake_forward,
    _save_for_backward,
    _backward,
    flops=_forward_flops,
    in_cuda_graphs=False,
)
backward_op = Operator("backward", __name__, _gradients, _fake_gradients, flops=_gradient_flops, in_cuda_graphs=False)


__all__ = ["dilated_attention", "dilated_attention_reference"]
