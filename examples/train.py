"""Train a LongNet language model with Trainer and datasets, and compare it with its local branch alone.

    python examples/train.py                          # the demo: less than five minutes on two CPU cores
    python examples/train.py --data my_book.txt 'my_repository/**/*.py' --output_dir runs/mine
    python examples/train.py --data Salesforce/wikitext:wikitext-103-raw-v1 --output_dir runs/wikitext

It trains a small model on long stretches of text (by default the sources of Python's standard library), then the same
model with nothing but its local branch, and compares both on held-out text, in bits per byte by position in the
context. It can be stopped at any time: the same command goes on from the last checkpoint.

The paper's base model (arXiv 2307.02486, section 4: half a million tokens a step) on one GPU; on eight, put
`torchrun --nproc_per_node 8` in place of `python` and accumulate over 2 steps:

    python examples/train.py --data codeparrot/codeparrot-clean --text_column content --output_dir runs/base \
        --vocab_size 50304 --hidden_size 768 --intermediate_size 3072 --num_hidden_layers 12 \
        --num_attention_heads 12 --use_sub_norm --initializer_range 0.02 --head_offset paper \
        --segment_lengths 2048 4096 8192 16384 32768 --dilation_rates 1 2 4 6 12 --context_length 32768 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_steps 300000 --learning_rate 6e-4 \
        --lr_scheduler_type polynomial --warmup_steps 750 --adam_beta1 0.9 --adam_beta2 0.98 --weight_decay 0.01 \
        --max_grad_norm 2.0 --bf16 --save_steps 1000 --no_baseline
"""

import copy
import glob
import json
import math
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, load_dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from longnet_hf import LongNetConfig, LongNetForCausalLM


@dataclass
class ModelArguments:
    """Fields of LongNetConfig, whose documentation says more."""

    vocab_size: int = field(default=1024, metadata={"help": "Size of the tokenizer that is trained on the data."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of the MLPs."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    segment_lengths: list[int] = field(
        default_factory=lambda: [32, 256, 2048, 8192],
        metadata={"help": "Segment length w of every branch in tokens, the local branch first."},
    )
    dilation_rates: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Dilation rate r of every branch."}
    )
    branch_types: list[str] | None = field(
        default=None, metadata={"help": "segment (the paper's; default) or window, for every branch."}
    )
    head_offset: str = field(
        default="rotating", metadata={"help": "Which positions a head keeps: paper, grouped or rotating."}
    )
    segment_shift: bool = field(
        default=False, metadata={"help": "Move the segments by half their length in odd layers."}
    )
    full_attention_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of layers with full attention."}
    )
    use_sub_norm: bool = field(
        default=False, metadata={"help": "MAGNETO's extra norms, as in the paper. The demo learns faster without."}
    )
    initializer_range: float = field(
        default=0.1, metadata={"help": "Standard deviation of the initial weights; about 1 / sqrt(hidden_size)."}
    )


@dataclass
class DataArguments:
    """What is read, and in which pieces."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders and patterns such as 'src/**/*.py', or one dataset on the Hub as name or "
            "name:config. Default: the sources of Python's standard library."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text, in a dataset on the Hub."})
    context_length: int = field(default=8192, metadata={"help": "Tokens in a training example."})
    held_out: float = field(default=0.06, metadata={"help": "Share of the documents that is kept for evaluation."})
    max_held_out_contexts: int = field(default=24, metadata={"help": "Evaluate on at most so many contexts."})


@dataclass
class DemoArguments(DataArguments):
    """What is compared on it."""

    baseline: bool = field(
        default=True, metadata={"help": "Also train the same model with nothing but its first branch, to compare."}
    )


# The demo's, in place of the defaults of TrainingArguments
DEMO_DEFAULTS = dict(
    output_dir="runs/demo",
    max_steps=200,
    per_device_train_batch_size=1,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    weight_decay=0.01,
    adam_beta2=0.98,
    max_grad_norm=2.0,
    logging_steps=30,
    save_steps=30,
    save_total_limit=2,
    dataloader_pin_memory=torch.cuda.is_available(),
)
# What a checkpoint cannot be continued without
RESUME_WITH_SAME = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "optim", "bf16", "fp16", "seed", "data_seed"),
)


# Data


def standard_library_files() -> list[Path]:
    """Python's own sources without tests, and without those that are mostly tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    paths = (path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts))
    return [path for path in paths if not path.name.startswith("_sysconfigdata")]


def find_files(names: list[str]) -> list[Path]:
    """The text files that `--data` names, each once."""
    found: set[Path] = set()
    for name in names:
        matches = [Path(name)] if Path(name).exists() else map(Path, glob.glob(name, recursive=True))
        for path in matches:
            found.update(path.rglob("*") if path.is_dir() else [path])
    # As git does: a file with a zero byte near its start is no text
    return [path for path in found if path.is_file() and b"\0" not in path.open("rb").read(8000)]


def load_documents(args: DataArguments) -> Dataset:
    """One document a row, in the column "text"."""
    files = find_files(args.data) if args.data else standard_library_files()
    if files:
        # Sorted by folder: related files become neighbours, see `make_contexts`
        names = [glob.escape(str(path)) for path in sorted(files)]
        return load_dataset("text", data_files=names, sample_by="document", encoding_errors="replace", split="train")
    if not args.data:
        raise ValueError(f"There are no .py files in {sysconfig.get_paths()['stdlib']}: name your own with `--data`.")
    name, _, config = args.data[0].partition(":")
    try:
        dataset = load_dataset(name, config or None, split="train")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`--data {' '.join(args.data)}`: no text file has that name, lies in a folder of that name or matches it "
            f"as a pattern, and as a dataset on the Hub it could not be loaded: {error}"
        ) from error
    if args.text_column not in dataset.column_names:
        raise ValueError(f"`--text_column` must be one of {dataset.column_names}, got {args.text_column!r}.")
    return dataset.select_columns(args.text_column).rename_column(args.text_column, "text")


def split_documents(documents: Dataset, held_out: float) -> DatasetDict:
    """Hold out whole documents: the last ones, which are neighbours like those trained on. One alone is cut in two."""
    if len(documents) == 1:
        lines = documents[0]["text"].splitlines(keepends=True)
        cut = int(len(lines) * (1 - held_out))
        documents = Dataset.from_dict({"text": ["".join(lines[:cut]), "".join(lines[cut:])]})
    return documents.train_test_split(test_size=held_out, shuffle=False)


def train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it can write every text, and every token stands for a known number of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = documents.select(range(min(len(documents), 20_000)))
    tokenizer.train_from_iterator((row["text"] for row in sample), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_contexts(documents: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """Lay the documents end to end and cut them into contexts of `length` tokens.

    Most files are shorter than a context. What a long context has to offer are then the names and habits that the
    files of one folder share, so the documents keep their order: neighbours in a folder are neighbours in a context.
    """

    def tokenize(rows):
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    def cut(rows):
        tokens = [token for ids in rows["input_ids"] for token in ids]
        contexts = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": contexts, "labels": contexts}

    tokens = documents.map(tokenize, batched=True, remove_columns="text", desc="Tokenize")
    return tokens.map(cut, batched=True, desc=f"Cut into contexts of {length} tokens")


def split_contexts(
    documents: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: DataArguments
) -> tuple[Dataset, Dataset]:
    """Contexts to train on, and others to evaluate on."""
    contexts, held_out = (make_contexts(documents[name], tokenizer, args.context_length) for name in ("train", "test"))
    if not len(contexts) or not len(held_out):
        raise ValueError(
            f"The data fills {len(contexts)} contexts of {args.context_length} tokens for training and "
            f"{len(held_out)} for evaluation, where one is the least. Give more `--data`, a smaller "
            "`--context_length` or another `--held_out`."
        )
    return contexts, held_out.shuffle(seed=0).select(range(min(len(held_out), args.max_held_out_contexts)))


# Training


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes trainer_state.json last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def train_on(trainer: Trainer, folder: Path) -> tuple[dict, int]:
    """Train, from the last checkpoint on if there is one: Trainer's metrics, and the steps that they are of."""
    checkpoint = last_checkpoint(folder)
    if checkpoint and trainer.is_world_process_zero():
        print(f"Going on from {checkpoint}")
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    return metrics, trainer.state.global_step - checkpoint_step(checkpoint)


def train(config: LongNetConfig, args: TrainingArguments, folder: Path, tokenizer, contexts, held_out) -> None:
    """Train a model into `folder`, from its last checkpoint on if there is one."""
    if (folder / "train_results.json").exists():
        print(f"The model in {folder} is trained already.")
        return
    print(f"\nTraining {folder}: segment lengths {config.segment_lengths}, dilation rates {config.dilation_rates}")
    args = copy.copy(args)
    args.output_dir = str(folder)
    set_seed(args.seed)  # Both models start with the same weights and see the data in the same order
    trainer = Trainer(
        model=LongNetForCausalLM(config),
        args=args,
        train_dataset=contexts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    metrics, steps_now = train_on(trainer, folder)
    trainer.save_model()
    # The time of all steps, those before an interruption included
    steps = trainer.state.global_step
    seconds = metrics["train_runtime"] * steps / max(1, steps_now)
    trainer.save_metrics("train", metrics | {"steps": steps, "seconds": seconds})


# Evaluation


@torch.no_grad()
def token_losses(model: PreTrainedModel, held_out: Dataset, args: TrainingArguments, name: str) -> torch.Tensor:
    """Cross-entropy in bits of every held-out token but the first of each context: `[contexts, N - 1]`."""
    losses = []
    for row in tqdm(held_out.with_format("torch"), desc=f"Evaluate {name}"):
        input_ids = row["input_ids"].to(args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            hidden_states = model.model(input_ids[None], use_cache=False).last_hidden_state[0, :-1]
            # In pieces, so that no [N, vocabulary] matrix exists
            pieces = zip(hidden_states.split(1024), input_ids[1:].split(1024), strict=True)
            loss = [F.cross_entropy(model.lm_head(h).float(), y, reduction="none") for h, y in pieces]
        losses.append(torch.cat(loss).cpu())
    return torch.stack(losses).double() / math.log(2)


def count_bytes(held_out: Dataset, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """UTF-8 bytes that the tokens of `token_losses` stand for: byte-level BPE writes a byte as one character. The end
    of a document costs bits, and has no bytes."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    sizes = torch.tensor([0 if token in tokenizer.all_special_tokens else len(token) for token in tokens])
    return sizes[torch.tensor(held_out["input_ids"][:])][:, 1:]


def bits_per_byte(bits: torch.Tensor, num_bytes: torch.Tensor) -> dict[str, float]:
    """By position in the context, 1-63, 64-127, 128-255 and so on, and over all of it."""
    length = num_bytes.shape[1] + 1
    starts = [1] + [64 << i for i in range(length.bit_length()) if 64 << i < length]
    spans = {f"{a}-{b - 1}": slice(a - 1, b - 1) for a, b in zip(starts, starts[1:] + [length], strict=True)}
    spans["all"] = slice(None)
    return {name: (bits[:, span].sum() / num_bytes[:, span].sum()).item() for name, span in spans.items()}


def print_table(results: dict[str, dict]) -> None:
    names = list(results)
    print("\nHeld-out loss in bits per byte, by position in the context")
    print(f"{'position':>14}" + "".join(f"{name:>12}" for name in names) + "  difference" * (len(names) == 2))
    for span in results[names[0]]["bits_per_byte"]:
        row = [results[name]["bits_per_byte"][span] for name in names]
        difference = f"{row[0] - row[1]:+12.3f}" if len(row) == 2 else ""
        print(f"{span:>14}" + "".join(f"{value:12.3f}" for value in row) + difference)
    seconds = [results[name]["training"]["seconds"] for name in names]
    print(f"{'training, s':>14}" + "".join(f"{value:12.0f}" for value in seconds), flush=True)


def plot(results: dict[str, dict], config: LongNetConfig, title: str, path: Path) -> None:
    """Loss by position and, since texts differ more than models, the difference between the two models."""
    figure = Figure(figsize=(8, 4 + 2 * (len(results) - 1)), layout="constrained")
    panels = figure.subplots(len(results), sharex=True, squeeze=False, height_ratios=[2, 1][: len(results)])[:, 0]
    curves = {}
    for (name, result), style in zip(results.items(), ("o-", "s--"), strict=False):
        spans = [span for span in result["bits_per_byte"] if span != "all"]
        middles = [math.sqrt(math.prod(map(int, span.split("-")))) for span in spans]
        curves[name] = [result["bits_per_byte"][span] for span in spans]
        label = f"{name}: {result['bits_per_byte']['all']:.3f} over all positions"
        panels[0].plot(middles, curves[name], style, label=label)
    panels[0].set(title=title, ylabel="held-out loss (bits per byte)")
    panels[0].legend()
    if len(results) == 2:
        panels[1].plot(middles, [a - b for a, b in zip(*curves.values(), strict=True)], "o-", color="black")
        panels[1].axhline(0, color="gray", linewidth=0.8)
        panels[1].set_ylabel(f"{' − '.join(curves)}\n(below 0: longer is better)")
    for axes in panels:
        axes.grid(alpha=0.3)
        for length in config.segment_lengths:
            axes.axvline(length, color="gray", linewidth=0.8, linestyle=":")
    for length in config.segment_lengths:
        where = dict(xycoords=("data", "axes fraction"), xytext=(-3, 4), textcoords="offset points")
        panels[0].annotate(f"w = {length:,}", (length, 0), **where, rotation=90, ha="right", color="gray", fontsize=8)
    panels[-1].set_xscale("log", base=2)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    panels[-1].set_xlabel("position in the context (tokens)")
    figure.savefig(path, dpi=150)


# The run


def check_settings(path: Path, settings: dict) -> None:
    """Refuse to go on with a run that was started with other settings."""
    settings = json.loads(json.dumps(settings))
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    changed = [f"{name} was {old.get(name)}, is {new}" for name, new in settings.items() if old.get(name) != new]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(changed)}. Repeat its settings to go on with "
            "it, choose another `--output_dir`, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def main():
    parser = HfArgumentParser((ModelArguments, DemoArguments, TrainingArguments))
    parser.set_defaults(**DEMO_DEFAULTS)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    output_dir = Path(training_args.output_dir)

    with training_args.main_process_first():
        documents = split_documents(load_documents(data_args), data_args.held_out)
        tokenizer = train_tokenizer(documents["train"], model_args.vocab_size)
        contexts, held_out = split_contexts(documents, tokenizer, data_args)

    settings = asdict(model_args) | asdict(data_args)
    settings |= {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
    settings |= {"baseline": None, "documents": len(documents["train"]), "training_contexts": len(contexts)}
    check_settings(output_dir / "settings.json", settings)

    config = LongNetConfig(
        **asdict(model_args) | {"vocab_size": len(tokenizer)},
        max_position_embeddings=data_args.context_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    configs = {"longnet": config}
    if data_args.baseline:
        configs["local-only"] = local = copy.deepcopy(config)
        local.segment_lengths, local.dilation_rates = config.segment_lengths[:1], config.dilation_rates[:1]
        local.branch_types = config.branch_types and config.branch_types[:1]
        local.full_attention_layers = None
    for name in configs:
        train(configs[name], training_args, output_dir / name, tokenizer, contexts, held_out)
    if training_args.process_index > 0:
        return

    num_bytes = count_bytes(held_out, tokenizer)
    results = {}
    for name in configs:
        model = LongNetForCausalLM.from_pretrained(output_dir / name).to(training_args.device)
        losses = token_losses(model, held_out, training_args, name)
        training = json.loads((output_dir / name / "train_results.json").read_text(encoding="utf-8"))
        results[name] = {"bits_per_byte": bits_per_byte(losses, num_bytes), "training": training}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table(results)
    source = " ".join(data_args.data or ["Python's standard library"])
    title = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {training['steps']} steps on {source}"
    plot(results, config, title, output_dir / "loss_by_position.png")

    # A process of its own, which knows Transformers and nothing of this package
    prompt_file = output_dir / "prompt.txt"
    prompt = held_out[0]["input_ids"][: data_args.context_length // 2]
    prompt_file.write_text(tokenizer.decode(prompt), encoding="utf-8")
    script = str(Path(__file__).with_name("generate.py"))
    subprocess.run(
        [sys.executable, script, "--model", str(output_dir / "longnet"), "--prompt_file", str(prompt_file)], check=True
    )
    print(f"\nThe model, the plot loss_by_position.png and results.json are in {output_dir}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
