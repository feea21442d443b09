"""What a layer does between its matrix products: in few passes over memory on a GPU, in plain PyTorch elsewhere."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from .dilated_tiles import adjacent_rows
from .kernel_launch import runs_in_triton
from .operators import Operator


try:
    from .pointwise_kernels import MAX_WIDTH, activate_rows, activation_gradients, rotate_rows
except ImportError:  # PyTorch without Triton: there are no GPUs to run it on
    MAX_WIDTH = 0


def uses_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels compute this."""
    return MAX_WIDTH > 0 and runs_in_triton(x)


class RMSNorm(LlamaRMSNorm):
    """Llama's, in one kernel each way. In float64 it is Llama's itself, which goes through float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


_ACTIVATIONS = {type(ACT2FN[name]): name for name in ("gelu", "silu", "relu")} | {nn.SiLU: "silu"}
_NORMS = {nn.Identity: "none", nn.LayerNorm: "layer", RMSNorm: "rms"}
_PLAIN = {nn.Linear, *_ACTIVATIONS, *_NORMS}


def is_plain(module: nn.Module) -> bool:
    """Whether a module is PyTorch's or Transformers' own and does what its class says, with the weights that lie in
    it: nothing wraps it (LoRA), hooks into it or patches it (`device_map`, ZeRO, Liger), and no weight is sharded
    (DTensor), quantized or absent."""
    return (
        type(module) in _PLAIN
        and "forward" not in vars(module)
        and not any((module._forward_pre_hooks, module._forward_hooks))
        and not any((module._backward_pre_hooks, module._backward_hooks))
        and all(
            type(x) in (nn.Parameter, torch.Tensor) and x.numel() > 0
            for x in module._parameters.values()
            if x is not None
        )
    )


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions: query `[B, H, N, D]` and key `[B, Hkv, N, D]` turned by `cos` and `sin` `[B or 1, N, D]`."""
    if uses_triton(query) and query.dtype == key.dtype == cos.dtype and not cos.requires_grad:
        return _rotate_op(query, key, cos, sin, False)
    return apply_rotary_pos_emb(query, key, cos, sin)


def activate(
    activation: nn.Module, norm: nn.Module, up: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """`norm(activation(up))` or, gated, `norm(activation(gate) * up)`, of `[..., W]`."""
    if (
        uses_triton(up)
        and up.shape[-1] <= MAX_WIDTH
        and type(activation) in _ACTIVATIONS
        and type(norm) in _NORMS
        and is_plain(activation)
        and is_plain(norm)
    ):
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        name, kind = _ACTIVATIONS[type(activation)], _NORMS[type(norm)]
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
        rows = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (up, gate))
        return _activate_op(*rows, weight, bias, name, kind, eps)[0].view(up.shape)
    return norm(activation(up) if gate is None else activation(gate) * up)


def _fake_rotate(query, key, cos, sin, inverse):
    return torch.empty_like(query), torch.empty_like(key)


def _save_for_rotating_back(ctx, inputs, output):
    _, _, *cos_and_sin, ctx.inverse = inputs
    ctx.save_for_backward(*cos_and_sin)


def _rotate_back(ctx, grad_query, grad_key):
    return *_rotate_op(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _fake_activate(up, gate, weight, bias, activation, norm, eps):
    stats = up.new_empty(len(up) if norm != "none" else 0, 2, dtype=torch.float32)
    return torch.empty_like(up, memory_format=torch.contiguous_format), stats


def _save_for_activation_gradients(ctx, inputs, output):
    *tensors, ctx.activation, ctx.norm, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _activation_backward(ctx, grad, _):
    tensors = ctx.saved_tensors
    grads = _activation_gradients_op(adjacent_rows(grad), *tensors, ctx.activation, ctx.norm)
    there = (None if x is None else x_grad for x, x_grad in zip(tensors, grads, strict=False))
    return *there, None, None, None


def _fake_activation_gradients(grad, up, gate, weight, bias, stats, activation, norm):
    return tuple(
        up.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (up, gate, weight, bias)
    )


if MAX_WIDTH > 0:
    _rotate_op = Operator("rotate", __name__, rotate_rows, _fake_rotate, _save_for_rotating_back, _rotate_back)
    _activation_gradients_op = Operator(
        "activation_gradients", __name__, activation_gradients, _fake_activation_gradients
    )
    _activate_op = Operator(
        "activate", __name__, activate_rows, _fake_activate, _save_for_activation_gradients, _activation_backward
    )
