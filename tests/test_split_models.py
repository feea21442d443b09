"""Models that are given parts of sequences give what one process gives, and generate from there."""

import importlib.util
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import KINDS, build, random_ids
from processes import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from longnet_hf import (
    DilatedCache,
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    modeling_longnet,
    set_dilated_attention,
)
from longnet_hf import context_parallel as context_parallel_module
from longnet_hf.context_parallel import LAYOUTS, SequenceSplit, split_sequence


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
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def model_with_gradients():
    """A model in training, rows of ids, their shifted labels, and the gradients of its weights on one process."""
    model, ids = build(LongNetForCausalLM, "llama", torch.float64).train(), random_ids(2, 48)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    return model, ids, labels, torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))


def assert_compiled_layers_equal_one_process(rank, world_size):
    """Attention is a break in the graph. In a checkpoint there can be none: such layers run as they are."""
    mine = SequenceSplit(48, world_size, rank).positions()
    for is_checkpointed in (False, True):
        model, ids, labels, expected = model_with_gradients()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch._dynamo.utils.counters.clear()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=False)
        with split_sequence():
            model(ids[:, mine], shift_labels=labels[:, mine]).loss.backward()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (not is_checkpointed)
        assert_mean_gradients(model, expected, world_size)


def assert_a_checkpoint_sends_once_where_all_have_room(rank, world_size):
    mine = SequenceSplit(48, world_size, rank).positions()
    for reentrant in (True, False):
        model, ids, labels, expected = model_with_gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for has_room, per_layer in ([True, True], 2), ([True, False], 3), ([False, False], 3):
            model.zero_grad()
            counted = patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single)
            room = patch.object(modeling_longnet, "has_room_for", return_value=has_room[rank])
            with split_sequence(), counted as exchange, room as is_asked:
                model(ids[:, mine], shift_labels=labels[:, mine]).loss.backward()
            assert exchange.call_count == per_layer * model.config.num_hidden_layers
            assert_mean_gradients(model, expected, world_size)
        outputs = 2 * 24 * model.config.hidden_size * 8 * model.config.num_hidden_layers
        assert is_asked.call_args.args[0] > outputs  # with what comes from others, of which this pattern asks for some


def assert_kept_results_are_no_reason_to_compile_again(rank, world_size):
    ids = random_ids(2, 48)[:, SequenceSplit(48, world_size, rank).positions()]
    model = build(LongNetForCausalLM, "llama", num_hidden_layers=12)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.self_attn.compile(backend="aot_eager", dynamic=False)
    compilations = []
    for has_room in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        with split_sequence(), patch.object(modeling_longnet, "has_room_for", return_value=has_room):
            model(ids, shift_labels=ids).loss.backward()
        compilations.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert compilations[0] == compilations[1]


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


def assert_labels_of_padding_do_not_count(rank, world_size):
    """Whether they are shifted by the model or before it, and whoever holds the padding."""
    model, ids = build(LongNetForCausalLM, "llama", torch.float64), random_ids(2, 48)
    mask = torch.ones(2, 48)
    mask[:, 20:] = 0  # all that the second process has in the contiguous layout
    expected = model(ids, attention_mask=mask, labels=ids).loss
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, attention_mask=mask, shift_labels=shifted).loss, expected)
    for layout in LAYOUTS:
        mine = SequenceSplit(48, world_size, rank, layout).positions()
        with split_sequence(layout=layout):
            loss = model(ids[:, mine], attention_mask=mask[:, mine], shift_labels=shifted[:, mine]).loss
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def assert_other_models_equal_one_process(rank, world_size):
    """Also where layers are computed again after the split was left."""
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=100, num_hidden_layers=2, **shape)).double().train()
    set_dilated_attention(model, segment_lengths=[8, 32], dilation_rates=[1, 2])
    ids = random_ids(2, 48)
    positions, shifted = torch.arange(48)[None], F.pad(ids[:, 1:], (0, 1), value=-100)
    options = dict(num_items_in_batch=94 / world_size, use_cache=False)
    grads = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    mine = SequenceSplit(48, world_size, rank).positions()
    inputs = dict(shift_labels=shifted[:, mine], labels=ids[:, mine], position_ids=positions[:, mine], **options)
    for reentrant in (None, True, False):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with split_sequence():
            loss = model(ids[:, mine], **inputs).loss
        loss.backward()
        assert_mean_gradients(model, grads, world_size)
    del inputs["position_ids"]
    with split_sequence(), pytest.raises(ValueError, match="`position_ids` count from 0 on every process"):
        model(ids[:, mine], **inputs)
    with split_sequence(), pytest.raises(ValueError, match="`prefill_split`"):
        build(LongNetForCausalLM).generate(ids)


def test_a_copy_of_the_code_knows_of_the_split():
    """Code that came with weights is a copy."""
    spec = importlib.util.spec_from_file_location("longnet_hf.another_copy", context_parallel_module.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.ActiveSplit is not context_parallel_module.ActiveSplit
    assert another._explicit is context_parallel_module._explicit


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
        assert_a_checkpoint_sends_once_where_all_have_room,
        assert_kept_results_are_no_reason_to_compile_again,
        assert_labels_of_padding_do_not_count,
        assert_other_models_equal_one_process,
    )
    spawn(in_turn, 2, tmp_path, functions)
