"""What the benchmarks share: how they time, what is said above their tables, and windows that keep blocks of keys."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from record import environment  # noqa: E402

from longnet_hf import DilatedPattern  # noqa: E402


def describe(device: str) -> str:
    """Hardware, versions and commit, in one line: what a number means."""
    facts = environment(device)
    hardware = facts.pop("hardware")
    return ", ".join((hardware, *(f"{name} {version}" for name, version in facts.items())))


def timer(run) -> Timer:
    """PyTorch's, with as many threads as before: with another number, what is compiled would be compiled again."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def milliseconds(run, seconds: float) -> float:
    """Median time of a call, measured for some seconds."""
    return 1e3 * timer(run).blocked_autorange(min_run_time=seconds).median


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The work of a call on the GPU, without what the CPU does to launch it: a CUDA graph, to be replayed."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as PyTorch asks for: what happens the first time does not belong into the graph
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dilated_windows(length: int) -> dict:
    """The fields of windows of N/16, N/4 and N tokens at rates 1, 4 and 16."""
    widths = [max(1, length >> shift) for shift in (4, 2, 0)]
    kinds = dict(branch_types=["window"] * 3, head_offset="rotating")
    return dict(segment_lengths=widths, dilation_rates=[1, 4, 16], **kinds)


def windows_of_blocks(pattern: DilatedPattern, heads: int, block: int, sinks: int, device):
    """`(n, m, head) -> C[n, m]` for the windows of a pattern and a sink, that keep key m if (m // block) mod r = s_j;
    with blocks of one key it is the multiplicity of the pattern."""
    windows = [branch for branch in pattern.branches if branch.type == "window"]
    phases = [[pattern.phase(branch, head, heads) for branch in windows] for head in range(heads)]
    phases = torch.tensor(phases, device=device)

    def count(n, m, head):
        kept = [(m // block % x.rate == phases[head, i]) & (n - m < x.length) for i, x in enumerate(windows)]
        of_windows = functools.reduce(torch.add, (x.int() for x in kept))
        return torch.where(m <= n, torch.maximum((m < sinks).int(), of_windows), 0)

    return count
