"""The Triton kernel of the loss: rows of logits become their gradients, in place."""

import torch
import triton
import triton.language as tl


_LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCK, _WARPS = 8192, 16  # measured on an H100


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    LOGITS, LABELS, LSE, row_stride, vocabulary, ignore_index, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its log-sum-exp, and with GRADIENT the gradient of its cross-entropy over the logits, 0 if ignored."""
    row = tl.program_id(0).to(tl.int64)
    logits, label = LOGITS + row * row_stride, tl.load(LABELS + row)
    columns = tl.arange(0, BLOCK)
    top, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=-float("inf"))
        x = x.to(tl.float32) * _LOG2_E
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top))
        top = new_top
    lse = top + tl.log2(total)
    tl.store(LSE + row, lse / _LOG2_E)
    if GRADIENT:
        weight = tl.where(label == ignore_index, 0.0, 1.0)
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits + start + columns, mask=inside, other=0.0)
            x = tl.exp2(x.to(tl.float32) * _LOG2_E - lse) - tl.where(start + columns == label, 1.0, 0.0)
            tl.store(logits + start + columns, x * weight, mask=inside)


def triton_cross_entropy_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, with_gradient: bool
) -> torch.Tensor:
    """Log-sum-exp `[N]` in float32 of logits `[N, V]`, which become their gradients if asked for."""
    rows, vocabulary = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits, labels, lse, logits.stride(0), vocabulary, ignore_index, with_gradient, block, num_warps=_WARPS
        )
    return lse
