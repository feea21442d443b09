"""Set-up of all tests: no network, and memory that nobody wrote shows."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


pytest.register_assert_rewrite("comparisons")

if not torch.cuda.is_available():  # Triton then runs its kernels in Python; it wants to know before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The tensors are tiny: more threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialised_memory():
    """`torch.empty` gives NaN, so that an element that is never written shows in any comparison."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
