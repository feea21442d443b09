"""Attention of new tokens to stored keys of earlier ones, which lie apart: in a cache, or on other processes.

New tokens attend to one another as a sequence of their own, whose pattern is `pattern.at(position)`, by
`dilated_attention` with its log-sum-exp. This module continues that softmax over the keys before `position`, or gives
the gradients: a few dense tiles per branch, each done for all heads at a time.

Shapes: B batch, H query heads, Hkv key/value heads, L new tokens, D head size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .dilated_operator import TileKernel, adjacent_rows, merge, uses_triton
from .dilated_pattern import DilatedPattern


try:
    from .dilated_past_kernels import (
        triton_add_query_gradients,
        triton_add_stored_gradients,
        triton_attend_to_past,
    )
except ImportError:  # PyTorch without Triton
    pass


# Rows that are cheaper to copy than to compute in several pieces
_FEW_ROWS = 1 << 17
# A launch can have 65 535 heads of tiles: enough for 128 query heads per key/value head
_MANY_TILES = 65535 // 128


class PastTile(NamedTuple):
    """Tiles of new queries over stored keys, n at a time, in which a query comes once at most."""

    mask: str  # "full" or "upper", see `Tile`
    heads: torch.Tensor  # [n, Kq], of the queries: one per row
    columns: torch.Tensor  # likewise, among the new tokens
    stored: tuple  # index into what is stored, of the keys: gives [B, n, Kk, D]


def past_tiles(
    pattern: DilatedPattern,
    num_heads: int,
    position: int,
    length: int,
    find: Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray | slice, ...]],
    device: torch.device,
) -> list[PastTile]:
    """What `length` tokens from `position` on see of the keys before them.

    Args:
        num_heads: number of key/value heads.
        find: of a branch (its number), heads `[n, 1]` and positions `[n, K]` of keys, where these are stored: an index
            that gives `[B, n, K]`.
    """
    back = min(position, max(position if w is None else w for w in pattern.segment_lengths))
    alike: dict[tuple, list[tuple[int, int, int]]] = {}  # tiles that differ in heads and in where they begin
    number_of_tile: dict[tuple[int, range, int], int] = {}
    near = pattern.at(position - back)
    for tile in near.tiles(back + length, num_heads, num_queries=length, num_keys=back):
        # So that a query comes once in each of `alike`: those of one head have other rests by the dilation rate
        queries, keys = tile.queries, tile.keys
        which = tile.branch, tile.heads, queries.start % pattern.dilation_rates[tile.branch]
        number_of_tile[which] = number_of_tile.get(which, -1) + 1
        # Only one segment, or block of a window, has keys before `position` and queries after
        assert tile.repeats == 1
        shape, mask = (len(queries), queries.step, len(keys), keys.step), tile.mask
        if mask == "lower":  # a triangle of which one key is left
            assert len(queries) == len(keys) == 1
            mask = "full"
        begins = alike.setdefault((tile.branch, number_of_tile[which], mask, *shape), [])
        begins.extend((head, queries.start - back, keys.start + position - back) for head in tile.heads)

    past = []
    for (branch, _, mask, num_queries, query_step, num_keys, key_step), begins in alike.items():
        # Without kernels tiles are copies: of a long sequence, a quarter as many rows at a time as there are new ones
        size = max(_FEW_ROWS, num_heads * length // 4) // (num_queries + num_keys)
        size = max(1, min(size, _MANY_TILES))
        for start in range(0, len(begins), size):
            heads, queries, keys = np.array(begins[start : start + size], dtype=np.int64).T[..., None]
            queries, keys = queries + np.arange(num_queries) * query_step, keys + np.arange(num_keys) * key_step
            # Of one shape and layout, or indexing on a GPU would copy them each time
            indices = *np.broadcast_arrays(heads, queries), *find(branch, heads, keys)
            heads, queries, *stored = (
                x if isinstance(x, slice) else torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in indices
            )
            past.append(PastTile(mask, heads, queries, tuple(stored)))
    return past


def attend_to_past(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: Sequence[PastTile],
    num_heads: int,
    kernel: TileKernel,
) -> None:
    """Continue the softmax of the new tokens over stored keys, in place.

    Args:
        output: `[B, H, L, D]`, of what was attended to so far, in adjacent rows. Of any dtype: in a low one, rows that
            several tiles have in common are rounded each time.
        lse: `[B, H, L]`, likewise, in the accumulators' dtype.
        query: `[B, H, L, D]`.
        keys, values: what is stored, `[..., D]`.
    """
    if _uses_kernels(query, keys, kernel):
        query, keys, values = map(adjacent_rows, (query, keys, values))
        return triton_attend_to_past(output, lse, query, keys, values, past, num_heads, kernel.scale)
    group = query.shape[1] // num_heads
    query, output, lse = (_side_by_side(x, num_heads) for x in (query, output, lse[..., None]))
    for tile in past:
        rows = slice(None), tile.heads, tile.columns
        q = _fold(query[rows])
        k, v = (_stored(x, tile, group).to(q.dtype) for x in (keys, values))
        with torch.autocast(query.device.type, enabled=False):
            new_output, new_lse = kernel.forward(q, k, v, tile.mask)
        merged_output, merged_lse = output[rows].to(lse.dtype), lse[rows]
        merge(merged_output, merged_lse, _unfold(new_output, group), _unfold(new_lse[..., None], group))
        output[rows], lse[rows] = merged_output.to(output.dtype), merged_lse


def past_gradients(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: Sequence[PastTile],
    num_heads: int,
    kernel: TileKernel,
    grad_stored: torch.Tensor,
) -> Callable[[torch.Tensor], None]:
    """The gradients by way of [`attend_to_past`].

    Args:
        grad_output, query: `[B, H, L, D]`.
        output, lse: of the whole softmax, `[B, H, L, D]` and `[B, H, L]`.
        keys, values: what is stored, `[rows, D]`; tiles may have rows in common.
        grad_stored: `[rows, 2 D]` in the accumulators' dtype; the gradients of keys and values are added to it.

    Returns:
        A function that adds to the gradient of `query`, `[B, H, L, D]`, whose rows must be adjacent.
    """
    # In a launch several programs may add to one key: in an order that only PyTorch's operators can be asked to keep
    is_order_free = torch.get_deterministic_debug_mode() < 2  # 2: `use_deterministic_algorithms`, not to warn only
    if is_order_free and _uses_kernels(query, keys, kernel):
        tensors = map(adjacent_rows, (grad_output, output, query, keys, values))
        grad_output, output, query, keys, values = tensors
        inputs = grad_output, output, lse, query, keys, values, past, num_heads, kernel.scale
        triton_add_stored_gradients(grad_stored, *inputs)
        return lambda grad: triton_add_query_gradients(grad, *inputs)

    group, query_grads = query.shape[1] // num_heads, []
    grad_output, query, output, lse = (
        _side_by_side(x, num_heads) for x in (grad_output, query, output, lse[..., None])
    )
    for tile in past:
        rows = slice(None), tile.heads, tile.columns
        do, q, o, lse_of_rows = (_fold(x[rows]) for x in (grad_output, query, output, lse))
        k, v = (_stored(x, tile, group) for x in (keys, values))
        with torch.autocast(query.device.type, enabled=False):
            dq, dk, dv = kernel.backward(do, q, o, lse_of_rows, k, v, tile.mask)
        query_grads.append(_unfold(dq, group))
        of_keys = torch.cat((dk, dv), dim=-1).unflatten(1, (-1, group)).sum(2, dtype=grad_stored.dtype)
        grad_stored.index_add_(0, tile.stored[0].flatten(), of_keys.flatten(0, 2))

    def add_query_gradients(grad: torch.Tensor) -> None:
        grad = _side_by_side(grad, num_heads)
        for tile, x in zip(past, query_grads, strict=True):
            grad[:, tile.heads, tile.columns] += x.to(grad.dtype)

    return add_query_gradients


def _uses_kernels(query: torch.Tensor, keys: torch.Tensor, kernel: TileKernel) -> bool:
    """Keys in a cache lie apart by more than rows; there, blocks of new tokens are long, and kernels spare little."""
    return keys.dim() == 2 and uses_triton(query, kernel.dropout)


def _side_by_side(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, H, L, D]` -> `[B, Hkv, L, H / Hkv, D]`: heads and columns are indexed together."""
    return x.unflatten(1, (num_heads, -1)).transpose(2, 3)


def _stored(x: torch.Tensor, tile: PastTile, group: int) -> torch.Tensor:
    """A tile's keys for a kernel, repeated for every query head of a group."""
    return x[tile.stored][:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def _fold(x: torch.Tensor) -> torch.Tensor:
    """`[B, n, K, H / Hkv, D]` -> `[B, n * H / Hkv, K, D]`, as kernels ask for it."""
    return x.transpose(2, 3).flatten(1, 2)


def _unfold(x: torch.Tensor, group: int) -> torch.Tensor:
    return x.unflatten(1, (-1, group)).transpose(2, 3)
