"""What a backward pass computes again, and what it need not."""

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable


_SHARE = 1 / 16


@torch.compiler.assume_constant_result
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def has_room_for(num_bytes: int, device: torch.device) -> bool:
    """Whether so much may be kept on a GPU over what a backward pass cannot do without: a sixteenth of its memory, so
    that long sequences fit as before."""
    return num_bytes <= _SHARE * _memory(device)


def keep_for_second(kept: dict | None, compute: Callable[[], tuple]) -> tuple:
    """What `compute` gives, without gradients: computed by the first of two calls, which leaves it in `kept`, and
    taken from there by the second. Computed each time if `kept` is None."""
    result = None if kept is None else kept.pop("result", None)
    if result is None:
        with torch.no_grad():
            result = compute()
        if kept is not None:
            kept["result"] = result
    return result


def in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`function(x)` of `[..., N, D]`, computed on so many of the N positions at a time.

    The backward pass recomputes a chunk and takes its gradients before it comes to the next. Inside a checkpoint the
    function is computed twice, not three times as with a checkpoint inside: the input is saved before anything is
    computed, which is where the outer recomputation stops if nothing else is asked for.

    Args:
        function: maps `[..., n, D]` to the same shape, position by position; without randomness.
        x: the input.
        size: positions of a chunk.
        weights: the tensors that `function` uses and that want gradients, which are summed up in float32.
    """
    held = _Hold.apply(function, size, x, *weights)
    output = None
    with torch.no_grad():
        for at in range(0, x.shape[-2], size):
            part = function(x.narrow(-2, at, min(size, x.shape[-2] - at)))
            if output is None:
                output = part.new_empty(x.shape)
            output.narrow(-2, at, part.shape[-2]).copy_(part)
    return _Release.apply(held, output)


class _Hold(torch.autograd.Function):
    """Holds the input. What it gives has no memory: it only stands for the output, whose gradient comes back by it."""

    @staticmethod
    def forward(ctx, function, size, x, *weights):
        device = x.device.type
        ctx.function, ctx.size, ctx.weights = function, size, weights
        ctx.autocast = dict(
            device_type=device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        ctx.save_for_backward(x)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = [
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in ctx.weights
        ]
        for at in range(0, x.shape[-2], ctx.size):
            chunk = slice(at, at + ctx.size)
            part = x[..., chunk, :].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                output = ctx.function(part)
            grads = torch.autograd.grad(output, (part, *ctx.weights), grad[..., chunk, :].to(output.dtype))
            grad_x[..., chunk, :] = grads[0]
            for total, its_grad in zip(sums, grads[1:], strict=True):
                total += its_grad
        sums = (total.to(weight.dtype) for total, weight in zip(sums, ctx.weights, strict=True))
        return None, None, grad_x, *sums


class _Release(torch.autograd.Function):
    """The output, in place of what was held for it."""

    @staticmethod
    def forward(ctx, held, output):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
