"""What a `DilatedCache` holds is exactly what the pattern asks for, however the tokens come and go."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from patterns import random_pattern

from longnet_hf import DilatedCache, dilated_attention_reference


def random_case(seed, length=90):
    """A bounded pattern, and query, key, value and mask of a batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pattern = replace(random_pattern(rng), offset=0)
    while pattern.max_live_keys() is None:
        pattern = replace(random_pattern(rng), offset=0)
    heads, group, batch = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 3])
    query = torch.randn(batch, heads * group, length, 4, dtype=torch.float64)
    key, value = torch.randn(2, batch, heads, length, 4, dtype=torch.float64)
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in mask:
        if rng.random() < 0.5:
            row[: rng.randint(0, length)] = False
        if rng.random() < 0.5:
            start = rng.randrange(length)
            row[start : start + rng.randint(1, 20)] = False
    return rng, pattern, (query, key, value), mask


def make_cache(pattern, reserve):
    return DilatedCache(SimpleNamespace(layer_patterns=[pattern]), reserve=reserve)


def take(cache, qkv, columns, mask):
    """Give the cache some columns; returns their outputs (of the first ones, which it does not compute, `None`)."""
    q, k, v = (x[:, :, columns] for x in qkv)
    step = cache.begin(len(q), q.shape[2], q.device, mask[:, columns])
    if step.is_first:
        cache.update(k, v, 0, step)
        return None
    return cache.attend(q, k, v, 0, step)


def assert_attended(output, qkv, pattern, mask, columns):
    expected = dilated_attention_reference(*qkv, pattern, attention_mask=mask)[:, :, columns]
    real = mask[:, None, columns, None]
    torch.testing.assert_close(output * real, expected * real, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(120))
def test_any_chunks_attend_as_the_whole(seed):
    rng, pattern, qkv, mask = random_case(seed)
    reserve, done, slots = rng.choice([0, 1, 3, 10, 40]), 0, None
    cache = make_cache(pattern, reserve)
    while done < mask.shape[1]:
        columns = slice(done, min(done + rng.choice([1, 1, 2, 5, 17, 60]), mask.shape[1]))
        output = take(cache, qkv, columns, mask)
        if output is not None:
            assert_attended(output, qkv, pattern, mask, columns)
        done = columns.stop
        slots = slots or cache.layers[0].keys.data_ptr()
    assert cache.layers[0].keys.data_ptr() == slots  # never copied
    assert cache.get_seq_length() == mask.shape[1]
    assert torch.equal(cache.positions, mask.sum(1))
    if reserve == 0:
        assert cache.layers[0].keys.shape[2] - 1 == pattern.max_live_keys()


@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_taken_back_and_replaced(seed):
    """As assisted decoding does; and then by a mask, in every row another number."""
    rng, pattern, qkv, mask = random_case(seed)
    reserve, done = rng.choice([1, 4, 12]), 30
    cache = make_cache(pattern, reserve)
    take(cache, qkv, slice(0, done), mask)
    while done < 75:
        refused = rng.randint(1, reserve)
        others = [torch.randn_like(x) for x in qkv]
        take(cache, others, slice(done, done + refused), mask)
        cache.crop(-refused)
        assert cache.get_seq_length() == done
        columns = slice(done, done + rng.randint(refused, min(12, reserve + 1)))
        assert_attended(take(cache, qkv, columns, mask), qkv, pattern, mask, columns)
        done = columns.stop

    after = mask.clone()
    for row in after:
        row[done - rng.randint(0, reserve) : done] = False
    after[:, done:] = True
    cache.check_mask(after, mask.shape[1] - done)
    columns = slice(done, mask.shape[1])
    assert_attended(take(cache, qkv, columns, after), qkv, pattern, after, columns)
