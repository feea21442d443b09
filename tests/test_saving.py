"""Weights are initialised, saved, loaded, tied and copied."""

import copy
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from comparisons import main_output
from models import AUTO_CLASSES, build, every_head, every_kind, random_ids, small_config

from longnet_hf import (
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    PatternDescription,
    describe,
    hub_longnet,
)


@every_head
@every_kind
def test_save_and_load(model_class, kind, tmp_path):
    model, ids = build(model_class, kind), random_ids(1, 30)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.bin"))
    auto = next(getattr(transformers, name) for name, c in AUTO_CLASSES.items() if c is model_class)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not any(info.values())
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(main_output(model(ids)), main_output(loaded(ids)))


@pytest.mark.parametrize("kind", ["paper", "hybrid", "heads"])
def test_weights_that_a_checkpoint_lacks_are_initialised(kind, tmp_path):
    build(LongNetModel, kind).save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = LongNetForTokenClassification.from_pretrained(tmp_path, num_labels=5, classifier_dropout=0.3)
    assert model.dropout.p == 0.3
    assert model.score.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert (model.score.bias == 0).all()
    empty = LongNetModel.from_pretrained(None, config=small_config(kind), state_dict={})
    fresh = LongNetModel(small_config(kind))
    for (name, ours), theirs in zip(empty.named_parameters(), fresh.parameters(), strict=True):
        assert ours.isfinite().all(), name
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.4, abs=1e-8), name


def test_magneto_initialisation_grows_with_depth():
    config = small_config(hidden_size=128, intermediate_size=256, num_hidden_layers=12)
    layer = LongNetModel(config).layers[3]
    gain = torch.tensor(24.0).log().sqrt().item()
    for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 * gain, rel=0.05)
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_embeddings_start_with_unit_variance():
    """Smaller ones drown in what the layers add, and a small model stays at the frequencies of the tokens."""
    model = LongNetModel(small_config(hidden_size=256))
    first = model(random_ids(4, 200), output_hidden_states=True).hidden_states[0]
    assert first.std().item() == pytest.approx(1.0, rel=0.05)
    llama = LongNetModel(small_config("llama", hidden_size=256))
    assert llama.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_resized_embeddings(tied, tmp_path):
    model = build(LongNetForCausalLM, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(101)
    assert model.config.vocab_size == 101 and model(random_ids(1, 5)).logits.shape[-1] == 101
    assert model(random_ids(1, 5), labels=random_ids(1, 5)).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = random_ids(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_head
def test_copies_and_pickles(model_class):
    model, ids = build(model_class), random_ids(1, 20)
    expected = main_output(model(ids))
    assert torch.equal(main_output(copy.deepcopy(model)(ids)), expected)
    assert torch.equal(main_output(pickle.loads(pickle.dumps(model))(ids)), expected)


def test_layers_can_stay_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, ids = build(LongNetForCausalLM, tie_word_embeddings=False), random_ids(1, 30)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    loaded = LongNetForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert loaded.model.layers[2].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    on_cpu = LongNetForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(on_cpu.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("options", [
    dict(tp_plan="auto"), dict(tp_size=2), dict(distributed_config={"tp_size": 2}),
    dict(distributed_config=SimpleNamespace(tp_plan="auto", tp_size=None)),
])  # fmt: skip
def test_tensor_parallelism_is_refused(options, tmp_path):
    build(LongNetForCausalLM).save_pretrained(tmp_path)
    for auto in (LongNetForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match="no plan for tensor parallelism.*`split_sequence`"):
            auto.from_pretrained(tmp_path, **options)
    assert transformers.AutoModel.from_pretrained(tmp_path, tp_size=1).config.num_hidden_layers == 3


def test_a_picture_of_the_pattern_lies_beside_the_card(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, draw = [], PatternDescription.draw
    monkeypatch.setattr(PatternDescription, "draw", lambda self: drawn.append(self) or draw(self))
    hub_longnet._drawn.cache_clear()
    model = build(LongNetForCausalLM)
    for step in (1, 2):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        assert (tmp_path / f"checkpoint-{step}" / "longnet_pattern.png").read_bytes().startswith(b"\x89PNG")
        assert "](longnet_pattern.png)" in (tmp_path / f"checkpoint-{step}" / "README.md").read_text()
    assert len(drawn) == 1  # in a process, whatever number of checkpoints it saves
    assert drawn[0].patterns == tuple(model.config.layer_patterns)
    build(LongNetModel, is_causal=False).save_pretrained(tmp_path / "other")
    assert len(drawn) == 2 and not drawn[1].is_causal
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("by hand")
    model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "longnet_pattern.png").exists()


@pytest.mark.parametrize("problem", ["no matplotlib", "broken"])
def test_a_model_is_saved_where_no_picture_can_be_drawn(problem, tmp_path, monkeypatch):
    hub_longnet._drawn.cache_clear()
    if problem == "broken":
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(PatternDescription, "_shares", lambda self: 1 / 0)
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="`draw` needs matplotlib: pip install matplotlib$"):
            describe(build(LongNetForCausalLM)).draw()
    build(LongNetForCausalLM).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert not (tmp_path / "longnet_pattern.png").exists() and "longnet_pattern.png" not in card
    assert "key/value heads, a sequence of" in card


@pytest.mark.parametrize(
    ("kind", "changes", "context", "said"),
    [
        ("heads", {}, 64, "Some layers or heads attend to everything."),
        ("hybrid", {}, 64, "Some layers or heads attend to everything."),
        ("heads", dict(full_attention_heads=None), 64, "is not seen directly, but for the first 2 tokens."),
        ("paper", {}, 64, "is not seen directly."),
        ("paper", dict(max_position_embeddings=24), 24, "is not seen directly."),
    ],
)
def test_a_card_says_how_far_its_model_sees(kind, changes, context, said):
    """Heads with full attention see everything, as layers do, and cost so much. How long its texts are meant to be is
    not how far it sees."""
    sees_all = "everything" in said
    config = small_config(kind, **changes)
    card = hub_longnet.model_card(config, "AutoModel", "tester/model")
    assert f"| context length | {context} tokens |" in card and said in card
    assert f"a sequence of {context} tokens, causal" in card
    assert ("for what attends to everything" in card) == sees_all
    full_heads = "3" if kind == "heads" and sees_all else "none"
    assert f"| key/value heads with full attention in other layers | {full_heads} |" in card
    assert f"(sink) | {2 if kind == 'heads' else 'none'} |" in card


def test_the_model_card_is_that_of_the_model(tmp_path):
    build(LongNetForSequenceClassification, is_causal=False).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "import AutoModelForSequenceClassification" in card
    assert "64 tokens" in card and "further apart than the longest segment" in card and "CausalLM" not in card
    assert "a sequence of 64 tokens, not causal" in card and "segment of 40 at dilation rate 3" in card
