"""The study of blocks that are chosen per token: its scores, choices and masks, each against loops or the operator."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from longnet_hf import DilatedPattern
from longnet_hf.dilated_operator import dilated_attention_reference


HEADS, GROUP, LENGTH, DIM = 2, 3, 96, 16
SCALING = DIM**-0.5


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("selected_blocks")


@pytest.fixture
def arm(study):
    args = study.Arguments(window=10)
    return lambda name: study.Arm.parse(f"{name}/block-8/keys-16", args)


def tensors(length=LENGTH):
    query = torch.randn(HEADS, GROUP, length, DIM, dtype=torch.float64) * 2
    return query, *torch.randn(2, HEADS, length, DIM, dtype=torch.float64).unbind()


def masses_by_hand(query, key, n, block, average=1, sinks=0):
    """Weights, token by token: of the group's query heads, for the blocks up to the query."""
    blocks = n // block + 1
    masses = torch.zeros(HEADS, blocks, dtype=torch.float64)
    for head in range(HEADS):
        for q in query[head, :, n]:
            means = [key[head, at : at + average].mean(0) for at in range(0, n + 2 - average, average)]
            weights = torch.stack([q @ k * SCALING for k in means]).softmax(0)
            for i, weight in enumerate(weights):
                if i * average >= sinks:
                    masses[head, i * average // block] += weight / GROUP
    return masses


@pytest.mark.parametrize("average", (1, 2, 8))
def test_masses_of_blocks_are_sums_of_weights(study, average):
    query, key, _ = tensors()
    positions = torch.tensor([8, 37, 90])
    found = study.block_masses(
        query[:, :, positions] * SCALING, study.mean_keys(key, average), positions, 8, average, 3
    )
    for i, n in enumerate(positions.tolist()):
        expected = masses_by_hand(query, key, n, 8, average, 3)
        torch.testing.assert_close(found[:, i, : n // 8 + 1].exp(), expected)
        assert (found[:, i, n // 8 + 1 :] == -math.inf).all()  # what comes later


@pytest.mark.parametrize("average, sinks", ((1, 3), (2, 3), (8, 0)))
def test_of_the_best_key_alone_a_block_has_its_weight(study, average, sinks):
    query, key, _ = tensors()
    positions = torch.tensor([8, 37, 90])
    arguments = query[:, :, positions] * SCALING, study.mean_keys(key, average), positions, 8, average, sinks
    found = study.block_masses(*arguments, of_best=True)
    for i, n in enumerate(positions.tolist()):
        for head in range(HEADS):
            shares = []
            for q in query[head, :, n]:
                best = {}  # of the sink (-1) and every block
                for at in range(0, n + 2 - average, average):
                    place = -1 if at < sinks else at // 8
                    weight = math.exp(q @ key[head, at : at + average].mean(0) * SCALING)
                    best[place] = max(best.get(place, 0), weight)
                shares.append([best.get(block, 0) / sum(best.values()) for block in range(n // 8 + 1)])
            expected = torch.tensor(shares, dtype=torch.float64).mean(0)
            torch.testing.assert_close(found[head, i, : n // 8 + 1].exp(), expected)
        assert (found[:, i, n // 8 + 1 :] == -math.inf).all()


def test_the_largest_masses_are_chosen_and_the_first_of_equal_ones(study):
    masses = torch.tensor([0.1, 0.3, 0.1, 0.2, 0.3, 0.0]).log()[None, None]

    def chosen(*args):
        return study.choose(masses, *args)[0, 0].nonzero().flatten().tolist()

    assert [chosen(count) for count in (1, 2, 3, 4, 5, 9)] == [
        [1],
        [1, 4],
        [1, 3, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    assert [chosen(9, top) for top in (10, 50, 70, 85)] == [[1], [1, 4], [1, 3, 4], [0, 1, 3, 4]]
    assert not study.choose(torch.full((1, 1, 4), -math.inf), 2, 90).any()


@pytest.mark.parametrize("name", ("mass", "slow-8", "slow-8/avg-2/shared", "random", "mass/top-50", "slow-4/int8/max"))
def test_only_blocks_older_than_the_window_are_chosen_and_tiles_do_not_matter(study, arm, name):
    query, key, _ = tensors()
    one = arm(name)
    chooser = study.Chooser(one, query, key, SCALING, 2)
    whole = chooser(0, LENGTH)
    count = whole.sum(-1)
    for n in range(LENGTH):
        eligible = max(0, (n - one.window + 1) // 8)
        assert not whole[:, n, eligible:].any()
        if not one.top:
            assert (count[:, n] == min(2, eligible)).all()
    if one.kind == "random":
        return
    assert torch.equal(chooser(40, 60), whole[:, 40:60, :8])
    # The future does not matter: keys and queries behind the 50th are others
    other = tensors()
    query[:, :, 50:], key[:, 50:] = other[0][:, :, 50:], other[1][:, 50:]
    assert torch.equal(study.Chooser(one, query, key, SCALING, 2)(0, LENGTH)[:, :50], whole[:, :50])


def test_the_oracle_and_products_of_full_rank_choose_what_has_most_weight(study, arm):
    query, key, _ = tensors()
    n = 77
    masses = masses_by_hand(query, key, n, 8, sinks=2)[:, : (n - 9) // 8]
    best = masses.topk(2).indices.sort().values
    eyes = torch.eye(DIM, dtype=torch.float64)
    projections = eyes.expand(HEADS, GROUP, -1, -1) * 2, eyes.expand(HEADS, -1, -1) / 2
    for name in ("mass", f"slow-{DIM}", f"low-{DIM}"):
        chosen = study.Chooser(arm(name), query, key, SCALING, 2, projections)(n, n + 1)
        assert torch.equal(chosen[:, 0].nonzero()[:, 1].view(HEADS, 2), best)


def test_one_key_that_is_asked_for_outweighs_many_only_where_the_best_counts(study):
    query = torch.zeros(1, GROUP, LENGTH, DIM, dtype=torch.float64)
    key = torch.zeros(1, LENGTH, DIM, dtype=torch.float64)
    query[..., -1], key[0, 16:24, -1], key[0, 43, -1] = 1 / SCALING, 2.0, 3.5
    for options, place in {"": 2, "/max": 5}.items():
        one = study.Arm.parse(f"slow-4/block-8/keys-8{options}", study.Arguments(window=10))
        chosen = study.Chooser(one, query, key, SCALING, 2)(90, 91)[0, 0]
        assert chosen.nonzero().flatten().tolist() == [place]


def test_slow_dimensions_are_the_last_pairs(study):
    assert study.slow_dimensions(16, 4).tolist() == [6, 7, 14, 15]
    assert sorted(study.slow_dimensions(16, 16).tolist()) == list(range(16))
    with pytest.raises(ValueError, match="an even D of at most 16, got 18"):
        study.slow_dimensions(16, 18)


def test_two_levels_choose_inside_the_best_large_blocks(study, monkeypatch):
    monkeypatch.setattr(study, "COARSE_BLOCK", 32)
    monkeypatch.setattr(study, "COARSE_AVERAGE", 4)
    args = study.Arguments(window=10)
    arm = study.Arm.parse("mass/coarse-1/block-8/keys-16", args)
    query, key, _ = tensors()
    chosen = study.Chooser(arm, query, key, SCALING, 2)(0, LENGTH)
    for n in (60, 95):
        masses = masses_by_hand(query, key, n, 32, 4, 2)
        for head in range(HEADS):
            inside = int(masses[head, : (n - 10) // 32 + 1].argmax())
            blocks = chosen[head, n].nonzero().flatten()
            assert len(blocks) and (blocks // 4 == inside).all()


def test_selected_attention_is_softmax_over_window_sink_and_chosen_blocks(study, arm, monkeypatch):
    monkeypatch.setitem(study.TILE, "cpu", 16 * HEADS * GROUP * LENGTH)  # several tiles
    monkeypatch.setattr(study.in_tiles, "__defaults__", (16,))
    query, key, value = tensors()
    chooser = study.Chooser(arm("slow-8"), query, key, SCALING, 2)
    mask = study.selected_mask(chooser, 8, 10, 2, "cpu")
    output = study.masked_attention(query, key, value, SCALING, mask)
    chosen = chooser(0, LENGTH)
    for n in (0, 5, 30, 95):
        for head in range(HEADS):
            seen = [m for m in range(n + 1) if n - m < 10 or m < 2 or chosen[head, n, m // 8]]
            weights = (query[head, :, n] @ key[head, seen].T * SCALING).softmax(-1)
            torch.testing.assert_close(output[head, :, n], weights @ value[head, seen])


def test_dilation_of_single_keys_is_that_of_the_operator_and_blocks_keep_neighbours(study):
    query, key, value = tensors()
    pattern = DilatedPattern([6, 24, 96], [1, 2, 4], ["window"] * 3, head_offset="rotating", layer_idx=3)

    def attend(block):
        mask = study.dilated_mask(pattern, block, HEADS, 2, "cpu", torch.float64)
        return study.masked_attention(query, key, value, SCALING, mask)

    with_sink = pattern.with_branch("sink", 2)
    expected = dilated_attention_reference(query.flatten(0, 1)[None], key[None], value[None], with_sink)
    torch.testing.assert_close(attend(1).flatten(0, 1)[None], expected, rtol=1e-6, atol=1e-6)  # log C in float32
    mask = study.dilated_mask(pattern, 8, HEADS, 0, "cpu", torch.float64)(95, 96)[:, 0].exp().round().int()
    for head in range(HEADS):
        for m in range(LENGTH):
            branches = zip((6, 24, 96), (1, 2, 4), strict=True)
            assert mask[head, m] == sum(95 - m < w and m // 8 % r == (head + 3 * HEADS) % r for w, r in branches)


def test_products_of_low_rank_are_nearest_and_distilled_ones_nearer(study, arm):
    """Keys that differ in two of the slow dimensions alone: rank two says all. What is asked for in a fast one, which
    the nearest product does not see, a distilled one finds."""
    query, key, _ = tensors(256)
    slow = study.slow_dimensions(DIM, 10)
    fast = [i for i in range(DIM) if i not in slow]
    key[..., slow[2:]] = 0.5
    of_query, of_key = study.low_rank(query[0], key[0], 2)
    product = (query[0] @ of_query) @ (key[0] @ of_key).T
    wanted = query[0][..., slow] @ key[0][:, slow].T
    centred = [x - x.mean(-1, keepdim=True) for x in (product, wanted)]
    torch.testing.assert_close(*centred, rtol=1e-3, atol=1e-3)
    assert (of_key[fast] == 0).all()

    query[..., 0], query[..., slow[0]], key[..., 0] = 4.0, 4.0, key[..., 0] * 3
    first = study.low_rank(query[0], key[0], 1)
    one = arm("learned-1")
    stacked = first[0].expand(1, GROUP, -1, -1), first[1][None]
    learned = [x[0] for x in study.distil(query[:1], key[:1], SCALING, stacked, one, steps=400)]

    def loss(projections):
        q, k = query[0].float() @ projections[0].float(), key[0].float() @ projections[1].float()
        positions = torch.arange(64, 256)
        true = study.block_masses(query[:1, :, 64:] * SCALING, key[:1], positions, 8, 1, 4)[0].exp()
        found = study.block_masses(q[None, :, 64:] * SCALING, k[None], positions, 8, 1, 4)[0]
        far = torch.arange(7, 256, 8) <= positions[:, None] - one.window
        return -(true * far * found.masked_fill(~far, 0)).sum(-1).mean()

    eye = torch.eye(DIM, dtype=torch.float64)
    before, after, least = loss(first), loss(learned), loss((eye, eye))
    assert least < after < before - 0.5 * (before - least)


def test_work_counts_multiply_adds_over_those_of_attention(study, arm):
    args = study.Arguments()

    def work(name):
        return study.Arm.parse(name, args).work(32768, 64, 3)

    assert work("mass") == (0.5, 0.5) and work("slow-16") == (0.125, 0.125)
    assert work("slow-32/avg-4/shared/int8") == pytest.approx((1 / 48, 1 / 32))
    assert work("slow-16/coarse-4") == pytest.approx((0.125 * (0.25 + 1 / 16),) * 2)


def test_arms_that_mean_nothing_are_refused(study):
    args = study.Arguments()
    for name, words in {
        "best": "none of the arms",
        "slow": "take a size",
        "mass-16": "take a size",
        "slow-16/avg": "options are",
        "slow-16/pool-2": "options are",
        "slow-16/shared-2": "options are",
        "slow-16/max-2": "options are",
        "random/max": "random scores nothing",
        "random/avg-2": "random scores nothing",
        "full/avg-2": "options are for scores",
        "dilated-8/share-33": "options are for scores",
        "all-keys/keys-512": "all-keys takes share-S alone",
        "slow-16/avg-3": "avg must divide block",
        "mass/keys-100": "avg must divide block",
    }.items():
        with pytest.raises(ValueError, match=words):
            study.Arm.parse(name, args)
    assert study.Arm.parse("all-keys/share-33", args).share == 33


def test_kernels_that_are_timed_agree_with_pytorch_and_sums_have_all_parts(study):
    pytest.importorskip("triton")
    cost = importlib.import_module("selected_blocks_cost")
    cost.check(cost.SCORE_SHAPES[:1], cost.CHOSEN_SHAPES[:1])
    parts = {
        name: 10.0**i for i, name in enumerate(("largest", "choice", "window", "window, both", "at random", "alike"))
    }
    assert cost.sums(parts) == {
        "at random, sum": 10111,
        "at random, sum of both": 31011,
        "alike, sum": 100111,
        "alike, sum of both": 301011,
    }
    assert {*cost.sums(parts), *parts} <= cost.PARTS.keys()
