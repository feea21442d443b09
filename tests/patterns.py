"""Random patterns for the tests, and the definition of a pattern written out once more, pair by pair."""

import random

from longnet_hf import DilatedPattern


def random_pattern(rng: random.Random) -> DilatedPattern:
    """One to four branches of both types, with lengths and rates that divide nothing."""
    lengths, rates, types = [], [], []
    for _ in range(rng.randint(1, 4)):
        types.append(rng.choice(["segment", "window"]))
        rates.append(rng.choice([1, 1, 2, 3, 4, 5, 7]))
        unbounded = types[-1] == "window" and rates[-1] == 1 and rng.random() < 0.2
        lengths.append(None if unbounded else rng.randint(1, 24))
    return DilatedPattern(
        lengths,
        rates,
        types,
        rng.choice(["paper", "grouped", "rotating"]),
        shift=rng.random() < 0.5,
        layer_idx=rng.randint(0, 3),
        offset=rng.choice([0, rng.randint(1, 60)]),
    )


def joined(pattern: DilatedPattern, n: int, m: int, head: int, heads: int, causal: bool = True) -> int:
    """In how many branches `head` joins query n to key m: the definition, independent of the package's arithmetic."""
    n, m, count = n + pattern.offset, m + pattern.offset, 0
    for w, r, kind in zip(pattern.segment_lengths, pattern.dilation_rates, pattern.branch_types, strict=True):
        if pattern.head_offset == "paper":
            s = head % r
        elif pattern.head_offset == "grouped":
            s = head // ((heads + r - 1) // r)
        else:
            s = (head + pattern.layer_idx * heads) % r
        if causal and m > n:
            continue
        if kind == "window":
            count += m % r == s and (w is None or abs(n - m) < w)
        else:
            g = w // 2 if pattern.shift else 0
            same = (n + g) // w == (m + g) // w
            count += same and ((n + g) % w) % r == s and ((m + g) % w) % r == s
    return count
