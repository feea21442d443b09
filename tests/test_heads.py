"""What the model with each of its heads has in common, and the heads themselves."""

import pytest
import torch
import torch.nn.functional as F
from comparisons import main_output, with_eager
from models import build, every_head, every_kind, random_ids
from torch import nn

from longnet_hf import (
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
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
    assert (weights.triu(1) == 0).all()
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


def test_sequence_classification_reads_the_last_real_token():
    model, ids = build(LongNetForSequenceClassification, num_labels=3), random_ids(1, 13)
    alone = model(ids).logits
    for pad in ((4, 0), (0, 4)):
        padded = F.pad(torch.cat((ids, ids)), pad, value=0)
        logits = model(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(logits, alone.expand(2, -1))
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="padding token"):
        model(random_ids(2, 4))


@pytest.mark.parametrize(("model_class", "labels"), [
    (LongNetForSequenceClassification, dict(labels=torch.tensor([0, 1]))),
    (LongNetForTokenClassification, dict(labels=torch.randint(2, (2, 12)))),
    (LongNetForQuestionAnswering, dict(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 5]))),
])  # fmt: skip
def test_heads_have_losses(model_class, labels):
    loss = build(model_class)(random_ids(2, 12), **labels).loss
    loss.backward()
    assert loss.isfinite()
