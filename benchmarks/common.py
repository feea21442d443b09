"""What the benchmarks share: how they time, and what is said above their tables."""

import sys
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
