"""The index arithmetic of `DilatedPattern` against its definition, pair by pair."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from patterns import joined, kept_rows, live_keys, random_pattern

from longnet_hf import Branch, DilatedPattern, LongNetConfig, draw_pattern, reach
from longnet_hf.pattern_report import describe_patterns, pattern_warnings


PAPER = DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])


def flat(ranges):
    return [position for rows in ranges for position in rows]


def test_how_far_back_the_first_segment_of_a_moved_grid_looks():
    """Shorter than a segment, whose beginning is not the sequence's."""
    pattern = DilatedPattern([17], [7], shift=True)
    assert [head.farthest for head in describe_patterns([pattern], 3, 9).layers[0].heads] == [0, 7, 7]


@pytest.mark.parametrize(
    ("lengths", "rates", "length", "farthest"), [((64, 512), (1, 4), 512, 252), ((4000,), (1,), 2100, 1999)]
)
def test_a_sequence_may_hold_halves_of_segments_only(lengths, rates, length, farthest):
    described = describe_patterns([DilatedPattern(lengths, rates, shift=True)], 4, length)
    assert {head.farthest for head in described.layers[0].heads} == {farthest}


@pytest.mark.parametrize("seed", range(120))
def test_tiles_hold_every_joined_pair_as_often_as_branches_join_it(seed):
    rng = random.Random(seed)
    heads, length, causal = rng.choice([1, 2, 3, 5]), rng.randint(1, 50), seed % 2 == 0
    pattern = random_pattern(rng, heads)
    queries, keys = (rng.choice([length, 1, rng.randint(1, length)]) for _ in range(2))
    counts = {}
    for tile in pattern.tiles(length, heads, num_queries=queries, num_keys=keys, is_causal=causal):
        for repeat in range(tile.repeats):
            for i, n in enumerate(tile.queries):
                for j, m in enumerate(tile.keys):
                    joins = {"full": True, "lower": j <= i, "upper": j >= i}
                    if tile.joined[i, j] if tile.mask == "given" else joins[tile.mask]:
                        for head in tile.heads:
                            at = (n + repeat * tile.period, m + repeat * tile.period, head)
                            counts[at] = counts.get(at, 0) + 1
    expected = {
        (n, m, head): joined(pattern, n, m, head, heads, causal)
        for n in range(length - queries, length)
        for m in range(keys)
        for head in range(heads)
    }
    assert counts == {at: count for at, count in expected.items() if count}
    if keys == length:
        assert pattern.pairs(length, heads, num_queries=queries, is_causal=causal) == sum(expected.values())


@pytest.mark.parametrize("seed", range(30))
def test_multiplicity_and_kept_rows_follow_the_definition(seed):
    rng = random.Random(seed)
    heads, length = rng.choice([1, 3, 4]), 40
    pattern = random_pattern(rng, heads)
    for head in range(heads):
        for n in range(length):
            for m in range(length):
                assert pattern.multiplicity(n, m, head, heads) == joined(pattern, n, m, head, heads)
        for branch in (x for x in pattern.branches if x.type != "sink"):
            alone = DilatedPattern(
                [branch.length],
                [branch.rate],
                [branch.type],
                pattern.head_offset,
                shift=pattern.shift,
                layer_idx=pattern.layer_idx,
                offset=pattern.offset,
                branch_heads=[branch.heads],
            )
            kept = [m for m in range(length) if any(joined(alone, n, m, head, heads) for n in range(m, m + 8))]
            assert flat(kept_rows(pattern, branch, head, heads, length)) == kept


@pytest.mark.parametrize("seed", range(20))
def test_live_keys_are_those_that_a_later_query_joins(seed):
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 4])
    pattern = random_pattern(rng, heads)
    for position in (0, 5, 23, 40):
        for head in range(heads):
            later = range(position + 1, position + 80)
            live = [m for m in range(position + 1) if any(joined(pattern, n, m, head, heads) for n in later)]
            assert live_keys(pattern, position, head, heads) == live
            assert pattern.max_live_keys() is None or len(live) <= pattern.max_live_keys()


@pytest.mark.parametrize("seed", range(20))
def test_reach_follows_joined_pairs_through_the_layers(seed):
    rng = random.Random(seed)
    heads, length, causal = rng.choice([1, 2]), 30, seed % 2 == 0
    patterns = [random_pattern(rng, heads) for _ in range(3)]
    position = rng.randrange(length)
    known = {position}
    for pattern in reversed(patterns):
        known |= {
            m
            for n in known
            for m in range(length)
            if any(joined(pattern, n, m, head, heads, causal) for head in range(heads))
        }
    result = reach(patterns, position, heads, length=length, is_causal=causal)
    assert flat(result.reached) == sorted(known)
    assert flat(result.blind) == sorted(set(range(position + 1 if causal else length)) - known)


def test_the_papers_pattern_is_blind_at_segment_boundaries_and_shifted_grids_are_not():
    lengths, rates = [16, 32, 64], [1, 2, 4]
    aligned = [DilatedPattern(lengths, rates, layer_idx=i) for i in range(12)]
    shifted = [DilatedPattern(lengths, rates, shift=i % 2 == 1, layer_idx=i) for i in range(4)]
    for depth in range(1, 13):
        assert 15 in flat(reach(aligned[:depth], 16, 4).blind)
    assert reach(aligned, 16, 4).blind == [range(15, 16)]
    for position in range(64):
        assert not reach(shifted, position, 4).blind


@pytest.mark.parametrize("seed", range(40))
def test_a_description_says_what_the_pattern_joins(seed):
    rng = random.Random(seed)
    heads, length, causal = rng.choice([1, 2, 3]), rng.choice([5, 17, 30]), seed % 2 == 0
    patterns = [random_pattern(rng, heads) for _ in range(2)]
    described = describe_patterns(patterns, heads, length, is_causal=causal)
    pairs = []
    for pattern, layer in zip(patterns, described.layers, strict=True):
        for head, of_head in enumerate(layer.heads):
            joined_at = [
                (n, m, pattern.multiplicity(n, m, head, heads, causal)) for n in range(length) for m in range(length)
            ]
            pairs.append(sum(count for *_, count in joined_at) / length)
            assert of_head.pairs_per_token == pytest.approx(pairs[-1])
            assert of_head.cache_keys == (pattern.max_live_keys(head) if causal else 0)
            assert of_head.branches == [branch for branch in pattern.branches if branch.belongs_to(head)]
            others = [x for x in pattern.branches if x.type != "sink"]
            distances = [
                abs(n - m)
                for n, m, count in joined_at
                if count and any(pattern.joins(x, n, m, head, heads) for x in others)
            ]
            assert of_head.farthest == max(distances, default=0)
    assert described.pairs_per_token == pytest.approx(sum(pairs) / len(pairs))
    for sight in described.sight:
        result = reach(patterns, sight.position, heads, length=length, is_causal=causal)
        assert (sight.reached, sight.blind) == (len(flat(result.reached)), result.blind)
        assert sight.earliest == flat(result.reached)[0]
    assert json.loads(json.dumps(described.to_dict()))["layers"][0]["heads"][0]["head"] == 0
    assert f"a sequence of {length} tokens" in str(described)


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_shows_what_the_pattern_joins(seed):
    pytest.importorskip("matplotlib")
    rng = random.Random(seed)
    heads, length, causal = rng.choice([1, 2, 3]), 40, seed % 2 == 0
    patterns = [random_pattern(rng, heads) for _ in range(2)]
    described = describe_patterns(patterns, heads, length, is_causal=causal)
    n, m = np.arange(length)[:, None], np.arange(length)
    joined_by = [pattern.multiplicity(n, m, head, heads, causal) > 0 for pattern in patterns for head in range(heads)]
    by_place, by_distance, distances = described._shares()
    np.testing.assert_allclose(by_place, np.mean(joined_by, axis=0))  # every pair has its cell
    assert distances == [0, 1, 2, 4, 8, 16, 32]
    for row, joined_pairs in zip(by_distance, joined_by, strict=True):
        # Of the keys at one distance, before the query or, in an encoder, on either side
        sides = (joined_pairs,) if causal else (joined_pairs, joined_pairs.T)
        at = [np.mean([np.diagonal(side, -d).mean() for side in sides]) for d in range(length)]
        spans = zip(distances, [*distances[1:], length], strict=True)
        np.testing.assert_allclose(row, [np.mean(at[a:b]) for a, b in spans], atol=0.04)
    drawn = described.draw().axes
    np.testing.assert_array_equal(drawn[0].images[0].get_array().filled(0), by_place)
    np.testing.assert_array_equal(drawn[1].images[0].get_array().filled(0), by_distance)


@pytest.mark.parametrize("causal", [True, False])
def test_a_picture_shows_a_sink_at_every_distance(causal):
    """Few keys of many: none of them may be missed, and their share is their share."""
    length, sink = 32768, 4
    pattern = DilatedPattern([64], [1], branch_types=["window"]).with_branch("sink", sink)
    by_place, by_distance, distances = describe_patterns([pattern], 1, length, is_causal=causal)._shares()
    spans = zip(distances, [*distances[1:], length], strict=True)
    # Of the pairs at a distance d there are N - d, on either side in an encoder, where sinks are keys and no queries
    exact = [np.mean([min(sink, length - d) / (length - d) for d in range(a, b)]) for a, b in spans]
    exact = np.array(exact) / (1 if causal else 2)
    far = np.array(distances) >= 64
    np.testing.assert_allclose(by_distance[0, ~far], 1)
    np.testing.assert_allclose(by_distance[0, far], exact[far], rtol=0.2)
    np.testing.assert_allclose(by_place[2:, 0], sink / (length / 64), rtol=1e-6)


def test_a_description_names_the_blind_spots_of_the_papers_pattern():
    patterns = [DilatedPattern([16, 32, 64], [1, 2, 4], layer_idx=i) for i in range(12)]
    described = describe_patterns(patterns, 4, 64)
    assert "the output at 48 knows 48 positions, the earliest 0; blind to 1: 47" in str(described)
    assert str(described).count("heads 0-3: segment of 16; segment of 32 at dilation rate 2") == 1  # layers are alike
    with pytest.raises(ValueError, match="`length` must be an integer of at least 1, got 0"):
        describe_patterns(patterns, 4, 0)


def test_work_of_the_papers_pattern(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from attention import pattern_flops

    assert PAPER.pairs(32768, 12) / 32768 / 12 == pytest.approx(2133, abs=2)
    assert PAPER.pairs(1 << 20, 12) / PAPER.pairs(1 << 15, 12) == pytest.approx(32, rel=1e-3)
    assert pattern_flops(PAPER, 4096, 12, 64) == 4 * 64 * PAPER.pairs(4096, 12)
    assert pattern_flops(PAPER, 4096, 24, 64, num_key_value_heads=12, backward=True) == 2 * 10 * 64 * PAPER.pairs(
        4096, 12
    )
    assert PAPER.max_live_keys() == 2048 + 2048 + 2048 + 2731 + 2731
    full = DilatedPattern.full()
    assert full.pairs(100, 3) == 3 * 100 * 101 // 2
    assert full.max_live_keys() is None


def test_number_of_tiles_does_not_grow_with_the_length():
    window = DilatedPattern([2048, 32768], [1, 16], ["window", "window"])
    for pattern in (PAPER, window):
        assert len(pattern.tiles(1 << 24, 12)) == len(pattern.tiles(1 << 20, 12))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(segment_lengths=[8, 16], dilation_rates=[1]), "`segment_lengths`, `dilation_rates` and `branch_types`"),
        (dict(segment_lengths=[], dilation_rates=[]), "`segment_lengths`"),
        (dict(segment_lengths="16", dilation_rates=[1, 2]), "`segment_lengths` .* '16'"),
        (dict(segment_lengths=[0], dilation_rates=[1]), "`segment_lengths` .* 0"),
        (dict(segment_lengths=[8.0], dilation_rates=[1]), r"`segment_lengths` .* 8\.0"),
        (dict(segment_lengths=[True], dilation_rates=[1]), "`segment_lengths` .* True"),
        (dict(segment_lengths=[None], dilation_rates=[1]), "`segment_lengths` .* None"),
        (dict(segment_lengths=[None], dilation_rates=[2], branch_types=["window"]), "`segment_lengths` .* None"),
        (dict(segment_lengths=[8], dilation_rates=[-1]), "`dilation_rates` .* -1"),
        (dict(segment_lengths=[8], dilation_rates=[1], branch_types=["block"]), "`branch_types` .* 'block'"),
        (dict(segment_lengths=[8], dilation_rates=[1], head_offset="mod"), "`head_offset` .* 'mod'"),
        (dict(segment_lengths=[8], dilation_rates=[1], layer_idx=-1), "`layer_idx` .* -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        DilatedPattern(**arguments)


def test_heads_are_taken_out_of_a_pattern():
    window = DilatedPattern([8, 2], [1, 1], ["window", "sink"])
    for pattern, left in (
        (window, window.with_full_heads([0, 1], 4)),
        (window.with_full_heads([0, 1], 4), window.with_full_heads([0, 1], 4)),
        (DilatedPattern.full().with_branch("window", 8, [1]), DilatedPattern.full()),
    ):
        without = pattern.without_heads([0, 1], 4)
        for head in range(4):
            expected = [branch[:3] for branch in left.branches if head > 1 and branch.belongs_to(head)]
            assert [branch[:3] for branch in without.branches if branch.belongs_to(head)] == expected
    for pattern in (window, DilatedPattern([8], [1], branch_heads=[[1]])):
        assert pattern.without_heads([], 4) == pattern
        assert pattern.without_heads(range(4), 4) is None
    assert DilatedPattern([8], [1], branch_heads=[[1]]).without_heads([1], 4) is None


def test_full_heads_take_the_place_of_all_their_branches():
    window = DilatedPattern([8, 2], [1, 1], ["window", "sink"])
    assert window.with_full_heads([2, 0, 2], 3) == window.with_full_heads((0, 2), 3)
    assert window.with_full_heads([1, 0, 1], 3) != window.with_full_heads([0, 1, 2], 3) == DilatedPattern.full()
    some = DilatedPattern([8, 2], [1, 1], ["window", "sink"], branch_heads=[[0, 1], [1]])
    assert some.with_full_heads([1], 3) == DilatedPattern(
        [8, None], [1, 1], ["window", "window"], branch_heads=[[0], [1]]
    )
    assert some.with_full_heads([0, 1], 3) == DilatedPattern([None], [1], ["window"], branch_heads=[[0, 1]])
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"`heads` must be key/value heads from 0 to 2, got \[{wrong}\]"):
            window.with_full_heads([0, wrong], 3)


def test_a_sink_is_cut_where_queries_are(monkeypatch):
    """Not where other branches, of any length, could have queries."""
    counted = []
    joins = DilatedPattern.joins

    def counting(self, branch, n, m, head, num_heads):
        counted.append(n.size)
        return joins(self, branch, n, m, head, num_heads)

    monkeypatch.setattr(DilatedPattern, "joins", counting)
    pattern = DilatedPattern([1 << 20, 4], [1, 1], ["segment", "sink"])
    assert pattern.pairs(1 << 19, 1, num_queries=9) == 9 * (1 << 19) - sum(range(9))
    assert counted and max(counted) == 9


def test_patterns_are_values():
    pattern = DilatedPattern([8, None], [2, 1], ["segment", "window"], "rotating", shift=True, layer_idx=3)
    same = DilatedPattern.from_json(pattern.to_json())
    assert same == pattern and hash(same) == hash(pattern)
    assert pattern.branches == (Branch("segment", 8, 2), Branch("window", None, 1))
    with pytest.raises(AttributeError):
        pattern.shift = False


def test_warnings_name_queries_without_keys_and_keys_of_the_first_branch_only():
    assert pattern_warnings([PAPER], 12) == []
    (empty,) = pattern_warnings([DilatedPattern([8], [2])], 2)
    assert "head 1 at position 0" in empty and "zeros" in empty
    (empty,) = pattern_warnings([DilatedPattern([8], [3], ["window"])], 2)
    assert "head 1 at position 0" in empty
    (uncovered,) = pattern_warnings([DilatedPattern([8, 16], [1, 4])], 2)
    assert "Position 2 " in uncovered and "no branch but the first" in uncovered
    rotating = [DilatedPattern([8, 16], [1, 4], head_offset="rotating", layer_idx=i) for i in range(2)]
    assert pattern_warnings(rotating, 2) == []
    assert len(pattern_warnings(rotating[:1], 2)) == 1
    assert pattern_warnings([DilatedPattern([8], [1])], 1) == []  # there is but one branch
    window = DilatedPattern([8], [3], ["window"])
    assert len(pattern_warnings([window], 2)) == 1  # whose first queries see later keys where these are not hidden
    assert pattern_warnings([window], 2, is_causal=False) == []
    assert len(pattern_warnings([DilatedPattern([8], [2])], 2, is_causal=False)) == 1
    assert pattern_warnings([DilatedPattern([8, 16], [1, 4]), DilatedPattern.full()], 2) == []
    with pytest.warns(UserWarning, match="Position 1 "):
        LongNetConfig(num_attention_heads=1, hidden_size=64, segment_lengths=[8, 16], dilation_rates=[1, 2])


def test_a_pattern_draws_itself():
    assert draw_pattern(DilatedPattern([2, 4], [1, 2]), 5, head=0, num_heads=2).split("\n") == [
        "2····",
        "11···",
        "1·2··",
        "··11·",
        "····2",
    ]


def test_layers_of_one_pattern_share_their_tiles():
    layers = [DilatedPattern([8, 16], [1, 2], layer_idx=i) for i in range(2)]
    assert layers[0].tiles(40, 2) is layers[1].tiles(40, 2)
    rotating = [DilatedPattern([8, 16], [1, 2], head_offset="rotating", layer_idx=i) for i in range(2)]
    assert rotating[0].tiles(40, 1) != rotating[1].tiles(40, 1)
