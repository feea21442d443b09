"""Operators that are one node to whatever looks at operators (compilers, policies of checkpoints, tracers), and cost
little where nothing looks: PyTorch's dispatch of a custom operator takes the CPU longer than several launches."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import flop_registry, register_flop_formula


_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Operator:
    """A function of tensors, with gradients: `operator(*inputs)`.

    Args:
        name: of the operator, in the namespace of its module. A second copy of the module (code that came with a
            model from the Hub) has another name, and so operators of its own.
        module_name: `__name__` of the module.
        function: computes new tensors, with the annotations that `torch.library.custom_op` asks for.
        fake: the same with nothing in the results.
        save: `save(ctx, inputs, output)` keeps what the backward pass needs.
        backward: `backward(ctx, *grads)` gives the gradients of the inputs. Without it the operator is itself a
            gradient: to take another is refused.
        flops: `flops(*inputs)` counts floating-point operations, for `torch.utils.flop_counter`.
        in_cuda_graphs: whether CUDA graphs may hold it. Not what looks at numbers of a tensor, or keeps tensors of its
            own between calls: `torch.compile(mode="reduce-overhead")` then makes graphs of what lies around it.
    """

    def __init__(
        self,
        name: str,
        module_name: str,
        function: Callable,
        fake: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
        flops: Callable[..., int] | None = None,
        in_cuda_graphs: bool = True,
    ):
        namespace = "".join(letter if letter.isalnum() else "_" for letter in module_name)
        tags = () if in_cuda_graphs else (torch.Tag.cudagraph_unsafe,)
        self.custom_op = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=(), tags=tags)
        self.custom_op.register_fake(fake)
        if flops is not None:
            packet = getattr(getattr(torch.ops, namespace), name)
            flop_registry.pop(packet, None)  # of the module before it was loaded again
            register_flop_formula(packet, get_raw=True)(lambda *inputs, out_val=None: flops(*inputs))
        self.is_gradient = backward is None
        if self.is_gradient:
            self.custom_op.register_autograd(_refuse_second_derivatives)
        else:
            self.custom_op.register_autograd(backward, setup_context=save)
            self.with_gradients = _autograd_function(function, save, backward).apply
        self.function = function

    def __call__(self, *inputs):
        needs_gradients = torch.is_grad_enabled()
        if is_watched(*inputs) or (self.is_gradient and needs_gradients):
            return self.custom_op(*inputs)
        return self.with_gradients(*inputs) if needs_gradients else self.function(*inputs)


def is_watched(*inputs) -> bool:
    """Whether something looks at operators, or one of the tensors is more than a tensor."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or any(isinstance(x, torch.Tensor) and type(x) not in _PLAIN for x in inputs)
    )


def _autograd_function(function: Callable, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
    def forward(ctx, *inputs):
        output = function(*inputs)
        save(ctx, inputs, output)
        return output

    members = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    return type("Unwatched", (torch.autograd.Function,), members)


def _refuse_second_derivatives(ctx, *grads):
    raise NotImplementedError("LongNet's operators have no second derivatives (`create_graph=True`).")
