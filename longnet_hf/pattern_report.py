"""What a user may ask of a pattern: how it looks, which positions influence an output, what to be warned about.

The configuration, `set_dilated_attention` and users ask here; attention itself needs none of it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from .dilated_pattern import Branch, DilatedPattern, clip, runs_of_neighbours
from .input_checks import check_integer


# How many positions are searched for queries without keys and for keys that only the first branch keeps. Where there
# are any, some are among the first few multiples of the dilation rates.
_SEARCHED_POSITIONS = 4096
# Tokens of the sequences that descriptions are about, at most, unless more are asked for
DESCRIBED_LENGTH = 32768
# Of a picture: cells of the map, pairs that are looked at in a cell, and at a distance
_MAP, _PAIRS_IN_CELL, _PAIRS_AT_DISTANCE = 64, 64, 4096


class Reach(NamedTuple):
    """The answer of [`reach`]: the positions that can influence an output, and those that cannot although they are not
    hidden from it (`blind`), both as ranges."""

    reached: list[range]
    blind: list[range]


def reach(
    patterns: Sequence[DilatedPattern],
    position: int,
    num_heads: int,
    *,
    length: int | None = None,
    is_causal: bool = True,
) -> Reach:
    """Tells a user which positions can influence the output at `position` after the layers `patterns`.

    Residual connections keep what a position already knows. With all grids aligned the paper's pattern has blind
    spots: the first position of a segment of the shortest branch never reaches its predecessor, at any depth; `shift`
    on every other layer removes them.

    Args:
        patterns: the pattern of every layer, `config.layer_patterns` for a model.
        position: the position asked about.
        num_heads: number of key/value heads.
        length: length of the sequence, if it matters (not causal); default `position + 1`.
        is_causal: whether later positions are hidden. Blind spots are then looked for up to `position`.
    """
    length = position + 1 if length is None else length
    if not 0 <= position < length:
        raise ValueError(f"`position` must lie in the sequence of length {length}, got {position}.")
    # Sets of positions as bits of an integer: whole segments are combined in one operation.
    known = 1 << position
    for pattern in reversed(patterns):
        known |= _joined_keys(pattern, known, num_heads, length, is_causal)
    sight = (1 << (position + 1 if is_causal else length)) - 1
    return Reach(_ranges(known), _ranges(sight & ~known))


def draw_pattern(
    pattern: DilatedPattern, length: int, *, head: int = 0, num_heads: int = 1, is_causal: bool = True
) -> str:
    """A picture of a pattern in characters: a row per query, a column per key, and in how many branches they join."""
    return "\n".join(
        "".join(str(pattern.multiplicity(n, m, head, num_heads, is_causal) or "·") for m in range(length))
        for n in range(length)
    )


@dataclass(frozen=True)
class HeadDescription:
    """What a key/value head of a layer attends to.

    Args:
        head: its number.
        branches: its branches.
        phases: for each branch which rows it keeps: those at `phase` modulo the dilation rate.
        pairs_per_token: (query, key) pairs, on average over the tokens of a sequence.
        farthest: the largest distance of a query and a key that it attends to, sinks aside.
        cache_keys: keys that decoding needs at most; `None`: all of them (full attention). 0: no decoder.
    """

    head: int
    branches: list[Branch]
    phases: list[int]
    pairs_per_token: float
    farthest: int
    cache_keys: int | None


@dataclass(frozen=True)
class LayerDescription:
    """A layer: its index, whether its segments are shifted by half their length, and its key/value heads."""

    layer: int
    is_shifted: bool
    heads: list[HeadDescription]


@dataclass(frozen=True)
class SightDescription:
    """What the output at `position` can know through all layers: the number of positions, the first of them, and the
    runs of positions that are not hidden from it and yet are never reached."""

    position: int
    reached: int
    earliest: int
    blind: list[range]


@dataclass(frozen=True)
class PatternDescription:
    """The answer of [`describe`]: text by `str`, plain numbers by `to_dict`.

    Args:
        length: tokens of the sequence that it is about.
        is_causal: whether later positions are hidden.
        layers: every layer with attention of ours, first layer first.
        sight: what some outputs can know through the stack: the last, that in the middle, and those at the last
            boundary of a segment of each branch, where blind spots lie.
        patterns: the layers' patterns, which are drawn.
    """

    length: int
    is_causal: bool
    layers: list[LayerDescription]
    sight: list[SightDescription]
    patterns: Sequence[DilatedPattern] = field(repr=False)

    @property
    def pairs_per_token(self) -> float:
        """Mean over all heads of all layers; full causal attention has (length + 1) / 2."""
        heads = [head.pairs_per_token for layer in self.layers for head in layer.heads]
        return sum(heads) / len(heads)

    @property
    def cache_keys(self) -> int | None:
        """Sum over all heads of all layers, `None` if it grows with the sequence."""
        heads = [head.cache_keys for layer in self.layers for head in layer.heads]
        return None if None in heads else sum(heads)

    def to_dict(self) -> dict:
        """The same in what JSON knows; runs of positions are `[first, last]`."""
        fields = asdict(self)
        del fields["patterns"]
        for layer, plain in zip(self.layers, fields["layers"], strict=True):
            for head, entry in zip(layer.heads, plain["heads"], strict=True):
                entry["branches"] = [branch._asdict() for branch in head.branches]
        for entry in fields["sight"]:
            entry["blind"] = [[run[0], run[-1]] for run in entry["blind"]]
        return fields | {"pairs_per_token": self.pairs_per_token, "cache_keys": self.cache_keys}

    def draw(self):
        """A picture: the share of all heads that join a query to a key, and for every head, to which share of the keys
        at a distance its queries attend. Shares are of pairs drawn at random.

        Returns:
            A figure of matplotlib, which must be installed.
        """
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`draw` needs matplotlib: pip install matplotlib") from error
        by_place, by_distance, distances = self._shares()
        rows = len(by_distance)
        figure = Figure(figsize=(12, min(9, max(4.5, 1.5 + 0.1 * rows))), layout="constrained")
        panels = figure.subplots(1, 2)
        # What is never joined stays white, which a logarithm is not drawn of
        scale = dict(norm=LogNorm(1e-3, 1, clip=True), cmap="viridis_r", aspect="auto", interpolation="nearest")
        whole = (0, self.length, self.length, 0)
        panels[0].imshow(np.ma.masked_equal(by_place, 0), extent=whole, **scale)
        panels[0].set(xlabel="key position", ylabel="query position", title="all heads")
        image = panels[1].imshow(np.ma.masked_equal(by_distance, 0), **scale)
        panels[1].set(xlabel="distance of query and key, from", ylabel="layer, and its heads", title="every head")
        panels[1].set_xticks(range(len(distances)), distances, rotation=90)
        firsts = range(0, rows, rows // len(self.layers))
        panels[1].set_yticks([first - 0.5 for first in firsts], [layer.layer for layer in self.layers], fontsize=8)
        figure.colorbar(image, ax=panels, label="share of pairs that are joined")
        return figure

    def _shares(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The share of pairs that are joined: by place in all heads, `[cells, cells]`; of every head by distance,
        `[heads, distances]`; and where each span of distances begins."""
        draw = np.random.default_rng(0)
        cells = min(_MAP, self.length)
        edges = np.arange(cells + 1) * self.length // cells
        # Sinks are few keys of many, and joined to all: drawn like any other key they would be missed here and there
        branches = (branch for pattern in self.patterns for branch in pattern.branches)
        sink = max((branch.length for branch in branches if branch.type == "sink"), default=0)
        n = draw.integers(edges[:-1, None], edges[1:, None], (cells, _PAIRS_IN_CELL))[:, None]
        m, weights = _draw_in_parts(draw, edges[:-1, None], edges[1:, None], sink, (cells, _PAIRS_IN_CELL))
        distances = [0, *(1 << i for i in range((self.length - 1).bit_length()))]
        spans = []
        for a, b in zip(distances, [*distances[1:], self.length], strict=True):
            distance = draw.integers(a, b, _PAIRS_AT_DISTANCE)
            earlier, weight = _draw_in_parts(draw, 0, self.length - distance, sink, _PAIRS_AT_DISTANCE)
            later = earlier + distance
            ahead = draw.random(_PAIRS_AT_DISTANCE) < (0 if self.is_causal else 0.5)
            spans.append((np.where(ahead, earlier, later), np.where(ahead, later, earlier), weight))
        at_n, at_m, weights_at = map(np.array, zip(*spans, strict=True))
        # Of cells on the diagonal, causal attention sees a half: its pairs are those that are not hidden
        visible = (weights * (n >= m if self.is_causal else np.ones_like(n))).sum(-1)
        visible[visible == 0] = 1
        known: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # of heads that attend alike
        by_place, rows = np.zeros((cells, cells)), []
        for layer, pattern in zip(self.layers, self.patterns, strict=True):
            for head in layer.heads:
                key = (tuple((*branch[:3], phase) for branch, phase in zip(head.branches, head.phases, strict=True)),
                       layer.is_shifted, pattern.offset)  # fmt: skip
                if key not in known:
                    joined = [
                        pattern.multiplicity(*pair, head.head, len(layer.heads), self.is_causal) > 0
                        for pair in ((n, m), (at_n, at_m))
                    ]
                    known[key] = (joined[0] * weights).sum(-1) / visible, (joined[1] * weights_at).mean(-1)
                by_place += known[key][0]
                rows.append(known[key][1])
        return by_place / len(rows), np.array(rows), distances

    def __str__(self) -> str:
        everything = (self.length + 1) / 2 if self.is_causal else self.length
        alike: dict[tuple[str, ...], list[int]] = {}  # layers of which the same is to be said
        for layer in self.layers:
            alike.setdefault(_rows_of(layer, self.is_causal), []).append(layer.layer)
        lines = [
            f"{len(self.layers)} layers of {len(self.layers[0].heads)} key/value heads, a sequence of {self.length} "
            f"tokens, {'causal' if self.is_causal else 'not causal'}",
            f"{self.pairs_per_token:.1f} pairs per token and head, of {everything:.1f} of full attention",
        ]
        for rows, layers in alike.items():
            lines += ["", f"layers {_numbers(layers)}", *(f"  {row}" for row in rows)]
        lines += ["", "through all layers"]
        for sight in self.sight:
            missed = sum(map(len, sight.blind))
            runs = ", ".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else str(x[0]) for x in sight.blind[:3])
            rest = f" and {len(sight.blind) - 3} more runs" if len(sight.blind) > 3 else ""
            lines.append(
                f"  the output at {sight.position} knows {sight.reached} positions, the earliest {sight.earliest}; "
                + (f"blind to {missed}: {runs}{rest}" if missed else "no blind spots")
            )
        return "\n".join(lines)


def describe_patterns(
    patterns: Sequence[DilatedPattern],
    num_heads: int,
    length: int,
    *,
    is_causal: bool = True,
    layers: Sequence[int] | None = None,
) -> PatternDescription:
    """See [`describe`]; `layers` are the indices of the layers that have `patterns`, by default 0, 1, ..."""
    check_integer("length", length, at_least=1)
    described = []
    for index, pattern in zip(range(len(patterns)) if layers is None else layers, patterns, strict=True):
        pairs = [0] * num_heads
        for tile in pattern.tiles(length, num_heads, is_causal=is_causal):
            for head in tile.heads:
                pairs[head] += tile.pairs // len(tile.heads)
        heads = []
        for head in range(num_heads):
            branches = [branch for branch in pattern.branches if branch.belongs_to(head)]
            phases = [pattern.phase(branch, head, num_heads) for branch in branches]
            spans = [_span(pattern, *at, length, is_causal) for at in zip(branches, phases, strict=True)]
            keys = pattern.max_live_keys(head) if is_causal else 0
            heads.append(HeadDescription(head, branches, phases, pairs[head] / length, max(spans, default=0), keys))
        described.append(LayerDescription(index, pattern.shift, heads))
    positions = {length - 1, length // 2}
    for pattern in patterns:
        for branch in pattern.branches:
            if branch.type == "segment":
                g = pattern.grid_shift(branch)
                positions.add((length - 1 + g) // branch.length * branch.length - g)
    sight = []
    for position in sorted(filter(lambda position: position > 0, positions)) or [0]:
        reached, blind = reach(patterns, position, num_heads, length=length, is_causal=is_causal)
        sight.append(SightDescription(position, sum(map(len, reached)), reached[0][0], blind))
    return PatternDescription(length, is_causal, described, sight, tuple(patterns))


def _draw_in_parts(draw: np.random.Generator, start, stop, cut: int, shape) -> tuple[np.ndarray, np.ndarray]:
    """Positions from `start` up to `stop`, half of them below `cut` and half not where there are both, and the weights
    with which a mean over them is that over all positions. `start` and `stop` broadcast to `shape`."""
    middle = np.clip(cut, start, stop)
    share = (middle - start) / (np.asarray(stop) - start)  # of the positions that are below
    both = (share > 0) & (share < 1)
    below = np.where(both, np.arange(np.broadcast_to(middle, shape).shape[-1]) % 2 == 0, share == 1)
    positions = draw.integers(np.where(below, start, middle), np.where(below, middle, stop), shape)
    return positions, np.where(both, 2 * np.where(below, share, 1 - share), 1.0)


def _span(pattern: DilatedPattern, branch: Branch, phase: int, length: int, is_causal: bool) -> int:
    """The largest distance of a query and a key that a branch joins in a sequence of `length` positions."""
    w, r, g = branch.length, branch.rate, pattern.grid_shift(branch)
    if branch.type == "sink":
        return 0
    if branch.type == "window":
        kept = range((phase - g) % r, length, r)
        to_last = length - 1 - kept[0] if kept else 0  # from the first key
        to_first = kept[-1] if kept and not is_causal else 0  # from the last key
        farthest = max(to_last, to_first)
        return farthest if w is None else min(w - 1, farthest)
    # The first segment may be partial and so may the last, and all between them are alike
    starts = (-g, w - g, (length - 1 + g) // w * w - g)
    segments = [clip(range(start + phase, start + w, r), 0, length) for start in starts]
    return max((kept[-1] - kept[0] for kept in segments if kept), default=0)


def _rows_of(layer: LayerDescription, is_causal: bool) -> tuple[str, ...]:
    """A line for all heads that have the same branches, whichever rows they keep."""
    alike: dict[tuple, list[HeadDescription]] = {}
    for head in layer.heads:
        key = tuple((branch.type, branch.length, branch.rate) for branch in head.branches)
        alike.setdefault((key, head.cache_keys), []).append(head)
    rows = []
    for (branches, keys), heads in alike.items():
        names = []
        for kind, length, rate in branches:
            thinned = f" at dilation rate {rate}" if rate > 1 else ""
            names.append("full attention" if length is None else f"{kind} of {length}{thinned}")
        shifted = ", segments shifted by half" if layer.is_shifted and any(x[0] == "segment" for x in branches) else ""
        pairs = sum(head.pairs_per_token for head in heads) / len(heads)
        cache = f", cache of {'all' if keys is None else keys} keys" if is_causal else ""
        rows.append(
            f"heads {_numbers([head.head for head in heads])}: {'; '.join(names)}{shifted}: {pairs:.0f} pairs per "
            f"token, up to {max(head.farthest for head in heads)} positions back{cache}"
        )
    return tuple(rows)


def _numbers(numbers: list[int]) -> str:
    """Numbers in ascending order, runs of them shortened: 0-3, 5."""
    runs = runs_of_neighbours(tuple(numbers))
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def pattern_warnings(patterns: Sequence[DilatedPattern], num_heads: int, is_causal: bool = True) -> list[str]:
    """Texts that warn a user about the pattern of a model: of queries that have no key, and of keys that only the
    first branch keeps."""
    warnings = []
    for pattern in patterns:
        empty = _first_query_without_keys(pattern, num_heads, is_causal)
        if empty is not None:
            head, position = empty
            warnings.append(
                f"In layer {pattern.layer_idx} no branch joins head {head} at position {position} to any key: such "
                "queries give zeros. A branch of dilation rate 1 avoids this."
            )
            break
    position = _first_position_of_first_branch_only(patterns, num_heads)
    if position is not None:
        warnings.append(
            f"Position {position} (and others) is kept by no branch but the first, in any head and layer: "
            f"{num_heads} key/value heads do not cover all phases of the dilation rates {patterns[0].dilation_rates}. "
            'Use smaller rates, more key/value heads or `head_offset="rotating"`.'
        )
    return warnings


def sink_warning(patterns: Sequence[DilatedPattern], num_heads: int, context: int) -> str | None:
    """A text that warns a user of pretrained weights about heads to which the first tokens are lost; `None` if there
    are none, in texts of at most `context` tokens."""
    for pattern in patterns:
        for head in range(num_heads):
            branches = [branch for branch in pattern.branches if branch.belongs_to(head)]
            covers = [x.rate == 1 and (x.length is None or x.length >= context) for x in branches]
            if not any(covers) and "sink" not in [branch.type for branch in branches]:
                return (
                    f"In layer {pattern.layer_idx} key/value head {head} has neither full attention nor a sink. "
                    "Models that were trained with full attention lean on the first tokens of a text, and lose much "
                    "without them: give `sink_tokens=4`."
                )
    return None


def _joined_keys(pattern: DilatedPattern, queries: int, num_heads: int, length: int, is_causal: bool) -> int:
    """The keys that `pattern` joins to any of `queries`. Both are sets of positions: bit n is 1 if n is in the set."""
    joined, everything = 0, (1 << length) - 1
    for branch in pattern.branches:
        w, r = branch.length, branch.rate
        g = pattern.grid_shift(branch)
        for phase in pattern.phases(branch, num_heads):
            if branch.type == "sink":  # what it leaves out, another branch of the same head joins
                stop = min(max(0, w - g), queries.bit_length() if is_causal else length)
                joined |= _bits(range(stop))
            elif branch.type == "window":
                seen = queries
                if w is None or w >= length:
                    seen = (1 << queries.bit_length()) - 1 if is_causal else everything
                else:
                    width = 1  # of what each query has marked so far; it doubles until it is w
                    while width < w:
                        step = min(width, w - width)
                        seen |= (seen >> step) | (0 if is_causal else seen << step)
                        width += step
                joined |= seen & everything & _bits(range((phase - g) % r, length, r))
            else:
                for start in range(-g, length, w):
                    kept = _bits(clip(range(start + phase, start + w, r), 0, length))
                    if kept & queries:
                        joined |= kept & ((1 << (kept & queries).bit_length()) - 1) if is_causal else kept
    return joined


def _bits(rows: range) -> int:
    """The set of the positions `rows`, as bits of an integer."""
    ones = ((1 << rows.step * len(rows)) - 1) // ((1 << rows.step) - 1)
    return ones << rows.start if rows else 0


def _ranges(bits: int) -> list[range]:
    """A set of positions, given as bits of an integer, as ranges of neighbours."""
    runs, start = [], 0
    while bits:
        gap = (bits & -bits).bit_length() - 1
        bits >>= gap
        run = (~bits & (bits + 1)).bit_length() - 1
        bits >>= run
        runs.append(range(start + gap, start + gap + run))
        start += gap + run
    return runs


def _first_query_without_keys(pattern: DilatedPattern, num_heads: int, is_causal: bool) -> tuple[int, int] | None:
    """(head, position) of the first query that no branch joins to any key, in a long text."""
    if any(branch.rate == 1 and branch.heads is None for branch in pattern.branches):
        return None
    for position in range(_SEARCHED_POSITIONS):
        for head in range(num_heads):
            for branch in filter(lambda branch, head=head: branch.belongs_to(head), pattern.branches):
                phase = pattern.phase(branch, head, num_heads)
                nearest = [position]  # those keys of which one is joined if any is
                if branch.type == "window":
                    nearest = [position - (position + pattern.grid_shift(branch) - phase) % branch.rate]
                    nearest += [] if is_causal else [nearest[0] + branch.rate]
                joined = (m >= 0 and pattern.joins(branch, position, m, head, num_heads) for m in nearest)
                if branch.rate == 1 or any(joined):
                    break
            else:
                return head, position
    return None


def _first_position_of_first_branch_only(patterns: Sequence[DilatedPattern], num_heads: int) -> int | None:
    """The first position whose key no branch but the first keeps, in any layer; `None` if there is none."""
    kept = []
    for pattern in patterns:
        for branch in pattern.branches if pattern.branches[0].length is None else pattern.branches[1:]:
            heads = [head for head in range(num_heads) if branch.belongs_to(head) and branch.type != "sink"]
            if len({pattern.phase(branch, head, num_heads) for head in heads}) == branch.rate:
                return None
            kept += [(pattern, branch, head) for head in heads]
    if not kept:  # there is only one branch
        return None
    for position in range(_SEARCHED_POSITIONS):
        if not any(pattern.joins(branch, position, position, head, num_heads) for pattern, branch, head in kept):
            return position
    return None


__all__ = [
    "DESCRIBED_LENGTH",
    "PatternDescription",
    "Reach",
    "describe_patterns",
    "draw_pattern",
    "pattern_warnings",
    "reach",
    "sink_warning",
]
