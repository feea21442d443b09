"""What saves memory or time in training changes no gradient: checkpointing, chunks, compilation, offloading."""

import logging
import weakref

import pytest
import torch
from comparisons import all_gradients, assert_same_gradients, main_output
from models import build, every_kind, random_ids
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainingArguments

from longnet_hf import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    modeling_longnet,
)
from longnet_hf import dilated_operator as operator_module


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    model, ids = build(LongNetForCausalLM, kind, attention_dropout=0.2).train(), random_ids(2, 30)
    torch.manual_seed(5)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert_same_gradients(all_gradients(model, model(ids, labels=ids).loss), expected, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_a_checkpoint_computes_attention_once_where_there_is_room(kind, reentrant, monkeypatch):
    model, ids = build(LongNetForCausalLM, kind).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    results, compute = [], operator_module._forward_op
    monkeypatch.setattr(operator_module, "_forward_op", lambda *inputs: kept(compute(*inputs)))
    monkeypatch.setattr(modeling_longnet, "has_room_for", lambda num_bytes, device: num_bytes == size)

    def kept(result):
        results.extend(map(weakref.ref, result))
        return result

    size = model.model(ids).last_hidden_state.nbytes * model.config.num_hidden_layers
    for has_room in (True, False):
        size, passes = size if has_room else None, len(results)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same_gradients(all_gradients(model, model(ids, labels=ids).loss), expected, atol=1e-6)
        assert len(results) - passes == 2 * model.config.num_hidden_layers * (1 if has_room else 2)
        assert not any(result() is not None for result in results)  # nothing is kept any longer


def test_two_backward_passes_of_a_checkpoint_that_keeps_attention(monkeypatch):
    model, ids = build(LongNetForCausalLM).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    monkeypatch.setattr(modeling_longnet, "has_room_for", lambda num_bytes, device: True)
    model.gradient_checkpointing_enable()
    loss, weights = model(ids, labels=ids).loss, list(model.parameters())
    for _ in range(2):
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    assert_same_gradients(dict(zip(dict(model.named_parameters()), grads, strict=True)), expected, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_share_their_weights_keep_no_attention(reentrant, monkeypatch):
    """The second of them has an attention of its own."""
    model, ids = build(LongNetForCausalLM).train(), random_ids(2, 30)
    model.model.layers = torch.nn.ModuleList([model.model.layers[0]] * 3)
    loss = model(ids, labels=ids, use_cache=False).loss
    expected = all_gradients(model, loss)
    monkeypatch.setattr(modeling_longnet, "has_room_for", lambda num_bytes, device: True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = model(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(again, loss)
    assert_same_gradients(all_gradients(model, again), expected, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@every_kind
def test_mlps_in_chunks_change_nothing(kind, checkpointing):
    model, ids = build(LongNetForCausalLM, kind).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    chunked = LongNetForCausalLM(LongNetConfig(**model.config.to_diff_dict() | {"chunk_size_feed_forward": 7})).train()
    chunked.load_state_dict(model.state_dict())
    if checkpointing is not None:
        chunked.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_same_gradients(all_gradients(chunked, chunked(ids, labels=ids).loss), expected, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(("checkpointing", "hooked"), [(False, False), (True, False), (True, True)])
def test_mlps_in_chunks_are_computed_twice(checkpointing, hooked):
    """Also inside a checkpoint, unless a module has to be called as it is."""
    model, ids = build(LongNetForCausalLM, chunk_size_feed_forward=7).train(), random_ids(1, 30)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if hooked:
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *x: None)
    mlp, calls = model.model.layers[0].mlp, []
    forward_chunk = mlp.forward_chunk
    mlp.forward_chunk = lambda x: calls.append(x.shape[-2]) or forward_chunk(x)
    model(ids, labels=ids).loss.backward()
    assert sorted(calls) == sorted([7, 7, 7, 7, 2] * 2 + [7, 7, 7, 7] * hooked)


def test_mlps_in_chunks_under_autocast():
    model, ids = build(LongNetForCausalLM, chunk_size_feed_forward=7).train(), random_ids(1, 30)
    results = []
    for size in (7, 0):
        for layer in model.model.layers:
            layer.mlp.chunk_size = size
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        results.append((loss.detach(), all_gradients(model, loss)))
    (ours, gradients), (expected, others) = results
    assert torch.equal(ours, expected)
    assert_same_gradients(gradients, others, atol=0.02)


@pytest.mark.parametrize("has_room", [False, True])
@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_chunks_of_any_length_compile_once(kind, has_room, monkeypatch):
    """With `dynamic=True` the epsilons of norms are inputs of the graph, too."""
    monkeypatch.setattr(modeling_longnet, "has_room_for", lambda num_bytes, device: has_room)
    changes = dict(num_hidden_layers=1, use_sub_norm=True, chunk_size_feed_forward=7)
    model = build(LongNetForCausalLM, kind, **changes).train()
    layer, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    compiled = torch.compile(layer, dynamic=True, backend="aot_eager")
    for length in (17, 23):
        x = norm(torch.randn(2, length, 32)).detach()
        ours, expected = (all_gradients(layer, f(x).square().sum()) for f in (compiled, layer))
        assert_same_gradients(ours, expected, atol=1e-3)


def test_checkpointed_activations_can_be_offloaded():
    """With the hook that `activation_checkpointing_enable(offload=True)` uses, whose pinned memory wants a GPU."""
    model, ids = build(LongNetForCausalLM).train(), random_ids(2, 30)
    expected = all_gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    with torch.autograd.graph.save_on_cpu():
        loss = model(ids, labels=ids).loss
    assert_same_gradients(all_gradients(model, loss), expected, atol=1e-6)


def test_attention_dropout_acts_in_training_only():
    model, ids = build(LongNetModel, attention_dropout=0.5), random_ids(1, 20)
    assert torch.equal(main_output(model(ids)), main_output(model(ids)))
    model.train()
    assert not torch.equal(main_output(model(ids)), main_output(model(ids)))


@pytest.mark.parametrize("kind", ["paper", "hybrid", "heads"])
def test_compiles_into_one_graph(kind):
    torch.compiler.reset()  # every kind compiles the same code anew, which PyTorch limits
    model, ids = build(LongNetForCausalLM, kind), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(30)[None]}):
        ours, theirs = (m(ids, labels=ids, use_cache=False, **inputs).loss for m in (compiled, model))
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(all_gradients(model, ours), all_gradients(model, theirs), atol=1e-5)
    for length in (41, 52):  # of which it knows no more from now on
        ids = random_ids(2, length)
        ours, theirs = (m(ids, labels=ids, use_cache=False).loss for m in (compiled, model))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_one_pattern_share_what_is_compiled(training, monkeypatch):
    monkeypatch.setattr(modeling_longnet, "has_room_for", lambda num_bytes, device: True)
    model, counter = build(LongNetModel).train(training), CompileCounter()
    model.gradient_checkpointing_enable()
    for layer in model.layers:
        layer.compile(backend=counter, dynamic=False)
    model(random_ids(1, 20), use_cache=False)
    assert counter.frame_count == 1


class OwnLossTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("by_region", [False, True])
def test_trainer_compiles(by_region, tmp_path, monkeypatch):
    """`TrainingArguments(torch_compile=True)`: the model as one graph, or layer by layer."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(by_region))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which the arguments overwrite, for all that comes after
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 20).tolist()]
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        arguments = dict(max_steps=2, per_device_train_batch_size=2, logging_steps=1, gradient_checkpointing=True)
        arguments = TrainingArguments(tmp_path, **arguments, **compiled, use_cpu=True, report_to="none")
        trainer = Trainer(build(LongNetForCausalLM), arguments, train_dataset=rows)
        torch._dynamo.utils.counters.clear()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1])


def test_liger_is_told_that_its_kernels_are_not_needed(tmp_path, caplog, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(2, 20).tolist()]
    arguments = TrainingArguments(tmp_path, max_steps=1, use_liger_kernel=True, use_cpu=True, report_to="none")
    Trainer(build(LongNetForCausalLM, "llama"), arguments, train_dataset=rows).train()
    assert "Liger's kernels are not used" in caplog.text


@pytest.mark.parametrize("with_metrics", [False, True])
@pytest.mark.parametrize("trainer_class", [Trainer, OwnLossTrainer])
def test_trainer(trainer_class, with_metrics, tmp_path):
    pytest.importorskip("accelerate")
    model = build(LongNetForCausalLM)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 20).tolist()]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=True,
    )
    metrics = (lambda p: {"shape": p.predictions.shape}) if with_metrics else None
    trainer = trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    result = trainer.evaluate()
    assert 0 < result["eval_loss"] < 20
    assert not with_metrics or result["eval_shape"] == (8, 20, 97)
