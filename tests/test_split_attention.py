"""Attention over several processes gives what one process gives, and little of it travels."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import build, random_ids
from patterns import random_pattern
from processes import HANG_LIMIT, spawn, start
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.testing._internal.distributed.fake_pg import FakeStore

from longnet_hf import (
    DilatedPattern,
    LongNetForCausalLM,
    dilated_attention,
    dilated_past,
)
from longnet_hf.context_parallel import LAYOUTS, SequenceSplit, split_attention, split_sequence, whole_rows


def random_positions(rng, length):
    """Positions of documents of random lengths, some of them a token."""
    positions = []
    while len(positions) < length:
        positions.extend(range(rng.choice([1, rng.randint(1, length), rng.randint(1, 2 * length)])))
    return positions[:length]


def assert_equal_to_one_process(rank, world_size, seeds, device="cpu", dtype=torch.float64, size=4, atol=1e-9):
    for seed in seeds:
        dilated_past._FEW_ROWS = seed % 2 << 17  # all at a time, or few
        rng = random.Random(seed)
        torch.manual_seed(seed)
        layout = rng.choice(["head_tail", "contiguous"])
        length = 2 * world_size * rng.randint(1, 20)
        packing, rows = rng.choice(["one document", "packed", "packed"]), rng.choice([1, 2, 3])
        heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2])
        pattern = replace(random_pattern(rng, heads), offset=0)
        inputs = [
            torch.randn(rows, h, length, size, dtype=dtype, device=device) for h in (heads * group, heads, heads)
        ]
        grad = torch.randn_like(inputs[0])
        inputs = [x.requires_grad_() for x in inputs]
        position_ids = None
        if packing == "packed":
            position_ids = torch.tensor([random_positions(rng, length) for _ in range(rows)], device=device)
        expected = dilated_attention(*inputs, pattern, position_ids=position_ids)
        expected_grads = torch.autograd.grad(expected, inputs, grad)
        split = SequenceSplit(length, world_size, rank, layout)
        mine = split.positions()
        local = [x.detach()[:, :, mine] for x in inputs]
        if rng.random() < 0.3:  # rows that are not adjacent
            local = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in local]
        local = [x.requires_grad_() for x in local]
        batch = split.find_documents(rows, position_ids=None if position_ids is None else position_ids[:, mine])
        output = split_attention(*local, pattern, batch)
        torch.testing.assert_close(output, expected[:, :, mine], rtol=0, atol=atol)
        for ours, theirs in zip(torch.autograd.grad(output, local, grad[:, :, mine]), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, mine], rtol=0, atol=atol)


@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_equal_those_of_one_process(world_size, tmp_path):
    spawn(assert_equal_to_one_process, world_size, tmp_path, range(48 // world_size))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_kernels_take_their_part_of_a_split_sequence(dtype, atol, tmp_path):
    """Two processes on one GPU, over gloo."""
    spawn(assert_equal_to_one_process, 2, tmp_path, range(4), "cuda", dtype, 32, atol)


def bytes_sent_in_a_step(monkeypatch, world_size, rank):
    """By one process to others, at 64 tokens per process: of each exchange, and of each reduction. The others only
    seem to be there."""
    exchanged, reduced, exchange, reduce = [], [], dist.all_to_all_single, dist.all_reduce

    def counted_exchange(output, x, receive, send, **options):
        exchanged.append((sum(send) - send[rank]) * x.shape[1] * x.element_size())
        return exchange(output, x, receive, send, **options)

    def counted_reduce(x, **options):
        reduced.append(2 * x.numel() * x.element_size())  # of a ring, at most
        return reduce(x, **options)

    def unexpected(*args, **options):
        raise AssertionError("a collective that is not counted")

    model = build(LongNetForCausalLM, segment_lengths=[8, 32, 128, 512], dilation_rates=[1, 4, 16, 64]).train()
    ids = random_ids(1, 64)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with monkeypatch.context() as patch, split_sequence():
            patch.setattr(dist, "all_to_all_single", counted_exchange)
            patch.setattr(dist, "all_reduce", counted_reduce)
            for name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all"):
                patch.setattr(dist, name, unexpected)
            model(ids, shift_labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    return model.config, exchanged, reduced


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_what_a_process_sends_is_bounded_by_what_is_kept(world_size, monkeypatch):
    for rank in (0, world_size // 2, world_size - 1):
        config, exchanged, reduced = bytes_sent_in_a_step(monkeypatch, world_size, rank)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
        crossing = sum(w // r for w, r in branches if w > 32)  # the length of a chunk
        assert len(exchanged) == 2 * layers  # one per layer forward, and one backward
        bytes_per_key = 2 * config.head_dim * 4  # with its value
        assert max(exchanged) <= 2 * heads * crossing * bytes_per_key  # of each of two chunks
        assert max(reduced) <= 32 and len(reduced) == 3  # lengths of the parts, number of labels, loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_key_is_sent_to_a_process_twice(layout):
    pattern, heads, size = DilatedPattern([8, 64, 128, 64], [1, 2, 4, 1], ["segment"] * 3 + ["window"]), 3, 4
    for rank in range(size):
        plan = whole_rows(SequenceSplit(128, size, rank, layout), 2).exchange(pattern, heads, torch.device("cpu"))
        keys = torch.stack(plan.sent_keys, dim=1)[plan.send_order].split(plan.send_splits)
        assert sum(map(len, keys)) > 0 or rank == size - 1
        for sent in keys:
            assert len(sent) == len(set(map(tuple, sent.tolist())))


def test_a_length_that_cannot_be_split_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match='pad_to_multiple_of=8.*, or split it with `layout="contiguous"`'):
        SequenceSplit(100, 4, 0)
    assert SequenceSplit(100, 4, 1, "contiguous").positions().tolist() == list(range(25, 50))
    for layout in ("head_tail", "contiguous"):
        with pytest.raises(ValueError, match=r"pad_to_multiple_of=[48]`\)\.$"):
            SequenceSplit(102, 4, 0, layout)
    with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
        SequenceSplit(0, 2, 0)
    with pytest.raises(ValueError, match="`layout`"):
        SequenceSplit(100, 4, 0, "ring")
    with pytest.raises(ValueError, match="`rank`"):
        SequenceSplit(100, 2, 2)
    assert SequenceSplit(101, 1, 0).positions().tolist() == list(range(101))
    with pytest.raises(ValueError, match="init_process_group"), split_sequence():
        pass


def die_in_the_middle(rank, world_size):
    x, split = torch.randn(1, 2, 16, 4), SequenceSplit(16 * world_size, world_size, rank)
    pattern = DilatedPattern([8, 64], [1, 2])
    split_attention(x, x, x, pattern, whole_rows(split, 1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    split_attention(x, x, x, pattern, whole_rows(split, 1))


def test_a_killed_process_ends_the_others_with_an_error(tmp_path):
    """By themselves: nothing else ends them, however long they take."""
    context = start(die_in_the_middle, 2, tmp_path)
    for process in context.processes:
        process.join(HANG_LIMIT)
    other, killed = (process.exitcode for process in context.processes)
    assert killed == -signal.SIGKILL and other not in (None, 0, -signal.SIGKILL)
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        context.join()
