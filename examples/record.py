"""Records of examples and benchmarks: how they are kept, and hardware, versions and commit beside their figures."""

import json
import os
import platform
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


def write(file: Path, content: dict) -> None:
    """As JSON, and whole: an interruption leaves what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.unfinished")  # processes may write the same at a time
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)


def read(file: Path) -> dict:
    """What [`write`] wrote."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, delete it to start what it records anew: {error}") from error


class Results(dict):
    """What was found so far, in a JSON file with which an interrupted run goes on."""

    def __init__(self, file: Path):
        super().__init__(read(file) if file.exists() else {})
        self.file = file

    def save(self, **new) -> None:
        self.update(new)
        write(self.file, self)


def environment(device: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    on = torch.device(device)
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return {
        "hardware": torch.cuda.get_device_name(on) if on.type == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longnet_hf": f"{longnet_hf.__version__}, commit {COMMIT}",
    }


def peak_gibibytes(device: str) -> float:
    """Most memory so far: what PyTorch allocated on a GPU, or the whole process on a CPU."""
    on = torch.device(device)
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
