"""Which attention learns to look things up: small models trained from scratch on multi-query associative recall.

    python benchmarks/associative_recall.py --output_dir runs/associative_recall

The task is MQAR of Zoology (Arora et al., arXiv 2312.04927, github.com/HazyResearch/zoology), written anew after its
description: a row begins with pairs of a key and a value; behind them, among tokens that say nothing, every key comes
once more, at a distance whose probability falls as a power law, and its value has to be said. Other than there, a row
begins with up to an eighth of its length that says nothing, and a question may stand anywhere: were they all at even
places, as the keys, no dilated segment would ever join one to a value. Every arm is trained on
the same rows, with all numbers of pairs mixed, and is measured on others: by number of pairs, and by whether a pair
is nearer than the dense window is wide, that of the heads that see least (of segments: their length, across whose
boundaries nothing is seen). Chance is one of the values of the row.

That an attention comes upon looking things up takes thousands of steps, whichever it is. By default all arms start
near what they have to learn, and all is trained: the first layer with a preference for the token before (for which
Zoology has short convolutions), the second with one for equal tokens (queries and keys alike, as in mimetic
initialization, arXiv 2305.09828). What is compared is then what an attention can do, more than whether it comes upon
it. `--start random` leaves that to training, which wants a GPU.

Ends with a table and a record in JSON. Stopped, the same command goes on with the arms and seeds that are not done.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from common import describe as describe_run
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from longnet_hf import DilatedPattern, LongNetConfig, LongNetForCausalLM, describe


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose measurements and records it shares
from evaluate import dense_width  # noqa: E402
from measurements import window_of_equal_work  # noqa: E402
from record import Results, environment, read  # noqa: E402
from report import said, table  # noqa: E402
from training import RESUME_WITH_SAME, check_settings  # noqa: E402


ARMS = {
    "full": "full attention",
    "window": "a sliding window of the paper's work, and a sink",
    "window-heads": "the same with a quarter of the heads full",
    "paper": "the paper's pattern, scaled to the length",
    "shifted": "the same, shifted in the second layer",
    "windows": "windows of the same lengths and rates, with rotating phases",
    "windows-thin": "windows of 1/16, 1/4 and all of the length, at rates 1, 4 and 16, with rotating phases",
}
SINK_TOKENS = 1
POWER = 0.01  # of the distances, Zoology's
ROPE_THETA = 100.0  # rows are short
START = 3.0  # of the biases with which the first layer looks at the token before


@dataclass
class Arguments:
    """The task, and the models that learn it."""

    length: int = field(default=64, metadata={"help": "Tokens of a row."})
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16], metadata={"help": "Numbers of pairs in a row."})
    vocab_size: int = field(default=64, metadata={"help": "Half of it are keys, half are values."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the models, which have two layers."})
    heads: int = field(default=4, metadata={"help": "Heads of a layer."})
    segment_lengths: list[int] = field(default_factory=lambda: [8, 32, 64], metadata={"help": "w of the paper's."})
    dilation_rates: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "r of the paper's."})
    rows: int = field(default=36_000, metadata={"help": "Rows to train on."})
    start: str = field(default="near", metadata={"help": "Weights to start from: near or random."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One model of every arm for each."})
    test_rows: int = field(default=200, metadata={"help": "Rows that are measured, of every number of pairs."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"`--arms` must be of {list(ARMS)}, got {self.arms}.")
        if self.start not in ("near", "random"):
            raise ValueError(f"`--start` must be near or random, got {self.start!r}.")
        most = min(self.length // 4, self.vocab_size // 2 - 1)
        if not self.pairs or not 1 <= min(self.pairs) <= max(self.pairs) <= most:
            raise ValueError(
                f"`--pairs` must lie between 1 and {most}, a quarter of `--length` and the keys of `--vocab_size`, "
                f"got {self.pairs}."
            )


DEFAULTS = dict(
    output_dir="runs/associative_recall",
    max_steps=1200,
    per_device_train_batch_size=32,
    learning_rate=3e-3,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=50,
    max_grad_norm=1.0,
    logging_steps=100,
    save_strategy="no",
    report_to="none",
    dataloader_pin_memory=torch.cuda.is_available(),
)


def make_rows(args: Arguments, pairs: int, number: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows `input_ids` `[number, length]`; `labels`, the value behind every query and -100 elsewhere; and `distance`
    `[number, length]`, of every label how far the query before it stands behind its key."""
    generator = torch.Generator().manual_seed(seed)
    half, context = args.vocab_size // 2, 2 * pairs

    def draw(count: int, of: int) -> torch.Tensor:
        """Different numbers below `of`, in random order, `[number, count]`."""
        return torch.rand(number, of, generator=generator).argsort(1)[:, :count]

    keys, values = 1 + draw(pairs, half - 1), half + draw(pairs, half)
    lead = torch.randint(args.length // 8, (number, 1), generator=generator)
    input_ids = torch.zeros(number, args.length, dtype=torch.long)
    input_ids.scatter_(1, lead + torch.arange(context), torch.stack((keys, values), dim=2).flatten(1))
    places = lead + context + torch.arange(args.length - context)
    weights = torch.arange(1, args.length - context + 1, dtype=torch.float64) ** (POWER - 1)
    weights = weights.expand(number, -1).masked_fill(places > args.length - 2, 0.0)
    queries = places.gather(1, torch.multinomial(weights, pairs, generator=generator))
    input_ids.scatter_(1, queries, keys)
    labels, distance = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    labels.scatter_(1, queries + 1, values)
    distance.scatter_(1, queries + 1, queries - lead - 2 * torch.arange(pairs))
    return {"input_ids": input_ids, "labels": labels, "distance": distance}


def attention_of(arm: str, args: Arguments) -> dict:
    """The fields of a LongNet for an arm."""
    paper = dict(segment_lengths=args.segment_lengths, dilation_rates=args.dilation_rates)
    if arm in ("paper", "shifted"):
        return paper | {"segment_shift": arm == "shifted"}
    if arm.startswith("windows"):
        thin = dict(segment_lengths=[args.length >> 4, args.length >> 2, args.length], dilation_rates=[1, 4, 16])
        fields = paper if arm == "windows" else thin
        return fields | {"branch_types": ["window"] * len(fields["dilation_rates"]), "head_offset": "rotating"}
    width = None if arm == "full" else window_of_equal_work(DilatedPattern(**paper), args.length, SINK_TOKENS)
    fields = dict(segment_lengths=[width], dilation_rates=[1], branch_types=["window"])
    if arm == "full":
        return fields
    full = list(range(max(1, args.heads // 4)))
    return (
        fields
        | {"sink_tokens": SINK_TOKENS}
        | ({"full_attention_heads": {0: full, 1: full}} if arm == "window-heads" else {})
    )


def make_model(arm: str, args: Arguments) -> LongNetForCausalLM:
    config = LongNetConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        use_sub_norm=False,
        scale_embedding=False,
        initializer_range=args.hidden_size**-0.5,
        **attention_of(arm, args),
    )
    model = LongNetForCausalLM(config)
    if args.start == "near":
        start_near(model)
    return model


@torch.no_grad()
def start_near(model: LongNetForCausalLM) -> None:
    """Weights with which the first layer attends to the token before, the second to equal tokens, and both hand on
    what they find: by biases of queries and keys, the latter turned by the rotary angles of one position, so that
    their product is largest there; and by projections that undo each other."""
    config, half = model.config, model.config.head_dim // 2
    angles = ROPE_THETA ** (-torch.arange(half) / half)
    query, key = torch.cat((torch.ones(half), torch.zeros(half))), torch.cat((angles.cos(), angles.sin()))
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain=1.0 if index else 0.1)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        if index == 0:
            attention.q_proj.bias.copy_(START * query.repeat(config.num_attention_heads))
            attention.k_proj.bias.copy_(START * key.repeat(config.num_key_value_heads))


@torch.no_grad()
def measure(model: LongNetForCausalLM, args: Arguments, window: float, seed: int) -> dict:
    """The share of values said right: by number of pairs, nearer than the window and beyond it (None: no pairs)."""
    model.eval()
    by_pairs, right, inside = {}, [], []
    for pairs in args.pairs:
        rows = make_rows(args, pairs, args.test_rows, seed)
        of_pairs = []
        for ids, labels, distance in zip(*(rows[name].split(50) for name in rows), strict=True):
            top = model(ids.to(model.device)).logits[:, :-1].argmax(-1).cpu()
            asked = labels[:, 1:] != -100
            of_pairs.append((top == labels[:, 1:])[asked])
            inside.append(distance[:, 1:][asked] < window)
        by_pairs[pairs] = torch.cat(of_pairs).double().mean().item()
        right += of_pairs
    right, inside = torch.cat(right).double(), torch.cat(inside)
    inside_and_beyond = [right[which].mean().item() if which.any() else None for which in (inside, ~inside)]
    return {"pairs": by_pairs, "inside": inside_and_beyond[0], "beyond": inside_and_beyond[1]}


def run_arm(arm: str, seed: int, args: Arguments, training_args: TrainingArguments) -> None:
    """Train and measure one model of an arm, into a file of its own: several may run at a time."""
    results = Results(Path(training_args.output_dir) / f"{arm}-{seed}.json")
    if results:
        print(f"{arm}-{seed} is done already.")
        return
    print(f"\n{arm}-{seed}: {ARMS[arm]}", flush=True)
    set_seed(seed)
    model = make_model(arm, args)
    described = describe(model, args.length)
    window = min(dense_width(head.branches) for layer in described.layers for head in layer.heads)
    parts = [make_rows(args, pairs, args.rows // len(args.pairs), 1000 + seed) for pairs in args.pairs]
    columns = {x: torch.cat([part[x] for part in parts]) for x in ("input_ids", "labels")}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    metrics = Trainer(model, training_args, train_dataset=rows).train().metrics
    results.save(
        **measure(model, args, window, seed=10**6),
        pairs_per_token=described.pairs_per_token,
        dense_window=None if window == math.inf else window,
        training_loss=metrics["train_loss"],
        seconds=round(metrics["train_runtime"]),
        **environment(training_args.device.type),
    )


def print_table(args: Arguments, folder: Path) -> None:
    """Of all models that are done."""
    rows = []
    for arm in ARMS:
        of = [read(file) for file in sorted(folder.glob(f"{arm}-[0-9]*.json"))]
        if not of:
            continue
        window = of[0]["dense_window"]
        accuracies = [[result["pairs"][str(pairs)] for result in of] for pairs in args.pairs]
        accuracies += [[result[which] for result in of] for which in ("inside", "beyond")]
        about = (
            f"`{arm}`: {ARMS[arm]}",
            len(of),
            f"{of[0]['pairs_per_token']:.0f}",
            "all" if window is None else window,
        )
        rows.append([*about, *(said(accuracy, "{:.1%}") for accuracy in accuracies)])
    head = ["attention", "seeds", "pairs per token", "dense window", *(f"{pairs} keys" for pairs in args.pairs)]
    print(f"\n{table([*head, 'nearer than the dense window', 'beyond it'], rows)}")


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    folder = Path(training_args.output_dir)
    settings = asdict(args) | {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
    # More arms and seeds may be asked for; the seed of Trainer is that of the arm
    check_settings(folder / "settings.json", settings | dict.fromkeys(("arms", "seeds", "seed")))
    for seed in args.seeds:
        for arm in args.arms:
            training_args.seed = seed
            run_arm(arm, seed, args, training_args)
    print(f"\n{describe_run(training_args.device.type)}")
    print_table(args, folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on where it was.")
