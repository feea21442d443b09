"""Whether the heads that retrieve can do with blocks of keys chosen per token: a study of quality, without training.

    python benchmarks/selected_blocks.py --model HuggingFaceTB/SmolLM2-135M --data code='src/**/*.py'
    python benchmarks/selected_blocks.py --model ... --data ... --arms full all-keys slow-16/keys-1024 low-16/avg-2

All heads of a Llama-family model see a window and a sink; the best by their ranking (`--share`) see instead all keys
(`all-keys`), or a narrower window, the sink, and blocks that every token chooses for each key/value head. All of it is
computed densely and masked: it says what a choice is worth, and by a count what it would cost, not how fast it is.

An arm is `full`, `window`, `all-keys`, `random`, `dilated-B`, or a score of blocks, with options behind it:

    mass                 the softmax mass of the block: an oracle
    slow-D               log-sum-exp over the block of q·k over the D slowest rotary dimensions
    low-R                of the product of rank R that is nearest to q·k over the slow dimensions on another text
    learned-R            of such a product, distilled from the masses on another text
    /avg-T               mean keys of T neighbours in place of keys; T of the block size: block means
    /shared              one query for the query heads of a group, their sum
    /int8                queries and keys of the score in 8 bits, a scale per token
    /max                 a block weighs as much as its best key: one exponential per block in place of one per key
    /coarse-C            only in the C best blocks of 1 024 tokens, found by mean keys of 16
    /block-B /keys-K     size of a block (64), and how many keys are chosen (2 048)
    /top-P               as few of these as have P % of the estimated mass that is eligible
    /window-W /share-S   of the heads that choose (`--window`, `--share`)

`dilated-B` asks another question: all heads have windows of N / 16, N / 4 and N tokens that keep one block of B tokens
in 1, 4 and 16. B is 1 in LongNet; larger blocks keep neighbours together.

Measured on every kind of text: the loss of the second half of a context, that of 120 spans of 64 tokens repeated at
its end (from the 9th token of a span on), and numbers found of 40 in a text. Ends with a table and a record in JSON.
Stopped, the same command goes on where it was.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from common import dilated_windows, windows_of_blocks
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import AttentionInterface, AutoTokenizer, HfArgumentParser, PreTrainedModel

from longnet_hf import DilatedPattern, HeadRanking, dilated_attention


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose measurements and records it shares
from measurements import (  # noqa: E402
    find_ranking,
    judge_answers,
    load_stretched,
    make_needles,
    papers_pattern,
    read_texts,
    repeat_spans,
    token_losses,
    window_of_equal_work,
)
from record import Results, environment, write  # noqa: E402
from report import above, mean_and_error, said, signed  # noqa: E402
from training import check_settings  # noqa: E402


DEFAULT_ARMS = (
    *("full", "window", "all-keys", "random", "mass"),
    *("slow-40", "slow-24", "slow-16", "slow-8"),
    *("slow-40/avg-2", "slow-40/avg-4", "slow-40/avg-8", "slow-24/avg-2", "slow-40/avg-64"),
    *("slow-40/shared", "slow-16/int8", "slow-40/coarse-4", "slow-24/coarse-8"),
    *("low-16", "low-8", "low-32/shared", "learned-16", "learned-16/avg-2", "learned-32/shared", "learned-16/shared"),
    *("mass/block-16", "mass/block-32", "mass/keys-512", "mass/keys-1024", "mass/keys-4096", "mass/keys-4096/top-90"),
    *("mass/window-1024", "all-keys/share-33", "mass/share-33", "slow-40/share-33", "dilated-1", "dilated-64"),
)
SINK_TOKENS = 4
SPANS, SPAN_LENGTH, LEAD = 120, 64, 8
# The rule of the study: nats above the same heads with all keys, and multiply-adds over those of full attention
MAX_NATURAL, MAX_COPY, MAX_WORK = 0.01, 0.08, 1 / 8
# Of the two levels
COARSE_BLOCK, COARSE_AVERAGE = 1024, 16
# Numbers in the largest tensor of a tile of queries
TILE = {"cuda": 1 << 28, "cpu": 1 << 22}
# Not cuDNN's, which makes a plan for every new length
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Arguments:
    """What is compared, on what."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model."})
    data: list[str] = field(default_factory=list, metadata={"help": "KIND=FILES, a pattern, for every kind of text."})
    arms: list[str] = field(default_factory=lambda: list(DEFAULT_ARMS), metadata={"help": "See above."})
    context_length: int = field(default=32768, metadata={"help": "Tokens of a text."})
    texts: int = field(default=6, metadata={"help": "Texts of every kind."})
    needle_texts: int = field(default=6, metadata={"help": "Texts with 40 numbers each."})
    share: int = field(default=20, metadata={"help": "Heads that choose, in percent."})
    window: int = field(default=512, metadata={"help": "Window of the heads that choose."})
    other_window: int = field(default=0, metadata={"help": "Window of the others; 0: of the paper's work."})
    use_cpu: bool = field(default=False, metadata={"help": "Although there is a GPU."})
    output_dir: str = field(default="runs/selected_blocks", metadata={"help": "Where results are kept."})


# Arms


@dataclass(frozen=True)
class Arm:
    """What heads see: a name as in the description above, taken apart."""

    name: str
    kind: str
    size: int = 0
    avg: int = 1
    shared: int = 0
    int8: int = 0
    max: int = 0
    coarse: int = 0
    block: int = 64
    keys: int = 2048
    top: int = 0
    window: int = 0
    share: int = 0

    SIZED = ("slow", "low", "learned", "dilated")
    CHOOSING = ("mass", "random", "slow", "low", "learned")
    FLAGS = ("shared", "int8", "max")

    @classmethod
    def parse(cls, name: str, args: Arguments) -> "Arm":
        first, *options = name.split("/")
        kind, _, size = first.partition("-") if first != "all-keys" else (first, "", "")
        values = {"window": args.window, "share": args.share}
        known = {x.name for x in fields(cls)} - {"name", "kind", "size"}
        for option in options:
            key, _, value = option.partition("-")
            is_flag = key in cls.FLAGS
            if key not in known or is_flag == bool(value) or not (is_flag or value.isdecimal() and int(value) > 0):
                raise ValueError(
                    f"`--arms` has {name!r}, with {option!r}; options are {sorted(known)}, such as avg-2."
                )
            values[key] = 1 if is_flag else int(value)
        if kind not in ("full", "window", "all-keys", *cls.SIZED, *cls.CHOOSING):
            raise ValueError(f"`--arms` has {name!r}, which is none of the arms and scores in the description.")
        if kind not in cls.CHOOSING and any(kind != "all-keys" or not x.startswith("share-") for x in options):
            raise ValueError(f"`--arms` has {name!r}; options are for scores, and all-keys takes share-S alone.")
        if (kind in cls.SIZED) != bool(size) or (size and not (size.isdecimal() and int(size) > 0)):
            raise ValueError(
                f"`--arms` has {name!r}; {', '.join(cls.SIZED)} take a size, such as slow-16, others none."
            )
        if kind == "random" and not values.keys().isdisjoint((*cls.FLAGS, "avg")):
            raise ValueError(f"`--arms` has {name!r}; random scores nothing: no avg, {', '.join(cls.FLAGS)}.")
        arm = cls(name=name, kind=kind, size=int(size or 0), **values)
        if arm.block % arm.avg or COARSE_BLOCK % arm.block or arm.keys % arm.block or arm.top > 99 or arm.share > 100:
            raise ValueError(
                f"`--arms` has {name!r}: avg must divide block, block {COARSE_BLOCK} and keys, and top lie below 100."
            )
        return arm

    @property
    def chooses(self) -> bool:
        return self.kind in self.CHOOSING

    @property
    def product(self) -> str:
        """The name of the projections that it scores with."""
        return f"{self.kind}-{self.size}{'-shared' if self.shared else ''}"

    def work(self, length: int, head_dim: int, group: int) -> tuple[float, float]:
        """Of the score over those of full attention, for all causal pairs of a text of `length` tokens: multiply-adds
        (which attention does 2 d times per pair, for the score and the value), and numbers read, in bytes."""
        if self.kind in ("window", "random"):
            return 0.0, 0.0
        size = self.size if self.kind in ("slow", "low", "learned") else head_dim
        if self.coarse:
            inside = min(1.0, self.coarse * COARSE_BLOCK / (length / 2))
            per_key = size * (inside / self.avg + 1 / COARSE_AVERAGE)
        else:
            per_key = size / self.avg
        relative = per_key / (2 * head_dim)
        return relative / (group if self.shared else 1), relative / (2 if self.int8 else 1)


# Scores of blocks. S chosen key/value heads, G query heads of each, Q queries, N keys, D dimensions of the score.


def slow_dimensions(head_dim: int, number: int) -> torch.Tensor:
    """Indices of the `number` slowest rotary dimensions: pair i is (i, i + d / 2), and the slow ones come last."""
    if number % 2 or not 0 < number <= head_dim:
        raise ValueError(f"slow-D takes an even D of at most {head_dim}, got {number}.")
    first = torch.arange((head_dim - number) // 2, head_dim // 2)
    return torch.cat((first, first + head_dim // 2))


def mean_keys(key: torch.Tensor, average: int) -> torch.Tensor:
    """Means of `average` neighbours: `[S, N / average, D]`. N is a multiple."""
    return key if average == 1 else key.unflatten(1, (-1, average)).float().mean(2)


def in_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 8 bits, with a scale for every token."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x.float() / scale).round() * scale


def block_masses(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    block: int,
    average: int = 1,
    sinks: int = SINK_TOKENS,
    *,
    first: int = 0,
    of_best: bool = False,
) -> torch.Tensor:
    """Logarithms `[S, Q, M / block]` of the share that blocks of keys have of a query's attention, the mean over the
    query heads of a group.

    `query` `[S, G, Q, D]`, scaled, stands at `positions` `[Q]`, none before `first`; `key` `[S, M / average, D]` are
    means of `average` keys, M a multiple of `block`. Only those whose last token is not behind the query count. The
    sink, which every query sees anyway, counts in the whole and in no block: -inf where nothing is left. `of_best`: a
    block, and the sink, has no more than the weight of its best key.
    """
    heads, group, rows, _ = query.shape
    # What bf16 and TF32 multiply is exact in float32
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype).flatten(1, 2) @ key.to(dtype).transpose(1, 2)
    logits = logits.view(heads, group, rows, -1)
    ends = torch.arange(1, logits.shape[-1] + 1, device=query.device) * average - 1
    first = first // average  # all before it are seen
    logits[..., first:].masked_fill_(ends[first:] > positions[:, None], -math.inf)
    in_sink, join = -(-sinks // average), torch.amax if of_best else torch.logsumexp
    of_sink = join(F.pad(logits[..., :in_sink], (0, 1), value=-math.inf), -1, keepdim=True)  # of no sink, too
    logits[..., :in_sink] = -math.inf
    masses = join(logits.unflatten(-1, (-1, block // average)), -1)
    whole = torch.logaddexp(masses.logsumexp(-1, keepdim=True), of_sink)
    # Finite in between, for the gradient
    means = (masses - whole.clamp(min=-1e20)).clamp(min=-1e30).logsumexp(1) - math.log(group)
    return means.masked_fill(means < -1e29, -math.inf)


def choose(masses: torch.Tensor, count: int, top: int = 0) -> torch.Tensor:
    """The `count` blocks of largest mass, the first of equal ones; with `top`, as few of these as have `top` % of all.
    Those of -inf are never chosen. `[S, Q, blocks]`, logarithms to bool."""
    count = min(count, masses.shape[-1])
    best = masses.topk(count).values
    number = torch.full_like(best[..., :1], count, dtype=torch.long)
    if top:
        share = (best - masses.logsumexp(-1, keepdim=True).clamp(min=-1e20)).exp()
        number = ((share.cumsum(-1) - share) < top / 100).sum(-1, keepdim=True).clamp(min=1)
    least = best.gather(-1, number - 1)
    above, equal = masses > least, masses == least
    room = number - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))) & (masses > -math.inf)


class Chooser:
    """Chooses blocks for the queries of a layer's chosen heads.

    Args:
        query, key: `[S, G, N, d]` and `[S, N, d]`, rotated.
        projections: of a low or learned product: `[S, G, d, R]` and `[S, d, R]`.
    """

    def __init__(
        self,
        arm: Arm,
        query: torch.Tensor,
        key: torch.Tensor,
        scaling: float,
        sinks: int,
        projections: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.arm, self.sinks = arm, sinks
        multiple = COARSE_BLOCK if arm.coarse else arm.block
        key = F.pad(key, (0, 0, 0, -key.shape[1] % multiple))
        if arm.kind == "slow":
            kept = slow_dimensions(key.shape[-1], arm.size).to(key.device)
            query, key = query[..., kept], key[..., kept]
        elif arm.kind in ("low", "learned"):
            of_query, of_key = projections
            query, key = query.to(of_query.dtype) @ of_query, key.to(of_key.dtype) @ of_key
        query = query * scaling
        if arm.shared:
            query = query.sum(1, keepdim=True)
        self.query, self.key = query, mean_keys(key, arm.avg)
        self.coarse_key = mean_keys(key, COARSE_AVERAGE) if arm.coarse else None
        if arm.int8:
            self.query, self.key = in_eight_bits(self.query), in_eight_bits(self.key)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Which blocks the queries from `start` to `stop` choose: `[S, Q, blocks]`, of all blocks up to `stop`. A
        block is eligible if its keys are all older than the window."""
        arm, blocks = self.arm, -(-stop // self.arm.block)
        positions = torch.arange(start, stop, device=self.query.device)
        last = torch.arange(1, blocks + 1, device=positions.device) * arm.block - 1
        eligible = last <= positions[:, None] - arm.window
        if arm.kind == "random":
            generator = torch.Generator(self.query.device).manual_seed(start)
            masses = torch.rand(len(self.query), stop - start, blocks, generator=generator, device=positions.device)
        else:
            masses = self._masses(self.key, positions, arm.block, arm.avg, start, stop)
        if arm.coarse:
            of_level = self._masses(self.coarse_key, positions, COARSE_BLOCK, COARSE_AVERAGE, start, stop)
            begins = torch.arange(of_level.shape[-1], device=positions.device) * COARSE_BLOCK
            of_level = of_level.masked_fill(begins > positions[:, None] - arm.window, -math.inf)
            inside = choose(of_level, arm.coarse).repeat_interleave(COARSE_BLOCK // arm.block, -1)
            eligible = eligible & inside[..., :blocks]
        return choose(masses.masked_fill(~eligible, -math.inf), arm.keys // arm.block, arm.top)

    def _masses(self, key, positions, block: int, average: int, start: int, stop: int) -> torch.Tensor:
        key = key[:, : -(-stop // block) * (block // average)]
        query = self.query[:, :, start:stop]
        return block_masses(query, key, positions, block, average, self.sinks, first=start, of_best=bool(self.arm.max))


# Attention


def in_tiles(heads: int, length: int, device: str, multiple: int = 64):
    """Ranges of queries for which `heads` rows of `length` logits fit into a tile."""
    rows = max(1, TILE[device] // (heads * length) // multiple) * multiple
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: Callable):
    """Attention `[S, G, N, d]` of `query` `[S, G, N, d]`, `key` and `value` `[S, N, d]`. For a tile of queries
    `mask(start, stop)` gives the keys up to `stop` that they see, or logarithms of how often: `[S, Q, stop]`."""
    output = torch.empty_like(query)
    group, length = query.shape[1:3]
    for start, stop in in_tiles(len(query) * group, length, query.device.type):
        k, v = (x[:, None, :stop].expand(-1, group, -1, -1) for x in (key, value))
        q, seen = query[:, :, start:stop], mask(start, stop)[:, None]
        with sdpa_kernel(_BACKENDS):
            output[:, :, start:stop] = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    return output


def selected_mask(chooser: Callable, block: int, window: int, sinks: int, device, chosen: list | None = None):
    """The mask of window, sink and chosen blocks; `chosen` collects how many keys of blocks there are."""

    def mask(start: int, stop: int) -> torch.Tensor:
        blocks = chooser(start, stop)
        if chosen is not None:
            chosen.append((blocks[:, -1:].sum() * block, len(blocks)))  # of the last query of a tile
        seen = blocks[..., None].expand(*blocks.shape, block).flatten(-2)[..., :stop]
        n, m = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
        return (seen | (m > n - window) | (m < sinks)) & (m <= n)

    return mask


def dilated_mask(pattern: DilatedPattern, block: int, heads: int, sinks: int, device, dtype):
    """The mask of windows that keep one block of `block` keys in r: m // block % r == s_j."""

    count = windows_of_blocks(pattern, heads, block, sinks, device)
    head = torch.arange(heads, device=device)[:, None, None]

    def mask(start: int, stop: int) -> torch.Tensor:
        n, m = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
        return count(n, m, head).to(torch.float32).log().to(dtype)

    return mask


class StudiedAttention:
    """The attention function of a model, as `arm` has it; `observe` sees queries and keys instead of an arm."""

    NAME = "selected_blocks"

    def __init__(self, model: PreTrainedModel, ranking: HeadRanking, args: Arguments):
        self.ranking, self.args, self.arm, self.observe, self.projections = ranking, args, None, None, {}
        paper = DilatedPattern(**papers_pattern(args.context_length))
        self.other_window = args.other_window or window_of_equal_work(paper, args.context_length, SINK_TOKENS)
        self.chosen: list[tuple[torch.Tensor, int]] = []
        AttentionInterface.register(self.NAME, self)
        model.set_attn_implementation(self.NAME)

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        if attention_mask is not None:
            raise ValueError("A text without padding, and a model that makes no mask of its own for other attention.")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            query, key = query.to(value.dtype), key.to(value.dtype)
            return self._attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None

    def _attend(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        arm, heads, length = self.arm, key.shape[1], key.shape[2]
        if len(query) > 1 or query.shape[2] != length:
            raise ValueError("One text at a time, and whole.")
        if arm is None or arm.kind == "full":
            if self.observe is not None:
                self.observe(layer, query[0].unflatten(0, (heads, -1)), key[0], scaling)
            return dilated_attention(query, key, value, DilatedPattern.full(), scale=scaling)
        if arm.kind == "dilated":
            pattern = DilatedPattern(**dilated_windows(self.args.context_length), layer_idx=layer)
            mask = dilated_mask(pattern, arm.size, heads, SINK_TOKENS, query.device, query.dtype)
            q = query[0].unflatten(0, (heads, -1))
            return masked_attention(q, key[0], value[0], scaling, mask).flatten(0, 1)[None]
        others = DilatedPattern((self.other_window,), (1,), ("window",)).with_branch("sink", SINK_TOKENS)
        best = self.ranking.best(arm.share / 100).get(layer, []) if arm.kind != "window" else []
        if not arm.chooses or not best:
            pattern = others.with_full_heads(best, heads)
            return dilated_attention(query, key, value, pattern, scale=scaling)
        rest = [head for head in range(heads) if head not in best]
        q = query[0].unflatten(0, (heads, -1))
        output = torch.empty_like(q)
        if rest:
            inputs = q[rest].flatten(0, 1)[None], key[:, rest], value[:, rest]
            output[rest] = dilated_attention(*inputs, others, scale=scaling)[0].unflatten(0, (len(rest), -1))
        projections = self._projections(layer, best)
        chooser = Chooser(arm, q[best], key[0, best], scaling, SINK_TOKENS, projections)
        mask = selected_mask(chooser, arm.block, arm.window, SINK_TOKENS, query.device, self.chosen)
        output[best] = masked_attention(q[best], key[0, best], value[0, best], scaling, mask)
        return output.flatten(0, 1)[None]

    def _projections(self, layer: int, best: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.arm.kind not in ("low", "learned"):
            return None
        of = [self.projections[f"{self.arm.product}.{layer}.{head}.{x}"] for x in ("query", "key") for head in best]
        return torch.stack(of[: len(best)]), torch.stack(of[len(best) :])

    def keys_chosen(self) -> float:
        """Mean number of keys per query and head since the last call, of the last query of every tile."""
        keys, queries = sum(int(x) for x, _ in self.chosen), sum(x for _, x in self.chosen)
        self.chosen.clear()
        return keys / max(1, queries)


# Products of low rank


def low_rank(query: torch.Tensor, key: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[d, R]` twice: A, B with (q A)·(k B) nearest to q·k in the mean over queries `[G, N, d]` and keys `[N, d]`, but
    for what all keys share. Only of the slow dimensions, five in eight."""
    dim = key.shape[-1]
    slow = slow_dimensions(dim, dim * 5 // 16 * 2)
    q, k = (x.flatten(0, -2)[:, slow.to(x.device)].double().cpu() for x in (query, key))
    of_query, back_q = _square_root(q.T @ q / len(q))
    of_key, back_k = _square_root((k - k.mean(0)).T @ (k - k.mean(0)) / len(k))
    left, size, right = torch.linalg.svd(of_query @ of_key)
    rank, size = min(rank, len(slow)), size.sqrt()
    projections = torch.zeros(2, dim, rank, dtype=torch.float64)
    projections[0, slow] = back_q @ (left * size)[:, :rank]
    projections[1, slow] = back_k @ (right.T * size)[:, :rank]
    return projections[0], projections[1]


def _square_root(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The root of a covariance, and its inverse."""
    values, vectors = torch.linalg.eigh(square)
    roots = values.clamp(min=1e-6 * float(values.max())).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def distil(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: tuple[torch.Tensor, torch.Tensor],
    arm: Arm,
    steps: int = 200,
    queries: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, G, d, R]` and `[S, d, R]`, from `first` on by gradient descent on `query` `[S, G, N, d]` and `key`
    `[S, N, d]`: the masses of far blocks under the product become those under attention (cross-entropy, with all that
    is near or in the sink as one more block). The last quarter, where the text repeats itself, weighs more: few tokens
    copy, and what they ask for is what counts."""
    length = query.shape[2]
    query, key = query.float(), key[:, : length // arm.block * arm.block].float()
    of_query, of_key = (x.to(query).clone().requires_grad_() for x in first)
    optimizer = torch.optim.Adam([of_query, of_key], lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    last = torch.arange(1, length // arm.block + 1, device=key.device) * arm.block - 1
    lowest = min(length - 1, 2 * arm.window)
    for _ in range(steps):
        anywhere = torch.randint(lowest, length, (queries // 2,), generator=generator)
        repeated = torch.randint(length // 4 * 3, length, (queries // 2,), generator=generator)
        positions = torch.cat((anywhere, repeated)).to(key.device)
        far = last <= positions[:, None] - arm.window
        q = query[:, :, positions] * scaling
        with torch.no_grad():
            target = block_masses(q, key, positions, arm.block).exp() * far
        with torch.enable_grad():
            product = q @ of_query
            product = product.sum(1, keepdim=True) if arm.shared else product
            masses = block_masses(product, key @ of_key, positions, arm.block).masked_fill(~far, -math.inf)
            near = torch.log1p(-masses.exp().sum(-1).clamp(max=1 - 1e-6))
            loss = -(target * masses.masked_fill(~far, 0)).sum(-1) - (1 - target.sum(-1)) * near
            optimizer.zero_grad()
            loss.mean(-1).sum().backward()  # every head for itself
        optimizer.step()
        schedule.step()
    return of_query.detach(), of_key.detach()


def fit_projections(model, attention: StudiedAttention, arms: list[Arm], text: torch.Tensor, file: Path) -> None:
    """Find the products that `arms` need and that `file` lacks, for their heads, on a text that is not measured."""
    known = load_file(file) if file.exists() else {}
    device = str(model.device)
    wanted, best = {}, {}
    for arm in arms:
        if arm.kind in ("low", "learned"):
            name = arm.product
            heads = attention.ranking.best(arm.share / 100)
            of = [(layer, head) for layer, of_layer in heads.items() for head in of_layer]
            missing = [at for at in of if f"{name}.{at[0]}.{at[1]}.key" not in known]
            wanted.setdefault(name, (arm, set()))[1].update(missing)
            for layer, head in missing:
                best.setdefault(layer, set()).add(head)
    if best:
        seen = {}

        def observe(layer, query, key, scaling):
            for head in best.get(layer, ()):
                seen[layer, head] = query[head].clone(), key[head].clone(), scaling

        attention.arm, attention.observe = None, observe
        token_losses(model, text, len(text) - 1)
        attention.observe = None
        for name, (arm, missing) in tqdm(wanted.items(), desc="Products of low rank"):
            if not missing:
                continue
            heads = sorted(missing)
            queries, keys, scalings = zip(*(seen[at] for at in heads), strict=True)
            products = zip(*(low_rank(*of, arm.size) for of in zip(queries, keys, strict=True)), strict=True)
            of_query, of_key = map(torch.stack, products)
            of_query = of_query[:, None].expand(-1, len(queries[0]), -1, -1)
            if arm.kind == "learned":
                first = of_query, of_key
                of_query, of_key = distil(torch.stack(queries), torch.stack(keys), scalings[0], first, arm)
            for i, (layer, head) in enumerate(heads):
                known[f"{name}.{layer}.{head}.query"] = of_query[i].float().cpu().contiguous()
                known[f"{name}.{layer}.{head}.key"] = of_key[i].float().cpu().contiguous()
        save_file(known, file)
    attention.projections = {name: x.to(device) for name, x in known.items()}


# Measurements


def measure(model: PreTrainedModel, data: dict, name: str, beyond: int) -> dict:
    """Of every kind of text: mean natural and copy losses of each text, and the numbers found, in all and of those
    that were said more than `beyond` tokens ago (None: there are none)."""
    results = {}
    for kind, (texts, spans, needles) in data.items():
        natural, copy, found, far, bits = [], [], [], [], []
        for ids in tqdm(texts, desc=f"{name}, {kind}", leave=False):
            half = len(ids) // 2
            loss, _ = token_losses(model, ids, half)
            natural.append(loss[: -spans * SPAN_LENGTH].mean().item())
            copy.append(loss[-spans * SPAN_LENGTH :].view(spans, SPAN_LENGTH)[:, LEAD:].mean().item())
        for ids, answers, places in needles:
            is_right, nats = judge_answers(model, ids, answers)
            found.append(is_right.float().mean().item())
            is_far = torch.stack([answer[0] for answer in answers]) - places > beyond
            far.append(is_right[is_far].float().mean().item() if is_far.any() else None)
            bits.append(nats.sum().item() / sum(map(len, answers)))
        results[kind] = {"natural": natural, "copy": copy, "found": found, "found_far": far, "number_loss": bits}
    return results


def print_table(results: dict[str, dict], args: Arguments) -> None:
    """Every arm beside the same heads with all keys."""
    for kind in next(iter(results.values()))["measured"]:
        print(f"\n{kind}, {args.context_length} tokens: loss above that of the same heads with all keys\n")
        print(
            "| arm | work of the score | bytes | keys chosen | natural | copies | natural, above | copies, above "
            "| digits of numbers, above | numbers found | beyond the window | rule | seconds |"
        )
        print("|---" * 13 + "|")
        for name, result in results.items():
            arm, of = Arm.parse(name, args), result["measured"][kind]
            whole = "all-keys" if arm.share == args.share else f"all-keys/share-{arm.share}"
            base = results[whole]["measured"][kind] if whole in results else None
            work, read = result["work"]
            columns = [name, f"{work:.3f}", f"{read:.3f}", f"{result['keys_chosen']:.0f}"]
            columns += [f"{mean_and_error(of[x])[0]:.3f}" for x in ("natural", "copy")]
            columns += [signed(above(of[x], base[x])) if base else "" for x in ("natural", "copy", "number_loss")]
            columns += [said(of[x], "{:.1%}") for x in ("found", "found_far")]
            columns.append(keeps_the_rule(arm, work, of, base))
            print("|", " | ".join((*columns, str(result["seconds"]))), "|", flush=True)


def keeps_the_rule(arm: Arm, work: float, of: dict, base: dict | None) -> str:
    """Whether losses and cost of an arm that chooses are within the rule of the study."""
    if base is None or not arm.chooses:
        return ""
    natural, copy = (sum(of[x]) / len(of[x]) - sum(base[x]) / len(base[x]) for x in ("natural", "copy"))
    kept = natural <= MAX_NATURAL and copy <= MAX_COPY
    return "met" if kept and work <= MAX_WORK else "dear" if kept else "missed"


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    arms = [Arm.parse(name, args) for name in dict.fromkeys(args.arms)]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(args) | dict.fromkeys(("arms", "output_dir"))
    check_settings(folder / "settings.json", settings)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32: exact for the products of bf16

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.data, tokenizer, args.context_length, args.texts + 1)
    spans = min(SPANS, args.context_length // 4 // SPAN_LENGTH)
    data = {}
    for kind, of_kind in texts.items():
        copies = [repeat_spans(ids, spans, SPAN_LENGTH) for ids in of_kind[: args.texts]]
        data[kind] = copies, spans, make_needles(of_kind[: args.texts], tokenizer, args.needle_texts, seed=0)
    other = next(iter(texts.values()))[args.texts]
    ranking = find_ranking(args.model, other, folder / "ranking.json", device)
    model = load_stretched(args.model, args.context_length, device)
    attention = StudiedAttention(model, ranking, args)
    results = Results(folder / "results.json")
    missing = [arm for arm in arms if arm.name not in results]
    repeated = repeat_spans(other, args.context_length // 4 // SPAN_LENGTH, SPAN_LENGTH)
    fit_projections(model, attention, missing, repeated, folder / "projections.safetensors")
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    for arm in missing:
        print(f"\n{arm.name}", flush=True)
        attention.arm, begin = arm, time.perf_counter()
        measured = measure(model, data, arm.name, attention.other_window)
        result = {
            "measured": measured,
            "work": arm.work(args.context_length, head_dim, group),
            "keys_chosen": attention.keys_chosen(),
            "seconds": round(time.perf_counter() - begin, 1),
        }
        results.save(**{arm.name: result | environment(device.type)})
    write(folder / "record.json", {"settings": settings, "results": results})
    print_table(results, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on where it was.")
