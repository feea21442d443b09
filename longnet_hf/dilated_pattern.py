"""The pattern of one layer of dilated attention: which query attends to which key, in plain integers.

Everything that needs to know the pattern (the dense formula, the tiles of the fast operator, the kernels, the cache)
asks `DilatedPattern`. What a user may want to ask of a pattern is in pattern_report.py.

Source: "LongNet: Scaling Transformers to 1,000,000,000 Tokens" (arXiv 2307.02486), sections 2.2-2.3.

Positions are counted from the first real token of a document: n is a query's position, m a key's, both start at 0.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple


BRANCH_TYPES = ("segment", "window")
HEAD_OFFSETS = ("paper", "grouped", "rotating")


class Branch(NamedTuple):
    """One branch of a pattern: its type, length w (`None`: unbounded) and dilation rate r, in positions."""

    type: str
    length: int | None
    rate: int


class Tile(NamedTuple):
    """A dense piece of attention: `queries` attend to `keys` (both positions), for every key/value head in `heads`.
    It belongs to the pattern's branch number `branch`.

    `mask` is `"full"` (every pair), `"lower"` (the i-th query attends to the keys up to the i-th) or `"upper"` (the
    i-th query attends to the keys from the i-th on); the latter two are square and include the diagonal. The tile
    stands `repeats` times, each `period` positions after the last.
    """

    heads: range
    mask: str
    queries: range
    keys: range
    repeats: int = 1
    period: int = 0
    branch: int = 0

    @property
    def pairs(self) -> int:
        """Number of (query, key, head) triples in the tile, repeats included."""
        rows, columns = len(self.queries), len(self.keys)
        area = rows * columns if self.mask == "full" else rows * (rows + 1) // 2
        return area * len(self.heads) * self.repeats


@dataclass(frozen=True)
class DilatedPattern:
    """The branches of one layer and the rule that gives every head its rows. Immutable and hashable.

    A branch has a type, a length w and a dilation rate r. Head j's phase in it is s_j:

    - `"segment"`, the paper's: n and m join if they lie in one segment, (n + g) // w == (m + g) // w, and both are
      kept, (n + g) % w % r == s_j and the same for m; g is 0, or w // 2 with `shift` (the first segment is then
      partial);
    - `"window"`: every query n joins the keys m with m % r == s_j and |n - m| < w. w = `None` with r = 1 is full
      attention.

    A pair counts once per branch that joins it. In causal attention only keys m <= n count.

    Args:
        segment_lengths: w of every branch, in positions (the paper's w_i).
        dilation_rates: r of every branch (the paper's r_i). Nothing requires r to divide w or the number of heads.
        branch_types: `"segment"` or `"window"` for every branch; all `"segment"` by default.
        head_offset: how s_j follows from the head j: `"paper"`, j % r (section 2.3); `"grouped"`, j // ceil(H / r)
            (torchscale's, for its published weights); `"rotating"`, (j + layer_idx * H) % r, with which few heads
            cover all phases in depth. H and j count key/value heads.
        shift: move the segment grid by w // 2.
        layer_idx: index of the layer, for `"rotating"`.
        offset: where on the grids position 0 lies: above 0 where a sequence continues another.

    Raises:
        ValueError: if an argument is not one of the above.
    """

    segment_lengths: tuple[int | None, ...]
    dilation_rates: tuple[int, ...]
    branch_types: tuple[str, ...] | None = None
    head_offset: str = "paper"
    shift: bool = False
    layer_idx: int = 0
    offset: int = 0

    def __post_init__(self):
        for name in ("segment_lengths", "dilation_rates", "branch_types"):
            value = getattr(self, name)
            if name == "branch_types" and value is None:
                value = ("segment",) * len(self.segment_lengths)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"`{name}` must be a list with one entry per branch, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if not len(self.segment_lengths) == len(self.dilation_rates) == len(self.branch_types):
            raise ValueError(
                "`segment_lengths`, `dilation_rates` and `branch_types` must have one entry per branch, got "
                f"{len(self.segment_lengths)}, {len(self.dilation_rates)} and {len(self.branch_types)} entries."
            )
        for branch in self.branches:
            if branch.type not in BRANCH_TYPES:
                raise ValueError(f"`branch_types` must be of {BRANCH_TYPES}, got {branch.type!r}.")
            if not _is_positive_int(branch.rate):
                raise ValueError(f"`dilation_rates` must be integers of at least 1, got {branch.rate!r}.")
            unbounded = branch.length is None and branch.type == "window" and branch.rate == 1
            if not unbounded and not _is_positive_int(branch.length):
                raise ValueError(
                    "`segment_lengths` must be integers of at least 1 (or None for full attention, with branch type "
                    f"'window' and dilation rate 1), got {branch.length!r} in {branch}."
                )
        if self.head_offset not in HEAD_OFFSETS:
            raise ValueError(f"`head_offset` must be one of {HEAD_OFFSETS}, got {self.head_offset!r}.")
        for name in ("layer_idx", "offset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"`{name}` must be an integer of at least 0, got {value!r}.")
        # Written once, here: torch.compile cannot trace the json module
        object.__setattr__(self, "_json", json.dumps(asdict(self)))

    @classmethod
    def full(cls, layer_idx: int = 0) -> "DilatedPattern":
        """Ordinary full attention, as a layer of a hybrid stack uses it."""
        return cls((None,), (1,), ("window",), layer_idx=layer_idx)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (patterns are small)
    def canonical(self) -> "DilatedPattern":
        """One pattern for all layers that share it, so that they share what is made from it."""
        return self if self.head_offset == "rotating" else replace(self, layer_idx=0)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def at(self, offset: int) -> "DilatedPattern":
        """The pattern of a sequence that begins `offset` positions behind this one's."""
        return replace(self, offset=self.offset + offset) if offset else self

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(map(Branch, self.branch_types, self.segment_lengths, self.dilation_rates))

    def to_json(self) -> str:
        return self._json

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def from_json(cls, text: str) -> "DilatedPattern":
        return cls(**json.loads(text))

    # Which query joins which key. `n`, `m` and `head` may be integers or integer tensors that broadcast.

    def phase(self, branch: Branch, head, num_heads: int):
        """s_j of key/value head j = `head` among `num_heads`."""
        if self.head_offset == "grouped":
            return head // -(-num_heads // branch.rate)
        first = self.layer_idx * num_heads if self.head_offset == "rotating" else 0
        return (head + first) % branch.rate

    def phases(self, branch: Branch, num_heads: int) -> list[int]:
        """The phases of all heads, each once, but for those that keep no row."""
        phases = {self.phase(branch, head, num_heads) for head in range(num_heads)}
        return sorted(s for s in phases if branch.type == "window" or s < branch.length)

    def heads_of_phase(self, branch: Branch, phase: int, num_heads: int) -> range:
        """The heads j with s_j = `phase`; always evenly spaced."""
        if self.head_offset == "grouped":
            size = -(-num_heads // branch.rate)
            return range(min(phase * size, num_heads), min((phase + 1) * size, num_heads))
        first = self.layer_idx * num_heads if self.head_offset == "rotating" else 0
        return range((phase - first) % branch.rate, num_heads, branch.rate)

    def grid_shift(self, branch: Branch) -> int:
        """g: how far the grid of a branch is moved, in positions. A window's grid has one segment without end."""
        if branch.type == "window":
            return self.offset
        return ((branch.length // 2 if self.shift else 0) + self.offset) % branch.length

    def joins(self, branch: Branch, n, m, phase):
        """Whether `branch` joins query `n` to key `m` for a head with `phase`, causality aside."""
        w, r, g = branch.length, branch.rate, self.grid_shift(branch)
        n, m = n + g, m + g
        if branch.type == "window":
            kept = m % r == phase
            return kept if w is None else kept & (n - m < w) & (m - n < w)
        return (n // w == m // w) & (n % w % r == phase) & (m % w % r == phase)

    def multiplicity(self, n, m, head, num_heads: int, is_causal: bool = True):
        """C[n, m]: in how many branches `head` joins query `n` to key `m`, as an integer (tensor).

        The paper's mixture of branches, weighted by their softmax denominators (section 2.2), is one softmax over all
        of them: softmax(QK^T / sqrt(d) + log C) V, with log 0 = -inf.
        """
        visible = (m <= n) if is_causal else (m == m)
        return sum(visible & self.joins(branch, n, m, self.phase(branch, head, num_heads)) for branch in self.branches)

    # How much work that is, and what a cache has to hold

    def pairs(self, length: int, num_heads: int, *, num_queries: int | None = None, is_causal: bool = True) -> int:
        """Number of (query, key, head) triples over `num_heads` key/value heads: what the fast operator computes.

        `length` is the number of keys; the queries are its last `num_queries` positions (all by default).
        """
        tiles = self.tiles(length, num_heads, num_queries=num_queries, is_causal=is_causal)
        return sum(tile.pairs for tile in tiles)

    def past_keys(self, branch: Branch, head: int, num_heads: int, position: int) -> range:
        """The keys before `position` that a query from there on asks for in a branch, in causal attention."""
        g, phase, w, r = self.grid_shift(branch), self.phase(branch, head, num_heads), branch.length, branch.rate
        if branch.type == "window":
            oldest = 0 if w is None else max(0, position + 1 - w)
            return range(oldest + (phase - g - oldest) % r, position, r)
        start = (position + g) // w * w - g
        kept = range(start + phase, start + w, r)
        return clip(kept, 0, position) if kept and kept[-1] >= position else range(0)

    def max_live_keys(self) -> int | None:
        """How many keys a causal cache has to hold for one head, at most, at any position: the sum of w_i / r_i.
        `None` if that number grows with the position."""
        if any(branch.length is None for branch in self.branches):
            return None
        return sum(-(-branch.length // branch.rate) for branch in self.branches)

    # Attention as dense pieces

    def tiles(
        self,
        length: int,
        num_heads: int,
        *,
        num_queries: int | None = None,
        num_keys: int | None = None,
        is_causal: bool = True,
    ) -> tuple[Tile, ...]:
        """Cut the attention of `num_queries` last of `length` positions over the `num_keys` first (all by default)
        into dense tiles.

        The tiles hold every joined pair once per branch that joins it, and no other: their `pairs` are the work that
        the pattern asks for. Their number does not grow with `length`.
        """
        num_queries = length if num_queries is None else num_queries
        num_keys = length if num_keys is None else num_keys
        return _tiles(self.canonical(), length, num_heads, num_queries, num_keys, is_causal)


def layer_patterns(
    num_layers: int,
    segment_lengths: Sequence[int | None],
    dilation_rates: Sequence[int],
    branch_types: Sequence[str] | None = None,
    head_offset: str = "paper",
    segment_shift: bool = False,
    full_attention_layers: Sequence[int] | None = None,
) -> list[DilatedPattern]:
    """The pattern of every layer, first layer first, from what a configuration says (see [`LongNetConfig`])."""
    if not isinstance(full_attention_layers, (Sequence, type(None))) or isinstance(full_attention_layers, str):
        raise ValueError(f"`full_attention_layers` must be a list of layer indices, got {full_attention_layers!r}.")
    full = set(full_attention_layers or ())
    outside = sorted(full - set(range(num_layers)))
    if outside:
        raise ValueError(f"`full_attention_layers` must be layer indices from 0 to {num_layers - 1}, got {outside}.")
    return [
        DilatedPattern.full(layer_idx)
        if layer_idx in full
        else DilatedPattern(
            segment_lengths,
            dilation_rates,
            branch_types,
            head_offset=head_offset,
            shift=segment_shift and layer_idx % 2 == 1,
            layer_idx=layer_idx,
        )
        for layer_idx in range(num_layers)
    ]


def _is_positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def clip(rows: range, start: int, stop: int) -> range:
    """The members of `rows` in [start, stop)."""
    first = max(0, -(-(start - rows.start) // rows.step))
    last = max(first, min(len(rows), -(-(stop - rows.start) // rows.step)))
    return rows[first:last]


class Piece(NamedTuple):
    """A tile of one branch before its heads are known, or a rectangle or triangle of a matrix (see `_band`).

    `rows` are queries and `columns` are keys: positions in a tile, indices in a matrix. `mask`, `repeats` and `period`
    mean what they mean in [`Tile`].
    """

    mask: str
    rows: range
    columns: range
    repeats: int = 1
    period: int = 0


@functools.lru_cache(maxsize=1024)
def _tiles(
    pattern: DilatedPattern, length: int, num_heads: int, num_queries: int, num_keys: int, is_causal: bool
) -> tuple[Tile, ...]:
    """`DilatedPattern.tiles`, remembered."""
    for name, value in (("num_queries", num_queries), ("num_keys", num_keys)):
        if not 0 <= value <= length:
            raise ValueError(f"`{name}` must lie between 0 and the length {length}, got {value}.")
    tiles: list[Tile] = []
    for index, branch in enumerate(pattern.branches):
        cut = _segment_pieces if branch.type == "segment" else _window_pieces
        for phase in pattern.phases(branch, num_heads):
            heads = pattern.heads_of_phase(branch, phase, num_heads)
            for piece in cut(branch, pattern.grid_shift(branch), phase, length, num_queries, num_keys, is_causal):
                tiles.append(
                    Tile(heads, piece.mask, piece.rows, piece.columns, piece.repeats, piece.period, branch=index)
                )
    return tuple(tile for tile in tiles if tile.pairs)


def _segment_pieces(
    branch: Branch, g: int, phase: int, length: int, num_queries: int, num_keys: int, is_causal: bool
) -> Iterator[Piece]:
    """The tiles of a segment branch for the heads with one phase."""
    w, r = branch.length, branch.rate
    first_query = length - num_queries

    def segment(index: int, repeats: int = 1) -> Iterator[Piece]:
        """The tiles of segment number `index`, the first of `repeats` segments that are alike."""
        start = index * w - g
        kept = clip(range(start + phase, start + w, r), 0, length)
        first_row = len(kept) - len(clip(kept, first_query, length))
        kept_keys = len(clip(kept, 0, num_keys))
        # Within a segment all kept rows join: seen alone, they are a dense matrix.
        for piece in _band(first_row, len(kept), 0, kept_keys, None, 0 if is_causal else None):
            queries = kept[piece.rows.start : piece.rows.stop]
            keys = kept[piece.columns.start : piece.columns.stop]
            yield Piece(piece.mask, queries, keys, repeats, period=w)

    if not num_queries:
        return
    first, last = (first_query + g) // w, (length - 1 + g) // w
    # Segments that lie whole in the sequence, the queries and the keys are alike: one repeated tile stands for all.
    first_whole = -(-(first_query + g) // w)
    last_whole = max(first_whole, (min(length, num_keys) + g) // w) - 1
    if first < first_whole:
        yield from segment(first)
    if last_whole >= first_whole:
        yield from segment(first_whole, last_whole - first_whole + 1)
    # Segments that the end of the sequence or of the keys cuts. Those behind the last key have no tile.
    for index in range(last_whole + 1, min(last, (num_keys - 1 + g) // w) + 1):
        yield from segment(index)


def _window_pieces(
    branch: Branch, g: int, phase: int, length: int, num_queries: int, num_keys: int, is_causal: bool
) -> Iterator[Piece]:
    """The tiles of a window branch for the heads with one phase."""
    w, r = branch.length, branch.rate
    start = (phase - g) % r  # the first kept key
    keys_kept = -(-(num_keys - start) // r)
    # Take every r-th query, n = start + lag + r * i. With the kept keys m = start + r * j they make a window without
    # dilation in i and j. There are r such sets of queries, one for each lag.
    for lag in range(r):
        first = -(-(length - num_queries - start - lag) // r)
        stop = -(-(length - start - lag) // r)
        back = None if w is None else (w - 1 - lag) // r
        ahead = 0 if is_causal else None if w is None else (w - 1 + lag) // r
        for piece in _band(first, stop, 0, keys_kept, back, ahead):
            queries = range(start + lag + r * piece.rows.start, start + lag + r * piece.rows.stop, r)
            keys = range(start + r * piece.columns.start, start + r * piece.columns.stop, r)
            yield Piece(piece.mask, queries, keys, piece.repeats, r * piece.period)


def _band(
    i_start: int, i_stop: int, j_start: int, j_stop: int, back: int | None, ahead: int | None
) -> Iterator[Piece]:
    """Cut the band i - back <= j <= i + ahead of a matrix (`None`: unbounded) into rectangles and triangles.

    The band is cut into blocks of as many rows as it is wide (all rows if a side is unbounded). Inside a block, the
    right edge of the band is a lower triangle, its left edge an upper triangle, and what lies between is a rectangle.
    Blocks that lie whole in the matrix are alike: one comes out, with their number (`repeats`) and the distance from
    one to the next (`period`, in rows and in columns).
    """
    if ahead is not None:  # rows whose last column lies left of the matrix are empty
        i_start = max(i_start, j_start - ahead)
    if back is not None:  # so are rows whose first column lies right of it
        i_stop = min(i_stop, j_stop + back)
    if i_start >= i_stop or j_start >= j_stop:
        return
    if back is None and ahead is None:
        yield Piece("full", range(i_start, i_stop), range(j_start, j_stop))
        return
    if ahead is None:
        raise AssertionError("a band with a left edge only does not occur")
    height = i_stop - i_start
    if back is not None:
        height = min(height, back + ahead + 1)
    if height <= 0:
        return

    def block(i: int, rows: int, repeats: int = 1) -> Iterator[Piece]:
        """The pieces of the block of `rows` rows from row i on."""
        right = min(rows, j_stop - i - ahead)
        if right > 0:
            yield Piece("lower", range(i, i + right), range(i + ahead, i + ahead + right), repeats, height)
            if right < rows:
                yield Piece("full", range(i + right, i + rows), range(i + ahead, j_stop), repeats, height)
        left = j_start if back is None else max(j_start, i + rows - 1 - back)
        yield Piece("full", range(i, i + rows), range(left, max(left, min(j_stop, i + ahead))), repeats, height)
        if back is not None:
            # Row i + u begins at column i - back + u: an upper triangle of rows - 1, clipped to columns [skip, stop).
            skip, stop = max(0, j_start - (i - back)), min(rows - 1, j_stop - (i - back))
            if skip < stop:
                columns = range(i - back + skip, i - back + stop)
                yield Piece("full", range(i, i + skip), columns, repeats, height)
                yield Piece("upper", range(i + skip, i + stop), columns, repeats, height)

    blocks = whole_from = whole_to = -(-(i_stop - i_start) // height)
    if back is not None:
        first = max(0, -(-(j_start + back - i_start) // height))
        stop = min((i_stop - i_start) // height, (j_stop - ahead - i_start) // height)
        if first < stop:
            whole_from, whole_to = first, stop
            yield from block(i_start + first * height, height, stop - first)
    for index in (*range(whole_from), *range(whole_to, blocks)):
        i = i_start + index * height
        yield from block(i, min(height, i_stop - i))
