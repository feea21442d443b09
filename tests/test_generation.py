"""`generate` with a cache writes what the model writes without one, in every mode and across segment boundaries."""

from functools import partial

import pytest
import torch
import transformers
from models import KINDS, build, random_ids, word_tokenizer
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from longnet_hf import DilatedCache, LongNetForCausalLM, dilated_cache
from longnet_hf.generation_longnet import READS_CHUNKS_TWICE


every_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY = dict(max_new_tokens=60, do_sample=False, eos_token_id=None)  # the largest segment has 40 positions


@pytest.fixture(params=KINDS)
def model(request):
    return build(LongNetForCausalLM, request.param, torch.float64)


@pytest.fixture
def paper():
    return build(LongNetForCausalLM, "paper", torch.float64)


def left_padded(rows):
    """A batch of rows of unequal lengths, and its mask."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return ids, mask


@pytest.mark.parametrize("reserve", [0, 6, 255])
@pytest.mark.parametrize("block", [1, 1000])
@pytest.mark.parametrize("chunks", [[1] * 70, [70], [7, 1, 1, 30, 2, 29], [39, 2, 29]])
def test_cached_logits_equal_uncached_logits(model, chunks, block, reserve, monkeypatch):
    monkeypatch.setattr(dilated_cache, "_BLOCK_ON_CPU", block)
    ids = random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 20:30] = 0
    expected = model(ids, attention_mask=mask).logits
    cache, logits, done = DilatedCache(model.config, reserve=reserve), [], 0
    for size in chunks:
        done += size
        chunk = ids[:, done - size : done]
        logits.append(model(chunk, attention_mask=mask[:, :done], past_key_values=cache).logits)
    real = mask == 1
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [1, 5, 47])
def test_greedy(model, length):
    ids = random_ids(2, length)
    cached = model.generate(ids, **GREEDY)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GREEDY))
    step_by_step = ids
    for _ in range(60):
        step_by_step = torch.cat((step_by_step, model(step_by_step).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, step_by_step)


def test_left_padded_rows_are_continued_as_if_alone(model):
    rows = [random_ids(n) for n in (3, 31, 17)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, written in zip(rows, together, strict=True):
        assert torch.equal(written[-60:], model.generate(row[None], **GREEDY)[0, -60:])


def test_sampling_with_a_seed(paper):
    ids, written = random_ids(2, 9), []
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = dict(max_new_tokens=40, do_sample=True, top_k=20, num_return_sequences=2, use_cache=use_cache)
        written.append(paper.generate(ids, **options))
    assert written[0].shape == (4, 49) and torch.equal(*written)


@pytest.mark.parametrize("options", [
    dict(num_beams=3), dict(num_beams=4, num_return_sequences=2, length_penalty=2.0),
    dict(num_beams=3, do_sample=True),
])  # fmt: skip
def test_beams(model, options):
    ids, mask = left_padded([random_ids(12), random_ids(20)])
    written = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=30, use_cache=use_cache, **options))
    assert torch.equal(*written)


def test_chunked_prefill(model):
    ids, mask = left_padded([random_ids(33), random_ids(53)])
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for size in (1, 8, 50):
        assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=size, **GREEDY), expected)


def test_embeddings_as_prompt(paper):
    ids = random_ids(1, 21)
    written = paper.generate(inputs_embeds=paper.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(written, paper.generate(ids, **GREEDY)[:, 21:])


def test_a_conversation_continues_from_its_cache(model):
    """Rows of unequal lengths, which leaves padding in the middle at the second turn."""
    rows = [random_ids(5), random_ids(18)]
    ids, mask = left_padded(rows)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **(GREEDY | {"max_new_tokens": 12}))
    replies = first.sequences[:, ids.shape[1] :]
    # the first row had stopped after 4 tokens; what follows in it is padding
    reply_mask = torch.ones_like(replies)
    reply_mask[0, 4:] = 0
    turns = random_ids(2, 7)
    both = torch.cat((first.sequences, turns), dim=1)
    both_mask = torch.cat((mask, reply_mask, torch.ones_like(turns)), dim=1)
    continued = model.generate(both, attention_mask=both_mask, past_key_values=first.past_key_values, **GREEDY)
    for row, kept in ((0, 4), (1, 12)):
        alone = torch.cat((rows[row], replies[row, :kept], turns[row]))[None]
        assert torch.equal(continued[row, -60:], model.generate(alone, **GREEDY)[0, -60:])


def test_assisted_decoding_and_prompt_lookup(model):
    ids = random_ids(1, 10).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    assistant = build(LongNetForCausalLM, "paper", torch.float64, num_hidden_layers=1)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)
    # Drafts beyond the end find room in the cache, though it is made for compiled steps otherwise
    for options in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=30)):
        assert torch.equal(model.generate(ids, compile_config=CompileConfig(mode=None), **options, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["static", "sliding_window", "quantized"])
def test_other_cache_implementations_are_refused(paper, kind):
    with pytest.raises(ValueError, match="cache_implementation"):
        paper.generate(random_ids(1, 5), cache_implementation=kind, max_new_tokens=3)


def test_other_caches_are_refused(paper):
    sliding = transformers.MistralConfig(sliding_window=4, num_hidden_layers=3)
    for cache in (StaticCache(paper.config, max_cache_len=20), DynamicCache(config=sliding), ((), ())):
        with pytest.raises(ValueError, match="`past_key_values` must be a DilatedCache"):
            paper(random_ids(1, 5), past_key_values=cache)


def test_after_saving_and_in_a_pipeline(paper, tmp_path):
    ids = random_ids(1, 21)
    paper.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **GREEDY), paper.generate(ids, **GREEDY))
    tokenizer = transformers.ByT5Tokenizer()
    model = build(LongNetForCausalLM, vocab_size=len(tokenizer))
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write("def f(x):", max_new_tokens=8, do_sample=False)
    assert written["generated_text"].startswith("def f(x):")


def test_compiled_decoding(paper):
    ids = random_ids(1, 9)
    expected = paper.generate(ids, **GREEDY)
    paper.forward = torch.compile(paper.forward, backend="eager", dynamic=True)
    assert torch.equal(paper.generate(ids, **GREEDY), expected)


def test_compiled_generation_does_not_compile_again(model):
    """With heads that keep everything as well: the cache is made with room for all of it."""
    ids = random_ids(2, 9)
    expected = model.generate(ids, **GREEDY)
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    counters.clear()
    assert torch.equal(model.generate(ids, compile_config=config, **GREEDY), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_turns_of_a_conversation_continue_from_the_cache(model):
    """Rows end at different times in every turn, so that padding comes to lie on the left and inside."""
    rows, cache, new = [random_ids(3), random_ids(19), random_ids(11)], None, 9
    options = GREEDY | {"max_new_tokens": new}
    ids, mask = left_padded(rows)
    for kept in ([2, 9, 5], [9, 1, 9], [4, 9, 9]):
        outputs = model.generate(
            ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options
        )
        cache, replies, turns = outputs.past_key_values, outputs.sequences[:, -new:], random_ids(3, 6)
        for i, row in enumerate(rows):
            whole = torch.ones_like(row[None])  # Transformers takes the token for padding, if it is written, for such
            alone = model.generate(row[None], attention_mask=whole, **options)
            assert torch.equal(replies[i], alone[0, -new:])
            rows[i] = torch.cat((row, replies[i, : kept[i]], turns[i]))
        reply_mask = (torch.arange(new) < torch.tensor(kept)[:, None]).long()
        ids = torch.cat((outputs.sequences, turns), 1)
        mask = torch.cat((mask, reply_mask, torch.ones_like(turns)), 1)


def test_what_is_kept_does_not_grow(paper):
    """The patterns keep 8 + 8 + 14 keys, whatever the length; one more slot takes what is not kept."""
    outputs = paper(random_ids(1, 50))
    assert isinstance(outputs.past_key_values, DilatedCache)
    cache = DilatedCache(paper.config, reserve=0)
    for _ in range(4):
        paper(random_ids(1, 50), past_key_values=cache)
        parts = [part for layer in cache.layers for part in layer.parts]
        assert [part.keys.shape for part in parts] == [part.values.shape for part in parts] == [(1, 4, 31, 8)] * 3


def test_heads_with_full_attention_keep_everything_and_others_do_not():
    """In layers of 2, 2 and 2 key/value heads, of which 1, 0 and 2 have full attention. Others keep 8 + 2 keys."""
    model = build(LongNetForCausalLM, "heads")
    cache = DilatedCache(model.config, reserve=0)
    model(random_ids(2, 50), past_key_values=cache)
    heads = [[(part.heads, part.is_growing) for part in layer.parts] for layer in cache.layers]
    assert heads == [[([0], False), ([1], True)], [([0, 1], False)], [([0, 1], True)]]
    assert all(part.keys.shape[2] == 11 for layer in cache.layers for part in layer.parts if not part.is_growing)


def test_a_cache_has_room_for_what_it_was_told():
    model, ids = build(LongNetForCausalLM, "heads", torch.float64), random_ids(2, 40)
    cache = DilatedCache(model.config, max_length=40)
    parts = None
    for start, stop in ((0, 30), (30, 31), (31, 39), (39, 40)):
        logits = model(ids[:, start:stop], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids[:, :stop]).logits[:, start:], rtol=0, atol=1e-9)
        pointers = [part.keys.data_ptr() for layer in cache.layers for part in layer.parts]
        parts = parts or pointers
        assert parts == pointers  # never copied
    with pytest.raises(ValueError, match="`max_length` of the DilatedCache is 40, .* 41 tokens"):
        model(ids[:, :1], past_key_values=cache)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="`max_length` must be an integer"):
            DilatedCache(model.config, max_length=wrong)


def test_a_dynamic_cache_serves_too(model):
    ids = random_ids(2, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **GREEDY), expected)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(config=model.config), **GREEDY), expected)


def test_a_cache_has_two_names(paper):
    """Transformers 5.24 calls `cache` what was `past_key_values`."""
    ids, cache = random_ids(1, 20), DilatedCache(paper.config)
    paper.model(ids[:, :9], cache=cache)
    paper(ids[:, 9:15], past_key_values=cache)
    logits = paper(ids[:, 15:], cache=cache, past_key_values=None).logits
    torch.testing.assert_close(logits, paper(ids).logits[:, 15:], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="two names of one argument"):
        paper(ids[:, 15:], cache=cache, past_key_values=cache)


def test_a_cache_is_used_again_after_reset(model):
    cache = DilatedCache(model.config)
    for batch in (2, 3):
        ids = random_ids(batch, 9)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))
        cache.reset()
        assert cache.get_seq_length() == 0


def test_rows_of_a_cache_are_chosen_and_repeated(model):
    ids, mask = left_padded([random_ids(12), random_ids(20), random_ids(5)])
    new = random_ids(4, 7)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
    rows = torch.tensor([2, 2, 0, 0])
    together, mask = torch.cat((ids[rows], new), 1), torch.cat((mask[rows], torch.ones_like(new)), 1)
    expected = model(together, attention_mask=mask).logits[:, -7:]
    torch.testing.assert_close(
        model(new, attention_mask=mask, past_key_values=cache).logits, expected, rtol=0, atol=1e-9
    )


def test_new_tokens_alone_may_be_masked_and_need_no_mask(paper):
    ids, mask = left_padded([random_ids(12), random_ids(20)])
    expected = paper(ids, attention_mask=mask).logits[:, -4:]
    for new_mask in (None, mask[:, -4:], mask):
        cache = DilatedCache(paper.config)
        paper(ids[:, :-4], attention_mask=mask[:, :-4], past_key_values=cache)
        logits = paper(ids[:, -4:], attention_mask=new_mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attn_implementation", ["dilated", "eager"])
def test_a_cache_may_make_its_layers_when_keys_come(model, attn_implementation):
    ids, expected = random_ids(2, 30), None
    model.set_attn_implementation(attn_implementation)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **GREEDY), expected)
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 22], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-9)
    lazy = transformers.Cache(layer_class_to_replicate=partial(DynamicSlidingWindowLayer, sliding_window=4))
    with pytest.raises(ValueError, match="DynamicCache that keeps all keys, got DynamicSlidingWindowLayer"):
        model(ids, past_key_values=lazy)


def test_early_exit_drafts_what_the_whole_model_writes(model):
    ids = random_ids(1, 21)
    expected = model.generate(ids, **GREEDY)
    for layers in (1, 2):
        assert torch.equal(model.generate(ids, assistant_early_exit=layers, **GREEDY), expected)
    model.config.num_hidden_layers = 2
    shallow, cache = model(ids).logits, DilatedCache.for_patterns(model.model.patterns)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), shallow, rtol=0, atol=1e-9)


def test_a_model_is_whole_again_when_generate_fails(paper, monkeypatch):
    ids = random_ids(1, 21)
    expected = paper(ids).logits
    forward = type(paper.model).forward

    def fail(self, *args, **kwargs):
        if self.config.num_hidden_layers == 1 and kwargs["input_ids"].shape[1] == 1:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(paper.model), "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        paper.generate(ids, assistant_early_exit=1, **GREEDY)
    assert paper.config.num_hidden_layers == 3
    assert torch.equal(paper(ids).logits, expected)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_model_cut_short_writes_from_its_cache(model, is_told):
    model.model.layers = model.model.layers[:2]
    if is_told:
        model.config.num_hidden_layers = 2
    ids, mask = left_padded([random_ids(12), random_ids(20)])
    cached = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    chunks = [*model.forward_chunks(ids, attention_mask=mask, chunk_size=7, progress=False)]
    expected = model.model(ids, attention_mask=mask).last_hidden_state[:, 14:]
    torch.testing.assert_close(chunks[-1].last_hidden_state, expected, rtol=0, atol=1e-9)


def test_a_cache_goes_in_and_out_of_inference_mode(model):
    ids = random_ids(2, 70)
    expected = model(ids).logits[:, -20:]

    def tail(cache, *columns):
        return torch.cat([model(ids[:, start:stop], past_key_values=cache).logits for start, stop in columns], dim=1)

    def rearrange(cache):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.reorder_cache(torch.tensor([0, 1]))

    for is_first_inside in (True, False):
        cache = DilatedCache(model.config)
        with torch.inference_mode(is_first_inside):
            model(ids[:, :50], past_key_values=cache)
            rearrange(cache)
        with torch.inference_mode(not is_first_inside):
            torch.testing.assert_close(tail(cache, (50, 51), (51, 69), (69, 70)), expected, rtol=0, atol=1e-9)
            cache.crop(-3)
            rearrange(cache)
        torch.testing.assert_close(tail(cache, (67, 70)), expected[:, -3:], rtol=0, atol=1e-9)
    with torch.inference_mode():
        cache = model(ids[:, :50]).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))


def test_a_tokenizer_may_be_given(paper):
    """As for `stop_strings`."""
    ids = random_ids(1, 9)
    expected = paper.generate(ids, **GREEDY)
    assert paper.generate(ids, **GREEDY, tokenizer=word_tokenizer()).tolist() == expected.tolist()


def test_a_checkpointed_model_in_training_writes(model):
    """As a callback of Trainer lets it, and reads in chunks."""
    ids = random_ids(2, 20)
    expected, read = model.generate(ids, **GREEDY), list(model.forward_chunks(ids, labels=ids, chunk_size=7))[-1].loss
    model.train().gradient_checkpointing_enable()
    assert model.generate(ids, **GREEDY).tolist() == expected.tolist()
    assert list(model.forward_chunks(ids, labels=ids, chunk_size=7))[-1].loss == read


def test_padding_behind_a_prompt_is_refused(paper):
    mask = torch.ones(2, 9)
    mask[1, 7:] = 0
    with pytest.raises(ValueError, match=r"rows \[1\].*padding_side"):
        paper.generate(random_ids(2, 9), attention_mask=mask)


def test_drafts_may_be_long(paper):
    ids = random_ids(1, 40).repeat(1, 40)
    expected = paper.generate(ids, **GREEDY)
    assert paper.generate(ids, **GREEDY, prompt_lookup_num_tokens=1100).tolist() == expected.tolist()


def test_an_empty_prompt_is_refused(paper):
    empty = torch.empty(1, 0, dtype=torch.long)
    for call in (paper, lambda ids: paper.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"`input_ids` must hold at least one token per row, got shape \(1, 0\)"):
            call(empty)
    with pytest.raises(ValueError, match="`inputs_embeds` must hold at least one token"):
        paper(inputs_embeds=torch.empty(1, 0, 32, dtype=torch.float64))


def test_padding_of_earlier_calls_is_remembered(model):
    """A later call need not say it again, in layers and heads with full attention neither."""
    ids, mask = left_padded([random_ids(40), random_ids(33)])
    expected = model(ids, attention_mask=mask).logits[:, 20:]
    cache = DilatedCache(model.config)
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    output = torch.cat([model(x, past_key_values=cache).logits for x in (ids[:, 20:30], ids[:, 30:])], dim=1)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make_cache", [DilatedCache, lambda config: DynamicCache(config=config)])
def test_a_cache_that_holds_the_prompt_already_is_refused(paper, make_cache):
    """Where a user gives the question alone, or nothing new: it would be read twice."""
    book, question = random_ids(1, 20), random_ids(1, 5)
    text = torch.cat((book, question), dim=1)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    expected = paper.generate(text, **options)[:, -4:]

    def read():
        cache = make_cache(paper.config)
        paper(book, past_key_values=cache)
        return cache

    embeds = paper.model.embed_tokens(text)
    for prompt in (question, book, book[:, :19]):
        for more in ({}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(ValueError, match=f"has {prompt.shape[1]} tokens, and the cache holds 20.*torch.cat"):
                paper.generate(prompt, past_key_values=read(), **more, **options)
        with pytest.raises(ValueError, match=f"has {prompt.shape[1]} tokens, and the cache holds 20"):
            paper.generate(inputs_embeds=embeds[:, : prompt.shape[1]], past_key_values=read(), **options)
    with pytest.raises(ValueError, match="holds 20 tokens, and assisted decoding"):
        paper.generate(text, past_key_values=read(), prompt_lookup_num_tokens=3, **options)
    # What the message says to do
    for more in ({}, {"prefill_chunk_size": 3}):
        if more and READS_CHUNKS_TWICE:
            with pytest.raises(ValueError, match="`prefill_chunk_size`.*Transformers 5.21"):
                paper.generate(text, past_key_values=read(), **more, **options)
            continue
        assert torch.equal(paper.generate(text, past_key_values=read(), **more, **options)[:, -4:], expected)
    mask = torch.ones_like(text)
    assert torch.equal(
        paper.generate(question, attention_mask=mask, past_key_values=read(), **options)[:, -4:], expected
    )
    cache = read()
    cache.crop(-1)
    assert torch.equal(paper.generate(book, past_key_values=cache, **options), paper.generate(book, **options))


def test_nan_goes_into_a_cache_and_comes_out(paper):
    embeds = paper.model.embed_tokens(random_ids(1, 30)).detach()
    embeds[0, 11] = torch.nan
    for chunks in ([11, 1, 18], [10, 5, 15], [1] * 30):
        cache = DilatedCache(paper.config)
        parts = [paper(inputs_embeds=x, past_key_values=cache).logits for x in embeds.split(chunks, dim=1)]
        assert torch.cat(parts, dim=1)[0, 11:16].isnan().all()  # all that are in its shortest segment


def test_what_a_dilated_cache_cannot_do_is_refused(paper):
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)

    def filled(reserve=4):
        cache = DilatedCache(paper.config, reserve=reserve)
        paper(ids[:, :20], past_key_values=cache)
        return cache

    mask[1, 12:20] = 0  # more than are in reserve
    with pytest.raises(ValueError, match="`attention_mask` makes 12 of the tokens in row 1"):
        paper(ids[:, 20:], attention_mask=mask, past_key_values=filled())
    paper(ids[:, 20:], attention_mask=mask, past_key_values=filled(8))
    mask[1, 12:20], mask[1, :3] = 1, 0  # not the last ones
    with pytest.raises(ValueError, match="`attention_mask` makes 17 of the tokens in row 1"):
        paper(ids[:, 20:], attention_mask=mask, past_key_values=filled(30))
    with pytest.raises(ValueError, match="shape \\(2, 40\\)"):
        paper(ids[:, 20:], attention_mask=mask[:, :30], past_key_values=filled())
    with pytest.raises(ValueError, match="mask of the new tokens must have shape \\(2, 20\\)"):
        paper(ids[:, 20:], attention_mask=mask[:1, 20:], past_key_values=filled())
    with pytest.raises(ValueError, match="batch of 2 rows, got 1"):
        paper(ids[:1, 20:], past_key_values=filled())
    with pytest.raises(ValueError, match="`tokens_to_remove` is -9"):
        filled().crop(-9)
    with pytest.raises(ValueError, match="`tokens_to_remove` is -30"):
        filled().crop(-30)
    with pytest.raises(ValueError, match="several documents"):
        paper(ids[:, 20:], position_ids=torch.arange(20)[None] % 7, past_key_values=filled())
    with pytest.raises(RuntimeError, match="No gradients flow through a DilatedCache"):
        paper(ids[:, 20:], past_key_values=filled()).logits.sum().backward()
    with pytest.raises(ValueError, match="for other patterns"):
        build(LongNetForCausalLM, "paper", segment_lengths=[8, 16, 41])(ids, past_key_values=filled())
    with pytest.raises(ValueError, match='"eager"'):
        build(LongNetForCausalLM, "paper", attn_implementation="eager")(ids, past_key_values=filled())
    for reserve in (-1, True, 1.5):
        with pytest.raises(ValueError, match="`reserve`"):
            DilatedCache(paper.config, reserve=reserve)
    with pytest.raises(ValueError, match="`config` must be that of a LongNet"):
        DilatedCache(transformers.LlamaConfig())
    refused = filled()
    with pytest.raises(ValueError):
        paper(ids[:, 20:], attention_mask=mask[:, :30], past_key_values=refused)
    expected = paper(ids).logits[:, 20:]
    torch.testing.assert_close(paper(ids[:, 20:], past_key_values=refused).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["paper", "windows"])
@pytest.mark.parametrize("lengths", [(20,), (12, 20)])
def test_generate_compiles_the_step_once(kind, lengths):
    """As Transformers does it on a GPU, if asked to; the step is one graph, whatever the position."""
    model = build(LongNetForCausalLM, kind, torch.float64)
    ids, mask = left_padded([random_ids(length) for length in lengths])
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    config = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(model.generate(ids, attention_mask=mask, compile_config=config, **GREEDY), expected)
    assert counters["stats"]["unique_graphs"] == 1
