"""Weights of the Llama family become those of a LongNet."""

import copy
import logging
import math
import random

import pytest
import torch
import transformers
from comparisons import all_gradients, assert_same_gradients
from models import SMALL, random_ids, word_tokenizer
from patterns import joined
from torch import nn

from longnet_hf import (
    DilatedPattern,
    LongNetConfig,
    LongNetForCausalLM,
    set_dilated_attention,
)


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


@pytest.mark.parametrize("has_zeros", [True, False])
def test_an_embedding_of_zeros_is_told_of(has_zeros, monkeypatch, caplog):
    """As Transformers' models begin with for padding, and keep out of training."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = llama_family("llama")
    source.config.pad_token_id = 0
    source.model.embed_tokens.weight.data[0] = 0.0 if has_zeros else 1.0
    LongNetForCausalLM.from_llama(source, segment_lengths=[64], dilation_rates=[1])
    assert ("The embedding of token 0" in caplog.text) == has_zeros


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
        chunk_size_feed_forward=4,
        rope_parameters=yarn,
        dtype=torch.bfloat16,
    )
    assert model.config.chunk_size_feed_forward == 4
    assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_type"] == "yarn"
    again = LongNetForCausalLM.from_llama(
        llama_family("llama"), segment_lengths=[8], dilation_rates=[1], torch_dtype=torch.float64
    )
    assert again.dtype == torch.float64
    assert [layer.self_attn.pattern.shift for layer in model.model.layers] == [False, True, False]


def test_no_name_of_the_source_is_left(tmp_path):
    """Whoever reads it again (TRL for a reference model, PEFT for an adapter's base) would get the dense source."""
    llama_family("smollm").save_pretrained(tmp_path / "dense")
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    for source in (tmp_path / "dense", str(tmp_path / "dense"), dense):
        model = LongNetForCausalLM.from_llama(source, segment_lengths=[8], dilation_rates=[1])
        assert model.config._name_or_path == "" and not model.name_or_path and not model.model.name_or_path
        assert str(tmp_path) not in str(vars(model.config)) + str(vars(model.generation_config))
        model.save_pretrained(tmp_path / "longnet")
        assert str(tmp_path) not in (tmp_path / "longnet" / "config.json").read_text()
        again = LongNetForCausalLM.from_pretrained(tmp_path / "longnet")
        assert again.config._name_or_path == again.name_or_path == str(tmp_path / "longnet")


def test_a_reference_model_of_dpo_is_dilated_too(tmp_path):
    """Its first loss is ln 2 if, and only if, the reference computes what the model does."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    llama_family("smollm").save_pretrained(tmp_path / "dense")
    model = LongNetForCausalLM.from_llama(tmp_path / "dense", segment_lengths=[8], dilation_rates=[1])
    words = [f"word{i}" for i in range(3, 97)]
    rows = [
        {name: " ".join(random.choices(words, k=30)) for name in ("prompt", "chosen", "rejected")} for _ in range(4)
    ]

    def first_loss(model, reference=None):
        arguments = trl.DPOConfig(
            tmp_path / "run", max_steps=1, use_cpu=True, report_to="none", bf16=False, disable_tqdm=True,
            save_strategy="no", logging_steps=1, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model, reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=word_tokenizer(),
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    with pytest.raises(OSError, match="''"):  # no reference is better than the dense one
        first_loss(model)
    assert first_loss(model, copy.deepcopy(model)) == pytest.approx(math.log(2), abs=1e-4)
    model.save_pretrained(tmp_path / "longnet")
    model = LongNetForCausalLM.from_pretrained(tmp_path / "longnet")
    assert first_loss(model) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("convert", [LongNetForCausalLM.from_llama, set_dilated_attention])
def test_trained_weights_without_a_sink_are_warned_of(convert, tmp_path, monkeypatch, caplog):
    """Where every head sees all of a text, or the weights are random, there is nothing to lose."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    llama_family("llama").save_pretrained(tmp_path)

    def says(trained, *lengths, **options):
        transformers.utils.logging.warning_once.cache_clear()
        caplog.clear()
        source = transformers.LlamaForCausalLM.from_pretrained(tmp_path) if trained else llama_family("llama")
        convert(source, segment_lengths=list(lengths), dilation_rates=[1] * len(lengths), **options)
        return "head 0 has neither full attention nor a sink" in caplog.text

    window = dict(branch_types=["window"])
    assert says(True, 8, **window) and says(True, 8, 16) and says(True, 8, full_attention_layers=[0])
    assert not says(False, 8, **window) and not says(True, 8, **window, sink_tokens=4) and not says(True, 8, 64)


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
    for call in (LongNetConfig.from_llama, LongNetForCausalLM.from_llama):  # a pattern is never taken unasked
        with pytest.raises(TypeError, match="segment_lengths"):
            call(source.config, dilation_rates=[1])
        with pytest.raises(TypeError, match="dilation_rates"):
            call(source.config, segment_lengths=[8])
    assert LongNetConfig.from_llama(source.config, **pattern).rope_parameters is not source.config.rope_parameters
    source.model.layers[0].mlp.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="extra"):
        LongNetForCausalLM.from_llama(source, **pattern)
