"""A sequence over several processes gives what one process gives, outputs and gradients, and little of it travels."""

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from patterns import random_pattern

from longnet_hf import DilatedPattern, dilated_attention
from longnet_hf.split_sequence import SequenceSplit, split_attention


def spawn(function, world_size, folder, *arguments):
    """Run `function(rank, world_size, *arguments)` in processes that form a group."""
    store = str(folder / f"store{world_size}")
    torch.multiprocessing.spawn(in_group, args=(function, world_size, store, arguments), nprocs=world_size)


def in_group(rank, function, world_size, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()


def assert_equal_to_one_process(rank, world_size, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        pattern, layout = replace(random_pattern(rng), offset=0), rng.choice(["head_tail", "contiguous"])
        length = 2 * world_size * rng.randint(1, 20)
        batch, heads, group = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([1, 2])
        inputs = [torch.randn(batch, h, length, 4, dtype=torch.float64) for h in (heads * group, heads, heads)]
        grad = torch.randn_like(inputs[0])
        inputs = [x.requires_grad_() for x in inputs]
        expected = dilated_attention(*inputs, pattern)
        expected_grads = torch.autograd.grad(expected, inputs, grad)
        split = SequenceSplit(length, world_size, rank, layout)
        mine = split.positions()
        local = [x.detach()[:, :, mine].requires_grad_() for x in inputs]
        output = split_attention(*local, pattern, split)
        torch.testing.assert_close(output, expected[:, :, mine], rtol=0, atol=1e-9)
        for ours, theirs in zip(torch.autograd.grad(output, local, grad[:, :, mine]), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, mine], rtol=0, atol=1e-9)


@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_equal_those_of_one_process(world_size, tmp_path):
    spawn(assert_equal_to_one_process, world_size, tmp_path, range(40))


def assert_bytes_bounded(rank, world_size):
    """What is sent to others, forward and backward, at a fixed number of tokens per process."""
    pattern, heads, tokens = DilatedPattern([8, 32, 128, 512], [1, 4, 16, 64]), 2, 64
    sent, exchange = [], dist.all_to_all_single

    def counted(output, x, receive, send, **options):
        sent.append((sum(send) - send[rank]) * x[:1].numel() * x.element_size())
        return exchange(output, x, receive, send, **options)

    dist.all_to_all_single = counted
    x = torch.randn(1, heads, tokens, 4, requires_grad=True)
    split_attention(x, x, x, pattern, SequenceSplit(tokens * world_size, world_size, rank)).sum().backward()
    crossing = [
        w // r for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True) if w > tokens // 2
    ]
    bytes_per_key = 2 * 4 * 4  # with its value
    assert len(sent) == 2
    assert all(0 < count <= 2 * heads * sum(crossing) * bytes_per_key for count in sent)  # of each of two chunks


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_what_a_process_sends_is_bounded_by_what_is_kept(world_size, tmp_path):
    spawn(assert_bytes_bounded, world_size, tmp_path)


def test_a_length_that_cannot_be_split_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match="pad_to_multiple_of=8"):
        SequenceSplit(100, 4, 0)
    with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
        SequenceSplit(102, 4, 0, "contiguous")
    with pytest.raises(ValueError, match="`layout`"):
        SequenceSplit(100, 4, 0, "ring")
