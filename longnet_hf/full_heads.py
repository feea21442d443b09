"""Heads with full attention and nothing else, on whole rows: cuDNN's kernels, where they are faster than those of
dilated_kernels.py. The other heads of a layer are computed by these.

Shapes as in dilated_operator.py.
"""

from collections.abc import Iterator

import torch

from .dilated_pattern import DilatedPattern
from .documents import Document


# cuDNN makes a plan for every new length, and takes a call per run of heads. It is faster from so many numbers in the
# keys of a head on; measured on an H200, with one head in five.
_SMALLEST = 1 << 22


def find_full_heads(
    query: torch.Tensor, key: torch.Tensor, pattern: DilatedPattern, documents: tuple[Document, ...], is_causal: bool
) -> tuple[int, ...]:
    """The key/value heads that cuDNN is to compute."""
    batch, heads, length, head_dim = key.shape
    is_suited = (
        query.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and query.shape[2] == length
        and length * head_dim >= _SMALLEST
        and [document[:4] for document in documents] == [(row, 0, 0, length) for row in range(batch)]
        and torch.cuda.get_device_capability(query.device)[0] >= 9
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
    )
    if not is_suited:
        return ()
    return tuple(
        head
        for head in range(heads)
        if [x.length for x in pattern.branches if x.type != "sink" and x.belongs_to(head)] == [None]
    )


def full_forward(query, key, value, heads: tuple[int, ...], is_causal: bool, scale: float, output, lse) -> None:
    """Write output `[B, H, N, D]` and log-sum-exp `[B, H, N]` of some key/value heads."""
    for of_query, of_key in _runs(heads, query, key):
        new_output, new_lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query[:, of_query], key[:, of_key], value[:, of_key], None, True, 0.0, is_causal, False, scale=scale
        )
        output[:, of_query], lse[:, of_query] = new_output, new_lse.flatten(2)


def full_backward(
    grad_output, query, key, value, output, lse, heads: tuple[int, ...], is_causal: bool, scale: float, grads
) -> None:
    """Write the gradients of query, key and value of some key/value heads."""
    no_random_state = torch.zeros((), dtype=torch.int64, device=query.device)
    length = query.shape[2]
    for of_query, of_key in _runs(heads, query, key):
        parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_output[:, of_query],
            query[:, of_query],
            key[:, of_key],
            value[:, of_key],
            output[:, of_query],
            lse[:, of_query, :, None].contiguous(),
            no_random_state,
            no_random_state,
            None,
            None,
            None,
            length,
            length,
            0.0,
            is_causal,
            scale=scale,
        )
        for grad, part, of_heads in zip(grads, parts, (of_query, of_key, of_key), strict=True):
            grad[:, of_heads] = part


def _runs(heads: tuple[int, ...], query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of neighbours, which are views of the tensors: their query heads, and their key/value heads."""
    group = query.shape[1] // key.shape[1]
    for head in heads:
        if head - 1 in heads:
            continue
        stop = head + 1
        while stop in heads:
            stop += 1
        yield slice(head * group, stop * group), slice(head, stop)
