"""Cross-entropy of a linear head over a large vocabulary, without the logits of all positions.

The gradients are made in the forward pass, chunk by chunk: the logits of a chunk, in the dtype of the products, become
their own gradients in place, and two further products add what they give to the gradients of the head's input and
weight. Nothing is recomputed, and the backward pass only scales.

PyTorch has the same since 2.13 (`linear_cross_entropy` with options), in several passes over the logits, and so has
Liger, in chunks too short for a wide vocabulary. Shapes: N positions, D hidden size, V vocabulary.
"""

import torch
from torch import nn

from .dilated_tiles import accumulator
from .operators import Operator
from .pointwise import is_plain, uses_triton


try:
    from .pointwise_kernels import cross_entropy_gradient_
except ImportError:  # PyTorch without Triton
    pass


# Most memory that the logits of a chunk take: a GPU's products with a wide vocabulary want some thousands of rows.
_MAX_BYTES = {"cuda": 1 << 30}
_MAX_BYTES_ELSEWHERE = 1 << 27


def is_plain_linear(module: nn.Module) -> bool:
    """Whether all that a module does is a product with its weight, which lies in it (see `is_plain`)."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.shape == (module.out_features, module.in_features)
        and is_plain(module)
    )


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """The sum of the cross-entropies of `hidden_states @ weight.T` and `labels`.

    Args:
        hidden_states: `[N, D]`.
        weight: `[V, D]`, of the same dtype (under autocast: any).
        labels: `[N]`, 0 to V - 1, or `ignore_index` where there is nothing to predict.
        ignore_index: the label of positions that do not count.

    Returns:
        A scalar in float32 (of float64, float64). It has no second derivatives.
    """
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_states, weight)]
    loss, *_ = _forward_op(hidden_states, weight, labels, ignore_index, dtype, *needs)
    return loss


def _chunk_length(rows: int, weight: torch.Tensor) -> int:
    """Chunks of equal length, in whole blocks of a matrix product if that is possible."""
    most_bytes = _MAX_BYTES.get(weight.device.type, _MAX_BYTES_ELSEWHERE)
    most = max(1, most_bytes // (len(weight) * weight.element_size()))
    length = -(-rows // -(-rows // most))  # of as many chunks as are needed
    block = 128
    return length if most < block else min(-(-length // block), most // block) * block


def _forward(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and its gradients where they are needed; that of the weight in the dtype of the loss. Products are
    taken in `dtype`."""
    rows, vocabulary = len(hidden_states), len(weight)
    loss, grad_hidden, grad_weight = _empty_results(hidden_states, weight, needs_hidden, needs_weight)
    loss.zero_()
    if rows == 0:
        return loss, grad_hidden, grad_weight.zero_()
    with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
        weight = weight.to(dtype)
        length = _chunk_length(rows, weight)
        buffer = weight.new_empty((min(length, rows), vocabulary))
        for start in range(0, rows, length):
            chunk = slice(start, start + length)
            hidden, its_labels = hidden_states[chunk].to(dtype), labels[chunk]
            logits = torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])
            loss += _cross_entropy_gradient_(logits, its_labels, ignore_index, needs_hidden or needs_weight)
            if needs_weight:
                _add_product_(grad_weight, logits.t(), hidden, is_first=start == 0)
            if needs_hidden and grad_hidden.dtype == dtype:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            elif needs_hidden:
                grad_hidden[chunk] = logits @ weight
    return loss, grad_hidden, grad_weight


def _empty_results(hidden_states, weight, needs_hidden, needs_weight) -> tuple[torch.Tensor, ...]:
    exact = accumulator(hidden_states.dtype)
    grad_hidden = hidden_states.new_empty(hidden_states.shape if needs_hidden else 0)
    return (
        hidden_states.new_empty((), dtype=exact),
        grad_hidden,
        weight.new_empty(weight.shape if needs_weight else 0, dtype=exact),
    )


def _cross_entropy_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, with_gradient: bool
) -> torch.Tensor:
    """The summed loss of logits `[N, V]`, which become their gradients if asked for."""
    is_ignored = labels == ignore_index
    index = labels.masked_fill(is_ignored, 0)[:, None]
    at_label = logits.gather(1, index)[:, 0]  # which refuses labels out of range
    if uses_triton(logits):
        lse = cross_entropy_gradient_(logits, labels, ignore_index, with_gradient)
    else:
        exact = logits.to(accumulator(logits.dtype))
        lse = exact.logsumexp(-1)
        if with_gradient:
            exact = exact.sub_(lse[:, None]).exp_()
            exact.scatter_(1, index, exact.gather(1, index) - 1)
            logits.copy_(exact.masked_fill_(is_ignored[:, None], 0))
    return (lse - at_label).masked_fill(is_ignored, 0).sum()


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """`total += a @ b`, exact to the dtype of the total where the hardware sums up in it."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif a.is_cuda and is_first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _fake_forward(hidden_states, weight, labels, ignore_index, dtype, needs_hidden, needs_weight):
    return _empty_results(hidden_states, weight, needs_hidden, needs_weight)


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _, weight, *_, ctx.needs_hidden, ctx.needs_weight = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_loss, *grads_of_gradients):
    if any(grad is not None for grad in grads_of_gradients):
        raise NotImplementedError("The loss has no second derivatives (`create_graph=True`).")
    grad_hidden, grad_weight = ctx.saved_tensors
    grad_hidden = grad_hidden * grad_loss if ctx.needs_hidden else None
    grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype) if ctx.needs_weight else None
    return grad_hidden, grad_weight, None, None, None, None, None


def _flops(hidden_states, weight, labels, ignore_index, dtype, needs_hidden, needs_weight) -> int:
    """One product for the logits, and one for each gradient."""
    return 2 * len(hidden_states) * weight.numel() * (1 + needs_hidden + needs_weight)


_forward_op = Operator("forward", __name__, _forward, _fake_forward, _save_for_backward, _backward, flops=_flops)
