"""Time and memory of one attention layer as the sequence grows: dilated attention beside the alternatives.

    python benchmarks/attention.py                    # on the GPU if there is one, or else on the CPU
    python benchmarks/attention.py --lengths 8192 32768 --head_dim 64 --bidirectional
    python benchmarks/attention.py --only triton "full, cuDNN" --cuda_graph
    python benchmarks/attention.py --pattern heads --width 960 --key_value_heads 5 --lengths 32768 131072

Batch 1, the paper's pattern (w = 2048 ... 32768, r = 1, 2, 4, 6, 12), w = 2048 * 4^k, r = 4^k, or "heads": full
attention in the first fifth of the key/value heads, a window of 2209 tokens and a sink of 4 in the others. A row gives
milliseconds forward and forward + backward, the TFLOP/s of both, which count the pairs of the pattern only, and the
memory that the latter allocates at its peak. The attentions:

- triton: this project's kernels; pytorch: its path for other devices, tiles of PyTorch's flash attention
- gather: the published implementations' way (kept rows copied, flash attention per branch, scattered, and mixed)
- flex: FlexAttention with the pattern as block mask, where that fits
- full, flash and full, cuDNN: full attention through scaled_dot_product_attention
"""

import argparse
import functools
import os

import torch
import torch.nn.functional as F
from common import captured, describe, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from longnet_hf import DilatedPattern, dilated_attention


PATTERNS = {
    "paper": DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]),
    "powers": DilatedPattern([2048 * 4**k for k in range(5)], [4**k for k in range(5)]),
}
WINDOW_AND_SINK = DilatedPattern([2209, 4], [1, 1], ["window", "sink"])
# Beyond these lengths an attention takes too long to be worth its place in the table
LONGEST = {"cpu": {"full": 2**14}, "cuda": {"flex": 2**15, "full, flash": 2**16, "full, cuDNN": 2**17}}


def gather_attention(query, key, value, pattern, is_causal):
    """Dilated attention as it was published: a copy of the kept rows, an output and a log-sum-exp per branch."""
    heads, length = query.shape[1:3]
    outputs, lses = [], []
    for branch in pattern.branches:
        w, r = min(branch.length, length), branch.rate
        w += -w % r
        padded = [F.pad(x, (0, 0, 0, -length % w)) for x in (query, key, value)]  # to whole segments
        output, lse = torch.zeros_like(padded[0]), query.new_full(padded[0].shape[:3], -torch.inf, dtype=torch.float32)
        for phase in range(min(r, heads)):

            def kept(x, phase=phase, w=w, r=r):  # [1, heads, N, ...] -> [segments, heads, kept rows, ...]
                return x[:, phase::r].unflatten(2, (-1, w))[0, :, :, phase::r].transpose(0, 1)

            rows = (kept(x).contiguous() for x in padded)
            part, part_lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*rows, 0.0, is_causal)
            kept(output).copy_(part)
            kept(lse).copy_(part_lse)
        outputs.append(output[:, :, :length])
        lses.append(lse[:, :, :length])
    weights = torch.stack(lses).softmax(0).to(query.dtype)
    return sum(weight[..., None] * output for weight, output in zip(weights, outputs, strict=True))


@functools.lru_cache(maxsize=1)
def flex(pattern, heads, length, is_causal, device):
    """FlexAttention with the pattern as block mask, and the number of branches as score modification."""

    def count(head, n, m):
        return pattern.multiplicity(n, m, head, heads, is_causal)

    mask = create_block_mask(
        lambda b, h, n, m: count(h, n, m) > 0, None, heads, length, length, device=device, _compile=True
    )
    return functools.partial(
        torch.compile(flex_attention, dynamic=False),
        block_mask=mask,
        score_mod=lambda score, b, h, n, m: score + count(h, n, m).to(torch.float32).log(),
    )


def attentions(pattern, heads, length, is_causal, device):
    """Name -> a function of query, key and value, and the pattern whose pairs it computes."""
    full = DilatedPattern.full()

    def dilated(q, k, v, triton="1"):
        os.environ["LONGNET_TRITON"] = triton
        return dilated_attention(q, k, v, pattern, is_causal=is_causal)

    def sdpa(q, k, v, backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    if device == "cpu":
        return {
            "pytorch": (dilated, pattern),
            "full": (functools.partial(F.scaled_dot_product_attention, is_causal=is_causal, enable_gqa=True), full),
        }
    return {
        "triton": (dilated, pattern),
        "pytorch": (functools.partial(dilated, triton="0"), pattern),
        "gather": (functools.partial(gather_attention, pattern=pattern, is_causal=is_causal), pattern),
        "flex": (lambda *qkv: flex(pattern, heads, length, is_causal, device)(*qkv), pattern),
        "full, flash": (functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), full),
        "full, cuDNN": (functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), full),
    }


def pattern_flops(
    pattern: DilatedPattern,
    length: int,
    num_heads: int,
    head_dim: int,
    *,
    num_key_value_heads: int | None = None,
    is_causal: bool = True,
    backward: bool = False,
) -> int:
    """Floating-point operations of the two products of the forward pass (4 per pair and channel), or of the five of
    the backward pass (10), for one sequence. `num_heads` counts query heads."""
    num_key_value_heads = num_key_value_heads or num_heads
    pairs = pattern.pairs(length, num_key_value_heads, is_causal=is_causal) * (num_heads // num_key_value_heads)
    return pairs * head_dim * (10 if backward else 4)


def peak_mebibytes(run, device: str) -> float:
    """What a call allocates beyond what is there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2**n for n in (range(11, 23) if on_gpu else range(12, 18))]
    )
    parser.add_argument("--width", type=int, default=768 if on_gpu else 128, help="heads x head size")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--key_value_heads", type=int, help="default: as many as query heads")
    parser.add_argument("--pattern", choices=[*PATTERNS, "heads"], default="paper")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of the attentions to run")
    parser.add_argument(
        "--cuda_graph", action="store_true", help="time the GPU's work alone, replayed as a CUDA graph"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="to measure for")
    options = parser.parse_args()
    heads = options.width // options.head_dim
    key_heads = options.key_value_heads or heads
    if options.pattern == "heads":
        pattern = WINDOW_AND_SINK.with_full_heads(range(max(1, key_heads // 5)), key_heads)
    else:
        pattern = PATTERNS[options.pattern]

    print(
        f"{describe(device)}; {heads} heads on {key_heads} x {options.head_dim}, {options.dtype}, {options.pattern}, "
    )
    print(f"{'bidirectional' if options.bidirectional else 'causal'}{', CUDA graphs' * options.cuda_graph}\n")
    print("| tokens | attention | forward ms | forward + backward ms | TFLOP/s | TFLOP/s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for length in options.lengths:
        # as a model has them: [B, N, H, D], seen as [B, H, N, D]
        *inputs, grad = (
            torch.randn(1, length, count, options.head_dim, device=device, dtype=getattr(torch, options.dtype))
            for count in (heads, key_heads, key_heads, heads)
        )
        *inputs, grad = (x.transpose(1, 2) for x in (*inputs, grad))
        inputs = [x.requires_grad_() for x in inputs]
        rivals = attentions(pattern, heads, length, not options.bidirectional, device)
        if key_heads != heads or options.pattern == "heads":  # which the published way and the block mask are not for
            rivals = {name: x for name, x in rivals.items() if name not in ("gather", "flex")}
        for name, (attention, work) in rivals.items():
            too_long = length > LONGEST[device].get(name, length)
            if too_long or (options.only and name not in options.only):
                continue

            def forward(attention=attention, inputs=inputs):
                with torch.no_grad():
                    attention(*inputs)

            def both(attention=attention, inputs=inputs, grad=grad):
                torch.autograd.grad(attention(*inputs), inputs, grad)

            try:
                peak = peak_mebibytes(both, device)
                runs = (captured(forward), captured(both)) if options.cuda_graph else (forward, both)
                times = [milliseconds(run, options.seconds) for run in runs]
            except torch.cuda.OutOfMemoryError:
                print(f"| {length} | {name} | out of memory |")
                continue
            is_causal = not options.bidirectional
            flops = pattern_flops(
                work, length, heads, options.head_dim, num_key_value_heads=key_heads, is_causal=is_causal
            )
            flops /= 1e9
            rates = flops / times[0], 3.5 * flops / times[1]
            columns = (
                length,
                name,
                *(f"{time:.2f}" for time in times),
                *(f"{rate:.3g}" for rate in rates),
                f"{peak:.0f}",
            )
            print("|", " | ".join(map(str, columns)), "|", flush=True)


if __name__ == "__main__":
    main()
