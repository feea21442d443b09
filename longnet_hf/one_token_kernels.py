"""Triton kernels for one new token per row, which attends to what a cache holds.

The keys of a head are read once, in pieces by many programs side by side ("flash decoding"): a single query gives a
GPU nothing else to do at a time. A second kernel joins what the pieces give.
"""

import torch

from .dilated_kernels import _LOG2_E, _load, _pointers, _query_step, _store
from .dilated_tiles import adjacent_rows
from .kernel_launch import Arguments, Blocks, launch, padded, power_of_2, row_constants, strides_of
from .operators import Operator


try:  # optional: of code from the Hub, Transformers requires whatever is imported outside of `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error


# Keys of a piece at least, pieces of a head at most, and numbers of all of them that one program joins
_MIN_PIECE, _MAX_PIECES, _JOINED = 512, 256, 1 << 14
# Queries of a program: as few as tensor cores take, so that heads of 256 fit into 99 KiB of shared memory, however
# many queries a group has
_QUERIES = 16


@triton.jit(do_not_specialize=["slots", "piece"])
def _piece_kernel(
    Q, K, V, SEEN, OUT, LSE, slots, piece, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, s_batch, s_head,
    IS_MASK: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A piece of the slots of a head, for queries of its group: their output over the keys there alone, and the base-2
    log-sum-exp. SEEN is a mask of the slots, or how many are filled."""
    PARTS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    number, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # Heads of many slots lie further apart than int32 counts
    head, heads = (tl.program_id(1) // PARTS).to(tl.int64), tl.num_programs(1) // PARTS
    begin = number.to(tl.int64) * piece
    stop = tl.minimum(begin + piece, slots)
    if IS_MASK:
        SEEN += row * s_batch + head * s_head
    else:
        stop = tl.minimum(stop, tl.load(SEEN + row).to(tl.int64))
    g = tl.program_id(1) % PARTS * BLOCK_G + tl.arange(0, BLOCK_G)
    of_group = g < GROUP
    q_rows = _pointers(Q + row * q_batch + head * GROUP * q_head, g, q_head, BLOCK_D)
    q = _load(q_rows, of_group, HEAD_DIM, BLOCK_D, False)
    K += row * k_batch + head * k_head
    V += row * v_batch + head * v_head
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    total, top = tl.zeros((BLOCK_G,), tl.float32), tl.full((BLOCK_G,), -float("inf"), tl.float32)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < stop
        if IS_MASK:
            seen = tl.load(SEEN + n, mask=seen, other=0) != 0
        k = _load(_pointers(K, n, k_row, BLOCK_D), seen, HEAD_DIM, BLOCK_D, False)
        v = _load(_pointers(V, n, v_row, BLOCK_D), seen, HEAD_DIM, BLOCK_D, False)
        acc, total, top = _query_step(
            acc, total, top, q, q, top, top, k, v, seen[None, :], scale * _LOG2_E, True, False, PRECISION
        )
    at = ((row * heads + head) * GROUP + g) * tl.num_programs(0) + number
    there = tl.maximum(total, 1e-30)
    _store(_pointers(OUT, at, HEAD_DIM, BLOCK_D), acc / there[:, None], of_group, HEAD_DIM, BLOCK_D)
    tl.store(LSE + at, top + tl.log2(there), mask=of_group)


@triton.jit(do_not_specialize=["pieces"])
def _join_kernel(
    PARTS, LSE, OUT, pieces, o_batch, o_head, o_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The output of a query, from those over pieces of its keys. 0 if there are no keys."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = (row * tl.num_programs(0) + head) * pieces
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    inside = p < pieces
    lse = tl.load(LSE + first + p, mask=inside, other=-float("inf"))
    top = tl.max(lse)
    weights = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    parts = _load(_pointers(PARTS, first + p, HEAD_DIM, BLOCK_D), inside, HEAD_DIM, BLOCK_D, False)
    output = tl.sum(parts * weights[:, None], 0) / tl.maximum(tl.sum(weights), 1e-30)
    tl.store(OUT + row * o_batch + head * o_head + d, output, mask=d < HEAD_DIM)


def attend_one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one query per row and head to keys in the slots of a cache, on a GPU, without gradients.

    Args:
        query: `[B, H, 1, D]`, any strides.
        keys, values: `[B, Hkv, S, D]`, with numbers next to each other.
        seen: `[B, Hkv or 1, S]`, bool, any strides: which slots a query sees; or `[B]`, integers: how many of them,
            from the first on. Without any the output is 0.
        scale: factor of the scores.

    Returns:
        `[B, H, 1, D]` in the dtype of `query`.
    """
    return _operator(adjacent_rows(query), keys, values, seen, scale)


def _run(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    batch, heads, slots, head_dim = keys.shape
    group = query.shape[1] // heads
    met = 32 if query.dtype == torch.float32 else 128 if head_dim <= 64 else 64
    blocks = Blocks(_QUERIES, met, 4, 2 if head_dim > 128 else 3)
    piece = max(_MIN_PIECE, -(-slots // min(_MAX_PIECES, _JOINED // padded(head_dim))))
    piece = -(-piece // met) * met
    pieces = -(-slots // piece)
    parts = query.new_empty((batch, query.shape[1], pieces, head_dim), dtype=torch.float32)
    lse, output = parts.new_empty(parts.shape[:3]), torch.empty_like(query)
    is_mask = seen.dtype == torch.bool
    if is_mask:
        seen = adjacent_rows(seen).view(torch.uint8).expand(-1, heads, -1)
    strides = [*strides_of(query, keys, values), *(seen.stride()[:2] if is_mask else (0, 0))]
    constants = dict(IS_MASK=is_mask, GROUP=group, BLOCK_G=blocks.own, BLOCK_N=met) | row_constants(query, blocks)
    tensors = query, keys, values, seen, parts, lse
    arguments = Arguments(tensors, (slots, piece, scale), strides, constants)
    launch(_piece_kernel, (pieces, heads * -(-group // blocks.own), batch), arguments, blocks)
    constants = dict(HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_P=power_of_2(pieces))
    arguments = Arguments((parts, lse, output), (pieces,), strides_of(output), constants)
    launch(_join_kernel, (query.shape[1], batch, 1), arguments, Blocks(1, 0, 8, 0))
    return output


def _fake(query, keys, values, seen, scale):
    return torch.empty_like(query)


_operator = Operator("attend_one_token", __name__, _run, _fake)
