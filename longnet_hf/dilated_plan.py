"""What the kernels of dilated_kernels.py launch: which programs, and what each of them has to know, as tables.

A table holds records of integers, whose fields have the same names here and in the kernels. It is made on the CPU, in
NumPy, and copied to the GPU once for all layers with a pattern, as long as the documents of a batch lie alike.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from .dilated_pattern import Branch, DilatedPattern
from .documents import Document
from .input_checks import is_captured, refuse_capture


try:  # optional: of code from the Hub, Transformers requires whatever is imported outside of `try`
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error


# A program's record: its document (the fields of `Document`) and block; of dense programs, the number of their first
# entry; of dilated ones, their branch and its rate, where the segment that they work in starts, the window's length (0
# for a segment), and the distances from the start, as multiples of the rate and rests, to the segment's stop, to where
# the queries begin, and to where the keys do; of dense ones of keys, which of the sink's parts are of their document.
ROW, KEY_COLUMN, QUERY_COLUMN, LENGTH, FIRST_QUERY, BLOCK_NUMBER, ENTRY_OR_BRANCH = map(tl.constexpr, range(7))
PROGRAM_RATE, SEGMENT_START, PROGRAM_WINDOW = map(tl.constexpr, range(7, 10))
TO_STOP, TO_STOP_REST, TO_QUERIES, TO_QUERIES_REST, TO_KEYS, TO_KEYS_REST = map(tl.constexpr, range(10, 16))
FIRST_CHUNK, NUM_CHUNKS = map(tl.constexpr, range(16, 18))
PROGRAM_SIZE = tl.constexpr(18)
# A head: its number, among the key/value heads; how many keys of the sink it has, and from which position on no other
# branch joins a query to any of them; its phase in every branch, or -1 where it does not have the branch.
HEAD, SINKS, SINK_EXTENT, FIRST_PHASE = map(tl.constexpr, range(4))
# An entry, for a document and a branch: length, rate and shift of the grid (a window's is one segment); the window's
# length, 0 for a segment.
GRID_LENGTH, GRID_RATE, GRID_SHIFT, WINDOW_LENGTH = map(tl.constexpr, range(4))
ENTRY_SIZE = tl.constexpr(4)


class Plan(NamedTuple):
    """Which programs to launch, as tables of int32 on the device, whose records are described at the top.

    `dense` and each of `dilated` have a program's record for every program of a launch, `entries` one for every
    document and branch, the dense branches first. What differs from head to head, and so from layer to layer, stands
    in a table of its own (`make_head_table`).
    """

    dense: torch.Tensor
    dilated: tuple[torch.Tensor, ...]  # a launch for every dilated branch
    entries: torch.Tensor
    num_dense: int
    num_branches: int
    is_unit: bool  # every dense branch has r = 1
    is_short: bool  # some segments of dense branches are shorter than a block
    sinks: torch.Tensor  # programs that take `sink_chunk` queries through the sink, for the gradients of its keys
    sink_rows: int
    sink_chunk: int
    launches: dict  # what has been launched with it, prepared, by how the tensors lay


# By identity: what CUDA graphs read whenever they are replayed, which must stay although others are forgotten
_in_cuda_graphs: dict[int, "Plan | torch.Tensor"] = {}


def find_tables(
    pattern: DilatedPattern,
    num_kv_heads: int,
    documents: tuple[Document, ...],
    block: int,
    of_queries: bool,
    is_causal: bool,
    device: torch.device,
) -> tuple[Plan, torch.Tensor]:
    """The plan for blocks of queries or of keys, and the table of the heads."""
    plan = make_plan(without_heads(pattern), documents, block, of_queries, is_causal, device)
    head_table = make_head_table(pattern, num_kv_heads, of_queries, device)
    if is_captured(device):
        _in_cuda_graphs.update((id(x), x) for x in (plan, head_table))
    return plan, head_table


# Of `refuse_capture`
_NOT_YET_RUN = (
    "of a shape that has not been computed before, or not lately: run what is captured at least once, with inputs of "
    "the same shapes, right before it is captured."
)

# Queries that one program takes through the sink, of up to 64 keys; through longer ones as many times more
_SINK_CHUNK = 1024


@functools.lru_cache(maxsize=1024)
def without_heads(pattern: DilatedPattern) -> DilatedPattern:
    """The pattern without what differs from head to head, for which there is one plan."""
    return replace(pattern, head_offset="paper", layer_idx=0, branch_heads=None)


def _ordered_branches(pattern: DilatedPattern, of_queries: bool) -> tuple[list[Branch], int]:
    """The branches, dense ones first, and how many these are. The sink is not among them."""

    def is_dilated(branch: Branch) -> bool:
        return branch.rate > 1 and not (of_queries and branch.type == "window")

    branches = sorted((branch for branch in pattern.branches if branch.type != "sink"), key=is_dilated)
    return branches, sum(not is_dilated(branch) for branch in branches)


@functools.lru_cache(maxsize=1024)
def make_head_table(
    pattern: DilatedPattern, num_kv_heads: int, of_queries: bool, device: torch.device
) -> torch.Tensor:
    """A record for every key/value head, those with most to do first, with the phases in the order of the plan:
    `[heads, fields]`. A window's grid is moved by its phase alone."""
    refuse_capture(device, _NOT_YET_RUN)
    branches, _ = _ordered_branches(pattern, of_queries)
    sink = next((branch for branch in pattern.branches if branch.type == "sink"), None)

    def phase(branch: Branch, head: int) -> int:
        phase = pattern.phase(branch, head, num_kv_heads)
        if not branch.belongs_to(head):
            return -1
        return (phase - pattern.grid_shift(branch)) % branch.rate if branch.type == "window" else phase

    def record(head: int) -> list[int]:
        has_sink = sink is not None and sink.belongs_to(head) and not pattern.is_unbounded(head)
        sinks = count_sinks(pattern) if has_sink else 0
        extent = pattern.sink_extent([x for x in branches if x.belongs_to(head)], sinks) if sinks else 0
        return [head, min(sinks, 2**31 - 1), min(extent, 2**31 - 1), *(phase(branch, head) for branch in branches)]

    def work(head: int) -> tuple[bool, float]:
        return pattern.is_unbounded(head), pattern.max_live_keys(head) or 0

    heads = sorted(range(num_kv_heads), key=work, reverse=True)
    return torch.tensor([record(head) for head in heads], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=32)
def make_plan(
    pattern: DilatedPattern,
    documents: tuple[Document, ...],
    block: int,
    of_queries: bool,
    is_causal: bool,
    device: torch.device,
) -> Plan:
    """The plan for blocks of queries or of keys of the documents, for a pattern `without_heads`."""
    refuse_capture(device, _NOT_YET_RUN)
    table = np.array(documents, dtype=np.int64).reshape(-1, len(Document._fields))
    length, first_query = table[:, LENGTH.value], table[:, FIRST_QUERY.value]
    first = first_query * of_queries
    branches, num_dense = _ordered_branches(pattern, of_queries)
    reverse = of_queries and is_causal  # the blocks with most to do come first

    dense, document, number = _programs(table, -(-(length - first) // block), reverse)
    dense[:, BLOCK_NUMBER.value], dense[:, ENTRY_OR_BRANCH.value] = number, document * len(branches)
    entries = np.zeros((len(documents), len(branches), ENTRY_SIZE.value), dtype=np.int64)
    dilated, is_short = [], False
    for index, branch in enumerate(branches):
        r = branch.rate
        if branch.type == "window":
            w, g = length, 0 * length
            window = length if branch.length is None else np.minimum(branch.length, length)
        else:  # a segment longer than the document is as good as a shorter one that holds as much of it
            g, window = pattern.grid_shift(branch), 0
            whole = branch.length >= length + g
            needless = np.maximum(0, branch.length - length) // r * r
            w, g = np.where(whole, length + g % r, branch.length - needless), np.where(whole, g % r, g - needless)
            is_short |= index < num_dense and bool((~whole).any()) and branch.length < block
        entry = entries[:, index]
        for field, x in ((GRID_LENGTH, w), (GRID_RATE, r), (GRID_SHIFT, g), (WINDOW_LENGTH, window)):
            entry[:, field.value] = x
        if index >= num_dense:
            dilated.append(_dilated_programs(table, entry, index, block, first, reverse))
    sink_rows = 0 if of_queries else min(count_sinks(pattern), int(length.max(initial=0)))
    sink_chunk = _SINK_CHUNK * max(1, sink_rows // 64)
    sinks = np.zeros((0, PROGRAM_SIZE.value), dtype=np.int32)
    if sink_rows:
        counts = -(-(length - first_query) // sink_chunk)
        sinks, of_chunk, number = _programs(table, counts, False)
        sinks[:, BLOCK_NUMBER.value], sinks[:, ENTRY_OR_BRANCH.value] = number, of_chunk * len(branches)
        dense[:, FIRST_CHUNK.value] = (np.cumsum(counts) - counts)[document]
        dense[:, NUM_CHUNKS.value] = counts[document]
    is_unit = all(branch.rate == 1 for branch in branches[:num_dense])
    dense, entries, sinks, *dilated = _on_device((dense, entries.astype(np.int32), sinks, *dilated), device)
    return Plan(
        dense, tuple(dilated), entries, num_dense, len(branches), is_unit, is_short, sinks, sink_rows, sink_chunk, {}
    )


def count_sinks(pattern: DilatedPattern) -> int:
    """How many keys of the sink there are behind where the pattern begins."""
    return sum(max(0, branch.length - pattern.offset) for branch in pattern.branches if branch.type == "sink")


def _programs(documents: np.ndarray, counts: np.ndarray, reverse: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records of `counts` programs for every document, with the document's number and the program's."""
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    if reverse:
        number = counts[document] - 1 - number
    records = np.zeros((len(document), PROGRAM_SIZE.value), dtype=np.int32)
    records[:, : documents.shape[1]] = documents[document]
    return records, document, number


def _dilated_programs(
    documents: np.ndarray, entry: np.ndarray, branch: int, block: int, first: np.ndarray, reverse: bool
) -> np.ndarray:
    """Records of a dilated branch, for blocks of the rows from the positions `first` on."""
    length = documents[:, LENGTH.value]
    w, r, g, window = (entry[:, field.value] for field in (GRID_LENGTH, GRID_RATE, GRID_SHIFT, WINDOW_LENGTH))
    first_segment = (first + g) // w
    segments = np.where(length > first, (length - 1 + g) // w - first_segment + 1, 0)
    rows = np.minimum(-(-w // r), -(-(length - first) // r))  # per segment, at most
    blocks = -(-rows // block)
    records, document, number = _programs(documents, segments * blocks, reverse)
    segment, number = first_segment[document] + number // blocks[document], number % blocks[document]
    w, r, g, window, length = (x[document] for x in (w, r, g, window, length))
    start = segment * w - g
    records[:, BLOCK_NUMBER.value], records[:, ENTRY_OR_BRANCH.value] = number, branch
    records[:, PROGRAM_RATE.value], records[:, SEGMENT_START.value] = r, start
    records[:, PROGRAM_WINDOW.value] = window
    stop, first_query = np.minimum(start + w, length), documents[document, FIRST_QUERY.value]
    for field, end in ((TO_STOP, stop), (TO_QUERIES, first_query), (TO_KEYS, 0)):
        records[:, field.value], records[:, field.value + 1] = np.divmod(end - start, r)
    return records


def _on_device(tables: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tables of int32, in one copy to the device; each begins at a multiple of 16 bytes, whatever the others hold."""
    starts = np.cumsum([0] + [-(-table.size // 4) * 4 for table in tables])
    # PyTorch gives pinned memory out again; page faults of fresh memory may take longer than what is written there
    joined = torch.empty(int(starts[-1]), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    for start, table in zip(starts, tables, strict=False):
        joined.numpy()[start : start + table.size] = table.ravel()
    joined = joined.to(device)
    return [joined[start : start + table.size] for start, table in zip(starts, tables, strict=False)]
