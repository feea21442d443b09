"""Triton kernels for what is done to numbers one by one or row by row, each in one pass over memory: rotary positions,
activation with norm, and from logits to their gradients."""

import torch


try:  # optional: of code from the Hub, Transformers requires whatever is imported outside of `try`
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need the package triton, which comes with PyTorch for GPUs.") from error

from .dilated_tiles import adjacent_rows
from .kernel_launch import Arguments, Blocks, launch, power_of_2, strides_of


_LOG2_E = tl.constexpr(1.4426950408889634)
MAX_WIDTH = 16384  # of a row that is held in registers
# That share the rows of a backward pass, since they add up gradients of the norm's weights: 4 a core of an H100
_PROGRAMS = 528


# Rotary positions


@triton.jit
def _rotate(
    X, OUT, COS, SIN, heads, length, x_head, x_row, o_head, o_row, cos_row, sin_row,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    position, head, d = row // heads, row % heads, tl.arange(0, BLOCK_D)[None, :]
    inside = (position < length) & (d < HALF)
    COS += position * cos_row + d
    SIN += position * sin_row + d
    X += head * x_head + position * x_row + d
    OUT += head * o_head + position * o_row + d
    left, right = tl.load(X, mask=inside).to(tl.float32), tl.load(X + HALF, mask=inside).to(tl.float32)
    cos_left, cos_right = tl.load(COS, mask=inside).to(tl.float32), tl.load(COS + HALF, mask=inside).to(tl.float32)
    sin_left, sin_right = tl.load(SIN, mask=inside).to(tl.float32), tl.load(SIN + HALF, mask=inside).to(tl.float32)
    if INVERSE:
        new_left, new_right = left * cos_left + right * sin_right, right * cos_right - left * sin_left
    else:
        new_left, new_right = left * cos_left - right * sin_left, right * cos_right + left * sin_right
    tl.store(OUT, new_left, mask=inside)
    tl.store(OUT + HALF, new_right, mask=inside)


@triton.jit(do_not_specialize=["q_heads", "k_heads", "length"])
def _rotary_kernel(
    Q, K, Q_OUT, K_OUT, COS, SIN, q_heads, k_heads, length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, qo_batch, qo_head, qo_row, ko_batch, ko_head, ko_row,
    cos_batch, cos_row, sin_batch, sin_row,
    INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows (position, head) of the queries, or of the keys."""
    batch = tl.program_id(1).to(tl.int64)
    COS += batch * cos_batch
    SIN += batch * sin_batch
    if tl.program_id(2) == 0:
        _rotate(
            Q + batch * q_batch, Q_OUT + batch * qo_batch, COS, SIN, q_heads, length, q_head, q_row, qo_head, qo_row,
            cos_row, sin_row, INVERSE, HALF, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate(
            K + batch * k_batch, K_OUT + batch * ko_batch, COS, SIN, k_heads, length, k_head, k_row, ko_head, ko_row,
            cos_row, sin_row, INVERSE, HALF, BLOCK_ROWS, BLOCK_D,
        )  # fmt: skip


def rotate_rows(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[B, H, N, D]`, turned by `cos` and `sin` `[B or 1, N, D]`, or with `inverse` turned back (or,
    of any cosines and sines, multiplied by the transposed matrix)."""
    query, key, cos, sin = map(adjacent_rows, (query, key, cos, sin))
    outputs = torch.empty_like(query), torch.empty_like(key)
    batch, heads, length, head_dim = query.shape
    half = head_dim // 2
    block_d = power_of_2(half)
    block_rows = max(1, 2048 // block_d)
    strides = strides_of(query, key, *outputs)
    for x in (cos, sin):
        strides += [0 if x.shape[0] == 1 else x.stride(0), x.stride(1)]
    grid = (triton.cdiv(length * max(heads, key.shape[1]), block_rows), batch, 2)
    constants = dict(INVERSE=inverse, HALF=half, BLOCK_ROWS=block_rows, BLOCK_D=block_d)
    numbers = (heads, key.shape[1], length)
    launch(_rotary_kernel, grid, Arguments((query, key, *outputs, cos, sin), numbers, strides, constants))
    return outputs


# Activation with norm


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """The normal distribution at x, and exp(-x² / 2). If not EXACT, to 1e-7, which no number of 16 bits shows:
    Abramowitz and Stegun 7.1.26, in a third of the instructions."""
    density = tl.exp2(x * x * -0.7213475204444817)
    if EXACT:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.23164191886 * tl.abs(x))
        tail = 0.530702714 * t - 0.726576013
        tail = (((tail * t + 0.710706870) * t - 0.142248368) * t + 0.127414796) * t * density
        share = tl.where(x < 0.0, tail, 1.0 - tail)
    return share, density


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation at x, and its slope."""
    if ACTIVATION == "gelu":
        share, density = _normal(x, EXACT)
        return x * share, share + x * density * 0.3989422804014327
    elif ACTIVATION == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def _activation_kernel(
    UP, GATE, WEIGHT, BIAS, OUT, STATS, up_row, gate_row,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row: norm(act(up)) or, gated, norm(act(gate) * up)."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < WIDTH
    up = tl.load(UP + row * up_row + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(GATE + row * gate_row + d, mask=inside, other=0.0).to(tl.float32)
        x, _ = _activation(gate, ACTIVATION, EXACT)
        x *= up
    else:
        x, _ = _activation(up, ACTIVATION, EXACT)
    if NORM != "none":
        mean = 0.0
        if NORM == "layer":
            mean = tl.sum(x) / WIDTH
            x = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x) / WIDTH + EPS)
        tl.store(STATS + row * 2, mean)
        tl.store(STATS + row * 2 + 1, rstd)
        x *= rstd * tl.load(WEIGHT + d, mask=inside).to(tl.float32)
        if BIASED:
            x += tl.load(BIAS + d, mask=inside).to(tl.float32)
    tl.store(OUT + row * WIDTH + d, x, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _activation_gradient_kernel(
    UP, GATE, WEIGHT, STATS, GRAD, GRAD_UP, GRAD_GATE, GRAD_WEIGHT, GRAD_BIAS, rows, up_row, gate_row, grad_row,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Every so many rows. Gradients of the norm's weights are summed up over the program's rows."""
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    grad_weight, grad_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if NORM != "none":
        weight = tl.load(WEIGHT + d, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        up = tl.load(UP + row * up_row + d, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row * grad_row + d, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(GATE + row * gate_row + d, mask=inside, other=0.0).to(tl.float32)
            activated, slope = _activation(gate, ACTIVATION, EXACT)
            slope *= up
        else:
            activated, slope = _activation(up, ACTIVATION, EXACT)
        if NORM != "none":
            mean, rstd = tl.load(STATS + row * 2), tl.load(STATS + row * 2 + 1)
            x = activated
            if GATED:
                x *= up
            x = tl.where(inside, (x - mean) * rstd, 0.0)
            grad_weight += grad * x
            if BIASED:
                grad_bias += grad
            grad *= weight
            grad -= x * (tl.sum(grad * x) / WIDTH)
            if NORM == "layer":
                grad -= tl.sum(grad) / WIDTH  # x sums up to 0, so that the order of the two does not matter
            grad *= rstd
        if GATED:
            tl.store(GRAD_UP + row * WIDTH + d, grad * activated, mask=inside)
            tl.store(GRAD_GATE + row * WIDTH + d, grad * slope, mask=inside)
        else:
            tl.store(GRAD_UP + row * WIDTH + d, grad * slope, mask=inside)
    if NORM != "none":
        at = tl.program_id(0) * WIDTH + d
        tl.store(GRAD_WEIGHT + at, grad_weight, mask=inside)
        if BIASED:
            tl.store(GRAD_BIAS + at, grad_bias, mask=inside)


def _constants(up, gate, bias, activation: str, norm: str) -> dict:
    width = up.shape[-1]
    return dict(
        ACTIVATION=activation, NORM=norm, GATED=gate is not None, BIASED=bias is not None,
        WIDTH=width, BLOCK=power_of_2(width), EXACT=up.dtype == torch.float32,
    )  # fmt: skip


def _of_threads(width: int, places: int, gate: torch.Tensor | None) -> Blocks:
    """Programs of one row, with so many of its places for a thread, or half of them if there are two numbers at each.
    Few threads (measured on an H200, without gates): they wait for one another whenever they sum the row up."""
    return Blocks(1, 0, min(32, max(4, power_of_2(width) // (32 * (places if gate is None else places // 2)))), 0)


def activate_rows(
    up: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    norm: str,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm(act(up))` or `norm(act(gate) * up)` of rows `[N, W]`, in their dtype, computed in float32; and mean and
    inverse deviation `[N, 2]` of the rows.

    `norm` is "layer" or "rms", with a weight `[W]`, or "none"; `bias` `[W]` may be None.
    """
    output = torch.empty_like(up, memory_format=torch.contiguous_format)
    stats = torch.empty(len(up) if norm != "none" else 0, 2, dtype=torch.float32, device=up.device)
    # A kernel does not look at what stands for a tensor that is not there
    tensors = *(up if x is None else x for x in (up, gate, weight, bias)), output, stats
    constants = _constants(up, gate, bias, activation, norm) | dict(EPS=eps)
    strides = [up.stride(0), 0 if gate is None else gate.stride(0)]
    arguments = Arguments(tensors, (), strides, constants)
    launch(_activation_kernel, (len(up), 1, 1), arguments, _of_threads(up.shape[-1], 32, gate))
    return output, stats


def activation_gradients(
    grad: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    activation: str,
    norm: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `up`, `gate`, `weight` and `bias`, given that of the output; empty for what is not there."""
    width, programs = up.shape[-1], min(_PROGRAMS, len(up))
    grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
    grad_gate = up.new_empty(up.shape if gate is not None else 0)
    sums = [
        torch.empty(programs if x is not None else 0, width, dtype=torch.float32, device=up.device)
        for x in (weight, bias)
    ]
    there = (up if x is None else x for x in (up, gate, weight))
    strides = [up.stride(0), 0 if gate is None else gate.stride(0), grad.stride(0)]
    constants = _constants(up, gate, bias, activation, norm)
    arguments = Arguments((*there, stats, grad, grad_up, grad_gate, *sums), (len(up),), strides, constants)
    # Fewer places for a thread, which has more of each to keep
    launch(_activation_gradient_kernel, (programs, 1, 1), arguments, _of_threads(width, 16, gate))
    grad_weight, grad_bias = (
        up.new_empty(0) if x is None else total.sum(0).to(x.dtype)
        for x, total in zip((weight, bias), sums, strict=True)
    )
    return grad_up, grad_gate, grad_weight, grad_bias


# From logits to their gradients


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


_LOGITS_BLOCK = 32768  # measured on an H100: one program of all warps per core finds the row in the L2 cache again


def cross_entropy_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, with_gradient: bool
) -> torch.Tensor:
    """Log-sum-exp `[N]` in float32 of logits `[N, V]`, which become their gradients if asked for."""
    rows, vocabulary = logits.shape
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_LOGITS_BLOCK, power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits, labels, lse, logits.stride(0), vocabulary, ignore_index, with_gradient, block,
            num_warps=max(4, block // 1024),
        )  # fmt: skip
    return lse
