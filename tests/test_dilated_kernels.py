"""The Triton kernels against the dense oracle: without a GPU in Triton's interpreter, on a GPU as they are."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patterns import random_pattern
from test_dilated_operator import gradients, random_layout, random_tensors

from longnet_hf import (
    DilatedCache,
    DilatedPattern,
    LongNetConfig,
    LongNetForCausalLM,
    dilated_attention,
    dilated_attention_reference,
    dilated_cache,
    find_documents,
    full_heads,
    input_checks,
)
from longnet_hf import dilated_operator as operator_module
from longnet_hf import dilated_past as past_module
from longnet_hf.dilated_past import PastTile, attend_to_past, past_gradients, past_tiles
from longnet_hf.dilated_tiles import TileKernel
from longnet_hf.documents import BatchDocuments, Document


kernels = pytest.importorskip("longnet_hf.dilated_kernels", reason="needs Triton", exc_type=ImportError)
one_token_kernels = pytest.importorskip("longnet_hf.one_token_kernels", reason="needs Triton", exc_type=ImportError)
dilated_plan = pytest.importorskip("longnet_hf.dilated_plan", reason="needs Triton", exc_type=ImportError)
kernel_launch = pytest.importorskip("longnet_hf.kernel_launch", reason="needs Triton", exc_type=ImportError)
Blocks = kernel_launch.Blocks
attend_one_token = one_token_kernels.attend_one_token

PAPER = DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
MIXED = DilatedPattern(
    [48, 300, None], [1, 5, 1], ["segment", "window", "window"], "rotating", shift=True, layer_idx=1
)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels that run on the CPU, in blocks small enough for short sequences to have many."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels run as they are")
    monkeypatch.setattr(operator_module, "uses_triton", lambda query, dropout: True)
    blocks = dict.fromkeys(("forward", "queries", "keys"), Blocks(16, 16, 4, 1))
    monkeypatch.setattr(kernel_launch, "_FLOAT32_BLOCKS", {64: blocks})
    monkeypatch.setattr(dilated_plan, "_SINK_CHUNK", 16)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("seed", range(24))
def test_kernels_agree_with_the_oracle(seed, interpreted):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, group = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2])
    pattern = random_pattern(rng, heads)
    if seed % 2:  # segments longer than blocks
        lengths = [w and w * rng.choice([1, 4, 8]) for w in pattern.segment_lengths]
        pattern = replace(pattern, segment_lengths=lengths, offset=0)
    keys = rng.choice([1, 7, 31, rng.randint(1, 70)]) if seed % 4 else rng.randint(60, 100)
    queries = rng.choice([keys, keys, 1, rng.randint(1, keys)])
    inputs, grad = random_tensors(batch, heads, group, queries, keys, rng.choice([1, 3, 16]), torch.float32)
    options = {"is_causal": rng.random() < 0.6, "scale": rng.choice([None, 0.3]), **random_layout(rng, batch, keys)}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = dilated_attention(*inputs, pattern, **options)
    expected = dilated_attention_reference(*exact, pattern, **options)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


def one_token_inputs(seed, device, dtype):
    """Queries, keys, values and which slots are seen (a mask, or how many), where the others hold NaN; and what they
    give."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, group, size = rng.choice([1, 3]), rng.choice([1, 2]), rng.choice([1, 3, 20]), rng.choice([3, 16, 40])
    slots = rng.choice([1, 37, 700, 1500])
    counts = torch.tensor([rng.choice([0, 1, slots, rng.randint(1, slots)]) for _ in range(batch)], device=device)
    query = torch.randn(batch, size, 1, heads * group, device=device, dtype=dtype).transpose(1, 3)
    keys, values = (torch.randn(batch, slots, heads, size, device=device, dtype=dtype).transpose(1, 2) for _ in "kv")
    seen = (torch.arange(slots, device=device) < counts[:, None])[:, None]  # [B, heads or 1, S]
    argument = counts
    if seed % 2:
        argument = seen = seen & (torch.rand(batch, rng.choice([1, heads]), slots, device=device) < rng.random())
        if seed % 4 == 3:  # whose slots do not lie side by side
            argument = seen.transpose(1, 2).contiguous().transpose(1, 2)
    exact = [x.double() for x in (query, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1))]
    seen = seen.expand(-1, heads, -1)
    of_query = seen.repeat_interleave(group, 1)
    scores = (exact[0] @ exact[1].transpose(-1, -2) * 0.7).masked_fill(~of_query[:, :, None], -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ exact[2]
    for x in (keys, values):
        x.masked_fill_(~seen[..., None], torch.nan)
    return query, keys, values, argument, expected


@pytest.mark.parametrize("seed", range(16))
def test_one_token_attends_to_what_a_cache_holds(seed, interpreted, monkeypatch):
    monkeypatch.setattr(one_token_kernels, "_MIN_PIECE", 64)
    *inputs, expected = one_token_inputs(seed, "cpu", torch.float32)
    output = attend_one_token(*inputs, 0.7)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    torch.compiler.reset()  # or the last seeds would be refused another compilation
    assert torch.equal(torch.compile(attend_one_token, backend="aot_eager", fullgraph=True)(*inputs, 0.7), output)


def test_heads_of_a_cache_may_lie_further_apart_than_int32_counts(interpreted, tmp_path):
    # 3 heads of 2 ** 30 numbers each, in a sparse file, which has room for what a wrapped offset reads
    size = 16
    storage = torch.from_file(str(tmp_path / "cache"), shared=True, size=2**32 + 2**10, dtype=torch.float16)
    stored = storage.as_strided((1, 3, 8, size), (0, 2**30, size, 1), 2**31)
    stored.copy_(torch.randn(stored.shape))
    query, near = torch.randn(1, 3, 1, size).half(), torch.randn(stored.shape).half()
    for keys, values in ((stored, near), (near, stored)):
        expected = (query.double() @ keys.double().mT * 0.5).softmax(-1) @ values.double()
        output = attend_one_token(query, keys, values, torch.tensor([8]), 0.5)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("is_causal", [True, False])
def test_offsets_of_32_bits_reach_as_far_as_the_rows(is_causal, interpreted, tmp_path, monkeypatch):
    """Rows so far apart that a block of kept ones would span more, if the sequence were as long."""
    constants, wide = kernels._constants, []
    monkeypatch.setattr(kernels, "_constants", lambda *x: wide.append(constants(*x)["WIDE"]) or constants(*x))
    length, size = 190, 8
    step, tensors = (2**31 - 1) // length, []
    for name in "qkv":  # sparse files
        storage = torch.from_file(str(tmp_path / name), shared=True, size=length * step + size, dtype=torch.float32)
        x = storage.as_strided((1, 1, length, size), (0, 0, step, 1))
        tensors.append(x.copy_(torch.randn(x.shape)))
    pattern = DilatedPattern([24, 90, 150, 300], [1, 40, 90, 17], ["segment", "segment", "segment", "window"])
    output = kernels.triton_forward(
        kernels.Attention(*tensors, pattern, (Document(0, 0, 0, length, 0),), is_causal, 0.3)
    )[0]
    near = [x.contiguous() for x in tensors]
    expected = dilated_attention_reference(*near, pattern, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert wide == [False]


def test_a_cache_gives_single_tokens_to_the_kernel(interpreted, monkeypatch):
    """Padding inside, beams, and tokens that are taken back; a scale that is an int would be another kernel."""
    scales = []
    attend = dilated_cache.attend_one_token
    monkeypatch.setattr(dilated_cache, "attend_one_token", lambda *x: scales.append(x[-1]) or attend(*x))
    monkeypatch.setattr(dilated_cache, "uses_triton", lambda query, dropout: True)
    monkeypatch.setattr(one_token_kernels, "_MIN_PIECE", 16)
    pattern = DilatedPattern([7, 3], [1, 1], ["window", "sink"]).with_full_heads([0, 2], 3)
    cache = DilatedCache.for_patterns([pattern], reserve=4)
    inputs, _ = random_tensors(3, 3, 2, 60, 60, 8, torch.float32)
    inputs = [x.detach() for x in inputs]
    mask = torch.rand(3, 60) < torch.tensor([[1.0], [0.7], [0.5]])
    mask[2, :52] = False

    def take(start, stop):
        q, k, v = (x[:, :, start:stop] for x in inputs)
        tokens = cache.count_tokens(3, stop - start, "cpu", mask[:, start:stop])
        output = cache.attend(q, k, v, 0, tokens, scale=1)
        expected = dilated_attention_reference(*inputs, pattern, scale=1, attention_mask=mask)[:, :, start:stop]
        torch.testing.assert_close(output * mask[:, None, start:stop, None], expected, rtol=0, atol=1e-4)

    take(0, 48)
    for number in range(48, 54):
        take(number, number + 1)
    cache.crop(-3)
    beams = torch.tensor([2, 1, 1])
    cache.reorder_cache(beams)
    inputs, mask = [torch.cat((x[beams, :, :51], x[:, :, 51:]), 2) for x in inputs], mask[beams]
    for number in range(51, 58):
        take(number, number + 1)
    assert scales == [1.0] * 26 and {*map(type, scales)} == {float}  # of full heads, and of the others


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(8))
def test_one_token_attends_to_what_a_cache_holds_on_a_gpu(seed, dtype):
    *inputs, expected = one_token_inputs(seed, "cuda", dtype)
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend_one_token(*inputs, 0.7).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", [{}, {"attention_mask": (torch.arange(53) < torch.tensor([[53], [30]])).long()}])
def test_keys_of_zeros_after_the_kernels(layout, interpreted):
    inputs, grad = random_tensors(2, 3, 2, 53, 53, 8, torch.float32)
    pattern, options = DilatedPattern([16, 36, 90], [1, 3, 5]), dict(is_causal=False, segment_padding="zeros")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = dilated_attention(*inputs, pattern, **options, **layout)
    expected = dilated_attention_reference(*exact, pattern, **options, **layout)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


def test_offsets_of_64_bits_agree_too(interpreted, monkeypatch):
    """Very large rates need them; the interpreter would not need as many numbers as a GPU does."""
    constants = kernels._constants
    monkeypatch.setattr(kernels, "_constants", lambda *arguments: constants(*arguments) | {"WIDE": True})
    inputs, grad = random_tensors(1, 2, 1, 90, 90, 8, torch.float32)
    output, expected = (f(*inputs, MIXED) for f in (dilated_attention, dilated_attention_reference))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        DilatedPattern([24, 50, 70, 90], [1, 17, 20, 40], ["segment", "segment", "window", "segment"]),
        DilatedPattern(
            [20, 30, 40, 50, 70], [1, 2, 2, 2, 3], ["segment"] * 2 + ["window"] + ["segment"] * 2, shift=True
        ),
        DilatedPattern([3, 5, 9, 60], [1, 2, 3, 2], head_offset="rotating"),
        DilatedPattern([24, 50], [2, 3]),
        DilatedPattern([24, 50], [2, 3], branch_heads=[[0], [1]]),
        DilatedPattern([40, 60], [3, 4], ["window", "segment"]),
        DilatedPattern([8, 2**35, 2**35], [1, 2**30, 2**30 - 1], ["segment", "window", "segment"], shift=True),
        DilatedPattern([8, 2**33 - 3, 2**33 + 1], [1, 7, 1], offset=2**34 - 40),
    ],
    ids="large rates,equal rates,short segments,none dense,heads without any,window,largest,far".split(","),
)
def test_dilated_branches_go_on_with_what_was_computed_before(pattern, is_causal, interpreted):
    """Rows that one branch keeps, or several, or none; in segments shorter than a block. Of packed documents, too, and
    after a past: the last queries alone."""
    inputs, grad = random_tensors(1, 3, 1, 70, 90, 8, torch.float32)
    options = dict(is_causal=is_causal, document_ids=torch.tensor([[0] * 57 + [1] * 30 + [-1] * 3]))
    output, expected = (f(*inputs, pattern, **options) for f in (dilated_attention, dilated_attention_reference))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(output, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_error_in_16_bits_of_rows_that_several_branches_keep(interpreted):
    """Every branch rounds what it goes on with: the worst element is three times as far off as the oracle's in the
    same precision, at most."""
    pattern = DilatedPattern([8, 16, 32, 64, 128], [1, 2, 4, 6, 12])
    exact, grad = random_tensors(1, 2, 1, 120, 120, 16, torch.float64)
    low = [x.detach().half().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]
    ours, plain, right = (
        (output, *gradients(output, inputs, grad.to(output.dtype)))
        for attend, inputs in (
            (dilated_attention, low),
            (dilated_attention_reference, low),
            (dilated_attention_reference, exact),
        )
        for output in [attend(*inputs, pattern)]
    )
    for x, y, z in zip(ours, plain, right, strict=True):
        assert (x - z).abs().max() <= 3 * (y - z).abs().max()


def test_documents_without_padding_inside_stay_in_place_and_are_looked_for_once(monkeypatch):
    ids = torch.tensor([[-1, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    query, key = torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 6, 2)
    documents = BatchDocuments.find(query, key, ids, in_place=True)
    assert documents.query_rows is None
    # row, column of position 0 among keys and queries, length, first query
    assert documents.documents == ((0, 1, -1, 2, 1), (0, 3, 1, 3, 0), (1, 0, -2, 4, 2))
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # which waits for the GPU
    assert BatchDocuments.find(query, key, ids, in_place=True).documents == documents.documents
    monkeypatch.undo()
    ids[0, 4] = -1  # padding inside: these are packed
    documents = BatchDocuments.find(query, key, ids, in_place=True)
    assert documents.query_rows is not None
    assert documents.documents == ((0, 0, -1, 2, 1), (0, 2, 1, 2, 0), (0, 4, 1, 4, 2))


def test_plan_asks_for_no_more_programs_than_the_pattern_has_work():
    """A dense program for every block of queries; of dilated ones, at most one more for every segment."""
    length, block = 65536, 64
    plan = dilated_plan.make_plan(PAPER, ((0, 0, 0, length, 0),), block, True, True, torch.device("cpu"))
    assert len(plan.dense) // dilated_plan.PROGRAM_SIZE.value == length // block
    kept = sum(-(-(w // r + 1) // block) * (length // w) for w, r in ((4096, 2), (8192, 4), (16384, 6), (32768, 12)))
    assert len(plan.dilated) == 4  # launches
    assert sum(map(len, plan.dilated)) // dilated_plan.PROGRAM_SIZE.value <= kept


def test_layers_share_their_plans(interpreted):
    inputs, grad = random_tensors(1, 2, 1, 40, 40, 4, torch.float32)
    before = dilated_plan.make_plan.cache_info().misses
    for offset in ("paper", "rotating"):
        for layer_idx in range(3):
            pattern = DilatedPattern([16, 41], [1, 3], None, offset, layer_idx=layer_idx)
            gradients(dilated_attention(*inputs, pattern), inputs, grad)
    assert dilated_plan.make_plan.cache_info().misses == before + 2  # blocks of queries, blocks of keys


def test_what_a_cuda_graph_reads_is_made_before_it_is_captured_and_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dilated_plan, "_in_cuda_graphs", {})
    tables = "plan", "heads"
    device, documents = torch.device("cuda", 0), ((0, 0, 0, 40, 0),)
    with pytest.raises(RuntimeError, match="run what is captured at least once, with inputs of the same shapes"):
        dilated_plan.find_tables(PAPER, 2, documents, 64, True, True, device)
    with pytest.raises(RuntimeError, match="run what is captured at least once, with inputs of the same shapes"):
        dilated_plan.make_head_table(PAPER, 2, True, device)
    monkeypatch.setattr(dilated_plan, "make_plan", lambda *args: tables[0])
    monkeypatch.setattr(dilated_plan, "make_head_table", lambda *args: tables[1])
    for _ in range(2):
        assert dilated_plan.find_tables(PAPER, 2, documents, 64, True, True, device) == tables
        assert sorted(dilated_plan._in_cuda_graphs.values()) == ["heads", "plan"]


def test_launches_past_triton_have_the_same_arguments(monkeypatch):
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("compiled", grid, *args))

    class Kernel:
        arg_names = ["x", "own", "number", "stride", "ONE", "TWO"]

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append(("triton", grid, *args, options)) or Compiled()

    monkeypatch.setattr(kernel_launch, "_compiled", {})
    kernel, blocks, x, own, other = Kernel(), Blocks(16, 16, 4, 1, 128), *torch.zeros(3, 16)
    arguments = kernel_launch.Arguments((x,), (7,), [16], {"TWO": 2, "ONE": 1})  # in another order
    own_of_launches = [((0, 1, 1), (own,)), ((2, 1, 1), (own,)), ((3, 1, 1), (other,))]
    launches = kernel_launch.Launches(kernel, own_of_launches, arguments, blocks)
    launches((x,), (7,))
    launches((other,), (8,))
    kernel_launch.Launches(kernel, own_of_launches[:2], arguments, blocks)((x,), (7,))  # of a compiled kernel
    launches((x[1:],), (7,))  # not aligned
    kernel_launch.Launches(kernel, [((2, 1, 1), (own[1:],))], arguments, blocks)((x,), (7,))
    options = {"TWO": 2, "ONE": 1, "num_warps": 4, "maxnreg": 128}
    at_x, at_own, at_other = (tensor.data_ptr() for tensor in (x, own, other))
    expected = [
        ("triton", (2, 1, 1), x, own, 7, 16, options),
        ("triton", (3, 1, 1), x, other, 7, 16, options),
        ("compiled", (2, 1, 1), at_other, at_own, 8, 16, 1, 2),
        ("compiled", (3, 1, 1), at_other, at_other, 8, 16, 1, 2),
        ("compiled", (2, 1, 1), at_x, at_own, 7, 16, 1, 2),
    ]
    for call, right in zip(calls, expected, strict=False):
        assert len(call) == len(right)
        assert all(a is b if torch.is_tensor(b) else a == b for a, b in zip(call, right, strict=True))
    assert len(calls) == 8 and all(call[0] == "triton" for call in calls[5:])


def test_launches_are_prepared_once_for_tensors_that_lie_alike(interpreted, monkeypatch):
    """And not taken for those of other strides and phases."""
    prepared = []

    class Counted(kernel_launch.Launches):
        def __init__(self, *args):
            prepared.append(args)
            super().__init__(*args)

    monkeypatch.setattr(kernels, "Launches", Counted)
    dilated_plan.make_plan.cache_clear()
    first = DilatedPattern([16, 48], [1, 3]).with_branch("sink", 2)
    rotated = replace(first, head_offset="rotating", layer_idx=1)
    for pattern, is_transposed in ((first, False), (first, True), (rotated, True)):
        before = len(prepared)
        for scale in (None, 0.3):
            inputs, grad = random_tensors(1, 2, 2, 50, 50, 8, torch.float32)
            if is_transposed:
                inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
            output = dilated_attention(*inputs, pattern, scale=scale)
            expected = dilated_attention_reference(*inputs, pattern, scale=scale)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
            ours, theirs = (gradients(x, inputs, grad) for x in (output, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            assert len(prepared) == before + 3 * 2  # forward, queries and keys: dense and dilated launches


def test_products_of_float32_are_taken_as_pytorch_takes_its_own(interpreted):
    """Whose older switch cannot be asked once Trainer (`tf32=True`) has set the newer one."""
    assert kernel_launch.precision_of(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert kernel_launch.precision_of(torch.float32) == "tf32"
        for dtype in (torch.float32, torch.bfloat16):
            inputs, grad = random_tensors(1, 2, 1, 40, 40, 8, dtype)
            gradients(dilated_attention(*inputs, DilatedPattern([16, 48], [1, 3])), inputs, grad)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_where_documents_lie_is_not_captured(monkeypatch):
    """A graph would go on with the documents of the batch that was captured."""
    query = torch.randn(1, 2, 40, 8)
    ids = find_documents(1, 40, position_ids=torch.arange(40).remainder(25)[None])
    dilated_attention(query, query, query, PAPER, document_ids=ids)
    given = dict(
        document_ids=ids,
        attention_mask=torch.ones(1, 40, dtype=torch.int64),
        position_ids=torch.arange(40)[None],
        cu_seq_lens=torch.tensor([0, 25, 40]),
    )
    monkeypatch.setattr(input_checks, "is_captured", lambda device: True)
    for name, x in given.items():
        with pytest.raises(RuntimeError, match="given a mask or documents.* Capture without `attention_mask`"):
            dilated_attention(query, query, query, PAPER, **{name: x})
    dilated_attention(query, query, query, PAPER)


@pytest.mark.gpu
def test_a_training_step_in_a_cuda_graph():
    config = LongNetConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, segment_lengths=[64, 512],
        dilation_rates=[1, 4], segment_shift=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).to("cuda", torch.bfloat16).train()
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    ids = torch.randint(64, (1, 700), device="cuda")

    def step():
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return loss.detach(), *grads

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ids.random_(64)
    expected = step()
    for table in (dilated_plan.make_plan, dilated_plan.make_head_table):
        table.cache_clear()
    _ = [torch.full((1 << 16,), 2**30, dtype=torch.int32, device="cuda") for _ in range(64)]  # where tables lay
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)
    with pytest.raises(RuntimeError, match="run what is captured at least once"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(ids[:, :500])


def test_kernels_compile_for_a_gpu():
    """All of them but that of the loss: types, and shared memory, which the interpreter does not check."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    program = [sys.executable, str(root / "tests" / "compile_kernels.py")]
    run = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = "activation_gradient activation join key past_key past_query piece query rotary sink stats"
    assert run.stdout.split() == [f"_{name}_kernel" for name in names.split()]


GPU_CASES = [
    *((torch.float64, 64, True), (torch.float32, 64, True), (torch.float32, 20, False), (torch.float16, 64, True)),
    *((torch.bfloat16, size, True) for size in (20, 64, 128, 256, 272)),
    *((torch.bfloat16, size, False) for size in (64, 128)),
]


def inputs_on_a_gpu(size, is_usual):
    """Patterns, inputs in float64, a gradient, and what is padding. Every pattern is compiled for, which takes time:
    all of them in the usual dtype and size, the one that has most in it in others."""
    patterns = [
        DilatedPattern(
            [48, 300, 200, 70, None],
            [1, 5, 4, 1, 1],
            ["segment", "window", "segment", "sink", "window"],
            "rotating",
            shift=True,
            layer_idx=1,
            branch_heads=[[0], [0], [0], [0], [1]],
        ),
        DilatedPattern([64, 200, 500], [1, 4, 7]),
        DilatedPattern([64, 200, None], [1, 4, 1], ["window", "window", "window"], "grouped"),
        DilatedPattern([64, 3], [1, 1], ["window", "sink"]),
        DilatedPattern([64, 128, 256, 512, 1024], [1, 2, 4, 6, 12]),
        DilatedPattern([64, 200], [2, 3]),
    ]
    mask = torch.ones(2, 603, device="cuda")
    mask[0, :99] = mask[1, 590:] = 0
    holes = mask.clone()
    holes[1, 200:220] = 0
    for pattern in patterns if is_usual else patterns[:1]:
        for queries, layout in [(603, {}), (603, {"attention_mask": mask}), (5, {"attention_mask": holes})]:
            yield pattern, *random_tensors(2, 2, 2, queries, 603, size, device="cuda"), layout


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size", "causal"), GPU_CASES)
def test_error_on_a_gpu(dtype, size, causal):
    """Against the oracle in float64: at most twice the error of the oracle itself in the same precision; three times
    where more than three branches round what they go on with."""
    is_usual = dtype == torch.bfloat16 and size == 64
    for pattern, exact, grad, layout in inputs_on_a_gpu(size, is_usual):
        low = [x.detach().to(dtype).requires_grad_() for x in exact]
        expected = dilated_attention_reference(*exact, pattern, is_causal=causal, **layout)
        plain = dilated_attention_reference(*low, pattern, is_causal=causal, **layout)
        ours = dilated_attention(*low, pattern, is_causal=causal, **layout)
        floor = 1e-10 if dtype == torch.float64 else 1e-6
        times = 3 if sum(branch.rate > 1 for branch in pattern.branches) > 3 else 2
        assert (ours - expected).abs().max() <= times * (plain - expected).abs().max() + floor, (pattern, layout)
        exact_grads = gradients(expected, exact, grad)
        plain_grads = gradients(plain, low, grad.to(dtype))
        for our, other, right in zip(gradients(ours, low, grad.to(dtype)), plain_grads, exact_grads, strict=True):
            assert (our - right).abs().max() <= times * (other - right).abs().max() + 10 * floor


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "causal"), [(64, True), (128, True), (64, False)])
def test_heads_with_full_attention_on_a_gpu(size, causal, monkeypatch):
    """As if rows were long enough for cuDNN: its heads and ours lie side by side, in the strides of a model."""
    monkeypatch.setattr(full_heads, "_SMALLEST", 0)
    pattern = DilatedPattern([300, 4], [1, 1], ["window", "sink"]).with_full_heads([0, 2, 3], 5)
    for batch, layout in ((2, {}), (1, {"position_ids": torch.arange(1500, device="cuda")[None] % 900})):
        exact, grad = random_tensors(batch, 5, 2, 1500, 1500, size, device="cuda")
        low = [x.detach().bfloat16().requires_grad_() for x in exact]
        expected = dilated_attention_reference(*exact, pattern, is_causal=causal, **layout)
        plain = dilated_attention_reference(*low, pattern, is_causal=causal, **layout)
        ours = dilated_attention(*low, pattern, is_causal=causal, **layout)
        assert (ours - expected).abs().max() <= 2 * (plain - expected).abs().max()
        exact_grads, plain_grads = gradients(expected, exact, grad), gradients(plain, low, grad.bfloat16())
        for our, other, right in zip(gradients(ours, low, grad.bfloat16()), plain_grads, exact_grads, strict=True):
            assert (our - right).abs().max() <= 2 * (other - right).abs().max()
    expected = (0, 2, 3) if torch.cuda.get_device_capability()[0] >= 9 else ()
    assert full_heads.find_full_heads(*low[:2], pattern) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_repeated_runs_on_a_gpu_are_equal_and_both_paths_agree(size, monkeypatch):
    inputs, grad = random_tensors(2, 6, 1, 20000, 20000, size, torch.bfloat16, "cuda")

    def run():
        output = dilated_attention(*inputs, PAPER)
        return output, *gradients(output, inputs, grad)

    first = run()
    for _ in range(5):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), first, strict=True))
    monkeypatch.setenv("LONGNET_TRITON", "0")
    for ours, theirs in zip(first, run(), strict=True):
        assert (ours.float() - theirs.float()).norm() <= 2e-2 * theirs.float().norm()


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers_on_a_gpu():
    """The last segments of a very long sequence, whose segments are apart, equal those of a short one."""
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of free GPU memory")
    length, tail = 98 * 32768, 2 * 32768
    make = lambda: torch.randn(1, length, 12, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)  # noqa: E731
    *inputs, grad = (make() for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    assert inputs[0].numel() > 2**31
    output = dilated_attention(*inputs, PAPER)
    grads = gradients(output, inputs, grad)
    short = [x.detach()[:, :, -tail:].clone().requires_grad_() for x in inputs]
    expected = dilated_attention(*short, PAPER)
    assert torch.equal(output[:, :, -tail:], expected)
    for ours, theirs in zip(grads, gradients(expected, short, grad[:, :, -tail:]), strict=True):
        assert torch.equal(ours[:, :, -tail:], theirs)


@pytest.mark.gpu
def test_compiled_checkpointed_and_under_autocast_on_a_gpu():
    inputs, grad = random_tensors(2, 4, 2, 3000, 3000, 64, torch.float32, "cuda")
    mask = torch.ones(2, 3000, device="cuda")
    mask[0, :777] = 0
    low = [x.bfloat16() for x in inputs]
    expected = dilated_attention(*low, PAPER, attention_mask=mask)
    expected_grads = gradients(expected, inputs, grad.bfloat16())

    def attend(*inputs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return dilated_attention(*inputs, PAPER, attention_mask=mask)

    compiled = torch.compile(attend, fullgraph=True)
    checkpointed = lambda *inputs: torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)  # noqa: E731
    for run in (attend, compiled, checkpointed):
        output = run(*inputs)
        assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
        for ours, theirs in zip(gradients(output, inputs, grad.bfloat16()), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def in_layout(x, number):
    """A copy, at other strides."""
    if number == 0:
        return x.clone()
    if number == 1:
        wide = x.new_full((x.shape[0], x.shape[1] * 2, x.shape[2] + 3, x.shape[3] + 5), torch.nan)
        wide[:, ::2, 2:-1, 3:-2] = x
        return wide[:, ::2, 2:-1, 3:-2]
    order = [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)][number - 2]  # the last one's rows are not adjacent
    copy = x.permute(order).clone(memory_format=torch.contiguous_format)
    return copy.permute([order.index(i) for i in range(4)])


class Past:
    """New tokens, an attention that they continue, and stored keys, of which `tiles` are seen."""

    def __init__(self, tiles, stored, batch, length, heads, group, size, device, layouts=(2, 2, 2, 0)):
        self.tiles, self.heads, self.layouts = tiles, heads, layouts
        shape = batch, heads * group, length
        self.tensors = [torch.randn(*shape, size, device=device) for _ in range(3)]  # query, output, its gradient
        self.stored = torch.randn(stored, 2 * size, device=device)
        self.lse = torch.randn(*shape, 1, device=device)
        self.lse[:, :, ::7] = -torch.inf  # no key so far

    @classmethod
    def of_pattern(cls, pattern, position, batch, length, heads, group, size, device):
        """Stored in rows that lie anywhere, some in the same."""
        row_of = torch.randint(2 * position, (batch, heads, position)).numpy()

        def find(branch, heads, positions):
            return (row_of[:, heads, positions],)

        tiles = past_tiles(pattern, heads, position, length, find, torch.device(device))
        return cls(tiles, 2 * position, batch, length, heads, group, size, device)

    def attend(self, dtype, in_triton, monkeypatch):
        """Output, log-sum-exp, and the gradients of the queries and of what is stored."""
        monkeypatch.setattr(past_module, "uses_triton", lambda query, dropout: in_triton)
        tensors = zip(self.tensors, self.layouts[:3], strict=True)
        query, output, grad_output = (in_layout(x.to(dtype), layout) for x, layout in tensors)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        lse = in_layout(self.lse.to(accumulator), self.layouts[3])[..., 0]
        stored = self.stored.to(dtype)
        keys, values = stored.chunk(2, dim=-1)
        kernel = TileKernel(query, 0.3, 0.0, None)
        attend_to_past(output, lse, query, keys, values, self.tiles, self.heads, kernel)
        lse = lse.nan_to_num(nan=torch.nan, neginf=0.0)  # of tokens that no key is for
        grad_stored = torch.ones_like(stored, dtype=accumulator)
        grad = in_layout(query.new_ones(query.shape), self.layouts[1])
        saved = grad_output, query, output, lse
        past_gradients(*saved, keys, values, self.tiles, self.heads, kernel, grad_stored)(grad)
        return output, lse, grad, grad_stored

    def assert_equal_on_both_paths(self, monkeypatch):
        expected = self.attend(torch.float32, False, monkeypatch)
        for ours, theirs in zip(self.attend(torch.float32, True, monkeypatch), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("seed", range(24))
def test_kernels_for_keys_of_the_past_agree_with_the_tiles(seed, interpreted, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    position, length = rng.choice([1, 5, rng.randint(1, 70)]), rng.choice([1, rng.randint(1, 70)])
    batch, heads, group, size = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 3, 16])
    pattern = replace(random_pattern(rng, heads), offset=0)
    past = Past.of_pattern(pattern, position, batch, length, heads, group, size, "cpu")
    past.assert_equal_on_both_paths(monkeypatch)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("seed", range(30))
def test_tiles_of_many_blocks_in_any_layout(seed, interpreted, monkeypatch):
    """Blocks of unequal sizes, which neither side of a tile is a multiple of."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    blocks = {name: Blocks(*rng.sample([16, 32, 64], 2), 4, 1) for name in ("forward", "queries", "keys")}
    monkeypatch.setattr(kernel_launch, "_FLOAT32_BLOCKS", {64: blocks})
    num_queries, num_keys = rng.randint(50, 120), rng.randint(50, 120)
    if seed % 3 == 1:
        num_keys = num_queries
    batch, heads, group, step, first = (rng.randint(1, 2), *(rng.randint(1, 3) for _ in range(4)))
    columns = (first + step * torch.arange(num_queries)).repeat(heads, 1)
    head_of = torch.arange(heads)[:, None].expand(-1, num_queries).contiguous()
    rows = torch.randint(2 * num_keys, (batch, heads, num_keys))
    tiles = [PastTile("full" if seed % 3 == 2 else "upper", head_of, columns, (rows,))]
    layouts = [rng.randrange(number) for number in (5, 4, 5, 4)]
    length = int(columns.max()) + rng.randint(1, 3)
    past = Past(tiles, 2 * num_keys, batch, length, heads, group, rng.choice([3, 16]), "cpu", layouts)
    past.assert_equal_on_both_paths(monkeypatch)


def test_a_grid_holds_the_tiles_of_a_launch():
    """65 535 query heads at most, of 128 per key/value head."""
    pattern = DilatedPattern([2048], [1024], ["window"])
    past = Past.of_pattern(pattern, 2048, 1, 1024, 2, 1, 4, "cpu")
    assert 2048 <= sum(len(tile.heads) for tile in past.tiles)
    assert max(len(tile.heads) for tile in past.tiles) <= 65535 // 128


def test_gradients_of_the_past_can_be_asked_to_be_deterministic(interpreted, monkeypatch):
    past = Past.of_pattern(DilatedPattern([60, None], [3, 1], ["window"] * 2), 40, 1, 30, 2, 1, 4, "cpu")
    monkeypatch.setattr(past_module, "triton_add_stored_gradients", None)  # whose order of additions may change
    with pytest.raises(TypeError):
        past.attend(torch.float32, True, monkeypatch)
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        past.attend(torch.float32, True, monkeypatch)
    finally:
        torch.set_deterministic_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 64), (torch.float16, 64), *((torch.bfloat16, size) for size in (20, 64, 128, 256))],
)
def test_error_for_keys_of_the_past_on_a_gpu(dtype, size, monkeypatch):
    """Against the tiles in float64: at most twice the error of the tiles in the same precision."""
    torch.manual_seed(0)
    windows = ["window"] * 3
    for pattern in (DilatedPattern([64, 800, 2000], [1, 4, 7]), DilatedPattern([64, 800, None], [1, 4, 1], windows)):
        past = Past.of_pattern(pattern, 1100, 2, 700, 2, 2, size, "cuda")
        exact, plain = (past.attend(x, False, monkeypatch) for x in (torch.float64, dtype))
        for ours, other, right in zip(past.attend(dtype, True, monkeypatch), plain, exact, strict=True):
            assert not ours.isnan().any()
            assert (ours - right).abs().max() <= 2 * (other - right).abs().max() + 1e-5
