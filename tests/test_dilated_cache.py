"""What a `DilatedCache` holds is exactly what the pattern asks for, however the tokens come and go."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import KINDS, build, random_ids
from patterns import random_pattern
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from longnet_hf import (
    DilatedCache,
    DilatedPattern,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    dilated_attention_reference,
    dilated_cache,
    rank_heads,
)


def random_case(seed, length=90):
    """A pattern, and query, key, value and mask of a batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, group, batch = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 3])
    pattern = replace(random_pattern(rng, heads), offset=0)
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
    tokens = cache.count_tokens(len(q), q.shape[2], q.device, mask[:, columns])
    if tokens.is_first:
        cache.update(k, v, 0, tokens)
        return None
    return cache.attend(q, k, v, 0, tokens)


def assert_attended(output, qkv, pattern, mask, columns):
    expected = dilated_attention_reference(*qkv, pattern, attention_mask=mask)[:, :, columns]
    real = mask[:, None, columns, None]
    torch.testing.assert_close(output * real, expected * real, rtol=0, atol=1e-9)


@pytest.fixture
def seed(request, monkeypatch):
    """Blocks of tokens attend to all slots at once, as on a GPU, or branch by branch."""
    monkeypatch.setattr(dilated_cache, "_BLOCK_ON_CPU", request.param % 2 << 10)
    return request.param


@pytest.mark.parametrize("seed", range(120), indirect=True)
def test_any_chunks_attend_as_the_whole(seed):
    rng, pattern, qkv, mask = random_case(seed)
    reserve, done, slots = rng.choice([0, 1, 3, 10, 40]), 0, []
    cache = make_cache(pattern, reserve)
    while done < mask.shape[1]:
        columns = slice(done, min(done + rng.choice([1, 1, 2, 5, 17, 60]), mask.shape[1]))
        output = take(cache, qkv, columns, mask)
        if output is not None:
            assert_attended(output, qkv, pattern, mask, columns)
        done = columns.stop
        bounded = [part for part in cache.layers[0].parts if not part.is_growing]
        slots = slots or [part.keys.data_ptr() for part in bounded]
    assert [part.keys.data_ptr() for part in bounded] == slots  # never copied
    assert cache.get_seq_length() == mask.shape[1]
    assert torch.equal(cache.positions, mask.sum(1))
    for part in bounded if reserve == 0 else ():
        assert part.slots.count == part.pattern.max_live_keys() <= pattern.max_live_keys()


@pytest.mark.parametrize("seed", range(4), indirect=True)
@pytest.mark.parametrize(
    "branches",
    [
        {None: [1]},
        {None: [1], 5: [0]},
        {None: [0, 2], 5: [2]},
        {5: [1]},
    ],
)
def test_heads_without_any_branch_see_nothing(branches, seed):
    _, _, qkv, mask = random_case(seed)
    query, key, value = (torch.randn(len(mask), heads, 90, 4, dtype=torch.float64) for heads in (6, 3, 3))
    kinds = ["window"] * len(branches)
    pattern = DilatedPattern([*branches], [1] * len(branches), kinds, branch_heads=[*branches.values()])
    cache, qkv = make_cache(pattern, reserve=9), (query, key, value)
    for start, stop in ((0, 40), (40, 41), (41, 50), (50, 80), (80, 90)):
        output = take(cache, qkv, slice(start, stop), mask)
        if output is not None:
            assert_attended(output, qkv, pattern, mask, slice(start, stop))


@pytest.mark.parametrize("reserve", [0, 3, 40])
def test_the_first_tokens_may_attend_through_the_cache(reserve, monkeypatch):
    for block in (1, 1 << 10):
        monkeypatch.setattr(dilated_cache, "_BLOCK_ON_CPU", block)
        for seed in range(4):
            _, pattern, qkv, mask = random_case(seed)
            cache = make_cache(pattern, reserve)
            for columns in (slice(0, 20), slice(20, 50)):
                tokens = cache.count_tokens(len(mask), columns.stop - columns.start, "cpu", mask[:, columns])
                output = cache.attend(*(x[:, :, columns] for x in qkv), 0, tokens)
                assert_attended(output, qkv, pattern, mask, columns)


def test_patterns_that_begin_inside_a_document_are_refused():
    with pytest.raises(ValueError, match="`offset=0`, got DilatedPattern.*offset=5"):
        DilatedCache.for_patterns([DilatedPattern.full(), DilatedPattern.full().at(5)])


@pytest.mark.parametrize("seed", range(60), indirect=True)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [None, 100])
def test_a_step_makes_no_tensors_of_lists(kind, max_length):
    """A GPU would wait for each of them, in every layer."""

    class Operators(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    heads = dict(num_attention_heads=8, num_key_value_heads=4, full_attention_heads={0: [1, 3], 1: [2], 2: [0, 1, 3]})
    model = build(LongNetForCausalLM, kind, **(heads if kind == "heads" else {}))
    cache, ids = DilatedCache(model.config, max_length=max_length), random_ids(2, 50)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:41], past_key_values=cache)
        with Operators() as operators:
            output = model(ids[:, 41:42], past_key_values=cache).logits
        assert len(operators.names) > 50 and "lift_fresh.default" not in operators.names
        torch.testing.assert_close(output, model(ids[:, :42]).logits[:, 41:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_under_autocast(padding):
    """Rotary positions leave queries and keys in float32, and values come in bf16."""
    pattern, (q, k, v) = DilatedPattern([16, 40], [1, 3]), torch.randn(3, 2, 4, 80, 8)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, 40 : 40 + padding] = 0
    cache = DilatedCache.for_patterns([pattern], reserve=4)
    with torch.autocast("cpu", torch.bfloat16):
        for columns in (slice(40), slice(40, 80)):
            tokens = cache.count_tokens(2, 40, "cpu", mask[:, columns] if padding else None)
            output = cache.attend(q[:, :, columns], k[:, :, columns], v[:, :, columns].bfloat16(), 0, tokens)
            assert output.dtype == q.dtype
    expected = dilated_attention_reference(q, k, v, pattern, attention_mask=mask)[:, :, 40:]
    torch.testing.assert_close(output * mask[:, None, 40:, None], expected, rtol=0, atol=0.05)


def test_what_is_remembered_of_full_attention_does_not_grow_with_the_text():
    cache = DilatedCache.for_patterns([DilatedPattern([7], [1], ["window"]).with_full_heads([1], 3)])
    for _ in range(2):
        key = torch.zeros(1, 3, 5000, 4)
        cache.update(key, key, 0)
    slots = cache.layers[0].parts[1].slots
    assert slots.count > 10_000
    tensors = [*slots.rings, *slots.rings_on_cpu, slots.branch]
    assert sum(x.untyped_storage().nbytes() for x in tensors) < 1000


@pytest.mark.parametrize("seed", range(60), indirect=True)
def test_any_history_of_taking_back(seed):
    """Every crop is exact or refused, whatever was padding, and however many of them follow one another."""
    rng, pattern, qkv, mask = random_case(seed, length=200)
    cache, source = make_cache(pattern, rng.choice([0, 1, 4, 12])), 0
    kept = torch.zeros(0, dtype=torch.int64)  # which of the columns of `qkv` are in the cache
    for _ in range(30):
        if rng.random() < 0.5 and len(kept):
            count = rng.choice([1, 2, 4, rng.randint(1, len(kept)), len(kept)])
            count, before = min(count, len(kept)), cache.positions.clone()
            try:
                cache.crop(-count)
                kept = kept[:-count]
            except ValueError:
                assert count < len(kept) and torch.equal(cache.positions, before)
        else:
            columns = slice(source, source + rng.choice([1, 1, 2, 5]))
            source, kept = columns.stop, torch.cat((kept, torch.arange(columns.start, columns.stop)))
            output = take(cache, qkv, columns, mask)
            if output is not None:
                held, last = tuple(x[:, :, kept] for x in qkv), slice(len(kept) - output.shape[2], None)
                assert_attended(output, held, pattern, mask[:, kept], last)
        assert cache.get_seq_length() == len(kept)
        assert len(kept) == 0 or torch.equal(cache.positions, mask[:, kept].sum(1))


def test_taking_back_more_than_is_known_is_refused():
    """Eight columns of padding behind ten tokens: of ten columns, only eight are known, and then none."""
    model, ids = build(LongNetModel), random_ids(1, 18)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    cache = DilatedCache(model.config, reserve=4)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="known of the last 8 only"):
        cache.crop(-9)
    cache.crop(-4)
    cache.crop(-4)
    assert (cache.get_seq_length(), int(cache.positions)) == (10, 10)
    with pytest.raises(ValueError, match="known of the last 0 only"):
        cache.crop(-2)
    expected = model(ids).last_hidden_state[:, 10:]
    output = model(ids[:, 10:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["paper", "hybrid"])
def test_a_cache_without_tokens_is_as_new(kind, monkeypatch):
    """Also after a first pass that failed half-way, and for a batch of another size."""
    model, ids = build(LongNetModel, kind), random_ids(2, 20)
    expected = model(ids).last_hidden_state
    cache = DilatedCache(model.config, reserve=2)
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(random_ids(3, 11), past_key_values=cache)
    for _ in range(2):
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        halves = [model(half, past_key_values=cache).last_hidden_state for half in ids.split(10, dim=1)]
        torch.testing.assert_close(torch.cat(halves, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_read_in_chunks(kind):
    """Hidden states and loss are those of one forward pass, padding on the left and inside included."""
    model, ids = build(LongNetForCausalLM, kind, torch.float64), random_ids(2, 150)
    mask = torch.ones_like(ids)
    mask[0, :70] = mask[1, 20:30] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 100] = -100
    expected = model.model(ids, attention_mask=mask).last_hidden_state
    loss = model(ids, attention_mask=mask, labels=labels).loss
    for chunk_size, reserve in ((64, 3), (150, 255), (37, 255), (1000, 0)):
        cache = DilatedCache(model.config, reserve=reserve)
        options = dict(attention_mask=mask, past_key_values=cache, chunk_size=chunk_size, progress=False)
        chunks = list(model.forward_chunks(ids.int(), labels=labels, **options))
        hidden_states = torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1)
        real = mask == 1
        torch.testing.assert_close(hidden_states[real], expected[real], rtol=0, atol=1e-9)
        torch.testing.assert_close(chunks[-1].loss.double(), loss.double(), rtol=0, atol=1e-6)
        assert chunks[-1].past_key_values is cache and cache.get_seq_length() == 150


def test_compiled_layers_read_in_chunks():
    """Layers of one pattern share what is compiled, whatever their number and the position."""
    model, ids, counter = build(LongNetModel, num_hidden_layers=10), random_ids(1, 320), CompileCounter()
    expected = model(ids).last_hidden_state
    for layer in model.layers:
        layer.compile(backend=counter, dynamic=False)
    cache, frames = DilatedCache(model.config, reserve=0), []
    for chunk in model.forward_chunks(ids, past_key_values=cache, chunk_size=32, progress=False):
        start = 32 * len(frames)
        torch.testing.assert_close(chunk.last_hidden_state, expected[:, start : start + 32], rtol=0, atol=1e-4)
        frames.append(counter.frame_count)
    assert 0 < frames[0] == frames[-1] <= 4


def test_reading_in_chunks_refuses_what_does_not_fit():
    model, ids = build(LongNetModel), random_ids(1, 8)
    with pytest.raises(ValueError, match="`labels` are for causal language models"):
        next(model.forward_chunks(ids, labels=ids))
    for chunk_size in (0, 1.5, True):
        with pytest.raises(ValueError, match="`chunk_size`"):
            next(model.forward_chunks(ids, chunk_size=chunk_size))
    with pytest.raises(ValueError, match="`attention_mask` must be of shape"):
        next(model.forward_chunks(ids, attention_mask=torch.ones(1, 9)))
    with pytest.raises(ValueError, match="`input_ids` must be of shape"):
        next(model.forward_chunks(ids[0]))


@pytest.mark.parametrize("first", [0, 40])
def test_a_forward_pass_that_is_interrupted_is_not_taken_for_a_whole_one(first, tmp_path):
    """Layers before the interruption hold its tokens, later ones do not."""
    model, ids = build(LongNetForCausalLM, "paper", dtype=torch.float64), random_ids(1, 90)
    expected, cache = model(ids).logits, DilatedCache(model.config, reserve=20)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        if first:
            model(ids[:, :first], past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, first : first + 20], past_key_values=cache)
        hook.remove()
        for use in (lambda: model(ids[:, :5], past_key_values=cache), lambda: cache.save(tmp_path / "cache", model)):
            with pytest.raises(ValueError, match=r"middle of a forward pass.*20 tokens.*`crop\(-20\)`"):
                use()
        with pytest.raises(ValueError, match="middle of a forward pass"):
            cache.crop(-19)
        cache.crop(-20)
        assert cache.get_seq_length() == first
        for start in range(first, 80, 20):
            model(ids[:, start : start + 20], past_key_values=cache)
        assert cache.get_seq_length() == 80 and cache.unfinished == 0
        torch.testing.assert_close(model(ids[:, 80:], past_key_values=cache).logits, expected[:, 80:])


def test_a_pass_without_room_changes_nothing():
    model, ids = build(LongNetForCausalLM, "heads", dtype=torch.float64), random_ids(1, 60)
    cache = DilatedCache(model.config, max_length=50)
    with torch.no_grad():
        with pytest.raises(ValueError, match="`max_length` of the DilatedCache is 50.*60 tokens"):
            model(ids.expand(2, -1), past_key_values=cache)
        assert cache.positions is None
        model(ids[:, :40], past_key_values=cache)
        with pytest.raises(ValueError, match="`max_length` of the DilatedCache is 50.*60 tokens"):
            model(ids[:, 40:], past_key_values=cache)
        logits = model(ids[:, 40:50], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids[:, :50]).logits[:, 40:])


@pytest.mark.parametrize("first", [0, 40])
def test_checkpointing_does_without_a_cache(first):
    """Unless there are no gradients, for which nothing would be computed again."""
    model, ids = build(LongNetForCausalLM, "paper", dtype=torch.float64), random_ids(1, 60)
    expected, cache = model(ids).logits, DilatedCache(model.config)
    with torch.no_grad():
        if first:
            model(ids[:, :first], past_key_values=cache)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="`past_key_values`.*gradient checkpointing.*switch one of them off"):
        model(ids[:, first:], past_key_values=cache)
    assert model(ids, use_cache=True).past_key_values is None
    with torch.no_grad():
        output = model(ids[:, first:], past_key_values=cache)
    assert cache.get_seq_length() == 60
    torch.testing.assert_close(output.logits, expected[:, first:])


def test_positions_of_another_shape_are_refused_before_they_are_counted():
    model, ids = build(LongNetForCausalLM, "paper", dtype=torch.float64), random_ids(1, 60)
    expected, cache = model(ids).logits, DilatedCache(model.config)
    with torch.no_grad():
        model(ids[:, :59], past_key_values=cache)
        for wrong in (torch.tensor([[59], [59]]), torch.arange(5)[None], torch.tensor([59])):
            with pytest.raises(ValueError, match="`position_ids` must have shape"):
                model(ids[:, 59:], position_ids=wrong, past_key_values=cache)
        output = model(ids[:, 59:], position_ids=torch.tensor([[59]]), past_key_values=cache)
    torch.testing.assert_close(output.logits, expected[:, 59:])


def test_a_default_device_moves_no_tables():
    model, ids = build(LongNetForCausalLM, "heads", dtype=torch.float64), random_ids(1, 90)
    expected = model(ids).logits
    dilated_cache._slots.cache_clear()
    with torch.no_grad(), torch.device("meta"):
        cache = DilatedCache(model.config, reserve=0)
        logits = [model(chunk, past_key_values=cache).logits for chunk in ids.split(30, dim=1)]
        rank_heads(model, ids, span_length=12, progress=False)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("kind", ["paper", "hybrid", "heads"])
def test_a_saved_cache_goes_on_as_if_it_had_not_been(kind, tmp_path):
    model, ids = build(LongNetForCausalLM, kind, torch.float64), random_ids(2, 80)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, attention_mask=mask, **options)
    cache = DilatedCache(model.config, reserve=20)
    model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    cache.save(tmp_path / "book.safetensors", model)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for _ in range(2):  # what was saved is not what is used
        loaded = DilatedCache.load(tmp_path / "book.safetensors", model)
        assert loaded.get_seq_length() == 60 and loaded.reserve == 20
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=loaded, **options), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["book.safetensors"]


@pytest.mark.parametrize("lengths", [[None], [None, 8], [None, 8, None], [8, None, None]])
@pytest.mark.parametrize("max_length", [None, 330, 1000])
def test_a_saved_cache_fits_into_other_room(lengths, max_length, tmp_path):
    """However much room a cache had when it was saved, and has when it goes on."""
    kinds = dict(segment_lengths=lengths, dilation_rates=[1] * len(lengths), branch_types=["window"] * len(lengths))
    model, ids, file = build(LongNetForCausalLM, dtype=torch.float64, **kinds), random_ids(2, 330), tmp_path / "cache"
    expected = model(ids).logits[:, 300:]
    for room in (None, 700):
        cache = DilatedCache(model.config, max_length=room)
        for columns in (slice(0, 280), slice(280, 310)):  # the second makes them move, where they can
            model(ids[:, columns], past_key_values=cache)
        cache.crop(-10)
        cache.save(file, model)
        assert all(part.keys.shape[2] > 300 for layer in cache.layers for part in layer.parts)
        with torch.inference_mode():  # and is written to outside of it
            loaded = DilatedCache.load(file, model, max_length=max_length)
        assert loaded.max_length == max_length
        output = torch.cat([model(x, past_key_values=loaded).logits for x in ids[:, 300:].split(10, dim=1)], dim=1)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="`max_length` of the DilatedCache is 299, .* 300 tokens"):
        DilatedCache.load(file, model, max_length=299)


def test_a_saved_cache_is_refused_by_other_models(tmp_path):
    model, file = build(LongNetForCausalLM), tmp_path / "book.safetensors"
    with pytest.raises(ValueError, match="empty"):
        DilatedCache(model.config).save(file, model)
    cache = model(random_ids(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="other patterns"):
        cache.save(file, build(LongNetForCausalLM, segment_lengths=[8, 16, 41]))
    cache.save(file, model)
    with pytest.raises(ValueError, match=r"book.safe.*`segment_lengths` was \[8, 16, 40\] and is \[8, 16, 41\]"):
        DilatedCache.load(file, build(LongNetForCausalLM, segment_lengths=[8, 16, 41]))
    with pytest.raises(ValueError, match="book.safetensors.*`rope_parameters` was .*10000.0.* and is .*500.0"):
        rope = {"rope_type": "default", "rope_theta": 500.0}
        DilatedCache.load(file, build(LongNetForCausalLM, rope_parameters=rope))
    with pytest.raises(ValueError, match="`norm_eps`.*; `scale_embedding`"):
        DilatedCache.load(file, build(LongNetForCausalLM, norm_eps=1e-3, scale_embedding=False))
    with pytest.raises(ValueError, match="book.safetensors.*dtype"):
        DilatedCache.load(file, build(LongNetForCausalLM, dtype=torch.float64))
    for weight in model.parameters():  # one number, anywhere
        flat = weight.data.view(-1)
        where = torch.randint(len(flat), ())
        before = flat[where].clone()
        flat[where] = torch.nextafter(before, before + 1)
        with pytest.raises(ValueError, match="book.safetensors.*other weights"):
            DilatedCache.load(file, model)
        flat[where] = before
    # What does not change a key may differ
    model.config.use_cache, model.config.attention_dropout = False, 0.5
    assert DilatedCache.load(file, model).get_seq_length() == 9


def test_a_changed_file_of_a_cache_is_refused(tmp_path):
    """Whatever was changed: it is one error, which names the file."""
    model, file = build(LongNetForCausalLM, "hybrid"), tmp_path / "book.safetensors"
    model(random_ids(2, 30), use_cache=True).past_key_values.save(file, model)
    tensors = load_file(file)
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()

    def refuse(match):
        with pytest.raises(ValueError, match=f"{match}.*book.safetensors|book.safetensors.*{match}"):
            DilatedCache.load(file, model)

    for name, x in tensors.items():
        changes = [x[None], x.double(), torch.zeros_like(x) if x.any() else torch.ones_like(x), x.flatten()]
        if x.is_floating_point():
            changes += [x.long(), x[:, :1], torch.full_like(x, torch.nan), -x]
        elif x.dtype == torch.int64:
            changes += [x + 1, x - 1000, torch.full_like(x, 2**60)]
        for changed in changes:
            if changed.shape != x.shape or changed.dtype != x.dtype or not torch.equal(changed, x):
                save_file(tensors | {name: changed.contiguous()}, file, metadata)
                refuse("damaged")
        save_file({other: tensors[other] for other in tensors if other != name}, file, metadata)
        refuse("damaged")
    save_file(tensors | {"x": torch.zeros(1)}, file, metadata)
    refuse("damaged")
    for name in metadata:
        for text in ("", "{", "[" * 10**5, metadata[name] + "1"):
            save_file(tensors, file, metadata | {name: text})
            refuse("")
        save_file(tensors, file, {other: metadata[other] for other in metadata if other != name})
        refuse("")
    save_file(tensors, file, metadata | {"format": "longnet_hf.DilatedCache 1"})
    refuse("version 1")
    save_file(tensors, file)
    refuse("holds no DilatedCache")
    save_file(tensors, file, metadata)
    DilatedCache.load(file, model)
    whole = file.read_bytes()
    for content in (b"", b"x" * 100, whole[:-1], whole[: len(whole) // 2], whole + b"0", bytes(8) + whole[8:]):
        file.write_bytes(content)
        refuse("damaged")
    with pytest.raises(OSError, match="nowhere"):
        DilatedCache.load(tmp_path / "nowhere", model)


@pytest.mark.parametrize("kind", ["window", "segment"])
def test_a_branch_that_no_memory_holds_is_named(kind):
    """As long as the model needs no cache it runs; so it does with the ordinary one."""
    pattern = dict(segment_lengths=[8, 10**10], dilation_rates=[1, 1], branch_types=["window", kind])
    model, ids = build(LongNetForCausalLM, **pattern), random_ids(1, 9)
    expected = model.generate(ids, max_new_tokens=3, use_cache=False)
    with pytest.raises(
        ValueError, match="needs 1[0-9]* slots per head for the branch with segment length 10000000000"
    ):
        model.generate(ids, max_new_tokens=3)
    assert torch.equal(model.generate(ids, max_new_tokens=3, cache_implementation="dynamic"), expected)
    for change in (dict(reserve=10**12), dict(max_length=10**12)):
        with pytest.raises(ValueError, match=f"`{next(iter(change))}` must be .*at most.*got 1000000000000"):
            DilatedCache(model.config, **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloading_without_a_gpu_is_refused():
    model = build(LongNetForCausalLM)
    with pytest.raises(ValueError, match='`cache_implementation="offloaded"`.*no GPU'):
        model.generate(random_ids(1, 5), cache_implementation="offloaded", max_new_tokens=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_on_a_gpu(dtype):
    """Aligned chunks and others, of a length that both paths take up."""
    config = LongNetConfig(
        vocab_size=97, hidden_size=192, num_hidden_layers=2, num_attention_heads=12, intermediate_size=256,
        initializer_range=0.2, num_key_value_heads=6, head_offset="rotating",
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = LongNetForCausalLM(config).to("cuda", dtype).eval(), random_ids(2, 70000).cuda()
    expected = next(model.forward_chunks(ids, chunk_size=70000, progress=False)).last_hidden_state.float()
    for chunk_size in (32768, 9999, 30001):
        chunks = model.forward_chunks(ids, chunk_size=chunk_size, progress=False)
        output = torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1).float()
        assert (output - expected).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()
    cache = DilatedCache(config)
    with torch.no_grad():
        model(ids[:, :40000], past_key_values=cache)
        for start in range(40000, 40300, 3):
            model(ids[:, start : start + 3], past_key_values=cache)
        output = model.model(ids[:, 40300:40301], past_key_values=cache).last_hidden_state.float()
    close = expected[:, 40300:40301]
    assert (output - close).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * close.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["paper", "heads"])
def test_offloaded_and_compiled_generation_on_a_gpu(kind):
    model = build(LongNetForCausalLM, kind, dtype=torch.float64).cuda()
    ids = random_ids(2, 30).cuda()
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **options), expected)
    assert torch.equal(model.generate(ids, compile_config=CompileConfig(), **options), expected)
