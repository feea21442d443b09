"""The small Triton kernels against plain PyTorch: without a GPU in Triton's interpreter, on a GPU as they are."""

import pytest
import torch
import torch.nn.functional as F
from comparisons import all_gradients
from models import build, every_kind, random_ids
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from longnet_hf import LongNetForCausalLM, pointwise
from longnet_hf import linear_cross_entropy as loss_module
from longnet_hf.linear_cross_entropy import linear_cross_entropy
from longnet_hf.pointwise import RMSNorm, activate, rotate


kernels = pytest.importorskip("longnet_hf.pointwise_kernels", reason="needs Triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    for module in (pointwise, loss_module):
        monkeypatch.setattr(module, "uses_triton", lambda x: x.dtype != torch.float64)


def assert_as_exact(ours, plain, inputs, dtype, *arguments):
    """Results and gradients of `ours` in a dtype are at most twice as far from float64's as those of `plain` are, and
    a rounding of the largest (Triton's interpreter cuts off where a GPU rounds)."""
    rounded = [x.to(DEVICE, dtype) for x in inputs]
    exact = [x.double() for x in rounded]
    results = []
    for function, tensors in ((plain, exact), (plain, rounded), (ours, rounded)):
        tensors = [x.detach().requires_grad_() for x in tensors]
        outputs = function(*tensors, *arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = [torch.randn(x.shape).bfloat16().to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, tensors, grads)
        results.append([x.detach().double() for x in (*outputs, *gradients)])
        assert function is plain or all(x.dtype == dtype for x in (*outputs[: len(tensors)], *gradients))
    for expected, theirs, got in zip(*results, strict=True):
        allowed = 2 * (theirs - expected).abs().max() + max(torch.finfo(dtype).eps, 2**-20) * expected.abs().max()
        assert (got - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "batch", "rows"), [((4, 2), 2, 1), ((3, 3), 2, 2), ((1, 1), 1, 1)])
def test_rotary_positions(heads, batch, rows, dtype):
    length, head_dim = 37, 10
    angles = torch.randn(rows, length, head_dim).to(DEVICE)
    inputs = [torch.randn(batch, length, h, head_dim).transpose(1, 2) for h in heads]

    def plain(query, key):
        return apply_rotary_pos_emb(query, key, angles.cos().to(query), angles.sin().to(query))

    def ours(query, key):
        return rotate(query, key, angles.cos().to(query), angles.sin().to(query))

    assert_as_exact(ours, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm, nn.Identity])
def test_activation_with_norm(norm, activation, gated, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    width, act_fn = 20, ACT2FN[activation]
    inputs = [torch.randn(2, 7, width) * 3 for _ in range(1 + gated)]
    if norm is not nn.Identity:
        inputs += [1 + torch.randn(width) for _ in range(1 + (norm is nn.LayerNorm))]

    def apply(function, tensors):
        module = norm(width, eps=1e-5) if norm is not nn.Identity else norm()
        for name, x in zip(("weight", "bias"), tensors[1 + gated :], strict=False):
            module._parameters.pop(name)
            setattr(module, name, x)  # a tensor through which gradients flow to the test's own
        return function(act_fn, module, *tensors[: 1 + gated])

    def plain_activate(act_fn, module, up, gate=None):
        return module(act_fn(up) if gate is None else act_fn(gate) * up)

    assert_as_exact(lambda *x: apply(activate, x), lambda *x: apply(plain_activate, x), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    def apply(norm, x, weight):
        module = norm(20, eps=1e-5)
        module._parameters.pop("weight")
        module.weight = weight
        return module(x)

    inputs = [torch.randn(2, 7, 20) * 3, 1 + torch.randn(20)]
    assert_as_exact(lambda *x: apply(RMSNorm, *x), lambda *x: apply(LlamaRMSNorm, *x), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "_MAX_BYTES", {})
    monkeypatch.setattr(loss_module, "_MAX_BYTES_ELSEWHERE", 97 * 4 * 9)
    monkeypatch.setattr(kernels, "_LOGITS_BLOCK", 32)
    labels = torch.randint(97, (31,), device=DEVICE)
    labels[3:7] = -100

    def plain(hidden_states, weight):
        logits = hidden_states @ weight.t()
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(exact, labels, reduction="sum").to(weight.dtype)

    def ours(hidden_states, weight):
        return linear_cross_entropy(hidden_states, weight, labels).to(weight.dtype)

    assert_as_exact(ours, plain, [torch.randn(31, 16), torch.randn(97, 16)], dtype)


def test_operators_pass_pytorchs_checks_and_compile_into_one_graph():
    torch.manual_seed(0)
    query, key = (torch.randn(2, 7, h, 6, device=DEVICE).transpose(1, 2).requires_grad_() for h in (4, 2))
    cos, sin = torch.randn(2, 1, 7, 6, device=DEVICE)
    rows, gate = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    norm = nn.LayerNorm(8, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(pointwise._rotate_op.custom_op, (query, key, cos, sin, False), test_utils=checks)
    options = (rows, gate, norm.weight, norm.bias, "gelu", "layer", 1e-5)
    torch.library.opcheck(pointwise._activate_op.custom_op, options, test_utils=checks)

    def function(query, key, rows, gate):
        return *rotate(query, key, cos, sin), activate(act_fn, norm, rows, gate)

    act_fn, inputs = ACT2FN["gelu"], (query, key, rows, gate)
    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    expected = function(*inputs)
    grads = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(outputs, inputs, grads) for outputs in (ours, expected))
    torch.testing.assert_close(*gradients)


@every_kind
def test_models_that_use_the_kernels(kind, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("where plain PyTorch would have to do without the attention's kernels, too")
    model, ids = build(LongNetForCausalLM, kind), random_ids(2, 30)
    loss = model(ids, labels=ids).loss
    gradients = all_gradients(model, loss)
    for module in (pointwise, loss_module):
        monkeypatch.setattr(module, "uses_triton", lambda x: False)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    for name, grad in all_gradients(model, expected).items():
        torch.testing.assert_close(gradients[name], grad, rtol=0, atol=1e-5)


def test_what_is_hooked_or_patched_is_called():
    """Weights that are not there, adapters, and anything else that a user puts into a module."""
    norm, up = nn.LayerNorm(8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    expected = activate(ACT2FN["gelu"], norm, up)
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(activate(ACT2FN["gelu"], norm, up), 2 * expected)
    patched = nn.LayerNorm(8, device=DEVICE)
    patched.forward = lambda x: 0 * x
    assert not activate(ACT2FN["gelu"], patched, up).any()

    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.testing.assert_close(activate(ACT2FN["gelu"], Doubled(8, device=DEVICE), up), 2 * expected)
