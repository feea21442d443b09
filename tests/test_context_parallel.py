"""A sequence over several processes gives what one process gives, outputs and gradients, and little of it travels."""

import json
import os
import random
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trl
from accelerate import ParallelismConfig, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from models import KINDS, SMALL, build, random_ids
from patterns import random_pattern
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from longnet_hf import (
    ContextParallelTrainerMixin,
    DilatedCache,
    DilatedPattern,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    dilated_attention,
    dilated_past,
    set_dilated_attention,
)
from longnet_hf.context_parallel import LAYOUTS, SequenceSplit, split_attention, split_sequence, whole_rows
from longnet_hf.hub_longnet import AUTO_MAP


ROOT = Path(__file__).parent.parent


def spawn(function, world_size, folder, *arguments, backend="gloo"):
    """Run `function(rank, world_size, *arguments)` in processes that form a group."""
    store = str(folder / f"store{len(list(folder.glob('store*')))}")  # a used one would not do
    arguments = function, world_size, store, backend, arguments
    processes = torch.multiprocessing.spawn(in_group, args=arguments, nprocs=world_size, join=False)
    deadline = time.monotonic() + 200
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError("the processes wait for one another")


def in_group(rank, function, world_size, store, backend, arguments):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    dist.barrier()  # a process that leaves early aborts the others' connections
    dist.destroy_process_group()


def random_positions(rng, length):
    """Positions of documents of random lengths, some of them a token."""
    positions = []
    while len(positions) < length:
        positions.extend(range(rng.choice([1, rng.randint(1, length), rng.randint(1, 2 * length)])))
    return positions[:length]


def assert_equal_to_one_process(rank, world_size, seeds, device="cpu", dtype=torch.float64, size=4, atol=1e-9):
    for seed in seeds:
        dilated_past._FEW_ROWS = seed % 2 << 17  # all at a time, or few
        rng = random.Random(seed)
        torch.manual_seed(seed)
        pattern, layout = replace(random_pattern(rng), offset=0), rng.choice(["head_tail", "contiguous"])
        length = 2 * world_size * rng.randint(1, 20)
        packing, rows = rng.choice(["one document", "packed", "packed"]), rng.choice([1, 2, 3])
        heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2])
        inputs = [
            torch.randn(rows, h, length, size, dtype=dtype, device=device) for h in (heads * group, heads, heads)
        ]
        grad = torch.randn_like(inputs[0])
        inputs = [x.requires_grad_() for x in inputs]
        position_ids = None
        if packing == "packed":
            position_ids = torch.tensor([random_positions(rng, length) for _ in range(rows)], device=device)
        expected = dilated_attention(*inputs, pattern, position_ids=position_ids)
        expected_grads = torch.autograd.grad(expected, inputs, grad)
        split = SequenceSplit(length, world_size, rank, layout)
        mine = split.positions()
        local = [x.detach()[:, :, mine] for x in inputs]
        if rng.random() < 0.3:  # rows that are not adjacent
            local = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in local]
        local = [x.requires_grad_() for x in local]
        batch = split.find_documents(rows, position_ids=None if position_ids is None else position_ids[:, mine])
        output = split_attention(*local, pattern, batch)
        torch.testing.assert_close(output, expected[:, :, mine], rtol=0, atol=atol)
        for ours, theirs in zip(torch.autograd.grad(output, local, grad[:, :, mine]), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, mine], rtol=0, atol=atol)


@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_and_gradients_equal_those_of_one_process(world_size, tmp_path):
    spawn(assert_equal_to_one_process, world_size, tmp_path, range(48 // world_size))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_kernels_take_their_part_of_a_split_sequence(dtype, atol, tmp_path):
    """Two processes on one GPU, over gloo."""
    spawn(assert_equal_to_one_process, 2, tmp_path, range(4), "cuda", dtype, 32, atol)


def bytes_sent_in_a_step(monkeypatch, world_size, rank):
    """By one process to others, at 64 tokens per process: of each exchange, and of each reduction. The others only
    seem to be there."""
    exchanged, reduced, exchange, reduce = [], [], dist.all_to_all_single, dist.all_reduce

    def counted_exchange(output, x, receive, send, **options):
        exchanged.append((sum(send) - send[rank]) * x.shape[1] * x.element_size())
        return exchange(output, x, receive, send, **options)

    def counted_reduce(x, **options):
        reduced.append(2 * x.numel() * x.element_size())  # of a ring, at most
        return reduce(x, **options)

    def unexpected(*args, **options):
        raise AssertionError("a collective that is not counted")

    model = build(LongNetForCausalLM, segment_lengths=[8, 32, 128, 512], dilation_rates=[1, 4, 16, 64]).train()
    ids = random_ids(1, 64)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with monkeypatch.context() as patch, split_sequence():
            patch.setattr(dist, "all_to_all_single", counted_exchange)
            patch.setattr(dist, "all_reduce", counted_reduce)
            for name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_to_all"):
                patch.setattr(dist, name, unexpected)
            model(ids, shift_labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    return model.config, exchanged, reduced


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_what_a_process_sends_is_bounded_by_what_is_kept(world_size, monkeypatch):
    for rank in (0, world_size // 2, world_size - 1):
        config, exchanged, reduced = bytes_sent_in_a_step(monkeypatch, world_size, rank)
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
        crossing = sum(w // r for w, r in branches if w > 32)  # the length of a chunk
        assert len(exchanged) == 2 * layers  # one per layer forward, and one backward
        bytes_per_key = 2 * config.head_dim * 4  # with its value
        assert max(exchanged) <= 2 * heads * crossing * bytes_per_key  # of each of two chunks
        assert max(reduced) <= 32 and len(reduced) == 3  # lengths of the parts, number of labels, loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_key_is_sent_to_a_process_twice(layout):
    pattern, heads, size = DilatedPattern([8, 64, 128, 64], [1, 2, 4, 1], ["segment"] * 3 + ["window"]), 3, 4
    for rank in range(size):
        plan = whole_rows(SequenceSplit(128, size, rank, layout), 2).exchange(pattern, heads, torch.device("cpu"))
        keys = torch.stack(plan.sent_keys, dim=1)[plan.send_order].split(plan.send_splits)
        assert sum(map(len, keys)) > 0 or rank == size - 1
        for sent in keys:
            assert len(sent) == len(set(map(tuple, sent.tolist())))


def test_a_length_that_cannot_be_split_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match="pad_to_multiple_of=8"):
        SequenceSplit(100, 4, 0)
    with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
        SequenceSplit(102, 4, 0, "contiguous")
    with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
        SequenceSplit(0, 2, 0)
    with pytest.raises(ValueError, match="`layout`"):
        SequenceSplit(100, 4, 0, "ring")
    with pytest.raises(ValueError, match="`rank`"):
        SequenceSplit(100, 2, 2)
    assert SequenceSplit(101, 1, 0).positions().tolist() == list(range(101))
    with pytest.raises(ValueError, match="init_process_group"), split_sequence():
        pass


def assert_parts_that_do_not_fit_are_refused(rank, world_size):
    """By all processes: none is left to wait for the others."""
    model = build(LongNetForCausalLM, "llama")
    for layout in LAYOUTS:
        with split_sequence(layout=layout), pytest.raises(ValueError, match="6 to 7 tokens.*pad_to_multiple_of=4"):
            model(random_ids(1, 7 - rank))
    with split_sequence(), pytest.raises(ValueError, match="a sequence of 14 tokens|A sequence of 14 tokens"):
        model(random_ids(1, 7))
    heads = LongNetForSequenceClassification, LongNetForTokenClassification, LongNetForQuestionAnswering
    for head in heads:
        with split_sequence(), pytest.raises(ValueError, match=f"{head.__name__} cannot take"):
            build(head)(random_ids(1, 8))

    # PyTorch's context, without Accelerate, does not say which processes share a sequence
    ids = random_ids(1, 16)
    mesh = init_device_mesh("cpu", (world_size,))
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]), pytest.raises(ValueError, match="split_sequence"):
        model(ids)

    split = SequenceSplit(16, world_size, rank)
    bounds = torch.tensor([0, 9, 5, 16])
    with pytest.raises(ValueError, match="`cu_seq_lens`"):
        split.find_documents(1, cu_seq_lens=bounds)
    for numbers in ([0] * 5 + [1] * 6 + [0] * 5, [1] * 8 + [0] * 8):
        with pytest.raises(ValueError, match="`seq_idx`"):
            split.find_documents(1, seq_idx=torch.tensor([numbers]))


def assert_mean_gradients(model, expected, world_size):
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / world_size, grad, rtol=0, atol=1e-6)


def assert_model_equals_one_process(rank, world_size):
    for kind in KINDS:
        model = build(LongNetForCausalLM, kind, torch.float64)
        ids, mask = random_ids(2, 48), torch.ones(2, 48, dtype=torch.long)
        mask[1, 37:] = 0
        labels = F.pad(ids.masked_fill(mask == 0, -100), (0, 1), value=-100)[:, 1:]
        outputs = model(ids, attention_mask=mask, shift_labels=labels, skip_logits=False)
        outputs.loss.backward()
        expected = [parameter.grad for parameter in model.parameters()]
        for layout in LAYOUTS:
            mine = SequenceSplit(48, world_size, rank, layout).positions()
            model.zero_grad()
            with split_sequence(layout=layout):
                inputs = dict(attention_mask=mask[:, mine], shift_labels=labels[:, mine], skip_logits=False)
                split = model(ids[:, mine], **inputs)
            real = mask[:, mine] == 1
            torch.testing.assert_close(split.logits[real], outputs.logits[:, mine][real], rtol=0, atol=1e-9)
            # The loss takes logits in float32
            torch.testing.assert_close(split.loss, outputs.loss, rtol=0, atol=1e-5)
            split.loss.backward()
            assert_mean_gradients(model, expected, world_size)

    # What cannot be split is refused by all processes together
    mine = SequenceSplit(48, world_size, rank).positions()
    refused = {
        "padding on the right only": dict(attention_mask=mask.flip(1)[:, mine]),
        "`past_key_values`": dict(past_key_values=DilatedCache(model.config)),
        "`seq_idx`": dict(seq_idx=torch.zeros(2, 47)),
        "`cu_seq_lens`": dict(cu_seq_lens_q=torch.tensor([0, 48])),
        r"\(2, 24\)": dict(attention_mask=mask),
        "give `shift_labels`": dict(labels=ids[:, mine]),
        "`attention_dropout`": dict(),
    }
    for words, inputs in refused.items():
        model.config.attention_dropout = 0.5 if words == "`attention_dropout`" else 0.0
        with split_sequence(), pytest.raises(ValueError, match=words):
            model.train(words == "`attention_dropout`")(ids[:, mine], **inputs)


def assert_ddp_takes_the_gradient_of_the_whole_sequence(rank, world_size):
    """As the README says it."""
    model, ids = build(LongNetForCausalLM, "llama", torch.float64).train(), random_ids(2, 48)
    labels = ids.masked_fill(ids < 20, -100)
    expected = model(ids, labels=labels).loss
    grads = torch.autograd.grad(expected, list(model.parameters()))
    ddp_model = DistributedDataParallel(model)
    mine = SequenceSplit(48, world_size, rank).positions()
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    with split_sequence():
        loss = ddp_model(ids[:, mine], shift_labels=shift_labels[:, mine]).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-6)

    # A loss of the user's own is divided by the labels of all processes
    model.loss_function = lambda logits, labels, vocab_size, shift_labels, num_items_in_batch: (
        F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum") / num_items_in_batch
    )
    with split_sequence():
        own = model(ids[:, mine], shift_labels=shift_labels[:, mine]).loss
    torch.testing.assert_close(own.float(), expected, rtol=0, atol=1e-5)


def assert_compiled_layers_equal_one_process(rank, world_size):
    """Attention is a break in the graph. In a checkpoint there can be none: such layers run as they are."""
    mine = SequenceSplit(48, world_size, rank).positions()
    for is_checkpointed in (False, True):
        model, ids = build(LongNetForCausalLM, "llama", torch.float64).train(), random_ids(2, 48)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch._dynamo.utils.counters.clear()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=False)
        with split_sequence():
            model(ids[:, mine], shift_labels=labels[:, mine]).loss.backward()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (not is_checkpointed)
        assert_mean_gradients(model, expected, world_size)


def assert_packed_model_equals_one_process(rank, world_size):
    model = build(LongNetForCausalLM, "llama", torch.float64)
    ids, positions = random_ids(2, 48), torch.arange(48).repeat(2, 1)
    positions[0, 17:] -= 17
    positions[1, 30:] -= 30
    expected = model(ids, position_ids=positions).logits
    split = SequenceSplit(48, world_size, rank)
    mine, numbers = split.positions(), torch.stack([torch.arange(48) >= 17, torch.arange(48) >= 30]).int()
    bounds = torch.tensor([0, 17, 48, 78, 96])
    ways = dict(position_ids=positions[:, mine]), dict(cu_seq_lens_q=bounds), dict(seq_idx=numbers)
    for inputs in (*ways, dict(seq_idx=numbers[:, mine])):
        with split_sequence():
            logits = model(ids[:, mine], **inputs).logits
        torch.testing.assert_close(logits, expected[:, mine], rtol=0, atol=1e-9)


def assert_generation_goes_on(rank, world_size):
    for kind in KINDS:
        model = build(LongNetForCausalLM, kind, torch.float64)
        for length in (2, 61):
            ids = random_ids(2, length)
            options = dict(max_new_tokens=30, min_new_tokens=30, do_sample=False)
            expected = model.generate(ids, **options)
            for layout in LAYOUTS:
                cache = model.prefill_split(ids, layout=layout)
                assert cache.get_seq_length() == length - 1
                assert model.generate(ids, past_key_values=cache, **options).tolist() == expected.tolist()


def in_turn(rank, world_size, functions):
    for function in functions:
        function(rank, world_size)


def test_a_model_equals_one_process(tmp_path):
    functions = (
        assert_model_equals_one_process,
        assert_ddp_takes_the_gradient_of_the_whole_sequence,
        assert_packed_model_equals_one_process,
        assert_compiled_layers_equal_one_process,
        assert_parts_that_do_not_fit_are_refused,
        assert_generation_goes_on,
    )
    spawn(in_turn, 2, tmp_path, functions)


class SplitTrainer(ContextParallelTrainerMixin, Trainer):
    pass


def build_other_model():
    """Not a LongNet, but dilated."""
    torch.manual_seed(0)
    pattern = {name: SMALL[name] for name in ("segment_lengths", "dilation_rates")}
    shape = {name: value for name, value in SMALL.items() if name not in pattern}
    model = Qwen3ForCausalLM(Qwen3Config(**shape | {"head_dim": 8, "num_key_value_heads": 2}))
    return set_dilated_attention(model, **pattern)


def word_tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, 97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def train(folder, mesh=None, resume=None, use_lora=False, kind="longnet", steps=4, length=64, shape=None, **options):
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
        disable_tqdm=True, **dict(use_cpu=True, learning_rate=1e-3) | options,
    )  # fmt: skip
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
    trainer = trainer_class(model, arguments, train_dataset=data, eval_dataset=data.select(range(3)), **collate)
    trainer.train(resume_from_checkpoint=resume)
    numbers = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    numbers.append((trainer.evaluate()["eval_loss"], 0.0))
    trainer.save_model(str(folder / "final"))
    return numbers


def set_environment(rank, world_size, **variables):
    """As a launcher does; the group that is there already is used."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **variables)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_USE_CPU"] = str(dist.get_backend() == "gloo")


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


def die_in_the_middle(rank, world_size):
    x, split = torch.randn(1, 2, 16, 4), SequenceSplit(16 * world_size, world_size, rank)
    pattern = DilatedPattern([8, 64], [1, 2])
    split_attention(x, x, x, pattern, whole_rows(split, 1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    split_attention(x, x, x, pattern, whole_rows(split, 1))


def test_a_killed_process_ends_the_others_with_an_error(tmp_path):
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        spawn(die_in_the_middle, 2, tmp_path)
