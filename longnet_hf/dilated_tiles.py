"""Attention as a loop over dense tiles, in plain PyTorch: for the operator, and for keys of earlier tokens.

A softmax over many keys is computed tile by tile: outputs are merged by their log-sum-exps. For the gradients every
tile is given the *merged* output and log-sum-exp of its queries, from which its ordinary flash backward yields exactly
its share. Nothing per tile is saved.

Shapes: B batch, H query heads, Hkv key/value heads, N positions, D head size, K rows of a tile. Tensors are given with
the query heads of a key/value head apart, `[B, Hkv, H / Hkv, N, D]` (`in_groups`).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .dilated_pattern import Tile


# Most score entries that the kernel without flash attention holds at a time.
_MAX_SCORES = 1 << 24


def adjacent_rows(x: torch.Tensor) -> torch.Tensor:
    """All kernels read a row of D numbers as adjacent, and PyTorch's do not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results of a dtype are summed up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_groups(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, H, N, D]` -> `[B, Hkv, H / Hkv, N, D]`, a view; `num_heads` is Hkv."""
    return x.unflatten(1, (num_heads, -1))


class PlacedTile(Protocol):
    """A tile and where its rows lie. Tensors come `in_groups`, keys as the tile's kind has them."""

    mask: str | torch.Tensor  # see `Tile`; the pairs, bool `[queries, keys]`, in place of "given"

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """The tile's rows of a tensor of queries, for a kernel: `[batch, heads, K, D]`."""

    def keys(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """The tile's rows of a tensor of keys, likewise, repeated for the `group` query heads of a key/value head."""

    def merge(self, output: torch.Tensor, lse: torch.Tensor, new_output: torch.Tensor, new_lse: torch.Tensor) -> None:
        """Continue the softmax of the tile's queries with what a kernel gave; `lse` is `[..., 1]`."""

    def add_to_queries(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add a kernel's gradient of the tile's queries."""

    def add_to_keys(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        """Add a kernel's gradient of the tile's keys, summed over the query heads of a key/value head."""


def attend_to_tiles(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Iterable[PlacedTile],
    kernel: "TileKernel",
) -> None:
    """Continue the softmax `output`, `lse` `[..., 1]` over the keys of all tiles, in place."""
    for tile in tiles:
        q = tile.queries(query)
        k, v = (tile.keys(x, query.shape[2]).to(q.dtype) for x in (key, value))
        with torch.autocast(q.device.type, enabled=False):
            new_output, new_lse = kernel.forward(q, k, v, tile.mask)
        tile.merge(output, lse, new_output, new_lse[..., None])


def tile_gradients(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Iterable[PlacedTile],
    kernel: "TileKernel",
) -> Iterator[tuple[PlacedTile, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every tile with its shares of the gradients of query, key and value, as the kernel gives them: to be added to
    what they are shares of. `output` and `lse` `[..., 1]` are those of the whole softmax."""
    for tile in tiles:
        do, q, o, lse_of_tile = (tile.queries(x) for x in (grad_output, query, output, lse))
        k, v = (tile.keys(x, query.shape[2]) for x in (key, value))
        with torch.autocast(q.device.type, enabled=False):
            grads = kernel.backward(do, q, o, lse_of_tile, k, v, tile.mask)
        yield tile, *grads


def merge(output: torch.Tensor, lse: torch.Tensor, new_output: torch.Tensor, new_lse: torch.Tensor) -> None:
    """Continue the softmax `output` `[..., D]`, `lse` `[..., 1]` over further keys, in place."""
    share = torch.sigmoid(new_lse - lse).masked_fill_(new_lse == -torch.inf, 0.0)  # no keys, and perhaps none before
    output.lerp_(new_output.to(output.dtype), share)
    torch.logaddexp(lse, new_lse, out=lse)


class DocumentTile(NamedTuple):
    """A tile of one document, whose rows are evenly spaced views of queries and keys `[B, Hkv, H / Hkv, N, D]`."""

    tile: Tile
    query_column: int  # of the document's position 0, as in `Document`
    key_column: int

    @property
    def mask(self) -> str | torch.Tensor:
        return self.tile.mask if self.tile.joined is None else torch.from_numpy(self.tile.joined)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """`[B * repeats, heads * H / Hkv, K, D]`"""
        return self._fold(self._query_rows(x))

    def keys(self, x: torch.Tensor, group: int) -> torch.Tensor:
        return self._fold(self._key_rows(x).expand(-1, -1, group, -1, -1, -1))

    def merge(self, output: torch.Tensor, lse: torch.Tensor, new_output: torch.Tensor, new_lse: torch.Tensor) -> None:
        merge(self._query_rows(output), self._query_rows(lse), self._unfold(new_output), self._unfold(new_lse))

    def add_to_queries(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        self._query_rows(grad).add_(self._unfold(x))

    def add_to_keys(self, grad: torch.Tensor, x: torch.Tensor) -> None:
        self._key_rows(grad).add_(self._unfold(x).sum(2, keepdim=True))

    def _query_rows(self, x):
        return self._view(x, self.tile.queries, self.query_column)

    def _key_rows(self, x):
        return self._view(x, self.tile.keys, self.key_column)

    def _view(self, x, rows, column):
        """`[B, heads, H / Hkv, repeats, K, D]`"""
        heads, start, step = self.tile.heads, rows.start + column, rows.step
        x = x[:, heads.start : heads.stop : heads.step]
        span = rows[-1] - rows[0] + 1
        stop = start + (self.tile.repeats - 1) * self.tile.period + span
        return x[:, :, :, start:stop].unfold(3, span, max(1, self.tile.period))[..., ::step].transpose(-1, -2)

    @staticmethod
    def _fold(x):
        return x.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1)

    def _unfold(self, x):
        repeats, heads = self.tile.repeats, len(self.tile.heads)
        return x.unflatten(0, (-1, repeats)).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4, 5)


class TileKernel:
    """Softmax attention of one tile, with its log-sum-exp: PyTorch's flash kernels, or plain products where they do
    not apply (given pairs, dropout, float32 and float64 on a GPU, other devices). Inputs: `[batch, heads, K, D]`."""

    def __init__(self, like: torch.Tensor, scale: float, dropout: float, seed: torch.Tensor | None):
        self.scale, self.dropout = scale, dropout
        self.generator = None
        if dropout > 0:  # the same seed draws the same numbers again in the backward pass
            self.generator = torch.Generator(like.device).manual_seed(int(seed))
        half = like.dtype in (torch.float16, torch.bfloat16)
        self.on_cpu = dropout == 0 and like.device.type == "cpu"
        self.on_cuda = dropout == 0 and like.device.type == "cuda" and half and like.shape[-1] <= 256

    def forward(self, q, k, v, mask: str | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of a tile."""
        is_given = torch.is_tensor(mask)
        if not is_given and mask == "upper":  # in reverse order, an upper triangle is a lower one
            output, lse = self.forward(q.flip(2), k.flip(2), v.flip(2), "lower")
            return output.flip(2), lse.flip(2)
        is_causal = not is_given and mask == "lower"
        if self.on_cpu and not is_given:
            output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, scale=self.scale
            )
            smallest, largest = lse.abs().aminmax()
            if 0 < float(smallest) and float(largest) < torch.inf:  # also if NaN
                return output, lse
            # Not all NaN and infinities come through: of a few keys, what is left of them is a log-sum-exp of 0
        elif self.on_cuda and not is_given:
            padded = map(_pad_head, (q, k, v))
            output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                *padded, 0.0, is_causal, scale=self.scale
            )
            return output[..., : q.shape[-1]], lse
        q, k, v = (x.to(accumulator(x.dtype)) for x in (q, k, v))
        output, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for rows, columns in self._chunks(q, k, is_causal):
            scores = self._scores(q, k, rows, columns, mask)
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = (scores - _finite(lse[:, :, rows, None])).exp_()
            if self.dropout:
                weights *= self._kept_weights(weights)
            output[:, :, rows] = weights @ v[:, :, columns]
        return output, lse

    def backward(
        self, do, q, o, lse, k, v, mask: str | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tile's share of the gradients, given the merged output `o` and log-sum-exp `[..., 1]` of its queries."""
        is_given = torch.is_tensor(mask)
        if not is_given and mask == "upper":
            flipped = (x.flip(2) for x in (do, q, o, lse, k, v))
            return tuple(x.flip(2) for x in self.backward(*flipped, "lower"))
        is_causal, lse = not is_given and mask == "lower", lse[..., 0]
        if self.on_cpu and not is_given and bool(lse.isfinite().all()):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, is_causal, scale=self.scale
            )
        if self.on_cuda and not is_given:
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
        do, q, k, v, o = (x.to(accumulator(x.dtype)) for x in (do, q, k, v, o))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, columns in self._chunks(q, k, is_causal):
            weights = (self._scores(q, k, rows, columns, mask) - _finite(lse[:, :, rows, None])).exp_()
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

    def _scores(self, q, k, rows, columns, mask):
        scores = q[:, :, rows] @ k[:, :, columns].transpose(-1, -2) * self.scale
        if torch.is_tensor(mask):
            scores = scores.masked_fill(~mask[rows, columns].to(q.device), -torch.inf)
        elif mask == "lower":
            n, m = torch.arange(rows.start, rows.stop, device=q.device), torch.arange(columns.stop, device=q.device)
            scores = scores.masked_fill(m > n[:, None], -torch.inf)
        return scores

    def _kept_weights(self, weights):
        kept = torch.rand(weights.shape, device=weights.device, generator=self.generator) >= self.dropout
        return kept.to(weights.dtype) / (1 - self.dropout)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """To be subtracted from scores, all of which are -inf where the log-sum-exp is."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _pad_head(x: torch.Tensor) -> torch.Tensor:
    """Flash attention on a GPU wants head sizes that are multiples of 8."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy
