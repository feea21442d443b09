"""Dilated attention on a GPU: Triton kernels, forward and backward, that read the kept rows where they lie.

Shapes and symbols as in dilated_operator.py. A program carries a block of queries through keys with an online softmax.
Several launches make a forward pass:

1. *dense*: adjacent queries, which go through every branch with r = 1, every window, whose queries are always
   adjacent, and the sink. It always comes first and writes every row, zeros and -inf if no such branch joins it.
2. *dilated*, one launch for every segment branch with r > 1: the queries that one phase keeps of one segment. They go
   on where the launch before has left them: with its output and log-sum-exp, which are a softmax so far.

The gradient of the queries is a second traversal of this kind, in which only the step differs. The gradients of keys
and values take a block of keys through its queries: adjacent keys first, then the kept keys of a branch with r > 1 in
a launch each. Of one launch, no two programs write the same row, so results never depend on timing. Between launches
they have the dtype of the inputs: in 16 bits, a row that k dilated branches keep is rounded k + 1 times.

Inside a branch, the keys of a block of queries are numbered 0, 1, ..., and its rows join those from `lo` to `hi`. This
is all that the inner loops know of a pattern; blocks of keys that all rows join are done without a mask.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .dilated_pattern import DilatedPattern


# fmt: off
from .dilated_plan import (  # isort: skip
    BLOCK_NUMBER, ENTRY_OR_BRANCH, ENTRY_SIZE, FIRST_CHUNK, FIRST_PHASE, FIRST_QUERY, GRID_LENGTH, GRID_RATE,
    GRID_SHIFT, HEAD, KEY_COLUMN, LENGTH, NUM_CHUNKS, PROGRAM_RATE, PROGRAM_SIZE, PROGRAM_WINDOW, QUERY_COLUMN, ROW,
    SEGMENT_START, SINK_EXTENT, SINKS, TO_KEYS, TO_QUERIES, TO_STOP, TO_STOP_REST, WINDOW_LENGTH, Plan,
    count_sinks, find_tables,
)
# fmt: on
from .documents import Document
from .kernel_launch import (
    Arguments,
    Blocks,
    Launches,
    blocks_of,
    launch,
    padded,
    precision_of,
    row_constants,
    strides_of,
)


try:  # optional: of code from the Hub, Transformers requires whatever is imported outside of `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error


MAX_HEAD_DIM = 256

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_document(program):
    """Row of the batch, columns of position 0 among the keys and the queries, length, position of the first query."""
    row = tl.load(program + ROW).to(tl.int64)
    key_column = tl.load(program + KEY_COLUMN).to(tl.int64)
    query_column = tl.load(program + QUERY_COLUMN).to(tl.int64)
    return row, key_column, query_column, tl.load(program + LENGTH), tl.load(program + FIRST_QUERY)


@triton.jit
def _kept(program, phase, BEGIN: tl.constexpr):
    """The positions that a phase keeps of a dilated program's segment: the first of them, and how many.

    An integer division takes some 25 instructions. Hence quotient and rest of the distances from the segment's start
    to its stop, and to where to begin (the field BEGIN), stand in the record.
    """
    start, r = tl.load(program + SEGMENT_START) + phase, tl.load(program + PROGRAM_RATE)
    skipped = tl.maximum(0, tl.load(program + BEGIN) + tl.where(tl.load(program + BEGIN + 1) > phase, 1, 0))
    count = tl.load(program + TO_STOP) + tl.where(tl.load(program + TO_STOP_REST) > phase, 1, 0)
    return start + skipped * r, tl.maximum(0, count - skipped)


@triton.jit
def _joined(
    position, entry, edge, length, start, step,
    IS_CAUSAL: tl.constexpr, ARE_QUERIES: tl.constexpr, UNIT: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Which of the rows at `start`, `start + step`, ... a position joins in a dense branch: the first and the last.

    `edge` is where the segment of the block's first position begins. Unless SHORT, segments are longer than blocks, so
    that there is one more in the block at most. UNIT says that every step is 1.
    """
    w, g = tl.load(entry + GRID_LENGTH), tl.load(entry + GRID_SHIFT)
    window = tl.load(entry + WINDOW_LENGTH)
    if SHORT:
        segment = (position + g) // w * w - g
    else:
        segment = tl.where(position >= edge + w, edge + w, edge)
    first = tl.where(window > 0, position - window + 1, segment)
    last = tl.where(window > 0, position + window - 1, segment + w - 1)
    if IS_CAUSAL and ARE_QUERIES:
        last = position
    if IS_CAUSAL and not ARE_QUERIES:
        first = position
    first, last = tl.maximum(first - start, 0), tl.minimum(last, length - 1) - start
    if not UNIT:
        first, last = tl.cdiv(first, step), (last + step) // step - 1
    return first, last


@triton.jit
def _joined_by_sink(
    n, m, sinks, first_query, heads, entries,
    IS_CAUSAL: tl.constexpr, NUM_BRANCHES: tl.constexpr,
):  # fmt: skip
    """Which queries `n`, from `first_query` on, the sink joins to keys `m`: those that no other branch does."""
    joined = (m < sinks) & (n >= 0)
    if IS_CAUSAL:
        joined &= m <= n
    if first_query < tl.load(heads + SINK_EXTENT):
        for branch in tl.static_range(NUM_BRANCHES):
            entry, phase = entries + branch * ENTRY_SIZE, tl.load(heads + FIRST_PHASE + branch)
            w, r, g = tl.load(entry + GRID_LENGTH), tl.load(entry + GRID_RATE), tl.load(entry + GRID_SHIFT)
            window = tl.load(entry + WINDOW_LENGTH)
            is_kept = ((m + g) % w % r == phase) & ((window > 0) | ((n + g) % w % r == phase))
            in_window, in_segment = (n - m < window) & (m - n < window), (n + g) // w == (m + g) // w
            joined &= (phase < 0) | ~(is_kept & tl.where(window > 0, in_window, in_segment))
    return joined


@triton.jit
def _cut(first, all_first, all_stop, stop, BLOCK: tl.constexpr):
    """Blocks from `first` to `stop`: how many begin before `all_first`, lie inside `all_stop`, and follow."""
    total = tl.cdiv(tl.maximum(0, stop - first), BLOCK)
    before = tl.minimum(total, tl.cdiv(tl.maximum(0, all_first - first), BLOCK))
    inside = tl.minimum(total - before, tl.maximum(0, all_stop - first - before * BLOCK) // BLOCK)
    return before, inside, total - before - inside


@triton.jit
def _pointers(base, index, step, BLOCK_D: tl.constexpr):
    """Pointers to rows of numbers."""
    return base + index.to(tl.int64)[:, None] * step + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _wide(x, WIDE: tl.constexpr):
    return x.to(tl.int64) if WIDE else x


@triton.jit
def _offsets(step, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a block of rows from its first number: 32 bits wide if they can be, to spare registers."""
    row = _wide(tl.arange(0, BLOCK), WIDE)
    return row[:, None] * step + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(pointers, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALL_VALID: tl.constexpr):
    """Rows of HEAD_DIM numbers, padded with zeros to BLOCK_D; zeros where not `valid`."""
    inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if not ALL_VALID:
        rows = tl.load(pointers, mask=valid[:, None] & inside, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        rows = tl.load(pointers, mask=inside, other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def _store(pointers, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    tl.store(pointers, rows.to(pointers.dtype.element_ty), mask=valid[:, None] & inside)


@triton.jit
def _softmax_step(acc, total, top, scores, v, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """A step of the online softmax (of base 2): output, sum and maximum so far go on over further values."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    pivot = new_top
    if MASKED:  # a row may not have met any key yet
        pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - pivot[:, None])
    decay = tl.exp2(top - pivot)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _query_step(
    acc, total, top, q, do, lse, delta, k, v, joined, scale,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries meets a block of keys: a step of the online softmax, or of the gradient of the queries."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if GRADIENT:
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            weights = tl.where(joined, weights, 0.0)
        grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    else:
        if MASKED:
            scores = tl.where(joined, scores, -float("inf"))
        acc, total, top = _softmax_step(acc, total, top, scores, v, scale, MASKED, PRECISION)
    return acc, total, top


@triton.jit
def _meet_keys(
    acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, num_keys,
    lo, hi, first, before, inside, after, scale,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of queries through the blocks of keys that all of its rows join, or with MASKED through those
    before and after these."""
    key_offsets = _offsets(key_step, BLOCK_N, BLOCK_D, WIDE)
    value_offsets = _offsets(value_step, BLOCK_N, BLOCK_D, WIDE)
    if not MASKED:
        begin = (first + before * BLOCK_N).to(tl.int64)
        keys += begin * key_step
        values += begin * value_step
    for number in tl.range(before + after if MASKED else inside, num_stages=2 if MASKED else STAGES):
        if MASKED:
            block = first + (number + tl.where(number < before, 0, inside)) * BLOCK_N
            j, at = block + tl.arange(0, BLOCK_N), block.to(tl.int64)
            k = _load(keys + at * key_step + key_offsets, j < num_keys, HEAD_DIM, BLOCK_D, False)
            v = _load(values + at * value_step + value_offsets, j < num_keys, HEAD_DIM, BLOCK_D, False)
            joined = (j[None, :] >= lo[:, None]) & (j[None, :] <= hi[:, None])
        else:
            k = _load(keys + key_offsets, None, HEAD_DIM, BLOCK_D, True)
            v = _load(values + value_offsets, None, HEAD_DIM, BLOCK_D, True)
            joined = lo  # not looked at
        acc, total, top = _query_step(
            acc, total, top, q, do, lse, delta, k, v, joined, scale, MASKED, GRADIENT, PRECISION
        )
        if not MASKED:
            keys += BLOCK_N * key_step
            values += BLOCK_N * value_step
    return acc, total, top


@triton.jit(do_not_specialize=["num_queries", "num_heads"])
def _query_kernel(
    Q, K, V, OUT, LSE_OR_STATS, DO, entries, heads, programs, num_queries, num_heads, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, do_batch, do_head, do_row,
    DILATED: tl.constexpr, GRADIENT: tl.constexpr, IS_CAUSAL: tl.constexpr, SINK_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, NUM_DENSE: tl.constexpr, NUM_BRANCHES: tl.constexpr, UNIT: tl.constexpr, SHORT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: its output and log-sum-exp, or with GRADIENT its gradient. First without
    DILATED, for all dense branches and the sink; then with DILATED, which goes on with one branch."""
    program = programs + tl.program_id(0).to(tl.int64) * PROGRAM_SIZE
    heads += tl.program_id(1) // GROUP * (FIRST_PHASE + NUM_BRANCHES)
    phases = heads + FIRST_PHASE
    kv_head = tl.load(heads + HEAD).to(tl.int64)
    head = kv_head * GROUP + tl.program_id(1) % GROUP
    row, key_column, query_column, length, first_query = _load_document(program)
    first_row, index = tl.load(program + BLOCK_NUMBER) * BLOCK_M, tl.load(program + ENTRY_OR_BRANCH)

    # The block's queries: rows i of those at `start`, `start + step`, ...
    if DILATED:
        phase, step = tl.load(phases + index), tl.load(program + PROGRAM_RATE)
        start, rows = _kept(program, phase, TO_QUERIES)
        rows = tl.where(phase < 0, 0, rows)
    else:
        step = 1
        start, rows = first_query, length - first_query
    if first_row >= rows:
        return
    last_row = tl.minimum(first_row + BLOCK_M, rows) - 1
    i = first_row + tl.arange(0, BLOCK_M)
    valid = i < rows
    position = start + tl.minimum(i, last_row) * step

    q_base = Q + row * q_batch + head * q_head + query_column * q_row
    o_base = OUT + row * o_batch + head * o_head + query_column * o_row
    q = _load(_pointers(q_base, position, q_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    index_of_row = (row * num_heads + head) * num_queries + query_column + position
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    do, lse, delta = q, total, total
    if DILATED:
        acc = _load(_pointers(o_base, position, o_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False).to(tl.float32)
        if GRADIENT:
            acc *= 1.0 / scale
        else:  # an output is a mean of values, whose weights sum up to exp(lse): like one value of that weight
            top = tl.load(LSE_OR_STATS + index_of_row, mask=valid, other=-float("inf")) * _LOG2_E
            total = tl.where(top > -float("inf"), 1.0, 0.0)
    if GRADIENT:
        do_base = DO + row * do_batch + head * do_head + query_column * do_row
        do = _load(_pointers(do_base, position, do_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
        lse = tl.load(LSE_OR_STATS + index_of_row * 2, mask=valid, other=0.0)
        delta = tl.load(LSE_OR_STATS + index_of_row * 2 + 1, mask=valid, other=0.0)

    k_base = K + row * k_batch + kv_head * k_head + key_column * k_row
    v_base = V + row * v_batch + kv_head * v_head + key_column * v_row
    for branch in range(1 if DILATED else NUM_DENSE):
        entry = entries + (index + branch) * ENTRY_SIZE
        if DILATED:
            r = step
            key_start, num_keys = _kept(program, phase, TO_KEYS)
            skipped = num_keys - rows  # the queries are the last of the segment
            first, all_first, all_stop, stop = 0, 0, num_keys, num_keys
            if IS_CAUSAL:
                all_stop, stop = skipped + first_row + 1, skipped + last_row + 1
        else:
            key_start, r = tl.load(phases + branch), tl.load(entry + GRID_RATE)
            num_keys = length
            if not UNIT:
                num_keys = tl.cdiv(tl.maximum(length - key_start, 0), r)
            w, g = tl.load(entry + GRID_LENGTH), tl.load(entry + GRID_SHIFT)
            edge = (start + first_row + g) // w * w - g
            first, all_stop = _joined(
                start + first_row, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT
            )
            all_first, stop = _joined(
                start + last_row, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT
            )
            all_stop += 1
            stop = tl.where(key_start < 0, first, stop + 1)  # the head may not have the branch
        before, inside, after = _cut(first, all_first, all_stop, stop, BLOCK_N)
        keys, values = k_base + key_start.to(tl.int64) * k_row, v_base + key_start.to(tl.int64) * v_row
        key_step, value_step = _wide(r, WIDE) * k_row, _wide(r, WIDE) * v_row
        acc, total, top = _meet_keys(
            acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, num_keys,
            i, i, first, before, inside, after, scale * _LOG2_E,
            False, GRADIENT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, STAGES, WIDE,
        )  # fmt: skip
        # Only here, to spare registers in the loop above
        if DILATED:
            lo, hi = i * 0, i * 0 + num_keys - 1
            if IS_CAUSAL:
                hi = skipped + tl.minimum(i, last_row)
        else:
            lo, hi = _joined(position, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT)
        acc, total, top = _meet_keys(
            acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, num_keys,
            lo, hi, first, before, inside, after, scale * _LOG2_E,
            True, GRADIENT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, STAGES, WIDE,
        )  # fmt: skip

    if SINK_BLOCK > 0 and not DILATED:
        sinks = tl.minimum(tl.load(heads + SINKS), length)
        for block in tl.range(0, sinks, SINK_BLOCK, num_stages=1):  # mostly one, for which no buffers are worth while
            j = block + tl.arange(0, SINK_BLOCK)
            k = _load(_pointers(k_base, j, k_row, BLOCK_D), j < sinks, HEAD_DIM, BLOCK_D, False)
            v = _load(_pointers(v_base, j, v_row, BLOCK_D), j < sinks, HEAD_DIM, BLOCK_D, False)
            joined = _joined_by_sink(
                position[:, None], j[None, :], sinks, start + first_row, heads, entries + index * ENTRY_SIZE,
                IS_CAUSAL, NUM_BRANCHES,
            )  # fmt: skip
            acc, total, top = _query_step(
                acc, total, top, q, do, lse, delta, k, v, joined, scale * _LOG2_E, True, GRADIENT, PRECISION
            )

    if GRADIENT:
        acc *= scale
    else:
        acc *= tl.where(total > 0, 1.0 / total, 0.0)[:, None]
        tl.store(LSE_OR_STATS + index_of_row, (top + tl.log2(total)) / _LOG2_E, mask=valid)
    _store(_pointers(o_base, position, o_row, BLOCK_D), acc, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_step(
    dk, dv, k, v, q, do, lse, delta, joined, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of keys meets a block of queries."""
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
    if MASKED:
        weights = tl.where(joined, weights, 0.0)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _meet_queries(
    dk, dv, k, v, queries, grads, stats, query_step, grad_step, stats_step, num_queries,
    lo, hi, first, before, inside, after, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys through the blocks of queries that all join it, or with MASKED through those before and
    after these."""
    query_offsets = _offsets(query_step, BLOCK_M, BLOCK_D, WIDE)
    grad_offsets = _offsets(grad_step, BLOCK_M, BLOCK_D, WIDE)
    # Both statistics in one load: if it had fewer numbers than there are threads, every thread would load all of them
    stats_offsets = _offsets(stats_step, BLOCK_M, 2, WIDE)
    if not MASKED:
        begin = (first + before * BLOCK_M).to(tl.int64)
        queries += begin * query_step
        grads += begin * grad_step
        stats += begin * stats_step
    for number in tl.range(before + after if MASKED else inside, num_stages=2 if MASKED else STAGES):
        if MASKED:
            block = first + (number + tl.where(number < before, 0, inside)) * BLOCK_M
            i, at = block + tl.arange(0, BLOCK_M), block.to(tl.int64)
            valid = i < num_queries
            q = _load(queries + at * query_step + query_offsets, valid, HEAD_DIM, BLOCK_D, False)
            do = _load(grads + at * grad_step + grad_offsets, valid, HEAD_DIM, BLOCK_D, False)
            stats_of_block = tl.load(stats + at * stats_step + stats_offsets, mask=valid[:, None], other=0.0)
            joined = (i[None, :] >= lo[:, None]) & (i[None, :] <= hi[:, None])
        else:
            q = _load(queries + query_offsets, None, HEAD_DIM, BLOCK_D, True)
            do = _load(grads + grad_offsets, None, HEAD_DIM, BLOCK_D, True)
            stats_of_block = tl.load(stats + stats_offsets)
            joined = lo  # not looked at
        lse, delta = tl.split(stats_of_block)
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, joined, scale, MASKED, PRECISION)
        if not MASKED:
            queries += BLOCK_M * query_step
            grads += BLOCK_M * grad_step
            stats += BLOCK_M * stats_step
    return dk, dv


@triton.jit
def _joined_by_kept(j, start, step, window, skipped, first_query, num_queries, IS_CAUSAL: tl.constexpr):
    """Which queries the j-th kept key of a segment (the queries are kept ones, too), or of a window joins: the first
    and the last."""
    position = start + j * step - first_query
    first = tl.where(window > 0, position - window + 1, 0)
    if IS_CAUSAL:
        first = tl.where(window > 0, position, j - skipped)
    last = tl.where(window > 0, position + window, num_queries) - 1
    return tl.maximum(first, 0), tl.minimum(last, num_queries - 1)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "sink_rows"])
def _key_kernel(
    Q, K, V, DO, STATS, DK, DV, SINK_GRADS,
    entries, heads, programs, num_queries, num_heads, sink_rows, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    DILATED: tl.constexpr, IS_CAUSAL: tl.constexpr, SINK_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    NUM_DENSE: tl.constexpr, NUM_BRANCHES: tl.constexpr, UNIT: tl.constexpr, SHORT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key/value head: its gradients and those of its values. First without DILATED, for all
    dense branches and the parts of the sink; then with DILATED, which goes on with one branch."""
    program = programs + tl.program_id(0).to(tl.int64) * PROGRAM_SIZE
    heads += tl.program_id(1) * (FIRST_PHASE + NUM_BRANCHES)
    phases = heads + FIRST_PHASE
    kv_head = tl.load(heads + HEAD).to(tl.int64)
    row, key_column, query_column, length, first_query = _load_document(program)
    first_row, index = tl.load(program + BLOCK_NUMBER) * BLOCK_N, tl.load(program + ENTRY_OR_BRANCH)

    # The block's keys: rows j of those at `start`, `start + step`, ...
    if DILATED:
        phase, step = tl.load(phases + index), tl.load(program + PROGRAM_RATE)
        start, rows = _kept(program, phase, TO_KEYS)
        rows = tl.where(phase < 0, 0, rows)
    else:
        step = 1
        start, rows = 0, length
    if first_row >= rows:
        return
    last_row = tl.minimum(first_row + BLOCK_N, rows) - 1
    j = first_row + tl.arange(0, BLOCK_N)
    valid = j < rows
    position = start + tl.minimum(j, last_row) * step

    k_base = K + row * k_batch + kv_head * k_head + key_column * k_row
    v_base = V + row * v_batch + kv_head * v_head + key_column * v_row
    k = _load(_pointers(k_base, position, k_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    v = _load(_pointers(v_base, position, v_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    dk_rows = _pointers(DK + row * dk_batch + kv_head * dk_head + key_column * dk_row, position, dk_row, BLOCK_D)
    dv_rows = _pointers(DV + row * dv_batch + kv_head * dv_head + key_column * dv_row, position, dv_row, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if DILATED:
        dk = _load(dk_rows, valid, HEAD_DIM, BLOCK_D, False).to(tl.float32) * (1.0 / scale)
        dv = _load(dv_rows, valid, HEAD_DIM, BLOCK_D, False).to(tl.float32)
    for head_of_group in range(GROUP):
        head = kv_head * GROUP + head_of_group
        q_base = Q + row * q_batch + head * q_head + query_column * q_row
        do_base = DO + row * do_batch + head * do_head + query_column * do_row
        stats_base = STATS + ((row * num_heads + head) * num_queries + query_column) * 2
        for branch in range(1 if DILATED else NUM_DENSE):
            if DILATED:
                window = tl.load(program + PROGRAM_WINDOW)
                # The queries of a window are all, those of a segment its kept ones, the last of which are given
                query_start, query_rows = _kept(program, phase, TO_QUERIES)
                query_start = tl.where(window > 0, first_query, query_start)
                query_rows = tl.where(window > 0, length - first_query, query_rows)
                query_step = tl.where(window > 0, 1, step)
                skipped = rows - query_rows
                first, all_stop = _joined_by_kept(
                    first_row, start, step, window, skipped, first_query, query_rows, IS_CAUSAL
                )
                all_first, stop = _joined_by_kept(
                    last_row, start, step, window, skipped, first_query, query_rows, IS_CAUSAL
                )
            else:
                entry = entries + (index + branch) * ENTRY_SIZE
                w, g = tl.load(entry + GRID_LENGTH), tl.load(entry + GRID_SHIFT)
                edge = (first_row + g) // w * w - g
                query_start, query_step, query_rows = first_query, 1, length - first_query
                first, all_stop = _joined(
                    first_row, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT
                )
                all_first, stop = _joined(last_row, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT)
            stop = tl.minimum(stop + 1, query_rows)
            if not DILATED:
                stop = tl.where(tl.load(phases + branch) < 0, first, stop)
            before, inside, after = _cut(first, all_first, all_stop + 1, stop, BLOCK_M)
            queries = q_base + query_start.to(tl.int64) * q_row
            grads = do_base + query_start.to(tl.int64) * do_row
            stats = stats_base + query_start.to(tl.int64) * 2
            q_step, do_step, stats_step = q_row, do_row, 2
            if DILATED:
                query_step = _wide(query_step, WIDE)
                q_step, do_step, stats_step = query_step * q_row, query_step * do_row, query_step * 2
            dk, dv = _meet_queries(
                dk, dv, k, v, queries, grads, stats, q_step, do_step, stats_step, query_rows,
                j, j, first, before, inside, after, scale * _LOG2_E,
                False, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, STAGES, WIDE,
            )  # fmt: skip
            if DILATED:
                lo, hi = _joined_by_kept(j, start, step, window, skipped, first_query, query_rows, IS_CAUSAL)
            else:
                lo, hi = _joined(position, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT)
            dk, dv = _meet_queries(
                dk, dv, k, v, queries, grads, stats, q_step, do_step, stats_step, query_rows,
                lo, hi, first, before, inside, after, scale * _LOG2_E,
                True, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, STAGES, WIDE,
            )  # fmt: skip

    dk *= scale
    if SINK_BLOCK > 0 and not DILATED:
        sinks = tl.minimum(tl.load(heads + SINKS), length)
        if first_row < sinks:
            first_part = tl.load(program + FIRST_CHUNK).to(tl.int64)
            for number in range(0, tl.load(program + NUM_CHUNKS)):
                part = ((first_part + number) * tl.num_programs(1) + tl.program_id(1)) * sink_rows
                grads = _pointers(SINK_GRADS, part + j, 2 * HEAD_DIM, BLOCK_D)
                dk += _load(grads, j < sinks, HEAD_DIM, BLOCK_D, False)
                dv += _load(grads + HEAD_DIM, j < sinks, HEAD_DIM, BLOCK_D, False)
    _store(dk_rows, dk, valid, HEAD_DIM, BLOCK_D)
    _store(dv_rows, dv, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "sink_rows", "chunk"])
def _sink_kernel(
    Q, K, V, DO, STATS, SINK_GRADS, programs, entries, heads, num_queries, num_heads, sink_rows, chunk, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr, NUM_BRANCHES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some queries of a document meet all keys of the sink: their part of the gradients of these and of their values,
    into SINK_GRADS. The dense programs of the sink's keys add up the parts."""
    program = programs + tl.program_id(0).to(tl.int64) * PROGRAM_SIZE
    heads += tl.program_id(1) * (FIRST_PHASE + NUM_BRANCHES)
    kv_head = tl.load(heads + HEAD).to(tl.int64)
    row, key_column, query_column, length, first_query = _load_document(program)
    entries += tl.load(program + ENTRY_OR_BRANCH) * ENTRY_SIZE
    begin = first_query + tl.load(program + BLOCK_NUMBER) * chunk
    stop = tl.minimum(begin + chunk, length)
    sinks = tl.minimum(tl.load(heads + SINKS), length)
    k_base = K + row * k_batch + kv_head * k_head + key_column * k_row
    v_base = V + row * v_batch + kv_head * v_head + key_column * v_row
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * sink_rows
    for first in range(0, sinks, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        k = _load(_pointers(k_base, j, k_row, BLOCK_D), j < sinks, HEAD_DIM, BLOCK_D, False)
        v = _load(_pointers(v_base, j, v_row, BLOCK_D), j < sinks, HEAD_DIM, BLOCK_D, False)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for head_of_group in range(GROUP):
            head = kv_head * GROUP + head_of_group
            q_base = Q + row * q_batch + head * q_head + query_column * q_row
            do_base = DO + row * do_batch + head * do_head + query_column * do_row
            stats_base = STATS + ((row * num_heads + head) * num_queries + query_column) * 2
            for block in tl.range(begin, stop, BLOCK_M, num_stages=STAGES):
                n = block + tl.arange(0, BLOCK_M)
                q = _load(_pointers(q_base, n, q_row, BLOCK_D), n < stop, HEAD_DIM, BLOCK_D, False)
                do = _load(_pointers(do_base, n, do_row, BLOCK_D), n < stop, HEAD_DIM, BLOCK_D, False)
                stats = stats_base + n.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
                lse, delta = tl.split(tl.load(stats, mask=(n < stop)[:, None], other=0.0))
                joined = _joined_by_sink(n[None, :], j[:, None], sinks, block, heads, entries, IS_CAUSAL, NUM_BRANCHES)
                joined &= (n < stop)[None, :]
                dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, joined, scale * _LOG2_E, True, PRECISION)
        grads = _pointers(SINK_GRADS, part + j, 2 * HEAD_DIM, BLOCK_D)
        _store(grads, dk * scale, j < sinks, HEAD_DIM, BLOCK_D)
        _store(grads + HEAD_DIM, dv, j < sinks, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries"])
def _stats_kernel(
    O, LSE, DO, STATS, num_queries, o_batch, o_head, o_row, do_batch, do_head, do_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the backward pass needs to know of a query: log-sum-exp (base 2) and the mean of its weights' gradients,
    which is the product of the output and its gradient."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = n < num_queries
    o_base, do_base = O + row * o_batch + head * o_head, DO + row * do_batch + head * do_head
    o = _load(_pointers(o_base, n, o_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    do = _load(_pointers(do_base, n, do_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    mean = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    index = (row * tl.num_programs(1) + head) * num_queries + n
    lse = tl.load(LSE + index, mask=valid, other=0.0)
    tl.store(STATS + index * 2, lse * _LOG2_E, mask=valid)
    tl.store(STATS + index * 2 + 1, mean, mask=valid)


# Attention to stored keys, of other processes. Kernels read queries and keys where they lie: a launch does what a tile
# asks for, for all of its heads, and continues what is there, outputs and log-sum-exps or gradients. In PyTorch's
# operators the same takes some twenty launches, most of them copies. Under windows with r > 1 several programs of a
# launch add to the gradient of one key, in an order that may change.


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


class Attention(NamedTuple):
    """What the operator asks the kernels for: `query` `[B, H, Nq, D]`, `key` and `value` `[B, Hkv, N, D]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: DilatedPattern
    documents: tuple[Document, ...]
    is_causal: bool
    scale: float


def triton_forward(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, with the strides of the query, and log-sum-exp `[B, H, Nq]`. Outside of all documents it is 0."""
    query = attention.query
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if _has_padding(attention):
        output.zero_()
        lse.fill_(-float("inf"))
    _run_queries(attention, output, lse)
    return output, lse


def triton_backward(
    attention: Attention, grad_output: torch.Tensor, output: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, with their strides."""
    grads = [torch.empty_like(x) for x in attention[:3]]
    if _has_padding(attention):
        for grad in grads:
            grad.zero_()
    batch, heads, queries, head_dim = attention.query.shape
    lse, stats = lse.contiguous(), lse.new_empty((batch, heads, queries, 2))
    arguments = Arguments(
        (output, lse, grad_output, stats),
        (queries,),
        strides_of(output, grad_output),
        dict(HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK=64),
    )
    launch(_stats_kernel, (-(-queries // 64), heads, batch), arguments)
    _run_queries(attention, grads[0], stats, grad_output)
    _run_keys(attention, *grads[1:], stats, grad_output)
    return tuple(grads)


def _has_padding(attention: Attention) -> bool:
    batch, _, length, _ = attention.key.shape
    return sum(document.length for document in attention.documents) < batch * length


def _run_queries(
    attention: Attention, result: torch.Tensor, lse_or_stats: torch.Tensor, grad_output: torch.Tensor | None = None
) -> None:
    """Write the output and log-sum-exp of all queries; or their gradient, given `grad_output` and the statistics."""
    query, key, value, pattern, documents, is_causal, scale = attention
    is_gradient = grad_output is not None
    if not is_gradient:
        grad_output = query  # not looked at
    blocks = blocks_of(query, "queries" if is_gradient else "forward")
    plan, head_table = find_tables(pattern, key.shape[1], documents, blocks.own, True, is_causal, query.device)
    tensors = query, key, value, result, lse_or_stats, grad_output
    numbers = query.shape[2], query.shape[1], scale

    def prepare() -> list[Launches]:
        strides = strides_of(query, key, value, result, grad_output)
        constants = dict(GRADIENT=is_gradient, BLOCK_M=blocks.own, BLOCK_N=blocks.met)
        constants |= _constants(attention, plan, blocks, strides)
        arguments, group = Arguments(tensors, numbers, strides, constants), query.shape[1] // key.shape[1]
        return _launches_of(_query_kernel, len(head_table) * group, plan, head_table, arguments, blocks)

    for launches in _prepared(plan, attention, tensors, blocks, is_gradient, prepare):
        launches(tensors, numbers)


def _run_keys(
    attention: Attention, dk: torch.Tensor, dv: torch.Tensor, stats: torch.Tensor, grad_output: torch.Tensor
) -> None:
    """Write the gradients of all keys and values."""
    query, key, value, pattern, documents, is_causal, scale = attention
    blocks = blocks_of(query, "keys")
    plan, head_table = find_tables(pattern, key.shape[1], documents, blocks.own, False, is_causal, query.device)
    sink_grads = _run_sink(attention, plan, head_table, stats, grad_output)
    tensors = query, key, value, grad_output, stats, dk, dv, sink_grads
    numbers = query.shape[2], query.shape[1], plan.sink_rows, scale

    def prepare() -> list[Launches]:
        strides = strides_of(query, key, value, grad_output, dk, dv)
        constants = dict(BLOCK_M=blocks.met, BLOCK_N=blocks.own) | _constants(attention, plan, blocks, strides)
        arguments = Arguments(tensors, numbers, strides, constants)
        return _launches_of(_key_kernel, len(head_table), plan, head_table, arguments, blocks)

    for launches in _prepared(plan, attention, tensors, blocks, is_gradient=True, prepare=prepare):
        launches(tensors, numbers)


def _run_sink(
    attention: Attention, plan: Plan, head_table: torch.Tensor, stats: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor:
    """The gradients of the sink's keys and values, in parts: `[parts, Hkv, sink_rows, 2 D]`."""
    query, key, value = attention[:3]
    blocks, head_dim = blocks_of(query, "keys"), query.shape[3]
    parts, heads = plan.sinks.shape[0] // PROGRAM_SIZE.value, head_table.shape[0]
    sink_grads = stats.new_empty((parts, heads, plan.sink_rows, 2 * head_dim))
    if parts == 0:
        return sink_grads
    own = min(blocks.own, padded(plan.sink_rows))
    arguments = Arguments(
        (query, key, value, grad_output, stats, sink_grads, plan.sinks, plan.entries, head_table),
        (query.shape[2], query.shape[1], plan.sink_rows, plan.sink_chunk, attention.scale),
        strides_of(query, key, value, grad_output),
        dict(
            IS_CAUSAL=attention.is_causal,
            GROUP=query.shape[1] // key.shape[1],
            NUM_BRANCHES=plan.num_branches,
            BLOCK_M=blocks.met,
            BLOCK_N=own,
            **row_constants(query, blocks),
        ),
    )
    launch(_sink_kernel, (parts, heads, 1), arguments, blocks)
    return sink_grads


def _prepared(
    plan: Plan,
    attention: Attention,
    tensors: tuple[torch.Tensor, ...],
    blocks: Blocks,
    is_gradient: bool,
    prepare: Callable[[], list[Launches]],
) -> list[Launches]:
    """What `prepare` gives: made for the first call whose tensors lie so, and kept as long as the plan."""
    query = attention.query
    layout = query.dtype, query.shape, attention.key.shape[1:3], *(x.stride() for x in tensors)
    kind = attention.pattern, blocks, is_gradient, precision_of(query.dtype), layout
    launches = plan.launches.get(kind)
    if launches is None:
        launches = plan.launches[kind] = prepare()
    return launches


def _launches_of(
    kernel, heads: int, plan: Plan, head_table: torch.Tensor, arguments: Arguments, blocks: Blocks
) -> list[Launches]:
    """The dense programs of a plan, then those of one dilated branch after another, which go on with what is there."""
    tensors, numbers, strides, constants = arguments
    prepared = []
    for tables, is_dilated in (((plan.dense,), False), (plan.dilated, True)):
        launches = [
            ((len(programs) // PROGRAM_SIZE.value, heads, 1), (plan.entries, head_table, programs))
            for programs in tables
        ]
        of_kind = Arguments(tensors, numbers, strides, dict(DILATED=is_dilated) | constants)
        prepared.append(Launches(kernel, launches, of_kind, blocks))
    return prepared


class PastAttention(NamedTuple):
    """Attention of new tokens to stored keys, see `attend_to_past`: `query` and `output` `[B, H, L, D]`, `lse`
    `[B, H, L]`, and `keys` and `values` in rows, `[rows, D]`."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor
    tiles: Sequence  # of `PastTile`
    num_heads: int
    scale: float


def triton_attend_to_past(attention: PastAttention) -> None:
    """Continue output and log-sum-exp over the stored keys, in place."""
    _run_past_queries(attention)


def triton_add_query_gradients(attention: PastAttention, grad_output: torch.Tensor, grad: torch.Tensor) -> None:
    """Add to the gradient of the query, given the output and log-sum-exp of the whole softmax."""
    _run_past_queries(attention, grad_output, grad)


def triton_add_stored_gradients(
    attention: PastAttention, grad_output: torch.Tensor, grad_stored: torch.Tensor
) -> None:
    """Add to the gradients of keys and values, `[rows, 2 D]` in float32, likewise."""
    query, keys, values, output, lse = attention[:5]
    blocks = blocks_of(query, "keys")
    tensors = query, keys, values, output, lse, grad_output, grad_stored
    strides = [*strides_of(query, output, grad_output), *lse.stride(), *_row_strides(keys, values, grad_stored)]
    constants = dict(BLOCK_M=blocks.met, BLOCK_N=blocks.own)
    _launch_tiles(_past_key_kernel, attention, tensors, strides, constants, blocks)


def _run_past_queries(
    attention: PastAttention, grad_output: torch.Tensor | None = None, grad: torch.Tensor | None = None
) -> None:
    query, keys, values, output, lse = attention[:5]
    is_gradient = grad is not None
    if not is_gradient:
        grad, grad_output = output, output  # not looked at
    blocks = blocks_of(query, "queries" if is_gradient else "forward")
    tensors = query, keys, values, output, lse, grad_output, grad
    strides = [*strides_of(query, output, grad_output, grad), *lse.stride(), *_row_strides(keys, values)]
    constants = dict(GRADIENT=is_gradient, BLOCK_M=blocks.own, BLOCK_N=blocks.met)
    _launch_tiles(_past_query_kernel, attention, tensors, strides, constants, blocks)


def _launch_tiles(
    kernel, attention: PastAttention, tensors: tuple, strides: list[int], constants: dict, blocks: Blocks
) -> None:
    """One after the other: tiles have queries and keys in common."""
    query, group = attention.query, attention.query.shape[1] // attention.num_heads
    constants = constants | dict(GROUP=group, **row_constants(query, blocks))
    for tile in attention.tiles:
        (rows,) = tile.stored
        batch, tiles, num_keys = rows.shape
        num_queries = tile.columns.shape[1]
        # A program of keys goes through all heads of their group
        own, heads = (num_keys, tiles) if kernel is _past_key_kernel else (num_queries, tiles * group)
        arguments = Arguments(
            (*tensors, tile.heads, tile.columns, rows),
            (num_queries, num_keys, attention.scale),
            strides,
            constants | dict(MASK=tile.mask),
        )
        launch(kernel, (-(-own // blocks.own), heads, batch), arguments, blocks)


def _row_strides(*tensors: torch.Tensor) -> list[int]:
    return [x.stride(0) for x in tensors]


def _constants(attention: Attention, plan: Plan, blocks: Blocks, strides: list[int]) -> dict:
    """What the kernels are compiled for."""
    query, key, rate = attention.query, attention.key, max(attention.pattern.dilation_rates)
    sinks = count_sinks(attention.pattern)
    # A block of rows spans at most this, in numbers. Offsets behind the last row may wrap: nothing is read there
    block_span = min(256 * rate, max(query.shape[2], key.shape[2])) * max(strides[2::3])
    return dict(
        IS_CAUSAL=attention.is_causal,
        SINK_BLOCK=min(blocks.met, padded(sinks)) if sinks else 0,
        GROUP=query.shape[1] // key.shape[1],
        NUM_DENSE=plan.num_dense,
        NUM_BRANCHES=plan.num_branches,
        UNIT=plan.is_unit,
        SHORT=plan.is_short,
        WIDE=block_span >= 2**31,
        **row_constants(query, blocks),
    )
