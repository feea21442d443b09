"""What several tests compare: outputs, gradients and losses of two models."""

import copy

import torch
import torch.nn.functional as F


def main_output(outputs):
    return outputs.to_tuple()[0]


def with_eager(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager


def all_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: name + text
        )


def plain_loss(model, ids, labels):
    logits = model(ids).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
