"""Where the documents of a batch lie: what a user may say of padding and packing, checked and read in one place.

Shapes: B batch, H heads, Nq queries (the last of N positions), N keys, D head size.
"""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .input_checks import check_mask, check_tensor, refuse_capture


# Of `refuse_capture`
_ASKS_THE_GPU = (
    "that was given a mask or documents: where these lie is asked of the GPU, and a graph would keep the answer. "
    "Capture without `attention_mask`, `position_ids`, `cu_seq_lens` and `document_ids`: rows of one document each."
)


class Document(NamedTuple):
    """Where one document lies, for the operator and its kernels: position p of it is column `key_column + p` of the
    keys, and column `query_column + p` of the queries."""

    row: int  # of the batch
    key_column: int
    query_column: int  # negative if position 0 is not among the queries
    length: int
    first_query: int  # the position of its first query


def check_position_shape(position_ids: torch.Tensor, batch_size: int, length: int) -> None:
    if tuple(position_ids.shape) not in ((batch_size, length), (1, length)):
        shapes = " or ".join(map(str, dict.fromkeys([(batch_size, length), (1, length)])))
        raise ValueError(f"`position_ids` must have shape {shapes}, got {tuple(position_ids.shape)}.")


def find_documents(
    batch_size: int,
    length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Which document every token belongs to, from any of the three ways in which Transformers says it.

    Arguments as in [`dilated_attention`]. Returns int32 `[B, N]`, numbered from 0 in every row, -1 at padding; `None`
    if no argument is given, or if every row is one document without padding (not looked at under `torch.compile`).
    """
    if attention_mask is None and position_ids is None and cu_seq_lens is None:
        return None
    if position_ids is not None:
        check_tensor("position_ids", position_ids, "integers")
    if attention_mask is not None:
        check_padding_mask(attention_mask, (batch_size, length))
    if cu_seq_lens is not None:
        check_cu_seq_lens(cu_seq_lens, batch_size * length)
    device = next(x.device for x in (attention_mask, position_ids, cu_seq_lens) if x is not None)
    refuse_capture(device, _ASKS_THE_GPU)
    if attention_mask is None:
        real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    else:
        real = attention_mask != 0
    # Not the running sum of a mask without starts: Inductor makes int64 of the running sum of a constant
    ids = torch.zeros_like(real, dtype=torch.int32)
    if position_ids is not None:
        check_position_shape(position_ids, batch_size, length)
        position_ids = position_ids.to(device).expand(batch_size, length)
        columns = torch.arange(length, device=device).expand(batch_size, length)
        last_real = running_max(columns.masked_fill(~real, -1))[:, :-1]
        before = position_ids.gather(1, last_real.clamp(min=0)).masked_fill(last_real < 0, -1)
        starts = (position_ids[:, 1:] <= before) & (last_real >= 0) & real[:, 1:]
        ids[:, 1:] = starts.cumsum(1, dtype=torch.int32)
    if cu_seq_lens is not None:
        flat = torch.arange(batch_size * length, device=device)
        document = torch.searchsorted(cu_seq_lens.to(device), flat, right=True).view(batch_size, length)
        ids = ids + (document - document[:, :1]).to(torch.int32)
    if not torch.compiler.is_compiling() and bool(real.all()) and bool((ids == 0).all()):
        return None
    return ids.masked_fill(~real, -1)


def running_max(x: torch.Tensor) -> torch.Tensor:
    """The largest of the numbers `[B, N]` up to each column."""
    if torch.onnx.is_in_onnx_export():  # which has no such operator
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return x[:, None].masked_fill(later, torch.iinfo(x.dtype).min).amax(-1)
    return x.cummax(dim=1).values


def resolve_documents(
    batch_size: int, length: int, document_ids: torch.Tensor | None, **given: torch.Tensor | None
) -> torch.Tensor | None:
    """The `document_ids` that a user gave, checked, or what [`find_documents`] makes of the other arguments."""
    if document_ids is None:
        return find_documents(batch_size, length, **given)
    if any(x is not None for x in given.values()):
        raise ValueError(
            "`document_ids` replaces `attention_mask`, `position_ids` and `cu_seq_lens`: give one or the other."
        )
    check_tensor("document_ids", document_ids, "integers", batch_size, length)
    return document_ids


def check_padding_mask(attention_mask: torch.Tensor, shape: tuple[int, int], meaning: str = "(batch, keys)") -> None:
    """Refuse what is no padding mask of a shape; `meaning` says what the two numbers count."""
    check_mask("attention_mask", attention_mask)
    if attention_mask.shape != shape:
        raise ValueError(
            f"`attention_mask` must be a 2-D padding mask of shape {shape} {meaning}, got "
            f"{tuple(attention_mask.shape)}."
            + (
                " Masks of more dimensions are not supported: the pattern decides who attends to whom."
                if attention_mask.dim() > 2
                else ""
            )
        )


def check_cu_seq_lens(cu_seq_lens: torch.Tensor, total: int, tokens: str = "tokens in the batch") -> None:
    """Refuse boundaries of documents that do not grow from 0 to `total`, the number of `tokens`."""
    check_tensor("cu_seq_lens", cu_seq_lens, "integers")
    if cu_seq_lens.dim() != 1:
        raise ValueError(f"`cu_seq_lens` must have one dimension, got shape {tuple(cu_seq_lens.shape)}.")
    if torch.compiler.is_compiling():
        return
    refuse_capture(cu_seq_lens.device, _ASKS_THE_GPU)
    ends = cu_seq_lens[[0, -1]].tolist() if len(cu_seq_lens) else []
    if ends != [0, total] or bool((cu_seq_lens.diff() < 0).any()):
        raise ValueError(
            f"`cu_seq_lens` must grow from 0 to {total}, the number of {tokens}, got {len(cu_seq_lens)} numbers from "
            f"{ends[:1]} to {ends[1:]}."
        )


def positions_in_documents(document_ids: torch.Tensor) -> torch.Tensor:
    """How many tokens of its own document stand before each token, `[B, N]`; padding counts as a document."""
    if torch.onnx.is_in_onnx_export():  # which has no stable sorting
        return (document_ids[:, :, None] == document_ids[:, None, :]).tril(-1).sum(-1)
    order = document_ids.argsort(dim=1, stable=True)
    grouped = document_ids.gather(1, order)
    column = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    first = running_max(column.masked_fill(~begins, 0))
    return (column - first).gather(1, order.argsort(dim=1))


def is_packed(document_ids: torch.Tensor | None) -> bool:
    """Whether any row `[B, N]` holds more than one document (not looked at under `torch.compile`)."""
    if document_ids is None or torch.compiler.is_compiling():
        return False
    first = document_ids.masked_fill(document_ids < 0, torch.iinfo(document_ids.dtype).max).amin(1)
    return bool((document_ids.amax(1) > first).any())


class BatchDocuments:
    """The documents of a batch for the operator, which computes where they lie or, if they are in several pieces, on a
    copy, to and from which tensors are packed and unpacked. In it they lie end to end in one row, without padding, or
    each begins a row of its own."""

    def __init__(self, query, key, documents, query_rows=None, key_rows=None):
        self.query_shape, self.key_shape = query.shape, key.shape
        self.documents: tuple[Document, ...] = tuple(documents)
        # Where the copy's tokens are in the flattened batch, `[tokens]` or, of rows, `[documents, tokens]` with -1
        # behind the end of a document; `None`: no copy
        self.query_rows, self.key_rows = query_rows, key_rows

    @classmethod
    def find(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        document_ids: torch.Tensor | None,
        in_place: bool = False,
        is_causal: bool = False,
    ) -> "BatchDocuments":
        """With `in_place`, documents without padding inside are left where they are. Otherwise, if `is_causal`, those
        of about the same length are rows of one length: what lies behind the end of one is not seen."""
        if document_ids is not None:  # of which the pieces are remembered, without asking again
            refuse_capture(document_ids.device, _ASKS_THE_GPU)
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        first_column = keys - queries  # of the queries among the keys
        pieces = [(row, 0, keys) for row in range(batch)] if document_ids is None else None
        if in_place and document_ids is not None:
            pieces = _remembered_pieces(document_ids)
        if pieces is not None:
            documents = [
                Document(row, start, start - first_column, length, min(length, max(0, first_column - start)))
                for row, start, length in pieces
            ]
            return cls(query, key, documents)
        row = torch.arange(batch, device=document_ids.device)[:, None]
        ids = (document_ids.long() + row * (document_ids.max() + 1)).flatten()
        real = (document_ids >= 0).flatten()
        key_rows = real.nonzero()[:, 0]
        key_rows = key_rows[ids[key_rows].argsort(stable=True)]
        column = key_rows % keys
        is_query = column >= first_column
        query_rows = (key_rows // keys * queries + column - first_column)[is_query]
        _, document, key_counts = ids[key_rows].unique_consecutive(return_inverse=True, return_counts=True)
        longest = int(key_counts.max()) if len(key_counts) > 1 else 0
        if is_causal and not in_place and queries == keys and 0 < len(key_counts) * longest <= 2 * len(key_rows):
            rows = key_rows.new_full((len(key_counts), longest), -1)
            position = torch.arange(len(key_rows), device=rows.device) - (key_counts.cumsum(0) - key_counts)[document]
            rows[document, position] = key_rows
            return cls(query, key, [Document(row, 0, 0, longest, 0) for row in range(len(rows))], rows, rows)
        query_counts = torch.zeros_like(key_counts).index_add_(0, document, is_query.to(key_counts.dtype))
        first_query = key_counts - query_counts
        key_column = key_counts.cumsum(0) - key_counts
        query_column = query_counts.cumsum(0) - query_counts - first_query
        fields = (torch.zeros_like(key_counts), key_column, query_column, key_counts, first_query)
        documents = [Document(*numbers) for numbers in torch.stack(fields, dim=1).tolist()]
        return cls(query, key, documents, query_rows, key_rows)

    @property
    def is_end_to_end(self) -> bool:
        """Whether documents lie in one row of the copy. Otherwise all rows are alike."""
        return self.query_rows is not None and self.query_rows.dim() == 1

    def pack_queries(self, x: torch.Tensor) -> torch.Tensor:
        return self._pack(x, self.query_rows)

    def pack_keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._pack(x, self.key_rows)

    def unpack_queries(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._unpack(x, self.query_rows, like)

    def unpack_keys(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._unpack(x, self.key_rows, like)

    def unpack_lse(self, x: torch.Tensor) -> torch.Tensor:
        if self.query_rows is None:
            return x
        like = x.new_empty((*self.query_shape[:3], 1))
        return self._unpack(x[..., None], self.query_rows, like, -torch.inf)[..., 0]

    @staticmethod
    def _pack(x, rows):
        """`[B, H, N, D]` -> `[1, H, real tokens, D]`, or `[documents, H, longest, D]` with zeros behind the ends"""
        if rows is None:
            return x
        x = x.transpose(1, 2).flatten(0, 1)[rows.clamp(min=0)]
        if rows.dim() == 1:
            return x.transpose(0, 1)[None]
        return x.masked_fill_((rows < 0)[..., None, None], 0.0).transpose(1, 2)

    @staticmethod
    def _unpack(x, rows, like, padding=0.0):
        """Back to `[B, H, N, D]`, in the layout and dtype of `like`."""
        if rows is None:
            return x if x.stride() == like.stride() and x.dtype == like.dtype else torch.empty_like(like).copy_(x)
        batch, heads, length, size = like.shape
        flat = x.new_full((batch * length, heads, size), padding)
        if rows.dim() == 1:
            flat[rows] = x[0].transpose(0, 1)
        else:
            flat[rows[rows >= 0]] = x.transpose(1, 2)[rows >= 0]
        return torch.empty_like(like).copy_(flat.unflatten(0, (batch, length)).transpose(1, 2))


# Every layer asks for the documents of one batch, and to look for them waits for the GPU
_pieces_of_ids = WeakTensorKeyDictionary()


def _remembered_pieces(document_ids: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """What `_find_pieces` gives, looked for once as long as the tensor is not written to."""
    version = None if document_ids.is_inference() else document_ids._version
    if version is None:
        return _find_pieces(document_ids)
    if document_ids not in _pieces_of_ids or _pieces_of_ids[document_ids][0] != version:
        _pieces_of_ids[document_ids] = version, _find_pieces(document_ids)
    return _pieces_of_ids[document_ids][1]


def _find_pieces(document_ids: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """Row, first column and length of every document; `None` if there is padding inside one."""
    batch, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    ids = document_ids.flatten()[starts]
    starts, ids = torch.stack((starts, ids.long())).tolist()
    ends = [*starts[1:], batch * length]
    pieces, seen = [], set()
    for start, end, document in zip(starts, ends, ids, strict=True):
        if document >= 0:
            row, column = divmod(start, length)
            pieces.append((row, column, end - start))
            seen.add((row, document))
    return pieces if len(seen) == len(pieces) else None
