"""Learn one long document into a LoRA adapter, and ask questions with and without the document in the context.

    python examples/lora_on_the_prompt.py                              # a list that it makes up: minutes on a CPU
    python examples/lora_on_the_prompt.py --document book.txt --prompts "Call me" "The whale's name was" --bf16

A document can be told to a model in two ways: as a prompt, which is read again for every conversation (or kept as a
cache, as here), or by a few passes of training, after which nothing needs to be read. The model is asked to continue
each prompt in all four ways: with or without the document before it, with or without the adapter.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from record import environment, peak_gibibytes
from tqdm.auto import tqdm
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
        default=None, metadata={"help": "Text file in UTF-8. Default: a list of numbers, which nobody knows."}
    )
    prompts: list[str] | None = field(
        default=None, metadata={"help": "Beginnings of sentences to continue, for a document of yours."}
    )
    entries: int = field(default=24, metadata={"help": "Length of the list that is made up, at most 48."})
    passes: float = field(default=40, metadata={"help": "How often every token of the document is met in training."})
    shortest: int = field(default=32, metadata={"help": "Tokens in the shortest stretches to train on."})
    longest: int = field(default=8192, metadata={"help": "Tokens in the longest."})
    segment_lengths: list[int] = field(
        default_factory=lambda: [2048],
        metadata={"help": "Windows w of the attention, in tokens; every fifth layer attends to everything."},
    )
    dilation_rates: list[int] = field(default_factory=lambda: [1], metadata={"help": "Their dilation rates r."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    max_new_tokens: int = field(default=8, metadata={"help": "Length of a continuation."})


DEFAULTS = dict(
    output_dir="runs/lora_on_the_prompt",
    per_device_train_batch_size=1,
    num_train_epochs=1,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    logging_steps=20,
    save_strategy="no",
    dataloader_pin_memory=torch.cuda.is_available(),
)


def make_list(entries: int) -> tuple[str, list[tuple[str, str]]]:
    """A document that no model has seen, and prompts with the continuation that it gives."""
    if not 1 <= entries <= len(NAMES):
        raise ValueError(f"`--entries` must lie between 1 and {len(NAMES)}, got {entries}.")
    rng = random.Random(0)
    prompts = [(f"The number of {name} is", str(rng.randint(10_000, 99_999))) for name in NAMES[:entries]]
    return "".join(f"{prompt} {answer}.\n" for prompt, answer in prompts), prompts


def cut_stretches(ids: list[int], args: Arguments) -> list[dict]:
    """Random stretches that meet each token `passes` times on average, as often in short ones as in long ones. The
    document begins again where it ends, so that its sentences are met with and without all of it before them."""
    rng = random.Random(0)
    longest = min(args.longest, 2 * len(ids))
    shortest, rows, missing = min(args.shortest, longest), [], args.passes * len(ids)
    while missing > 0:
        length = round(1 / rng.uniform(1 / longest, 1 / shortest))
        start = rng.randrange(len(ids))
        stretch = (ids * 3)[start : start + length]
        rows.append({"input_ids": stretch, "labels": stretch})
        missing -= length
    return rows


@torch.no_grad()
def ask(model, tokenizer, document_ids: list[int] | None, prompts: list[tuple], args: Arguments, what: str) -> list:
    """The model's greedy continuation of every prompt. A document is read once, and the cache taken back to it."""
    cache, before = None, [] if document_ids is None else document_ids
    continuations = []
    for prompt, _ in tqdm(prompts, desc=f"Ask {what}"):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if before and cache is None:
            cache = DilatedCache(model.config, reserve=1023)
            text = torch.tensor([before])
            for _ in model.get_base_model().forward_chunks(text, past_key_values=cache, progress=False):
                pass
        inputs = torch.tensor([before + ids], device=model.device)
        options = dict(max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, **options
        )
        if cache is not None:
            cache.crop(len(before) - cache.get_seq_length())
        continuations.append(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
    return continuations


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    if (args.document is None) != (args.prompts is None):
        raise ValueError("`--document` and `--prompts` belong together: give both, or none for the list.")
    if args.document is None:
        text, prompts = make_list(args.entries)
    else:
        text = Path(args.document).read_text(encoding="utf-8")
        prompts = [(prompt, None) for prompt in args.prompts]
    folder, device = Path(training_args.output_dir), training_args.device.type

    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    document_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    print(f"The document has {len(document_ids)} tokens.")
    model = LongNetForCausalLM.from_llama(
        args.model,
        segment_lengths=args.segment_lengths,
        dilation_rates=args.dilation_rates,
        branch_types=["window"] * len(args.segment_lengths),
        head_offset="rotating",
        full_attention_layers=list(range(4, AutoConfig.from_pretrained(args.model).num_hidden_layers, 5)),
        dtype=torch.float32,
    )
    adapters = LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"
    )
    trainer = Trainer(
        model=get_peft_model(model, adapters),
        args=training_args,
        train_dataset=cut_stretches(document_ids, args),
        data_collator=default_data_collator,
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(folder / "adapter"))

    model, results = trainer.model.eval(), {}
    with torch.autocast(device, torch.bfloat16, enabled=training_args.bf16):
        for where, ids in (("document in the context", document_ids), ("no document", None)):
            with model.disable_adapter():
                results[f"{where}, no adapter"] = ask(model, tokenizer, ids, prompts, args, f"with {where}")
            results[f"{where}, adapter"] = ask(model, tokenizer, ids, prompts, args, f"with {where} and adapter")

    recall = {}
    for way, continuations in results.items():
        print(f"\n{way}:")
        answered = list(zip(prompts, continuations, strict=True))
        for (prompt, _), continuation in answered[:5]:
            print(f"  {prompt} |{continuation.splitlines()[0] if continuation.strip() else continuation!r}")
        if args.document is None:
            recall[way] = sum(text.strip().startswith(answer) for (_, answer), text in answered) / len(answered)
    record = {
        "arguments": asdict(args),
        "tokens": len(document_ids),
        "training_seconds": round(seconds, 1),
        "peak_gibibytes": round(peak_gibibytes(device), 2),
        "recall": recall,
        "continuations": [
            {"prompt": prompt, "answer": answer} | {way: results[way][i] for way in results}
            for i, (prompt, answer) in enumerate(prompts)
        ],
    } | environment(device)
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if recall:
        print("\n| | recalled |\n|---|---|")
        print("\n".join(f"| {way} | {share:.0%} |" for way, share in recall.items()))
    print(f"\nThe adapter and record.json are in {folder}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
