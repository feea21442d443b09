"""What the examples that train share: the fields of a model, longer rotary positions, and runs that can be stopped."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from record import read, write
from transformers import PreTrainedConfig, Trainer, TrainerState, TrainingArguments


# What a checkpoint cannot be continued without
RESUME_WITH_SAME = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "optim", "bf16", "fp16", "seed", "data_seed"),
)


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


def stretched_positions(config: PreTrainedConfig, length: int, where: str | None = None) -> dict:
    """The fields that let rotary positions reach over `length` tokens: with YaRN, where the model was not made for
    them. `where` is the argument that names the model, for errors; `--model` by default."""
    native = config.max_position_embeddings
    if length <= native or native < 1:  # as XLNet's, which has no bound
        return {}
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(
            f"{where or f'`--model {config.name_or_path}`'} scales its rotary positions already "
            f"({rope['rope_type']}): it can take at most {native} tokens, not {length}."
        )
    yarn = {"rope_type": "yarn", "factor": length / native, "original_max_position_embeddings": native}
    # Into the model's own, which may say more: how much of a head is rotated, for one
    return {"max_position_embeddings": length, "rope_parameters": rope | yarn}


def check_at_least(args, **least: float) -> None:
    """Refuse options below what is the least of each, before anything is done that they would spoil."""
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ValueError(f"`--{name}` must be at least {bound}, got {getattr(args, name)}.")


def check_conversion(context_length: int, share: float) -> None:
    """Refuse at once what a conversion by ranked heads would fail with after minutes."""
    if context_length < 256:  # which the ranking needs
        raise ValueError(f"`--context_length` must be at least 256, got {context_length}.")
    if not 0 < share <= 1:
        raise ValueError(f"`--share` must lie in (0, 1], got {share}.")


def check_settings(path: Path, settings: dict) -> None:
    """Refuse to go on with a run that was started with other settings, and has come to anything: of one that was
    refused for its settings there is nothing but these."""
    settings = json.loads(json.dumps(settings))
    others = [file for file in path.parent.glob("*") if file != path and file.suffix != ".unfinished"]
    old = read(path) if others and path.exists() else settings
    changed = [f"{name} was {old.get(name)}, is {new}" for name, new in settings.items() if old.get(name) != new]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(changed)}. Repeat its settings to go on with "
            "it, choose another `--output_dir`, or delete it."
        )
    write(path, settings)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes trainer_state.json last, and perhaps not to its end."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max((path.parent for path in states if _is_whole(path)), key=checkpoint_step, default=None)


def _is_whole(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def checkpoint_step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def rows_per_step(args: TrainingArguments) -> int:
    """Rows of one step of the optimizer, of all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def train_on(trainer: Trainer, folder: Path) -> tuple[dict, int]:
    """Train, from the last checkpoint on if there is one: Trainer's metrics, and the steps that they are of."""
    checkpoint = last_checkpoint(folder)
    if checkpoint and 0 < trainer.args.max_steps <= checkpoint_step(checkpoint) and not trainer.is_fsdp_enabled:
        # Trainer sees that all steps are done when it has done one more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return {"train_runtime": 0.0}, 0
    if checkpoint and trainer.is_world_process_zero():
        print(f"Going on from {checkpoint}")
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    return metrics, trainer.state.global_step - checkpoint_step(checkpoint)
