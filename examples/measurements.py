"""What is measured of causal language models in long texts: losses of tokens, copies, numbers that are asked for.

Any causal language model of Transformers will do. The report (evaluate.py) and the studies of heads
(benchmarks/pretrained_heads.py, benchmarks/selected_blocks.py) share it.
"""

import base64
import glob
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from training import stretched_positions
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longnet_hf import DilatedPattern, HeadRanking, rank_heads


NAMES = (
    "Alice Boris Clara David Elena Frank Grace Henry Irene James Karen Louis Maria Nadia Oscar Paula Quinn Robert "
    "Sarah Thomas Ulrich Victor Wanda Xavier Yvonne Zachary Anton Bella Carlos Diana Edgar Fiona Gustav Hanna Ivan "
    "Julia Kevin Laura Martin Nora"
).split()
_PIECE = 2048  # positions whose logits exist at a time
_PROBED = 8


class NeedleText(NamedTuple):
    """A text `ids` `[N]` that asks for 40 numbers at its end: the columns of each answer's tokens, and where the text
    has said each, `said` `[40]`, both in the order of the questions."""

    ids: torch.Tensor
    answers: list[torch.Tensor]
    said: torch.Tensor


def papers_pattern(length: int) -> dict:
    """The fields of the paper's pattern for sequences of `length` tokens."""
    return dict(segment_lengths=[length >> i for i in range(4, -1, -1)], dilation_rates=[1, 2, 4, 6, 12])


def window_of_pairs(pairs: float, length: int, sink_tokens: int = 0) -> int:
    """w of the sliding window that joins `pairs` pairs per token of N = `length`, together with a sink of s tokens: on
    average w - w (w - 1) / 2N of the window, and s (N - w) / N - s (s - 1) / 2N of the sink outside it."""
    middle = length + 0.5 - sink_tokens
    of_sink = sink_tokens * (length - (sink_tokens - 1) / 2)
    return max(1, round(middle - math.sqrt(max(0, middle**2 - 2 * (length * pairs - of_sink)))))


def window_of_equal_work(pattern: DilatedPattern, length: int, sink_tokens: int = 0) -> int:
    """w of the sliding window that, with its sink, joins as many pairs of a sequence as `pattern` does."""
    heads = math.lcm(*pattern.dilation_rates)  # all phases
    return window_of_pairs(pattern.pairs(length, heads) / heads / length, length, sink_tokens)


def read_documents(data: list[str]) -> dict[str, Iterator[str]]:
    """The texts of the files of every kind in `data` (KIND=FILES), folder by folder."""
    if not data:
        raise ValueError("`--data` must name texts: KIND=FILES, such as code='src/**/*.py'.")
    found: dict[str, list[str]] = {}
    for entry in data:
        kind, _, pattern = entry.partition("=")
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise ValueError(f"`--data` names no file: {entry!r}; it takes KIND=FILES, such as code='src/**/*.py'.")
        found.setdefault(kind, []).extend(files)
    return {kind: _read(files, f"Read {kind}") for kind, files in found.items()}


def _read(files: list[str], description: str) -> Iterator[str]:
    for file in tqdm(files, desc=description):
        yield Path(file).read_text(encoding="utf-8", errors="replace")


def read_texts(data: list[str], tokenizer, length: int, at_least: int) -> dict[str, torch.Tensor]:
    """Texts `[texts, N]` of every kind in `data` (KIND=FILES), as many as there are. Files are laid end to end, folder
    by folder."""
    texts = {}
    for kind, documents in read_documents(data).items():
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
        ids = torch.tensor([token for document in ids for token in document])
        texts[kind] = ids[: len(ids) // length * length].view(-1, length)
        if len(texts[kind]) < at_least:
            raise ValueError(f"`--data` fills {len(texts[kind])} texts of {kind}, and {at_least} are needed.")
    return texts


def load_stretched(model: str, length: int, device: torch.device) -> PreTrainedModel:
    """A model as it was published, in evaluation mode, with rotary positions that reach over `length` tokens."""
    positions = stretched_positions(AutoConfig.from_pretrained(model), length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **positions).to(device).eval()


def find_ranking(model: str, text: torch.Tensor, file: Path, device: torch.device) -> HeadRanking:
    """The ranking of a model's heads on a text `[N]`, found once and kept in `file`."""
    if not file.exists():
        rank_heads(load_stretched(model, len(text), device), text[None]).save(file)
    ranking = HeadRanking.load(file)
    print(ranking)
    return ranking


def repeat_spans(ids: torch.Tensor, number: int, length: int, seed: int = 0) -> torch.Tensor:
    """A text `[N]` whose end is replaced by `number` spans of `length` tokens from anywhere in the rest of it."""
    text = ids[: len(ids) - number * length]
    if len(text) < 2 * length:
        raise ValueError(f"The context has {len(ids)} tokens, too few for {number} spans of {length} and a text.")
    starts = torch.randint(len(text) - length, (number,), generator=torch.Generator().manual_seed(seed))
    return torch.cat((text, text[starts[:, None] + torch.arange(length)].flatten()))


def copy_distance(ids: torch.Tensor, context: int = 3) -> torch.Tensor:
    """For every token, how far back it last stood behind the same `context` tokens; 0 where it never did."""
    last, distances = {}, torch.zeros(len(ids), dtype=torch.long)
    tokens = ids.tolist()
    for t in range(context, len(tokens)):
        key = tuple(tokens[t - context : t + 1])
        distances[t] = t - last.get(key, t)
        last[key] = t
    return distances


def pack(losses: torch.Tensor) -> list[str]:
    """Losses `[T, N]` as JSON can hold them without a line for each: half precision, in base64, a row each."""
    return [base64.b64encode(row.half().numpy().astype("<f2").tobytes()).decode() for row in losses]


def unpack(rows: list[str]) -> torch.Tensor:
    """What [`pack`] packed."""
    return torch.stack([torch.from_numpy(np.frombuffer(base64.b64decode(row), "<f2").astype("f8")) for row in rows])


def key_tokens(short: torch.Tensor, long: torch.Tensor) -> torch.Tensor:
    """Which tokens need a long context: LongPPL's (arXiv 2410.23771, with its alpha = 2 and beta = -2).

    Args:
        short, long: their losses in nats after a short and after a long context, under one evaluator.
    """
    return (short - long > 2) & (long < 2)


def long_perplexity(losses: torch.Tensor, keys: torch.Tensor) -> tuple[float, float]:
    """exp of the mean loss of the `keys` among tokens `[T, N]`, and its standard error over the texts that have some
    (of a ratio of sums); NaN where it cannot be known."""
    counts, sums = keys.sum(1).double(), (losses.double() * keys).sum(1)
    total, texts = counts.sum(), int((counts > 0).sum())
    if not texts:
        return math.nan, math.nan
    mean = sums.sum() / total
    rest = ((sums - mean * counts) ** 2).sum() * texts / (texts - 1) if texts > 1 else math.nan
    return mean.exp().item(), float(mean.exp() * rest**0.5 / total)


def make_needles(texts: torch.Tensor, tokenizer, number: int, seed: int) -> list[NeedleText]:
    """Texts in which 40 people have a number each, that ask for all of them at their end."""
    generator, needles = torch.Generator().manual_seed(seed), []

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    for text in texts[torch.arange(number) % len(texts)]:
        secrets = torch.randint(10**6, 10**7, (len(NAMES),), generator=generator).tolist()
        hidden = [ids_of(f"\nThe secret number of {name} is {x}.\n") for name, x in zip(NAMES, secrets, strict=True)]
        asked, answers = [], [ids_of(f" {x}") for x in secrets]
        # Who comes first in the text, and who is asked for first
        placed, order = (torch.randperm(len(NAMES), generator=generator).tolist() for _ in range(2))
        for i in order:
            asked += [ids_of(f"\nThe secret number of {NAMES[i]} is"), answers[i]]
        room = len(text) - sum(map(len, hidden)) - sum(map(len, asked))
        if room < len(NAMES):
            raise ValueError(
                f"The context (`--context_length`, `--lengths`) must be longer, got {len(text)}: 40 numbers take "
                f"{len(text) - room + len(NAMES)}. `--needle_texts 0` leaves them out where there is such an option."
            )
        cuts = torch.randperm(room, generator=generator)[: len(NAMES)].sort().values.tolist()
        pieces, start = [], 0
        for cut, i in zip(cuts, placed, strict=True):
            pieces += [text[start:cut], hidden[i]]
            start = cut
        pieces += [text[start:room], *asked]
        stops = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        columns = [
            torch.arange(stop - len(answers[i]), stop)
            for i, stop in zip(order, stops[-2 * len(NAMES) :][1::2].tolist(), strict=True)
        ]
        said = stops[1 : 2 * len(NAMES) : 2][[placed.index(i) for i in order]] - 1
        needles.append(NeedleText(torch.cat(pieces), columns, said))
    return needles


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, ids: torch.Tensor, start: int, in_bf16: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of the tokens from column `start` on, and whether each is the likeliest; the model under bf16 autocast, by
    default on a GPU.

    The logits of a few positions exist at a time, but for a model that makes more of its last hidden states than its
    output embedding does (such as a soft cap), whose own logits are taken, all at once.
    """
    device = model.device
    input_ids, labels = ids[None].to(device), ids[start:].to(device)
    in_bf16 = device.type == "cuda" if in_bf16 is None else in_bf16
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        if _head_is_all(model):
            states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, start - 1 : -1]
            pieces = _logits_of(model.get_output_embeddings(), states)
        else:
            pieces = _own_logits(model, input_ids, len(labels) + 1)[:-1].split(_PIECE)
        losses, is_top = [], []
        for logits, y in zip(pieces, labels.split(_PIECE), strict=True):
            losses.append(F.cross_entropy(logits.float(), y, reduction="none"))
            is_top.append(logits.argmax(-1) == y)
    return torch.cat(losses).cpu(), torch.cat(is_top).cpu()


def judge_answers(
    model: PreTrainedModel, ids: torch.Tensor, answers: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each answer in a text, given the columns of its tokens, the first answer first: whether all of these are the
    likeliest, and their nats in all. What comes before an answer is given, the answers before it too."""
    start = int(answers[0][0])
    losses, is_top = token_losses(model, ids, start)
    is_right = torch.stack([is_top[answer - start].all() for answer in answers])
    return is_right, torch.stack([losses[answer - start].sum() for answer in answers])


def _logits_of(head: nn.Module, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """An output embedding's logits of a few states `[N, width]` at a time; of a linear one in float32, as bfloat16 has
    ties between the likeliest."""
    if type(head) is not nn.Linear:
        yield from map(head, states.split(_PIECE))
        return
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    for of_piece in states.split(_PIECE):
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(of_piece.float(), weight, bias)
        yield logits


def _own_logits(model: PreTrainedModel, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` logits of a row, as the model gives them."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if keeps else {}
    return model(input_ids=input_ids, use_cache=False, **options).logits[0, -count:]


def _head_is_all(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output embedding of its last hidden states: tried once, on a few tokens."""
    known = vars(model).get("_longnet_head_is_all")
    if known is None:
        head = model.get_output_embeddings()
        known = False
        if head is not None and model.base_model is not model:
            input_ids = torch.arange(1, 1 + _PROBED, device=model.device)[None] % head.weight.shape[0]
            own = _own_logits(model, input_ids, _PROBED).float()
            ours = head(model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]).float()
            # The same operations: what differs more is a cap or a scale, even of small logits
            known = bool((own - ours).abs().max() <= 1e-6 * own.abs().max())
        model._longnet_head_is_all = known
    return known
