"""The loss, computed in chunks, is the plain loss, whatever is given with the labels."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from comparisons import all_gradients, assert_same_gradients, plain_loss
from models import build, random_ids
from processes import spawn
from transformers import Trainer, TrainingArguments

from longnet_hf import LongNetForCausalLM, linear_cross_entropy, token_loss


def as_much_as(monkeypatch, logits: int, itemsize: int = 8) -> None:
    """No chunk holds more logits."""
    monkeypatch.setattr(token_loss, "_MAX_LOGITS", logits)
    monkeypatch.setattr(linear_cross_entropy, "_MAX_BYTES", {})
    monkeypatch.setattr(linear_cross_entropy, "_MAX_BYTES_ELSEWHERE", logits * itemsize)


@pytest.mark.parametrize("max_logits", [1, 97 * 7, 1 << 25])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_the_chunked_loss_is_the_plain_loss(max_logits, tied, hooked, monkeypatch):
    """Of a head that is nothing but its weight, and of one that has to be called."""
    as_much_as(monkeypatch, max_logits)
    model, ids = build(LongNetForCausalLM, dtype=torch.float64, tie_word_embeddings=tied), random_ids(2, 23)
    labels = ids.clone()
    labels[0, :9] = -100
    seen = []
    if hooked:
        model.lm_head.register_forward_hook(lambda *x: seen.append(x[2].shape[:-1].numel()))
    outputs = model(ids, labels=labels)
    assert (outputs.logits is None) == (max_logits < 46 * 97) and outputs.loss.dtype == torch.float64
    assert max(seen) <= max(1, max_logits // 97) if hooked else not seen
    expected = plain_loss(model, ids, labels)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(all_gradients(model, outputs.loss), all_gradients(model, expected), atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", ["hidden_states", "weight", None])
def test_the_loss_of_a_head_is_as_exact_as_the_plain_one(dtype, frozen, monkeypatch):
    as_much_as(monkeypatch, 97 * 9)
    labels = torch.randint(97, (31,))
    labels[3:7] = -100
    inputs = {"hidden_states": torch.randn(31, 16), "weight": torch.randn(97, 16)}

    def plain(hidden_states, weight):
        logits = (hidden_states @ weight.t()).double()
        return F.cross_entropy(logits, labels, reduction="sum")

    def fused(hidden_states, weight):
        return linear_cross_entropy.linear_cross_entropy(hidden_states, weight, labels)

    results = []
    for function, its_dtype in ((plain, torch.float64), (plain, dtype), (fused, dtype)):
        tensors = {
            name: x.to(dtype).to(its_dtype, copy=True).requires_grad_(name != frozen) for name, x in inputs.items()
        }
        loss = function(**tensors)
        (3 * loss).backward(retain_graph=True)
        assert frozen is None or tensors[frozen].grad is None
        results.append([loss.detach(), *(x.grad.double() for x in tensors.values() if x.grad is not None)])
    assert loss.dtype == torch.float32
    for exact, theirs, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_the_loss_of_a_head_under_autocast():
    labels, weight = torch.randint(97, (31,)), torch.randn(97, 16, requires_grad=True)
    hidden_states = torch.randn(31, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy.linear_cross_entropy(hidden_states, weight, labels)
        expected = F.cross_entropy(F.linear(hidden_states, weight).float(), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, (hidden_states, weight)) for x in (loss, expected))
    for grad, other in zip(ours, theirs, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=0.05, atol=0.05)


def test_what_the_loss_of_a_head_cannot_do_is_refused():
    hidden_states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    for label in (7, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            linear_cross_entropy.linear_cross_entropy(hidden_states, weight, torch.full((5,), label))
    loss = linear_cross_entropy.linear_cross_entropy(hidden_states, weight, torch.arange(5))
    (grad,) = torch.autograd.grad(loss, hidden_states, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_the_loss_takes_what_trainer_gives():
    model, ids = build(LongNetForCausalLM), random_ids(2, 23)
    mean = model(ids, labels=ids).loss
    total = 2 * 22
    for count in (11, torch.tensor(11)):
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=count).loss, mean * total / 11)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, mean)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=shifted).loss, mean)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    ours = model(ids, labels=ids.where(ids > 40, 7), ignore_index=7).loss
    torch.testing.assert_close(ours, model(ids, labels=ids.where(ids > 40, -100)).loss)


@pytest.mark.parametrize("training", [True, False])
def test_logits_beside_labels_are_few_or_asked_for(training, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    token_loss.logger.warning_once.cache_clear()
    model, ids = build(LongNetForCausalLM).train(training), random_ids(2, 23)
    logits = model(ids).logits
    assert torch.equal(model(ids, labels=ids).logits, logits)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    monkeypatch.setattr(token_loss, "_MAX_LOGITS", 2 * 23 * 97)
    assert torch.equal(model(ids, labels=ids).logits, logits) and not caplog.text
    monkeypatch.setattr(token_loss, "_MAX_LOGITS", 2 * 23 * 97 - 1)
    assert model(ids, labels=ids).logits is None
    assert "logits of 46 tokens are left out" in caplog.text and "skip_logits = False" in caplog.text
    assert torch.equal(model(ids, labels=ids, skip_logits=False).logits, logits)
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=3).logits, logits[:, -3:])
    model.config.skip_logits = False
    assert torch.equal(model(ids, labels=ids).logits, logits)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])
    per_row = torch.tensor([[1, 5], [0, 22]])
    expected = torch.stack((logits[0, [1, 5]], logits[1, [0, 22]]))
    torch.testing.assert_close(model(ids, logits_to_keep=per_row).logits, expected)
    mask = torch.rand(2, 23) < 0.5
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, logits[mask])


def test_a_loss_function_of_the_users_own_is_honoured():
    model, ids = build(LongNetForCausalLM), random_ids(1, 8)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean() + vocab_size
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, outputs.logits.mean() + 97)
    model.loss_function = lambda logits, labels, vocab_size, weight: logits.mean() * weight
    torch.testing.assert_close(model(ids, labels=ids, weight=3.0).loss, 3 * outputs.logits.mean())
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()  # gets nothing that was not given
    torch.testing.assert_close(model(ids, labels=ids).loss, outputs.logits.mean())
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean()
    rows = model(ids, labels=ids, attention_rows=[0, 3], output_attentions=True)  # the model's, not the loss's alone
    assert rows.attentions[0].shape[-2:] == (2, 8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_logits", [1, 1 << 25])
def test_the_loss_of_a_padded_row_is_that_of_its_text_alone(side, max_logits, monkeypatch):
    """Of left padding the last column stands before the first token, and is not asked for it."""
    as_much_as(monkeypatch, max_logits)
    model, ids = build(LongNetForCausalLM, dtype=torch.float64), random_ids(1, 23)
    widths = (9, 0) if side == "left" else (0, 9)
    padded, mask = F.pad(ids, widths, value=0), F.pad(torch.ones_like(ids), widths)
    batch = dict(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    alone, loss = model(ids, labels=ids).loss, model(**batch).loss
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0)
    assert_same_gradients(all_gradients(model, loss), all_gradients(model, alone), atol=1e-12)
    options = dict(labels=batch["labels"], attention_mask=mask, chunk_size=5, progress=False)
    *_, last = model.forward_chunks(padded, **options)
    torch.testing.assert_close(last.loss, alone.float())


def test_the_loss_knows_what_follows_padding_inside_a_row():
    """Such as a soft prompt's, which stands before the padding of its row."""
    model, ids = build(LongNetForCausalLM, dtype=torch.float64), random_ids(1, 30)
    mask = torch.ones_like(ids)
    mask[:, 3:17] = 0
    real = mask == 1
    labels = ids.masked_fill(~real, -100)
    expected = model(ids[real][None], labels=ids[real][None]).loss
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected)
    for chunk_size in (4, 9, 30):
        *_, last = model.forward_chunks(ids, labels=labels, attention_mask=mask, chunk_size=chunk_size)
        torch.testing.assert_close(last.loss.double(), expected, rtol=0, atol=1e-6)


def test_documents_that_end_before_padding_are_not_asked_for_the_next():
    model, ids = build(LongNetForCausalLM, dtype=torch.float64), random_ids(1, 30)
    mask, numbers = torch.ones_like(ids), torch.zeros_like(ids)
    mask[:, 11:17], numbers[:, 17:] = 0, 1
    labels = ids.masked_fill(mask == 0, -100)
    told = dict(position_ids=torch.cat((torch.arange(17), torch.arange(13)))[None]), dict(seq_idx=numbers)
    alone = [model(part, labels=part).loss * (part.shape[1] - 1) for part in (ids[:, :11], ids[:, 17:])]
    for documents in (*told, dict(cu_seq_lens_q=torch.tensor([0, 17, 30]))):
        loss = model(ids, attention_mask=mask, labels=labels, **documents).loss
        torch.testing.assert_close(loss, sum(alone) / 22)


def test_a_text_may_begin_with_the_token_for_padding():
    """As GPT-2's do. Of a row of zeros every norm multiplies the gradients by 1 / sqrt(eps), to infinity in twelve
    layers."""
    model, ids = build(LongNetForCausalLM, num_hidden_layers=12), random_ids(1, 20)
    norms = []
    for first in (0, 5):
        ids[0, 0] = first
        gradients = all_gradients(model, model(ids, labels=ids).loss)
        norms.append(torch.nn.utils.get_total_norm(gradients.values()).item())
    assert norms[0] == pytest.approx(norms[1], rel=0.5)


def test_a_loss_of_no_labels_is_divided_by_one():
    model, hidden_states = build(LongNetForCausalLM), torch.randn(1, 5, 32)
    labels = random_ids(1, 5)
    expected = model.token_loss(hidden_states, model.lm_head(hidden_states), labels, 0)
    torch.testing.assert_close(model.chunked_loss(hidden_states, labels, 0), expected)
    torch.testing.assert_close(model.chunked_loss(hidden_states, labels, torch.tensor(0)), expected)


def test_lora_on_the_head_gets_its_gradient_from_the_chunked_loss(monkeypatch):
    peft = pytest.importorskip("peft")
    as_much_as(monkeypatch, 97 * 5)
    base = build(LongNetForCausalLM, tie_word_embeddings=False)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head", "v_proj"], init_lora_weights=False))
    ids = random_ids(2, 23)
    ours, expected = model(input_ids=ids, labels=ids).loss, plain_loss(model, ids, ids)
    torch.testing.assert_close(ours, expected)
    gradients = all_gradients(model, ours)
    assert any("lm_head.lora_A" in name for name in gradients)
    assert_same_gradients(gradients, all_gradients(model, expected), atol=1e-6)


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = build(LongNetForCausalLM), random_ids(2, 20)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    expected = trainer.label_smoother({"logits": model(ids).logits}, ids, shift_labels=True)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, expected)
    assert type(transformers.AutoModelForCausalLM.from_config(model.config)) is LongNetForCausalLM


def fsdp_worker(rank, world_size, expected):
    """One of two processes: FSDP2 as Accelerate lays it out, layers one by one and the rest together."""
    from torch.distributed.fsdp import fully_shard

    linear_cross_entropy._MAX_BYTES_ELSEWHERE = 97 * 5 * 8
    model, ids = build(LongNetForCausalLM, dtype=torch.float64).train(), expected.pop("ids")
    model.gradient_checkpointing_enable()
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # every rank has a row of its own; gradients are averaged over ranks, so each loss is divided by its own labels
    loss = model(ids[rank : rank + 1], labels=ids[rank : rank + 1], num_items_in_batch=22).loss
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad.full_tensor(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_chunked_loss_is_exact_under_fsdp2(tmp_path):
    model, ids = build(LongNetForCausalLM, dtype=torch.float64).train(), random_ids(2, 23)
    expected = all_gradients(model, model(ids, labels=ids).loss) | {"ids": ids}
    spawn(fsdp_worker, 2, tmp_path, expected)
