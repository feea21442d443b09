"""What blocks of far keys, chosen per token, would cost on a GPU, beside full attention in the same heads.

    python benchmarks/selected_blocks_cost.py
    python benchmarks/selected_blocks_cost.py --lengths 131072 --decode_heads 29

selected_blocks.py says what such a choice is worth. Here, for one key/value head of SmolLM2 (3 query heads of 64) in
bfloat16, every part is measured alone: the score of 16 dimensions for all pairs; the 32 best blocks of 64 keys for
every token; attention to these 2 048 keys, a program per token, since tokens choose differently (of 16 rows of a tile
of the tensor cores 3 are used); the window and sink of the head. Joining the parts is not counted, and the gradient
through the choice as twice its forward pass: the sums are floors. Then one token that is decoded, in all heads that
choose, as CUDA graphs: PyTorch's attention to all keys, beside score, choice, and attention to a copy of the keys that
are chosen or near. Needs a CUDA GPU and Triton; the kernels are checked against PyTorch first.
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from attention import WINDOW_AND_SINK
from common import captured, describe, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from longnet_hf import dilated_attention


GROUP, DIM, SLOW, BLOCK, COUNT = 3, 64, 16, 64, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # which Triton's interpreter multiplies
CHUNK = 16384  # queries whose scores are there at a time
NEAR = 35  # blocks of a window of 2 209 keys
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Of a program: queries, keys, warps; and warps, stages
SCORE_SHAPES = (64, 256, 4), (128, 128, 4), (128, 256, 8)
CHOSEN_SHAPES = (1, 2), (1, 3), (2, 3), (4, 3)
DECODED_SHAPE, STRETCH = (16, 256, 4), 4096  # keys of a program


@triton.jit
def _score_kernel(
    query, key, scores, first, count, blocks, query_stride, key_stride, stretch,
    OF_BEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries (the program's first index), of one head (second), over a stretch of keys (third)."""
    tile, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, D)
    q = tl.load(query + head * query_stride + rows[:, None] * D + d)
    keys = key + head * key_stride + columns[None, :] * D + d[:, None]
    out = scores + (head * count + rows)[:, None] * blocks + tl.arange(0, KEYS // BLOCK)
    end = tl.minimum((part + 1) * stretch, blocks * BLOCK)
    stop = tl.minimum(end, tl.cdiv(first + (tile + 1) * ROWS, KEYS) * KEYS)
    for start in range(part * stretch, stop, KEYS):
        products = tl.reshape(tl.dot(q, tl.load(keys + start * D)), (ROWS, KEYS // BLOCK, BLOCK))
        score = tl.max(products, 2)
        if not OF_BEST:
            score += tl.log2(tl.sum(tl.exp2(products - score[:, :, None]), 2))
        tl.store(out + start // BLOCK, score.to(scores.dtype.element_ty))
    for start in range(tl.maximum(stop, part * stretch), end, KEYS):  # what comes later
        later = tl.full((ROWS, KEYS // BLOCK), float("-inf"), tl.float32)
        tl.store(out + start // BLOCK, later.to(scores.dtype.element_ty))


@triton.jit
def _chosen_kernel(
    query, key, value, chosen, output, length, scale,
    COUNT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The query heads of one token over the blocks that it chose. `scale` has the log2(e) of the exponentials."""
    n, rows, d, m = tl.program_id(0), tl.arange(0, 16), tl.arange(0, D), tl.arange(0, BLOCK)
    at = (rows * length + n)[:, None] * D + d
    q = tl.load(query + at, rows[:, None] < GROUP, other=0.0)
    best, whole = tl.full((16,), float("-inf"), tl.float32), tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, D), tl.float32)
    numbers = tl.arange(0, COUNT)
    blocks = tl.load(chosen + n * COUNT + numbers)
    for i in range(COUNT):
        start = tl.sum(tl.where(numbers == i, blocks, 0)) * BLOCK * D  # no load, which would delay those that follow
        logits = tl.dot(q, tl.load(key + start + m[None, :] * D + d[:, None])) * scale
        new_best = tl.maximum(best, tl.max(logits, 1))
        weights, factor = tl.exp2(logits - new_best[:, None]), tl.exp2(best - new_best)
        v = tl.load(value + start + m[:, None] * D + d)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None])
        whole, best = whole * factor + tl.sum(weights, 1), new_best
    mixed = mixed / whole[:, None]
    tl.store(output + at, mixed.to(output.dtype.element_ty), rows[:, None] < GROUP)


def score_blocks(query, key, first, shape, of_best=True, stretch=None):
    """Scores `[H, count, blocks]`, for queries `[H, count, D]` from position `first` on, of the blocks of `key`
    `[Hkv, M, D]` up to the last query: the largest product, or the log2 of the sum of 2^product. Hkv is H or 1.

    Nothing is masked: whole blocks count, also the last ones, which a query sees in part or not at all. `count` is a
    multiple of the shape's queries, and `first + count` of its keys. A program takes `stretch` keys, or all."""
    (rows, keys, warps), (heads, count, size) = shape, query.shape
    end = first + count
    scores = query.new_empty(heads, count, end // BLOCK)
    strides = query.stride(0), key.stride(0) if len(key) > 1 else 0
    grid = count // rows, heads, triton.cdiv(end, stretch or end)
    constants = dict(OF_BEST=of_best, D=size, BLOCK=BLOCK, ROWS=rows, KEYS=keys, num_warps=warps, num_stages=3)
    _score_kernel[grid](query, key, scores, first, count, end // BLOCK, *strides, stretch or end, **constants)
    return scores


def attend_to_chosen(query, key, value, chosen, shape):
    """`[G, N, D]` of `query` `[G, N, D]`, `key` and `value` `[M, D]`, and `chosen` `[N, count]`, numbers of blocks."""
    output, scale, (warps, stages) = torch.empty_like(query), query.shape[2] ** -0.5 * math.log2(math.e), shape
    constants = dict(COUNT=chosen.shape[1], GROUP=len(query), D=query.shape[2], BLOCK=BLOCK)
    arguments = query, key, value, chosen, output, query.shape[1], scale
    _chosen_kernel[(query.shape[1],)](*arguments, **constants, num_warps=warps, num_stages=stages)
    return output


def make(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def check(score_shapes=SCORE_SHAPES, chosen_shapes=CHOSEN_SHAPES) -> None:
    """The kernels against PyTorch, on 1 024 keys; the last half of them asks for blocks."""
    length, count, first = 1024, 512, 512
    query, key = make(GROUP, count, SLOW), make(1, length, SLOW)
    last = torch.arange(BLOCK - 1, length, BLOCK, device=DEVICE)
    seen = last <= torch.arange(first, length, device=DEVICE)[:, None]
    products = (query.float() @ key.float().transpose(1, 2)).unflatten(-1, (-1, BLOCK))
    expected = {True: products.amax(-1), False: (products * math.log(2)).logsumexp(-1) / math.log(2)}
    for shape, stretch in (*((shape, None) for shape in score_shapes), (DECODED_SHAPE, 512)):
        behind = -(-(first + shape[0]) // shape[1]) * shape[1] // BLOCK  # the first tile of queries
        for of_best, scores in expected.items():
            found = score_blocks(query, key, first, shape, of_best, stretch).float()
            torch.testing.assert_close(found[:, seen], scores[:, seen], rtol=1e-2, atol=1e-2)
            assert not found.isnan().any() and (found[:, : shape[0], behind:] == -math.inf).all()
    query, key, value = make(GROUP, 64, DIM), *make(2, length, DIM).unbind()
    chosen = torch.rand(64, length // BLOCK, device=DEVICE).topk(4).indices.int()
    k, v = (x.float().unflatten(0, (-1, BLOCK))[chosen].flatten(1, 2) for x in (key, value))
    exact = F.scaled_dot_product_attention(query.float().transpose(0, 1), k, v).transpose(0, 1)
    for shape in chosen_shapes:
        found = attend_to_chosen(query, key, value, chosen, shape).float()
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def full_attention(query, key, value, backend="cuDNN", is_causal=True):
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=is_causal)


def time_of(seconds: float, *runs, in_graph: bool = False) -> float:
    """Milliseconds of the fastest of the calls; NaN where PyTorch has no such kernel."""
    try:
        return min(milliseconds(captured(run) if in_graph else run, seconds) for run in runs)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "cudnn" in str(error).lower():
            return math.nan
        raise


def time_parts(length: int, seconds: float) -> dict[str, float]:
    """Milliseconds of the parts for one key/value head, and their sums: `length` is a multiple of `CHUNK`."""
    inputs = query, key, value = [make(1, heads, length, DIM).requires_grad_() for heads in (GROUP, 1, 1)]
    slow, grad = [make(1, heads, length, SLOW) for heads in (GROUP, 1, 1)], make(1, GROUP, length, DIM)
    some = make(CHUNK, length // BLOCK)
    past = torch.arange(length, device=DEVICE)[:, None] // BLOCK + 1
    at_random = (torch.rand(length, COUNT, device=DEVICE) * past).int()
    alike = torch.arange(COUNT, device=DEVICE, dtype=torch.int32).expand(length, COUNT).contiguous()

    def score(of_best, shape):
        for start in range(0, length, CHUNK):
            score_blocks(slow[0][0, :, start : start + CHUNK], slow[1][0], start, shape, of_best)

    def choose():
        for start in range(0, length, CHUNK):
            some[:, : (start + CHUNK) // BLOCK].topk(COUNT, sorted=False)

    def attend(chosen, shape):
        attend_to_chosen(query[0], key[0, 0], value[0, 0], chosen, shape)

    def window(*qkv):
        return dilated_attention(*qkv, WINDOW_AND_SINK)

    def both(attention):
        torch.autograd.grad(attention(*inputs), inputs, grad)

    run, time = functools.partial, functools.partial(time_of, seconds)
    with torch.no_grad():
        times = {
            "full": time(run(full_attention, *inputs)),
            "heads of 16, cuDNN": time(run(full_attention, *slow)),
            "heads of 16, flash": time(run(full_attention, *slow, "flash")),
            "log-sum-exp": time(*(run(score, False, shape) for shape in SCORE_SHAPES)),
            "largest": time(*(run(score, True, shape) for shape in SCORE_SHAPES)),
            "choice": time(choose),
            "at random": time(*(run(attend, at_random, shape) for shape in CHOSEN_SHAPES)),
            "alike": time(*(run(attend, alike, shape) for shape in CHOSEN_SHAPES)),
            "window": time(run(window, *inputs)),
        }
    times |= {"full, both": time(run(both, full_attention)), "window, both": time(run(both, window))}
    return times | sums(times)


def sums(times: dict[str, float]) -> dict[str, float]:
    """Of what a head that chooses does, at least."""
    found, scored = {}, times["largest"] + times["choice"]
    for chosen in ("at random", "alike"):
        found[f"{chosen}, sum"] = scored + times[chosen] + times["window"]
        found[f"{chosen}, sum of both"] = scored + 3 * times[chosen] + times["window, both"]
    return found


PARTS = {
    "full": "full attention, cuDNN: forward",
    "full, both": "forward + backward",
    "heads of 16, cuDNN": "score, as attention with heads of 16: cuDNN",
    "heads of 16, flash": "flash",
    "log-sum-exp": "score, log-sum-exp of a block (Triton)",
    "largest": "score, largest product of a block (Triton)",
    "choice": "32 best blocks (`torch.topk`)",
    "at random": "attention to 32 blocks per token: at random",
    "alike": "the same for all tokens",
    "window": "window of 2 209 and sink: forward",
    "window, both": "forward + backward",
    "at random, sum": "sum by largest product, blocks at random: forward",
    "at random, sum of both": "forward + backward, at least",
    "alike, sum": "the same blocks for all tokens: forward",
    "alike, sum of both": "forward + backward, at least",
}


@torch.no_grad()
def time_decoding(length: int, heads: int, seconds: float) -> dict[str, float]:
    """Milliseconds of one token's attention in `heads` key/value heads, after `length` keys."""
    query, key, value = (make(1, heads, rows, DIM) for rows in (GROUP, length, length))
    slow_query, slow_key = F.pad(make(heads, GROUP, SLOW), (0, 0, 0, 16 - GROUP)), make(heads, length, SLOW)
    of_head = torch.arange(heads, device=DEVICE)[:, None]
    near = torch.arange(length // BLOCK - NEAR, length // BLOCK, device=DEVICE).expand(heads, -1)

    def score():
        return score_blocks(slow_query, slow_key, length - 16, DECODED_SHAPE, stretch=STRETCH)

    def chosen():
        scores = score()[:, :GROUP, :-NEAR]
        best = (scores - scores.amax(-1, keepdim=True)).amax(1).topk(COUNT, sorted=False).indices
        blocks = torch.cat((best, near), 1)
        kept = (x[0].unflatten(1, (-1, BLOCK))[of_head, blocks].flatten(1, 2)[None] for x in (key, value))
        return full_attention(query, *kept, "flash", is_causal=False)

    time = functools.partial(time_of, seconds, in_graph=True)
    full = {name: time(functools.partial(full_attention, query, key, value, name, False)) for name in BACKENDS}
    return full | {"score": time(score), "chosen": time(chosen)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**15, 2**17, 2**19], help=f"multiples of {CHUNK}")
    parser.add_argument("--decode_lengths", type=int, nargs="*", default=[2**17, 2**19, 2**20])
    parser.add_argument("--decode_heads", type=int, default=18, help="key/value heads that choose, of all layers")
    parser.add_argument(
        "--rest", type=float, default=0.93, help="ms of the rest of a step; compiled, of the base model"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="to measure for")
    options = parser.parse_args()
    for name, multiple in (("lengths", CHUNK), ("decode_lengths", STRETCH)):
        if any(length <= 0 or length % multiple for length in getattr(options, name)):
            parser.error(f"--{name} takes multiples of {multiple}, got {getattr(options, name)}.")
    if DEVICE != "cuda":
        parser.error("needs a CUDA GPU.")
    check()

    print(f"{describe(DEVICE)}; {GROUP} query heads on 1 x {DIM}, bfloat16\n")
    if options.lengths:
        columns = {length: time_parts(length, options.seconds) for length in options.lengths}
        print("| milliseconds, causal |", " | ".join(f"{length} tokens" for length in columns), "|")
        print("|---" * (1 + len(columns)) + "|")
        for part, words in PARTS.items():
            cells = [f"{times[part]:.2f}" for times in columns.values()]
            if part.endswith("sum") or part.endswith("sum of both"):
                whole = "full" if part.endswith("sum") else "full, both"
                cells = [f"{times[part]:.2f} ({times[whole] / times[part]:.2f} x)" for times in columns.values()]
            print("|", " | ".join((words, *cells)), "|")
    if options.decode_lengths:
        heads, rest = options.decode_heads, options.rest
        print(f"\nOne token, {heads} key/value heads; the rest of a step takes {rest} ms\n")
        print("| keys | all: cuDNN, ms | flash | TB/s | chosen | the score of it | x | of a step | were it free |")
        print("|---" * 9 + "|")
    for length in options.decode_lengths:
        times = time_decoding(length, heads, options.seconds)
        full = min(times[name] for name in BACKENDS if not math.isnan(times[name]))
        chosen, rate = times["chosen"], 4 * DIM * heads * length / full / 1e9
        ratios = full / chosen, (rest + full) / (rest + chosen), (rest + full) / rest
        cells = *(f"{times[name]:.3f}" for name in BACKENDS), f"{rate:.2f}", f"{chosen:.3f}", f"{times['score']:.3f}"
        cells = *cells, *(f"{ratio:.2f}" for ratio in ratios)
        print("|", " | ".join((str(length), *cells)), "|", flush=True)


if __name__ == "__main__":
    main()
