"""What a record has to say beside its figures."""

import os
import resource
import subprocess
from pathlib import Path

import torch
import transformers

import longnet_hf


# Asked when the code is loaded: by the time that a record is written, another commit may be checked out
_described = subprocess.run(
    ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
)
COMMIT = os.environ.get("COMMIT") or _described.stdout.strip() or "unknown"


def environment(device: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longnet_hf": f"{longnet_hf.__version__}, commit {COMMIT}",
    }


def peak_gibibytes(device: str) -> float:
    """Most memory so far: what PyTorch allocated on a GPU, or the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
