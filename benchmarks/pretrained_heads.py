"""What a pretrained model loses under other attention, without training and after some LoRA: the study of heads.

    python benchmarks/pretrained_heads.py --model HuggingFaceTB/SmolLM2-135M --data code='src/**/*.py' book=novel.txt
    python benchmarks/pretrained_heads.py --model ... --data ... --arms full heads-20 --max_steps 100       # and LoRA

Every arm starts from the same weights, with rotary positions stretched to the context by YaRN (arXiv 2309.00071). On
every kind of text: the loss of the second half of each context, paired with full attention on the same texts; that of
tokens that are copied from within the window, from beyond it, and new ones (a token is a copy if the three tokens
before it and itself stood there before); and how many of 40 numbers in each of ten texts are found when they are asked
for at its end. Heads are ranked once, on a text of the first kind that is not measured. With `--max_steps`, the arms
are trained with LoRA on the rest of the first kind of text, and measured again.

Ends with a table and a record in JSON. Stopped, the same command goes on where it was.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from common import milliseconds
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from longnet_hf import DilatedPattern, HeadRanking, LongNetForCausalLM


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose training and records it shares
from measurements import (  # noqa: E402
    copy_distance,
    find_ranking,
    judge_answers,
    make_needles,
    papers_pattern,
    read_texts,
    token_losses,
    window_of_equal_work,
)
from record import Results, environment, write  # noqa: E402
from report import above, mean_and_error, said, signed  # noqa: E402
from training import RESUME_WITH_SAME, check_settings, rows_per_step, stretched_positions, train_on  # noqa: E402


ARMS = {
    "full": "full attention",
    "window-no-sink": "sliding window of the paper's work",
    "window": "the same with a sink",
    "window-wide": "a window of the dilated windows' work, with a sink",
    "layers-20": "window and sink, and full attention in the fifth of the layers with the best heads",
    "heads-5": "window and sink, and full attention in the best 5 % of the key/value heads",
    "heads-10": "10 %",
    "heads-20": "20 %",
    "heads-33": "33 %",
    "random-20": "20 %, drawn at random",
    "dilated-20": "dilated windows and a sink, and full attention in the best 20 %",
    "paper": "the paper's pattern with a sink",
}
SINK_TOKENS = 4


@dataclass
class Arguments:
    """What is compared, on what."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model."})
    data: list[str] = field(default_factory=list, metadata={"help": "KIND=FILES, a pattern, for every kind of text."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    context_length: int = field(default=32768, metadata={"help": "Tokens of a text."})
    texts: int = field(default=16, metadata={"help": "Texts of every kind."})
    needle_texts: int = field(default=10, metadata={"help": "Texts with 40 numbers each."})
    train_arms: list[str] = field(
        default_factory=lambda: ["full", "window", "heads-20"], metadata={"help": "Arms to train, with `--max_steps`."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})


DEFAULTS = dict(
    output_dir="runs/pretrained_heads",
    max_steps=0,
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    max_grad_norm=1.0,
    gradient_checkpointing=True,
    logging_steps=10,
    save_steps=50,
    save_total_limit=1,
)


def attention_of(arm: str, length: int, ranking: HeadRanking) -> dict:
    """The fields of a LongNet for an arm."""
    paper = papers_pattern(length)
    dilated = dict(
        segment_lengths=[length >> 4, length >> 2, length], dilation_rates=[1, 4, 16], branch_types=["window"] * 3
    )
    if arm == "full":
        return dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"])
    if arm in ("paper", "dilated-20"):
        fields = (paper if arm == "paper" else dilated) | {"head_offset": "rotating"}
    else:
        sink = 0 if arm == "window-no-sink" else SINK_TOKENS
        width = window_of_equal_work(DilatedPattern(**(dilated if arm == "window-wide" else paper)), length, sink)
        fields = dict(segment_lengths=[width], dilation_rates=[1], branch_types=["window"])
    if arm != "window-no-sink":
        fields["sink_tokens"] = SINK_TOKENS
    kind, _, share = arm.partition("-")
    if kind in ("heads", "dilated"):
        fields["full_attention_heads"] = ranking.best(int(share) / 100)
    if kind == "random":
        order = torch.randperm(len(ranking.ranked), generator=torch.Generator().manual_seed(0)).tolist()
        heads = sorted(ranking.ranked[i] for i in order[: round(len(order) * int(share) / 100)])
        fields["full_attention_heads"] = {layer: [h for of, h in heads if of == layer] for layer, _ in heads}
    if kind == "layers":
        best = sorted(ranking.scores, key=lambda layer: -sum(ranking.scores[layer]))
        fields["full_attention_layers"] = sorted(best[: round(len(best) * int(share) / 100)])
    return fields


def pairs_per_token(model: LongNetForCausalLM, length: int) -> float:
    """Mean over the key/value heads of all layers."""
    heads = model.config.num_key_value_heads
    pairs = [pattern.pairs(length, heads) / heads / length for pattern in model.config.layer_patterns]
    return sum(pairs) / len(pairs)


# Measurements


def measure(model: PreTrainedModel, data: dict, args: Arguments, name: str) -> dict:
    """Of every kind of text: mean losses of each text, in all and by class (None: it has none), and which numbers are
    found."""
    model.eval()
    half, results = args.context_length // 2, {}
    for kind, (texts, distances, needles) in data.items():
        losses: dict[str, list[float | None]] = {"all": [], "near": [], "far": [], "new": []}
        for ids, distance in zip(tqdm(texts, desc=f"{name}, {kind}"), distances, strict=True):
            loss, _ = token_losses(model, ids, half)
            far = args.context_length // 15
            classes = {"all": distance >= 0, "new": distance == 0}
            classes |= {"near": (distance > 0) & (distance <= far), "far": distance > far}
            for which, is_in in classes.items():
                of_class = loss[is_in[half:]]
                losses[which].append(of_class.mean().item() if len(of_class) else None)
        found, bits = [], []
        for ids, answers, _ in needles:
            is_right, nats = judge_answers(model, ids, answers)
            found.append(is_right.float().mean().item())
            bits.append(nats.sum().item() / sum(map(len, answers)))
        results[kind] = {"losses": losses, "found": found, "needle_loss": bits}
    return results


# The run


def load_model(arm: str, args: Arguments, ranking: HeadRanking) -> PreTrainedModel:
    positions = stretched_positions(AutoConfig.from_pretrained(args.model), args.context_length)
    fields = attention_of(arm, args.context_length, ranking)
    return LongNetForCausalLM.from_llama(args.model, **fields, **positions, dtype=torch.float32)


def run_arm(arm: str, args: Arguments, training_args: TrainingArguments, data: dict, ranking) -> None:
    """Measure an arm without training, into `result.json` in its folder."""
    folder = Path(training_args.output_dir) / arm
    folder.mkdir(parents=True, exist_ok=True)
    result = Results(folder / "result.json")
    if "before" in result:
        print(f"{arm} is measured already.")
        return
    print(f"\n{arm}: {ARMS[arm]}", flush=True)
    model = load_model(arm, args, ranking).to(training_args.device).eval()
    texts = next(iter(data.values()))[0]
    time = milliseconds(lambda: token_losses(model, texts[0], len(texts[0]) - 1), 0.5)
    result.save(
        before=measure(model, data, args, arm),
        pairs=round(pairs_per_token(model, args.context_length)),
        tokens_per_second=round(1e3 * args.context_length / time),
        **environment(training_args.device.type),
    )


def train_arm(arm: str, args: Arguments, training_args: TrainingArguments, data: dict, to_train, ranking) -> None:
    """Train an arm with LoRA, and measure it again."""
    folder = Path(training_args.output_dir) / arm
    result = Results(folder / "result.json")
    if "after" in result:
        print(f"{arm} is trained already.")
        return
    print(f"\n{arm}, with LoRA", flush=True)
    set_seed(training_args.seed)
    model = load_model(arm, args, ranking).to(training_args.device)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],  # as LongLoRA
        ensure_weight_tying=True,
    )
    training_args.output_dir = str(folder)
    trainer = Trainer(
        get_peft_model(model, config),
        training_args,
        default_data_collator,
        [{"input_ids": ids, "labels": ids} for ids in to_train],
    )
    metrics, steps = train_on(trainer, folder)
    trainer.save_model(str(folder / "adapter"))
    if steps:
        tokens = steps * rows_per_step(training_args) * args.context_length
        result.save(trained_tokens_per_second=round(tokens / metrics["train_runtime"]))
    result.save(after=measure(model, data, args, f"{arm}, after"), max_steps=training_args.max_steps)


def print_table(results: dict[str, dict], when: str) -> None:
    """The loss of full attention, and of every other arm by how much it is above that on the same texts."""
    full = results["full"][when]
    for kind in full:
        print(f"\n{kind}, {when} training\n")
        print("| arm | pairs per token | loss (nats) | above full | copied near | far | new | numbers found |")
        print("|---|---|---|---|---|---|---|---|")
        for arm, result in results.items():
            if when not in result:
                continue
            measured, base = result[when][kind], full[kind]
            of, of_full = measured["losses"], base["losses"]
            losses = [signed(above(of[x], of_full[x])) for x in ("all", "near", "far", "new")]
            columns = arm, result["pairs"], f"{mean_and_error(of['all'])[0]:.3f}", *losses
            print("|", " | ".join(map(str, columns)), "|", said(measured["found"], "{:.1%}"), "|", flush=True)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    for name, arms in (("arms", args.arms), ("train_arms", args.train_arms)):
        if set(arms) - set(ARMS) or "full" not in arms:
            raise ValueError(f"`--{name}` must be `full` and others of {list(ARMS)}, got {arms}.")
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = (
        asdict(args)
        | {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
        | dict.fromkeys(("arms", "train_arms"))
    )
    check_settings(folder / "settings.json", settings)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.data, tokenizer, args.context_length, args.texts + 1)
    first = next(iter(texts.values()))
    data = {
        kind: (
            of_kind[: args.texts],
            [copy_distance(ids) for ids in of_kind[: args.texts]],
            make_needles(of_kind[: args.texts], tokenizer, args.needle_texts, seed=0),
        )
        for kind, of_kind in texts.items()
    }
    ranking = find_ranking(args.model, first[args.texts], folder / "ranking.json", training_args.device)
    ranking.draw().savefig(folder / "ranking.png", dpi=150)
    for arm in args.arms:
        run_arm(arm, args, training_args, data, ranking)
    for arm in args.train_arms if training_args.max_steps > 0 else ():
        train_arm(arm, args, training_args, data, first[args.texts + 1 :], ranking)
        training_args.output_dir = str(folder)
    results = {arm: Results(folder / arm / "result.json") for arm in ARMS}
    results = {arm: result for arm, result in results.items() if result}
    write(folder / "record.json", {"settings": settings, "results": results})
    for when in ("before", "after"):
        if when in results["full"]:
            print_table(results, when)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on where it was.")
