"""The ranking of heads: a head that copies is found, whatever the model, and nothing of the model is changed."""

import json

import pytest
import torch
import transformers
from models import build, random_ids
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GemmaConfig, LlamaConfig, Qwen3Config

from longnet_hf import HeadRanking, LongNetForCausalLM, LongNetModel, rank_heads


SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tiny(config_class, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**(SHAPE | changes))).double().eval()


@torch.no_grad()
def mass_by_hand(model, ids, span_length, num_spans, seed):
    """From the weights of eager attention, token by token: mean over the tokens, best query head of the group."""
    length, generator = ids.shape[1], torch.Generator().manual_seed(seed)
    text = length - num_spans * span_length
    starts = torch.randint(text - span_length, (num_spans,), generator=generator).tolist()
    spans = [ids[0, start : start + span_length] for start in starts]
    repeated = torch.cat((ids[0, :text], *spans))[None]
    model.set_attn_implementation("eager")
    layers = model(repeated, output_attentions=True).attentions
    scores = {}
    for layer, weights in enumerate(layers):
        masses = []
        for head in range(4):
            total, count = 0.0, 0
            for number, start in enumerate(starts):
                for j in range(8, span_length):
                    row = weights[0, head, text + number * span_length + j]
                    total += float(row[start + j] + row[start + j + 1])
                    count += 1
            masses.append(total / count)
        scores[layer] = [max(masses[:2]), max(masses[2:])]
    return scores


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_scores_are_the_weights_of_full_attention(config_class):
    model, ids = tiny(config_class), random_ids(1, 90)
    before = model(ids).logits
    ranking = rank_heads(model, ids, span_length=12, num_spans=3, seed=7, progress=False)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    expected = mass_by_hand(model, ids, 12, 3, 7)
    assert ranking.scores.keys() == expected.keys()
    for layer, of_layer in expected.items():
        assert ranking.scores[layer] == pytest.approx(of_layer, abs=1e-7)


def test_a_longnet_is_ranked_by_its_full_attention():
    """Its own pattern does not matter: that of a converted model has the scores of the source."""
    source, ids = tiny(LlamaConfig), random_ids(2, 90)
    pattern = dict(segment_lengths=[8], dilation_rates=[1], branch_types=["window"])
    expected = rank_heads(source, ids, span_length=12, progress=False)
    longnet = LongNetForCausalLM.from_llama(source, **pattern)
    before = longnet(ids).logits
    ranking = rank_heads(longnet, ids, span_length=12, progress=False)
    assert torch.equal(longnet(ids).logits, before)
    for layer, of_layer in expected.scores.items():
        assert ranking.scores[layer] == pytest.approx(of_layer, abs=1e-9)
    assert expected == rank_heads(source, ids, span_length=12, progress=False)  # the same spans
    assert expected != rank_heads(source, ids, span_length=12, seed=1, progress=False)


def test_the_best_heads_are_named_for_a_configuration():
    ranking = HeadRanking({0: [0.1, 0.4], 1: [0.0, 0.2], 3: [0.3, 0.0]})
    assert ranking.ranked[:3] == [(0, 1), (3, 0), (1, 1)]
    assert ranking.best(0.5) == {0: [1], 1: [1], 3: [0]}
    assert ranking.best(0.01) == {0: [1]}
    assert ranking.best(1) == {0: [0, 1], 1: [0, 1], 3: [0, 1]}
    assert ranking.mass(0.5) == pytest.approx(0.9)
    assert "6 key/value heads" in str(ranking) and "33%: 70%" in str(ranking)
    for share in (0, -0.2, 1.5):
        with pytest.raises(ValueError, match="`share`"):
            ranking.best(share)
    axes = ranking.draw().axes[0]
    assert axes.images[0].get_array().shape == (3, 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "3"]


def test_a_ranking_is_saved_as_json(tmp_path):
    ranking = HeadRanking({0: [0.1, 0.4], 1: [0.0, 0.2]})
    ranking.save(tmp_path / "ranking.json")
    assert json.loads((tmp_path / "ranking.json").read_text()) == {"scores": {"0": [0.1, 0.4], "1": [0.0, 0.2]}}
    assert HeadRanking.load(tmp_path / "ranking.json") == ranking
    wrong = ['{"a": [1]}', '{"0": 1}', '{"0": "12"}', '{"0": [NaN]}']
    for text in ("[]", "{", *(f'{{"scores": {scores}}}' for scores in wrong)):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="`file` holds no ranking.*other.json"):
            HeadRanking.load(tmp_path / "other.json")


def test_heads_of_a_model_that_computes_nan_are_not_ranked():
    model = build(LongNetForCausalLM)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: the heads of layers \[1, 2\]"):
        rank_heads(model, random_ids(1, 400), progress=False)


def test_what_cannot_be_ranked_is_refused():
    ids = random_ids(1, 90)
    model = tiny(LlamaConfig)
    for spans, least in (dict(span_length=64), 256), (dict(span_length=12, num_spans=20), 264):
        with pytest.raises(ValueError, match=f"`input_ids` must have at least {least} tokens per row.* got 90"):
            rank_heads(model, ids, **spans)
        with pytest.raises(ValueError, match=f"got {least - 1}"):
            rank_heads(model, random_ids(1, least - 1), **spans)
        rank_heads(model, random_ids(1, least), **spans)  # it is enough
    for wrong in (0, -0.5, 2, "0.2", None, True):
        with pytest.raises(ValueError, match=rf"`share` must lie in \(0, 1\], got {wrong!r}"):
            HeadRanking({0: [0.5]}).best(wrong)
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        rank_heads(model, ids, span_length=12, seed=1.5)
    for wrong in (ids[0], ids.tolist(), ids.float()):
        with pytest.raises(ValueError, match=r"`input_ids` must be of shape \[B, N\], a tensor of token ids"):
            rank_heads(tiny(LlamaConfig), wrong)
    for wrong in (ids + 97, -ids - 1):
        with pytest.raises(ValueError, match="`input_ids` must lie from 0 to below `vocab_size` .97."):
            rank_heads(tiny(LlamaConfig), wrong, span_length=12)
    gpt2 = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="than GPT2LMHeadModel has learned positions, got 90"):
        rank_heads(transformers.GPT2LMHeadModel(gpt2), ids, span_length=12)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    doge = transformers.DogeConfig(vocab_size=97, **sizes)
    with pytest.raises(ValueError, match="`attention_mask` has shape"):
        rank_heads(transformers.DogeForCausalLM(doge), ids, span_length=12)
    with pytest.raises(ValueError, match="`input_ids` must hold at least one row"):
        rank_heads(tiny(LlamaConfig), ids[:0], span_length=12)
    for wrong in (9, 12.0, "12"):
        with pytest.raises(ValueError, match="`span_length` must be an integer of at least 10"):
            rank_heads(tiny(LlamaConfig), ids, span_length=wrong)
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match="`num_spans` must be an integer of at least 1"):
            rank_heads(tiny(LlamaConfig), ids, span_length=12, num_spans=wrong)
    with pytest.raises(ValueError, match="must be causal"):
        rank_heads(build(LongNetModel, is_causal=False), ids, span_length=12)
    with pytest.raises(ValueError, match="causal"):
        rank_heads(BertModel(BertConfig(vocab_size=97, hidden_size=8, num_attention_heads=2)), ids, span_length=12)
    with pytest.raises(ValueError, match="`model` must be a model of Transformers"):
        rank_heads(torch.nn.Linear(2, 2), ids)
