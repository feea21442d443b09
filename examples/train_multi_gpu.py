"""Train a LongNet on sequences that are split over several GPUs: a plain Trainer, and a configuration of Accelerate.

    accelerate launch --config_file examples/split_sequence.yaml examples/train_multi_gpu.py
    accelerate launch --config_file examples/split_sequence.yaml examples/train_multi_gpu.py \
        --data 'my_repository/**/*.py' --context_length 1048576 --output_dir runs/mine

What one process computes with `python examples/train_multi_gpu.py --bf16`, several compute together: the same losses,
gradients and parameters, in less memory each. Stopped, the same command goes on from the last checkpoint, on as many
GPUs as there are then. By default, the paper's base model (arXiv 2307.02486, section 4) on contexts of 256 K tokens.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

from corpus import DataArguments, load_documents, split_contexts, split_documents, train_tokenizer
from training import ModelArguments, train_on
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed

from longnet_hf import LongNetConfig, LongNetForCausalLM
from longnet_hf.context_parallel import SequenceSplit


DEFAULTS = dict(
    output_dir="runs/multi_gpu",
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    initializer_range=0.02,
    use_sub_norm=True,
    # As sparse as they are long: the keys that travel do not grow with the sequence
    segment_lengths=[2048, 8192, 32768, 131072, 262144],
    dilation_rates=[1, 4, 16, 64, 128],
    context_length=262144,
    per_device_train_batch_size=1,
    per_device_eval_batch_size=1,
    max_steps=200,
    learning_rate=6e-4,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    weight_decay=0.01,
    adam_beta2=0.98,
    max_grad_norm=2.0,
    logging_steps=5,
    save_steps=50,
    save_total_limit=2,
)


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    # Refuses, before any work, a length that cannot be split over so many processes
    SequenceSplit(data_args.context_length, int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1")), rank=0)

    with training_args.main_process_first():
        documents = split_documents(load_documents(data_args), data_args.held_out)
        tokenizer = train_tokenizer(documents["train"], model_args.vocab_size)
        contexts, held_out = split_contexts(documents, tokenizer, data_args)

    set_seed(training_args.seed)
    config = LongNetConfig(
        **asdict(model_args) | {"vocab_size": len(tokenizer)},
        max_position_embeddings=data_args.context_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = Trainer(
        model=LongNetForCausalLM(config),
        args=training_args,
        train_dataset=contexts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    train_on(trainer, Path(training_args.output_dir))
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
