"""How Triton kernels are launched: where they run, the shapes of programs, and a way past Triton's own launcher, which
takes longer than many of the launches. Needs no Triton itself."""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


def runs_in_triton(x: torch.Tensor) -> bool:
    """Whether a tensor is one for Triton kernels; `LONGNET_TRITON=0` in the environment switches them off."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and os.environ.get("LONGNET_TRITON", "1") != "0"
    )


class Blocks(NamedTuple):
    """Shape of a program: rows of its own block, rows of the blocks that it meets, and what the compiler is told."""

    own: int
    met: int
    warps: int
    stages: int
    registers: int | None = None


# By head size (padded to a power of 2) and kernel; measured on an H100 and an H200
_HOPPER_BLOCKS = {
    64: dict(forward=Blocks(64, 64, 4, 3, 128), queries=Blocks(64, 64, 4, 3, 168), keys=Blocks(64, 64, 4, 3)),
    128: dict(forward=Blocks(64, 64, 4, 3), queries=Blocks(64, 64, 4, 2), keys=Blocks(64, 32, 4, 3)),
    256: dict(forward=Blocks(128, 64, 8, 2), queries=Blocks(64, 64, 8, 1), keys=Blocks(64, 64, 8, 1)),
}
# What 99 KiB of shared memory hold, as any GPU since Ampere has
_OTHER_BLOCKS = {
    64: dict(forward=Blocks(64, 64, 4, 2), queries=Blocks(64, 64, 4, 2), keys=Blocks(64, 64, 4, 2)),
    128: dict(forward=Blocks(64, 32, 4, 2), queries=Blocks(64, 32, 4, 2), keys=Blocks(64, 32, 4, 2)),
    256: dict(forward=Blocks(32, 32, 4, 2), queries=Blocks(32, 32, 8, 1), keys=Blocks(32, 32, 8, 1)),
}
_FLOAT32_BLOCKS = {
    64: dict(forward=Blocks(32, 32, 4, 2), queries=Blocks(32, 32, 4, 2), keys=Blocks(32, 32, 4, 2)),
    128: dict(forward=Blocks(32, 32, 4, 1), queries=Blocks(32, 32, 4, 1), keys=Blocks(32, 32, 4, 1)),
    256: dict(forward=Blocks(16, 16, 4, 1), queries=Blocks(16, 16, 4, 1), keys=Blocks(16, 16, 4, 1)),
}


def blocks_of(x: torch.Tensor, kernel: str) -> Blocks:
    if x.dtype == torch.float32:
        table = _FLOAT32_BLOCKS
    else:
        table = _HOPPER_BLOCKS if _is_hopper(x.device) else _OTHER_BLOCKS
    return table[max(64, padded(x.shape[-1]))][kernel]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def power_of_2(number: int) -> int:
    """The next power of 2. Triton's own takes as long as a launch."""
    return 1 << (number - 1).bit_length()


def padded(head_dim: int) -> int:
    return max(16, power_of_2(head_dim))


class Arguments(NamedTuple):
    """The arguments of a kernel, in its order but for the tensors of a launch alone, which follow the others."""

    tensors: tuple[torch.Tensor, ...]
    numbers: tuple
    strides: list[int]
    constants: dict  # what it is compiled for


def strides_of(*tensors: torch.Tensor) -> list[int]:
    """Of the batch, the heads and the rows of every tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def precision_of(dtype: torch.dtype) -> str:
    """How products of such numbers are taken; of float32, as PyTorch takes its own on a GPU."""
    # The older `allow_tf32` raises errors once anything, such as Trainer with `tf32=True`, has set this one
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def row_constants(query: torch.Tensor, blocks: Blocks) -> dict:
    """What any kernel is compiled for that multiplies rows of queries and keys."""
    return dict(
        HEAD_DIM=query.shape[3],
        BLOCK_D=padded(query.shape[3]),
        PRECISION=precision_of(query.dtype),
        STAGES=blocks.stages,
    )


_compiled = {}


class Launches:
    """`kernel[grid](*tensors, *own, *numbers, *strides, **constants)` for several grids, one after another.

    Triton looks at every argument of every call to find the kernel that it compiled for such arguments. This looks at
    those that can make a difference, once for all calls whose tensors lie alike.

    Args:
        kernel: the kernel, which is not compiled for any number.
        launches: every grid, and the tensors of its launch alone, which are alike in number and dtype.
        arguments: the others; of the tensors, only the dtypes and the device are kept.
        blocks: what else the kernel is compiled for.
    """

    def __init__(
        self,
        kernel,
        launches: Iterable[tuple[tuple[int, int, int], tuple[torch.Tensor, ...]]],
        arguments: Arguments,
        blocks: Blocks | None = None,
    ):
        tensors, _, self.strides, self.constants = arguments
        self.kernel, self.blocks, self.device = kernel, blocks, tensors[0].device
        self.launches = [(grid, own) for grid, own in launches if 0 not in grid]
        own_pointers = [[x.data_ptr() for x in own] for _, own in self.launches]
        self.are_aligned = _are_aligned(pointer for of_launch in own_pointers for pointer in of_launch)
        self.grids = [(grid, own) for (grid, _), own in zip(self.launches, own_pointers, strict=True)]
        names = kernel.arg_names[len(kernel.arg_names) - len(self.constants) :]
        self.rest = *self.strides, *(self.constants[name] for name in names)
        dtypes = [x.dtype for x in (*tensors, *(x for _, own in self.launches[:1] for x in own))]
        kinds = [stride if stride <= 1 else (stride % 16 == 0, stride >= 2**31) for stride in self.strides]
        # Kernels live as long as their modules; their own hash takes as long as all of this
        self.kind = (id(kernel), self.device, *dtypes, *kinds, blocks, *self.constants.values())
        self.compiled = _compiled.get(self.kind)

    def __call__(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int | float]) -> None:
        """Launch, given tensors of the dtypes and strides of `arguments`, and its numbers or others."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(tensors, numbers)
        # Of a tensor Triton's launcher asks for its pointer, and the driver about that; a number is taken as it is
        pointers = [x.data_ptr() for x in tensors]
        is_aligned = self.are_aligned and _are_aligned(pointers)
        is_cuda = self.device.type == "cuda"
        if is_aligned and self.compiled is not None and all(x.is_cuda == is_cuda for x in tensors):
            for grid, own in self.grids:
                self.compiled[grid](*pointers, *own, *numbers, *self.rest)
            return
        options, compiled = {}, None
        if self.blocks is not None:
            options = dict(num_warps=self.blocks.warps)
            if self.blocks.registers is not None:
                options["maxnreg"] = self.blocks.registers
        for grid, own in self.launches:
            arguments = *tensors, *own, *numbers, *self.strides
            compiled = self.kernel[grid](*arguments, **self.constants, **options)
        if is_aligned and compiled is not None:  # Triton's interpreter returns nothing
            self.compiled = _compiled[self.kind] = compiled


def _are_aligned(pointers: Iterable[int]) -> bool:
    return all(pointer % 16 == 0 for pointer in pointers)


def launch(kernel, grid: tuple[int, int, int], arguments: Arguments, blocks: Blocks | None = None) -> None:
    """`kernel[grid](*tensors, *numbers, *strides, **constants)`, but faster, see `Launches`."""
    Launches(kernel, [(grid, ())], arguments, blocks)(arguments.tensors, arguments.numbers)
