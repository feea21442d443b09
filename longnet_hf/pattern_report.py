"""What a user may ask of a pattern: how it looks, which positions influence an output, what to be warned about.

The configuration, `set_dilated_attention` and users ask here; attention itself needs none of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .dilated_pattern import DilatedPattern, clip


# How many positions are searched for queries without keys and for keys that only the first branch keeps. Where there
# are any, some are among the first few multiples of the dilation rates.
_SEARCHED_POSITIONS = 4096


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


def pattern_warnings(patterns: Sequence[DilatedPattern], num_heads: int) -> list[str]:
    """Texts that warn a user about the pattern of a model: of queries that have no key, and of keys that only the
    first branch keeps."""
    warnings = []
    for pattern in patterns:
        empty = _first_query_without_keys(pattern, num_heads)
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


def _first_query_without_keys(pattern: DilatedPattern, num_heads: int) -> tuple[int, int] | None:
    """(head, position) of the first query that no branch joins to a key at or before it."""
    if any(branch.rate == 1 and branch.heads is None for branch in pattern.branches):
        return None
    for position in range(_SEARCHED_POSITIONS):
        for head in range(num_heads):
            for branch in filter(lambda branch, head=head: branch.belongs_to(head), pattern.branches):
                phase = pattern.phase(branch, head, num_heads)
                rest = (position + pattern.grid_shift(branch) - phase) % branch.rate
                nearest = position - rest if branch.type == "window" else position
                if branch.rate == 1 or (nearest >= 0 and pattern.joins(branch, position, nearest, head, num_heads)):
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


__all__ = ["Reach", "draw_pattern", "pattern_warnings", "reach"]
