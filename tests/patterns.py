"""Random patterns for the tests, and the definition of a pattern written out once more, pair by pair."""

import random

from longnet_hf import Branch, DilatedPattern
from longnet_hf.dilated_pattern import clip


def random_pattern(rng: random.Random, num_heads: int = 0) -> DilatedPattern:
    """One to four segments and windows, with lengths and rates that divide nothing. With `num_heads` half of the
    patterns have branches that belong to some of the heads, and half have a sink."""
    lengths, rates, types = [], [], []
    for _ in range(rng.randint(1, 4)):
        types.append(rng.choice(["segment", "window"]))
        rates.append(rng.choice([1, 1, 2, 3, 4, 5, 7]))
        unbounded = types[-1] == "window" and rates[-1] == 1 and rng.random() < 0.2
        lengths.append(None if unbounded else rng.randint(1, 24))
    if num_heads and rng.random() < 0.5:
        at = rng.randint(0, len(types))
        lengths.insert(at, rng.randint(1, 9))
        rates.insert(at, 1)
        types.insert(at, "sink")
    heads = None
    if num_heads and rng.random() < 0.5:
        some = [rng.sample(range(num_heads), rng.randint(1, num_heads)) for _ in types]
        heads = [rng.choice([None, x]) for x in some]
    return DilatedPattern(
        lengths,
        rates,
        types,
        rng.choice(["paper", "grouped", "rotating"]),
        shift=rng.random() < 0.5,
        layer_idx=rng.randint(0, 3),
        offset=rng.choice([0, rng.randint(1, 60)]),
        branch_heads=heads,
    )


def joined(pattern: DilatedPattern, n: int, m: int, head: int, heads: int, causal: bool = True) -> int:
    """In how many branches `head` joins query n to key m: the definition, independent of the package's arithmetic."""
    if causal and m > n:
        return 0
    n, m, count, sinks = n + pattern.offset, m + pattern.offset, 0, 0
    branch_heads = pattern.branch_heads or [None] * len(pattern.branch_types)
    branches = zip(pattern.segment_lengths, pattern.dilation_rates, pattern.branch_types, branch_heads, strict=True)
    for w, r, kind, of_branch in branches:
        if of_branch is not None and head not in of_branch:
            continue
        if pattern.head_offset == "paper":
            s = head % r
        elif pattern.head_offset == "grouped":
            s = head // ((heads + r - 1) // r)
        else:
            s = (head + pattern.layer_idx * heads) % r
        if kind == "sink":
            sinks = w
        elif kind == "window":
            count += m % r == s and (w is None or abs(n - m) < w)
        else:
            g = w // 2 if pattern.shift else 0
            same = (n + g) // w == (m + g) // w
            count += same and ((n + g) % w) % r == s and ((m + g) % w) % r == s
    return 1 if count == 0 and m < sinks else count


def kept_rows(pattern: DilatedPattern, branch: Branch, head: int, num_heads: int, length: int) -> list[range]:
    """The positions below `length` whose keys `head` keeps: a range per segment, or one for a window."""
    phase, r = pattern.phase(branch, head, num_heads), branch.rate
    g, w = pattern.grid_shift(branch), branch.length
    if not branch.belongs_to(head):
        return []
    if branch.type == "window":
        return [range((phase - g) % r, length, r)]
    rows = [clip(range(start + phase, start + w, r), 0, length) for start in range(-g, length, w)]
    return [kept for kept in rows if kept]


def live_keys(pattern: DilatedPattern, position: int, head: int, num_heads: int) -> list[int]:
    """The keys up to `position` that some later query may still ask for, in causal attention."""
    live = (pattern.past_keys(branch, head, num_heads, position + 1) for branch in pattern.branches)
    return sorted(set().union(*live))
