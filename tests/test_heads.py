"""What the model with each of its heads has in common, and the heads themselves."""

import pytest
import torch
import torch.nn.functional as F
from comparisons import all_gradients, assert_same_gradients, main_output, with_eager
from models import build, every_head, every_kind, random_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from longnet_hf import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    token_loss,
)


@every_head
@every_kind
def test_hidden_states_and_attentions(model_class, kind):
    model, ids = with_eager(build(model_class, kind)), random_ids(2, 21)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(2, 21, 32)] * 4
    assert [tuple(x.shape) for x in outputs.attentions] == [(2, 4, 21, 21)] * 3
    weights = outputs.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21))
    assert (weights.triu(1) == 0).all() == model.config.is_causal
    for ours, theirs in zip(model(ids, return_dict=False), model(ids).to_tuple(), strict=True):
        assert not torch.is_tensor(ours) or torch.equal(ours, theirs)


@every_head
def test_embeddings_can_be_read_and_replaced(model_class):
    model = build(model_class)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    new = nn.Embedding(10, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


@every_head
def test_embeddings_in_place_of_ids(model_class):
    model, ids = build(model_class), random_ids(1, 11)
    by_embeddings = main_output(model(inputs_embeds=model.get_input_embeddings()(ids)))
    torch.testing.assert_close(by_embeddings, main_output(model(ids)))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


@every_head
@every_kind
def test_no_parameter_is_unused(model_class, kind):
    model = build(model_class, kind)
    main_output(model(random_ids(1, 30))).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@every_head
def test_a_batch_equals_its_rows(model_class):
    model, ids = build(model_class, dtype=torch.float64), random_ids(3, 19)
    batch = main_output(model(ids))
    for row in range(3):
        alone = main_output(model(ids[row : row + 1]))
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("by_embeddings", [True, False])
@pytest.mark.parametrize(
    "pad_token_id", [0, 5, None]
)  # whatever the configuration's is, the mask says what is padding
@pytest.mark.parametrize(
    "columns", [[*range(4, 17)], [*range(13)], [0, *range(3, 14), 15]], ids=["left", "right", "in"]
)
def test_a_sequence_is_classified_by_its_last_real_token(columns, pad_token_id, by_embeddings, is_causal):
    model = build(
        LongNetForSequenceClassification, dtype=torch.float64, num_labels=3, is_causal=is_causal,
        pad_token_id=pad_token_id,
    )  # fmt: skip
    row = random_ids(1, 13)
    alone = model(row).logits
    torch.testing.assert_close(alone, model.score(model.model(row).last_hidden_state[:, -1]))
    ids, mask = torch.full((2, 17), 50), torch.zeros(2, 17, dtype=torch.long)
    ids[:, columns], mask[:, columns] = row, 1
    ids[1], mask[1] = random_ids(17), 1
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if by_embeddings else {"input_ids": ids}
    for attention_mask in (mask, mask.bool(), mask.double()):
        logits = model(**inputs, attention_mask=attention_mask).logits
        torch.testing.assert_close(logits[:1], alone)
        torch.testing.assert_close(logits[1:], model(ids[1:], attention_mask=mask[1:]).logits)


def test_rows_are_classified_without_a_mask_and_behind_a_cache():
    model, ids = build(LongNetForSequenceClassification, dtype=torch.float64, num_labels=3), random_ids(2, 13)
    expected = model(ids).logits
    torch.testing.assert_close(model(F.pad(ids, (0, 4), value=0)).logits, expected)  # by `pad_token_id`
    cache = model(ids[:, :5]).past_key_values
    mask = torch.ones(2, 15)
    mask[:, 13:] = 0
    rest = F.pad(ids[:, 5:], (0, 2), value=7)
    torch.testing.assert_close(model(rest, attention_mask=mask, past_key_values=cache).logits, expected)
    model.config.pad_token_id = None
    torch.testing.assert_close(model(ids).logits, expected)
    assert model(ids, attention_mask=torch.zeros_like(ids)).logits.isfinite().all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_row_of_several_documents_has_no_class(is_causal):
    model, ids = build(LongNetForSequenceClassification, is_causal=is_causal), random_ids(1, 12)
    bounds, restarting = torch.tensor([0, 5, 12]), torch.tensor([[*range(5), *range(7)]])
    for packed in (
        dict(position_ids=restarting),
        dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds),
        dict(seq_idx=torch.tensor([[0] * 5 + [1] * 7])),
    ):
        with pytest.raises(ValueError, match="several packed documents: give one per row"):
            model(ids, **packed)
    padded = dict(attention_mask=torch.arange(12)[None] >= 5, position_ids=restarting)
    torch.testing.assert_close(model(ids, **padded).logits, model(ids[:, 5:]).logits)


@pytest.mark.parametrize(("model_class", "labels"), [
    (LongNetForSequenceClassification, dict(labels=torch.tensor([0, 1]))),
    (LongNetForTokenClassification, dict(labels=torch.randint(2, (2, 12)))),
    (LongNetForQuestionAnswering, dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 5]))),
])  # fmt: skip
def test_heads_have_losses(model_class, labels):
    loss = build(model_class)(random_ids(2, 12), **labels).loss
    loss.backward()
    assert loss.isfinite()


NOTHING = [
    (LongNetForSequenceClassification, dict(labels=torch.full((2,), -100))),
    (LongNetForTokenClassification, dict(labels=torch.full((2, 12), -100))),
    (LongNetForQuestionAnswering, dict(start_positions=torch.full((2,), 12), end_positions=torch.tensor([99, 12]))),
]


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        *NOTHING,
        *((model, dict(labels=torch.full((2, 12), -100))) for model in (LongNetForCausalLM, LongNetForMaskedLM)),
    ],
)
def test_the_loss_of_nothing_is_zero(model_class, labels, count):
    model = build(model_class)
    loss = model(random_ids(2, 12), **labels, num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in model.parameters())


def up_to(column, labels):
    return labels.masked_fill(torch.arange(12) > torch.arange(8)[:, None] + column, -100)


ONE = dict(labels=torch.tensor([0, 1, 1, 0, 1, 1, 0, -100]))
SEVERAL = dict(labels=(torch.rand(8, 3) > 0.5).float())
SPANS = dict(start_positions=torch.tensor([1, 2, 0, 4, 11, 6, 7, 8]), end_positions=torch.arange(4, 12))
TOKENS, NEXT = (dict(labels=up_to(3, torch.randint(3, high, (8, 12)))) for high in (5, 97))
REGRESSION = dict(num_labels=3, problem_type="regression")
LOSSES = {
    "one class": (LongNetForSequenceClassification, ONE, {}),
    "several classes": (LongNetForSequenceClassification, SEVERAL, dict(num_labels=3)),
    "a number": (LongNetForSequenceClassification, dict(labels=torch.randn(8)), dict(num_labels=1)),
    "a column of numbers": (LongNetForSequenceClassification, dict(labels=torch.randn(8, 1)), dict(num_labels=1)),
    "numbers": (LongNetForSequenceClassification, dict(labels=torch.randn(8, 3)), REGRESSION),
    "tokens": (LongNetForTokenClassification, TOKENS, dict(num_labels=5)),
    "answers": (LongNetForQuestionAnswering, SPANS, {}),
    "causal": (LongNetForCausalLM, NEXT, {}),
    "masked": (LongNetForMaskedLM, NEXT, {}),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_gradients_are_those_of_one_batch(name, smoothing, tmp_path):
    pytest.importorskip("accelerate")
    model_class, labels, changes = LOSSES[name]
    if smoothing and name not in ("one class", "tokens", "causal", "masked"):
        pytest.skip("Trainer smooths labels of classes only")
    ids = random_ids(8, 12)
    rows = [{"input_ids": ids[i]} | {key: x[i] for key, x in labels.items()} for i in range(8)]
    norms = []
    for size, steps in ((8, 1), (2, 4), (3, 3)):
        if name == "answers" and size == 3:
            continue  # Trainer counts what is called `labels`: of these it takes the mean over unequal batches
        model = build(model_class, classifier_dropout=0.0, **changes).train()
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", optim="sgd", logging_steps=1, max_grad_norm=1e9,
            label_smoothing_factor=smoothing, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] > 1e-3 and norms == pytest.approx([norms[0]] * len(norms), rel=1e-4)


def test_losses_are_those_of_transformers():
    ids = random_ids(8, 12)
    for name in ("one class", "several classes", "a number", "a column of numbers", "numbers", "answers"):
        model_class, labels, changes = LOSSES[name]
        model = build(model_class, **changes)
        ours = model(ids, **labels)
        if model_class is LongNetForQuestionAnswering:
            theirs = model.loss_function(ours.start_logits, ours.end_logits, **labels)
        else:
            theirs = model.loss_function(logits=None, **labels, pooled_logits=ours.logits, config=model.config)
        torch.testing.assert_close(ours.loss, theirs)


@pytest.mark.parametrize("model_class", [model for model, _ in NOTHING])
def test_a_loss_function_of_the_users_own_gets_what_was_given(model_class):
    labels = dict(NOTHING)[model_class]
    model, seen = build(model_class), {}

    def loss_function(*args, **kwargs):
        seen.update(kwargs)
        return torch.ones(())

    model.loss_function = loss_function
    assert model(random_ids(2, 12), **labels, num_items_in_batch=7).loss == 1
    assert seen["num_items_in_batch"] == 7


def masked_batch(model, batch=2, length=30):
    """Ids in which some tokens are masked (by id 3), and the labels of those, in padded rows."""
    ids, mask = random_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 9 :] = 0
    masked = (torch.rand(batch, length) < 0.3) & (mask == 1)
    return ids.masked_fill(masked, 3), mask, ids.masked_fill(~masked, -100)


@every_kind
@pytest.mark.parametrize("largest", [1 << 27, 200])
def test_masked_language_models_have_the_loss_of_all_logits(kind, largest, monkeypatch):
    monkeypatch.setattr(token_loss, "_MAX_LOGITS", largest)
    model = build(LongNetForMaskedLM, kind, torch.float64)
    ids, mask, labels = masked_batch(model)
    logits = model(ids, attention_mask=mask).logits
    outputs = model(ids, attention_mask=mask, labels=labels)
    assert logits.shape == (2, 30, 97) and (outputs.logits is None) == (largest == 200)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_same_gradients(all_gradients(model, outputs.loss), all_gradients(model, expected), 1e-6)
    torch.testing.assert_close(outputs.loss, expected.to(outputs.loss.dtype), rtol=0, atol=1e-6)
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for count in (7, torch.tensor(7)):
        loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(loss, (summed / 7).to(loss.dtype), rtol=0, atol=1e-5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    whole = model(ids, attention_mask=mask, labels=labels, skip_logits=False)
    torch.testing.assert_close(whole.logits, logits)
    assert model(ids, attention_mask=mask, labels=labels, skip_logits=True).logits is None


def test_a_wrapped_head_of_masked_tokens_takes_part_in_the_loss(monkeypatch):
    model = build(LongNetForMaskedLM, dtype=torch.float64, tie_word_embeddings=False)
    ids, mask, labels = masked_batch(model)
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    expected = model(ids, attention_mask=mask, labels=labels).loss
    monkeypatch.setattr(token_loss, "_MAX_LOGITS", 200)
    outputs = model(ids, attention_mask=mask, labels=labels)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected)


def test_masked_tokens_are_predicted_from_both_sides():
    model, ids = build(LongNetForMaskedLM, dtype=torch.float64), random_ids(1, 20)
    changed = ids.clone()
    changed[0, 15] = (ids[0, 15] + 1) % 90 + 3
    assert (model(ids).logits[0, 12] - model(changed).logits[0, 12]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="LongNetForMaskedLM .*`is_causal=False`"):
        build(LongNetForMaskedLM, is_causal=True)
    with pytest.raises(ValueError, match="LongNetForCausalLM needs `is_causal=True`"):
        build(LongNetForCausalLM, is_causal=False)


def test_a_masked_language_model_uses_a_loss_of_its_own_and_compiles():
    model = build(LongNetForMaskedLM, dtype=torch.float64)
    ids, mask, labels = masked_batch(model)
    expected = model(ids, attention_mask=mask, labels=labels).loss
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask, labels=labels).loss, expected)
    model.loss_function = lambda logits, labels, vocab_size, num_items_in_batch, weight: logits.sum() * weight
    outputs = model(ids, attention_mask=mask, labels=labels, weight=2)
    assert outputs.loss == outputs.logits.sum() * 2
    with pytest.raises(ValueError, match="does not take `weight`, got 2"):  # of no loss
        model(ids, attention_mask=mask, weight=2)


def test_a_masked_language_model_is_pretrained_by_trainer_with_the_collator(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    rows = [tokenizer(" ".join(map(chr, range(97, 97 + n)))) for n in (26, 20, 26, 11) * 4]
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    model = build(LongNetForMaskedLM).train()
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", seed=1,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    model.save_pretrained(tmp_path / "model")
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "model")) is LongNetForMaskedLM
