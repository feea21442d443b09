"""Trainers over parts of sequences take the steps that one process takes."""

import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
import trl
from accelerate import ParallelismConfig, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from models import SMALL, build, random_ids, word_tokenizer
from peft import LoraConfig, get_peft_model
from processes import set_environment, spawn
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from longnet_hf import (
    ContextParallelTrainerMixin,
    LongNetForCausalLM,
    set_dilated_attention,
)
from longnet_hf.hub_longnet import AUTO_MAP


ROOT = Path(__file__).parent.parent


class SplitTrainer(ContextParallelTrainerMixin, Trainer):
    pass


def build_other_model():
    """Not a LongNet, but dilated."""
    torch.manual_seed(0)
    pattern = {name: SMALL[name] for name in ("segment_lengths", "dilation_rates")}
    shape = {name: value for name, value in SMALL.items() if name not in pattern}
    model = Qwen3ForCausalLM(Qwen3Config(**shape | {"head_dim": 8, "num_key_value_heads": 2}))
    return set_dilated_attention(model, **pattern)


def train(
    folder, mesh=None, resume=None, use_lora=False, kind="longnet", steps=4, length=64, shape=None, streamed=False,
    then=None, **options,
):  # fmt: skip
    """Steps and an evaluation of a plain Trainer (or TRL's, or one for other models), which saves its model: losses
    and norms of gradients."""
    if mesh is not None:
        layer = "Qwen3DecoderLayer" if kind == "other" else "LongNetDecoderLayer"
        fsdp = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": layer}
        # PEFT loses adapters inside FSDP's own checkpointing, whatever the model
        fsdp |= {"activation_checkpointing": not use_lora, "state_dict_type": "FULL_STATE_DICT"}
        options |= dict(parallelism_config=ParallelismConfig(**mesh), fsdp=True, fsdp_config=fsdp)
    trainer_class, arguments_class, collate = Trainer, TrainingArguments, {"data_collator": default_data_collator}
    if kind == "other":
        trainer_class = SplitTrainer
    elif kind == "trl":
        trainer_class, arguments_class, collate = trl.SFTTrainer, trl.SFTConfig, {"processing_class": word_tokenizer()}
        options |= dict(max_length=None, shuffle_dataset=False, bf16=False, gradient_checkpointing=use_lora)
    arguments = arguments_class(
        str(folder), max_steps=steps, per_device_train_batch_size=2 // (mesh or {}).get("dp_shard_size", 1),
        gradient_accumulation_steps=2, lr_scheduler_type="constant", report_to="none", save_steps=2, logging_steps=1,
        disable_tqdm=True, **dict(use_cpu=True, learning_rate=1e-3, adam_epsilon=1e-6) | options,
    )  # fmt: skip  # (by a smaller one AdamW divides gradients that are nothing but rounding errors)
    if mesh is not None and arguments.use_cpu:  # Accelerate allows this on GPUs only
        arguments._setup_devices  # noqa: B018
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(1)
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(4 * steps, length)]
    for number, row in enumerate(data):
        if kind != "trl":  # some documents are packed
            second = 9 * number if number < 7 else 0
            row["position_ids"] = [*range(length - second), *range(second)]
        if kind == "other":  # and padded on the right
            row["attention_mask"] = [1] * (length - number) + [0] * number
            row["labels"] = row["labels"][: length - number] + [-100] * number
    model = build_other_model() if kind == "other" else build(LongNetForCausalLM, "llama", **shape or {}).train()
    if use_lora:
        model = get_peft_model(model, LoraConfig(init_lora_weights=False))
    data = datasets.Dataset.from_list(data)
    fed = data.to_iterable_dataset() if streamed else data
    trainer = trainer_class(model, arguments, train_dataset=fed, eval_dataset=data.select(range(3)), **collate)
    trainer.train(resume_from_checkpoint=resume)
    if then is not None:
        then(trainer)
    numbers = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    numbers.append((trainer.evaluate()["eval_loss"], 0.0))
    trainer.save_model(str(folder / "final"))
    return numbers


def train_in_group(rank, world_size, runs):
    set_environment(rank, world_size)
    for folder, options in runs:
        numbers = train(folder, **options)
        if rank == 0:
            (folder / "numbers.json").write_text(json.dumps(numbers))
        AcceleratorState._reset_state(reset_partial_state=True)


def assert_same_numbers(folder, expected, rel=1e-5):
    numbers = json.loads((folder / "numbers.json").read_text())
    assert [pytest.approx(row, rel=rel) for row in expected] == numbers[: len(expected)]


def assert_same_weights(folder, expected, atol=1e-5):
    weights, expected = (load_file(next((x / "final").glob("*.safetensors"))) for x in (folder, expected))
    assert expected.keys() <= weights.keys()  # tied weights may come twice from FSDP
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=atol)


def test_a_plain_trainer_with_fsdp2_equals_one_process(tmp_path):
    """Packed documents, gradient accumulation, activation checkpointing; adapters; bf16; checkpoints; more meshes."""
    folders = [tmp_path / name for name in "abcdefghij"]
    for folder in folders:
        folder.mkdir()
    split, lora, bf16, both, other, sft, one, one_lora, one_other, one_sft = folders
    numbers, mesh, lora_options = train(one), {"cp_size": 2}, dict(use_lora=True, gradient_checkpointing=True)
    runs = [(split, {}), (lora, lora_options), (bf16, dict(bf16=True)), (other, dict(kind="other"))]
    runs.append((sft, dict(kind="trl", use_lora=True)))
    spawn(train_in_group, 2, tmp_path, [(folder, options | {"mesh": mesh}) for folder, options in runs])
    assert len(numbers) == 5
    assert_same_numbers(split, numbers)
    assert_same_weights(split, one)
    assert json.loads((split / "final" / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("modeling_longnet.py", "context_parallel.py"):  # the code travels, too
        assert (split / "final" / name).exists()
    assert not list((split / "final").glob("_fsdp*"))
    assert_same_numbers(bf16, numbers, rel=0.05)
    assert_same_numbers(lora, train(one_lora, use_lora=True))
    assert_same_weights(lora, one_lora)
    assert_same_numbers(other, train(one_other, kind="other"))
    assert_same_weights(other, one_other)
    assert_same_numbers(sft, train(one_sft, kind="trl", use_lora=True))
    assert_same_weights(sft, one_sft)

    checkpoint = str(split / "checkpoint-2")
    mesh = {"cp_size": 2, "dp_shard_size": 2}
    spawn(train_in_group, 4, tmp_path, [(both, dict(mesh=mesh, resume=checkpoint))])
    # Of evaluation data that two data-parallel processes cannot share evenly, Trainer repeats some
    assert_same_numbers(both, numbers[:-1])
    assert_same_weights(both, one)


def assert_what_cannot_be_split_is_refused(rank, world_size, folder):
    set_environment(rank, world_size)
    refused = {
        "dispatch_batches": dict(streamed=True),
        "label_smoother": dict(kind="other", label_smoothing_factor=0.1),
        "prediction_loss_only": dict(kind="other", then=lambda trainer: trainer.predict(trainer.eval_dataset)),
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words):
            train(folder, mesh={"cp_size": world_size}, steps=2, **options)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_cannot_be_split_is_refused(tmp_path):
    spawn(assert_what_cannot_be_split_is_refused, 2, tmp_path, tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ten_steps_on_several_gpus_equal_one(tmp_path):
    """Over NCCL, with the kernels."""
    world_size = torch.cuda.device_count()
    shape = dict(hidden_size=128, segment_lengths=[256, 1024, 4096], dilation_rates=[1, 2, 6])
    # Not AdamW, which takes steps of one size in the direction of gradients that are nothing but rounding errors
    options = dict(use_cpu=False, steps=10, length=4096, shape=shape, optim="sgd", learning_rate=0.1)
    split, bf16, one = folders = [tmp_path / name for name in ("split", "bf16", "one")]
    for folder in folders:
        folder.mkdir()
    # A process of its own, which sees one GPU where Trainer would take them all
    spawn(train_in_group, 1, tmp_path, [(one, options)], backend="nccl")
    options["mesh"] = {"cp_size": world_size}
    spawn(train_in_group, world_size, tmp_path, [(split, options), (bf16, options | {"bf16": True})], backend="nccl")
    numbers = json.loads((one / "numbers.json").read_text())
    assert len(numbers) == 11
    assert_same_numbers(split, numbers, rel=1e-4)
    assert_same_weights(split, one, atol=1e-4)
    assert_same_numbers(bf16, numbers, rel=0.05)


def run_example(rank, world_size, environment, arguments):
    set_environment(rank, world_size, **environment)
    make = PartialState.__init__

    def make_as_on_gpus(self, *args, **options):  # Accelerate allows this on GPUs only
        make(self, *args, **options)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = make_as_on_gpus
    script = ROOT / "examples" / "train_multi_gpu.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def test_the_example_under_its_configuration_of_accelerate(tmp_path):
    pytest.importorskip("datasets"), pytest.importorskip("matplotlib")
    launch = ["--config_file", str(ROOT / "examples" / "split_sequence.yaml"), "--num_processes", "2"]
    launch += ["--parallelism_config_cp_size", "2", "--mixed_precision", "no", "train_multi_gpu.py"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(launch))
    environment = {name: x for name, x in prepare_multi_gpu_env(options).items() if os.environ.get(name) != x}
    environment["HF_HOME"] = str(tmp_path / "cache")
    text = "".join(path.read_text() for path in (ROOT / "longnet_hf").glob("*.py"))
    (tmp_path / "data.txt").write_text(text)
    arguments = (
        f"--data {tmp_path}/data.txt --output_dir {tmp_path}/run --vocab_size 300 --hidden_size 16 --held_out 0.3 "
        "--intermediate_size 32 --num_hidden_layers 1 --num_attention_heads 2 --segment_lengths 16 64 "
        "--dilation_rates 1 2 --context_length 128 --max_held_out_contexts 2 --save_steps 2 --use_cpu "
        "--report_to none --disable_tqdm true --logging_steps 1 --max_steps"
    ).split()
    spawn(run_example, 2, tmp_path, environment, [*arguments, "2"])
    spawn(run_example, 2, tmp_path, environment, [*arguments, "4"])  # goes on
    steps = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in steps] == [1, 2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.segment_lengths == [16, 64]
    assert "eval_loss" in json.loads((tmp_path / "run" / "eval_results.json").read_text())
