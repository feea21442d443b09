"""torchscale's LongNet encoder and decoder, GigaPath's slide encoder and LongViT, written out from their definitions:
random weights under their names, and what they compute. Rows are gathered, padded, attended to and scattered."""

import math
import re

import torch
import torch.nn.functional as F
from test_dilated_operator import mixture_over_padded_segments

from longnet_hf import DilatedPattern, dilated_attention_reference


LENGTHS, RATES = [8, 16, 32], [1, 2, 4]
SIZE, INNER, LAYERS, HEADS = 32, 48, 3, 4


def random_layers(prefix="", size=SIZE, inner=INNER, layers=LAYERS) -> dict[str, torch.Tensor]:
    """Weights of a stack of layers and its last norm, in float64."""
    weights = {}

    def add(name, *shape):
        weights[f"{prefix}{name}.weight"] = torch.randn(shape, dtype=torch.float64) * 0.3 + (len(shape) == 1)
        weights[f"{prefix}{name}.bias"] = torch.randn(shape[0], dtype=torch.float64) * 0.1

    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"layers.{i}.self_attn.{name}", size, size)
        for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
            add(f"layers.{i}.{name}", size)
        add(f"layers.{i}.ffn.fc1", inner, size)
        add(f"layers.{i}.ffn.fc2", size, inner)
        add(f"layers.{i}.ffn.ffn_layernorm", inner)
    add("layer_norm", size)
    return weights


def rotate_pairs(x):
    """Rotary positions over interleaved pairs, for `[H, N, D]`."""
    length, size = x.shape[1:]
    frequency = 1 / 10000 ** (torch.arange(0, size, 2) / size)  # in float32, as in all implementations
    angle = torch.arange(length)[:, None] * frequency.double()
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(pairs, dim=-1).flatten(-2)


def run_layers(weights, x, *, causal=False, rotary=False, activation=F.gelu, pattern=None) -> list[torch.Tensor]:
    """The states `[N, D]` of one sequence before the first layer, and after each; the last norm is left to others."""
    pattern = pattern or DilatedPattern(LENGTHS, RATES, head_offset="grouped")

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    states = [x]
    for i in range(1 + max(int(n) for name in weights for n in re.findall(r"^layers\.(\d+)\.", name))):
        layer = f"layers.{i}."
        y = norm(f"{layer}self_attn_layer_norm", x)
        query, key, value = (
            linear(f"{layer}self_attn.{name}_proj", y).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in "qkv"
        )
        if rotary:
            query, key = rotate_pairs(query), rotate_pairs(key)
        if causal:  # where zeros at the end change nothing
            y = dilated_attention_reference(query[None], key[None], value[None], pattern)[0]
        else:
            y = mixture_over_padded_segments(query, key, value, pattern)
        y = norm(f"{layer}self_attn.inner_attn_ln", y.transpose(0, 1).flatten(1))
        x = x + linear(f"{layer}self_attn.out_proj", y)
        y = activation(linear(f"{layer}ffn.fc1", norm(f"{layer}final_layer_norm", x)))
        x = x + linear(f"{layer}ffn.fc2", norm(f"{layer}ffn.ffn_layernorm", y))
        states.append(x)
    return states


def last_norm(weights, x, name="layer_norm", eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def random_gigapath(features=12) -> dict[str, torch.Tensor]:
    weights = random_layers("encoder.")
    for name, shape in (("patch_embed.proj", (SIZE, features)), ("norm", (SIZE,))):
        weights[f"{name}.weight"] = torch.randn(shape, dtype=torch.float64)
        weights[f"{name}.bias"] = torch.randn(SIZE, dtype=torch.float64)
    return weights | {"cls_token": torch.randn(1, 1, SIZE, dtype=torch.float64)}


def run_gigapath(weights, features, coords, pooling, pattern) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pooled state after the embeddings and every layer, and the slide's one output, for one slide `[N, …]`."""
    x = F.linear(features, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"])
    quarter = SIZE // 4
    for row, (px, py) in enumerate(coords.tolist()):
        for half, cell in enumerate((py // 256, px // 256)):
            for i in range(quarter):
                angle = cell / 10000 ** (i / quarter)
                x[row, half * 2 * quarter + i] += math.sin(angle)
                x[row, half * 2 * quarter + quarter + i] += math.cos(angle)
    encoder = {name.removeprefix("encoder."): x for name, x in weights.items()}
    states = run_layers(encoder, torch.cat((weights["cls_token"][0], x)), pattern=pattern)

    def pool(x):
        return last_norm(weights, x[0] if pooling == "cls" else x[1:].mean(0), "norm", 1e-6)

    return [pool(x) for x in states], pool(last_norm(encoder, states[-1]))


def random_longvit(side=4, patch=8) -> dict[str, torch.Tensor]:
    weights = {f"module.backbone.{name}": x for name, x in random_layers("encoder.").items()}
    weights = {name: x for name, x in weights.items() if "encoder.layer_norm" not in name}
    own = {"patch_embed.proj.weight": (SIZE, 3, patch, patch), "patch_embed.proj.bias": (SIZE,), "norm.bias": (SIZE,)}
    for name, shape in (own | {"pos_embed": (1, side**2, SIZE), "norm.weight": (SIZE,)}).items():
        weights[f"module.backbone.{name}"] = torch.randn(shape, dtype=torch.float64)
    return weights | {"module.head.last_layer.weight_v": torch.randn(3, 3)}


def run_longvit(weights, image, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches' states `[N, D]` and their mean, for one image `[3, height, width]`."""
    weights = {name.removeprefix("module.backbone."): x for name, x in weights.items()}
    kernel, table = weights["patch_embed.proj.weight"], weights["pos_embed"]
    side = math.isqrt(table.shape[1])
    x = F.conv2d(image[None], kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
    if x.shape[2:] != (side, side):
        factors = [(length + 0.1) / side for length in x.shape[2:]]
        table = F.interpolate(table.view(1, side, side, -1).permute(0, 3, 1, 2), scale_factor=factors, mode="bicubic")
        table = table.permute(0, 2, 3, 1).flatten(1, 2)
    x = x[0].flatten(1).T + table[0]
    encoder = {name.removeprefix("encoder."): x for name, x in weights.items()}
    x = last_norm(weights, run_layers(encoder, x, pattern=pattern)[-1], "norm", 1e-6)
    return x, x.mean(0)
