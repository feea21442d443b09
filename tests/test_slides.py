"""Slides of tiles: positions, pooling, batches, attention maps, classification, errors that name tiles."""

import math
import re
from pathlib import Path

import pytest
import torch
from comparisons import all_gradients, assert_same_gradients, with_eager
from published import random_gigapath, random_longvit
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from longnet_hf import (
    LongNetForSlideClassification,
    LongNetSlideConfig,
    LongNetSlideModel,
    collate_slides,
    modeling_longnet,
)
from longnet_hf.modeling_longnet_slide import sincos_positions


ROOT = Path(__file__).parent.parent
SMALL = dict(
    feature_size=12,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    segment_lengths=[8, 16, 40],
    dilation_rates=[1, 2, 3],
    initializer_range=0.2,
)
every_pooling = pytest.mark.parametrize("pooling", ["mean", "cls"])
every_padding = pytest.mark.parametrize("segment_padding", ["none", "zeros"])


def build_slide(model_class=LongNetSlideModel, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return model_class(LongNetSlideConfig(**(SMALL | changes))).to(dtype).eval()


def random_slides(*lengths, dtype=torch.float64, **others):
    """Slides of so many tiles each, alone as batches of one."""
    return [
        {"inputs_embeds": torch.randn(1, n, 12, dtype=dtype), "coords": torch.randint(256_000, (1, n, 2))} | others
        for n in lengths
    ]


def batch_of(slides):
    return collate_slides([{name: x[0] for name, x in slide.items()} for slide in slides])


def test_default_is_the_size_of_gigapaths_encoder():
    with torch.device("meta"):
        model = LongNetSlideModel(LongNetSlideConfig())
    assert (
        sum(weight.numel() for weight in (*model.layers.parameters(), *model.encoder_norm.parameters())) == 85_148_160
    )
    assert model.get_input_embeddings().weight.shape == (768, 1536)


def test_positions_are_sines_and_cosines_of_y_then_x():
    cells = torch.tensor([[0, 0], [3, 7], [999, 998]])
    positions = sincos_positions(cells, 16)
    for (x, y), row in zip(cells.tolist(), positions, strict=True):
        expected = [f(cell / 10000 ** (i / 4)) for cell in (y, x) for f in (math.sin, math.cos) for i in range(4)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_tiles_of_one_cell_have_one_position(dtype):
    model, (slide,) = build_slide(tile_size=224), random_slides(2)
    slide["inputs_embeds"][:, 1] = slide["inputs_embeds"][:, 0]
    for second, same in (((447, 671), True), ((448, 671), False), ((447, 672), False)):
        slide["coords"] = torch.tensor([[(224, 448), second]]).to(dtype)
        _, first, other = model.embeddings(**slide, attention_mask=None, pixel_values=None)[0][0]
        assert torch.equal(first, other) == same


@every_pooling
@every_padding
def test_a_batch_of_unequal_slides_equals_each_alone(pooling, segment_padding):
    model, slides = build_slide(pooling=pooling, segment_padding=segment_padding), random_slides(45, 1, 17)
    batch = batch_of(slides)
    padding = batch["attention_mask"] == 0
    batch["inputs_embeds"][padding], batch["coords"][padding] = torch.nan, -1  # whatever stands there
    outputs = model(**batch, output_hidden_states=True)
    assert outputs.pooler_output.isfinite().all()
    for row, slide in enumerate(slides):
        alone, tiles = model(**slide, output_hidden_states=True), slide["coords"].shape[1]
        assert alone.last_hidden_state.shape == (1, tiles, 32) and alone.hidden_states[0].shape == (1, 1 + tiles, 32)
        torch.testing.assert_close(
            outputs.last_hidden_state[row, :tiles], alone.last_hidden_state[0], rtol=0, atol=1e-10
        )
        pooled = zip(
            (*outputs.pooled_states, outputs.pooler_output), (*alone.pooled_states, alone.pooler_output), strict=True
        )
        for ours, theirs in pooled:
            torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-10)
    gradients = all_gradients(model, outputs.pooler_output.square().sum())
    expected = all_gradients(model, sum(model(**slide).pooler_output.square().sum() for slide in slides))
    assert_same_gradients(gradients, expected, 1e-9)


@pytest.mark.parametrize("side", ["left", "inside"])
def test_padding_may_stand_anywhere(side):
    model, (slide,) = build_slide(segment_padding="zeros"), random_slides(20)
    mask = torch.ones(1, 29, dtype=torch.long)
    mask[:, :9] = 0
    mask = mask if side == "left" else mask[:, torch.randperm(29)]
    padded = {"inputs_embeds": torch.randn(1, 29, 12).double(), "coords": torch.zeros(1, 29, 2)}
    for name in padded:
        padded[name][mask == 1] = slide[name][0].to(padded[name].dtype)
    alone = model(**slide)
    outputs = model(**padded, attention_mask=mask)
    torch.testing.assert_close(outputs.pooler_output, alone.pooler_output, rtol=0, atol=1e-10)
    torch.testing.assert_close(outputs.last_hidden_state[mask == 1], alone.last_hidden_state[0], rtol=0, atol=1e-10)


@every_pooling
def test_pooling(pooling):
    model, (slide,) = build_slide(pooling=pooling), random_slides(21)
    outputs = model(**slide, output_hidden_states=True)
    for state, pooled in zip(outputs.hidden_states, outputs.pooled_states, strict=True):
        expected = state[:, 0] if pooling == "cls" else state[:, 1:].mean(1)
        torch.testing.assert_close(pooled, model.output_norm(expected), rtol=0, atol=1e-12)
    last = model.encoder_norm(outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.last_hidden_state, model.output_norm(last[:, 1:]), rtol=0, atol=1e-12)
    expected = model.output_norm(last[:, 0] if pooling == "cls" else last[:, 1:].mean(1))
    torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_many_tiles_does_not_overflow(dtype):
    model = build_slide(dtype=dtype)
    states, mask = torch.full((1, 5001, 32), 100, dtype=dtype), torch.ones(1, 5000, dtype=torch.bool)
    for given in (None, mask):
        model.output_norm = torch.nn.Identity()
        assert (model.pool(states, given) == 100).all()


@every_pooling
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(pooling, dtype):
    model, (slide,) = build_slide(pooling=pooling), random_slides(45)
    expected = model(**slide).pooler_output
    low = build_slide(pooling=pooling, dtype=dtype)
    output = low(slide["inputs_embeds"].to(dtype), slide["coords"]).pooler_output
    assert output.dtype == dtype and (output.double() - expected).abs().max() < 0.1
    single = build_slide(pooling=pooling, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = single(slide["inputs_embeds"].float(), slide["coords"], output_hidden_states=True)
    assert {state.dtype for state in outputs.hidden_states} == {torch.float32}  # the residual stream
    assert (outputs.pooler_output - expected).abs().max() < 0.1


@pytest.mark.gpu
@every_pooling
@pytest.mark.parametrize("triton", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_on_a_gpu(dtype, triton, pooling, monkeypatch):
    monkeypatch.setenv("LONGNET_TRITON", triton)
    changes = dict(pooling=pooling, segment_padding="zeros", segment_lengths=[128, 360], dilation_rates=[1, 3])
    exact, slides = build_slide(**changes), random_slides(900, 417)
    batch = batch_of(slides)
    expected = exact(**batch).pooler_output
    low, low_batch = build_slide(dtype=dtype, **changes).cuda(), {name: x.cuda() for name, x in batch.items()}
    low_batch["inputs_embeds"] = low_batch["inputs_embeds"].to(dtype)
    output, plain = low(**low_batch).pooler_output, with_eager(low)(**low_batch).pooler_output
    error, bound = ((x.double().cpu() - expected).abs().max() for x in (output, plain))
    assert error < 2 * bound + 1e-5
    output.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in low.parameters())
    maps = zip(low.attention_maps(**low_batch), exact.attention_maps(**batch), strict=True)
    for ours, theirs in maps:
        assert (ours.double().cpu() - theirs).abs().max() < 0.05 * theirs.max()


@every_padding
def test_attention_maps_are_rows_of_the_dense_attention(segment_padding):
    model = build_slide(segment_padding=segment_padding)
    batch = batch_of(random_slides(37, 20))
    dense = with_eager(model)(**batch, output_attentions=True).attentions
    of_cls, of_tiles = model.attention_maps(**batch), model.attention_maps(**batch, tiles=[0, 5, -1])
    assert [tuple(x.shape) for x in of_cls] == [(2, 4, 37)] * 3
    for ours, rows, theirs in zip(of_cls, of_tiles, dense, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 0, 1:], rtol=0, atol=1e-10)
        torch.testing.assert_close(rows, theirs[:, :, [1, 6, -1], 1:], rtol=0, atol=1e-10)
        assert (ours[1, :, 20:] == 0).all() and (rows[1, :, 2] == 0).all()  # padding
    for wrong in (37, -38):  # of 38 tokens, the first is no tile
        with pytest.raises(ValueError, match=rf"`tiles` must lie from -37 to 36, got \[{wrong}\]"):
            model.attention_maps(**batch, tiles=[wrong])
    with pytest.raises(ValueError, match=r"`tiles` must be integers of shape \[R\], got torch.float32 \(1,\)"):
        model.attention_maps(**batch, tiles=[1.0])


def test_attention_maps_take_memory_linear_in_the_tiles(monkeypatch):
    model, (slide,) = build_slide(dtype=torch.float32), random_slides(20_000, dtype=torch.float32)
    with torch.no_grad():
        maps = model.attention_maps(**slide)
    assert maps[0].shape == (1, 4, 20_000)  # dense, the maps of 20 001 rows would take 6 GiB a layer
    model = build_slide(patch_size=8, image_size=32, use_cls_token=False)
    with pytest.raises(ValueError, match="no cls token: say which `tiles`"):
        model.attention_maps(pixel_values=torch.randn(1, 3, 32, 32).double())


@pytest.mark.parametrize(("coords", "given"), [
    ((256_000, 0), "256000, 0"), ((0, 256_000), "0, 256000"), ((-1, 0), "-1, 0"), ((0, -300), "0, -300"),
    ((float("nan"), 0.0), "nan, 0.0"), ((float("inf"), 0.0), "inf, 0.0"),
])  # fmt: skip
def test_coordinates_off_the_grid_name_the_tile(coords, given):
    model, batch = build_slide(), batch_of(random_slides(9, 7))
    if isinstance(coords[0], float):
        batch["coords"] = batch["coords"].float()
    batch["coords"][1, 4] = torch.tensor(coords)
    with pytest.raises(ValueError, match=rf"`coords` of tile 4 of slide 1 are \[{given}\].*\[0, 256000\) pixels"):
        model(**batch)
    batch["attention_mask"][1, 4] = 0
    model(**batch)


def test_what_is_no_slide_is_refused(monkeypatch):
    model, (slide,) = build_slide(), random_slides(9)
    features, coords = slide["inputs_embeds"], slide["coords"]
    for changes, text in (
        (dict(inputs_embeds=features[..., :7]), r"`inputs_embeds` .*\[B, N, 12\], got \(1, 9, 7\)"),
        (dict(inputs_embeds=features[0]), r"`inputs_embeds` .*got \(9, 12\)"),
        (dict(inputs_embeds=None), "give `inputs_embeds` and `coords`"),
        (dict(pixel_values=torch.ones(1, 3, 8, 8)), "give `inputs_embeds` and `coords`"),
        (dict(coords=None), r"`coords` .*\(1, 9, 2\), got None"),
        (dict(coords=coords[:, :8]), r"`coords` .*\(1, 9, 2\), got \(1, 8, 2\)"),
        (dict(coords=coords.bfloat16()), "`coords` must be integers, float32 or float64, got torch.bfloat16"),
        (dict(attention_mask=torch.ones(1, 10)), r"`attention_mask` must be .*shape \(1, 9\).*got \(1, 10\)"),
        (dict(attention_mask=torch.tensor([[0.0] * 8 + [-1e9]])), "`attention_mask` must be 1 at real tokens"),
        (dict(is_causal=True), "does not take `is_causal`"),
        (dict(position_ids=torch.arange(9)[None] % 3), "does not take `position_ids`"),
        (dict(seq_idx=torch.zeros(1, 9)), "does not take `seq_idx`"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4, 9])), "does not take `cu_seq_lens_q`"),
        (dict(cu_seq_lens_k=torch.tensor([0, 4, 9])), "does not take `cu_seq_lens_k`"),
        (dict(attention_mask=torch.zeros(1, 9)), r"Slides \[0\] of the batch have no tiles"),
        (dict(inputs_embeds=features[:, :0], coords=coords[:, :0]), "Slides without tiles"),
    ):
        with pytest.raises(ValueError, match=text):
            model(**slide | changes)
    monkeypatch.setattr(modeling_longnet, "active_split", object)
    with pytest.raises(ValueError, match="LongNetSlideModel cannot take a sequence that is split"):
        model(**slide)


@pytest.mark.parametrize(("change", "named"), [
    (dict(is_causal=True), "`is_causal`"), (dict(vocab_size=9), "`vocab_size` must be 0, got 9"),
    (dict(pooling="max"), "`pooling` must be one of .*'max'"), (dict(hidden_size=36, num_attention_heads=2), None),
    (dict(hidden_size=30, num_attention_heads=2), "`hidden_size` must be a multiple of 4.*got 30"),
    (dict(pooling="cls", use_cls_token=False), '`pooling="cls"` needs `use_cls_token=True`'),
    (dict(feature_layers=[]), "`feature_layers` must be numbers from -4 to 3"), (dict(feature_layers=[3, -4]), None),
    (dict(feature_layers=[4]), r"`feature_layers` must be numbers from -4 to 3, got \[4\]"),
    (dict(tile_size=0), "`tile_size` must be at least 1, got 0"), (dict(grid_size=0), "`grid_size`.*got 0"),
    (dict(patch_size=0), "`patch_size`.*got 0"), (dict(patch_size=24), "`image_size` .1024. .*`patch_size` .24."),
])  # fmt: skip
def test_wrong_configurations_are_named(change, named):
    if named is None:
        LongNetSlideConfig(**(SMALL | change))
        return
    with pytest.raises(Exception, match=named):
        LongNetSlideConfig(**(SMALL | change))


def test_pixels():
    model = build_slide(patch_size=8, image_size=32, use_cls_token=False, norm_before_pooling=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = model(pixel_values=images)
    assert outputs.last_hidden_state.shape == (2, 16, 32)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1), rtol=0, atol=1e-12)
    for shape, text in (
        ((2, 1, 32, 32), "B, 3, height"),
        ((2, 3, 32, 36), r"multiples .*\(8\), got \(32, 36\): crop"),
    ):
        with pytest.raises(ValueError, match=text):
            model(pixel_values=torch.randn(shape).double())
    with pytest.raises(ValueError, match="give `pixel_values` alone"):
        model(pixel_values=images, coords=torch.zeros(2, 16, 2))


@pytest.mark.parametrize(("labels", "changes"), [
    ([2, 0], dict(num_labels=3)), ([0.5, -1.0], dict(num_labels=1)), ([[1.0, 0, 1], [0, 1.0, 0]], dict(num_labels=3)),
])  # fmt: skip
@pytest.mark.parametrize("layers", [None, [1, -1], [0]])
def test_classification(labels, changes, layers):
    model = build_slide(LongNetForSlideClassification, feature_layers=layers, **changes)
    batch, labels = batch_of(random_slides(9, 7)), torch.tensor(labels)
    labels = labels.double() if labels.is_floating_point() else labels
    outputs = model(**batch, labels=labels)
    slides = model.model(**batch, output_hidden_states=True)
    pooled = slides.pooler_output if layers is None else torch.cat([slides.pooled_states[i] for i in layers], dim=-1)
    expected = pooled @ model.score.weight.T + model.score.bias
    torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=1e-12)
    if not labels.is_floating_point():
        loss = torch.nn.functional.cross_entropy(expected, labels)
    elif labels.dim() == 1:
        loss = (expected[:, 0] - labels).square().mean()
    else:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(expected, labels)
    torch.testing.assert_close(outputs.loss, loss, rtol=0, atol=1e-12)
    accumulated = model(**batch, labels=labels, num_items_in_batch=5 * labels.numel()).loss
    torch.testing.assert_close(accumulated, loss / 5, rtol=0, atol=1e-12)
    assert outputs.hidden_states is None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 4
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    model, batch = build_slide(segment_padding="zeros", pooling="cls"), batch_of(random_slides(9, 7))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LongNetSlideConfig
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LongNetSlideModel and not any(info.values())
    assert torch.equal(loaded(**batch).pooler_output, model(**batch).pooler_output)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, feature_layers=[1, 3])
    assert type(classifier) is LongNetForSlideClassification and classifier.score.weight.shape == (5, 64)
    assert torch.equal(classifier.model(**batch).pooler_output, model(**batch).pooler_output)
    empty = LongNetSlideModel.from_pretrained(None, config=model.config, state_dict={})
    for (name, ours), theirs in zip(empty.named_parameters(), model.named_parameters(), strict=True):
        assert ours.std().item() == pytest.approx(theirs[1].std().item(), rel=0.6, abs=1e-8), name


@pytest.mark.parametrize("change", [{}, {"patch_size": 8, "image_size": 32, "use_cls_token": False}])
def test_fresh_weights_are_drawn(change):
    config = LongNetSlideConfig(**SMALL | change)
    loaded = LongNetSlideModel.from_pretrained(None, config=config, state_dict={})
    for model in (loaded, LongNetSlideModel(config)):
        drawn = model.embeddings.tiles.position_embeddings if change else model.embeddings.cls_token
        assert drawn.std().item() == pytest.approx(0.2, rel=0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_on_unequal_slides(checkpointing, tmp_path):
    changes = dict(hidden_dropout=0.1, embedding_dropout=0.1, drop_path_rate=0.1, segment_padding="zeros")
    model = build_slide(LongNetForSlideClassification, torch.float32, **changes)
    slides = [{name: x[0] for name, x in slide.items()} for slide in random_slides(20, 30, 9, 40, dtype=torch.float32)]
    slides = [slide | {"labels": n % 2} for n, slide in enumerate(slides)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True,
        gradient_checkpointing=checkpointing, learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=slides, eval_dataset=slides, data_collator=collate_slides)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(slides).predictions.shape == (4, 2)


def test_gradient_checkpointing_changes_nothing():
    model, (slide,) = build_slide(drop_path_rate=0.3, hidden_dropout=0.1).train(), random_slides(30)
    torch.manual_seed(3)
    expected = all_gradients(model, model(**slide).pooler_output.square().sum())
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert_same_gradients(all_gradients(model, model(**slide).pooler_output.square().sum()), expected, 1e-9)


def test_what_the_page_about_slides_says_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "slides.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6 and all(block.count("\n") < 15 for block in blocks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.save({"model": {name: x.float() for name, x in random_gigapath(1536).items()}}, "slide_encoder.pth")
    torch.save((torch.randn(40, 1536), torch.randint(256_000, (40, 2))), "slide.pt")
    torch.save({name: x.float() for name, x in random_longvit(32, 32).items()}, "longvit_small_patch32_1024.pth")
    names = {}
    for block in blocks[:5]:
        # The original has more layers, and runs on a GPU
        block = block.replace("[11]", "[1]").replace(
            "num_train_epochs", 'report_to="none", use_cpu=True, num_train_epochs'
        )
        exec(compile(block, "slides.md", "exec"), names)
    assert names["slide"].shape == (1, 32) and names["tiles"].shape == (1, 40, 32) and len(names["layers"]) == 4
    assert names["heat"].shape == (40,) and (tmp_path / "heat_map.png").stat().st_size > 1000
    assert names["outputs"].last_hidden_state.shape == (1, 1024, 32)


def test_compiles_and_still_looks_at_coordinates():
    model, (slide,) = build_slide(), random_slides(30)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**slide).pooler_output, model(**slide).pooler_output, rtol=0, atol=1e-12)
    slide["coords"][0, 3] = 256_000
    with pytest.raises((RuntimeError, ValueError), match="coords"):
        compiled(**slide)
