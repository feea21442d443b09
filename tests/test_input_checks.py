"""What does not fit is refused by its name, whatever it is, and never mixed up or read as something else."""

import numpy as np
import pytest
import torch
from models import build, random_ids

from longnet_hf import (
    DilatedCache,
    DilatedPattern,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    dilated_attention,
    dilated_attention_reference,
    find_documents,
)


both_operators = pytest.mark.parametrize("operator", [dilated_attention, dilated_attention_reference])
PATTERN = DilatedPattern([4, 8], [1, 2])


@pytest.fixture(scope="module")
def model():
    return build(LongNetForCausalLM)


@pytest.fixture
def ids():
    return random_ids(2, 12)


def wrong_types(x):
    """What may be given in place of a tensor, or of a tensor of two dimensions."""
    return [x.tolist(), x.numpy(), {"full_attention": x}, "x", 1.5, x[None], x[0], x.flatten()]


def refused(name, values, *functions):
    for function in functions:
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`.*(, got|given together)"):
                result = function(value)
                list(result) if hasattr(result, "__next__") else None


def test_token_ids(model, ids):
    head = build(LongNetForSequenceClassification)
    read = [model, model.model, head, lambda x: model.forward_chunks(x, progress=False)]
    refused("input_ids", [*wrong_types(ids), ids.float(), ids > 5, ids + 0j, ids[:0], ids[:, :0]], *read)
    refused("input_ids", [ids.float(), ids[0], ids.numpy(), ids[:, :1]], model.prefill_split)
    refused("input_ids", [ids - 50, ids + 90], *read)  # on a GPU, which would be waited for, it says so itself
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_embeddings(model, ids):
    embeds = model.model.embed_tokens(ids).detach()
    wide = torch.cat((embeds, embeds), dim=-1)
    values = [*wrong_types(embeds), embeds.long(), wide, embeds[..., :1], embeds[:0], embeds[:, :0]]
    refused("inputs_embeds", values, lambda x: model(inputs_embeds=x))


def test_masks(model, ids):
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    added = mask.log()
    values = [added, added.clamp(min=torch.finfo(torch.float32).min), mask * torch.nan]
    values += [-mask, mask / 2, mask + 0j, *wrong_types(mask), mask[:, :5], mask[:1], mask[:, :, None]]
    qkv = torch.randn(3, 2, 2, 12, 4)
    refused(
        "attention_mask",
        values,
        lambda x: model(ids, attention_mask=x),
        lambda x: model(ids, attention_mask=x, past_key_values=DilatedCache(model.config)),
        lambda x: model.forward_chunks(ids, attention_mask=x, chunk_size=4, progress=False),
        lambda x: dilated_attention(*qkv, PATTERN, attention_mask=x),
        lambda x: dilated_attention_reference(*qkv, PATTERN, attention_mask=x),
        lambda x: find_documents(2, 12, attention_mask=x),
    )
    refused("attention_mask", [mask * 0], lambda x: model(ids, attention_mask=x))  # added, it would hide nothing
    expected = model(ids, attention_mask=mask.long()).logits
    for same in (mask, mask.bool(), mask.half(), mask.to(torch.uint8)):
        assert torch.equal(model(ids, attention_mask=same).logits, expected)
        chunks = model.forward_chunks(ids, attention_mask=same, chunk_size=3, progress=False)
        logits = model.lm_head(torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1))
        torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


@both_operators
def test_what_says_where_documents_are(operator, model, ids):
    qkv = torch.randn(3, 1, 2, 12, 4)
    positions = torch.arange(12)[None]
    values = [positions.float(), positions * torch.nan, positions > 3, *wrong_types(positions)[:5]]
    refused(
        "position_ids",
        values,
        lambda x: operator(*qkv, PATTERN, position_ids=x),
        lambda x: model(ids, position_ids=x),
        lambda x: model(ids, position_ids=x, past_key_values=DilatedCache(model.config)),
    )
    zeros = torch.zeros(1, 12)
    values = [zeros, zeros * torch.nan, zeros > 0, *wrong_types(zeros.int()), zeros[:, :5].int()]
    refused("document_ids", values, lambda x: operator(*qkv, PATTERN, document_ids=x))
    ends = torch.tensor([0, 5, 12])
    values = [ends.float(), ends > 1, *wrong_types(ends)[:5]]
    refused("cu_seq_lens", values, lambda x: operator(*qkv, PATTERN, cu_seq_lens=x))
    refused("cu_seq_lens", values, lambda x: model(ids[:1], cu_seq_lens_q=x, cu_seq_lens_k=x))
    zeros = torch.zeros(2, 12)
    values = [zeros, zeros * torch.nan, zeros > 0, *wrong_types(zeros.int()), zeros[:1].int()]
    refused("seq_idx", values, lambda x: model(ids, seq_idx=x))


@both_operators
def test_tensors_and_numbers_of_the_operator(operator):
    query, key, value = torch.randn(3, 1, 2, 12, 4)
    for index, name in enumerate(("query", "key", "value")):
        for wrong in (query.tolist(), query.numpy(), None, query.long(), query + 0j, query > 0, query.to_sparse()):
            inputs = [query, key, value]
            inputs[index] = wrong
            with pytest.raises(ValueError, match=f"`{name}` must be a tensor of numbers.*got"):
                operator(*inputs, PATTERN)
    for inputs in ([query[:, :0]] * 3, [query[..., :0]] * 3, [query, key[:, :0], value[:, :0]]):
        with pytest.raises(ValueError, match="at least one head"):
            operator(*inputs, PATTERN)
    for empty in (query[:0], query[:, :, :0]):
        assert operator(empty, empty, empty, PATTERN).shape == empty.shape
    wrong = {
        "scale": [torch.inf, torch.nan, 0, 1e-40, -1, True, "x", torch.tensor(0.5)],
        "dropout": [torch.nan, -0.1, 1, True, "x", None, torch.tensor(0.1)],
        "is_causal": [None, 0, 1, "yes", torch.tensor(True)],
    }
    for name, values in wrong.items():
        refused(name, values, lambda x, name=name: operator(query, key, value, PATTERN, **{name: x}))
    expected = operator(query, key, value, PATTERN, scale=0.5)
    assert torch.equal(operator(query, key, value, PATTERN, scale=np.float32(0.5)), expected)


def test_labels_of_tokens(model, ids):
    values = [ids[:, :-1], ids.T, ids[:, :1], ids[..., None], ids.float(), ids > 5, ids + 1000, ids * 0 - 5]
    values += wrong_types(ids)
    tokens, masked = build(LongNetForTokenClassification, num_labels=3), build(LongNetForMaskedLM, is_causal=False)
    refused(
        "labels",
        values,
        lambda x: model(ids, labels=x),
        lambda x: model.forward_chunks(ids, labels=x, progress=False),
        lambda x: tokens(ids, labels=x),
        lambda x: masked(ids, labels=x),
    )
    refused("shift_labels", values, lambda x: model(ids, shift_labels=x))
    refused("logits_to_keep", [-1, True, 1.5, "all", None, [1, 2]], lambda x: model(ids, logits_to_keep=x))
    assert torch.equal(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


def test_labels_of_rows():
    ids, classes = random_ids(3, 12), torch.tensor([0, 2, 1])
    head = build(LongNetForSequenceClassification, num_labels=3)
    values = [classes[:2], classes[:1], classes[None].expand(3, -1), classes.tolist(), classes + 5, classes - 1]
    refused("labels", values, lambda x: head(ids, labels=x))
    assert torch.equal(head(ids, labels=classes[:, None]).loss, head(ids, labels=classes).loss)
    for problem in ("regression", "multi_label_classification"):
        head = build(LongNetForSequenceClassification, num_labels=3, problem_type=problem)
        values = [classes, classes.float(), torch.ones(3, 1), torch.ones(2, 3), [[1] * 3] * 3]  # not made [3, 3]
        refused("labels", values, lambda x, head=head: head(ids, labels=x))
        assert torch.equal(head(ids, labels=torch.ones(3, 3).long()).loss, head(ids, labels=torch.ones(3, 3)).loss)
    head = build(LongNetForSequenceClassification, num_labels=1)
    refused("labels", [torch.ones(2), torch.ones(3, 3), torch.ones(1, 3)], lambda x: head(ids, labels=x))
    answers = build(LongNetForQuestionAnswering)
    values = [classes[:2], classes.float(), classes[None], classes.tolist(), classes[None].expand(3, -1)]
    refused("start_positions", values, lambda x: answers(ids, start_positions=x, end_positions=classes))
    refused("end_positions", values, lambda x: answers(ids, start_positions=classes, end_positions=x))
    refused("end_positions", [classes], lambda x: answers(ids, start_positions=x))
