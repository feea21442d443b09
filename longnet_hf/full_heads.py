"""Heads with full attention and nothing else, on whole rows: PyTorch's own attention, where cuDNN's kernels are faster
than those of dilated_kernels.py, by which the other heads of a layer are computed.

Shapes as in dilated_operator.py.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .dilated_pattern import DilatedPattern, runs_of_neighbours


# cuDNN makes a plan for every new length, and is called once per run of heads. It is faster from so many numbers in
# the keys of a head on; measured on an H200, with one head in five.
_SMALLEST = 1 << 22
# What they come to, whose results can be kept
_OPERATORS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def find_full_heads(query: torch.Tensor, key: torch.Tensor, pattern: DilatedPattern) -> tuple[int, ...]:
    """The key/value heads of whole rows that PyTorch's attention is to compute."""
    if not _is_suited(query, key):
        return ()
    return tuple(
        head
        for head in range(key.shape[1])
        if [x.length for x in pattern.branches if x.type != "sink" and x.belongs_to(head)] == [None]
    )


def _is_suited(query: torch.Tensor, key: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # which takes no choice of kernels
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] == key.shape[2]
        and query.shape[2] * query.shape[3] >= _SMALLEST
        and torch.cuda.get_device_capability(query.device)[0] >= 9
        and torch.get_deterministic_debug_mode() < 2  # 2: `use_deterministic_algorithms`, not to warn only
    )


def attend_with_full_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: DilatedPattern,
    heads: tuple[int, ...],
    is_causal: bool,
    scale: float,
    attend: Callable[[DilatedPattern], torch.Tensor],
    kept: dict | None = None,
) -> torch.Tensor:
    """Attention `[B, H, N, D]` of which `heads` are computed here, and the others by `attend`, which is given the
    pattern without these. `kept` as in `dilated_attention`."""
    group, count = query.shape[1] // key.shape[1], key.shape[1]
    others = pattern.without_heads(heads, count)
    # A copy: the output that the operator keeps for its backward pass has zeros in these heads
    output = torch.zeros_like(query) if others is None else attend(others).clone()
    with sdpa_kernel(_BACKENDS, set_priority=True), _keeping(kept):
        for first, last in runs_of_neighbours(heads):  # which are views of the tensors
            of_query = slice(first * group, (last + 1) * group)
            output[:, of_query] = F.scaled_dot_product_attention(
                query[:, of_query],
                key[:, first : last + 1],
                value[:, first : last + 1],
                is_causal=is_causal,
                scale=scale,
                enable_gqa=group > 1,
            )
    return output


def _keeping(kept: dict | None) -> contextlib.AbstractContextManager:
    """What PyTorch's attention gives inside, the first time this is called, it gives again the second time."""
    if kept is None:
        return contextlib.nullcontext()
    second = kept.pop("full_heads", None)
    if second is not None:
        return second
    first, second = contextlib.nullcontext(), contextlib.nullcontext()
    if torch.is_grad_enabled():  # or else it gives no log-sum-exp, and is asked again
        first, second = create_selective_checkpoint_contexts(_OPERATORS)
    kept["full_heads"] = second
    return first
