"""Dilated attention over a sequence that is split over processes: only kept keys travel, once for every branch.

A process holds one or two chunks of the sequence. Inside a chunk nothing travels. Of what lies before a chunk, a
branch asks for the kept keys of the segment (or window) that the chunk's beginning cuts, w / r of them at most: these
their owners send, in one exchange per layer, while the chunks attend to themselves. Gradients go the same way back.

Shapes as in dilated_past.py.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .dilated_operator import TileKernel, autocast_inputs, backward_op, dilated_attention
from .dilated_past import PastTile, attend_to_past, past_gradients, past_tiles
from .dilated_pattern import DilatedPattern


LAYOUTS = ("head_tail", "contiguous")


@dataclass(frozen=True)
class SequenceSplit:
    """Which positions of a sequence every process holds.

    Args:
        length: of the whole sequence, in tokens.
        world_size: number of processes P.
        rank: of this process among them.
        layout: `"contiguous"`, P chunks; or `"head_tail"`, 2P chunks of which process p has the p-th and the p-th from
            the end, so that all have equal work, whatever the mask (PyTorch's load balancing).
        group: of the processes; default: all.

    Raises:
        ValueError: if the length cannot be split so.
    """

    length: int
    world_size: int
    rank: int
    layout: str = "head_tail"
    group: dist.ProcessGroup | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {LAYOUTS}, got {self.layout!r}.")
        parts = self.world_size * (2 if self.layout == "head_tail" else 1)
        if self.length % parts:
            raise ValueError(
                f"A sequence of {self.length} tokens cannot be split into {parts} equal chunks ({self.layout} layout, "
                f"{self.world_size} processes): pad it to a multiple of {parts} (`pad_to_multiple_of={parts}`)."
            )

    def chunks(self, rank: int) -> list[range]:
        """The positions that a process holds, chunk by chunk, as they lie there."""
        if self.layout == "contiguous":
            size, numbers = self.length // self.world_size, [rank]
        else:
            size, numbers = self.length // (2 * self.world_size), [rank, 2 * self.world_size - 1 - rank]
        return [range(number * size, (number + 1) * size) for number in numbers]

    def local_chunks(self) -> list[tuple[range, slice]]:
        """The chunks of this process, and their columns among its tokens."""
        chunks, stop = [], 0
        for chunk in self.chunks(self.rank):
            start, stop = stop, stop + len(chunk)
            chunks.append((chunk, slice(start, stop)))
        return chunks

    def check_inputs(self, position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """Refuse what cannot be split; every process calls this, and all of them refuse together.

        Args:
            position_ids: `[B, N / P]`, which must be the tokens' positions: one document per row.
            attention_mask: `[B, N / P]`; padding must follow all tokens of its row.
        """
        if position_ids is None and attention_mask is None:
            return
        given = position_ids if attention_mask is None else attention_mask
        if given.dim() != 2:
            raise ValueError(f"`attention_mask` must be of shape [B, N / P], got {tuple(given.shape)}.")
        real = torch.ones_like(given, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        columns = [columns for _, columns in self.local_chunks()]
        is_packed = position_ids is not None and bool((position_ids != self.positions().to(given.device)).any())
        is_wrong = any(bool((real[:, c][:, 1:] & ~real[:, c][:, :-1]).any()) for c in columns)
        flags = torch.tensor([is_packed, is_wrong], device=given.device)
        counts = torch.stack([real[:, c].sum(1) for c in columns])
        mine = torch.cat((flags, counts.flatten()))
        everywhere = torch.stack([torch.empty_like(mine) for _ in range(self.world_size)])
        dist.all_gather(list(everywhere), mine, group=self.group)
        begins = torch.tensor([chunk.start for rank in range(self.world_size) for chunk in self.chunks(rank)])
        counts = everywhere[:, 2:].reshape(len(begins), -1).cpu()[begins.argsort()]  # in order, of every row
        is_packed, is_wrong = (everywhere[:, :2] != 0).any(0).tolist()
        is_wrong |= bool(((counts[1:] > 0) & (counts[:-1] < self.length // len(begins))).any())
        if is_packed:
            raise ValueError(
                "`position_ids` of a sequence that is split over processes must be 0, 1, ... over the whole sequence: "
                "packed documents cannot be split."
            )
        if is_wrong:
            raise ValueError(
                "`attention_mask` of a sequence that is split over processes may have padding on the right only."
            )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all processes, without gradients."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def average(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, with the gradient of this one's: FSDP and DDP take the mean of gradients."""
        return loss + (self.sum(loss) / self.world_size - loss.detach())

    def positions(self) -> torch.Tensor:
        """Of the tokens of this process, `[N / P]`."""
        return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks(self.rank)])


_explicit: ContextVar[tuple | None] = ContextVar("longnet_split", default=None)


@contextlib.contextmanager
def split_sequence(group: dist.ProcessGroup | None = None, layout: str = "head_tail") -> Iterator[None]:
    """Inside, models take their inputs for this process's part of a sequence that is split over `group`.

    Accelerate's `maybe_context_parallel`, and with it Trainer under `ParallelismConfig(cp_size=...)`, does the same.
    """
    token = _explicit.set((group, layout))
    try:
        yield
    finally:
        _explicit.reset(token)


@torch.compiler.disable
def active_split(local_length: int) -> SequenceSplit | None:
    """How the sequence is split of which this process was given `local_length` tokens; `None` if it is not."""
    if _explicit.get() is not None:
        group, layout = _explicit.get()
    else:
        if F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention:
            return None  # PyTorch's `context_parallel` replaces it as long as it is active
        try:
            from accelerate.state import AcceleratorState
        except ImportError:
            return None
        mesh = AcceleratorState._shared_state.get("device_mesh")
        if mesh is None or "cp" not in mesh.mesh_dim_names:
            return None
        from torch.distributed.tensor.experimental._attention import _cp_options

        group = mesh["cp"].get_group()
        layout = "head_tail" if _cp_options.enable_load_balance else "contiguous"
    world_size = dist.get_world_size(group)
    return SequenceSplit(local_length * world_size, world_size, dist.get_rank(group), layout, group)


class _Exchange(NamedTuple):
    """What a process sends and gets, in rows: the keys and values of one head at one position."""

    send_splits: list[int]  # rows for every process
    receive_splits: list[int]
    heads: torch.Tensor  # [rows to send]
    columns: torch.Tensor
    past: list[list[PastTile]]  # of every chunk, over the rows received


@functools.lru_cache(maxsize=64)
def _exchange(split: SequenceSplit, pattern: DilatedPattern, num_heads: int, device: torch.device) -> _Exchange:
    begins = np.array([(chunk.start, rank) for rank in range(split.world_size) for chunk in split.chunks(rank)])
    order = np.argsort(begins[:, 0])
    first_column = np.concatenate(
        [np.cumsum([0, *map(len, split.chunks(rank))])[:-1] for rank in range(split.world_size)]
    )

    def wanted(rank: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """Heads and positions of the keys that a process asks for, and where a chunk, branch and head begin."""
        heads, positions, begin, rows = [], [], {}, 0
        for number, chunk in enumerate(split.chunks(rank)):
            for index, branch in enumerate(pattern.branches):
                for head in range(num_heads):
                    keys = pattern.past_keys(branch, head, num_heads, chunk.start)
                    begin[number, index, head] = rows, keys.start, keys.step
                    rows += len(keys)
                    heads.append(np.full(len(keys), head))
                    positions.append(np.arange(keys.start, keys.stop, keys.step))
        return np.concatenate(heads), np.concatenate(positions), begin

    def locate(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The processes that hold these positions, and their columns there."""
        chunk = order[np.searchsorted(begins[order, 0], positions, side="right") - 1]
        return begins[chunk, 1], first_column[chunk] + positions - begins[chunk, 0]

    send_heads, send_columns, send_splits = [], [], []
    for rank in range(split.world_size):
        heads, positions, begin = wanted(rank)
        owner, column = locate(positions)
        is_mine = owner == split.rank
        send_heads.append(heads[is_mine])
        send_columns.append(column[is_mine])
        send_splits.append(int(is_mine.sum()))
        if rank == split.rank:
            receive_splits = np.bincount(owner, minlength=split.world_size).tolist()
            row_of = np.empty(len(owner), dtype=np.int64)  # rows come sorted by process
            row_of[np.argsort(owner, kind="stable")] = np.arange(len(owner))
            mine = begin

    past = []
    for number, chunk in enumerate(split.chunks(split.rank)):

        def find(branch: int, heads: np.ndarray, positions: np.ndarray, number=number):
            row, start, step = np.array([mine[number, branch, int(head)] for head in heads[:, 0]]).T[..., None]
            return row_of[row + (positions - start) // step], np.zeros((1, 1), dtype=np.int64)

        past.append(past_tiles(pattern, num_heads, chunk.start, len(chunk), find, device))
    heads, columns = (torch.from_numpy(np.concatenate(x)).to(device) for x in (send_heads, send_columns))
    return _Exchange(send_splits, receive_splits, heads, columns, past)


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    split: SequenceSplit,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal dilated attention of the tokens of this process to those of all processes, which all call this.

    Args:
        query: `[B, H, N / P, D]`.
        key, value: `[B, Hkv, N / P, D]`.
        split: which positions these are.

    Returns:
        `[B, H, N / P, D]`: what `dilated_attention` of the whole sequence gives at these positions.
    """
    if query.shape[2] != split.length // split.world_size:
        raise ValueError(
            f"`split` gives every process {split.length // split.world_size} tokens, got {query.shape[2]}."
        )
    query, key, value = autocast_inputs(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return _SplitAttention.apply(query, key, value, pattern.canonical(), split, scale)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, pattern, split, scale):
        heads = key.shape[1]
        plan = _exchange(split, pattern, heads, query.device)
        rows = torch.cat((key, value), dim=-1)[:, plan.heads, plan.columns].transpose(0, 1).contiguous()
        received = rows.new_empty(sum(plan.receive_splits), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows, plan.receive_splits, plan.send_splits, group=split.group, async_op=True
        )
        parts = []
        for chunk, columns in split.local_chunks():
            q, k, v = (x[:, :, columns] for x in (query, key, value))
            parts.append(dilated_attention(q, k, v, pattern.at(chunk.start), scale=scale, return_lse=True))
        work.wait()
        stored = received.transpose(0, 1)[:, :, None].chunk(2, dim=-1)
        outputs, lses = [], []
        for (_, columns), (output, lse), past in zip(split.local_chunks(), parts, plan.past, strict=True):
            output = output.to(lse.dtype)
            q = query[:, :, columns]
            attend_to_past(output, lse, q, *stored, past, heads, TileKernel(q, scale, 0.0, None))
            outputs.append(output.to(query.dtype))
            lses.append(lse)
        output, lse = torch.cat(outputs, dim=2), torch.cat(lses, dim=2)
        ctx.save_for_backward(query, key, value, output, lse, received)
        ctx.options = plan, pattern, split, scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, lse, received = ctx.saved_tensors
        plan, pattern, split, scale = ctx.options
        heads = key.shape[1]
        stored = received.transpose(0, 1)[:, :, None].chunk(2, dim=-1)
        grad_received = torch.zeros(received.shape, dtype=lse.dtype, device=received.device)
        grad_queries = []
        for (_, columns), past in zip(split.local_chunks(), plan.past, strict=True):
            do, q, o, l = (x[:, :, columns] for x in (grad_output, query, output, lse))
            dq, dk, dv = past_gradients(do, q, o, l, *stored, past, heads, TileKernel(q, scale, 0.0, None))
            grad_received += torch.cat((dk, dv), dim=-1)[:, :, 0].transpose(0, 1)
            grad_queries.append(dq)
        grad_rows = key.new_empty(len(plan.heads), *received.shape[1:])
        work = dist.all_to_all_single(
            grad_rows,
            grad_received.to(key.dtype),
            plan.send_splits,
            plan.receive_splits,
            group=split.group,
            async_op=True,
        )
        grad_keys = []
        for (chunk, columns), grad_query in zip(split.local_chunks(), grad_queries, strict=True):
            saved = (x[:, :, columns] for x in (grad_output, query, key, value, output, lse))
            # Output and log-sum-exp of the whole softmax give each part its share
            dq, dk, dv = backward_op(*saved, None, pattern.at(chunk.start).to_json(), True, scale, 0.0, None)
            grad_query += dq
            grad_keys.append(torch.cat((dk, dv), dim=-1).to(lse.dtype))
        grad_keys = torch.cat(grad_keys, dim=2)
        work.wait()
        row = torch.arange(len(key), device=key.device)[:, None]
        index = row, plan.heads[None], plan.columns[None]  # a key may go to several processes, for several branches
        grad_keys = grad_keys.index_put(index, grad_rows.transpose(0, 1).to(lse.dtype), accumulate=True)
        grads = torch.cat(grad_queries, dim=2), *grad_keys.chunk(2, dim=-1)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)), None, None, None


__all__ = ["SequenceSplit", "split_attention", "split_sequence"]
