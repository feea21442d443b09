"""Checkpoints of torchscale, GigaPath and LongViT compute what they did, and what cannot be honoured is named."""

import argparse
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from published import (
    HEADS,
    INNER,
    LAYERS,
    LENGTHS,
    RATES,
    SIZE,
    last_norm,
    random_gigapath,
    random_layers,
    random_longvit,
    run_gigapath,
    run_layers,
    run_longvit,
)

from longnet_hf import (
    DilatedPattern,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
    LongNetSlideModel,
)
from longnet_hf.torchscale_weights import config_fields, gigapath_segment_lengths, read_checkpoint


def options(side: str, **changes) -> dict:
    sizes = dict(embed_dim=SIZE, ffn_embed_dim=INNER, layers=LAYERS, attention_heads=HEADS)
    return {f"{side}_{name}": n for name, n in sizes.items()} | dict(
        segment_length=str(LENGTHS), dilated_ratio=RATES, **changes
    )


def random_model(rotary=False, head=None, final_norm=True) -> dict[str, torch.Tensor]:
    """A whole decoder or encoder with 19 tokens; `head`: None, "tied" or "own"."""
    weights = random_layers() | {"embed_tokens.weight": torch.randn(19, SIZE, dtype=torch.float64)}
    if rotary:
        weights |= {f"layers.{i}.self_attn.xpos.scale": torch.ones(SIZE // HEADS // 2) for i in range(LAYERS)}
    if head:
        tied = weights["embed_tokens.weight"]
        weights["output_projection.weight"] = tied.clone() if head == "tied" else torch.randn_like(tied)
    return {name: x for name, x in weights.items() if final_norm or not name.startswith("layer_norm")}


@pytest.mark.parametrize("length", [5, 32, 45])
@pytest.mark.parametrize(("rotary", "scaled", "final_norm", "activation"), [
    (False, False, True, "gelu"), (True, True, False, "swish"), (True, False, True, "relu"),
])  # fmt: skip
def test_encoders(length, rotary, scaled, final_norm, activation):
    weights, ids = random_model(rotary, final_norm=final_norm), torch.randint(19, (2, length))
    changes = dict(no_scale_embedding=not scaled, normalize_output=final_norm, activation_fn=activation)
    model = LongNetModel.from_torchscale(weights, options("encoder", **changes)).eval()
    function = {"gelu": F.gelu, "swish": F.silu, "relu": F.relu}[activation]
    outputs = model(ids, output_hidden_states=True)
    for row in range(2):
        embeddings = weights["embed_tokens.weight"][ids[row]] * (SIZE**0.5 if scaled else 1)
        states = run_layers(weights, embeddings, rotary=rotary, activation=function)
        for ours, theirs in zip(outputs.hidden_states[:-1], states[:-1], strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-9)
        expected = last_norm(weights, states[-1]) if final_norm else states[-1]
        torch.testing.assert_close(outputs.last_hidden_state[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("head", ["tied", "own"])
def test_decoders(rotary, head, tmp_path):
    weights, ids = random_model(rotary, head), torch.randint(19, (1, 45))
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "decoder.pt")
    model = LongNetForCausalLM.from_torchscale(tmp_path / "decoder.pt", options("decoder")).eval()
    assert model.config.tie_word_embeddings is (head == "tied") and model.config.segment_padding == "none"
    states = run_layers(weights, weights["embed_tokens.weight"][ids[0]], causal=True, rotary=rotary)
    expected = F.linear(last_norm(weights, states[-1]), weights["output_projection.weight"])
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path / "folder")
    again = LongNetForCausalLM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again(ids).logits[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["tied", "own"])
def test_encoders_with_a_projection_predict_masked_tokens(head):
    weights, ids = random_model(head=head), torch.randint(19, (1, 45))
    model = LongNetForMaskedLM.from_torchscale(weights, options("encoder")).eval()
    states = run_layers(weights, weights["embed_tokens.weight"][ids[0]])
    expected = F.linear(last_norm(weights, states[-1]), weights["output_projection.weight"])
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=0, atol=1e-9)
    for model_class, side in ((LongNetForMaskedLM, "decoder"), (LongNetForCausalLM, "encoder")):
        with pytest.raises(ValueError, match="is_causal="):
            model_class.from_torchscale(weights, options(side))


def test_the_callers_weights_stay_the_callers():
    weights = random_model()
    before = {name: x.clone() for name, x in weights.items()}
    model = LongNetModel.from_torchscale(weights, options("encoder"), dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(torch.equal(x, before[name]) for name, x in weights.items())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("length", [1, 31, 32, 45])
def test_gigapath(pooling, length):
    weights = random_gigapath()
    features, coords = torch.randn(1, length, 12, dtype=torch.float64), torch.randint(256_000, (1, length, 2))
    chosen = dict(segment_lengths=LENGTHS, dilation_rates=RATES, num_attention_heads=HEADS)
    model = LongNetSlideModel.from_gigapath(weights, pooling=pooling, **chosen).eval()
    outputs = model(features, coords, output_hidden_states=True)
    pattern = DilatedPattern(LENGTHS, RATES, head_offset="grouped")
    states, slide = run_gigapath(weights, features[0], coords[0], pooling, pattern)
    assert len(outputs.pooled_states) == LAYERS + 1
    for ours, theirs in zip(outputs.pooled_states, states, strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(outputs.pooler_output[0], slide, rtol=0, atol=1e-9)


def test_gigapath_takes_segments_from_the_size_of_slides(tmp_path):
    assert gigapath_segment_lengths(262144, 256) == [1024, 5792, 32768, 185363, 1048576]
    assert gigapath_segment_lengths(250000, 256) == [1024, 4870, 23170, 110217, 524288]
    torch.save({"model": random_gigapath() | {"decoder_embed.weight": torch.ones(1)}}, tmp_path / "slide_encoder.pth")
    with pytest.warns() as said:
        model = LongNetSlideModel.from_gigapath(
            tmp_path / "slide_encoder.pth",
            pooling="cls",
            max_wsi_size=250000,
            num_attention_heads=16,
            hidden_dropout=0.1,
        )
    assert model.config.segment_lengths == [1024, 4870, 23170, 110217, 524288]
    assert (model.config.hidden_dropout, model.config.feature_size, model.config.num_hidden_layers) == (
        0.1,
        12,
        LAYERS,
    )
    texts = "\n".join(str(warning.message) for warning in said)
    for text in (
        "decoder_embed.weight",
        "rate 4 does not divide the segment length 23170",
        "8 does not divide .*110217",
    ):
        assert re.search(text, texts)
    assert "4870" not in texts
    with pytest.raises(ValueError, match="`max_wsi_size` must be at least 8192 .*got 8000"):
        gigapath_segment_lengths(8000, 256)


@pytest.mark.parametrize("shape", [(32, 32), (24, 48), (40, 40)])
def test_longvit(shape, tmp_path):
    weights, images = random_longvit(), torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.save({"teacher": weights}, tmp_path / "longvit.pth")
    chosen = dict(segment_lengths=LENGTHS, dilation_rates=RATES, num_attention_heads=HEADS)
    model = LongNetSlideModel.from_longvit(tmp_path / "longvit.pth", **chosen).eval()
    outputs = model(pixel_values=images)
    for row in range(2):
        expected = run_longvit(weights, images[row], DilatedPattern(LENGTHS, RATES, head_offset="grouped"))
        torch.testing.assert_close(outputs.last_hidden_state[row], expected[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(outputs.pooler_output[row], expected[1], rtol=0, atol=1e-9)


def test_longvit_takes_segments_from_the_size_of_images():
    weights = random_longvit(side=32, patch=32)
    assert LongNetSlideModel.from_longvit(weights).config.segment_lengths == [64, 128, 256, 512, 1024]
    model = LongNetSlideModel.from_longvit(weights, image_size=8192)
    assert model.config.segment_lengths == [1024, 4096, 8192, 16384, 65536] and model.config.image_size == 1024
    with pytest.raises(ValueError, match="`image_size` must be one of .*got 2048; .*`segment_lengths`"):
        LongNetSlideModel.from_longvit(weights, image_size=2048)


@pytest.mark.parametrize(("option", "value"), [
    ("activation_dropout", 0.1), ("encoder_normalize_before", False), ("layernorm_embedding", True), ("moe_freq", 2),
    ("rel_pos_buckets", 32), ("max_rel_pos", 128), ("deepnorm", True), ("multiway", True), ("use_xmoe", True),
    ("activation_fn", "tanh"), ("learned_gates", True), ("segment_length", "[8, 16"), ("dilated_ratio", None),
])  # fmt: skip
def test_options_that_cannot_be_honoured_are_named(option, value):
    name = option.removeprefix("encoder_")
    with pytest.raises(ValueError, match=f"{name}.*"):
        LongNetModel.from_torchscale(random_model(), options("encoder") | {option: value})
    with pytest.raises(ValueError, match="of an encoder or of a decoder"):
        LongNetModel.from_torchscale(random_model(), {"segment_length": [8]})


def test_options_as_torchscale_keeps_them():
    given = options("decoder", dropout=0.2, drop_path_rate=0.3, attention_dropout=0.1, vocab_size=19, fsdp=False)
    fields = config_fields(argparse.Namespace(**given), random_model(head="own"))
    assert [fields[f"{name}_dropout"] for name in ("embedding", "hidden", "attention")] == [0.2, 0.2, 0.1]
    assert (fields["drop_path_rate"], fields["vocab_size"], fields["is_causal"]) == (0.3, 19, True)


@pytest.mark.parametrize(("extra", "named"), [
    ("layers.0.encoder_attn.q_proj.weight", "cross-attention"), ("layers.1.moe_layer.gate.wg.weight", "mixture"),
    ("layers.0.ffn.A.fc1.weight", "multiway"), ("embed_positions.weight", "learned positions"),
    ("relative_position.relative_attention_bias.weight", "relative positions"), ("some.thing", "some.thing"),
])  # fmt: skip
def test_weights_that_longnet_does_not_compute_are_named(extra, named):
    with pytest.raises(ValueError, match=f"does not compute.*{named}"):
        LongNetModel.from_torchscale(random_model() | {extra: torch.ones(2)}, options("encoder"))
    with pytest.raises(ValueError, match=f"does not compute.*{named}"):
        LongNetSlideModel.from_gigapath(random_gigapath() | {f"encoder.{extra}": torch.ones(2)}, pooling="cls")


@pytest.mark.parametrize("rotary", [True, False])
def test_positions_that_options_and_weights_disagree_on_are_refused(rotary):
    with pytest.raises(ValueError, match=f"`xpos_rel_pos={not rotary}` does not fit the weights"):
        LongNetModel.from_torchscale(random_model(rotary), options("encoder", xpos_rel_pos=not rotary))
    model = LongNetModel.from_torchscale(random_model(rotary), options("encoder", xpos_rel_pos=rotary))
    assert model.config.use_rope is rotary


def test_positions_with_a_scale_are_refused_with_the_reason():
    weights = random_model(rotary=True)
    weights["layers.2.self_attn.xpos.scale"] = torch.linspace(0.3, 1, 4)
    with pytest.raises(
        ValueError, match=r"`xpos_rel_pos`.*layers.2.self_attn.xpos.scale goes from 0.3 to 1.*not finite"
    ):
        LongNetModel.from_torchscale(weights, options("encoder"))


def test_checkpoints_that_lack_or_misshape_weights_are_refused():
    whole, chosen = random_gigapath(), dict(pooling="cls", segment_lengths=LENGTHS, dilation_rates=RATES)
    chosen["num_attention_heads"] = HEADS
    for name, ours in (
        ("encoder.layers.1.ffn.fc2.bias", "layers.1.mlp.down_proj.bias"),
        ("cls_token", "embeddings.cls_token"),
        ("norm.weight", "output_norm.weight"),
        ("patch_embed.proj.weight", "patch_embed.proj.weight"),
        ("encoder.layers.0.ffn.fc1.weight", "layers.0.mlp.up_proj.weight"),
    ):
        with pytest.raises(ValueError, match=ours):
            LongNetSlideModel.from_gigapath({n: x for n, x in whole.items() if n != name}, **chosen)
    whole["encoder.layers.2.ffn.fc1.bias"] = torch.ones(7)
    with pytest.raises(ValueError, match="layers.2.mlp.up_proj.bias"):
        LongNetSlideModel.from_gigapath(whole, **chosen)
    with pytest.raises(ValueError, match="lm_head.weight"):
        LongNetModel.from_torchscale(random_model(head="own"), options("encoder"))
    with pytest.raises(ValueError, match="score.weight"):
        LongNetForSequenceClassification.from_torchscale(random_model(), options("encoder"), pad_token_id=0)


def test_nothing_but_weights_is_read_from_a_file(tmp_path):
    torch.save({"model": random_gigapath(), "other": pytest.approx(1)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth is no checkpoint of weights alone"):
        read_checkpoint(tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="No weights by name were found in .*empty.pth"):
        read_checkpoint(tmp_path / "empty.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_warning_where_torchscale_itself_is_wrong():
    given = options("encoder") | {"segment_length": [8, 18, 33]}
    with pytest.warns(UserWarning, match="4 does not divide the segment length 33.*rows that were meant"):
        LongNetModel.from_torchscale(random_model(), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_fields(options("encoder"), random_model())
    with pytest.raises(ValueError, match="`args` must be torchscale's options"):
        config_fields(None, random_model())
