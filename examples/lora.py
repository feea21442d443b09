"""LoRA on a pretrained model with long contexts: the heads that copy keep full attention, the others have a window.

    python examples/lora.py --model HuggingFaceTB/SmolLM2-135M                               # minutes on a CPU
    python examples/lora.py --model HuggingFaceTB/SmolLM2-135M --context_length 32768 --bf16 --max_steps 100   # a GPU

Converts the model as pretrained.py does, trains adapters with Trainer, and loads these again beside the converted one.
Stopped, the same command goes on from the last checkpoint.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from corpus import DataArguments, bits_of_tokens, load_documents, split_contexts, split_documents
from peft import LoraConfig, PeftModel, get_peft_model
from training import RESUME_WITH_SAME, check_at_least, check_conversion, check_settings, stretched_positions, train_on
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from longnet_hf import LongNetForCausalLM, rank_heads


@dataclass
class Arguments(DataArguments):
    """What is trained, on what."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model."})
    share: float = field(default=0.2, metadata={"help": "Share of the heads that keep full attention."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})

    def __post_init__(self):
        super().__post_init__()
        check_conversion(self.context_length, self.share)
        check_at_least(self, lora_rank=1)


DEFAULTS = dict(
    output_dir="runs/lora",
    context_length=1024,
    max_held_out_contexts=4,
    max_steps=10,
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    gradient_checkpointing=True,
    logging_steps=5,
    save_steps=50,
)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    folder = Path(training_args.output_dir)
    settings = asdict(args) | {name: getattr(training_args, name) for name in RESUME_WITH_SAME}
    check_settings(folder / "settings.json", settings)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    contexts, held_out = split_contexts(split_documents(load_documents(args), args.held_out), tokenizer, args)

    if not (folder / "converted").exists():
        config = AutoConfig.from_pretrained(args.model)
        source = AutoModelForCausalLM.from_pretrained(
            args.model, **stretched_positions(config, args.context_length)
        ).to(training_args.device)
        ranking = rank_heads(source, contexts.select(range(1)).with_format("torch")["input_ids"][:])
        model = LongNetForCausalLM.from_llama(
            source,
            segment_lengths=[args.context_length // 15],
            dilation_rates=[1],
            branch_types=["window"],
            sink_tokens=4,
            full_attention_heads=ranking.best(args.share),
        )
        model.save_pretrained(folder / "converted.unfinished")
        (folder / "converted.unfinished").rename(folder / "converted")  # whole, or not there
    model = AutoModelForCausalLM.from_pretrained(folder / "converted").to(training_args.device).eval()
    before = bits_of_tokens(model, held_out, training_args, "before").mean()

    lora = LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    trainer = Trainer(get_peft_model(model, lora), training_args, collate, contexts)
    train_on(trainer, folder)
    trainer.save_model(folder / "adapter")

    model = AutoModelForCausalLM.from_pretrained(folder / "converted").to(training_args.device)
    model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().eval()
    after = bits_of_tokens(model, held_out, training_args, "after").mean()
    print(f"Held-out loss: {before:.3f} bits per token, {after:.3f} after {trainer.state.global_step} steps.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
