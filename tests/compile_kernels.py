"""Compiles the Triton kernels for a GPU that need not be there, as far as Triton checks types, which its interpreter
does not; and wholly for the largest heads, whose blocks have to fit into shared memory. A program of its own, since
Triton decides when it is imported whether it interprets.

    python tests/compile_kernels.py        # prints the names of the kernels
"""

import functools
from collections.abc import Sequence

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.compiler.compiler import make_backend

from longnet_hf import (
    DilatedPattern,
    dilated_attention,
    dilated_kernels,
    dilated_operator,
    kernel_launch,
    one_token_kernels,
    pointwise_kernels,
)
from longnet_hf.dilated_past import PastTile
from longnet_hf.kernel_launch import Launches


HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 86, 32)
SHARED_MEMORY = {HOPPER: 227 << 10, AMPERE: 99 << 10}  # that a program may have there, in bytes
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
MIXED = DilatedPattern(
    [48, 300, 200, 20, None],
    [1, 5, 4, 1, 1],
    ["segment", "window", "segment", "sink", "window"],
    "rotating",
    shift=True,
    branch_heads=[[0], [0], [0], [0], [1]],
)
NONE_DENSE = DilatedPattern([64, 200], [2, 3])
PATTERNS = [MIXED, NONE_DENSE, DilatedPattern([64, 200], [1, 4]), DilatedPattern([64, 4], [1, 1], ["window", "sink"])]


def source_of(launches: Launches, tensors: Sequence[torch.Tensor], numbers: Sequence[int | float]) -> ASTSource:
    """Of the first of the launches, which are alike."""
    kernel, own = launches.kernel, launches.launches[0][1]
    arguments = *tensors, *own, *numbers, *launches.strides
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    kinds = {torch.Tensor: lambda x: TYPES[x.dtype], float: lambda x: "fp32", int: lambda x: "i32"}
    signature = {
        name: "constexpr" if name in launches.constants else kinds[type(values[name])](values[name])
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in launches.constants.items()}
    aligned = [(i,) for i, name in enumerate(kernel.arg_names) if isinstance(values.get(name), torch.Tensor | int)]
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    return ASTSource(kernel, signature, constexprs=places, attrs=attributes)


def check_types(launches: Launches, tensors: Sequence[torch.Tensor], numbers: Sequence[int | float]) -> None:
    """In place of launching."""
    if not launches.launches:
        return
    backend, context = make_backend(HOPPER), ir.context()
    options = backend.parse_options({"num_warps": launches.blocks.warps} if launches.blocks else {})
    ir.load_dialects(context)
    backend.load_dialects(context)
    modules = backend.get_module_map()
    source_of(launches, tensors, numbers).make_ir(
        HOPPER, options, backend.get_codegen_implementation(options), modules, context
    )
    compiled.add(launches.kernel.fn.__name__)


def check_shared_memory(
    launches: Launches, tensors: Sequence[torch.Tensor], numbers: Sequence[int | float], target=HOPPER
) -> None:
    """Likewise, of kernels in blocks."""
    blocks = launches.blocks
    if blocks is not None and launches.launches:
        options = dict(num_warps=blocks.warps)
        shared = compile(source_of(launches, tensors, numbers), target=target, options=options).metadata.shared
        assert shared <= SHARED_MEMORY[target], (launches.kernel, blocks, target, shared)


def attend(pattern: DilatedPattern, is_causal: bool, group: int, size: int = 64) -> None:
    q = torch.randn(1, 2 * group, 300, size, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 2, 300, size, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    dilated_attention(q, k, v, pattern, is_causal=is_causal).sum().backward()


def attend_to_past() -> None:
    query = torch.randn(1, 4, 40, 64, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 50, 64, dtype=torch.bfloat16)
    lse, grad_stored = query.new_zeros(query.shape[:3], dtype=torch.float32), torch.zeros(50, 128)
    heads = torch.arange(2)[:, None].expand(2, 40).contiguous()
    tile = PastTile("upper", heads, torch.arange(40).repeat(2, 1), (torch.arange(40).repeat(1, 2, 1),))
    past = dilated_kernels.PastAttention(query, keys, values, query.clone(), lse, [tile], 2, 0.125)
    dilated_kernels.triton_attend_to_past(past)
    dilated_kernels.triton_add_query_gradients(past, query, query.clone())
    dilated_kernels.triton_add_stored_gradients(past, query, grad_stored)


def attend_one_token(size: int, group: int, dtype: torch.dtype) -> None:
    query, keys = (torch.randn(1, heads, rows, size, dtype=dtype) for heads, rows in ((2 * group, 1), (2, 3000)))
    for seen in (torch.tensor([2000]), torch.ones(1, 2, 3000, dtype=torch.bool)):
        one_token_kernels.attend_one_token(query, keys, keys, seen, 0.125)


compiled: set[str] = set()
if __name__ == "__main__":
    dilated_operator.uses_triton = lambda query, dropout: True
    Launches.__call__ = check_types
    for pattern in PATTERNS:
        attend(pattern, True, 2)
    attend(MIXED, False, 1)
    attend_to_past()
    attend_one_token(64, 3, torch.bfloat16)
    row = torch.randn(4, 96, dtype=torch.bfloat16)
    for gate, activation, norm in ((None, "gelu", "layer"), (row, "silu", "rms"), (row, "relu", "none")):
        weight = None if norm == "none" else row[0]
        _, stats = pointwise_kernels.activate_rows(row, gate, weight, None, activation, norm, 1e-5)
        pointwise_kernels.activation_gradients(row, row, gate, weight, None, stats, activation, norm)
    heads = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    pointwise_kernels.rotate_rows(heads, heads, heads[0, :1], heads[0, :1], False)
    Launches.__call__ = check_shared_memory
    dilated_kernels.blocks_of = lambda x, kernel: kernel_launch._HOPPER_BLOCKS[256][kernel]
    attend(MIXED, True, 1, size=256)
    Launches.__call__ = functools.partialmethod(check_shared_memory, target=AMPERE)
    for dtype in (torch.bfloat16, torch.float32):
        attend_one_token(256, 64, dtype)
    print(*sorted(compiled))
