"""Attention of new tokens to stored keys of earlier ones, which lie apart: in a cache, or on other processes.

New tokens attend to one another as a sequence of their own, whose pattern is `pattern.at(position)`, by
`dilated_attention` with its log-sum-exp. This module continues that softmax over the keys before `position`, or gives
the gradients: a few dense tiles per branch, each done for all heads at a time.

Shapes: B batch, H query heads, Hkv key/value heads, L new tokens, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .dilated_operator import uses_triton
from .dilated_pattern import DilatedPattern, Tile, sink_tiles
from .dilated_tiles import TileKernel, adjacent_rows, attend_to_tiles, in_groups, merge, tile_gradients


try:
    from .dilated_kernels import (
        PastAttention,
        triton_add_query_gradients,
        triton_add_stored_gradients,
        triton_attend_to_past,
    )
except ImportError:  # PyTorch without Triton
    pass


# Rows that are cheaper to copy than to compute in several pieces
_FEW_ROWS = 1 << 17
# Queries of a tile with a sink, which many more can have in common than other keys
_SINK_QUERIES = 4096
# A launch can have 65 535 heads of tiles: enough for 128 query heads per key/value head
_MANY_TILES = 65535 // 128


class PastTile(NamedTuple):
    """Tiles of new queries over stored keys, n at a time, in which a query comes once at most. Its rows are found by
    index, among queries `[B, Hkv, H / Hkv, L, D]` and in what is stored."""

    mask: str  # "full" or "upper", see `Tile`
    heads: torch.Tensor  # [n, Kq], of the queries: one per row
    columns: torch.Tensor  # likewise, among the new tokens
    stored: tuple  # index into what is stored, of the keys: gives [B, n, Kk, D]

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, n * H / Hkv, K, D]`"""
        return self._rows(x)[self._index].transpose(2, 3).flatten(1, 2)

    def keys(self, x: torch.Tensor, group: int) -> torch.Tensor:
        return x[self.stored][:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)

    def merge(self, output: torch.Tensor, lse: torch.Tensor, new_output: torch.Tensor, new_lse: torch.Tensor) -> None:
        output, lse = self._rows(output), self._rows(lse)
        merged_output, merged_lse = output[self._index].to(lse.dtype), lse[self._index]
        merge(merged_output, merged_lse, self._unfold(new_output), self._unfold(new_lse))
        output[self._index], lse[self._index] = merged_output.to(output.dtype), merged_lse

    def add_to_queries(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        self._rows(grad)[self._index] += self._unfold(x).to(grad.dtype)

    def add_to_keys(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """`grad` is `[rows, D]`; tiles may have rows in common."""
        x = x.unflatten(1, (len(self.heads), -1)).sum(2, dtype=grad.dtype)
        grad.index_add_(0, self.stored[0].flatten(), x.flatten(0, 2))

    @property
    def _index(self) -> tuple:
        return slice(None), self.heads, self.columns

    @staticmethod
    def _rows(x):
        """`[B, Hkv, H / Hkv, L, D]` -> `[B, Hkv, L, H / Hkv, D]`: heads and columns are indexed together."""
        return x.transpose(2, 3)

    def _unfold(self, x):
        return x.unflatten(1, (len(self.heads), -1)).transpose(2, 3)


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
    alike: dict[tuple, list[tuple[int, np.ndarray, np.ndarray]]] = {}  # tiles of one shape: head, queries, keys
    number_of_tile: dict[tuple[int, range, int], int] = {}
    for tile, queries, keys in _tiles_of_past(pattern, num_heads, position, length):
        # So that a query comes once in each of `alike`: those of one head have other rests by the dilation rate
        which = tile.branch, tile.heads, int(queries[0]) % pattern.dilation_rates[tile.branch]
        number_of_tile[which] = number_of_tile.get(which, -1) + 1
        mask = "upper" if tile.mask == "upper" else "full"
        of_shape = alike.setdefault((tile.branch, number_of_tile[which], mask, len(queries), len(keys)), [])
        of_shape.extend((head, queries, keys) for head in tile.heads)

    past = []
    for (branch, _, mask, num_queries, num_keys), tiles in alike.items():
        # Without kernels tiles are copies: of a long sequence, a quarter as many rows at a time as there are new ones
        size = max(_FEW_ROWS, num_heads * length // 4) // (num_queries + num_keys)
        size = max(1, min(size, _MANY_TILES))
        for start in range(0, len(tiles), size):
            heads, queries, keys = (np.stack(x) for x in zip(*tiles[start : start + size], strict=True))
            heads = heads[:, None]
            # Of one shape and layout, or indexing on a GPU would copy them each time
            indices = *np.broadcast_arrays(heads, queries), *find(branch, heads, keys)
            heads, queries, *stored = (
                x if isinstance(x, slice) else torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in indices
            )
            past.append(PastTile(mask, heads, queries, tuple(stored)))
    return past


def _tiles_of_past(
    pattern: DilatedPattern, num_heads: int, position: int, length: int
) -> Iterator[tuple[Tile, np.ndarray, np.ndarray]]:
    """The tiles of `length` queries from `position` on over the keys before, with the columns of their queries among
    these and the positions of their keys. All pairs are joined, but for those above an "upper" diagonal."""
    widths = [branch.length or position for branch in pattern.branches if branch.type != "sink"]
    back = min(position, max(widths, default=0))
    for tile in pattern.at(position - back).tiles(back + length, num_heads, num_queries=length, num_keys=back):
        if pattern.branches[tile.branch].type == "sink":  # lies further back
            continue
        # Only one segment, or block of a window, has keys before `position` and queries after
        assert tile.repeats == 1
        # A lower triangle has but one key left
        assert tile.mask != "lower" or len(tile.queries) == len(tile.keys) == 1
        yield tile, np.array(tile.queries) - back, np.array(tile.keys) + position - back
    for tile in sink_tiles(pattern, position + length, num_heads, length, position, is_causal=True):
        if not tile.keys:
            continue
        queries, keys = np.array(tile.queries) - position, np.array(tile.keys)
        joined = np.ones((len(queries), len(keys)), dtype=bool) if tile.joined is None else tile.joined
        # Keys that the same queries join make a tile, or several: a GPU does them side by side
        sets, number = np.unique(joined, axis=1, return_inverse=True)
        for i in range(sets.shape[1]):
            of_set, keys_of_set = queries[sets[:, i]], keys[number.ravel() == i]
            for start in range(0, len(of_set), _SINK_QUERIES):
                yield tile, of_set[start : start + _SINK_QUERIES], keys_of_set


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
        return triton_attend_to_past(PastAttention(query, keys, values, output, lse, past, num_heads, kernel.scale))
    output, lse, query = (in_groups(x, num_heads) for x in (output, lse[..., None], query))
    attend_to_tiles(output, lse, query, keys, values, past, kernel)


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
        attention = PastAttention(query, keys, values, output, lse, past, num_heads, kernel.scale)
        triton_add_stored_gradients(attention, grad_output, grad_stored)
        return lambda grad: triton_add_query_gradients(attention, grad_output, grad)

    grad_keys, grad_values = grad_stored.chunk(2, dim=-1)
    of_queries = (in_groups(x, num_heads) for x in (grad_output, query, output, lse[..., None]))
    query_grads = []
    for tile, dq, dk, dv in tile_gradients(*of_queries, keys, values, past, kernel):
        query_grads.append(dq)
        tile.add_to_keys(grad_keys, dk)
        tile.add_to_keys(grad_values, dv)

    def add_query_gradients(grad: torch.Tensor) -> None:
        for tile, dq in zip(past, query_grads, strict=True):
            tile.add_to_queries(in_groups(grad, num_heads), dq)

    return add_query_gradients


def _uses_kernels(query: torch.Tensor, keys: torch.Tensor, kernel: TileKernel) -> bool:
    """Keys in a cache lie apart by more than rows; there, blocks of new tokens are long, and kernels spare little."""
    return keys.dim() == 2 and uses_triton(query, kernel.dropout)
