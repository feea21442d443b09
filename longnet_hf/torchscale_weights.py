"""Checkpoints of torchscale's LongNet and of the models built on it: read, checked, and brought into LongNet's terms.

GigaPath's slide encoder and LongViT are torchscale encoders between layers of their own. What this package does not
compute is refused by name.
"""

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping

import torch


# By what a weight is called in torchscale
_LAYER_NAMES = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn.inner_attn_ln": "self_attn.attn_sub_norm",
    "self_attn_layer_norm": "input_layernorm",
    "final_layer_norm": "post_attention_layernorm",
    "ffn.fc1": "mlp.up_proj",
    "ffn.fc2": "mlp.down_proj",
    "ffn.ffn_layernorm": "mlp.ffn_sub_norm",
}
_NAMES = {"layer_norm": "norm", "embed_tokens": "embed_tokens", "output_projection": "lm_head"}
_LAYER = re.compile(r"(layers\.\d+)\.(.+)\.(weight|bias)")

# Part of a weight's name -> what it belongs to
_UNSUPPORTED_WEIGHTS = {
    "encoder_attn": "cross-attention",
    "moe_layer": "a mixture of experts",
    ".A.": "a multiway network",
    "relative_position": "relative positions",
    "embed_positions": "learned positions",
    "layernorm_embedding": "a norm of the embeddings",
    "gate": "a gated MLP",
}
# Option -> the only value that is supported
_UNSUPPORTED_OPTIONS = {
    "normalize_before": True,
    "activation_dropout": 0.0,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "use_xmoe": False,
    "rel_pos_buckets": 0,
    "max_rel_pos": 0,
    "deepnorm": False,
    "multiway": False,
    "use_glu": False,
}
# Options of text and images outside, of initialisation, and of how it is run: none changes what weights compute.
_OPTIONS_WITHOUT_EFFECT = {
    *("moe_top1_expert", "moe_expert_count", "moe_gating_use_fp32", "moe_eval_capacity_token_fraction"),
    *("moe_second_expert_policy", "moe_normalize_gate_prob_before_dropping", "bert_init", "no_output_layer"),
    *("vocab_size", "max_source_positions", "max_target_positions", "img_size", "patch_size", "in_chans"),
    *("checkpoint_activations", "fsdp", "ddp_rank", "flash_attention", "seq_parallel", "block_shift"),
    *("xpos_scale_base", "share_input_output_embed", "share_all_embeddings"),
}
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}


def read_checkpoint(checkpoint: str | os.PathLike | Mapping) -> dict[str, torch.Tensor]:
    """The weights in a file of `torch.save`, by name, without running any code of it; or in a state dict.

    Raises:
        ValueError: if it holds anything but weights.
    """
    where = "the checkpoint"
    if not isinstance(checkpoint, Mapping):
        where = os.fspath(checkpoint)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # settings, which some files hold beside
                checkpoint = torch.load(where, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{where} is no checkpoint of weights alone, and what else it holds is not loaded since that could "
                "run code. Where you trust it, save its state dict by itself with `torch.save` and give that file."
            ) from error
    for key in ("model", "teacher", "module", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not checkpoint or not all(map(torch.is_tensor, checkpoint.values())):
        raise ValueError(f"No weights by name were found in {where}, nor under 'model', 'teacher' or 'state_dict'.")
    return {name: x.detach().clone() for name, x in checkpoint.items()}  # the caller's stay the caller's


def weights_under(weights: Mapping[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    """The weights whose names begin with the first of `prefixes` that any has, without it; all, if none has one."""
    for prefix in prefixes:
        found = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(weights)


def rename_encoder(weights: Mapping[str, torch.Tensor], num_heads: int) -> dict[str, torch.Tensor]:
    """The weights of torchscale's encoder or decoder as LongNet names and orders them.

    Raises:
        ValueError: if a weight is none of an encoder or decoder that LongNet computes.
    """
    renamed, unknown, scales = {}, [], {}
    for name, x in weights.items():
        match = _LAYER.fullmatch(name)
        stem, _, kind = name.rpartition(".")
        if match and match[2] in _LAYER_NAMES:
            renamed[f"{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"] = x
        elif stem in _NAMES and kind in ("weight", "bias"):
            renamed[f"{_NAMES[stem]}.{kind}"] = x
        elif name.endswith(".self_attn.xpos.scale"):
            scales[name.removesuffix("xpos.scale")] = x
        elif not name.endswith("version"):  # an empty mark of fairseq's
            unknown.append(name)
    if unknown:
        raise ValueError(_complaint(unknown))
    for stem, scale in scales.items():
        if not bool((scale == 1).all()):
            raise ValueError(
                f"`xpos_rel_pos` with a scale other than 1 is not supported ({stem}xpos.scale goes from "
                f"{scale.min():.3g} to {scale.max():.3g}): its powers by position are not finite from some 8 000 "
                "tokens on in fp16, and from some 73 000 in bf16 and float32."
            )
        for projection in ("q_proj", "k_proj"):
            for kind in ("weight", "bias"):
                renamed[f"{stem}{projection}.{kind}"] = _halves(renamed[f"{stem}{projection}.{kind}"], num_heads)
    return renamed


def _halves(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a head's rotary pairs from interleaved (0, 1), (2, 3), … to halves (0, D / 2), (1, D / 2 + 1), …"""
    return x.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _complaint(names: list[str]) -> str:
    reasons = sorted({reason for part, reason in _UNSUPPORTED_WEIGHTS.items() if any(part in name for name in names)})
    because = f", which belong to {', '.join(reasons)}" if reasons else ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"The checkpoint has weights that LongNet does not compute{because}: {shown}."


def config_fields(args, weights: Mapping[str, torch.Tensor]) -> dict:
    """Fields of [`LongNetConfig`] from torchscale's `EncoderConfig` or `DecoderConfig`, or the arguments of one.

    Args:
        args: a mapping, or an object with these attributes. What is missing has torchscale's default.
        weights: those of the encoder or decoder, as torchscale names them.

    Raises:
        ValueError: if an option is not supported, or unknown.
    """
    options = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    sides = {side for side in ("encoder", "decoder") if f"{side}_embed_dim" in options or f"{side}_layers" in options}
    if len(sides) != 1:
        raise ValueError(
            "`args` must be torchscale's options of an encoder or of a decoder (`encoder_embed_dim` or "
            f"`decoder_embed_dim`, …), got {sorted(options)}."
        )
    side = sides.pop()
    options = {name.replace(f"{side}_", "", 1): value for name, value in options.items()}
    for name in list(options):
        if name in _UNSUPPORTED_OPTIONS and options[name] != _UNSUPPORTED_OPTIONS[name]:
            raise ValueError(
                f"`{name}={options[name]!r}` of torchscale is not supported, only {_UNSUPPORTED_OPTIONS[name]!r}."
            )
        if name in _UNSUPPORTED_OPTIONS or name in _OPTIONS_WITHOUT_EFFECT:
            del options[name]
    take = options.pop
    activation = take("activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation_fn` must be one of {sorted(_ACTIVATIONS)}, got {activation!r}.")
    dropout, is_causal = take("dropout", 0.0), side == "decoder"
    has_scale = any(name.endswith(".xpos.scale") for name in weights)
    use_rope = take("xpos_rel_pos", has_scale)
    if use_rope != has_scale:
        have = "have" if has_scale else "lack"
        raise ValueError(f"`xpos_rel_pos={use_rope!r}` does not fit the weights, which {have} `xpos.scale`.")
    embeddings, projection = (weights.get(f"{name}.weight") for name in ("embed_tokens", "output_projection"))
    fields = {
        "is_causal": is_causal,
        "segment_padding": "none" if is_causal else "zeros",
        "head_offset": "grouped",
        "segment_lengths": _numbers("segment_length", take("segment_length", None)),
        "dilation_rates": _numbers("dilated_ratio", take("dilated_ratio", None)),
        "hidden_size": take("embed_dim", 768),
        "intermediate_size": take("ffn_embed_dim", 3072),
        "num_hidden_layers": take("layers", 12),
        "num_attention_heads": take("attention_heads", 12),
        "hidden_act": _ACTIVATIONS[activation],
        "norm_eps": take("layernorm_eps", 1e-5),
        "use_sub_norm": take("subln", True),
        "use_final_norm": take("normalize_output", True),
        "scale_embedding": not take("no_scale_embedding", True),
        "attention_dropout": take("attention_dropout", 0.0),
        "embedding_dropout": dropout,
        "hidden_dropout": dropout,
        "drop_path_rate": take("drop_path_rate", 0.0),
        "use_rope": use_rope,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": 0 if embeddings is None else len(embeddings),
        "tie_word_embeddings": embeddings is not None
        and projection is not None
        and torch.equal(embeddings, projection),
    }
    if options:
        raise ValueError(f"Options of torchscale that are not known here: {sorted(options)}.")
    warn_of_rates(fields["segment_lengths"], fields["dilation_rates"])
    return fields


def _numbers(name: str, value) -> list[int]:
    """A list of integers, which torchscale writes as a string."""
    try:
        value = json.loads(value) if isinstance(value, str) else list(value)
    except (json.JSONDecodeError, TypeError):
        value = None
    if not value or not all(isinstance(number, int) for number in value):
        raise ValueError(f"`{name}` must be a list of integers, or one written out as '[1, 2]', got {value!r}.")
    return value


def warn_of_rates(segment_lengths: list[int], dilation_rates: list[int]) -> None:
    """Tell where torchscale itself goes wrong, so that its outputs cannot be matched."""
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        if length % rate:
            warnings.warn(
                f"The dilation rate {rate} does not divide the segment length {length}. For sequences longer than "
                f"{length} torchscale then puts outputs into wrong rows from {length} on; LongNet computes the rows "
                "that were meant, and so differs from it there.",
                stacklevel=3,
            )


def gigapath_segment_lengths(max_wsi_size: int, tile_size: int) -> list[int]:
    """Segment lengths of GigaPath's slide encoder for slides of up to `max_wsi_size` pixels a side."""
    longest = (max_wsi_size // tile_size) ** 2
    if longest < 1024:
        raise ValueError(f"`max_wsi_size` must be at least {32 * tile_size} (32 tiles), got {max_wsi_size}.")
    steps = (longest.bit_length() - 1 - 10) / 4
    return [int(2 ** (10 + steps * i)) for i in range(5)]


# By the side of the images in pixels
LONGVIT_SEGMENT_LENGTHS = {
    1024: [64, 128, 256, 512, 1024],
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}
