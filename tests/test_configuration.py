"""A configuration is saved and loaded, and a wrong one is named."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import SMALL, build, every_kind, small_config
from torch import nn
from transformers import AutoConfig

from longnet_hf import (
    LongNetConfig,
    LongNetForCausalLM,
)


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


def test_heads_survive_json():
    """Whose keys are text; in any order, without layers that have none."""
    config = small_config("llama", full_attention_heads={"2": [1, 0], 0: [1], 1: []}, sink_tokens=3)
    assert config.full_attention_heads == {0: [1], 2: [0, 1]}
    again = LongNetConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert again.full_attention_heads == config.full_attention_heads
    assert again.layer_patterns == config.layer_patterns
    full, windows, all_full = config.layer_patterns
    assert full.branch_types == ("segment", "segment", "segment", "sink", "window")
    assert full.branch_heads == ((0,), (0,), (0,), (0,), (1,))
    assert windows.branch_heads is None and windows.segment_lengths[-1] == 3
    assert all_full.segment_lengths == (None,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(segment_lengths=[8, 16]), "`segment_lengths`, `dilation_rates` and `branch_types`.*got 2, 3"),
        (dict(dilation_rates=[1, 2, 0]), "`dilation_rates`.*0"),
        (dict(branch_types=["segment", "segment", "banded"]), "`branch_types`.*'banded'"),
        (dict(head_offset="torchscale"), "`head_offset`.*'torchscale'"),
        (dict(full_attention_layers=[3]), r"`full_attention_layers`.*\[3\]"),
        (dict(full_attention_heads={3: [0]}), "`full_attention_heads` must name layers from 0 to 2, got 3"),
        (dict(full_attention_heads={"a": [0]}), "`full_attention_heads` must name layers from 0 to 2, got 'a'"),
        (
            dict(full_attention_heads={1: [0], "1": [1]}),
            "`full_attention_heads` must name a layer once, got layer 1 twice",
        ),
        (
            dict(full_attention_heads={1: [0, 4]}),
            r"`full_attention_heads` must list .* 0 to 3, got \[0, 4\] for layer 1",
        ),
        (dict(full_attention_heads={1: 2}), "`full_attention_heads` must list .*got 2 for layer 1"),
        (dict(full_attention_heads={1: [True]}), r"`full_attention_heads` must list .*got \[True\]"),
        (dict(full_attention_heads={1: [0]}, full_attention_layers=[1]), r"both have the layers \[1\]"),
        (dict(sink_tokens=-1), "`sink_tokens` must be an integer of at least 0, got -1"),
        (dict(sink_tokens=2, branch_types=["segment", "sink", "segment"], dilation_rates=[1, 1, 1]), "one 'sink'"),
        (dict(num_key_value_heads=3), "`num_key_value_heads`"),
        (dict(hidden_size=30), "`hidden_size` .30."),
        (dict(head_dim=7), "`head_dim`.*7"),
        (dict(hidden_act="nonsense"), "`hidden_act` must be one of .*'gelu'.*'nonsense'"),
        (dict(norm_type="batch_norm"), "`norm_type`.*'batch_norm'"),
        (dict(num_attention_heads=0), "`num_attention_heads` must be at least 1, got 0"),
        (dict(hidden_size=0, num_attention_heads=4), "`hidden_size` must be at least 1, got 0"),
        (dict(pad_token_id=10**6), "`pad_token_id` must lie below `vocab_size`.*1000000"),
        (dict(chunk_size_feed_forward=-1), "`chunk_size_feed_forward` must be an integer of at least 0, got -1"),
        (dict(use_sliding_window=True), "does not read `use_sliding_window`"),
        (dict(attention_dropout=1.5), "`attention_dropout`.*1.5"),
        (dict(embedding_dropout=1.0), "`embedding_dropout`.*1.0"),
        (dict(hidden_dropout=-0.1), "`hidden_dropout`.*-0.1"),
        (dict(drop_path_rate=1.0), "`drop_path_rate`.*1.0"),
        (dict(vocab_size=-1), "`vocab_size` must be an integer of at least 0, got -1"),
        (dict(segment_padding="ones", is_causal=False), "`segment_padding` must be one of .*'ones'"),
        (dict(segment_padding="zeros"), "`segment_padding=.*causal"),
        (dict(segment_padding="zeros", is_causal=False, segment_shift=True), "`segment_padding=.*shift"),
        (dict(segment_padding="zeros", is_causal=False, full_attention_layers=[1]), "`segment_padding=.*window"),
        (dict(sliding_window=128), "`sliding_window`.*128"),
        (dict(segment_length=[8]), r"does not read `segment_length` \(got \[8\]\): give `segment_lengths`"),
        (dict(dilated_ratio=[1]), "does not read `dilated_ratio`.*give `dilation_rates`"),
        (dict(rms_norm_eps=1e-6), "does not read `rms_norm_eps`.*give `norm_eps`"),
        (dict(hidden_dropout_prob=0.5), "does not read `hidden_dropout_prob`.*give `hidden_dropout`"),
        (dict(layer_types=["full_attention"] * 3), "`layer_types`"),
        (dict(num_hidden_layers=0), "`num_hidden_layers` must be at least 1, got 0"),
        (dict(num_hidden_layers=-1), "`num_hidden_layers` must be at least 1, got -1"),
        (dict(head_dim=0), "`head_dim` must be at least 1, got 0"),
        (dict(max_position_embeddings=0), "`max_position_embeddings` must be at least 1, got 0"),
        (dict(num_labels=0), "`num_labels` must be at least 1, got 0"),
        (dict(norm_eps=-1.0), "`norm_eps` must be a number above 0.*got -1.0"),
        (dict(norm_eps=math.nan), "`norm_eps` must be a number above 0.*got nan"),
        (dict(norm_eps=math.inf), "`norm_eps` must be .*finite, got inf"),
        (dict(initializer_range=math.nan), "`initializer_range` must be .*got nan"),
        (dict(initializer_range=-0.1), "`initializer_range` must be .*at least 0.*got -0.1"),
        (dict(classifier_dropout=2.0), "`classifier_dropout` must be .*below 1.*got 2.0"),
        (dict(chunk_size_feed_forward="3"), "`chunk_size_feed_forward` must be an integer of at least 0, got '3'"),
        (dict(chunk_size_feed_forward=1.5), "`chunk_size_feed_forward` must be an integer of at least 0, got 1.5"),
        (dict(bos_token_id=97), "`bos_token_id` must lie from 0 to below `vocab_size` .97., got 97"),
        (dict(eos_token_id=[2, 97]), r"`eos_token_id` must lie .*got \[2, 97\]"),
        (dict(eos_token_id=-1), "`eos_token_id` must lie .*got -1"),
        (dict(problem_type="clustering"), "`problem_type` must be one of .*'clustering'"),
        (dict(segment_lengths=[8, 16, 10**30]), "`segment_lengths` must be at most.*got 10{30} and 3.*'window'"),
        (dict(dilation_rates=[1, 2, 2**30 + 1]), "at most .* and `dilation_rates` 1073741824, got .* and 1073741825"),
        (dict(sink_tokens=10**30), "at most.*10{30}"),
        (dict(rope_theta=0), "`rope_theta` must be a number above 0.*got 0"),
        (dict(rope_parameters={"rope_theta": "x"}), "`rope_theta` must be a number above 0.*'x'"),
        (dict(rope_parameters={"rope_theta": math.nan}), "`rope_theta` must be .*nan"),
        (dict(rope_parameters={"rope_type": "nope"}), "`rope_type` must be one of .*'default', .*'nope'"),
        (dict(rope_scaling={"type": "nope", "factor": 2.0}), "`rope_type` must be one of .*'nope'"),
        (dict(rope_parameters={"rope_type": "linear"}), "`rope_parameters` lacks something: .*factor"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 0}), "`factor` must be .*at least 1.*got 0"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "`partial_rotary_factor` must be 1.*0.5"),
        (dict(segment_lengths="8"), "segment_lengths"),
        (dict(hidden_size="32"), "hidden_size"),
    ],
)
def test_wrong_configurations_are_named(change, named):
    with pytest.raises((ValueError, StrictDataclassError), match=named):
        LongNetConfig(**(SMALL | change))


def test_configurations_changed_while_loading_are_checked(tmp_path):
    build(LongNetForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="`segment_lengths`, `dilation_rates`"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 16])
    model = LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 16], dilation_rates=[1, 2])
    assert model.model.layers[0].self_attn.pattern.segment_lengths == (8, 16)
