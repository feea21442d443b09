"""`attn_implementation="dilated"`: each architecture gives what its dense attention gives with log C for a mask."""

import contextlib
import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longnet_hf import (
    ContextParallelTrainerMixin,
    DilatedCache,
    LongNetConfig,
    LongNetForCausalLM,
    describe,
    dilated_interface,
    rank_heads,
    set_dilated_attention,
)
from longnet_hf.dilated_interface import dilated_attention_forward, pattern_of


PATTERN = dict(segment_lengths=[8, 16, 40], dilation_rates=[1, 2, 3], head_offset="rotating", segment_shift=True)
WINDOWS = dict(
    segment_lengths=[5, 24], dilation_rates=[1, 3], branch_types=["window", "window"], full_attention_layers=[1]
)
HEADS = dict(
    segment_lengths=[7],
    dilation_rates=[1],
    branch_types=["window"],
    sink_tokens=2,
    full_attention_heads={0: [1], 1: [0, 1]},
)
SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, initializer_range=0.2, max_position_embeddings=128,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)
ARCHITECTURES = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma": GROUPED | {"head_dim": 8},
    "phi": {},
    "phi3": GROUPED,
    "olmo": {},
    "olmo2": GROUPED,
    "gpt_neox": {},
    "gpt2": {"activation_function": "gelu"},
    "starcoder2": GROUPED | {"sliding_window": None},
    "stablelm": GROUPED,
    "granite": GROUPED,
    "cohere": GROUPED,
    "smollm3": GROUPED | {"no_rope_layers": [1, 0, 1]},
    "deepseek_v3": {  # values smaller than keys
        "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "first_k_dense_replace": 3, "num_key_value_heads": 4,
    },
    "olmo3": GROUPED | {  # makes a mask of sliding windows that no layer uses
        "head_dim": 8, "layer_types": ["full_attention"] * 3, "sliding_window": 16,
    },
    "qwen3_moe": GROUPED | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


# Experts are computed in float32, or some of the attention or the logits are
ATOL = {"qwen3_moe": 1e-4, "gpt_neox": 1e-6, "cohere": 1e-6}


def build(model_type, auto_class=AutoModelForCausalLM, dtype=None, **changes):
    torch.manual_seed(0)
    dtype = dtype or (torch.float32 if model_type == "qwen3_moe" else torch.float64)
    config = AutoConfig.for_model(model_type, **(SHAPE | ARCHITECTURES.get(model_type, {}) | changes))
    return auto_class.from_config(config, attn_implementation="sdpa").to(dtype).eval()


@contextlib.contextmanager
def told():
    """What the package logs meanwhile."""
    messages, logger, handler = [], dilated_interface.logger, logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def ids_of(*shape):
    return torch.randint(3, SHAPE["vocab_size"], shape)


def oracle(module, query, key, value, attention_mask, **kwargs):
    """Transformers' dense attention, with log C for a mask."""
    length, heads = key.shape[2], key.shape[1]
    n, m = torch.arange(length - query.shape[2], length)[:, None], torch.arange(length)
    is_causal = getattr(module, "is_causal", True)
    head = torch.arange(heads)[:, None, None]
    count = pattern_of(module).multiplicity(n, m, head, heads, is_causal).repeat_interleave(query.shape[1] // heads, 0)
    return sdpa_attention_forward(module, query, key, value, count.to(query.dtype).log()[None], **kwargs)


@pytest.fixture
def with_oracle():
    """Runs a function with the oracle in the place of the operator."""

    def run(function):
        AttentionInterface.register("dilated", oracle)
        try:
            return function()
        finally:
            AttentionInterface.register("dilated", dilated_attention_forward)

    return run


def close(x, y, atol=1e-9):
    torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_gives_what_its_own_attention_gives(model_type, with_oracle):
    model, ids = build(model_type), ids_of(2, 61)
    set_dilated_attention(model, **(WINDOWS if model_type == "phi" else PATTERN))
    atol = ATOL.get(model_type, 1e-9)
    expected = with_oracle(lambda: model(ids).logits)
    output = model(ids).logits
    close(output, expected, atol)
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("sdpa")
    assert (dense(ids).logits - output).abs().max() > 1e-3  # the pattern matters

    # Padding on either side: what the row gives alone
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, 50:] = 0, 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=position_ids).logits
    close(padded[0, 13:], model(ids[:1, 13:]).logits[0], atol)
    close(padded[1, :50], output[1, :50], atol)

    # Cached decoding, in pieces
    cache, pieces = None, []
    for piece in ids.split([30, 1, 1, 17, 12], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.get("cache", outputs.get("past_key_values"))
        pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), output, atol)
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    left_mask = torch.ones_like(ids)
    left_mask[0, :13] = 0
    together = model.generate(ids, attention_mask=left_mask, **options)
    assert together[0, 61:].tolist() == model.generate(ids[:1, 13:], **options)[0, 48:].tolist()
    assert together[1].tolist() == model.generate(ids[1:], **options)[0].tolist()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2", "gpt_neox"])
def test_packed_documents_give_what_they_give_alone(model_type):
    model = set_dilated_attention(build(model_type), **PATTERN)
    documents = [ids_of(1, length) for length in (23, 1, 37)]
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    expected = torch.cat([model(x).logits for x in documents], dim=1)
    close(model(packed, position_ids=position_ids).logits, expected, 1e-6 if model_type == "gpt_neox" else 1e-9)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": x[0].tolist()} for x in documents]
    )
    labels = batch.pop("labels")
    close(model(**batch).logits, expected, 1e-6 if model_type == "gpt_neox" else 1e-9)
    assert labels.shape == packed.shape
    if model_type == "llama":  # boundaries alone: position ids go on
        bounds = torch.tensor([0, 23, 24, 61], dtype=torch.int32)
        alone = dict(
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, position_ids=position_ids, attention_mask=packed * 0 + 1
        )
        close(model(packed, **alone).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_boundaries_and_numbers_of_documents_are_honoured_alone(padded):
    """Where positions go on from document to document."""
    model, lengths = set_dilated_attention(build("llama"), **PATTERN), (23, 1, 37)
    ids = ids_of(1, 61)
    alone = zip(ids.split(lengths, dim=1), torch.arange(61)[None].split(lengths, dim=1), strict=True)
    expected = torch.cat([model(x, position_ids=positions).logits for x, positions in alone], dim=1)
    bounds = torch.tensor([0, 23, 24, 61], dtype=torch.int32)
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0 if padded else 1
    for told in (dict(cu_seq_lens_q=bounds), dict(cu_seq_lens_k=bounds), dict(seq_idx=numbers)):
        output = model(ids, attention_mask=mask if padded else None, **told).logits
        close(output[:, : 61 - padded], expected[:, : 61 - padded])
    documents = numbers.int().masked_fill(mask == 0, -1)[:, None, None]  # as `dilated_attention_mask` makes it
    close(model(ids, attention_mask=documents).logits[:, : 61 - padded], expected[:, : 61 - padded])
    with pytest.raises(ValueError, match="`seq_idx` must be of shape .1, 61., a tensor of integers"):
        model(ids, seq_idx=numbers[:, :60])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`seq_idx` and `cu_seq_lens_q` cannot be given with a cache"):
        model(ids[:, :2], past_key_values=cache, seq_idx=torch.tensor([[0, 1]]))


def test_boundaries_are_looked_at_beside_positions_that_serve_several_batches():
    model, ids, positions = set_dilated_attention(build("llama"), **PATTERN), ids_of(1, 40), torch.arange(40)[None]
    for cut in (11, 20, 30, 7):  # tensors that may lie where the one before lay
        second = model(ids[:, cut:], position_ids=positions[:, cut:]).logits
        expected = torch.cat((model(ids[:, :cut]).logits, second), dim=1)
        bounds = torch.tensor([0, cut, 40], dtype=torch.int32)
        close(model(ids, position_ids=positions, cu_seq_lens_q=bounds).logits, expected)


def test_a_chunk_may_end_in_padding_inside_a_row():
    source = build("llama")
    model, ids = set_dilated_attention(copy.deepcopy(source), **FULL), ids_of(1, 12)
    mask = torch.ones_like(ids)
    mask[0, 3:5] = 0
    options = dict(attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = source.generate(ids, **options)
    for chunk in (2, 4):
        assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options), expected)


def test_positions_of_layers_that_were_made_others_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    changes = {"head_dim": 8, "sliding_window": 16}
    model = build("gemma3_text", **changes, layer_types=["sliding_attention", "full_attention", "full_attention"])
    with pytest.raises(ValueError, match="the type of a layer chooses its positions, too"):
        set_dilated_attention(model, **PATTERN)
    set_dilated_attention(build("gemma3_text", **changes, layer_types=["full_attention"] * 3), **PATTERN)
    assert "positions for layers of type ['sliding_attention']" in caplog.text


def test_positions_that_serve_several_batches_are_looked_at_beside_each_mask():
    model, positions = set_dilated_attention(build("llama"), **PATTERN), torch.arange(40)[None]
    for start in (3, 11, 7, 0):
        ids, mask = ids_of(1, 40), (torch.arange(40) >= start).long()[None]
        expected = model(ids[:, start:], position_ids=positions[:, start:]).logits
        close(model(ids, attention_mask=mask, position_ids=positions).logits[:, start:], expected)
    positions[0, 20:] -= 20  # in place
    expected = torch.cat((model(ids[:, :20]).logits, model(ids[:, 20:]).logits), dim=1)
    close(model(ids, position_ids=positions).logits, expected)


@pytest.mark.parametrize("pattern", [PATTERN, WINDOWS, HEADS])
def test_gradients_equal_those_of_the_oracle(pattern, with_oracle):
    model, ids = set_dilated_attention(build("qwen3"), **pattern), ids_of(1, 45)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for ours, theirs in zip(gradients(), with_oracle(gradients), strict=True):
        close(ours, theirs, 1e-6)  # the loss takes logits in float32


def test_models_are_described():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has the attention that it came with"):
        describe(model)
    pattern = dict(segment_lengths=[8], dilation_rates=[1], branch_types=["window"], full_attention_heads={1: [0]})
    converted = describe(LongNetForCausalLM.from_llama(model, **pattern))
    exchanged = describe(set_dilated_attention(model, **pattern))
    assert exchanged == converted and exchanged.is_causal and exchanged.length == 64
    window, full = (8 * 64 - 28) / 64, 65 / 2
    pairs = [[head.pairs_per_token for head in layer.heads] for layer in exchanged.layers]
    assert pairs == [[window, window], [full, window]] and exchanged.pairs_per_token == (3 * window + full) / 4
    assert [head.cache_keys for head in exchanged.layers[1].heads] == [None, 8] and exchanged.cache_keys is None
    assert [head.farthest for head in exchanged.layers[1].heads] == [63, 7]
    assert exchanged.sight[-1].reached == 64 and describe(model, length=4).length == 4
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='came with. .* has a pattern, but `attn_implementation` is "sdpa"'):
        describe(model)
    model.set_attn_implementation("dilated")
    assert describe(model) == exchanged


def test_an_encoder_is_described_as_one():
    model = BertModel(BertConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=2))  # fmt: skip
    set_dilated_attention(model, segment_lengths=[4], dilation_rates=[1], branch_types=["window"])
    described = describe(model, 16)
    assert not described.is_causal and described.layers[0].heads[0].pairs_per_token == (7 * 16 - 12) / 16


def test_an_encoder_attends_both_ways(with_oracle):
    model, ids = build("bert", AutoModel), ids_of(2, 61)
    set_dilated_attention(model, **PATTERN)
    close(model(ids).last_hidden_state, with_oracle(lambda: model(ids).last_hidden_state))
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    padded = model(ids, attention_mask=mask).last_hidden_state[0, :50]
    close(padded, model(ids[:1, :50]).last_hidden_state[0])


def test_a_saved_model_comes_back_with_its_pattern(tmp_path):
    model, ids = set_dilated_attention(build("qwen3"), **HEADS), ids_of(1, 61)
    expected = model(ids).logits
    for folder in (tmp_path / "once", tmp_path / "twice", tmp_path / "three times"):
        model.save_pretrained(folder)  # also if nothing was computed since it was loaded
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert model.config._attn_implementation == "dilated"
    close(model(ids).logits, expected)
    # Whoever takes the name away, as many tools do, has not chosen another
    for load in (AutoModelForCausalLM.from_pretrained, type(model).from_pretrained):
        loaded = load(folder, dtype=torch.float64, attn_implementation=None)
        assert loaded.config._attn_implementation == "dilated"
        close(loaded(ids).logits, expected)
    config = AutoConfig.from_pretrained(folder, attn_implementation=None)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "dilated"
    with told() as messages:
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    assert "will compute full attention" in messages[0]
    assert (dense(ids).logits - expected).abs().max() > 1e-3
    # And it can be given another
    set_dilated_attention(model, segment_lengths=[None], dilation_rates=[1], branch_types=["window"])
    close(model(ids).logits, dense(ids).logits)
    # Or made dense again
    with told() as messages:
        model.set_attn_implementation("eager")
    assert '`attn_implementation="eager"`' in messages[0]
    model.save_pretrained(tmp_path / "dense")
    with told() as messages:
        for choice in ({}, {"attn_implementation": None}):
            dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **choice)
            assert dense.config._attn_implementation == "sdpa" and not hasattr(dense.config, "dilated_attention")
    assert not messages


def test_of_text_and_images_the_text_model_is_dilated(tmp_path):
    text = SHAPE | GROUPED | {"model_type": "llama"}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=8, patch_size=4, model_type="clip_vision_model")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=90, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    ids = torch.cat((ids_of(1, 20) % 90, torch.full((1, 4), 90), ids_of(1, 20) % 90), dim=1)
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8, dtype=torch.float64))
    dense = model(**inputs).logits
    set_dilated_attention(model, segment_lengths=[None], dilation_rates=[1], branch_types=["window"])
    close(model(**inputs).logits, dense)
    set_dilated_attention(model, **PATTERN)
    expected = model(**inputs).logits
    assert (expected - dense).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    for choice in ({}, {"attn_implementation": None}):
        again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64, **choice)
        close(again(**inputs).logits, expected)


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("mistral", {"sliding_window": 16}, "sliding_window=16"),
        ("gemma2", {"head_dim": 8}, "sliding_attention"),
        ("gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 3}, "soft cap"),
        ("gpt_oss", GROUPED | {"head_dim": 8, "layer_types": ["full_attention"] * 3, "num_local_experts": 4}, "sinks"),
        ("bloom", {"n_head": 4}, "does not call|cannot be exchanged"),
        ("gpt_neo", {"attention_types": [[["global"], 3]], "num_heads": 4}, "cannot be exchanged|call"),
        ("mamba", {}, "does not call|cannot be exchanged"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_what_would_be_wrong_is_refused(model_type, changes, words):
    try:
        model = build(model_type, dtype=torch.float32, **changes)
    except ValueError:  # which has no "sdpa"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SHAPE | changes))).eval()
    before, ids = model.config._attn_implementation, ids_of(1, 9)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=words):
        set_dilated_attention(model, **PATTERN)
    assert model.config._attn_implementation == before
    assert not hasattr(model.config, "dilated_attention") and "attn_implementation" not in model.config.to_dict()
    close(model(ids).logits, expected, 0)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="its pattern is in its configuration"):
        set_dilated_attention(LongNetForCausalLM(AutoConfig.for_model("longnet", **SHAPE)), **PATTERN)
    with pytest.raises(ValueError, match="cross-attention"):
        config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        set_dilated_attention(AutoModel.from_config(config), **PATTERN)
    for config, words in (
        (transformers.Wav2Vec2Config, "it takes `input_values` in place of `input_ids`"),
        (transformers.HubertConfig, "it takes `input_values` in place of `input_ids`"),
        (transformers.ViTConfig, "no `vocab_size`"),
    ):
        small = config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        for probe in (True, False):
            with pytest.raises(ValueError, match=f"is no model of text: .*{words}"):
                set_dilated_attention(AutoModel.from_config(small), **PATTERN, probe=probe)
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    of_mamba = dict(num_heads=8, head_dim=8, state_size=8, n_groups=1)
    for config in (transformers.Mamba2Config(**sizes, **of_mamba), transformers.RwkvConfig(**sizes)):
        model = AutoModelForCausalLM.from_config(config)
        for refused in (lambda x: set_dilated_attention(x, **PATTERN), lambda x: rank_heads(x, ids_of(1, 400))):
            with pytest.raises(ValueError, match=f"{type(model).__name__} has no attention to exchange"):
                refused(model)
    with pytest.raises(ValueError, match="`model` must be a model of Transformers, got Linear"):
        set_dilated_attention(torch.nn.Linear(1, 1), **PATTERN)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    with pytest.raises(ValueError, match="meta device"):
        set_dilated_attention(model, **PATTERN)
    assert set_dilated_attention(model, **PATTERN, probe=False).config._attn_implementation == "dilated"
    for wrong in (dict(full_attention_layers=[3]), dict(full_attention_layers=1), dict(segment_shift="no")):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            set_dilated_attention(build("llama"), **PATTERN | wrong)


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_cache_of_a_longnet_is_refused(model_type, exchanged):
    model, ids = build(model_type), ids_of(1, 9)
    if exchanged:
        set_dilated_attention(model, **PATTERN)
    config = LongNetConfig(num_hidden_layers=model.config.num_hidden_layers, **PATTERN)
    for call in (model, lambda *x, **kwargs: model.generate(*x, max_new_tokens=2, **kwargs)):
        with pytest.raises(ValueError, match="A DilatedCache is that of a LongNet.*ordinary cache"):
            call(ids, past_key_values=DilatedCache(config))


def test_what_a_call_asks_beyond_the_pattern_is_refused():
    model, ids = set_dilated_attention(build("llama"), **PATTERN), ids_of(1, 9)
    with pytest.raises(ValueError, match="the pattern decides"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="static"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="static"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    swallowed = dict(output_attentions=True, head_mask=torch.ones(3, 4), sliding_window=4, cu_seqlens=torch.arange(2))
    for name, value in (swallowed | dict(encoder_hidden_states=torch.ones(1, 9, 32))).items():
        with pytest.raises(ValueError, match=f"does not compute .*`{name}`"):
            model(ids, **{name: value})
    cache = model(ids, position_ids=torch.tensor([[*range(5), *range(4)]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Packed documents cannot be continued"):
        model(ids[:, :1], position_ids=torch.tensor([[4]]), past_key_values=cache)
    bare = AutoModelForCausalLM.from_config(model.config.__class__(**SHAPE), attn_implementation="dilated")
    with pytest.raises(ValueError, match="set_dilated_attention"):
        bare(ids)
    for wrong in ({"dilation": 2}, True, {"segment_lengths": 8, "dilation_rates": [1]}):
        bare.config.dilated_attention = wrong
        with pytest.raises(ValueError, match="`dilated_attention` of the configuration"):
            bare(ids)


def test_heads_may_be_split_where_all_attend_alike():
    """As tensor parallelism does it: a process has some of the heads, and the configuration of all."""
    model = build("llama", num_key_value_heads=4)
    attention, states = model.model.layers[0].self_attn, torch.randn(3, 1, 4, 50, 8, dtype=torch.float64)
    alike = dict(segment_lengths=[8, None], dilation_rates=[1, 1], branch_types=["segment", "window"])
    set_dilated_attention(model, **alike)
    whole = dilated_attention_forward(attention, *states, None)[0]
    close(dilated_attention_forward(attention, *states[:, :, 2:], None)[0], whole[:, :, 2:])
    heads = dict(segment_lengths=[8], dilation_rates=[1], full_attention_heads={0: [1]})
    for pattern in (PATTERN, heads):
        set_dilated_attention(model, **pattern)
        with pytest.raises(ValueError, match="called with 2 of its 4 key/value heads.*tensor parallelism"):
            dilated_attention_forward(attention, *states[:, :, 2:], None)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_exports_to_onnx_go_through_plain_operations(model_type, monkeypatch):
    auto_class = {"llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}[model_type]
    model, ids = set_dilated_attention(build(model_type, auto_class), **PATTERN), ids_of(2, 30)
    mask = (torch.arange(30) >= torch.tensor([[4], [0]])).long()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    inputs = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    exported = torch.export.export(model, (), inputs, strict=False)
    called = {str(node.target) for node in exported.graph.nodes}
    assert not [name for name in called if "dilated_operator" in name or "cummax" in name]
    close(exported.module()(**inputs).logits[mask == 1], expected[mask == 1])


def test_a_model_compiles():
    model, ids = set_dilated_attention(build("llama", dtype=torch.float32), **PATTERN), ids_of(1, 61)
    positions = torch.cat((torch.arange(23), torch.arange(38)))[None]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    calls = dict(input_ids=ids), dict(input_ids=ids, position_ids=positions), dict(input_ids=ids[:, 20:])
    outputs = [compiled(**inputs).logits for inputs in calls]  # before the model has run by itself
    for output, inputs in zip(outputs, calls, strict=True):
        close(output, model(**inputs).logits, 1e-4)


def test_a_loaded_model_knows_its_patterns(tmp_path):
    """`torch.compile` cannot look for them."""
    set_dilated_attention(build("llama"), **PATTERN).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all("_dilated_pattern" in vars(layer.self_attn) for layer in model.model.layers)


def test_masks_that_do_more_than_keep_documents_apart_are_refused():
    model = set_dilated_attention(build("llama"), **PATTERN)
    inputs = model.config, torch.zeros(1, 9, 32), None, None
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1, -1]])
    model.config.sliding_window = 4
    refused = (
        lambda: create_causal_mask(*inputs, block_sequence_ids=blocks),
        lambda: create_causal_mask(*inputs, block_sequence_ids=torch.zeros(1, 9, dtype=torch.long)),
        lambda: create_causal_mask(*inputs, or_mask_function=lambda b, h, q, k: k < 3),
        lambda: create_sliding_window_causal_mask(*inputs),
    )
    attention, states = model.model.layers[0].self_attn, torch.zeros(1, 4, 9, 8, dtype=torch.float64)
    for make in refused:
        with pytest.raises(ValueError, match="more than to hide later tokens"):
            dilated_attention_forward(attention, states, states, states, make())
    restarting = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    documents = create_causal_mask(*inputs, position_ids=restarting)
    assert documents.shape == (1, 1, 1, 9) and documents.diff().tolist() == [[[[0, 0, 1, 1, 0, 0, 0, 0]]]]
    assert create_causal_mask(*inputs, position_ids=torch.arange(9)[None]) is None


def test_trainer_may_split_what_is_padded_on_the_right_alone():
    class Stub:
        def _prepare_context_parallel_inputs(self, model, inputs):
            assert model.config._attn_implementation == "sdpa"  # the one name that Trainer allows
            return None, inputs

    class Split(ContextParallelTrainerMixin, Stub):
        accelerator = SimpleNamespace(
            parallelism_config=SimpleNamespace(cp_enabled=True), unwrap_model=lambda model: model
        )

    model = set_dilated_attention(build("llama"), **PATTERN)
    for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 1, 1]]):
        inputs = {"input_ids": ids_of(len(mask), 3), "attention_mask": torch.tensor(mask)}
        _, prepared = Split()._prepare_context_parallel_inputs(model, inputs)
        assert "attention_mask" not in prepared and model.config._attn_implementation == "dilated"
    for mask in ([[0, 1, 1], [1, 1, 1]], [[1, 0, 1]], [[[1, 1, 1]]]):
        with pytest.raises(ValueError, match="padding on the right only"):
            Split()._prepare_context_parallel_inputs(model, {"attention_mask": torch.tensor(mask)})


def test_attention_that_computes_something_else_is_found_out(monkeypatch):
    """As of a model that hides a bias in its mask, say."""

    def biased(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key + 0.1, value * 1.01, attention_mask, **kwargs)

    model = build("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", biased)
    with pytest.raises(ValueError, match="differs by"):
        set_dilated_attention(model, **PATTERN)
    assert not hasattr(model.config, "dilated_attention") and "attn_implementation" not in model.config.to_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_the_kernels_serve_other_models_too(model_type, with_oracle):
    """float32, in which the kernels and Transformers' attention differ by rounding alone; then cached and packed."""
    model = build(model_type, dtype=torch.float32, hidden_size=128, head_dim=32).cuda()
    set_dilated_attention(model, **PATTERN)
    ids, positions = ids_of(2, 301).cuda(), torch.cat((torch.arange(120), torch.arange(181)))[None].cuda()
    with torch.device("cuda"):
        close(model(ids).logits, with_oracle(lambda: model(ids).logits), 1e-3)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    close(packed, torch.cat((model(ids[:, :120]).logits, model(ids[:, 120:]).logits), dim=1), 1e-3)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    generated = model.generate(ids, **options)
    close(model(generated[:, :-1]).logits[:, 300:].argmax(-1), generated[:, 301:], 0)


FULL = dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"])


@pytest.mark.parametrize(
    "model_type, auto_class, changes, works",
    [
        ("llama", AutoModelForCausalLM, {}, ("position_ids", "alone", "cu_seq_lens")),
        ("bert", AutoModelForMaskedLM, {}, ("position_ids", "alone", "cu_seq_lens")),
        ("modernbert", AutoModelForMaskedLM, {"layer_types": ["full_attention"] * 3}, ("cu_seq_lens",)),
        ("persimmon", AutoModelForCausalLM, {"hidden_act": "relu2"}, ("alone",)),
    ],
)
def test_packed_documents_are_kept_apart_or_refused(
    model_type, auto_class, changes, works, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = build(model_type, auto_class, **changes)
    set_dilated_attention(model, **FULL)
    assert ("will refuse them" in caplog.text) == (len(works) < 3)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path, dtype=torch.float64).eval()
    documents, bounds = [ids_of(1, 5), ids_of(1, 7)], torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = dict(input_ids=torch.cat(documents, dim=1), position_ids=torch.tensor([[*range(5), *range(7)]]))
    ways = {
        "position_ids": dict(attention_mask=torch.ones(1, 12, dtype=torch.long)),
        "alone": dict(use_cache=False),
        "cu_seq_lens": dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds),
    }
    for m in (model, copy.deepcopy(model), loaded):
        expected = torch.cat([m(x).logits for x in documents], dim=1)
        for name, inputs in ways.items():
            if name in works:
                close(m(**packed, **inputs).logits, expected)
            elif name != "cu_seq_lens" or model_type != "persimmon":  # which knows no such argument
                for called in (m, m.base_model):
                    with pytest.raises(ValueError, match="does not keep packed documents apart by `position_ids`"):
                        called(**packed, **inputs)
        one = m(packed["input_ids"], position_ids=torch.arange(12)[None], attention_mask=torch.ones(1, 12)).logits
        close(one, m(packed["input_ids"]).logits)
        padded = dict(position_ids=torch.tensor([[1] * 5 + [*range(7)]]), attention_mask=torch.arange(12)[None] > 4)
        close(m(packed["input_ids"], **padded).logits[:, 5:], m(documents[1]).logits)
    model.set_attn_implementation("sdpa")
    model(**packed, **ways["position_ids"])  # as Transformers would


def test_no_name_of_the_dense_source_is_left(tmp_path):
    """Whoever reads it again (TRL for a reference model, PEFT for an adapter's base) would get a dense model."""
    text, vision = SHAPE | GROUPED | {"model_type": "llama"}, dict(hidden_size=16, intermediate_size=16)
    vision |= dict(
        num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, model_type="clip_vision_model"
    )
    llava = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=90)
    for source in (build("llama"), transformers.LlavaForConditionalGeneration(llava)):
        source.save_pretrained(tmp_path / "dense")
        model = type(source).from_pretrained(tmp_path / "dense")
        assert str(tmp_path) in names_of(model)
        set_dilated_attention(model, **PATTERN)
        assert str(tmp_path) not in names_of(model)
        model.save_pretrained(tmp_path / "dilated")
        again = type(source).from_pretrained(tmp_path / "dilated")
        set_dilated_attention(again, **PATTERN)  # which says nothing new
        assert again.config._name_or_path == str(tmp_path / "dilated")


def names_of(model):
    """All that is written anywhere in a model and its configurations, in one string."""
    parts = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    parts += [getattr(m.config, name) for m in parts for name in m.config.sub_configs] + [m.config for m in parts]
    return " ".join(str(x) for part in parts for x in vars(part).values() if isinstance(x, str))
