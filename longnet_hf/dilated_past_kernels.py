"""Attention to stored keys on a GPU: Triton kernels that read queries and keys where they lie.

A launch does what a tile asks for, for all of its heads, and continues what is there: outputs and log-sum-exps, or
gradients. In PyTorch's operators the same takes some twenty launches, most of them copies.

Under windows with r > 1 several programs of a launch add to the gradient of one key, in an order that may change.
"""

from collections.abc import Sequence

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error

from .dilated_kernels import (
    _LOG2_E,
    Blocks,
    _blocks,
    _key_step,
    _launch,
    _load,
    _pointers,
    _query_step,
    _row_constants,
    _store,
    _strides,
)


@triton.jit
def _pairs(i, j, num_queries, num_keys, MASK: tl.constexpr):
    """Which pairs of a tile there are; `i` and `j` broadcast."""
    pairs = (i < num_queries) & (j < num_keys)
    if MASK == "upper":
        pairs = pairs & (j - num_keys >= i - num_queries)
    return pairs


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _past_query_kernel(
    Q, K, V, OUT, LSE, DO, DQ, heads, columns, rows, num_queries, num_keys, scale,
    q_batch, q_head, q_row, o_batch, o_head, o_row, do_batch, do_head, do_row, dq_batch, dq_head, dq_row,
    lse_batch, lse_head, lse_row, k_row, v_row,
    GRADIENT: tl.constexpr, MASK: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries goes through all keys of its tile. Continues OUT and LSE, or with GRADIENT adds to DQ."""
    first, tile, row = tl.program_id(0) * BLOCK_M, tl.program_id(1) // GROUP, tl.program_id(2).to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    valid = i < num_queries
    column = tl.load(columns + tile * num_queries + tl.minimum(i, num_queries - 1))
    head = tl.load(heads + tile * num_queries) * GROUP + tl.program_id(1) % GROUP
    q_rows = _pointers(Q + row * q_batch + head * q_head, column, q_row, BLOCK_D)
    o_rows = _pointers(OUT + row * o_batch + head * o_head, column, o_row, BLOCK_D)
    lse_rows = LSE + row * lse_batch + head * lse_head + column * lse_row
    q = _load(q_rows, valid, HEAD_DIM, BLOCK_D, False)
    o = _load(o_rows, valid, HEAD_DIM, BLOCK_D, False)
    lse = tl.load(lse_rows, mask=valid, other=0.0) * _LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    do, delta = q, total
    if GRADIENT:
        do_rows = _pointers(DO + row * do_batch + head * do_head, column, do_row, BLOCK_D)
        do = _load(do_rows, valid, HEAD_DIM, BLOCK_D, False)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)

    start = 0
    if MASK == "upper":
        start = tl.maximum(0, first + num_keys - num_queries)
    rows += (row * (tl.num_programs(1) // GROUP) + tile) * num_keys
    for block in tl.range(start, num_keys, BLOCK_N, num_stages=STAGES):
        j = block + tl.arange(0, BLOCK_N)
        at = tl.load(rows + j, mask=j < num_keys, other=0)
        k = _load(_pointers(K, at, k_row, BLOCK_D), j < num_keys, HEAD_DIM, BLOCK_D, False)
        v = _load(_pointers(V, at, v_row, BLOCK_D), j < num_keys, HEAD_DIM, BLOCK_D, False)
        joined = _pairs(i[:, None], j[None, :], num_queries, num_keys, MASK)
        acc, total, top = _query_step(
            acc, total, top, q, do, lse, delta, k, v, joined, scale * _LOG2_E, True, GRADIENT, PRECISION
        )
    if GRADIENT:
        dq_rows = _pointers(DQ + row * dq_batch + head * dq_head, column, dq_row, BLOCK_D)
        dq = _load(dq_rows, valid, HEAD_DIM, BLOCK_D, False).to(tl.float32)
        _store(dq_rows, dq + acc * scale, valid, HEAD_DIM, BLOCK_D)
    else:
        new_top = tl.maximum(lse, top)
        before, now = tl.exp2(lse - new_top), tl.exp2(top - new_top)
        total = before + total * now
        acc = (o.to(tl.float32) * before[:, None] + acc * now[:, None]) / total[:, None]
        _store(o_rows, acc, valid, HEAD_DIM, BLOCK_D)
        tl.store(lse_rows, (new_top + tl.log2(total)) / _LOG2_E, mask=valid)


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _past_key_kernel(
    Q, K, V, OUT, LSE, DO, GRAD, heads, columns, rows, num_queries, num_keys, scale,
    q_batch, q_head, q_row, o_batch, o_head, o_row, do_batch, do_head, do_row,
    lse_batch, lse_head, lse_row, k_row, v_row, grad_row,
    MASK: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of keys goes through all queries of its tile, of all heads of a group. Adds to GRAD, where the gradient
    of a key lies before that of its value; tiles may have keys in common."""
    first, tile, row = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2).to(tl.int64)
    j = first + tl.arange(0, BLOCK_N)
    valid = j < num_keys
    at = tl.load(rows + (row * tl.num_programs(1) + tile) * num_keys + tl.minimum(j, num_keys - 1))
    k = _load(_pointers(K, at, k_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    v = _load(_pointers(V, at, v_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    stop = num_queries
    if MASK == "upper":
        stop = tl.minimum(num_queries, first + BLOCK_N + num_queries - num_keys)
    for of_group in range(GROUP):
        head = tl.load(heads + tile * num_queries) * GROUP + of_group
        for block in tl.range(0, stop, BLOCK_M, num_stages=STAGES):
            i = block + tl.arange(0, BLOCK_M)
            inside = i < num_queries
            column = tl.load(columns + tile * num_queries + i, mask=inside, other=0)
            q_rows = _pointers(Q + row * q_batch + head * q_head, column, q_row, BLOCK_D)
            o_rows = _pointers(OUT + row * o_batch + head * o_head, column, o_row, BLOCK_D)
            do_rows = _pointers(DO + row * do_batch + head * do_head, column, do_row, BLOCK_D)
            q = _load(q_rows, inside, HEAD_DIM, BLOCK_D, False)
            o = _load(o_rows, inside, HEAD_DIM, BLOCK_D, False)
            do = _load(do_rows, inside, HEAD_DIM, BLOCK_D, False)
            lse_rows = LSE + row * lse_batch + head * lse_head + column * lse_row
            lse = tl.load(lse_rows, mask=inside, other=0.0) * _LOG2_E
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            joined = _pairs(i[None, :], j[:, None], num_queries, num_keys, MASK)
            dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, joined, scale * _LOG2_E, True, PRECISION)
    stored = valid[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    grads = _pointers(GRAD, at, grad_row, BLOCK_D)
    tl.atomic_add(grads, dk * scale, mask=stored)
    tl.atomic_add(grads + HEAD_DIM, dv, mask=stored)


def triton_attend_to_past(output, lse, query, keys, values, past: Sequence, num_heads: int, scale: float) -> None:
    """See `attend_to_past`; keys and values are rows, `[rows, D]`."""
    _run_queries(None, None, output, lse, query, keys, values, past, num_heads, scale)


def triton_add_query_gradients(
    grad, grad_output, output, lse, query, keys, values, past: Sequence, num_heads: int, scale: float
) -> None:
    """Add to the gradient of `query`, given the output and log-sum-exp of the whole softmax."""
    _run_queries(grad, grad_output, output, lse, query, keys, values, past, num_heads, scale)


def triton_add_stored_gradients(
    grad_stored, grad_output, output, lse, query, keys, values, past: Sequence, num_heads: int, scale: float
) -> None:
    """Add to the gradients of keys and values, `[rows, 2 D]` in float32, likewise."""
    blocks = _blocks(query, "keys")
    tensors = query, keys, values, output, lse, grad_output, grad_stored
    strides = [*_strides(query, output, grad_output), *lse.stride(), *_row_strides(keys, values, grad_stored)]
    constants = dict(BLOCK_M=blocks.met, BLOCK_N=blocks.own)
    _launch_tiles(_past_key_kernel, tensors, past, num_heads, scale, strides, constants, blocks)


def _run_queries(grad, grad_output, output, lse, query, keys, values, past, num_heads, scale) -> None:
    is_gradient = grad is not None
    if not is_gradient:
        grad, grad_output = output, output  # not looked at
    blocks = _blocks(query, "queries" if is_gradient else "forward")
    tensors = query, keys, values, output, lse, grad_output, grad
    strides = [*_strides(query, output, grad_output, grad), *lse.stride(), *_row_strides(keys, values)]
    constants = dict(GRADIENT=is_gradient, BLOCK_M=blocks.own, BLOCK_N=blocks.met)
    _launch_tiles(_past_query_kernel, tensors, past, num_heads, scale, strides, constants, blocks)


def _launch_tiles(kernel, tensors, past, num_heads, scale, strides, constants: dict, blocks: Blocks) -> None:
    """One after the other: tiles have queries and keys in common."""
    query, group = tensors[0], tensors[0].shape[1] // num_heads
    constants = constants | dict(GROUP=group, **_row_constants(query, blocks))
    for tile in past:
        (rows,) = tile.stored
        batch, tiles, num_keys = rows.shape
        num_queries = tile.columns.shape[1]
        # A program of keys goes through all heads of their group
        own, heads = (num_keys, tiles) if kernel is _past_key_kernel else (num_queries, tiles * group)
        _launch(
            kernel,
            (-(-own // blocks.own), heads, batch),
            (*tensors, tile.heads, tile.columns, rows),
            (num_queries, num_keys, scale),
            strides,
            constants | dict(MASK=tile.mask),
            blocks,
        )


def _row_strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(0) for x in tensors]
