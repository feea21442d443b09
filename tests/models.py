"""Tiny LongNets for the tests: one configuration of every kind."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from longnet_hf import LongNetConfig, LongNetForMaskedLM
from longnet_hf.modeling_longnet import AUTO_CLASSES


SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    segment_lengths=[8, 16, 40],
    dilation_rates=[1, 2, 3],
)
LLAMA_STYLE = dict(
    norm_type="rms_norm",
    use_gated_mlp=True,
    hidden_act="silu",
    use_sub_norm=False,
    scale_embedding=False,
    attention_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    num_key_value_heads=2,
)
KINDS = {
    "paper": {},
    "llama": LLAMA_STYLE | {"head_offset": "rotating"},
    "windows": {"branch_types": ["window", "window", "segment"], "tie_word_embeddings": False},
    "hybrid": LLAMA_STYLE
    | {"segment_shift": True, "head_offset": "rotating", "full_attention_layers": [1], "use_sub_norm": True},
    "heads": LLAMA_STYLE
    | {
        "segment_lengths": [8],
        "dilation_rates": [1],
        "branch_types": ["window"],
        "sink_tokens": 2,
        "full_attention_heads": {0: [1], 2: [0, 1]},
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_head = pytest.mark.parametrize("model_class", list(AUTO_CLASSES.values()))


def small_config(kind: str = "paper", **changes) -> LongNetConfig:
    return LongNetConfig(**(SMALL | KINDS[kind] | changes))


def build(model_class, kind: str = "paper", dtype=torch.float32, **changes):
    """A model in evaluation mode, with weights large enough that attention matters."""
    torch.manual_seed(0)
    if model_class is LongNetForMaskedLM:
        changes.setdefault("is_causal", False)
    model = model_class(small_config(kind, initializer_range=0.2, **changes))
    return model.to(dtype).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], shape)


def word_tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
