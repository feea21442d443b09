"""Learn one long document into a LoRA adapter, and ask questions with and without the document in the context.

    python examples/lora_on_the_prompt.py                              # a list that it makes up: minutes on a CPU
    python examples/lora_on_the_prompt.py --document book.txt --bf16   # the same numbers, spread over a book
    python examples/lora_on_the_prompt.py --document book.txt --prompts "Call me" "The whale's name was" --bf16

A document can be told to a model in two ways: as a prompt, which is read again for every conversation (or kept as a
cache, as here), or by a few passes of training, after which nothing needs to be read. The model is asked to continue
each prompt in all four ways: with or without the document before it, with or without the adapter. Documents longer
than the model's context stretch its rotary positions with YaRN. Stopped, the same command goes on where it was.
"""

import hashlib
import random
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from record import Results, environment, peak_gibibytes, write
from tqdm.auto import tqdm
from training import RESUME_WITH_SAME, check_at_least, check_settings, stretched_positions, train_on
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from longnet_hf import DilatedCache, LongNetForCausalLM


NAMES = """Amber Birch Copper Dawn Flint Heron Iron Juniper Lark Moss Otter Pine Raven Salt Willow Thistle Granite
Harbor Maple Cedar Falcon Silver Walnut Orchid Anchor Badger Cobalt Dune Elm Fern Garnet Hazel Ivory Jasper Kestrel
Linen Marble Nettle Opal Pepper Quartz Rowan Saffron Tulip Umber Velvet Wheat Yarrow""".split()


@dataclass
class Arguments:
    """What is learned, by whom."""

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model: a folder or a name on the Hub."}
    )
    document: str | None = field(
        default=None, metadata={"help": "Text file in UTF-8. Default: nothing but numbers that are made up."}
    )
    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Beginnings of sentences to continue. Default: those of the numbers, put into the document."
        },
    )
    entries: int = field(default=24, metadata={"help": "How many numbers to make up, at most 48."})
    passes: float = field(default=40, metadata={"help": "How often every token of the document is met in training."})
    shortest: int = field(default=32, metadata={"help": "Tokens in the shortest stretches to train on."})
    longest: int = field(default=8192, metadata={"help": "Tokens in the longest."})
    segment_lengths: list[int] = field(
        default_factory=lambda: [2048],
        metadata={"help": "Windows w of the attention, in tokens."},
    )
    dilation_rates: list[int] = field(default_factory=lambda: [1], metadata={"help": "Their dilation rates r."})
    full_attention_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers that attend to everything. Default: every fifth; better for documents longer than a "
            "window."
        },
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    max_new_tokens: int = field(default=8, metadata={"help": "Length of a continuation."})

    def __post_init__(self):
        check_at_least(self, entries=1, shortest=2, longest=2, lora_rank=1, max_new_tokens=1)
        if self.passes <= 0:
            raise ValueError(f"`--passes` must be above 0, got {self.passes}.")


DEFAULTS = dict(
    output_dir="runs/lora_on_the_prompt",
    per_device_train_batch_size=1,
    num_train_epochs=1,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    logging_steps=20,
    save_steps=100,
    save_total_limit=1,
    dataloader_pin_memory=torch.cuda.is_available(),
)


def make_entries(entries: int) -> list[tuple[str, str]]:
    """Prompts with continuations that no model knows."""
    if not 1 <= entries <= len(NAMES):
        raise ValueError(f"`--entries` must lie between 1 and {len(NAMES)}, got {entries}.")
    rng = random.Random(0)
    return [(f"The number of {name} is", str(rng.randint(10_000, 99_999))) for name in NAMES[:entries]]


def spread(entries: list[tuple[str, str]], text: str) -> str:
    """The entries as lines of their own, with about as many lines of a text before each of them."""
    lines, rows = text.split("\n") if text else [], []
    for i, (prompt, answer) in enumerate(entries):
        rows += lines[i * len(lines) // len(entries) : (i + 1) * len(lines) // len(entries)]
        rows.append(f"{prompt} {answer}.")
    return "\n".join(rows) + "\n"


def cut_stretches(ids: list[int], args: Arguments) -> list[dict]:
    """Random stretches that meet each token `passes` times on average, as often in short ones as in long ones. The
    document begins again where it ends, so that its sentences are met with and without all of it before them."""
    rng, thrice = random.Random(0), ids * 3
    longest = min(args.longest, 2 * len(ids))
    shortest, rows, missing = min(args.shortest, longest), [], args.passes * len(ids)
    while missing > 0:
        length = round(1 / rng.uniform(1 / longest, 1 / shortest))
        start = rng.randrange(len(ids))
        stretch = thrice[start : start + length]
        rows.append({"input_ids": stretch, "labels": stretch})
        missing -= length
    return rows


@torch.no_grad()
def ask(model, tokenizer, document: list[int], prompts: list[list[int]], args: Arguments, way: str) -> list[str]:
    """The model's greedy continuation of every prompt. A document is read once, and the cache taken back to it."""
    cache, continuations = None, []
    if document:
        cache = DilatedCache(model.config, reserve=1023)
        ids = torch.tensor([document])
        for _ in model.get_base_model().forward_chunks(ids, past_key_values=cache, progress=False):
            pass
    for prompt in tqdm(prompts, desc=f"Ask, {way}"):
        inputs = torch.tensor([document + prompt], device=model.device)
        options = dict(max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, **options
        )
        if cache is not None:
            cache.crop(len(document) - cache.get_seq_length())
        continuations.append(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
    return continuations


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    if args.document is None and args.prompts is not None:
        raise ValueError("`--prompts` continue a document of yours: give it as `--document`.")
    text = Path(args.document).read_text(encoding="utf-8") if args.document else ""
    if args.prompts is None:
        prompts = make_entries(args.entries)
        text = spread(prompts, text)
    else:
        prompts = [(prompt, None) for prompt in args.prompts]
    if not text.strip():
        raise ValueError(f"`--document` {args.document} is empty.")
    folder, device = Path(training_args.output_dir), training_args.device.type

    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    document_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    print(f"The document has {len(document_ids)} tokens.")
    prompt_ids = tokenizer([prompt for prompt, _ in prompts], add_special_tokens=False)["input_ids"]
    source = AutoConfig.from_pretrained(args.model)
    asked, trained = len(document_ids) + max(map(len, prompt_ids)) + args.max_new_tokens, 2 * len(document_ids)
    positions = stretched_positions(source, max(asked, min(trained, args.longest)))
    full = args.full_attention_layers
    model = LongNetForCausalLM.from_llama(
        args.model,
        segment_lengths=args.segment_lengths,
        dilation_rates=args.dilation_rates,
        branch_types=["window"] * len(args.segment_lengths),
        head_offset="rotating",
        full_attention_layers=list(range(4, source.num_hidden_layers, 5)) if full is None else full,
        sink_tokens=4,
        **positions,
        dtype=torch.float32,
    )
    adapters = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"
    )
    settings = asdict(args) | {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
    settings["document_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    check_settings(folder / "settings.json", settings)
    trainer = Trainer(
        model=get_peft_model(model, adapters),
        args=training_args,
        train_dataset=cut_stretches(document_ids, args),
        data_collator=default_data_collator,
    )
    result = Results(folder / "result.json")
    metrics, steps = train_on(trainer, folder)
    if steps > 0:
        seconds = metrics["train_runtime"] / steps
        result.save(seconds_per_step=round(seconds, 4), peak_gibibytes=round(peak_gibibytes(device), 2))
    trainer.save_model(str(folder / "adapter"))

    model, answers = trainer.model.eval(), result.get("answers", {})
    for where, document in (("document in the context", document_ids), ("no document", [])):
        for way in (f"{where}, no adapter", f"{where}, adapter"):
            if way in answers:
                continue
            adapter = model.disable_adapter() if way.endswith("no adapter") else nullcontext()
            with adapter, torch.autocast(device, torch.bfloat16, enabled=training_args.bf16):
                answers[way] = ask(model, tokenizer, document, prompt_ids, args, way)
            result.save(answers=answers)

    recall = {}
    for way, continuations in answers.items():
        print(f"\n{way}:")
        answered = list(zip(prompts, continuations, strict=True))
        for (prompt, _), continuation in answered[:5]:
            print(f"  {prompt} |{continuation.splitlines()[0] if continuation.strip() else continuation!r}")
        if args.prompts is None:
            recall[way] = sum(text.strip().startswith(answer) for (_, answer), text in answered) / len(answered)
    record = {
        "arguments": asdict(args),
        "tokens": len(document_ids),
        "steps": trainer.state.global_step,
        "seconds_per_step": result.get("seconds_per_step"),
        "peak_gibibytes": result.get("peak_gibibytes"),
        "recall": recall,
        "continuations": [
            {"prompt": prompt, "answer": answer} | {way: texts[i] for way, texts in answers.items()}
            for i, (prompt, answer) in enumerate(prompts)
        ],
    } | environment(device)
    write(folder / "record.json", record)
    if recall:
        print("\n| | recalled |\n|---|---|")
        print("\n".join(f"| {way} | {share:.0%} |" for way, share in recall.items()))
    print(f"\nThe adapter and record.json are in {folder}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
