"""Dilated attention on a GPU: Triton kernels, forward and backward, that read the kept rows where they lie.

Shapes and symbols as in dilated_operator.py. A program carries a block of queries through all of its keys with an
online softmax. Two launches make a forward pass:

1. *dilated*: the queries that one phase keeps of one segment, for the segment branches with r > 1. Their outputs and
   log-sum-exps are partial results, stored compactly.
2. *dense*: adjacent queries, which go through every other branch in turn (r = 1, and windows, whose queries are
   always adjacent), then through the partial results. Their output is final.

The gradient of the queries is a second traversal of this kind, in which only the step differs. The gradients of keys
and values take a block of keys through its queries: first the kept keys of the branches with r > 1, then adjacent
keys, which take up the partial sums. No program adds to what another one writes, so results never depend on timing.

Inside a branch, the keys of a block of queries are numbered 0, 1, ..., and its rows join those from `lo` to `hi`. This
is all that the inner loops know of a pattern; blocks of keys that all rows join are done without a mask.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from .dilated_pattern import Branch, DilatedPattern


try:  # optional: of code from the Hub, Transformers requires whatever is imported outside of `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error


MAX_HEAD_DIM = 256

_LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes of the records of a `_Plan`
_PROGRAM = tl.constexpr(20)
_ENTRY = tl.constexpr(6)
_MERGE = tl.constexpr(12)


@triton.jit
def _load_document(program):
    """Row of the batch, columns of position 0 among the keys and the queries, length, position of the first query."""
    key_column, query_column = tl.load(program + 1).to(tl.int64), tl.load(program + 2).to(tl.int64)
    return tl.load(program).to(tl.int64), key_column, query_column, tl.load(program + 3), tl.load(program + 4)


@triton.jit
def _kept(program, phase, FIRST: tl.constexpr):
    """The positions that a phase keeps of a dilated program's segment: the first of them, and how many.

    An integer division takes some 25 instructions. Hence quotient and rest of the distances from the segment's start
    to its stop, and to where to begin (fields FIRST), stand in the record.
    """
    start, r = tl.load(program + 8) + phase, tl.load(program + 7)
    skipped = tl.maximum(0, tl.load(program + FIRST) + tl.where(tl.load(program + FIRST + 1) > phase, 1, 0))
    count = tl.load(program + 11) + tl.where(tl.load(program + 12) > phase, 1, 0)
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
    w, g, reach = tl.load(entry), tl.load(entry + 2), tl.load(entry + 3)
    if SHORT:
        segment = (position + g) // w * w - g
    else:
        segment = tl.where(position >= edge + w, edge + w, edge)
    first = tl.where(reach > 0, position - reach + 1, segment)
    last = tl.where(reach > 0, position + reach - 1, segment + w - 1)
    if IS_CAUSAL and ARE_QUERIES:
        last = position
    if IS_CAUSAL and not ARE_QUERIES:
        first = position
    first, last = tl.maximum(first - start, 0), tl.minimum(last, length - 1) - start
    if not UNIT:
        first, last = tl.cdiv(first, step), (last + step) // step - 1
    return first, last


@triton.jit
def _number(offset, phase, r, distance, distance_rest, first, first_rest):
    """Of positions `offset` behind a block's first one: their numbers among those that a phase keeps of a segment, and
    whether they are kept. The others are the distances from the segment's start to the block's first position and to
    where numbers begin, as multiples of r and rests."""
    rest = distance_rest - phase
    number = distance - tl.where(rest < 0, 1, 0)
    rest += tl.where(rest < 0, r, 0) + offset
    more = ((rest.to(tl.float32) + 0.5) * (1.0 / r.to(tl.float32))).to(tl.int32)  # exact below 2 ** 21
    skipped = tl.maximum(0, first + tl.where(first_rest > phase, 1, 0))
    return number + more - skipped, (more * r == rest) & (number + more >= 0)


@triton.jit
def _partial_row(first_position, last_position, offset, merge, entry, phase, first, SHORT: tl.constexpr):
    """Where the partial results of the positions `first_position + offset` are stored, and whether there are any."""
    if SHORT:  # any number of segments in a block
        w, r, g = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        position = first_position + offset
        segment = (position + g) // w
        start = segment * w - g + phase
        number = (position - start) // r
        kept = (position >= start) & (number * r == position - start)
        row = tl.load(entry + 4) + segment * tl.load(entry + 5)
        row += number - tl.maximum(0, tl.cdiv(first - start, r))
    else:  # one or two
        edge, base, r = tl.load(merge), tl.load(merge + 1), tl.load(merge + 3)
        number, kept = _number(
            offset, phase, r, tl.load(merge + 4), tl.load(merge + 5), tl.load(merge + 6), tl.load(merge + 7)
        )
        row = base + number
        if last_position >= edge:
            number, kept_there = _number(
                offset, phase, r, tl.load(merge + 8), tl.load(merge + 9), tl.load(merge + 10), tl.load(merge + 11)
            )
            is_there = first_position + offset >= edge
            row = tl.where(is_there, base + tl.load(merge + 2) + number, row)
            kept = tl.where(is_there, kept_there, kept)
    return row, kept


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
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        pivot = new_top
        if MASKED:  # a row may not have met any key yet
            pivot = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - pivot[:, None])
        decay = tl.exp2(top - pivot)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _query_inside(
    acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, first, blocks, scale,
    GRADIENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of queries through blocks of keys that all of its rows join."""
    key_offsets = _offsets(key_step, BLOCK_N, BLOCK_D, WIDE)
    value_offsets = _offsets(value_step, BLOCK_N, BLOCK_D, WIDE)
    keys += first.to(tl.int64) * key_step
    values += first.to(tl.int64) * value_step
    for _ in tl.range(blocks, num_stages=STAGES):
        k = _load(keys + key_offsets, None, HEAD_DIM, BLOCK_D, True)
        v = _load(values + value_offsets, None, HEAD_DIM, BLOCK_D, True)
        acc, total, top = _query_step(
            acc, total, top, q, do, lse, delta, k, v, None, scale, False, GRADIENT, PRECISION
        )
        keys += BLOCK_N * key_step
        values += BLOCK_N * value_step
    return acc, total, top


@triton.jit
def _query_edges(
    acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, num_keys,
    lo, hi, first, before, inside, after, scale,
    GRADIENT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of queries through the blocks of keys before and after those that all of its rows join."""
    key_offsets = _offsets(key_step, BLOCK_N, BLOCK_D, WIDE)
    value_offsets = _offsets(value_step, BLOCK_N, BLOCK_D, WIDE)
    for block in tl.range(before + after, num_stages=2):
        block = first + (block + tl.where(block < before, 0, inside)) * BLOCK_N
        j, at = block + tl.arange(0, BLOCK_N), block.to(tl.int64)
        k = _load(keys + at * key_step + key_offsets, j < num_keys, HEAD_DIM, BLOCK_D, False)
        v = _load(values + at * value_step + value_offsets, j < num_keys, HEAD_DIM, BLOCK_D, False)
        joined = (j[None, :] >= lo[:, None]) & (j[None, :] <= hi[:, None])
        acc, total, top = _query_step(
            acc, total, top, q, do, lse, delta, k, v, joined, scale, True, GRADIENT, PRECISION
        )
    return acc, total, top


@triton.jit(do_not_specialize=["partial_rows", "num_queries"])
def _query_kernel(
    Q, K, V, OUT, LSE, DO, STATS, PARTIAL, PARTIAL_LSE,
    programs, entries, merges, phases, partial_rows, num_queries, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, do_batch, do_head, do_row,
    DILATED: tl.constexpr, GRADIENT: tl.constexpr, IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    NUM_DENSE: tl.constexpr, NUM_BRANCHES: tl.constexpr, UNIT: tl.constexpr, SHORT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: its output and log-sum-exp, or with GRADIENT its gradient. With DILATED those
    of one branch, into PARTIAL, else of all branches, into OUT."""
    program = programs + tl.program_id(0).to(tl.int64) * _PROGRAM
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    kv_head = head // GROUP
    phases += kv_head * NUM_BRANCHES
    row, key_column, query_column, length, first_query = _load_document(program)
    first_row, index = tl.load(program + 5) * BLOCK_M, tl.load(program + 6)

    # The block's queries: rows i of those at `start`, `start + step`, ...
    if DILATED:
        phase, step = tl.load(phases + index), tl.load(program + 7)
        start, rows = _kept(program, phase, 13)
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
    q = _load(_pointers(q_base, position, q_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
    index_of_row = (row * num_heads + head) * num_queries + query_column + position
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    do, lse, delta = q, total, total
    if GRADIENT:
        do_base = DO + row * do_batch + head * do_head + query_column * do_row
        do = _load(_pointers(do_base, position, do_row, BLOCK_D), valid, HEAD_DIM, BLOCK_D, False)
        lse = tl.load(STATS + index_of_row * 2, mask=valid, other=0.0)
        delta = tl.load(STATS + index_of_row * 2 + 1, mask=valid, other=0.0)

    k_base = K + row * k_batch + kv_head * k_head + key_column * k_row
    v_base = V + row * v_batch + kv_head * v_head + key_column * v_row
    for branch in range(1 if DILATED else NUM_DENSE):
        entry = entries + (index + branch) * _ENTRY
        if DILATED:
            r = step
            key_start, num_keys = _kept(program, phase, 15)
            skipped = num_keys - rows  # the queries are the last of the segment
            first, all_first, all_stop, stop = 0, 0, num_keys, num_keys
            if IS_CAUSAL:
                all_stop, stop = skipped + first_row + 1, skipped + last_row + 1
        else:
            key_start, r = tl.load(phases + branch), tl.load(entry + 1)
            num_keys = length
            if not UNIT:
                num_keys = tl.cdiv(tl.maximum(length - key_start, 0), r)
            w, g = tl.load(entry), tl.load(entry + 2)
            edge = (start + first_row + g) // w * w - g
            first, all_stop = _joined(
                start + first_row, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT
            )
            all_first, stop = _joined(
                start + last_row, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT
            )
            all_stop += 1
            stop += 1
        before, inside, after = _cut(first, all_first, all_stop, stop, BLOCK_N)
        keys, values = k_base + key_start.to(tl.int64) * k_row, v_base + key_start.to(tl.int64) * v_row
        key_step, value_step = _wide(r, WIDE) * k_row, _wide(r, WIDE) * v_row
        acc, total, top = _query_inside(
            acc, total, top, q, do, lse, delta, keys, values, key_step, value_step,
            first + before * BLOCK_N, inside, scale * _LOG2_E,
            GRADIENT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, STAGES, WIDE,
        )  # fmt: skip
        if DILATED:
            lo, hi = i * 0, i * 0 + num_keys - 1
            if IS_CAUSAL:
                hi = skipped + tl.minimum(i, last_row)
        else:
            lo, hi = _joined(position, entry, edge, length, key_start, r, IS_CAUSAL, True, UNIT, SHORT)
        acc, total, top = _query_edges(
            acc, total, top, q, do, lse, delta, keys, values, key_step, value_step, num_keys,
            lo, hi, first, before, inside, after, scale * _LOG2_E,
            GRADIENT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, WIDE,
        )  # fmt: skip

    if GRADIENT:
        acc *= scale
    PARTIAL += head * partial_rows * HEAD_DIM
    PARTIAL_LSE += head * partial_rows
    if DILATED:
        i += tl.load(program + 9)
        if not GRADIENT:
            acc *= (1.0 / total)[:, None]
            tl.store(PARTIAL_LSE + i, top + tl.log2(total), mask=valid)
        _store(_pointers(PARTIAL, i, HEAD_DIM, BLOCK_D), acc, valid, HEAD_DIM, BLOCK_D)
    else:
        merge = merges + (tl.program_id(0) * (NUM_BRANCHES - NUM_DENSE) - NUM_DENSE) * _MERGE
        if not GRADIENT:
            old_top = top
            for branch in tl.static_range(NUM_DENSE, NUM_BRANCHES):
                at, kept = _partial_row(
                    start + first_row, start + last_row, position - start - first_row, merge + branch * _MERGE,
                    entries + (index + branch) * _ENTRY, tl.load(phases + branch), first_query, SHORT,
                )  # fmt: skip
                top = tl.maximum(top, tl.load(PARTIAL_LSE + at, mask=valid & kept, other=-float("inf")))
            pivot = tl.where(top == -float("inf"), 0.0, top)
            decay = tl.exp2(old_top - pivot)
            acc *= decay[:, None]
            total *= decay
        for branch in tl.static_range(NUM_DENSE, NUM_BRANCHES):
            at, kept = _partial_row(
                start + first_row, start + last_row, position - start - first_row, merge + branch * _MERGE,
                entries + (index + branch) * _ENTRY, tl.load(phases + branch), first_query, SHORT,
            )  # fmt: skip
            part = _load(_pointers(PARTIAL, at, HEAD_DIM, BLOCK_D), valid & kept, HEAD_DIM, BLOCK_D, False)
            if GRADIENT:
                acc += part
            else:
                share = tl.exp2(tl.load(PARTIAL_LSE + at, mask=valid & kept, other=-float("inf")) - pivot)
                acc += part * share[:, None]
                total += share
        if not GRADIENT:
            acc *= tl.where(total > 0, 1.0 / total, 0.0)[:, None]
            tl.store(LSE + index_of_row, (top + tl.log2(total)) / _LOG2_E, mask=valid)
        o_base = OUT + row * o_batch + head * o_head + query_column * o_row
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
def _key_inside(
    dk, dv, k, v, queries, grads, stats, query_step, grad_step, stats_step, first, blocks, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys through blocks of queries that all join it."""
    query_offsets = _offsets(query_step, BLOCK_M, BLOCK_D, WIDE)
    grad_offsets = _offsets(grad_step, BLOCK_M, BLOCK_D, WIDE)
    # Both statistics in one load: if it had fewer numbers than there are threads, every thread would load all of them
    stats_offsets = _offsets(stats_step, BLOCK_M, 2, WIDE)
    queries += first.to(tl.int64) * query_step
    grads += first.to(tl.int64) * grad_step
    stats += first.to(tl.int64) * stats_step
    for _ in tl.range(blocks, num_stages=STAGES):
        q = _load(queries + query_offsets, None, HEAD_DIM, BLOCK_D, True)
        do = _load(grads + grad_offsets, None, HEAD_DIM, BLOCK_D, True)
        lse, delta = tl.split(tl.load(stats + stats_offsets))
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, None, scale, False, PRECISION)
        queries += BLOCK_M * query_step
        grads += BLOCK_M * grad_step
        stats += BLOCK_M * stats_step
    return dk, dv


@triton.jit
def _key_edges(
    dk, dv, k, v, queries, grads, stats, query_step, grad_step, stats_step, num_queries,
    lo, hi, first, before, inside, after, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys through the blocks of queries before and after those that all join it."""
    query_offsets = _offsets(query_step, BLOCK_M, BLOCK_D, WIDE)
    grad_offsets = _offsets(grad_step, BLOCK_M, BLOCK_D, WIDE)
    stats_offsets = _offsets(stats_step, BLOCK_M, 2, WIDE)
    for block in tl.range(before + after, num_stages=2):
        block = first + (block + tl.where(block < before, 0, inside)) * BLOCK_M
        i, at = block + tl.arange(0, BLOCK_M), block.to(tl.int64)
        valid = i < num_queries
        q = _load(queries + at * query_step + query_offsets, valid, HEAD_DIM, BLOCK_D, False)
        do = _load(grads + at * grad_step + grad_offsets, valid, HEAD_DIM, BLOCK_D, False)
        lse, delta = tl.split(tl.load(stats + at * stats_step + stats_offsets, mask=valid[:, None], other=0.0))
        joined = (i[None, :] >= lo[:, None]) & (i[None, :] <= hi[:, None])
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, joined, scale, True, PRECISION)
    return dk, dv


@triton.jit
def _joined_by_kept(j, start, step, reach, skipped, first_query, num_queries, IS_CAUSAL: tl.constexpr):
    """Which queries the j-th kept key of a segment (the queries are kept ones, too), or of a window joins: the first
    and the last."""
    position = start + j * step - first_query
    first = tl.where(reach > 0, position - reach + 1, 0)
    if IS_CAUSAL:
        first = tl.where(reach > 0, position, j - skipped)
    last = tl.where(reach > 0, position + reach, num_queries) - 1
    return tl.maximum(first, 0), tl.minimum(last, num_queries - 1)


@triton.jit(do_not_specialize=["partial_rows", "num_queries"])
def _key_kernel(
    Q, K, V, DO, STATS, DK, DV, PARTIAL_DK, PARTIAL_DV,
    programs, entries, merges, phases, partial_rows, num_queries, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    DILATED: tl.constexpr, IS_CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    NUM_DENSE: tl.constexpr, NUM_BRANCHES: tl.constexpr, UNIT: tl.constexpr, SHORT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of keys of one key/value head: its gradients and those of its values. With DILATED those of one branch,
    into PARTIAL_*, else of all branches, into DK and DV."""
    program = programs + tl.program_id(0).to(tl.int64) * _PROGRAM
    kv_head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1) * GROUP
    phases += kv_head * NUM_BRANCHES
    row, key_column, query_column, length, first_query = _load_document(program)
    first_row, index = tl.load(program + 5) * BLOCK_N, tl.load(program + 6)

    # The block's keys: rows j of those at `start`, `start + step`, ...
    if DILATED:
        phase, step = tl.load(phases + index), tl.load(program + 7)
        start, rows = _kept(program, phase, 15)
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
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head_of_group in range(GROUP):
        head = kv_head * GROUP + head_of_group
        q_base = Q + row * q_batch + head * q_head + query_column * q_row
        do_base = DO + row * do_batch + head * do_head + query_column * do_row
        stats_base = STATS + ((row * num_heads + head) * num_queries + query_column) * 2
        for branch in range(1 if DILATED else NUM_DENSE):
            if DILATED:
                reach = tl.load(program + 10)
                # The queries of a window are all, those of a segment its kept ones, the last of which are given
                query_start, query_rows = _kept(program, phase, 13)
                query_start = tl.where(reach > 0, first_query, query_start)
                query_rows = tl.where(reach > 0, length - first_query, query_rows)
                query_step = tl.where(reach > 0, 1, step)
                skipped = rows - query_rows
                first, all_stop = _joined_by_kept(
                    first_row, start, step, reach, skipped, first_query, query_rows, IS_CAUSAL
                )
                all_first, stop = _joined_by_kept(
                    last_row, start, step, reach, skipped, first_query, query_rows, IS_CAUSAL
                )
            else:
                entry = entries + (index + branch) * _ENTRY
                w, g = tl.load(entry), tl.load(entry + 2)
                edge = (first_row + g) // w * w - g
                query_start, query_step, query_rows = first_query, 1, length - first_query
                first, all_stop = _joined(
                    first_row, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT
                )
                all_first, stop = _joined(last_row, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT)
            stop = tl.minimum(stop + 1, query_rows)
            before, inside, after = _cut(first, all_first, all_stop + 1, stop, BLOCK_M)
            queries = q_base + query_start.to(tl.int64) * q_row
            grads = do_base + query_start.to(tl.int64) * do_row
            stats = stats_base + query_start.to(tl.int64) * 2
            q_step, do_step, stats_step = q_row, do_row, 2
            if DILATED:
                query_step = _wide(query_step, WIDE)
                q_step, do_step, stats_step = query_step * q_row, query_step * do_row, query_step * 2
            dk, dv = _key_inside(
                dk, dv, k, v, queries, grads, stats, q_step, do_step, stats_step,
                first + before * BLOCK_M, inside, scale * _LOG2_E,
                HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, STAGES, WIDE,
            )  # fmt: skip
            if DILATED:
                lo, hi = _joined_by_kept(j, start, step, reach, skipped, first_query, query_rows, IS_CAUSAL)
            else:
                lo, hi = _joined(position, entry, edge, length, query_start, 1, IS_CAUSAL, False, True, SHORT)
            dk, dv = _key_edges(
                dk, dv, k, v, queries, grads, stats, q_step, do_step, stats_step, query_rows,
                lo, hi, first, before, inside, after, scale * _LOG2_E,
                HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, WIDE,
            )  # fmt: skip

    dk *= scale
    PARTIAL_DK += kv_head * partial_rows * HEAD_DIM
    PARTIAL_DV += kv_head * partial_rows * HEAD_DIM
    if DILATED:
        j += tl.load(program + 9)
        _store(_pointers(PARTIAL_DK, j, HEAD_DIM, BLOCK_D), dk, valid, HEAD_DIM, BLOCK_D)
        _store(_pointers(PARTIAL_DV, j, HEAD_DIM, BLOCK_D), dv, valid, HEAD_DIM, BLOCK_D)
    else:
        merge = merges + (tl.program_id(0) * (NUM_BRANCHES - NUM_DENSE) - NUM_DENSE) * _MERGE
        for branch in tl.static_range(NUM_DENSE, NUM_BRANCHES):
            at, kept = _partial_row(
                first_row, last_row, position - first_row, merge + branch * _MERGE,
                entries + (index + branch) * _ENTRY, tl.load(phases + branch), 0, SHORT,
            )  # fmt: skip
            dk += _load(_pointers(PARTIAL_DK, at, HEAD_DIM, BLOCK_D), valid & kept, HEAD_DIM, BLOCK_D, False)
            dv += _load(_pointers(PARTIAL_DV, at, HEAD_DIM, BLOCK_D), valid & kept, HEAD_DIM, BLOCK_D, False)
        dk_base = DK + row * dk_batch + kv_head * dk_head + key_column * dk_row
        dv_base = DV + row * dv_batch + kv_head * dv_head + key_column * dv_row
        _store(_pointers(dk_base, position, dk_row, BLOCK_D), dk, valid, HEAD_DIM, BLOCK_D)
        _store(_pointers(dv_base, position, dv_row, BLOCK_D), dv, valid, HEAD_DIM, BLOCK_D)


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


class Blocks(NamedTuple):
    """Shape of a program: rows of its own block, rows of the blocks that it meets, and what the compiler is told."""

    own: int
    met: int
    warps: int
    stages: int
    registers: int | None = None


# By head size (padded to a power of 2) and kernel; measured on an H100
_HOPPER_BLOCKS = {
    64: dict(forward=Blocks(64, 64, 4, 3, 168), queries=Blocks(64, 64, 4, 3, 168), keys=Blocks(64, 64, 4, 3)),
    128: dict(forward=Blocks(64, 64, 4, 3), queries=Blocks(64, 64, 4, 2), keys=Blocks(64, 32, 4, 3)),
    256: dict(forward=Blocks(128, 64, 8, 2), queries=Blocks(64, 64, 8, 1), keys=Blocks(64, 64, 8, 1)),
}
# What 99 KiB of shared memory hold, as any GPU since Ampere has
_OTHER_BLOCKS = {
    64: dict(forward=Blocks(64, 64, 4, 2), queries=Blocks(64, 64, 4, 2), keys=Blocks(64, 64, 4, 2)),
    128: dict(forward=Blocks(64, 32, 4, 2), queries=Blocks(64, 32, 4, 2), keys=Blocks(64, 32, 4, 2)),
    256: dict(forward=Blocks(32, 32, 4, 2), queries=Blocks(32, 32, 8, 1), keys=Blocks(32, 32, 8, 1)),
}
_FLOAT32_BLOCKS = {
    64: dict(forward=Blocks(32, 32, 4, 2), queries=Blocks(32, 32, 4, 2), keys=Blocks(32, 32, 4, 2)),
    128: dict(forward=Blocks(32, 32, 4, 1), queries=Blocks(32, 32, 4, 1), keys=Blocks(32, 32, 4, 1)),
    256: dict(forward=Blocks(16, 16, 4, 1), queries=Blocks(16, 16, 4, 1), keys=Blocks(16, 16, 4, 1)),
}


def _blocks(x: torch.Tensor, kernel: str) -> Blocks:
    if x.dtype == torch.float32:
        table = _FLOAT32_BLOCKS
    else:
        is_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
        table = _HOPPER_BLOCKS if is_hopper else _OTHER_BLOCKS
    return table[max(64, _padded(x.shape[-1]))][kernel]


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


class _Plan(NamedTuple):
    """Which programs to launch, as tables of int32 on the device.

    `dense`, `dilated`: a record for every program of a launch. Its document (see `_load_document`); its block; the
    first of its document's entries, or if dilated the branch; and if dilated rate and start of the segment, where its
    partial results begin, the reach, and the distances that `_kept` asks for. `entries`: for every document and
    branch, the dense branches first, length w, rate and shift of the grid (a window's is one segment); reach (a
    window's w, 0 for a segment); where partial results begin, and how many there may be in a segment. `merges`: for
    every dense program and dilated branch, what `_partial_row` asks for of the segment where its block begins and of
    the next.

    The phases of the heads, in which layers may differ, stand apart.
    """

    dense: torch.Tensor
    dilated: torch.Tensor
    entries: torch.Tensor
    merges: torch.Tensor
    num_dense: int
    num_branches: int
    partial_rows: int
    is_unit: bool  # every dense branch has r = 1
    is_short: bool  # some segments are shorter than a block


@functools.lru_cache(maxsize=1024)
def _without_phases(pattern: DilatedPattern) -> DilatedPattern:
    return replace(pattern, head_offset="paper", layer_idx=0)


def _ordered_branches(pattern: DilatedPattern, of_queries: bool) -> tuple[list[Branch], int]:
    """The branches, dense ones first, and how many these are."""

    def is_dilated(branch: Branch) -> bool:
        return branch.rate > 1 and not (of_queries and branch.type == "window")

    return sorted(pattern.branches, key=is_dilated), sum(not is_dilated(branch) for branch in pattern.branches)


@functools.lru_cache(maxsize=1024)
def _phases(pattern: DilatedPattern, num_kv_heads: int, of_queries: bool, device: torch.device) -> torch.Tensor:
    """For every key/value head and branch, in the order of the plan. A window's grid is moved by its phase alone."""
    branches, _ = _ordered_branches(pattern, of_queries)

    def phase(branch: Branch, head: int) -> int:
        phase = pattern.phase(branch, head, num_kv_heads)
        return (phase - pattern.grid_shift(branch)) % branch.rate if branch.type == "window" else phase

    phases = [[phase(branch, head) for branch in branches] for head in range(num_kv_heads)]
    return torch.tensor(phases, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=32)
def _plan(
    pattern: DilatedPattern,
    places: tuple[tuple[int, ...], ...],
    block: int,
    of_queries: bool,
    is_causal: bool,
    device: torch.device,
) -> _Plan:
    """The plan for blocks of queries or of keys of the documents at `places`, for a pattern `_without_phases`."""
    documents = np.array(places, dtype=np.int64).reshape(-1, 5)
    length, first = documents[:, 3], documents[:, 4] * of_queries
    branches, num_dense = _ordered_branches(pattern, of_queries)
    reverse = of_queries and is_causal  # the blocks with most to do come first

    def programs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records of `counts` programs for every document, with the document's number and the program's."""
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        if reverse:
            number = counts[document] - 1 - number
        records = np.zeros((len(document), _PROGRAM.value), dtype=np.int64)
        records[:, :5] = documents[document]
        return records, document, number

    dense, dense_document, dense[:, 5] = programs(-(-(length - first) // block))
    dense[:, 6] = dense_document * len(branches)
    first_position = first[dense_document] + dense[:, 5] * block
    entries = np.zeros((len(documents), len(branches), _ENTRY.value), dtype=np.int64)
    merges = np.zeros((len(dense), len(branches) - num_dense, _MERGE.value), dtype=np.int64)
    dilated, partial_rows, is_short = [], 0, False
    for index, branch in enumerate(branches):
        r = branch.rate
        if branch.type == "window":
            w, g = length, 0 * length
            reach = length if branch.length is None else np.minimum(branch.length, length)
        else:  # a segment longer than the document is as good as one that just holds it
            g, reach = pattern.grid_shift(branch), 0
            whole = branch.length >= length + g
            w, g = np.where(whole, length + g % r, branch.length), np.where(whole, g % r, g)
            is_short |= (bool((~whole).any()) and branch.length < block) or r > 2**20
        entries[:, index, :4] = np.stack(np.broadcast_arrays(w, r, g, reach), axis=1)
        if index < num_dense:
            continue
        first_segment = (first + g) // w
        segments = np.where(length > first, (length - 1 + g) // w - first_segment + 1, 0)
        rows = np.minimum(-(-w // r), -(-(length - first) // r))  # per segment, at most
        blocks = -(-rows // block)
        entries[:, index, 4] = partial_rows + np.cumsum(segments * rows) - segments * rows - first_segment * rows
        entries[:, index, 5] = rows
        partial_rows += int(sum(segments * rows))

        records, document, number = programs(segments * blocks)
        segment = first_segment[document] + number // blocks[document]
        start = segment * w[document] - g[document]
        records[:, 5], records[:, 6] = number % blocks[document], index
        records[:, 7], records[:, 8] = r, start
        records[:, 9] = entries[document, index, 4] + segment * rows[document]
        records[:, 10] = entries[document, index, 3]
        stop = np.minimum(start + w[document], length[document])
        for field, end in ((11, stop), (13, first[document] if of_queries else documents[document, 4]), (15, 0)):
            records[:, field], records[:, field + 1] = np.divmod(end - start, r)
        dilated.insert(0, records)

        document, merge = dense_document, merges[:, index - num_dense]
        segment = (first_position + g[document]) // w[document]
        start = segment * w[document] - g[document]
        merge[:, 0] = start + w[document]
        merge[:, 1] = entries[document, index, 4] + segment * rows[document]
        merge[:, 2], merge[:, 3] = rows[document], r
        for field, begin in ((4, start), (8, start + w[document])):
            merge[:, field], merge[:, field + 1] = np.divmod(first_position - begin, r)
            merge[:, field + 2], merge[:, field + 3] = np.divmod(first[document] - begin, r)

    # One copy to the device; every table begins at a multiple of 16 bytes, whatever the others hold
    tables = (dense, np.concatenate(dilated or [[]]), entries, merges)
    tables = [np.asarray(table, dtype=np.int32).ravel() for table in tables]
    starts = np.cumsum([0] + [-(-len(table) // 4) * 4 for table in tables])
    joined = np.zeros(starts[-1], dtype=np.int32)
    for start, table in zip(starts, tables, strict=False):
        joined[start : start + len(table)] = table
    joined = torch.from_numpy(joined).to(device)
    tables = [joined[start : start + len(table)] for start, table in zip(starts, tables, strict=False)]
    is_unit = all(branch.rate == 1 for branch in branches[:num_dense])
    return _Plan(*tables, num_dense, len(branches), partial_rows, is_unit, is_short)


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    places: tuple[tuple[int, ...], ...],
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, with the strides of `query`, and log-sum-exp `[B, H, Nq]`.

    `places` has for every document its row of the batch, the columns of its position 0 among the keys and among the
    queries (negative if that query is not given), its length, and the position of its first query. Outside of all
    documents the output is 0.
    """
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if _has_padding(places, key):
        output.zero_()
        lse.fill_(-float("inf"))
    _run_queries(output, query, key, value, lse, None, None, pattern, places, is_causal, scale)
    return output, lse


def triton_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    pattern: DilatedPattern,
    places: tuple[tuple[int, ...], ...],
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, with their strides."""
    grads = [torch.empty_like(x) for x in (query, key, value)]
    if _has_padding(places, key):
        for grad in grads:
            grad.zero_()
    batch, heads, queries, head_dim = query.shape
    lse, stats = lse.contiguous(), lse.new_empty((batch, heads, queries, 2))
    _launch(
        _stats_kernel,
        (-(-queries // 64), heads, batch),
        (output, lse, grad_output, stats),
        (queries,),
        _strides(output, grad_output),
        dict(HEAD_DIM=head_dim, BLOCK_D=_padded(head_dim), BLOCK=64),
    )
    _run_queries(grads[0], query, key, value, None, grad_output, stats, pattern, places, is_causal, scale)
    _run_keys(*grads[1:], query, key, value, grad_output, stats, pattern, places, is_causal, scale)
    return tuple(grads)


def _has_padding(places: tuple[tuple[int, ...], ...], key: torch.Tensor) -> bool:
    return sum(length for _, _, _, length, _ in places) < key.shape[0] * key.shape[2]


def _run_queries(result, query, key, value, lse, grad_output, stats, pattern, places, is_causal, scale) -> None:
    """Write the output and `lse` of all queries, or their gradient where `grad_output` and `stats` are given."""
    is_gradient = grad_output is not None
    if not is_gradient:
        grad_output, stats = query, lse  # not looked at
    blocks = _blocks(query, "queries" if is_gradient else "forward")
    plan = _plan(_without_phases(pattern), places, blocks.own, True, is_causal, query.device)
    phases = _phases(pattern, key.shape[1], True, query.device)
    heads = query.shape[1]
    partial = query.new_empty((heads, plan.partial_rows, query.shape[3]))
    partial_lse = stats if is_gradient else lse.new_empty((heads, plan.partial_rows))
    tensors = (query, key, value, result, stats if is_gradient else lse, grad_output, stats, partial, partial_lse)
    strides = _strides(query, key, value, result, grad_output)
    constants = dict(GRADIENT=is_gradient, BLOCK_M=blocks.own, BLOCK_N=blocks.met)
    constants |= _constants(query, key, pattern, plan, blocks, is_causal, strides)
    _launch_both(_query_kernel, heads, tensors, plan, phases, (query.shape[2], scale), strides, constants, blocks)


def _run_keys(dk, dv, query, key, value, grad_output, stats, pattern, places, is_causal, scale) -> None:
    """Write the gradients of all keys and values."""
    blocks = _blocks(query, "keys")
    plan = _plan(_without_phases(pattern), places, blocks.own, False, is_causal, query.device)
    phases = _phases(pattern, key.shape[1], False, query.device)
    heads = key.shape[1]
    partial_dk, partial_dv = (key.new_empty((heads, plan.partial_rows, key.shape[3])) for _ in range(2))
    tensors = (query, key, value, grad_output, stats, dk, dv, partial_dk, partial_dv)
    strides = _strides(query, key, value, grad_output, dk, dv)
    constants = dict(BLOCK_M=blocks.met, BLOCK_N=blocks.own)
    constants |= _constants(query, key, pattern, plan, blocks, is_causal, strides)
    _launch_both(_key_kernel, heads, tensors, plan, phases, (query.shape[2], scale), strides, constants, blocks)


def _launch_both(
    kernel, heads, tensors, plan: _Plan, phases, numbers, strides, constants: dict, blocks: Blocks
) -> None:
    """The dilated programs of a plan, then the dense ones, which take up what those left."""
    for programs, is_dilated in ((plan.dilated, True), (plan.dense, False)):
        _launch(
            kernel,
            (len(programs) // _PROGRAM.value, heads, 1),
            (*tensors, programs, plan.entries, plan.merges, phases),
            (plan.partial_rows, *numbers),
            strides,
            dict(DILATED=is_dilated) | constants,
            blocks,
        )


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of the batch, the heads and the rows of every tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants(query, key, pattern: DilatedPattern, plan: _Plan, blocks: Blocks, is_causal: bool, strides) -> dict:
    """What the kernels are compiled for."""
    block_span = 256 * max(pattern.dilation_rates) * max(strides[2::3])  # in numbers, and more than it is
    return dict(
        IS_CAUSAL=is_causal,
        GROUP=query.shape[1] // key.shape[1],
        NUM_DENSE=plan.num_dense,
        NUM_BRANCHES=plan.num_branches,
        UNIT=plan.is_unit,
        SHORT=plan.is_short,
        WIDE=block_span >= 2**31,
        **_row_constants(query, blocks),
    )


def _row_constants(query: torch.Tensor, blocks: Blocks) -> dict:
    """What any kernel is compiled for that multiplies rows of queries and keys."""
    exact = query.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return dict(
        HEAD_DIM=query.shape[3],
        BLOCK_D=_padded(query.shape[3]),
        PRECISION="ieee" if exact else "tf32",
        STAGES=blocks.stages,
    )


_compiled = {}


def _launch(kernel, grid, tensors, numbers, strides, constants: dict, blocks: Blocks | None = None) -> None:
    """`kernel[grid](*tensors, *numbers, *strides, **constants)`, but faster: Triton looks at every argument of every
    call to find the kernel that it compiled for such arguments, this at those that can make a difference."""
    if 0 in grid:
        return
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, grid, tensors, numbers, strides, constants, blocks)
    kind = tuple(stride if stride <= 1 else (stride % 16 == 0, stride >= 2**31) for stride in strides)
    kind = (kernel, device, tensors[0].dtype, kind, blocks, *constants.values())
    is_aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
    compiled = _compiled.get(kind) if is_aligned else None
    if compiled is not None:
        in_order = (constants[name] for name in kernel.arg_names[-len(constants) :])
        compiled[grid](*tensors, *numbers, *strides, *in_order)
        return
    options = {}
    if blocks is not None:
        options = dict(num_warps=blocks.warps)
        if blocks.registers is not None:
            options["maxnreg"] = blocks.registers
    compiled = kernel[grid](*tensors, *numbers, *strides, **constants, **options)
    if is_aligned and compiled is not None:  # Triton's interpreter returns nothing
        _compiled[kind] = compiled
