"""LongNet models keep to what Transformers' own common tests ask of a model."""

import copy
import json
import os
import pickle
import socket

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import KINDS, SMALL, build, random_ids, small_config
from patterns import joined
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from longnet_hf import (
    DilatedPattern,
    LongNetAttention,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    dilated_attention_reference,
    modeling_longnet,
)
from longnet_hf.modeling_longnet import LongNetRotaryEmbedding


AUTO_CLASSES = modeling_longnet.AUTO_CLASSES
HEADS = list(AUTO_CLASSES.values())
every_kind = pytest.mark.parametrize("kind", KINDS)
every_head = pytest.mark.parametrize("model_class", HEADS)


def main_output(outputs):
    return outputs.to_tuple()[0]


def with_eager(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager


def all_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text
        )


# Configuration


def test_default_is_the_papers_base_model():
    config = LongNetConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768) and config.dilation_rates == (1, 2, 4, 6, 12)
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert 85e6 < layers < 86e6
    assert isinstance(model.model.layers[0].self_attn.attn_sub_norm, nn.LayerNorm)


@every_kind
def test_config_round_trip(kind, tmp_path):
    config = small_config(kind)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LongNetConfig)
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict() and loaded.layer_patterns == config.layer_patterns
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longnet"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(segment_lengths=[8, 16]), "`segment_lengths`, `dilation_rates` and `branch_types`.*got 2, 3"),
        (dict(dilation_rates=[1, 2, 0]), "`dilation_rates`.*0"),
        (dict(branch_types=["segment", "segment", "banded"]), "`branch_types`.*'banded'"),
        (dict(head_offset="torchscale"), "`head_offset`.*'torchscale'"),
        (dict(full_attention_layers=[3]), r"`full_attention_layers`.*\[3\]"),
        (dict(num_key_value_heads=3), "`num_key_value_heads`"),
        (dict(hidden_size=30), "`hidden_size` .30."),
        (dict(head_dim=7), "`head_dim`.*7"),
        (dict(hidden_act="nonsense"), "`hidden_act` must be one of .*'gelu'.*'nonsense'"),
        (dict(norm_type="batch_norm"), "`norm_type`.*'batch_norm'"),
        (dict(num_attention_heads=0), "`num_attention_heads` must be at least 1, got 0"),
        (dict(hidden_size=0, num_attention_heads=4), "`hidden_size` must be at least 1, got 0"),
        (dict(pad_token_id=10**6), "`pad_token_id` must lie below `vocab_size`.*1000000"),
        (dict(chunk_size_feed_forward=-1), "`chunk_size_feed_forward` must be at least 0, got -1"),
        (dict(use_sliding_window=True), "does not read `use_sliding_window`"),
        (dict(attention_dropout=1.5), "`attention_dropout`.*1.5"),
        (dict(sliding_window=128), "`sliding_window`.*128"),
        (dict(layer_types=["full_attention"] * 3), "`layer_types`"),
        (dict(segment_lengths="8"), "segment_lengths"),
        (dict(hidden_size="32"), "hidden_size"),
    ],
)
def test_wrong_configurations_are_named(change, named):
    with pytest.raises(Exception, match=named):
        LongNetConfig(**(SMALL | change))


def test_configurations_changed_while_loading_are_checked(tmp_path):
    build(LongNetForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="`segment_lengths`, `dilation_rates`"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 16])
    model = LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 16], dilation_rates=[1, 2])
    assert model.model.layers[0].self_attn.pattern.segment_lengths == (8, 16)


# Saving and loading


@every_head
@every_kind
def test_save_and_load(model_class, kind, tmp_path):
    model, ids = build(model_class, kind), random_ids(1, 30)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.bin"))
    auto = next(getattr(transformers, name) for name, c in AUTO_CLASSES.items() if c is model_class)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not any(info.values())
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(main_output(model(ids)), main_output(loaded(ids)))


@pytest.mark.parametrize("kind", ["paper", "hybrid"])
def test_weights_that_a_checkpoint_lacks_are_initialised(kind, tmp_path):
    build(LongNetModel, kind).save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = LongNetForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.score.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert (model.score.bias == 0).all()
    empty = LongNetModel.from_pretrained(None, config=small_config(kind), state_dict={})
    fresh = LongNetModel(small_config(kind))
    for (name, ours), theirs in zip(empty.named_parameters(), fresh.parameters(), strict=True):
        assert ours.isfinite().all(), name
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.4, abs=1e-8), name


def test_magneto_initialisation_grows_with_depth():
    config = small_config(hidden_size=128, intermediate_size=256, num_hidden_layers=12)
    layer = LongNetModel(config).layers[3]
    gain = torch.tensor(24.0).log().sqrt().item()
    for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 * gain, rel=0.05)
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_embeddings_start_with_unit_variance():
    """Smaller ones drown in what the layers add, and a small model stays at the frequencies of the tokens."""
    model = LongNetModel(small_config(hidden_size=256))
    first = model(random_ids(4, 200), output_hidden_states=True).hidden_states[0]
    assert first.std().item() == pytest.approx(1.0, rel=0.05)
    assert (model.embed_tokens.weight[model.config.pad_token_id] == 0).all()
    llama = LongNetModel(small_config("llama", hidden_size=256))
    assert llama.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_resized_embeddings(tied, tmp_path):
    model = build(LongNetForCausalLM, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == 101 and model(random_ids(1, 5)).logits.shape[-1] == 101
    assert model(random_ids(1, 5), labels=random_ids(1, 5)).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = random_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_head
def test_embeddings_can_be_read_and_replaced(model_class):
    model = build(model_class)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    new = nn.Embedding(10, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


@every_head
def test_copies_and_pickles(model_class):
    model, ids = build(model_class), random_ids(1, 20)
    expected = main_output(model(ids))
    assert torch.equal(main_output(copy.deepcopy(model)(ids)), expected)
    assert torch.equal(main_output(pickle.loads(pickle.dumps(model))(ids)), expected)


# Outputs


@every_head
@every_kind
def test_hidden_states_and_attentions(model_class, kind):
    model, ids = with_eager(build(model_class, kind)), random_ids(2, 21)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(2, 21, 32)] * 4
    assert [tuple(x.shape) for x in outputs.attentions] == [(2, 4, 21, 21)] * 3
    weights = outputs.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21))
    assert (weights.triu(1) == 0).all()
    for ours, theirs in zip(model(ids, return_dict=False), model(ids).to_tuple(), strict=True):
        assert not torch.is_tensor(ours) or torch.equal(ours, theirs)


@every_head
def test_embeddings_in_place_of_ids(model_class):
    model, ids = build(model_class), random_ids(1, 11)
    by_embeddings = main_output(model(inputs_embeds=model.get_input_embeddings()(ids)))
    torch.testing.assert_close(by_embeddings, main_output(model(ids)))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_gradients_reach_hidden_states_and_attentions():
    model = with_eager(build(LongNetForCausalLM))
    outputs = model(random_ids(1, 9), output_hidden_states=True, output_attentions=True)
    for x in (outputs.hidden_states[0], outputs.attentions[0]):
        x.retain_grad()
    outputs.logits.flatten()[-1].backward()
    assert outputs.hidden_states[0].grad is not None and outputs.attentions[0].grad is not None


@every_head
@every_kind
def test_no_parameter_is_unused(model_class, kind):
    model = build(model_class, kind)
    main_output(model(random_ids(1, 30))).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


# The fast path is the oracle


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


@every_head
def test_a_batch_equals_its_rows(model_class):
    model, ids = build(model_class, dtype=torch.float64), random_ids(3, 19)
    batch = main_output(model(ids))
    for row in range(3):
        alone = main_output(model(ids[row : row + 1]))
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=0, atol=1e-10)


def test_sequence_classification_reads_the_last_real_token():
    model, ids = build(LongNetForSequenceClassification, num_labels=3), random_ids(1, 13)
    alone = model(ids).logits
    for pad in ((4, 0), (0, 4)):
        padded = F.pad(torch.cat((ids, ids)), pad, value=0)
        logits = model(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(logits, alone.expand(2, -1))
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="padding token"):
        model(random_ids(2, 4))


@pytest.mark.parametrize(("model_class", "labels"), [
    (LongNetForSequenceClassification, dict(labels=torch.tensor([0, 1]))),
    (LongNetForTokenClassification, dict(labels=torch.randint(2, (2, 12)))),
    (LongNetForQuestionAnswering, dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 5]))),
])  # fmt: skip
def test_heads_have_losses(model_class, labels):
    loss = build(model_class)(random_ids(2, 12), **labels).loss
    loss.backward()
    assert loss.isfinite()


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


# Training


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    model, ids = build(LongNetForCausalLM, kind, attention_dropout=0.2).train(), random_ids(2, 30)
    torch.manual_seed(5)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert_same_gradients(all_gradients(model, model(ids, labels=ids).loss), expected, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@every_kind
def test_mlps_in_chunks_change_nothing(kind, checkpointing):
    model, ids = build(LongNetForCausalLM, kind).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    chunked = LongNetForCausalLM(LongNetConfig(**model.config.to_diff_dict() | {"chunk_size_feed_forward": 7})).train()
    chunked.load_state_dict(model.state_dict())
    if checkpointing is not None:
        chunked.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_same_gradients(all_gradients(chunked, chunked(ids, labels=ids).loss), expected, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked.eval()(ids).logits, model.eval()(ids).logits)


def test_attention_dropout_acts_in_training_only():
    model, ids = build(LongNetModel, attention_dropout=0.5), random_ids(1, 20)
    assert torch.equal(main_output(model(ids)), main_output(model(ids)))
    model.train()
    assert not torch.equal(main_output(model(ids)), main_output(model(ids)))


@pytest.mark.parametrize("kind", ["paper", "hybrid"])
def test_compiles_into_one_graph(kind):
    model, ids = build(LongNetForCausalLM, kind), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(30)[None]}):
        ours, theirs = (m(ids, labels=ids, use_cache=False, **inputs).loss for m in (compiled, model))
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(all_gradients(model, ours), all_gradients(model, theirs), atol=1e-5)


def test_layers_of_one_pattern_share_what_is_compiled():
    model, counter = build(LongNetModel), CompileCounter()
    for layer in model.layers:
        layer.compile(backend=counter, dynamic=False)
    model(random_ids(1, 20), use_cache=False)
    assert counter.frame_count == 1


def plain_loss(model, ids, labels):
    logits = model(ids).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("max_logits", [1, 97 * 7, 1 << 25])
@pytest.mark.parametrize("tied", [True, False])
def test_the_chunked_loss_is_the_plain_loss(max_logits, tied, monkeypatch):
    monkeypatch.setattr(modeling_longnet, "_MAX_LOGITS", max_logits)
    model, ids = build(LongNetForCausalLM, dtype=torch.float64, tie_word_embeddings=tied), random_ids(2, 23)
    labels = ids.clone()
    labels[0, :9] = -100
    seen = []
    model.lm_head.register_forward_hook(lambda *x: seen.append(x[2].shape[:-1].numel()))
    outputs = model(ids, labels=labels)
    assert outputs.logits is None and max(seen) <= max(1, max_logits // 97)
    expected = plain_loss(model, ids, labels)
    torch.testing.assert_close(outputs.loss, expected.float(), rtol=1e-6, atol=1e-6, check_dtype=False)
    assert_same_gradients(all_gradients(model, outputs.loss), all_gradients(model, expected), atol=1e-6)


def test_the_loss_takes_what_trainer_gives():
    model, ids = build(LongNetForCausalLM), random_ids(2, 23)
    mean = model(ids, labels=ids).loss
    total = 2 * 22
    for count in (11, torch.tensor(11)):
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=count).loss, mean * total / 11)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, mean)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, mean)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    ours = model(ids, labels=ids.where(ids > 40, 7), ignore_index=7).loss
    torch.testing.assert_close(ours, model(ids, labels=ids.where(ids > 40, -100)).loss)


def test_logits_beside_labels_on_request():
    model, ids = build(LongNetForCausalLM), random_ids(2, 23)
    logits = model(ids).logits
    assert model(ids, labels=ids).logits is None
    assert torch.equal(model(ids, labels=ids, skip_logits=False).logits, logits)
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=3).logits, logits[:, -3:])
    model.config.skip_logits = False
    assert torch.equal(model(ids, labels=ids).logits, logits)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])
    per_row = torch.tensor([[1, 5], [0, 22]])
    expected = torch.stack((logits[0, [1, 5]], logits[1, [0, 22]]))
    torch.testing.assert_close(model(ids, logits_to_keep=per_row).logits, expected)
    mask = torch.rand(2, 23) < 0.5
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, logits[mask])


def test_a_loss_function_of_the_users_own_is_honoured():
    model, ids = build(LongNetForCausalLM), random_ids(1, 8)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean() + vocab_size
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, outputs.logits.mean() + 97)
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()  # gets nothing that was not given
    torch.testing.assert_close(model(ids, labels=ids).loss, outputs.logits.mean())


def test_lora_on_the_head_gets_its_gradient_from_the_chunked_loss(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(modeling_longnet, "_MAX_LOGITS", 97 * 5)
    base = build(LongNetForCausalLM, tie_word_embeddings=False)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head", "v_proj"], init_lora_weights=False))
    ids = random_ids(2, 23)
    ours, expected = model(input_ids=ids, labels=ids).loss, plain_loss(model, ids, ids)
    torch.testing.assert_close(ours, expected)
    gradients = all_gradients(model, ours)
    assert any("lm_head.lora_A" in name for name in gradients)
    assert_same_gradients(gradients, all_gradients(model, expected), atol=1e-6)


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = build(LongNetForCausalLM), random_ids(2, 20)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    expected = trainer.label_smoother({"logits": model(ids).logits}, ids, shift_labels=True)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, expected)
    assert type(transformers.AutoModelForCausalLM.from_config(model.config)) is LongNetForCausalLM


@pytest.mark.parametrize("with_metrics", [False, True])
def test_trainer(with_metrics, tmp_path):
    pytest.importorskip("accelerate")
    model = build(LongNetForCausalLM)
    model.config.skip_logits = not with_metrics
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 20).tolist()]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=True,
    )
    metrics = (lambda p: {"shape": p.predictions.shape}) if with_metrics else None
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    result = trainer.evaluate()
    assert 0 < result["eval_loss"] < 20
    assert not with_metrics or result["eval_shape"] == (8, 20, 97)


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


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 9, 9), (2, 8), (1, 9)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` must be a 2-D padding mask of shape \(2, 9\)"):
        build(LongNetModel)(random_ids(2, 9), attention_mask=torch.ones(shape))


# Llama-family weights


SOURCES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(attention_bias=True, mlp_bias=True)),
    "smollm": (transformers.LlamaForCausalLM, transformers.LlamaConfig(tie_word_embeddings=True, head_dim=16)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(sliding_window=None)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config()),
}


def llama_family(name, num_key_value_heads=2):
    model_class, config = SOURCES[name]
    sizes = {name: value for name, value in SMALL.items() if name not in ("segment_lengths", "dilation_rates")}
    torch.manual_seed(0)
    changed = config.to_diff_dict() | sizes | {"num_key_value_heads": num_key_value_heads}
    changed.pop("layer_types", None)  # one per layer of the default size
    model = model_class(type(config)(**changed)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)  # norms and biases too, or nobody would miss them
    return model


@pytest.mark.parametrize("from_path", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_one_branch_that_covers_the_sequence_reproduces_the_source(name, from_path, tmp_path):
    source, ids = llama_family(name), random_ids(2, 50)
    source.generation_config.temperature = 0.7
    source.generation_config.do_sample = True
    source.save_pretrained(tmp_path)
    model = LongNetForCausalLM.from_llama(
        str(tmp_path) if from_path else source, segment_lengths=[64], dilation_rates=[1]
    ).eval()
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ours, theirs = (m(ids, attention_mask=mask).logits[mask == 1] for m in (model, source))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert model.generation_config.temperature == 0.7
    assert model.generation_config is not source.generation_config
    assert model.config.eos_token_id == 2 and type(model.config) is LongNetConfig
    with torch.no_grad():
        source.model.norm.weight.zero_()
    assert (model.model.norm.weight != 0).any()
    model.save_pretrained(tmp_path / "longnet")
    again = LongNetForCausalLM.from_pretrained(tmp_path / "longnet")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("offset", "types", "shared"),
    [("paper", None, 2), ("grouped", None, 4), ("paper", ["window", "segment", "window"], 2), ("grouped", None, 1)],
)
def test_longnet_is_llama_with_the_pattern_as_a_bias(offset, types, shared):
    """Transformers' own Llama, given log C as a 4-D mask, computes the same: values and gradients."""
    source = llama_family("llama", num_key_value_heads=shared).double()
    pattern = DilatedPattern([8, 16, 40], [1, 2, 3], types, offset)
    model = LongNetForCausalLM.from_llama(
        source, segment_lengths=[8, 16, 40], dilation_rates=[1, 2, 3], branch_types=types, head_offset=offset
    )
    source.model.rotary_emb = model.model.rotary_emb  # whose angles are those of float64
    ids, heads = random_ids(2, 59), model.config.num_attention_heads
    count = torch.tensor(
        [
            [[joined(pattern, n, m, head * shared // heads, shared) for m in range(59)] for n in range(59)]
            for head in range(heads)
        ]
    )
    bias = count.double().log().expand(2, -1, -1, -1)
    ours, theirs = model(ids).logits, source(ids, attention_mask=bias, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    weights = torch.randn_like(ours)
    assert_same_gradients(
        all_gradients(model, (ours * weights).sum()), all_gradients(source, (theirs * weights).sum()), atol=1e-8
    )


def test_from_llama_takes_fields_and_loading_options(tmp_path):
    llama_family("smollm").save_pretrained(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = LongNetForCausalLM.from_llama(
        tmp_path,
        segment_lengths=[8, 32],
        dilation_rates=[1, 2],
        segment_shift=True,
        rope_parameters=yarn,
        dtype=torch.bfloat16,
    )
    assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_type"] == "yarn"
    again = LongNetForCausalLM.from_llama(
        llama_family("llama"), segment_lengths=[8], dilation_rates=[1], torch_dtype=torch.float64
    )
    assert again.dtype == torch.float64
    assert [layer.self_attn.pattern.shift for layer in model.model.layers] == [False, True, False]


def test_from_llama_refuses_what_does_not_fit(tmp_path):
    pattern = dict(segment_lengths=[8], dilation_rates=[1])
    gemma = transformers.GemmaConfig()
    with pytest.raises(ValueError, match="'gemma'"):
        LongNetConfig.from_llama(gemma, **pattern)
    with pytest.raises(ValueError, match="sliding_window=4096"):
        LongNetConfig.from_llama(transformers.MistralConfig(sliding_window=4096), **pattern)
    windowed = transformers.Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=2)
    with pytest.raises(ValueError, match="sliding_window=64.*sliding_attention"):
        LongNetConfig.from_llama(windowed, **pattern)
    with pytest.raises(ValueError, match="`quantization_config`"):
        LongNetConfig.from_llama(transformers.LlamaConfig(quantization_config={"bits": 4}), **pattern)
    for source in (None, transformers.LlamaConfig()):
        with pytest.raises(ValueError, match="`model_or_path` must be a Transformers model.*" + type(source).__name__):
            LongNetForCausalLM.from_llama(source, **pattern)
    source = llama_family("llama")
    assert LongNetConfig.from_llama(source.config, **pattern).rope_parameters is not source.config.rope_parameters
    source.model.layers[0].mlp.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="extra"):
        LongNetForCausalLM.from_llama(source, **pattern)


# Large models: offloading and sharding


def test_layers_can_stay_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = build(LongNetForCausalLM, tie_word_embeddings=False), random_ids(1, 30)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    loaded = LongNetForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert loaded.model.layers[2].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    on_cpu = LongNetForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(on_cpu.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


def test_checkpointed_activations_can_be_offloaded():
    """With the hook that `activation_checkpointing_enable(offload=True)` uses, whose pinned memory wants a GPU."""
    model, ids = build(LongNetForCausalLM).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    with torch.autograd.graph.save_on_cpu():
        loss = model(ids, labels=ids).loss
    assert_same_gradients(all_gradients(model, loss), expected, atol=1e-6)


def fsdp_worker(rank, port, expected):
    """One of two processes: FSDP2 as Accelerate lays it out, layers one by one and the rest together."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    from torch.distributed.fsdp import fully_shard

    modeling_longnet._MAX_LOGITS = 97 * 5
    torch.set_num_threads(1)
    model, ids = build(LongNetForCausalLM, dtype=torch.float64).train(), expected.pop("ids")
    model.gradient_checkpointing_enable()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # every rank has a row of its own; gradients are averaged over ranks, so each loss is divided by its own labels
    loss = model(ids[rank : rank + 1], labels=ids[rank : rank + 1], num_items_in_batch=22).loss
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad.full_tensor(), expected[name], rtol=0, atol=1e-6, msg=name)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is checked; the threads of gloo now and then abort an orderly end of the interpreter


def test_the_chunked_loss_is_exact_under_fsdp2():
    model, ids = build(LongNetForCausalLM, dtype=torch.float64).train(), random_ids(2, 23)
    expected = all_gradients(model, model(ids, labels=ids).loss) | {"ids": ids}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(fsdp_worker, (port, expected), nprocs=2)


def test_the_model_card_is_that_of_the_model(tmp_path):
    build(LongNetForSequenceClassification, is_causal=False).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "import AutoModelForSequenceClassification" in card
    assert "40 tokens" in card and "further apart than the longest segment" in card and "CausalLM" not in card
