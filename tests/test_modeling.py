"""The model computes the same as with eager attention: padded, packed, in low precision, as an encoder."""

import copy

import pytest
import torch
import transformers
from comparisons import all_gradients, assert_same_gradients, main_output, with_eager
from models import build, every_head, every_kind, random_ids, small_config
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.integrations.executorch import register_dynamic_cache_export_support

from longnet_hf import (
    DilatedCache,
    LongNetAttention,
    LongNetForCausalLM,
    LongNetModel,
    dilated_attention_reference,
    modeling_longnet,
)
from longnet_hf.modeling_longnet import LongNetRotaryEmbedding


@every_kind
@pytest.mark.parametrize("padding", ["none", "left", "right", "inside", "a whole row"])
@pytest.mark.parametrize("length", [1, 7, 61])
def test_sdpa_equals_eager(kind, padding, length):
    model = build(LongNetForCausalLM, kind, torch.float64)
    eager, ids = with_eager(model), random_ids(2, length)
    mask = torch.ones_like(ids)
    cut = length // 3
    if padding == "left":
        mask[0, :cut] = 0
    elif padding == "right":
        mask[0, length - cut :] = 0
    elif padding == "inside":
        mask[0, cut : 2 * cut] = mask[1, :2] = 0
    elif padding == "a whole row":
        mask[0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    ours, theirs = (m(ids, attention_mask=mask, labels=labels, skip_logits=False) for m in (model, eager))
    assert ours.logits.isfinite().all()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-10)
    assert_same_gradients(all_gradients(model, ours.loss), all_gradients(eager, theirs.loss), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    exact, ids = build(LongNetForCausalLM, dtype=torch.float64), random_ids(2, 50)
    low = copy.deepcopy(exact).to(dtype)
    expected, ours, plain = (m(ids).logits.double() for m in (exact, low, with_eager(low)))
    assert (ours - expected).abs().max() < 2 * (plain - expected).abs().max()
    low.train()
    loss = low(ids, labels=ids).loss
    assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in all_gradients(low, loss).values())


def test_autocast():
    model, ids = build(LongNetForCausalLM, "llama"), random_ids(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, skip_logits=False)
    outputs.loss.backward()
    assert (outputs.logits.float() - model(ids).logits).abs().max() < 0.3


def test_gradients_reach_hidden_states_and_attentions():
    model = with_eager(build(LongNetForCausalLM))
    outputs = model(random_ids(1, 9), output_hidden_states=True, output_attentions=True)
    for x in (outputs.hidden_states[0], outputs.attentions[0]):
        x.retain_grad()
    outputs.logits.flatten()[-1].backward()
    assert outputs.hidden_states[0].grad is not None and outputs.attentions[0].grad is not None


# Padding and packing


@every_kind
def test_a_padded_row_equals_the_row_alone(kind):
    model = build(LongNetModel, kind, torch.float64)
    row = random_ids(1, 45)
    alone = model(row).last_hidden_state
    for where in (range(10, 55), range(0, 45), [*range(5, 20), *range(22, 40), *range(48, 60)]):
        columns = torch.tensor([*where])
        ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
        ids[0, columns], mask[0] = row[0], 0
        mask[0, columns] = 1
        for attention_mask in (mask, mask.bool()):
            padded = model(ids, attention_mask=attention_mask).last_hidden_state
            torch.testing.assert_close(padded[0, columns], alone[0], rtol=0, atol=1e-9)


@every_kind
def test_packed_documents_equal_each_alone(kind):
    model = build(LongNetModel, kind, torch.float64)
    lengths = [1, 33, 8, 20]
    documents = [random_ids(length).tolist() for length in lengths]
    alone = torch.cat([model(torch.tensor([d])).last_hidden_state for d in documents], dim=1)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate([{"input_ids": d} for d in documents])
    batch.pop("labels")
    by_position = {name: batch[name] for name in ("input_ids", "position_ids")}
    by_length = {name: x for name, x in batch.items() if name not in ("position_ids", "seq_idx")}
    by_index = {name: batch[name] for name in ("input_ids", "seq_idx")}
    hidden_mask = by_position | {"attention_mask": torch.ones(1, sum(lengths))}
    for inputs in (by_position, by_length, by_index, batch, hidden_mask):
        if "position_ids" not in inputs:  # rotary positions are relative: those of the whole row serve
            assert inputs is by_length or inputs is by_index
        packed = model(**inputs).last_hidden_state
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


def test_documents_cannot_continue_a_cache():
    model = build(LongNetModel)
    packed = dict(input_ids=random_ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    assert model(**packed).past_key_values is None
    with pytest.raises(ValueError, match="`past_key_values` cannot take a row of several packed documents"):
        model(**packed, past_key_values=DynamicCache())
    cache = model(random_ids(1, 5)).past_key_values
    with pytest.raises(ValueError, match="`position_ids` restart"):
        model(random_ids(1, 4), past_key_values=cache, position_ids=torch.tensor([[5, 6, 0, 1]]))
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(random_ids(1, 4), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize("make_cache", [DilatedCache, lambda config: DynamicCache(config=config)])
def test_a_cache_is_continued_behind_its_tokens(make_cache):
    """Rows hold 6 and 3 tokens, and padding has any position."""
    model, ids = build(LongNetModel, dtype=torch.float64), random_ids(2, 10)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 3 + [0] + [1] * 3])
    expected = model(ids, attention_mask=mask).last_hidden_state

    def read_on(first, stop, *rows):
        cache = make_cache(model.config)
        with torch.no_grad():
            model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
            given = dict(past_key_values=cache, attention_mask=mask[:, :stop], position_ids=torch.tensor(rows))
            return model(ids[:, first:stop], **given).last_hidden_state

    real = mask[:, 6:] == 1
    output = read_on(6, 10, [6, 7, 8, 9], [0, 3, 4, 5])
    torch.testing.assert_close(output[real], expected[:, 6:][real], rtol=0, atol=1e-9)
    for rows in ([[0, 1, 2, 3], [0, 3, 4, 5]], [[5, 6, 7, 8], [0, 3, 4, 5]]):
        with pytest.raises(ValueError, match=f"begin at {rows[0][0]} in row 0, of which `past_key_values` holds 6"):
            read_on(6, 10, *rows)
    with pytest.raises(ValueError, match="begin at 2 in row 1, of which `past_key_values` holds 3"):
        read_on(6, 10, [6, 7, 8, 9], [0, 2, 3, 4])
    with pytest.raises(ValueError, match="begin at 0 in row 1, of which `past_key_values` holds 3"):  # a single token
        read_on(7, 8, [7], [0])


# Positions


def test_positions_stay_exact_far_out_and_under_casts():
    rotary = LongNetRotaryEmbedding(small_config(head_dim=64))
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(rotary.inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
    for model in (rotary, copy.deepcopy(rotary).to(torch.bfloat16).float(), copy.deepcopy(rotary).half()):
        assert torch.equal(model.inv_freq, rotary.inv_freq)
        for position in (100_000, 123_456_789, 1_000_000_000):
            angles = position * rotary.inv_freq.double()
            cos, sin = model(torch.zeros(1, 1, 1), torch.tensor([[position]]))
            torch.testing.assert_close(cos[0, 0, :32].double(), angles.cos(), rtol=0, atol=1e-6)
            torch.testing.assert_close(sin[0, 0, 32:].double(), angles.sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("parameters", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
])  # fmt: skip
def test_rope_scaling_is_that_of_transformers(parameters):
    parameters = {"rope_theta": 1e4, "original_max_position_embeddings": 64} | parameters
    config = small_config(rope_parameters=parameters)
    ours = LongNetRotaryEmbedding(config)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    x, position_ids = torch.zeros(1, 1, 1), torch.arange(200)[None]
    for our, their in zip(ours(x, position_ids), theirs(x, position_ids), strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-4)
    plain = LongNetRotaryEmbedding(small_config())
    assert (ours(x, position_ids)[0] - plain(x, position_ids)[0]).abs().max() > 0.1


# Encoders, and attention alone


def test_an_encoder_attends_both_ways():
    model, ids = build(LongNetModel, dtype=torch.float64, is_causal=False), random_ids(1, 30)
    outputs = model(ids)
    torch.testing.assert_close(main_output(outputs), main_output(with_eager(model)(ids)), rtol=0, atol=1e-10)
    changed = ids.clone()
    changed[0, -1] += 1
    assert not torch.equal(main_output(model(changed))[0, -3], main_output(outputs)[0, -3])
    assert outputs.past_key_values is None
    with pytest.raises(ValueError, match="is_causal=False"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="is_causal"):
        build(LongNetForCausalLM, is_causal=False)
    causal = build(LongNetModel, dtype=torch.float64)
    torch.testing.assert_close(main_output(causal(ids, is_causal=False)), main_output(outputs))


def test_attention_can_be_used_alone():
    attention, x = LongNetAttention(small_config(), layer_idx=0).double(), torch.randn(2, 30, 32, dtype=torch.float64)
    mask = torch.ones(2, 30)
    mask[0, :4] = 0
    output, weights = attention(x, attention_mask=mask)
    assert weights is None
    q, k, v = (p(x).view(2, 30, 4, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = dilated_attention_reference(q, k, v, attention.pattern, attention_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, attention.o_proj(attention.attn_sub_norm(mixed)), rtol=0, atol=1e-12)


@every_kind
def test_exports_to_onnx_go_through_plain_operations(kind, monkeypatch):
    """ONNX has no function for the operator; `torch.onnx.export` itself needs packages that the tests do without."""
    model, ids = build(LongNetForCausalLM, kind, torch.float64), random_ids(2, 30)
    mask = (torch.arange(30) >= torch.tensor([[4], [0]])).long()
    packed = torch.cat((torch.arange(12), torch.arange(18))).expand(2, -1)
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": packed}):
        inputs = dict(input_ids=ids, use_cache=False) | inputs
        expected = model(**inputs).logits
        with monkeypatch.context() as patch:
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            exported = torch.export.export(model, (), inputs, strict=False)
        called = {str(node.target) for node in exported.graph.nodes}
        assert not [name for name in called if "dilated_operator" in name or "cummax" in name]
        real = inputs.get("attention_mask", torch.ones_like(ids)) == 1
        torch.testing.assert_close(exported.module()(**inputs).logits[real], expected[real], rtol=0, atol=1e-9)


def test_an_export_to_onnx_attends_to_padding_of_segments(monkeypatch):
    model, ids = encoder(segment_padding="zeros"), random_ids(1, 30)
    expected = model(ids).last_hidden_state
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = torch.export.export(model, (), {"input_ids": ids}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-9)


def test_function_transforms_work_with_the_dense_formula():
    model, ids = with_eager(build(LongNetForCausalLM, dtype=torch.float64)), random_ids(1, 20)
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def total(weights):
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits.square().sum()

    expected = all_gradients(model, model(ids).logits.square().sum())
    assert_same_gradients(torch.func.grad(total)(weights), expected, atol=1e-8)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="functorch"):  # PyTorch's own refusal
        torch.func.grad(total)(weights)


# What cannot be honoured is refused


def test_other_attentions_are_refused():
    for name in ("flash_attention_2", "flex_attention", "nonsense"):
        with pytest.raises((ValueError, ImportError)):
            LongNetForCausalLM(small_config(attn_implementation=name))
    model = build(LongNetForCausalLM)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="`attn_implementation`.*'paged|sdpa'"):
        model(random_ids(1, 4))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="continuous batching"):
        model(random_ids(1, 4), cache=object())
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[5, 6, 7]])


SWALLOWED = dict(
    head_mask=torch.ones(3, 4),
    sliding_window=4,
    encoder_hidden_states=torch.ones(2, 9, 32),
    cu_seqlens=torch.tensor([0, 4, 18]),
    token_type_ids=torch.ones(2, 9, dtype=torch.long),
    output_router_logits=True,
    attention_masks=torch.ones(2, 9),  # misspelt
)


@every_head
@pytest.mark.parametrize("name", SWALLOWED)
def test_arguments_that_are_not_honoured_are_refused(model_class, name):
    model, ids = build(model_class), random_ids(2, 9)
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match=f"LongNet does not take `{name}`, got"):
            call(ids, **{name: SWALLOWED[name]})
        for nothing in (None, False) if name != "token_type_ids" else (None, torch.zeros(2, 9)):
            assert torch.equal(main_output(call(ids, **{name: nothing})), main_output(call(ids)))


@every_head
def test_the_operator_has_no_weights_to_return(model_class):
    model, ids = build(model_class), random_ids(2, 9)
    with pytest.raises(ValueError, match='`output_attentions=True` .*`attn_implementation="eager"`'):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(ids).attentions) == 3
    for name in ("sdpa", "dilated"):
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="`output_attentions=True`"):
            model(ids)
        assert model(ids, output_attentions=False).attentions is None


def test_what_others_pass_along_says_nothing_new():
    model, ids = build(LongNetForCausalLM), random_ids(2, 9)
    harmless = dict(num_items_in_batch=3, max_length_q=9, max_length_k=9, use_cache=False, return_dict=True)
    assert torch.equal(model.model(ids, **harmless).last_hidden_state, model.model(ids).last_hidden_state)
    attention, x = LongNetAttention(small_config(), layer_idx=0), torch.randn(1, 9, 32)
    with pytest.raises(ValueError, match="does not take `head_mask`"):
        attention(x, head_mask=torch.ones(4))
    with pytest.raises(ValueError, match="`labels`.*Only models with a head have a loss"):
        model.model(ids, labels=ids)


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 9, 9), (2, 8), (1, 9)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` must be a 2-D padding mask of shape \(2, 9\)"):
        build(LongNetModel)(random_ids(2, 9), attention_mask=torch.ones(shape))


def test_the_operator_goes_by_its_own_name_too(tmp_path):
    model, ids = build(LongNetForCausalLM), random_ids(1, 30)
    expected = model(ids).logits
    model.set_attn_implementation("dilated")
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "dilated"
    assert torch.equal(loaded(ids).logits, expected)
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="Linear needs the package: `import longnet_hf`"):
        modeling_longnet.dilated_attention_forward(torch.nn.Linear(1, 1), x, x, x, None, 1.0)


def encoder(**changes):
    """A model that attends both ways, on embeddings of its own, in float64."""
    return build(LongNetModel, dtype=torch.float64, is_causal=False, head_offset="grouped", **changes)


def test_without_rotary_positions_only_the_pattern_knows_of_positions():
    model, ids = encoder(use_rope=False, segment_lengths=[64], dilation_rates=[1]), random_ids(1, 20)
    assert not [name for name, _ in model.named_buffers() if "rotary" in name]
    order = torch.randperm(20)
    permuted = model(ids[:, order]).last_hidden_state
    torch.testing.assert_close(permuted, model(ids).last_hidden_state[:, order], rtol=0, atol=1e-12)
    rotary = encoder(segment_lengths=[64], dilation_rates=[1])
    assert (rotary(ids[:, order]).last_hidden_state - rotary(ids).last_hidden_state[:, order]).abs().max() > 0.01


def test_without_the_final_norm():
    with_norm, without, ids = encoder(), encoder(use_final_norm=False), random_ids(1, 20)
    without.load_state_dict({n: weight for n, weight in with_norm.state_dict().items() if not n.startswith("norm.")})
    expected = with_norm.norm(without(ids).last_hidden_state)
    torch.testing.assert_close(with_norm(ids).last_hidden_state, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "module", "times"), [
    ("embedding_dropout", "embedding_dropout", 1), ("hidden_dropout", "layers.0.dropout", 2),
])  # fmt: skip
def test_dropout_of_embeddings_and_of_what_layers_add(name, module, times):
    model, ids, seen = encoder(**{name: 0.5}, num_hidden_layers=1), random_ids(1, 20), []
    model.get_submodule(module).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    expected = model(ids).last_hidden_state
    assert all(torch.equal(*pair) for pair in seen)  # nothing in evaluation
    seen.clear()
    assert not torch.equal(model.train()(ids).last_hidden_state, expected)
    assert len(seen) == times  # hidden states: what attention adds, and what the MLP adds
    for before, after in seen:
        kept = after != 0
        torch.testing.assert_close(after[kept], 2 * before[kept])
        assert 0.3 < kept.double().mean() < 0.7


def test_drop_path_leaves_out_layers_of_whole_rows_more_often_in_depth():
    model = encoder(drop_path_rate=0.5)
    assert [layer.drop_path.probability for layer in model.layers] == [0, 0.25, 0.5]
    ids, path = random_ids(400, 3), model.layers[2].drop_path
    seen = []
    path.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(ids)
    assert all(torch.equal(*pair) for pair in seen)
    seen.clear()
    model.train()(ids)
    assert len(seen) == 2
    for before, after in seen:
        kept = (after != 0).flatten(1).any(1)
        torch.testing.assert_close(after, 2 * before * kept[:, None, None])
        assert 0.4 < kept.double().mean() < 0.6


def test_drop_path_and_dropout_under_gradient_checkpointing():
    model, ids = encoder(drop_path_rate=0.5, hidden_dropout=0.2, embedding_dropout=0.2).train(), random_ids(4, 30)
    torch.manual_seed(1)
    expected = all_gradients(model, model(ids).last_hidden_state.square().sum())
    model.gradient_checkpointing_enable()
    torch.manual_seed(1)
    assert_same_gradients(all_gradients(model, model(ids).last_hidden_state.square().sum()), expected, 1e-9)


def test_without_a_vocabulary_a_model_takes_embeddings():
    model = encoder(vocab_size=0, pad_token_id=None)
    assert model(inputs_embeds=torch.randn(1, 9, 32, dtype=torch.float64)).last_hidden_state.shape == (1, 9, 32)
    with pytest.raises(ValueError, match="vocab_size=0.*inputs_embeds"):
        model(random_ids(1, 9))
    with pytest.raises(ValueError, match="vocab_size=0"):
        build(LongNetForCausalLM, vocab_size=0, pad_token_id=None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_segments_is_that_of_each_row_alone(side):
    model, ids = encoder(segment_padding="zeros"), random_ids(2, 37)
    plain = encoder()
    mask = torch.ones(2, 37, dtype=torch.long)
    hidden = slice(0, 14) if side == "left" else slice(23, 37)
    mask[1, hidden] = 0
    batch = model(ids, attention_mask=mask).last_hidden_state
    for row in range(2):
        real = mask[row] == 1
        alone = model(ids[row : row + 1, real]).last_hidden_state
        torch.testing.assert_close(batch[row : row + 1, real], alone, rtol=0, atol=1e-10)
        assert (alone - plain(ids[row : row + 1, real]).last_hidden_state).abs().max() > 1e-3
    eager = with_eager(model)(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(batch[mask == 1], eager[mask == 1], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="segment_padding"):
        model(ids, is_causal=True)


@pytest.mark.parametrize("model_class", [LongNetModel, LongNetForCausalLM])
def test_attention_of_chosen_rows_is_that_of_the_dense_formula(model_class):
    model, ids = build(model_class, "llama", dtype=torch.float64), random_ids(2, 31)
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :6] = 0
    expected = with_eager(model)(ids, attention_mask=mask, output_attentions=True).attentions
    for a_model in (model, with_eager(model)):
        rows = a_model(ids, attention_mask=mask, output_attentions=True, attention_rows=[0, 20, -1]).attentions
        assert len(rows) == 3
        for ours, theirs in zip(rows, expected, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, [0, 20, 30]], rtol=0, atol=1e-10)


def test_attention_of_rows_that_cannot_be_had_is_refused():
    model, ids = build(LongNetModel), random_ids(1, 9)
    for rows, text in (
        ([9], "below the length 9, got .9."),
        ([0.5], "integers of shape"),
        ([[1]], "integers of shape"),
    ):
        with pytest.raises(ValueError, match=f"`attention_rows` must .*{text}"):
            model(ids, attention_rows=rows, output_attentions=True)
    with pytest.raises(ValueError, match="`output_attentions=True`"):
        model(ids, attention_rows=[1])
    with pytest.raises(ValueError, match="`past_key_values`"):
        model(ids, attention_rows=[1], output_attentions=True, past_key_values=model.make_cache())


def test_a_model_is_exported_for_any_length():
    model, ids = build(LongNetForCausalLM), random_ids(2, 13)
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    inputs = {"input_ids": ids, "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=sizes)
    ids = random_ids(3, 29)
    logits = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)


def test_an_export_makes_no_cache_by_itself():
    model, ids = build(LongNetForCausalLM), random_ids(2, 13)
    assert model.config.use_cache
    output = torch.export.export(model, (ids,), strict=False).module()(ids)
    torch.testing.assert_close(output.logits, model(ids).logits, rtol=0, atol=1e-4)
    assert output.past_key_values is None


def test_generation_is_exported_with_the_ordinary_cache(monkeypatch):
    model, ids = build(LongNetForCausalLM), random_ids(2, 13)
    expected = model(ids).logits[:, 12:]
    caches = DynamicCache(config=model.config), DilatedCache(model.config)
    dynamic, dilated = (
        dict(input_ids=ids[:, 12:], past_key_values=cache, attention_mask=torch.ones_like(ids)) for cache in caches
    )
    for cache in caches:
        model(ids[:, :12], past_key_values=cache)
    register_dynamic_cache_export_support()
    exported = torch.export.export(model, (), dynamic, strict=False)
    torch.testing.assert_close(exported.module()(**dynamic).logits, expected, rtol=0, atol=1e-4)
    # As an exporter that takes any cache apart would call it
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(ValueError, match='DilatedCache.*`cache_implementation="dynamic"`'):
        model(**dilated)
