"""Time and memory of one attention layer as the sequence grows: dilated attention beside PyTorch's full attention.

    python benchmarks/attention.py                    # on the GPU if there is one, or else on the CPU
    python benchmarks/attention.py --lengths 8192 32768 --heads 12 --head_dim 64

Causal, batch 1, the paper's pattern (w = 2048 ... 32768, r = 1, 2, 4, 6, 12). A row gives milliseconds forward and
forward + backward, the memory that the latter allocates at its peak, and the rate at which pairs are done.
"""

import argparse
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from longnet_hf import DilatedPattern, dilated_attention


PAPER = DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])


def environment(device: str) -> str:
    """Hardware, versions and commit: what a number means."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor()} {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}, longnet-hf {commit.stdout.strip() or 'without git'}"


def milliseconds(run, device: str, repeats: int) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


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
        "--lengths", type=int, nargs="+", default=[2**n for n in (range(13, 21) if on_gpu else range(12, 18))]
    )
    parser.add_argument("--heads", type=int, default=12 if on_gpu else 2)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--repeats", type=int, default=5 if on_gpu else 1)
    parser.add_argument(
        "--longest_full", type=int, default=2**17 if on_gpu else 2**14, help="skip full attention beyond"
    )
    options = parser.parse_args()

    print(f"{environment(device)}; {options.heads} heads x {options.head_dim}, {options.dtype}\n")
    print("| tokens | attention | forward ms | forward + backward ms | peak MiB | forward TFLOP/s |")
    print("|---|---|---|---|---|---|")
    attentions = {
        "dilated": (lambda q, k, v: dilated_attention(q, k, v, PAPER), PAPER),
        "full": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), DilatedPattern.full()),
    }
    for length in options.lengths:
        shape = (1, options.heads, length, options.head_dim)
        inputs = [torch.randn(shape, device=device, dtype=getattr(torch, options.dtype)) for _ in range(4)]
        grad = inputs.pop()
        for name, (attention, pattern) in attentions.items():
            if name == "full" and length > options.longest_full:
                continue
            for x in inputs:
                x.requires_grad_()

            def both(attention=attention, inputs=inputs, grad=grad):
                torch.autograd.grad(attention(*inputs), inputs, grad)

            with torch.no_grad():
                forward = milliseconds(lambda: attention(*inputs), device, options.repeats)  # noqa: B023
            total = milliseconds(both, device, options.repeats)
            peak = peak_mebibytes(both, device)
            rate = pattern.flops(length, options.heads, options.head_dim) / forward / 1e9
            print(f"| {length} | {name} | {forward:.1f} | {total:.1f} | {peak:.0f} | {rate:.2f} |", flush=True)


if __name__ == "__main__":
    main()
