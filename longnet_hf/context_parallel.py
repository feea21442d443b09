"""Dilated attention over a sequence that is split over processes: only kept keys travel, and each of them once.

A process holds one or two chunks of the sequence. Inside a chunk nothing travels. Of what lies before a chunk, a
branch asks for the kept keys of the segment (or window) that the chunk's beginning cuts, w / r of them at most: these
their owners send, in one exchange per layer, while the chunks attend to themselves. Gradients go the same way back.
Packed documents are asked for what they hold before the chunk, each by its own grid.

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

from .dilated_operator import autocast_inputs, backward_op, dilated_attention
from .dilated_past import PastTile, attend_to_past, past_gradients, past_tiles
from .dilated_pattern import DilatedPattern, clip
from .dilated_tiles import TileKernel
from .documents import check_cu_seq_lens
from .recompute import keep_for_second


LAYOUTS = ("head_tail", "contiguous")


@dataclass(frozen=True)
class SequenceSplit:
    """Which positions of a sequence every process holds.

    Args:
        length: of the whole sequence, in tokens.
        world_size: number of processes P.
        rank: of this process among them.
        layout: `"contiguous"`, P chunks; or `"head_tail"`, 2P chunks of which process p has the p-th and the p-th from
            the end, so that all have equal work, whatever the mask (PyTorch's load balancing). One process has one.
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
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must lie below `world_size` ({self.world_size}), got {self.rank}.")
        parts = self.world_size * (2 if self.is_head_tail else 1)
        if self.length < parts or self.length % parts:
            fits_contiguous = self.length > 0 and self.length % self.world_size == 0
            raise ValueError(
                f"A sequence of {self.length} tokens cannot be split into {parts} equal chunks ({self.layout} layout, "
                f"{self.world_size} processes): pad it to a multiple of {parts} (`pad_to_multiple_of={parts}`)"
                + (', or split it with `layout="contiguous"`.' if fits_contiguous else ".")
            )

    @property
    def is_head_tail(self) -> bool:
        return self.layout == "head_tail" and self.world_size > 1

    def chunks(self, rank: int) -> list[range]:
        """The positions that a process holds, chunk by chunk, as they lie there."""
        if self.is_head_tail:
            size, numbers = self.length // (2 * self.world_size), [rank, 2 * self.world_size - 1 - rank]
        else:
            size, numbers = self.length // self.world_size, [rank]
        return [range(number * size, (number + 1) * size) for number in numbers]

    def local_chunks(self) -> list[tuple[range, slice]]:
        """The chunks of this process, and their columns among its tokens."""
        chunks, stop = [], 0
        for chunk in self.chunks(self.rank):
            start, stop = stop, stop + len(chunk)
            chunks.append((chunk, slice(start, stop)))
        return chunks

    def find_documents(
        self,
        batch_size: int,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> "SplitDocuments":
        """Where the documents of a batch begin and end. Every process calls this, and all of them refuse together.

        A few numbers per row and chunk travel, and only if any argument is given.

        Args:
            attention_mask: `[B, N / P]`; padding must follow all tokens of its row.
            position_ids: `[B, N / P]` or `[1, N / P]`; a document starts wherever they do not grow.
            cu_seq_lens: `[documents + 1]`, boundaries in the flattened batch of whole rows, from 0 to B * N.
            seq_idx: `[B, N]` or `[B, N / P]`, in place of `position_ids`: numbers of documents, which grow.

        Raises:
            ValueError: if shapes do not fit, if there is padding elsewhere, or if `seq_idx` falls.
        """
        given = [x for x in (attention_mask, position_ids, cu_seq_lens, seq_idx) if x is not None]
        if not given:
            return whole_rows(self, batch_size)
        positions, number, real = self._what_is_said(
            batch_size, given[0].device, attention_mask, position_ids, cu_seq_lens, seq_idx
        )
        own, starts = zip(
            *(_summary(positions[:, x], number[:, x], real[:, x]) for _, x in self.local_chunks()), strict=True
        )
        own = torch.stack(own)
        of_ranks = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(of_ranks, own, group=self.group)
        begins = [chunk.start for rank in range(self.world_size) for chunk in self.chunks(rank)]
        chunks = torch.cat(of_ranks).cpu().numpy()[np.argsort(begins)]  # [chunks, fields, B], in order
        return self._join_chunks(_Summary(*chunks.swapaxes(0, 1)), starts)

    def _what_is_said(
        self, batch_size: int, device: torch.device, attention_mask, position_ids, cu_seq_lens, seq_idx
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of this process's tokens, `[B, N / P]` each: positions, which grow inside a document; a number, which
        changes from one document to the next; and whether they are real."""
        local = self.length // self.world_size
        if attention_mask is not None and attention_mask.shape != (batch_size, local):
            raise ValueError(
                f"`attention_mask` must have shape {(batch_size, local)} (batch, tokens of this process), got "
                f"{tuple(attention_mask.shape)}."
            )
        if position_ids is not None and position_ids.shape not in {(batch_size, local), (1, local)}:
            raise ValueError(f"`position_ids` must have shape {(batch_size, local)}, got {tuple(position_ids.shape)}.")
        own = self.positions(device)
        positions = position_ids if seq_idx is None and position_ids is not None else own[None]
        positions = positions.to(device).expand(batch_size, local)
        number = torch.zeros_like(positions)
        if seq_idx is not None:
            if seq_idx.shape not in {(batch_size, self.length), (batch_size, local)}:
                raise ValueError(f"`seq_idx` must have shape {(batch_size, self.length)}, got {tuple(seq_idx.shape)}.")
            number = (seq_idx if seq_idx.shape[1] == local else seq_idx[:, own.to(seq_idx.device)]).to(positions)
        elif cu_seq_lens is not None:
            check_cu_seq_lens(cu_seq_lens, batch_size * self.length, "tokens of all processes")
            flat = torch.arange(batch_size, device=device)[:, None] * self.length + own
            number = torch.searchsorted(cu_seq_lens.to(device), flat, right=True)
        real = torch.ones_like(positions, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        return positions, number, real

    def _join_chunks(self, chunks: "_Summary", starts: tuple[torch.Tensor, ...]) -> "SplitDocuments":
        """Put together what the processes said of their chunks: all of them, and `starts` of this process's tokens."""
        if (chunks.has_inner_padding == 1).any() or (chunks.first_real[1:] & ~chunks.last_real[:-1] & 1).any():
            raise ValueError(
                "`attention_mask` of a sequence that is split over processes may have padding on the right only."
            )
        falls = chunks.first_number[1:] < chunks.last_number[:-1]
        if (chunks.has_falling_number == 1).any() or (chunks.first_real[1:] & falls).any():
            raise ValueError(
                "`seq_idx` of a sequence that is split over processes must not fall: a document is one stretch of it."
            )
        is_start = chunks.first_position[1:] <= chunks.last_position[:-1]
        is_start |= chunks.first_number[1:] != chunks.last_number[:-1]
        first_chunk = np.ones_like(chunks.first_real[:1])
        is_start = np.concatenate((first_chunk, is_start & chunks.first_real[1:])) == 1
        batch_size, num_chunks = chunks.first_real.shape[1], len(chunks.first_real)
        if not is_start[1:].any() and (chunks.last_start < 0).all():
            return whole_rows(self, batch_size)
        size, before, document = self.length // num_chunks, [], np.zeros(batch_size, dtype=np.int64)
        for chunk in range(num_chunks):
            document = np.where(is_start[chunk], chunk * size, document)
            before.append(tuple((chunk * size - document).tolist()))
            document = np.where(chunks.last_start[chunk] >= 0, chunk * size + chunks.last_start[chunk], document)
        leads, document_ids = [], []
        for (positions, _), start in zip(self.local_chunks(), starts, strict=True):
            chunk = positions.start // size
            lead = np.where(np.array(before[chunk]) > 0, chunks.first_start[chunk], 0)
            leads.append(tuple(lead.tolist()))
            column = torch.arange(size, device=start.device)
            is_lead = column < torch.from_numpy(lead).to(start.device)[:, None]
            document_ids.append(start.cumsum(1, dtype=torch.int32).masked_fill(is_lead, -1))
        return SplitDocuments(self, tuple(before), tuple(leads), tuple(document_ids))

    def collect(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What lies at any positions of the sequence, on all processes, without gradients.

        Args:
            x: `[B, H, N / P, D]`, of this process's tokens.
            positions: `[B, H, K]`, the same on all processes; below 0 where zeros are wanted.

        Returns:
            `[B, H, K, D]`.
        """
        found = x.new_zeros(*positions.shape, x.shape[-1])
        for chunk, columns in self.local_chunks():
            is_here = (positions >= chunk.start) & (positions < chunk.stop)
            index = (positions - chunk.start).clamp(0, len(chunk) - 1)[..., None].expand_as(found)
            found = torch.where(is_here[..., None], x.detach()[:, :, columns].gather(2, index), found)
        dist.all_reduce(found, group=self.group)
        return found

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Of the tokens of this process, `[N / P]`."""
        return torch.cat([torch.arange(chunk.start, chunk.stop, device=device) for chunk in self.chunks(self.rank)])


class _Summary(NamedTuple):
    """What processes tell one another of a chunk: of its first and last token, and of what begins behind the first.
    All are integers, `[B]`, or `[chunks, B]` once they are gathered."""

    first_position: np.ndarray
    last_position: np.ndarray
    first_number: np.ndarray
    last_number: np.ndarray
    first_real: np.ndarray
    last_real: np.ndarray
    first_start: np.ndarray  # column of the first document that begins behind the first token; else the chunk's length
    last_start: np.ndarray  # of the last one; else -1
    has_inner_padding: np.ndarray  # padding before a real token
    has_falling_number: np.ndarray


def _summary(positions: torch.Tensor, number: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields of a [`_Summary`] `[fields, B]` of a chunk `[B, size]`, and where documents begin behind its first
    token, `[B, size]`."""
    start = torch.zeros_like(real)
    start[:, 1:] = ((positions[:, 1:] <= positions[:, :-1]) | (number[:, 1:] != number[:, :-1])) & real[:, 1:]
    column = torch.arange(real.shape[1], device=real.device)
    fields = _Summary(
        first_position=positions[:, 0],
        last_position=positions[:, -1],
        first_number=number[:, 0],
        last_number=number[:, -1],
        first_real=real[:, 0],
        last_real=real[:, -1],
        first_start=column.where(start, real.shape[1]).amin(1),
        last_start=column.where(start, -1).amax(1),
        has_inner_padding=(real[:, 1:] & ~real[:, :-1]).any(1),
        has_falling_number=(real[:, 1:] & (number[:, 1:] < number[:, :-1])).any(1),
    )
    return torch.stack([x.long() for x in fields]), start


@dataclass(frozen=True)
class ActiveSplit:
    """For models that are given parts of sequences: which processes share a sequence, and in which layout."""

    group: dist.ProcessGroup | None
    layout: str

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def sequence(self, local_length: int, device: torch.device) -> SequenceSplit:
        """The sequence of which this process was given `local_length` tokens. Every process calls this, and all of
        them refuse together. Two numbers travel, on `device`.

        Raises:
            ValueError: if other processes have more or fewer, or if the length cannot be split so.
        """
        ends = torch.tensor([local_length, -local_length], device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        longest, shortest = ends[0].item(), -ends[1].item()
        if longest != shortest:
            raise ValueError(
                f"The processes hold parts of {shortest} to {longest} tokens of a sequence, and must hold equal ones: "
                f"pad it to a multiple of {2 * self.world_size} (`pad_to_multiple_of={2 * self.world_size}`)."
            )
        rank = dist.get_rank(self.group)
        return SequenceSplit(local_length * self.world_size, self.world_size, rank, self.layout, self.group)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Over all processes, without gradients."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def all_agree(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on all processes: what sends must be done by all, or be left by all."""
        agreed = torch.tensor(int(flag), device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.group)
        return bool(agreed)

    def average(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, with the gradient of this one's: FSDP and DDP take the mean of gradients."""
        return loss + (self.sum(loss) / self.world_size - loss.detach())


# One for all copies of this file: code that came with weights has its own
_explicit: ContextVar[ActiveSplit | None] = vars(dist).setdefault(
    "_longnet_split", ContextVar("longnet_split", default=None)
)


@contextlib.contextmanager
def split_sequence(group: dist.ProcessGroup | None = None, layout: str = "head_tail") -> Iterator[None]:
    """Inside, models take their inputs for this process's part of a sequence that is split over `group`.

    Accelerate's `maybe_context_parallel`, and with it Trainer under `ParallelismConfig(cp_size=...)`, does the same.
    All processes call the model, with as many tokens each: those at [`SequenceSplit.positions`]. Labels come shifted
    (`shift_labels`), and `position_ids`, where given, are those of the whole sequence. The loss is that of the whole
    sequence on every process; the mean of the processes' gradients is its gradient, as DDP and FSDP take it. Logits,
    also those of `logits_to_keep`, are of this process's tokens. All processes give the same arguments: where one of
    them gives a mask and the others none, they wait for one another.

    Of another model with dilated attention `position_ids` must be given, and its loss is this process's: give
    `num_items_in_batch`, the number of labels on all processes over their number.

    Args:
        group: of the processes; default: all.
        layout: `"head_tail"` or `"contiguous"`, see [`SequenceSplit`].

    ```python
    >>> split = SequenceSplit(input_ids.shape[1], dist.get_world_size(), dist.get_rank())
    >>> mine = split.positions()
    >>> shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    >>> with split_sequence():
    ...     loss = ddp_model(input_ids[:, mine], shift_labels=shift_labels[:, mine]).loss
    >>> loss.backward()
    ```"""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}.")
    if not is_distributed():
        raise ValueError("`split_sequence` needs a process group: call `torch.distributed.init_process_group`.")
    token = _explicit.set(ActiveSplit(group, layout))
    try:
        yield
    finally:
        _explicit.reset(token)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def active_split() -> ActiveSplit | None:
    """Whether models are given parts of sequences here; `None` if they are not."""
    return _active_split() if is_distributed() else None


@torch.compiler.disable  # a break that one process does not pay for
def _active_split() -> ActiveSplit | None:
    if _explicit.get() is not None:
        return _explicit.get()
    # PyTorch's `context_parallel` replaces this function as long as it is active
    if not (F.scaled_dot_product_attention.__module__ or "").startswith("torch.distributed"):
        return None
    from torch.distributed.tensor.experimental._attention import _cp_options

    try:
        from accelerate.data_loader import DataLoaderDispatcher
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        mesh = None
    else:
        mesh = AcceleratorState._shared_state.get("device_mesh")
    if mesh is None or "cp" not in mesh.mesh_dim_names:
        raise ValueError(
            "PyTorch's `context_parallel` is active without Accelerate's `ParallelismConfig(cp_size=...)`, and does "
            "not tell dilated attention which processes share the sequence: use `longnet_hf.split_sequence(group)`."
        )
    if isinstance(GradientState().active_dataloader, DataLoaderDispatcher):
        raise ValueError(
            "Of a dataset that is dispatched, as a streamed one is, Accelerate gives every process other rows, also "
            "those that share a sequence: give Trainer `accelerator_config={'dispatch_batches': False}`."
        )
    return ActiveSplit(mesh["cp"].get_group(), "head_tail" if _cp_options.enable_load_balance else "contiguous")


class _Run(NamedTuple):
    """Tokens that attend to one another: of one document that began before their chunk, or of all that begin in it."""

    index: tuple  # into [B, H, N / P, ...]
    position: int  # of the first, in its document
    document_ids: torch.Tensor | None = None  # of tokens whose documents begin here; None: one per row
    past: tuple[PastTile, ...] = ()  # over what was received


class _Exchange(NamedTuple):
    """What a process sends and gets, in rows: the keys and values of one head at one position."""

    send_splits: list[int]  # rows for every process
    receive_splits: list[int]
    sent_keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # row of the batch, head and column of each, once
    send_order: torch.Tensor  # [rows to send], numbers of `sent_keys`: some go to several processes
    runs: list[_Run]


class _Request(NamedTuple):
    """The keys that a chunk asks for in one branch."""

    chunk: int  # number among the chunks of its process
    row: int  # of the batch
    branch: int
    head: int
    keys: range  # positions in the sequence
    document_start: int  # position where their document begins


class SplitDocuments:
    """Where the documents lie of a batch whose rows are split alike: see [`SequenceSplit.find_documents`].

    Args:
        split: which positions every process holds.
        before: for every chunk of the sequence (in order of position) and row, how many tokens of the document of its
            first token lie before it.
        leads: for every chunk of this process and row, how many tokens go on with a document that began before.
        document_ids: for every chunk of this process, `[B, tokens]` int32, -1 at those; `None` in place of all of
            them: every row is one document.
    """

    def __init__(
        self,
        split: SequenceSplit,
        before: tuple[tuple[int, ...], ...],
        leads: tuple[tuple[int, ...], ...],
        document_ids: tuple[torch.Tensor, ...] | None = None,
    ):
        self.split, self.before, self.leads = split, before, leads
        self.is_one_per_row = document_ids is None
        self.document_ids = (None,) * len(leads) if document_ids is None else document_ids
        self._exchanges: dict[tuple, _Exchange] = {}

    def exchange(self, pattern: DilatedPattern, num_heads: int, device: torch.device) -> _Exchange:
        key = pattern, num_heads, device
        if key not in self._exchanges:
            self._exchanges[key] = self._plan(*key)
        return self._exchanges[key]

    def _requests(self, rank: int, pattern: DilatedPattern, num_heads: int) -> Iterator[_Request]:
        """What a process asks for."""
        for number, chunk in enumerate(self.split.chunks(rank)):
            for row, before in enumerate(self.before[chunk.start // len(chunk)]):
                start = chunk.start - before
                for index, branch in enumerate(pattern.branches):
                    for head in range(num_heads) if before else ():
                        keys = pattern.past_keys(branch, head, num_heads, before)
                        keys = range(keys.start + start, keys.stop + start, keys.step)
                        yield _Request(number, row, index, head, keys, start)

    def _codes(self, request: _Request, keys: range, num_heads: int) -> np.ndarray:
        """One number for every key. Branches and chunks that ask for the same keys get them once."""
        first = (request.row * num_heads + request.head) * self.split.length
        return first + np.arange(keys.start, keys.stop, keys.step)

    def _plan(self, pattern: DilatedPattern, num_heads: int, device: torch.device) -> _Exchange:
        send_splits, sent_keys, send_order = self._plan_sending(pattern, num_heads)
        receive_splits, row_of_key = self._plan_receiving(pattern, num_heads)
        return _Exchange(
            send_splits,
            receive_splits,
            tuple(torch.from_numpy(x).to(device) for x in sent_keys),
            torch.from_numpy(send_order).to(device),
            self._plan_runs(pattern, num_heads, row_of_key, device),
        )

    def _plan_sending(self, pattern: DilatedPattern, num_heads: int) -> tuple[list[int], tuple, np.ndarray]:
        """The fields of an `_Exchange` about what this process sends."""
        split, for_rank = self.split, []
        for rank in range(split.world_size):
            codes = [np.empty(0, dtype=np.int64)]
            for request in self._requests(rank, pattern, num_heads):
                for chunk, _ in split.local_chunks():
                    codes.append(self._codes(request, clip(request.keys, chunk.start, chunk.stop), num_heads))
            for_rank.append(np.unique(np.concatenate(codes)))
        codes, send_order = np.unique(np.concatenate(for_rank), return_inverse=True)
        rows_and_heads, positions = np.divmod(codes, split.length)
        columns = np.zeros_like(positions)
        for chunk, where in split.local_chunks():
            is_here = (positions >= chunk.start) & (positions < chunk.stop)
            columns[is_here] = positions[is_here] - chunk.start + where.start
        return list(map(len, for_rank)), (*np.divmod(rows_and_heads, num_heads), columns), send_order

    def _plan_receiving(self, pattern: DilatedPattern, num_heads: int) -> tuple[list[int], dict[tuple, tuple]]:
        """How many rows come from every process; and by chunk, row, branch and head of a request: the position in its
        document of the first key, the step between keys, and the received rows where they are."""
        split, requests = self.split, list(self._requests(self.split.rank, pattern, num_heads))
        codes = [self._codes(request, request.keys, num_heads) for request in requests]
        asked, number = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *codes]), return_inverse=True)
        begins = np.array([(chunk.start, rank) for rank in range(split.world_size) for chunk in split.chunks(rank)])
        begins = begins[np.argsort(begins[:, 0])]
        owner = begins[np.searchsorted(begins[:, 0], asked % split.length, side="right") - 1, 1]
        received = np.empty(len(owner), dtype=np.int64)  # rows come sorted by process, and then as they are sent
        received[np.argsort(owner, kind="stable")] = np.arange(len(owner))
        received, row_of_key, stop = received[number], {}, 0
        for request in requests:
            start, stop = stop, stop + len(request.keys)
            first = request.keys.start - request.document_start
            row_of_key[request[:4]] = first, request.keys.step, received[start:stop]
        return np.bincount(owner, minlength=split.world_size).tolist(), row_of_key

    def _plan_runs(
        self, pattern: DilatedPattern, num_heads: int, row_of_key: dict[tuple, tuple], device: torch.device
    ) -> list[_Run]:
        """What attends to what, chunk by chunk."""
        runs = []
        for number, (chunk, columns) in enumerate(self.split.local_chunks()):
            if min(self.leads[number]) < len(chunk):
                runs.append(_Run((slice(None), slice(None), columns), 0, self.document_ids[number]))
            alike: dict[tuple[int, int], list[int]] = {}
            for row, parts in enumerate(zip(self.before[chunk.start // len(chunk)], self.leads[number], strict=True)):
                alike.setdefault(parts, []).append(row)
            for (before, lead), rows in alike.items():
                if lead == 0:
                    continue

                def find(branch: int, heads: np.ndarray, positions: np.ndarray, number=number, rows=rows):
                    received = np.empty((len(rows), *positions.shape), dtype=np.int64)
                    for i, row in enumerate(rows):
                        for j, head in enumerate(heads[:, 0].tolist()):
                            first, step, of_keys = row_of_key[number, row, branch, head]
                            received[i, j] = of_keys[(positions[j] - first) // step]
                    return (received,)

                in_batch = slice(None) if len(rows) == len(self.leads[number]) else torch.tensor(rows, device=device)
                index = in_batch, slice(None), slice(columns.start, columns.start + lead)
                past = past_tiles(pattern, num_heads, before, lead, find, device)
                runs.append(_Run(index, before, None, tuple(past)))
        return runs


@functools.lru_cache(maxsize=16)
def whole_rows(split: SequenceSplit, batch_size: int) -> SplitDocuments:
    """A batch whose rows hold one document each."""
    before = [(chunk.start,) * batch_size for rank in range(split.world_size) for chunk in split.chunks(rank)]
    chunks = split.chunks(split.rank)
    leads = tuple((len(chunk) if chunk.start else 0,) * batch_size for chunk in chunks)
    return SplitDocuments(split, tuple(sorted(before)), leads)


@torch.compiler.disable
def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    batch: SplitDocuments,
    scale: float | None = None,
    kept: dict | None = None,
) -> torch.Tensor:
    """Causal dilated attention of the tokens of this process to those of all processes, which all call this.

    Args:
        query: `[B, H, N / P, D]`.
        key, value: `[B, Hkv, N / P, D]`.
        batch: which positions and documents these are.
        kept: a dict that takes the result of the first call and gives it to the second one, as in `dilated_attention`,
            but whatever looks at operators. All processes give one, or none does: what is kept is not sent again.

    Returns:
        `[B, H, N / P, D]`: what `dilated_attention` of the whole sequence gives at these positions.
    """
    expected = len(batch.before[0]), batch.split.length // batch.split.world_size
    if (query.shape[0], query.shape[2]) != expected:
        raise ValueError(
            f"`batch` is of {expected[0]} rows of which every process has {expected[1]} tokens, got "
            f"{query.shape[0]} rows of {query.shape[2]}."
        )
    query, key, value = autocast_inputs(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    pattern = pattern.canonical()
    options = pattern, batch.exchange(pattern, key.shape[1], query.device), batch.split, scale
    result = keep_for_second(kept, lambda: _attend(query, key, value, *options))
    return _SplitAttention.apply(*result, query, key, value, options)


def _attend(query, key, value, pattern: DilatedPattern, plan: _Exchange, split: SequenceSplit, scale: float):
    """Output, log-sum-exp, and the keys and values that other processes sent."""
    rows = torch.cat([x[plan.sent_keys] for x in (key, value)], dim=-1)[plan.send_order]
    received = rows.new_empty(sum(plan.receive_splits), rows.shape[1])
    work = dist.all_to_all_single(
        received, rows, plan.receive_splits, plan.send_splits, group=split.group, async_op=True
    )
    parts = []
    for run in plan.runs:
        q, k, v = (x[run.index] for x in (query, key, value))
        options = dict(scale=scale, document_ids=run.document_ids, return_lse=True)
        parts.append(dilated_attention(q, k, v, pattern.at(run.position), **options))
    work.wait()
    kernel, output = TileKernel(query, scale, 0.0, None), torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=parts[0][1].dtype, device=query.device)
    stored = received.chunk(2, dim=-1)
    for run, (new_output, new_lse) in zip(plan.runs, parts, strict=True):
        attend_to_past(new_output, new_lse, query[run.index], *stored, run.past, key.shape[1], kernel)
        output[run.index], lse[run.index] = new_output, new_lse
    return output, lse, received


class _SplitAttention(torch.autograd.Function):
    """The output of [`_attend`], with the gradients that it has."""

    @staticmethod
    def forward(ctx, output, lse, received, query, key, value, options):
        ctx.save_for_backward(query, key, value, output, lse, received)
        ctx.options = options
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, output, lse, received = ctx.saved_tensors
        pattern, plan, split, scale = ctx.options
        heads, kernel = key.shape[1], TileKernel(query, scale, 0.0, None)
        add_query_gradients, stored = [], received.chunk(2, dim=-1)
        grad_received = torch.zeros(received.shape, dtype=lse.dtype, device=received.device)
        for run in plan.runs:
            saved = (x[run.index] for x in (grad_output, query, output, lse))
            add_query_gradients.append(past_gradients(*saved, *stored, run.past, heads, kernel, grad_received))
        grad_received = grad_received.to(received.dtype)  # named, so that it lives until the exchange is over
        grad_rows = received.new_empty(sum(plan.send_splits), received.shape[1])
        work = dist.all_to_all_single(
            grad_rows, grad_received, plan.send_splits, plan.receive_splits, group=split.group, async_op=True
        )
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for run, add_to_queries in zip(plan.runs, add_query_gradients, strict=True):
            # Output and log-sum-exp of the whole softmax give each part its share
            saved = (x[run.index] for x in (grad_output, query, key, value, output, lse))
            part = backward_op(*saved, run.document_ids, pattern.at(run.position).to_json(), True, scale, 0.0, None)
            add_to_queries(part[0])
            for grad, x in zip(grads, part, strict=True):
                grad[run.index] = x  # tokens that go on with a document have another run before, which gives them 0
        work.wait()
        # A key may have gone to several processes
        sums = grad_rows.new_zeros(len(plan.sent_keys[0]), grad_rows.shape[1], dtype=lse.dtype)
        sums.index_add_(0, plan.send_order, grad_rows.to(lse.dtype))
        for grad, x in zip(grads[1:], sums.chunk(2, dim=-1), strict=True):
            grad[plan.sent_keys] = (grad[plan.sent_keys] + x).to(grad.dtype)
        return None, None, None, *grads, None


__all__ = ["ActiveSplit", "SequenceSplit", "split_attention", "split_sequence"]
