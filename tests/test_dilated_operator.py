"""The fast operator against the dense oracle, and the oracle against the definition."""

import contextlib
import random

import pytest
import torch
from patterns import joined, random_pattern
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longnet_hf import DilatedPattern, dilated_attention, dilated_attention_reference, find_documents, full_heads
from longnet_hf import dilated_operator as operator_module
from longnet_hf import dilated_tiles as tiles_module
from longnet_hf.dilated_operator import dilated_attention_weights


PATTERN = DilatedPattern([8, 16, 40], [1, 2, 3], ["segment", "segment", "window"])


def random_tensors(batch, heads, group, queries, keys, size, dtype=torch.float64, device="cpu"):
    """query, key, value and a gradient; the query with strides as a model makes them."""
    query = torch.randn(batch, queries, heads * group, size, dtype=dtype, device=device).transpose(1, 2)
    key, value = (torch.randn(batch, heads, keys, size, dtype=dtype, device=device) for _ in range(2))
    return [x.requires_grad_() for x in (query, key, value)], torch.randn_like(query)


def random_layout(rng, batch, length):
    """Padding and packing in any of the ways in which they can be said, or neither."""
    layout, kind = {}, rng.choice(["none", "padding", "left", "right", "packed", "packed and padded", "cu_seq_lens"])
    if "padded" in kind or kind == "padding":
        layout["attention_mask"] = (torch.rand(batch, length) < rng.choice([0.2, 0.7, 0.95])).long()
    if kind in ("left", "right"):
        lengths = torch.tensor([rng.randint(0, length) for _ in range(batch)])
        mask = torch.arange(length) < lengths[:, None]
        layout["attention_mask"] = mask.flip(1) if kind == "left" else mask
    if "packed" in kind:
        rows = []
        for _ in range(batch):
            row = []
            while len(row) < length:
                row += range(rng.randint(1, 25))
            rows.append(row[:length])
        layout["position_ids"] = torch.tensor(rows)
    if kind == "cu_seq_lens":
        cuts = sorted(rng.sample(range(1, batch * length), min(3, batch * length - 1)))
        layout["cu_seq_lens"] = torch.tensor([0, *cuts, batch * length], dtype=torch.int32)
    return layout


def gradients(output, inputs, grad):
    return torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offset", ["paper", "grouped", "rotating"])
def test_oracle_is_one_softmax_over_the_joined_pairs(offset, causal):
    """Written out query by query as the paper's mixture: a softmax per branch, weighted by their denominators."""
    pattern = DilatedPattern([4, 7, 9], [1, 3, 2], ["segment", "segment", "window"], offset, shift=True, layer_idx=1)
    (query, key, value), _ = random_tensors(1, 2, 2, 19, 19, 4)
    output, weights = dilated_attention_reference(query, key, value, pattern, is_causal=causal, return_weights=True)
    for head in range(4):
        for n in range(19):
            numerator, denominator, mass = torch.zeros(4, dtype=torch.float64), 0.0, torch.zeros(19)
            for w, r, kind in zip(pattern.segment_lengths, pattern.dilation_rates, pattern.branch_types, strict=True):
                branch = DilatedPattern([w], [r], [kind], offset, shift=True, layer_idx=1)
                for m in range(19):
                    if joined(branch, n, m, head // 2, 2, causal):
                        z = (query[0, head, n] @ key[0, head // 2, m] / 2).exp()
                        numerator, denominator = numerator + z * value[0, head // 2, m], denominator + z
                        mass[m] += z.item()
            torch.testing.assert_close(output[0, head, n], numerator / denominator, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(weights[0, head, n].float(), mass / mass.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(150))
def test_fast_operator_agrees_with_the_oracle(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, group = rng.choice([1, 2]), rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2])
    pattern = random_pattern(rng, heads)
    keys = rng.choice([1, 2, 7, 13, 31, rng.randint(1, 70)])
    queries = rng.choice([keys, keys, 1, rng.randint(1, keys)])
    inputs, grad = random_tensors(batch, heads, group, queries, keys, rng.choice([1, 3, 8]))
    options = {"is_causal": rng.random() < 0.6, "scale": rng.choice([None, 0.3]), **random_layout(rng, batch, keys)}
    output = dilated_attention(*inputs, pattern, **options)
    expected = dilated_attention_reference(*inputs, pattern, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def mixture_over_padded_segments(query, key, value, pattern):
    """What torchscale's encoders compute for one document `[H, N, D]`: cut, pad with zeros, keep, attend, mix."""
    heads, length, size = query.shape
    numerator, denominator = torch.zeros_like(query), query.new_zeros(heads, length, 1)
    for branch in pattern.branches:
        w = min(branch.length, length)
        for head in filter(branch.belongs_to, range(heads)):
            phase = pattern.phase(branch, head, heads)
            for start in range(0, length, w):
                rows = range(start, start + -(-w // branch.rate) * branch.rate)[phase :: branch.rate]
                real = [row for row in rows if row < min(start + w, length)]
                zeros = query.new_zeros(len(rows) - len(real), size)
                keys, values = (torch.cat((x[head, real], zeros)) for x in (key, value))
                scores = (query[head, real] @ keys.T * size**-0.5).exp()
                numerator[head, real] = numerator[head, real] + scores @ values
                denominator[head, real] = denominator[head, real] + scores.sum(-1, keepdim=True)
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 0.0)


@pytest.mark.parametrize("attention", [dilated_attention, dilated_attention_reference])
@pytest.mark.parametrize("seed", range(12))
def test_keys_of_zeros_are_attended_to_in_each_document(seed, attention):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    branches = rng.randint(1, 4)
    lengths, rates = ([rng.randint(1, 24) for _ in range(branches)], [rng.randint(1, 6) for _ in range(branches)])
    owners = [rng.choice([None, (0,)]) for _ in range(branches)]
    pattern = DilatedPattern(lengths, rates, head_offset=rng.choice(["paper", "grouped"]), branch_heads=owners)
    documents = [rng.randint(1, 40) for _ in range(3)]
    ids = torch.tensor([n for n, length in enumerate(documents) for _ in range(length)] + [-1] * 3)
    ids = ids[torch.randperm(len(ids))] if rng.random() < 0.5 else ids
    (query, key, value), grad = random_tensors(1, rng.choice([1, 3, 4]), 1, len(ids), len(ids), 4)
    output = attention(query, key, value, pattern, is_causal=False, document_ids=ids[None], segment_padding="zeros")
    expected = torch.zeros_like(query)
    for n in range(3):
        parts = (x[0, :, ids == n] for x in (query, key, value))
        expected[0, :, ids == n] = mixture_over_padded_segments(*parts, pattern)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    inputs = query, key, value
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [37, 9])
def test_keys_of_zeros_for_the_last_queries_of_grouped_heads(queries):
    pattern = DilatedPattern([8, 16, 64], [1, 3, 5])
    inputs, grad = random_tensors(2, 2, 3, queries, 37, 4)
    options = dict(is_causal=False, segment_padding="zeros", attention_mask=torch.rand(2, 37) < 0.8)
    output, expected = (f(*inputs, pattern, **options) for f in (dilated_attention, dilated_attention_reference))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", [dilated_attention, dilated_attention_reference])
@pytest.mark.parametrize(("change", "reason"), [
    (dict(is_causal=True), "causal"), (dict(pattern=DilatedPattern([8, 16], [1, 2], ["segment", "window"])), "window"),
    (dict(pattern=DilatedPattern.full()), "window"), (dict(pattern=DilatedPattern([8], [1], shift=True)), "shift"),
    (dict(pattern=DilatedPattern([8, 2], [1, 1], ["segment", "sink"])), "sink"),
    (dict(segment_padding="ones"), "must be one of .*'none', 'zeros'.*'ones'"),
])  # fmt: skip
def test_keys_of_zeros_are_refused_where_they_have_no_meaning(change, reason, attention):
    (query, key, value), _ = random_tensors(1, 2, 1, 9, 9, 4)
    arguments = dict(pattern=DilatedPattern([8], [1]), is_causal=False, segment_padding="zeros") | change
    with pytest.raises(ValueError, match=f"`segment_padding.*{reason}"):
        attention(query, key, value, **arguments)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_of_chosen_rows_are_rows_of_all_weights(causal):
    pattern = DilatedPattern([8, 16, 40], [1, 2, 3])
    padding = "none" if causal else "zeros"
    (query, key, value), _ = random_tensors(2, 2, 2, 31, 31, 4)
    ids = torch.randint(-1, 3, (2, 31))
    options = dict(is_causal=causal, document_ids=ids, segment_padding=padding, scale=0.7)
    _, expected = dilated_attention_reference(query, key, value, pattern, return_weights=True, **options)
    rows = torch.tensor([30, 0, 7])
    weights = dilated_attention_weights(query[:, :, rows], key, pattern, rows, **options)
    torch.testing.assert_close(weights, expected[:, :, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_kernel_without_flash_attention_agrees_too(seed, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(tiles_module, "_MAX_SCORES", rng.choice([1, 50, 1 << 20]))
    monkeypatch.setattr(tiles_module.TileKernel, "forward", without_flash(tiles_module.TileKernel.forward))
    monkeypatch.setattr(tiles_module.TileKernel, "backward", without_flash(tiles_module.TileKernel.backward))
    test_fast_operator_agrees_with_the_oracle(1000 + seed)


def without_flash(method):
    def wrapped(kernel, *arguments):
        kernel.on_cpu = kernel.on_cuda = False
        return method(kernel, *arguments)

    return wrapped


@pytest.mark.parametrize("causal", [True, False])
def test_causal_rows_of_unequal_padding_are_computed_together(causal, monkeypatch):
    """Not one after the other, which takes as many calls of kernels as there are rows."""
    calls, forward = [], tiles_module.TileKernel.forward
    monkeypatch.setattr(
        tiles_module.TileKernel, "forward", lambda self, *args: calls.append(1) or forward(self, *args)
    )
    inputs, grad = random_tensors(6, 2, 2, 31, 31, 4)
    mask = torch.arange(31) < torch.tensor([31, 20, 17, 25, 30, 22])[:, None]
    for layout in ({"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        calls.clear()
        output = dilated_attention(*inputs, PATTERN, is_causal=causal, **layout)
        together = len(calls)
        expected = dilated_attention_reference(*inputs, PATTERN, is_causal=causal, **layout)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        calls.clear()
        dilated_attention(*inputs, PATTERN, is_causal=causal)
        assert (together == len(calls)) == causal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [[1], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_heads_may_be_computed_by_pytorchs_own_attention(heads, causal, monkeypatch):
    """As on a GPU for which that is faster."""
    monkeypatch.setattr(full_heads, "_is_suited", lambda query, key: True)
    pattern = DilatedPattern([7, 2], [1, 1], ["window", "sink"]).with_full_heads(heads, 5)
    inputs, grad = random_tensors(2, 5, 2, 31, 31, 4)
    for layout in ({}, {"attention_mask": torch.arange(31).expand(2, 31) > 3}):
        output = dilated_attention(*inputs, pattern, is_causal=causal, scale=0.3, **layout)
        expected = dilated_attention_reference(*inputs, pattern, is_causal=causal, scale=0.3, **layout)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert full_heads.find_full_heads(*inputs[:2], pattern) == tuple(heads)


@pytest.mark.parametrize("heads", [[], [1], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_what_is_kept_is_not_computed_again(heads, monkeypatch):
    """With the heads that PyTorch's own attention computes, too."""
    monkeypatch.setattr(full_heads, "_is_suited", lambda query, key: True)
    on_cpus = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    monkeypatch.setattr(full_heads, "_OPERATORS", [on_cpus])
    pattern, kept = DilatedPattern([7, 2], [1, 1], ["window", "sink"]), {}
    if heads:
        pattern = pattern.with_full_heads(heads, 5)
    inputs, grad = random_tensors(2, 5, 2, 31, 31, 4)
    expected = dilated_attention(*inputs, pattern)
    expected_grads = gradients(expected, inputs, grad)
    for needs_grad in (True, False):  # not in a reentrant checkpoint
        with torch.set_grad_enabled(needs_grad):
            torch.testing.assert_close(dilated_attention(*inputs, pattern, kept=kept), expected, rtol=0, atol=0)
        output = dilated_attention(*inputs, pattern, kept=kept)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        for ours, theirs in zip(gradients(output, inputs, grad), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert not kept
    dilated_attention(*inputs, pattern, kept=kept)
    query, key, value = inputs
    assert torch.equal(dilated_attention(query, key, 2 * value, pattern, kept=kept), expected)


@pytest.mark.parametrize("layout", ["b n (d h) -> b h n d", "every second", "d before n", "expanded"])
@pytest.mark.parametrize("masked", [False, True])
def test_any_strides(layout, masked):
    def tensor():
        if layout == "b n (d h) -> b h n d":
            return torch.randn(2, 30, 8, 4, dtype=torch.float64).permute(0, 3, 1, 2)
        if layout == "every second":
            return torch.randn(2, 4, 30, 16, dtype=torch.float64)[..., ::2]
        if layout == "d before n":
            return torch.randn(2, 4, 8, 30, dtype=torch.float64).transpose(2, 3)
        return torch.randn(2, 4, 30, 1, dtype=torch.float64).expand(-1, -1, -1, 8)

    *inputs, grad = (tensor() for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    mask = {"attention_mask": torch.arange(30).expand(2, 30) > 3} if masked else {}
    output, expected = (f(*inputs, PATTERN, **mask) for f in (dilated_attention, dilated_attention_reference))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_longer_sequences_with_many_segments(causal):
    pattern = DilatedPattern([64, 200, 500, 96], [1, 4, 7, 6], ["segment", "segment", "segment", "window"], shift=True)
    inputs, grad = random_tensors(1, 4, 1, 1201, 1201, 8)
    output = dilated_attention(*inputs, pattern, is_causal=causal)
    expected = dilated_attention_reference(*inputs, pattern, is_causal=causal)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("operator", [dilated_attention, dilated_attention_reference])
def test_padded_and_packed_rows_equal_each_document_alone(operator):
    torch.manual_seed(1)
    (query, key, value), _ = random_tensors(2, 3, 1, 60, 60, 4)
    # row 0: two documents with padding before, between, inside and after; row 1: one document
    ids = torch.full((2, 60), -1)
    ids[0, 3:20], ids[0, 24:55], ids[0, 30:33], ids[1, :60] = 0, 1, -1, 0
    position = torch.zeros(2, 60, dtype=torch.long)
    position[0, 3:20], position[0, 24:55], position[1] = torch.arange(17), torch.arange(31), torch.arange(60)
    layouts = [{"document_ids": ids}, {"attention_mask": (ids >= 0).long(), "position_ids": position}]
    for layout in layouts:
        output = operator(query, key, value, PATTERN, **layout)
        for row, document in ((0, 0), (0, 1), (1, 0)):
            at = (ids[row] == document).nonzero()[:, 0]
            alone = operator(*(x[row : row + 1, :, at] for x in (query, key, value)), PATTERN)
            torch.testing.assert_close(output[row : row + 1, :, at], alone, rtol=0, atol=1e-12)
        assert (output.transpose(1, 2)[ids < 0] == 0).all()


@pytest.mark.parametrize("operator", [dilated_attention, dilated_attention_reference])
def test_queries_that_no_branch_joins_and_masked_rows_give_zeros_not_nan(operator):
    inputs, grad = random_tensors(2, 2, 1, 12, 12, 4)
    output = operator(*inputs, DilatedPattern([6], [2]))
    assert (output[:, 0, 1::2] == 0).all() and (output[:, 1, 0::2] == 0).all() and (output[:, 0, 0::2] != 0).all()
    mask = torch.tensor([[0] * 12, [1] * 12])
    output = operator(*inputs, PATTERN, attention_mask=mask)
    assert (output[0] == 0).all() and (output[1] != 0).all()
    for gradient in gradients(output, inputs, grad):
        assert gradient.isfinite().all() and (gradient[0] == 0).all()
    assert (operator(*inputs, PATTERN, attention_mask=torch.zeros(2, 12)) == 0).all()


@pytest.mark.parametrize("operator", [dilated_attention, dilated_attention_reference])
def test_padding_may_hold_anything(operator):
    inputs, _ = random_tensors(1, 2, 1, 20, 20, 4)
    mask = torch.arange(20)[None] >= 5
    spoiled = [x.detach().masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    expected = operator(*inputs, PATTERN, attention_mask=mask)
    assert torch.equal(operator(*spoiled, PATTERN, attention_mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 33, 100])
def test_nan_goes_in_and_comes_out(length, dtype):
    """In every tile, however small: a broken weight must show in the loss."""
    patterns = DilatedPattern([4, 16], [1, 2]), DilatedPattern([5, 30], [1, 3], ["window"] * 2)
    for pattern in patterns:
        for which in (0, 1):
            inputs = list(torch.randn(3, 1, 2, length, 8).to(dtype))
            inputs[which][0, 0, length // 2, 3] = torch.nan
            inputs = [x.requires_grad_() for x in inputs]
            expected, output = (f(*inputs, pattern) for f in (dilated_attention_reference, dilated_attention))
            assert torch.equal(output.isnan(), expected.isnan()) and output.isnan().any()
            for grad in gradients(output, inputs, torch.ones_like(output))[:2]:
                assert grad[0, 0, length // 2].isnan().all() and not grad[0, 1].isnan().any()


@pytest.mark.parametrize("fake", [False, True])
def test_pytorchs_counter_of_operations_knows_the_operator(fake):
    """The pairs that are joined, document by document, and not those of full attention."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        (query, key, value), grad = random_tensors(2, 2, 3, 20, 50, 8, dtype=torch.float32)
        mask = torch.ones(2, 50, dtype=torch.int64)
    rows = [(50, 20), (50, 20)]
    if not fake:
        mask[0, :10] = mask[1, :35] = 0
        rows = [(40, 20), (15, 15)]
    pairs = sum(PATTERN.pairs(length, 2, num_queries=queries) for length, queries in rows)
    layout = {} if fake else {"attention_mask": mask}
    with FlopCounterMode(display=False) as counter:
        output = dilated_attention(query, key, value, PATTERN, **layout)
    assert counter.get_total_flops() == 4 * 8 * 3 * pairs
    with counter:
        output.backward(grad)
    assert counter.get_total_flops() == 10 * 8 * 3 * pairs


def test_forward_mode_derivatives_are_refused_in_words():
    (query, key, value), _ = random_tensors(1, 2, 1, 9, 9, 4)
    expected = torch.func.jvp(lambda x: dilated_attention_reference(x, key, value, PATTERN), (query,), (query,))[1]
    assert expected.abs().max() > 0.1
    for index, x in enumerate((query, key, value)):

        def attend(x, index=index):
            inputs = [query, key, value]
            inputs[index] = x
            return dilated_attention(*inputs, PATTERN)

        for derivative in (lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x)):
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives.*eager"):
                derivative(attend, x)


def test_second_derivatives_are_refused_in_words():
    inputs, grad = random_tensors(1, 2, 1, 20, 20, 4)
    output = dilated_attention(*inputs, PATTERN)
    first = torch.autograd.grad(output, inputs, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(first[0].sum(), inputs)


def test_full_attention_is_what_pytorch_computes():
    inputs, _ = random_tensors(2, 4, 1, 33, 33, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    for pattern in (DilatedPattern.full(), DilatedPattern([33], [1]), DilatedPattern([100], [1], ["window"])):
        torch.testing.assert_close(dilated_attention(*inputs, pattern), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_low_precision_is_that_of_ordinary_attention(dtype):
    """At most twice the error of PyTorch's own attention in that precision, under a mask of the same pattern."""
    pattern = DilatedPattern([64, 256], [1, 4])
    exact, grad = random_tensors(1, 4, 1, 256, 256, 32)
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    expected = dilated_attention_reference(*exact, pattern)
    counts = pattern.multiplicity(torch.arange(256)[:, None], torch.arange(256), torch.arange(4)[:, None, None], 4)
    plain = torch.nn.functional.scaled_dot_product_attention(*low, attn_mask=counts.log().to(dtype))
    ours = dilated_attention(*low, pattern)
    assert ours.dtype == dtype
    assert (ours - expected).norm() <= 2 * (plain - expected).norm()
    exact_grads = gradients(expected, exact, grad)
    for our, other, right in zip(
        gradients(ours, low, grad.to(dtype)), gradients(plain, low, grad.to(dtype)), exact_grads, strict=True
    ):
        assert (our - right).norm() <= 2 * (other - right).norm()


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_rates_beyond_the_text(queries):
    """Of which a branch keeps one key or none: that is all the work there is."""
    pattern = DilatedPattern([8, 2**35, 2**35], [1, 2**30, 41], ["segment", "window", "window"], "rotating")
    inputs, grad = random_tensors(1, 3, 1, queries, 40, 4, torch.float64)
    output, expected = (f(*inputs, pattern) for f in (dilated_attention, dilated_attention_reference))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_large_scores_stay_finite():
    (query, key, value), grad = random_tensors(1, 2, 1, 40, 40, 4)
    inputs = [(1e4 * query).detach().requires_grad_(), key, value]
    output = dilated_attention(*inputs, PATTERN)
    assert output.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(output, inputs, grad))


def test_dropout_drops_weights_and_keeps_the_mean():
    torch.manual_seed(2)
    inputs, grad = random_tensors(1, 2, 1, 30, 30, 4)
    exact = dilated_attention(*inputs, PATTERN)
    runs = torch.stack([dilated_attention(*inputs, PATTERN, dropout=0.3).detach() for _ in range(600)])
    assert (runs[0] - exact).abs().max() > 0.05
    deviation = (runs.mean(0) - exact).abs() / (runs.std(0) / 600**0.5 + 1e-9)
    assert deviation.mean() < 1.2  # 0.8 for a normal distribution


def test_gradients_under_dropout_are_those_of_the_same_random_draw():
    inputs, _ = random_tensors(1, 2, 1, 13, 13, 3)

    def draw(*inputs):
        torch.manual_seed(3)
        return dilated_attention(*inputs, PATTERN, dropout=0.4)

    assert torch.autograd.gradcheck(draw, inputs)
    torch.manual_seed(3)
    inside = torch.utils.checkpoint.checkpoint(
        lambda *inputs: dilated_attention(*inputs, PATTERN, dropout=0.4), *inputs, use_reentrant=False
    )
    for ours, theirs in zip(
        gradients(inside.sum(), inputs, None), gradients(draw(*inputs).sum(), inputs, None), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kept", "dropout"), [(True, 0.0), ([], 0.0), ({}, 0.5)])
def test_what_cannot_be_kept_is_refused(kept, dropout):
    inputs, _ = random_tensors(1, 2, 2, 8, 8, 4)
    with pytest.raises(ValueError, match="`kept` must be a dict, with a `dropout` of 0, or None, got"):
        dilated_attention(*inputs, PATTERN, kept=kept, dropout=dropout)


def test_cuda_graphs_leave_out_what_looks_at_numbers():
    """The operator asks where documents lie, and keeps tables: `mode="reduce-overhead"` makes graphs around it."""
    for operator in (operator_module._forward_op, operator_module.backward_op):
        assert torch.Tag.cudagraph_unsafe in operator.custom_op._opoverload.tags


def test_compiles_into_one_graph_and_passes_pytorchs_checks_of_custom_operators():
    inputs, grad = random_tensors(2, 2, 2, 21, 21, 4)
    mask = torch.ones(2, 21)
    mask[0, :5] = 0
    compiled = torch.compile(dilated_attention, fullgraph=True, backend="aot_eager")
    for layout in ({}, {"attention_mask": mask}):
        output, expected = compiled(*inputs, PATTERN, **layout), dilated_attention(*inputs, PATTERN, **layout)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    documents = find_documents(2, 21, attention_mask=mask)
    for pattern, is_causal, pads_segments in ((PATTERN, True, False), (DilatedPattern([8], [1]), False, True)):
        arguments = (*inputs, documents, pattern.to_json(), is_causal, 0.5, 0.0, None, pads_segments)
        torch.library.opcheck(operator_module._forward_op.custom_op, arguments)


def test_autocast_brings_mixed_inputs_to_its_dtype():
    (query, key, value), _ = random_tensors(1, 2, 1, 16, 16, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dilated_attention(query, key, value.bfloat16(), PATTERN).dtype == torch.bfloat16
    low = [x.bfloat16() for x in (query, key, value)]
    for dropout in (0.0, 0.2):  # and that is all that it does, in either kernel
        torch.manual_seed(4)
        expected = dilated_attention(*low, PATTERN, dropout=dropout)
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(dilated_attention(query, key, value, PATTERN, dropout=dropout), expected)


def test_memory_is_linear_in_the_length():
    """What a forward and backward pass allocates, per token, does not grow."""

    def peak(length):
        inputs, grad = random_tensors(1, 2, 1, length, length, 8, dtype=torch.float32)
        pattern = DilatedPattern([64, 256, 1024], [1, 4, 16])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            gradients(dilated_attention(*inputs, pattern), inputs, grad)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    assert peak(16384) < 2.2 * peak(8192)


def test_documents_are_found_in_any_notation():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1]])
    expected = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3]], dtype=torch.int32)
    assert torch.equal(find_documents(1, 8, position_ids=position_ids), expected)
    cu_seq_lens = torch.tensor([0, 3, 5, 6, 8], dtype=torch.int32)
    assert torch.equal(find_documents(1, 8, cu_seq_lens=cu_seq_lens), expected)
    # boundaries of a flattened batch of two rows
    found = find_documents(2, 4, cu_seq_lens=cu_seq_lens)
    assert found.tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    # positions may skip: that is no new document; padding has no position
    assert find_documents(1, 4, position_ids=torch.tensor([[5, 6, 90, 91]])) is None
    mask = torch.tensor([[0, 0, 1, 1, 0, 1]])
    assert find_documents(1, 6, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 1, 2]])).tolist() == [
        [-1, -1, 0, 0, -1, 0]
    ]
    assert find_documents(1, 8) is None
    assert find_documents(2, 8, attention_mask=torch.ones(2, 8), position_ids=torch.arange(8)[None]) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(query=torch.randn(1, 3, 8, 4)), "multiple of the key/value heads"),
        (dict(query=torch.randn(1, 2, 9, 4)), "at least as many keys"),
        (dict(query=torch.randn(1, 2, 8, 5)), "head sizes"),
        (dict(query=torch.randn(2, 8, 4)), "expected query"),
        (dict(value=torch.randn(1, 2, 7, 4)), "expected query"),
        (dict(value=torch.randn(1, 2, 8, 4).double()), "floating dtype"),
        (dict(pattern=[8]), "`pattern`"),
        (dict(dropout=1.0), "`dropout`"),
        (dict(scale=0.0), "`scale` must be a number of at least 1.17"),
        (dict(scale=-1.0), "`scale` must be a number of at least 1.17"),
        (dict(scale=torch.tensor(0.5)), "`scale` must be a number of at least 1.17"),
        (dict(attention_mask=torch.ones(1, 1, 8, 8)), "`attention_mask` must be a 2-D"),
        (dict(attention_mask=torch.ones(1, 7)), "`attention_mask`"),
        (dict(position_ids=torch.arange(7)[None]), "`position_ids`"),
        (dict(cu_seq_lens=torch.tensor([[0, 8]])), "`cu_seq_lens`"),
        (dict(cu_seq_lens=torch.tensor([0, 7])), "`cu_seq_lens` must grow from 0 to 8"),
        (dict(cu_seq_lens=torch.tensor([0, 5, 3, 8])), "`cu_seq_lens` must grow from 0 to 8"),
        (dict(document_ids=torch.zeros(1, 7)), "`document_ids`"),
        (dict(document_ids=torch.zeros(1, 8), attention_mask=torch.ones(1, 8)), "`document_ids` replaces"),
    ],
)
@pytest.mark.parametrize("operator", [dilated_attention, dilated_attention_reference])
def test_wrong_inputs_are_named(operator, change, named):
    arguments = {name: torch.randn(1, 2, 8, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=named):
        operator(**{"pattern": PATTERN, **arguments, **change})


def test_compiled_documents_are_numbered_in_the_same_dtype():
    """Inductor takes a running sum of a constant for int64, whatever its dtype, and then misreads it."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = torch.compile(find_documents)(2, 3, attention_mask=mask)
    assert found.dtype == torch.int32 and found.tolist() == [[-1, 0, 0], [0, 0, 0]]
