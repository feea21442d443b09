"""Take a pretrained model to a longer context with LoRA, and compare the patterns that it may attend by.

    python benchmarks/lora_long_context.py --data 'linux/fs/**/*.c' --bf16     # SmolLM2-135M at 32 K tokens, on a GPU
    python benchmarks/lora_long_context.py --context_length 2048 --max_steps 10 --variants full sliding windows
                                                                             # small, on a CPU

Each variant starts from the same weights, is measured, trained with LoRA on the same documents, and measured again:
held-out loss by position in the context, and how well it retrieves a number from every depth of a long text. "native"
is the model as it was published; all others stretch its rotary positions to the context with YaRN (arXiv 2309.00071),
which needs no training. The last two first find out, on training text, which layers miss full attention most: each in
turn is put under the windows alone. As in LongLoRA (arXiv 2309.12307), embeddings and norms are trained beside the
adapters.

Ends with a table, a plot and a record in JSON. Stopped, the same command goes on where it was.
"""

import gc
import itertools
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutput

from longnet_hf import DilatedPattern, LongNetForCausalLM


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose data, training and records it shares
from corpus import (  # noqa: E402
    DataArguments,
    bits_per_byte,
    count_bytes,
    load_documents,
    split_contexts,
    split_documents,
    token_losses,
)
from record import Results, environment, peak_gibibytes, write  # noqa: E402
from training import RESUME_WITH_SAME, check_settings, stretched_positions, train_on  # noqa: E402


VARIANTS = {
    "native": "full attention, positions as published, not trained",
    "full": "full attention",
    "sliding": "sliding window, as much work as the paper's pattern",
    "sliding-wide": "sliding window, as much work as the windows",
    "paper": "LongNet as in the paper",
    "shifted": "the paper's pattern, segments shifted in odd layers",
    "windows": "three dilated windows",
    "hybrid": "the windows, and full attention in every fifth layer",
    "hybrid-measured": "the windows, and full attention in the fifth of the layers that miss it most",
    "sliding-measured": "the wide sliding window, likewise",
}


@dataclass
class Arguments(DataArguments):
    """What is compared, on what."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model: a folder or a name on the Hub."}
    )
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": f"Of {', '.join(VARIANTS)}."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    needles: int = field(default=4, metadata={"help": "Numbers to retrieve per depth and length."})


DEFAULTS = dict(
    output_dir="runs/lora_long_context",
    context_length=32768,
    max_held_out_contexts=8,
    max_steps=100,
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    max_grad_norm=1.0,
    gradient_checkpointing=True,
    logging_steps=10,
    save_steps=50,
    save_total_limit=1,
    dataloader_pin_memory=torch.cuda.is_available(),
)


# Models


class LlamaWithChunkedLoss(LlamaForCausalLM):
    """Like LongNet, without the logits of all positions: the variants then differ in their attention alone."""

    chunked_loss = LongNetForCausalLM.chunked_loss

    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden_states = self.model(input_ids, use_cache=False).last_hidden_state
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return CausalLMOutput(loss=self.chunked_loss(hidden_states, shift_labels, num_items_in_batch))


def window_of_equal_work(pattern: DilatedPattern, length: int) -> int:
    """w of the sliding window that joins as many pairs of a sequence as `pattern` does: on average
    w - w (w - 1) / 2N per token."""
    heads = math.lcm(*pattern.dilation_rates)  # all phases
    pairs = pattern.pairs(length, heads) / heads / length
    return max(1, round(length + 0.5 - math.sqrt((length + 0.5) ** 2 - 2 * length * pairs)))


def attention_of(variant: str, length: int, num_layers: int) -> dict | None:
    """The fields of a LongNet for a variant, scaled to a context; `None` for the source's own full attention. Which
    layers have it where this is measured is left open."""
    if variant in ("native", "full"):
        return None
    paper = dict(segment_lengths=[length >> i for i in range(4, -1, -1)], dilation_rates=[1, 2, 4, 6, 12])
    windows = dict(
        segment_lengths=[length >> 4, length >> 2, length], dilation_rates=[1, 4, 16], branch_types=["window"] * 3
    )
    if variant.startswith("sliding"):
        like = DilatedPattern(**(paper if variant == "sliding" else windows))
        width = window_of_equal_work(like, length)
        return dict(segment_lengths=[width], dilation_rates=[1], branch_types=["window"])
    # Few key/value heads: phases that differ from layer to layer let all of them together see everything
    fields = (paper if variant in ("paper", "shifted") else windows) | {"head_offset": "rotating"}
    if variant == "shifted":
        fields["segment_shift"] = True
    if variant == "hybrid":
        fields["full_attention_layers"] = list(range(4, num_layers, 5))
    return fields


def load_model(attention: dict | None, positions: dict, args: Arguments) -> PreTrainedModel:
    """The pretrained weights under other attention (`None`: their own full one) and positions."""
    if attention is None:
        config = AutoConfig.from_pretrained(args.model)
        config.update(positions)
        return LlamaWithChunkedLoss.from_pretrained(args.model, config=config, dtype=torch.float32)
    return LongNetForCausalLM.from_llama(args.model, **attention, **positions, dtype=torch.float32)


def add_adapters(model: PreTrainedModel, args: Arguments):
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
        ensure_weight_tying=True,
    )
    return get_peft_model(model, config)


# Measurements


def make_needles(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Dataset,
    lengths: list[int],
    depths: list[float],
    number: int,
    seed: int,
) -> list[dict]:
    """Texts cut out of contexts, with a number in them that the end asks for: so many of every length and depth."""
    tokens, generator = torch.tensor(contexts["input_ids"][:]).flatten(), torch.Generator().manual_seed(seed)

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    needles = []
    for length, depth, _ in itertools.product(lengths, depths, range(number)):
        secret = str(int(torch.randint(10**6, 10**7, (), generator=generator)))
        needle, question = ids_of(f"\nThe secret number is {secret}.\n"), ids_of("\nThe secret number is")
        answer = ids_of(f" {secret}")
        room = length - sum(map(len, (needle, question, answer)))
        if room < 1:
            raise ValueError(
                f"`--context_length` must be longer: a text of {length} tokens, an eighth or a quarter of it, has no "
                f"room around a number, which takes {length - room}."
            )
        start = int(torch.randint(max(1, len(tokens) - room), (), generator=generator))
        before, after = tokens[start : start + room].split((round(depth * room), room - round(depth * room)))
        ids = torch.cat((before, needle, after, question, answer))
        needles.append({"length": length, "depth": depth, "ids": ids, "answer": len(answer)})
    return needles


def costs_of_layers(attention: dict, positions: dict, args: Arguments, training_args: TrainingArguments, data) -> list:
    """What it costs to take full attention from each layer alone: by how much the loss of texts of a quarter of the
    context with a number in them grows, beyond the local branch, and again that of the number, in bits per token."""
    length, depths = args.context_length >> 2, [0.0, 0.25, 0.5]
    needles = make_needles(
        data["tokenizer"], data["contexts"].select(range(1)), [length], depths, args.needles, seed=1
    )
    texts = Dataset.from_list([{"input_ids": x["ids"].tolist()} for x in needles])
    local, answer = attention["segment_lengths"][0], min(x["answer"] for x in needles)
    model = load_model(attention, positions, args).to(training_args.device).eval()
    layers = model.model.layers
    patterns, full = [layer.self_attn.pattern for layer in layers], DilatedPattern.full().canonical()
    losses = []
    for number in (None, *range(len(layers))):
        for i, layer in enumerate(layers):
            layer.self_attn.pattern = patterns[i] if i == number else full
        where = "nowhere" if number is None else f"in layer {number}"
        bits = token_losses(model, texts, training_args, f"with the pattern {where}")
        losses.append((bits[:, local:].mean() + bits[:, -answer:].mean()).item())
    return [loss - losses[0] for loss in losses[1:]]


@torch.no_grad()
def retrieve(model: PreTrainedModel, needles: list[dict], args: TrainingArguments, name: str) -> list[dict]:
    """Whether greedy decoding would give each answer whole, and its loss in bits per digit (guessing: 3.32)."""
    found = []
    for needle in tqdm(needles, desc=f"Retrieve, {name}"):
        ids, count = needle["ids"][None].to(args.device), needle["answer"]
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            hidden_states = model.model(ids, use_cache=False).last_hidden_state[0, -count - 1 : -1]
            logits = model.lm_head(hidden_states).float()
        answer = ids[0, -count:]
        bits = F.cross_entropy(logits, answer).item() / math.log(2) * count / 7
        is_right = bool((logits.argmax(-1) == answer).all())
        found.append({"length": needle["length"], "depth": needle["depth"], "is_right": is_right, "bits": bits})
    return found


def mean(found: list[dict], what: str, **where) -> float:
    values = [x[what] for x in found if all(x[name] == value for name, value in where.items())]
    return sum(values) / len(values)


def measure(model, held_out, num_bytes, needles, args: TrainingArguments, name: str) -> dict:
    model.eval()
    bits = token_losses(model, held_out, args, name)
    return {
        "bits_per_byte": bits_per_byte(bits, num_bytes),
        "retrieval": retrieve(model, needles, args, name),
    }


# The run


def run_variant(variant: str, args: Arguments, training_args: TrainingArguments, data: dict) -> None:
    """Measure a variant before and after training, into `result.json` in its folder."""
    folder, device = Path(training_args.output_dir) / variant, training_args.device.type
    result = Results(folder / "result.json")
    is_trained = variant != "native"
    if "after" in result or ("before" in result and not is_trained):
        print(f"{variant} is measured already.")
        return
    print(f"\n{variant}: {VARIANTS[variant]}")
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(training_args.seed)

    config = AutoConfig.from_pretrained(args.model)
    native = {"max_position_embeddings": max(config.max_position_embeddings, args.context_length)}
    positions = native if variant == "native" else stretched_positions(config, args.context_length)
    if "attention" not in result:
        attention = attention_of(variant, args.context_length, config.num_hidden_layers)
        if variant.endswith("-measured"):
            costs = costs_of_layers(attention, positions, args, training_args, data)
            dearest = sorted(sorted(range(len(costs)), key=costs.__getitem__)[-max(1, len(costs) // 5) :])
            attention["full_attention_layers"] = dearest
            print(f"Full attention stays in layers {dearest}.")
            result.save(costs_of_layers=costs)
        result.save(attention=attention)
    model = load_model(result["attention"], positions, args).to(training_args.device)
    what = data["held_out"], data["num_bytes"], data["needles"], training_args
    if "before" not in result:
        result.save(before=measure(model, *what, f"{variant}, before"))
    if not is_trained:
        return
    training_args.output_dir = str(folder)
    trainer = Trainer(
        model=add_adapters(model, args),
        args=training_args,
        train_dataset=data["contexts"],
        data_collator=default_data_collator,
    )
    trainer.model.print_trainable_parameters()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    metrics, steps = train_on(trainer, folder)
    if steps > 0:
        tokens = steps * args.context_length * training_args.train_batch_size
        tokens *= training_args.gradient_accumulation_steps
        result.save(tokens_per_second=round(tokens / metrics["train_runtime"]))
    if device == "cuda":
        result.save(peak_gibibytes=round(peak_gibibytes(device), 2))
    trainer.save_model(str(folder / "adapter"))
    result.save(after=measure(model, *what, f"{variant}, after"), **environment(device))


def print_table(results: dict[str, dict], args: Arguments) -> None:
    last = list(next(iter(results.values()))["before"]["bits_per_byte"])[-2]
    print(
        f"\n| variant | loss before | after | after, tokens {last} | retrieved before | after | tokens/s | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        before, after = result["before"], result.get("after")
        columns = [name, f"{before['bits_per_byte']['all']:.3f}"]
        columns += ["", ""] if after is None else [f"{after['bits_per_byte'][x]:.3f}" for x in ("all", last)]
        columns += ["" if x is None else f"{mean(x['retrieval'], 'is_right'):.0%}" for x in (before, after)]
        columns += [str(result.get(x, "")) for x in ("tokens_per_second", "peak_gibibytes")]
        print(f"| {' | '.join(columns)} |")
    print(
        f"\nLoss in bits per byte over {args.context_length} tokens; numbers retrieved over all lengths and depths.",
        flush=True,
    )


def plot(results: dict[str, dict], args: Arguments, path: Path) -> None:
    """Loss by position, and retrieval from the longest text by depth and over all depths by length; after training.
    What was not trained may leave the axes, so that the others can be told apart."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    by_position, by_depth, by_length = panels = figure.subplots(1, 3)
    for name, result in results.items():
        measured = result.get("after", result["before"])
        spans = [span for span in measured["bits_per_byte"] if span != "all"]
        middles = [math.sqrt(math.prod(map(int, span.split("-")))) for span in spans]
        style = dict(marker="o", markersize=3, label=name, linestyle="--" if "after" not in result else "-")
        by_position.plot(middles, [measured["bits_per_byte"][span] for span in spans], **style)
        found = measured["retrieval"]
        for axes, key, where in ((by_depth, "depth", {"length": args.context_length}), (by_length, "length", {})):
            values = sorted({x[key] for x in found})
            axes.plot(values, [mean(found, "bits", **where, **{key: value}) for value in values], **style)
    by_position.set(xlabel="position in the context (tokens)", ylabel="held-out loss (bits per byte)")
    by_position.set_xscale("log", base=2)
    by_position.legend()
    by_depth.set(xlabel=f"depth in {args.context_length:,} tokens", ylabel="loss of a number (bits per digit)")
    by_length.set(xlabel="length of the text (tokens)", ylabel="loss of a number (bits per digit)")
    by_length.set_xscale("log", base=2)
    for axes in (by_position, by_length):
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (by_depth, by_length):
        axes.axhline(math.log2(10), color="gray", linewidth=0.8, linestyle=":")  # guessing
    for axes in panels:
        axes.grid(alpha=0.3)
        trained = [y for line in axes.lines if line.get_linestyle() == "-" for y in line.get_ydata()]
        if trained:
            axes.set_ylim(0.9 * min(trained), 1.05 * max(trained))
    figure.savefig(path, dpi=150)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        raise ValueError(f"`--variants` must be of {list(VARIANTS)}, got {sorted(unknown)}.")
    if args.context_length % 16:
        raise ValueError(f"`--context_length` must be a multiple of 16, got {args.context_length}.")
    output_dir = Path(training_args.output_dir)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = split_documents(load_documents(args), args.held_out)
    contexts, held_out = split_contexts(documents, tokenizer, args)
    settings = asdict(args) | {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
    settings |= {"variants": None, "training_contexts": len(contexts)}
    check_settings(output_dir / "settings.json", settings)
    lengths, depths = [args.context_length >> i for i in (3, 2, 1, 0)], [0.0, 0.25, 0.5, 0.75, 1.0]
    data = {
        "tokenizer": tokenizer,
        "contexts": contexts,
        "held_out": held_out,
        "num_bytes": count_bytes(held_out, tokenizer),
        "needles": make_needles(tokenizer, held_out, lengths, depths, args.needles, seed=0),
    }
    for variant in args.variants:
        run_variant(variant, args, training_args, data)
        training_args.output_dir = str(output_dir)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    results = {name: Results(output_dir / name / "result.json") for name in VARIANTS}
    results = {name: result for name, result in results.items() if result}
    write(output_dir / "record.json", {"settings": settings, "results": results})
    print_table(results, args)
    plot(results, args, output_dir / "lora_long_context.png")
    print(f"The plot lora_long_context.png and record.json are in {output_dir}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
