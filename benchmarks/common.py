"""What the benchmarks share: how they time, and what is said above their tables."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from record import environment  # noqa: E402


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
