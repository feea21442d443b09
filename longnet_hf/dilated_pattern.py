"""The pattern of one layer of dilated attention: which query attends to which key, in plain integers.

Everything that needs to know the pattern (the dense formula, the tiles of the fast operator, the kernels, the cache)
asks `DilatedPattern`. What a user may want to ask of a pattern is in pattern_report.py.

Source: "LongNet: Scaling Transformers to 1,000,000,000 Tokens" (arXiv 2307.02486), sections 2.2-2.3.

Positions are counted from the first real token of a document: n is a query's position, m a key's, both start at 0.
"""

import functools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np

from .input_checks import check_integer


BRANCH_TYPES = ("segment", "window", "sink")
HEAD_OFFSETS = ("paper", "grouped", "rotating")
SEGMENT_PADDINGS = ("none", "zeros")
# Products with lengths stay below 2**63, and sums of rates and positions below 2**31, as the kernels have them
_LARGEST_LENGTH, _LARGEST_RATE = 1 << 40, 1 << 30


@functools.lru_cache(maxsize=1024)
def runs_of_neighbours(numbers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The first and the last number of every run of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        follows = runs and number == runs[-1][1] + 1
        runs.append((runs.pop()[0] if follows else number, number))
    return tuple(runs)


class Branch(NamedTuple):
    """One branch of a pattern: its type, length w (`None`: unbounded) and dilation rate r, in positions, and the
    key/value heads that have it (`None`: all)."""

    type: str
    length: int | None
    rate: int
    heads: tuple[int, ...] | None = None

    def belongs_to(self, head):
        """Whether key/value head `head` has this branch; of an integer tensor, element by element."""
        if self.heads is None:
            return head == head
        return functools.reduce(operator.or_, ((a <= head) & (head <= b) for a, b in runs_of_neighbours(self.heads)))


class Tile(NamedTuple):
    """A dense piece of attention: `queries` attend to `keys` (both positions), for every key/value head in `heads`.
    It belongs to the pattern's branch number `branch`.

    `mask` is `"full"` (every pair), `"lower"` (the i-th query attends to the keys up to the i-th), `"upper"` (the
    i-th query attends to the keys from the i-th on) or `"given"` (the pairs that `joined` says). Those with a triangle
    are square and include the diagonal. The tile stands `repeats` times, each `period` positions after the last.
    """

    heads: range
    mask: str
    queries: range
    keys: range
    repeats: int = 1
    period: int = 0
    branch: int = 0
    joined: np.ndarray | None = None  # bool, queries by keys

    @property
    def pairs(self) -> int:
        """Number of (query, key, head) triples in the tile, repeats included."""
        rows, columns = len(self.queries), len(self.keys)
        if self.mask == "given":
            area = int(self.joined.sum())
        else:
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
      attention;
    - `"sink"` (StreamingLLM's attention sinks, arXiv 2309.17453): every query joins the first w keys, m < w, but those
      that another branch of the head joins to it already. r is 1, and a pattern has one such branch at most.

    A pair counts once per branch that joins it. In causal attention only keys m <= n count. A branch may belong to
    some of the heads only.

    Args:
        segment_lengths: w of every branch, in positions (the paper's w_i).
        dilation_rates: r of every branch (the paper's r_i). Nothing requires r to divide w or the number of heads.
        branch_types: `"segment"`, `"window"` or `"sink"` for every branch; all `"segment"` by default.
        branch_heads: for every branch the key/value heads that have it, or `None`: all heads; by default all have all.
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
    branch_heads: tuple[tuple[int, ...] | None, ...] | None = None

    def __post_init__(self):
        for name in ("segment_lengths", "dilation_rates", "branch_types"):
            value = getattr(self, name)
            if name == "branch_types" and value is None:
                value = ("segment",) * len(self.segment_lengths)
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"`{name}` must be a list with one entry per branch, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "branch_heads", _checked_heads(self.branch_heads, len(self.segment_lengths)))
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
            if branch.type == "sink" and branch.rate != 1:
                raise ValueError(f"`dilation_rates` must be 1 for a branch of type 'sink', got {branch.rate}.")
            if branch.rate > _LARGEST_RATE or (branch.length or 0) > _LARGEST_LENGTH:
                raise ValueError(
                    f"`segment_lengths` must be at most {_LARGEST_LENGTH} and `dilation_rates` {_LARGEST_RATE}, got "
                    f"{branch.length} and {branch.rate}. Full attention is segment length None, with branch type "
                    "'window' and rate 1."
                )
        if self.branch_types.count("sink") > 1:
            raise ValueError(f"`branch_types` may have one 'sink', got {self.branch_types}.")
        if self.head_offset not in HEAD_OFFSETS:
            raise ValueError(f"`head_offset` must be one of {HEAD_OFFSETS}, got {self.head_offset!r}.")
        for name in ("layer_idx", "offset"):
            check_integer(name, getattr(self, name), at_least=0)
        # Written once, here: torch.compile cannot trace the json module
        fields = {name: x for name, x in asdict(self).items() if name != "branch_heads" or x is not None}
        object.__setattr__(self, "_json", json.dumps(fields))

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

    def with_branch(self, type: str, length: int | None, heads: Sequence[int] | None = None) -> "DilatedPattern":
        """The pattern with one more branch, of rate 1."""
        return replace(
            self,
            segment_lengths=(*self.segment_lengths, length),
            dilation_rates=(*self.dilation_rates, 1),
            branch_types=(*self.branch_types, type),
            branch_heads=(*(branch.heads for branch in self.branches), heads),
        )

    def of_heads(self, heads: Sequence[int], num_heads: int) -> "DilatedPattern | None":
        """The pattern of some of `num_heads` key/value heads, without the branches that none of them has; `None` if
        they have no branch at all."""
        if len(heads) == num_heads:
            return self
        kept = [
            (x.length, x.rate, x.type, [head for head in heads if x.belongs_to(head)])
            for x in self.branches
            if any(map(x.belongs_to, heads))
        ]
        if not kept:
            return None
        lengths, rates, types, of_branches = zip(*kept, strict=True)
        return replace(
            self, segment_lengths=lengths, dilation_rates=rates, branch_types=types, branch_heads=of_branches
        )

    def without_heads(self, heads: Sequence[int], num_heads: int) -> "DilatedPattern | None":
        """The pattern where some of `num_heads` key/value heads have no branch at all; `None` if all have none."""
        return self.of_heads([head for head in range(num_heads) if head not in heads], num_heads)

    def with_full_heads(self, heads: Sequence[int], num_heads: int) -> "DilatedPattern":
        """The pattern where some of `num_heads` key/value heads have full attention in place of all branches.

        Raises:
            ValueError: if there are no such heads.
        """
        outside = [head for head in heads if head not in range(num_heads)]
        if outside:
            raise ValueError(f"`heads` must be key/value heads from 0 to {num_heads - 1}, got {outside}.")
        heads = sorted(set(heads))
        if not heads:
            return self
        full, others = DilatedPattern.full(self.layer_idx), self.without_heads(heads, num_heads)
        if others is not None:
            return others.with_branch("window", None, heads)
        return full if len(heads) == num_heads else replace(full, branch_heads=(heads,))

    @property
    def branches(self) -> tuple[Branch, ...]:
        heads = self.branch_heads or (None,) * len(self.segment_lengths)
        return tuple(map(Branch, self.branch_types, self.segment_lengths, self.dilation_rates, heads))

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
        """The phases of all heads that have a branch, each once, but for those that keep no row."""
        return sorted(self.heads_by_phase(branch, num_heads))

    def heads_by_phase(self, branch: Branch, num_heads: int) -> dict[int, list[int]]:
        """The heads that have a branch and keep any row in it, by their phase s_j."""
        heads: dict[int, list[int]] = {}
        for head in filter(branch.belongs_to, range(num_heads)):
            phase = self.phase(branch, head, num_heads)
            if branch.type != "segment" or phase < branch.length:
                heads.setdefault(phase, []).append(head)
        return heads

    def grid_shift(self, branch: Branch) -> int:
        """g: how far the grid of a branch is moved, in positions. The grids of windows and sinks have one segment
        without end."""
        if branch.type != "segment":
            return self.offset
        return ((branch.length // 2 if self.shift else 0) + self.offset) % branch.length

    def joins(self, branch: Branch, n, m, head, num_heads: int):
        """Whether `branch` joins query `n` to key `m` in key/value head `head` of `num_heads`, causality aside."""
        w, r, g, phase = branch.length, branch.rate, self.grid_shift(branch), self.phase(branch, head, num_heads)
        n, m, has = n + g, m + g, branch.belongs_to(head)
        if branch.type == "sink":
            others = (self.joins(x, n - g, m - g, head, num_heads) for x in self.branches if x.type != "sink")
            return has & (m < w) & (sum(others) == 0)
        if branch.type == "window":
            kept = has & (m % r == phase)
            return kept if w is None else kept & (n - m < w) & (m - n < w)
        return has & (n // w == m // w) & (n % w % r == phase) & (m % w % r == phase)

    def multiplicity(self, n, m, head, num_heads: int, is_causal: bool = True):
        """C[n, m]: in how many branches `head` joins query `n` to key `m`, as an integer (tensor).

        The paper's mixture of branches, weighted by their softmax denominators (section 2.2), is one softmax over all
        of them: softmax(QK^T / sqrt(d) + log C) V, with log 0 = -inf.
        """
        visible = (m <= n) if is_causal else (m == m)
        return sum(visible & self.joins(branch, n, m, head, num_heads) for branch in self.branches)

    def padding_keys(self, n, length, head, num_heads: int):
        """How many keys of zeros query `n` of a document of `length` positions has with `segment_padding="zeros"`.

        torchscale's encoders fill the sequence up to a multiple of min(w, length), and each segment up to a multiple
        of r, with keys and values of zeros, and attend to them. `length` may be an integer tensor, too.
        """
        count = 0
        for branch in self.branches:
            r, phase = branch.rate, self.phase(branch, head, num_heads)
            w = _lesser(branch.length, length)
            place = n % w
            real = _lesser(w, length - (n - place))  # positions in the segment
            count = count + (branch.belongs_to(head) & (place % r == phase)) * (-(-w // r) + (phase - real) // r)
        return count

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
        if not branch.belongs_to(head) or (branch.type == "sink" and self.is_unbounded(head)):
            return range(0)
        if branch.type == "sink":
            return range(min(max(0, w - g), position))
        if branch.type == "window":
            oldest = 0 if w is None else max(0, position + 1 - w)
            return range(oldest + (phase - g - oldest) % r, position, r)
        start = (position + g) // w * w - g
        kept = range(start + phase, start + w, r)
        return clip(kept, 0, position) if kept and kept[-1] >= position else range(0)

    @property
    def has_equal_heads(self) -> bool:
        """Whether all heads keep the same keys."""
        return all(branch.rate == 1 and branch.heads is None for branch in self.branches)

    def max_live_keys(self, head: int | None = None) -> int | None:
        """How many keys a causal cache has to hold for a key/value head (default: for any), at most, at any position:
        the sum of w_i / r_i over the head's branches. `None` if that number grows with the position."""
        branches = [branch for branch in self.branches if head is None or branch.belongs_to(head)]
        if any(branch.length is None for branch in branches):
            return None
        return sum(-(-branch.length // branch.rate) for branch in branches)

    def sink_extent(self, others: Sequence[Branch], num_keys: int) -> int:
        """From which position on none of a head's other branches joins a query to any of the first `num_keys` keys."""
        extent, last = 0, num_keys - 1
        for branch in others:
            w, g = branch.length, self.grid_shift(branch)
            extent = max(extent, last + w if branch.type == "window" else ((last + g) // w + 1) * w - g)
        return extent

    def is_unbounded(self, head: int) -> bool:
        """Whether a key/value head has full attention."""
        return any(branch.length is None and branch.belongs_to(head) for branch in self.branches)

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
    full_attention_heads: Mapping[int, Sequence[int]] | None = None,
    sink_tokens: int = 0,
    *,
    num_heads: int,
) -> list[DilatedPattern]:
    """The pattern of every layer, first layer first, from what a configuration says (see [`LongNetConfig`]).
    `num_heads` is the number of key/value heads."""
    if not isinstance(full_attention_layers, (Sequence, type(None))) or isinstance(full_attention_layers, str):
        raise ValueError(f"`full_attention_layers` must be a list of layer indices, got {full_attention_layers!r}.")
    full = set(full_attention_layers or ())
    outside = [x for x in full_attention_layers or () if type(x) is not int or not 0 <= x < num_layers]
    if outside:
        raise ValueError(f"`full_attention_layers` must be layer indices from 0 to {num_layers - 1}, got {outside}.")
    full_heads = heads_of_layers(full_attention_heads, num_layers, num_heads)
    twice = sorted(full & set(full_heads))
    if twice:
        raise ValueError(f"`full_attention_heads` and `full_attention_layers` both have the layers {twice}.")
    check_integer("sink_tokens", sink_tokens, at_least=0)
    patterns = []
    for layer_idx in range(num_layers):
        pattern = DilatedPattern(
            segment_lengths,
            dilation_rates,
            branch_types,
            head_offset=head_offset,
            shift=segment_shift and layer_idx % 2 == 1,
            layer_idx=layer_idx,
        )
        if sink_tokens:
            pattern = pattern.with_branch("sink", sink_tokens)
        heads = full_heads.get(layer_idx, range(num_heads if layer_idx in full else 0))
        patterns.append(pattern.with_full_heads(heads, num_heads))
    return patterns


def heads_of_layers(
    heads: Mapping[int, Sequence[int]] | None, num_layers: int, num_heads: int
) -> dict[int, tuple[int, ...]]:
    """`full_attention_heads` as a user or a JSON file has it, checked and in order, without empty layers.

    Raises:
        ValueError: naming the layer or the heads that the model does not have.
    """
    if not isinstance(heads, (Mapping, type(None))):
        raise ValueError(
            f"`full_attention_heads` must map indices of layers to lists of key/value heads, got {heads!r}."
        )
    checked = {}
    for layer, of_layer in (heads or {}).items():
        layer_idx = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer  # the keys of JSON are text
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not 0 <= layer_idx < num_layers:
            raise ValueError(f"`full_attention_heads` must name layers from 0 to {num_layers - 1}, got {layer!r}.")
        if layer_idx in checked:
            raise ValueError(f"`full_attention_heads` must name a layer once, got layer {layer_idx} twice.")
        is_list = isinstance(of_layer, Sequence) and not isinstance(of_layer, str)
        if not is_list or any(type(head) is not int or not 0 <= head < num_heads for head in of_layer):
            raise ValueError(
                f"`full_attention_heads` must list key/value heads from 0 to {num_heads - 1}, got {of_layer!r} for "
                f"layer {layer}."
            )
        if of_layer:
            checked[layer_idx] = tuple(sorted(set(of_layer)))
    return dict(sorted(checked.items()))


def _checked_heads(branch_heads, num_branches: int) -> tuple[tuple[int, ...] | None, ...] | None:
    """`branch_heads` as tuples in order; `None` if all heads have all branches."""
    if branch_heads is None:
        return None
    is_list = isinstance(branch_heads, Sequence) and not isinstance(branch_heads, str)
    if not is_list or len(branch_heads) != num_branches:
        raise ValueError(
            f"`branch_heads` must be a list with one entry for each of {num_branches} branches, got {branch_heads!r}."
        )
    for heads in branch_heads:
        is_list = isinstance(heads, Sequence) and not isinstance(heads, str) and len(heads) > 0
        if heads is not None and not (is_list and all(type(head) is int and head >= 0 for head in heads)):
            raise ValueError(f"`branch_heads` must be lists of key/value heads, or None for all, got {heads!r}.")
    if all(heads is None for heads in branch_heads):
        return None
    return tuple(None if heads is None else tuple(sorted(set(heads))) for heads in branch_heads)


def check_segment_padding(pattern: DilatedPattern, segment_padding: str, is_causal: bool) -> None:
    """Refuse a `segment_padding` that is unknown, or that has no meaning for a pattern."""
    if segment_padding not in SEGMENT_PADDINGS:
        raise ValueError(f"`segment_padding` must be one of {SEGMENT_PADDINGS}, got {segment_padding!r}.")
    if segment_padding == "none":
        return
    reason = None
    if is_causal:
        reason = "in causal attention (`is_causal=True`) padding comes after every query and changes nothing"
    elif set(pattern.branch_types) != {"segment"}:
        reason = "branches of type 'window' (full attention, too) and 'sink' have no segments to fill up"
    elif pattern.shift or pattern.offset:
        reason = "torchscale, whose padding this is, does not shift segments (`segment_shift=True`)"
    if reason is not None:
        raise ValueError(f'`segment_padding="zeros"` has no meaning here: {reason}. Use "none".')


def _lesser(a, b):
    """The lesser of two integers (tensors)."""
    return a + (b - a) * (b < a)


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
    joined: np.ndarray | None = None


@functools.lru_cache(maxsize=1024)
def _tiles(
    pattern: DilatedPattern, length: int, num_heads: int, num_queries: int, num_keys: int, is_causal: bool
) -> tuple[Tile, ...]:
    """`DilatedPattern.tiles`, remembered."""
    for name, value in (("num_queries", num_queries), ("num_keys", num_keys)):
        if not 0 <= value <= length:
            raise ValueError(f"`{name}` must lie between 0 and the length {length}, got {value}.")
    for branch in pattern.branches:
        if branch.heads is not None and max(branch.heads) >= num_heads:
            raise ValueError(f"`branch_heads` must lie below the number of heads, {num_heads}, got {branch.heads}.")
    tiles: list[Tile] = []
    for index, branch in enumerate(pattern.branches):
        cut = {"segment": _segment_pieces, "window": _window_pieces, "sink": _no_pieces}[branch.type]
        for phase, heads in pattern.heads_by_phase(branch, num_heads).items():
            for piece in cut(branch, pattern.grid_shift(branch), phase, length, num_queries, num_keys, is_causal):
                tiles += _tiles_of_heads(heads, piece, index)
    tiles += sink_tiles(pattern, length, num_heads, num_queries, num_keys, is_causal)
    return tuple(tile for tile in tiles if tile.pairs)


def _tiles_of_heads(heads: list[int], piece: "Piece", branch: int) -> Iterator[Tile]:
    """A tile for all heads, or several: those of one are evenly spaced, so that their rows are a view of a tensor."""
    while heads:
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        count = 1
        while count < len(heads) and heads[count] - heads[count - 1] == step:
            count += 1
        yield Tile(
            range(heads[0], heads[count - 1] + 1, step),
            piece.mask,
            piece.rows,
            piece.columns,
            piece.repeats,
            piece.period,
            branch,
            piece.joined,
        )
        heads = heads[count:]


def sink_tiles(
    pattern: DilatedPattern, length: int, num_heads: int, num_queries: int, num_keys: int, is_causal: bool
) -> Iterator[Tile]:
    """The tiles of the pattern's sink, see [`DilatedPattern.tiles`]: what is left of it by the other branches."""
    for index, branch in enumerate(pattern.branches):
        if branch.type != "sink":
            continue
        keys = range(min(max(0, branch.length - pattern.offset), num_keys))
        alike: dict[tuple, list[int]] = {}  # heads of which the other branches join the same
        for head in filter(branch.belongs_to, range(num_heads)):
            others = [x for x in pattern.branches if x is not branch and x.type != "sink" and x.belongs_to(head)]
            if all(x.length is not None for x in others):
                key = tuple((x, pattern.phase(x, head, num_heads)) for x in others)
                alike.setdefault(key, []).append(head)
        for others, heads in alike.items():
            queries, branches = range(length - num_queries, length), [x for x, _ in others]
            for piece in _sink_pieces(pattern, branches, heads[0], num_heads, queries, keys, is_causal):
                yield from _tiles_of_heads(heads, piece, index)


def _sink_pieces(
    pattern: DilatedPattern,
    others: list[Branch],
    head: int,
    num_heads: int,
    queries: range,
    keys: range,
    is_causal: bool,
) -> Iterator["Piece"]:
    """The pieces of the sink's `keys` for a head that has the branches `others` beside it: as far as any of these
    joins a query to any of the keys, the pairs that none does; and all pairs behind that."""
    if not keys or not queries:
        return
    start = queries.start
    stop = max(pattern.sink_extent(others, len(keys)), len(keys) if is_causal else 0)
    stop = max(start, min(stop, queries.stop))
    n, m = np.arange(start, stop)[:, None], np.arange(len(keys))
    joined = (m <= n) if is_causal else np.ones((stop - start, len(keys)), dtype=bool)
    for branch in others:
        joined = joined & ~pattern.joins(branch, n, m, head, num_heads)
    rows = joined.any(1).nonzero()[0]
    if len(rows):
        first, last = int(rows[0]), int(rows[-1]) + 1
        yield Piece("given", range(start + first, start + last), keys, joined=joined[first:last])
    if stop < queries.stop:
        yield Piece("full", range(stop, queries.stop), keys)


def _no_pieces(*args) -> tuple[()]:
    """Sinks depend on the other branches: see `sink_tiles`."""
    return ()


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
    # dilation in i and j. There are r such sets of queries, one for each lag, or fewer queries than that.
    for lag in range(r) if r < num_queries else [(n - start) % r for n in range(length - num_queries, length)]:
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
