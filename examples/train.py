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
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from corpus import (
    DataArguments,
    bits_of_tokens,
    bits_per_byte,
    count_bytes,
    load_documents,
    split_contexts,
    split_documents,
    train_tokenizer,
)
from matplotlib.figure import Figure
from record import read, write
from training import RESUME_WITH_SAME, ModelArguments, check_settings, train_on
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from longnet_hf import LongNetConfig, LongNetForCausalLM


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


# Training


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
    if trainer.is_world_process_zero():  # last, and whole: with it the model counts as trained
        write(folder / "train_results.json", metrics | {"steps": steps, "seconds": seconds})


# Table and plot


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
        losses = bits_of_tokens(model, held_out, training_args, name)
        training = read(output_dir / name / "train_results.json")
        results[name] = {"bits_per_byte": bits_per_byte(losses, num_bytes), "training": training}
    write(output_dir / "results.json", results)
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
