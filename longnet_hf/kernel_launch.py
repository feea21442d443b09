"""How Triton kernels are launched: where they run, the shapes of programs, and a way past Triton's own launcher, which
takes longer than many of the launches. Needs no Triton itself."""

import os
from collections.abc import Sequence
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
        is_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
        table = _HOPPER_BLOCKS if is_hopper else _OTHER_BLOCKS
    return table[max(64, padded(x.shape[-1]))][kernel]


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


def row_constants(query: torch.Tensor, blocks: Blocks) -> dict:
    """What any kernel is compiled for that multiplies rows of queries and keys."""
    exact = query.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return dict(
        HEAD_DIM=query.shape[3],
        BLOCK_D=padded(query.shape[3]),
        PRECISION="ieee" if exact else "tf32",
        STAGES=blocks.stages,
    )


_compiled = {}


def launch(kernel, grid: tuple[int, int, int], arguments: Arguments, blocks: Blocks | None = None) -> None:
    """`kernel[grid](*tensors, *numbers, *strides, **constants)`, but faster: Triton looks at every argument of every
    call to find the kernel that it compiled for such arguments, this at those that can make a difference."""
    launch_each(kernel, [(grid, ())], arguments, blocks)


def launch_each(
    kernel,
    launches: Sequence[tuple[tuple[int, int, int], tuple[torch.Tensor, ...]]],
    arguments: Arguments,
    blocks: Blocks | None = None,
) -> None:
    """`launch` for several grids, one after another, each with further tensors, which are alike in number and dtype
    and follow the tensors that all have."""
    launches = [(grid, own) for grid, own in launches if 0 not in grid]
    if not launches:
        return
    tensors, numbers, strides, constants = arguments
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch_each(kernel, launches, arguments, blocks)
    kind = tuple(stride if stride <= 1 else (stride % 16 == 0, stride >= 2**31) for stride in strides)
    dtypes = (x.dtype for x in (*tensors, *launches[0][1]))
    kind = (kernel, device, *dtypes, kind, blocks, *constants.values())
    is_aligned = all(x.data_ptr() % 16 == 0 for x in (*tensors, *(x for _, own in launches for x in own)))
    compiled = _compiled.get(kind) if is_aligned else None
    if compiled is not None:
        in_order = [constants[name] for name in kernel.arg_names[-len(constants) :]]
        for grid, own in launches:
            compiled[grid](*tensors, *own, *numbers, *strides, *in_order)
        return
    options = {}
    if blocks is not None:
        options = dict(num_warps=blocks.warps)
        if blocks.registers is not None:
            options["maxnreg"] = blocks.registers
    for grid, own in launches:
        compiled = kernel[grid](*tensors, *own, *numbers, *strides, **constants, **options)
    if is_aligned and compiled is not None:  # Triton's interpreter returns nothing
        _compiled[kind] = compiled
