"""Fine-tune a classifier of slides with Trainer, and draw the heat map that finds what it looked at.

    python examples/slide.py                                       # made-up slides: minutes on two CPU cores
    python examples/slide.py --encoder my-gigapath --num_train_epochs 5 --learning_rate 2e-4 --bf16

Slides are made up: a few hundred tiles of tissue each, with random features. Half of them carry a sign, one direction
in the features of a few neighbouring tiles. The recipe is that of Prov-GigaPath's fine-tuning: AdamW whose learning
rate falls from layer to layer towards the embeddings, dropout and drop path, and accumulated gradients. `--encoder` is
a folder with the weights to begin with (see docs/slides.md); by default they are random.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from record import write
from training import RESUME_WITH_SAME, check_at_least, check_settings, train_on
from transformers import AutoModelForImageClassification, HfArgumentParser, Trainer, TrainingArguments, set_seed

from longnet_hf import LongNetForSlideClassification, LongNetSlideConfig, collate_slides


TILE_SIZE, SIGN_TILES = 256, 9


@dataclass
class SlideArguments:
    """The slides, and the model that learns from them."""

    encoder: str | None = field(default=None, metadata={"help": "Folder with the weights of a slide encoder."})
    feature_size: int = field(default=64, metadata={"help": "Size of a tile's features, where there is no encoder."})
    slides: int = field(default=240, metadata={"help": "How many slides to train on."})
    held_out: int = field(default=60, metadata={"help": "How many slides to hold out."})
    tiles: int = field(default=400, metadata={"help": "How many tiles a slide has, on average."})
    strength: float = field(default=4.0, metadata={"help": "Length of the sign, in standard deviations of noise."})
    dropout: float = field(default=0.1, metadata={"help": "Of embeddings and hidden states."})
    drop_path: float = field(default=0.1, metadata={"help": "Probability of leaving out the last layer."})
    layer_decay: float = field(default=0.95, metadata={"help": "Learning rate of a layer by that of the next."})

    def __post_init__(self):
        check_at_least(self, slides=1, held_out=2, tiles=2)  # of two slides that follow each other one has a sign


DEFAULTS = dict(
    output_dir="runs/slide",
    num_train_epochs=6,
    per_device_train_batch_size=1,
    per_device_eval_batch_size=4,
    gradient_accumulation_steps=8,
    learning_rate=2e-3,
    weight_decay=0.05,
    warmup_steps=10,
    lr_scheduler_type="cosine",
    logging_steps=30,
    save_steps=30,
    save_total_limit=1,
    remove_unused_columns=False,
    dataloader_pin_memory=torch.cuda.is_available(),
)


def make_slide(index: int, feature_size: int, tiles: int, strength: float) -> dict:
    """Slide number `index`, a blob of tissue in scan order; every other one carries the sign, in `sign` `[N]`."""
    random = np.random.default_rng(index)
    side = int(2 * tiles**0.5)
    y, x = np.mgrid[:side, :side]
    count = random.integers(tiles // 2, tiles * 3 // 2)
    center, stretch = random.uniform(0.35, 0.65, 2) * side, random.uniform(0.7, 1.4)
    distance = (x - center[0]) ** 2 * stretch + (y - center[1]) ** 2 / stretch
    tissue = np.argwhere(distance <= np.sort(distance, axis=None)[count - 1])  # row by row
    features = random.standard_normal((len(tissue), feature_size), dtype=np.float32)
    sign = np.zeros(len(tissue), dtype=bool)
    if index % 2:
        start = tissue[random.integers(len(tissue))]
        sign[np.argsort(((tissue - start) ** 2).sum(1), kind="stable")[:SIGN_TILES]] = True
        direction = np.random.default_rng(0).standard_normal(feature_size, dtype=np.float32)
        features[sign] += strength * direction / np.linalg.norm(direction)
    coords = tissue[:, ::-1] * TILE_SIZE
    return {"inputs_embeds": features, "coords": coords.copy(), "labels": index % 2, "sign": sign}


def layer_decay_groups(model: LongNetForSlideClassification, args: TrainingArguments, decay: float) -> list[dict]:
    """Groups of parameters for an optimizer: the learning rate of the head, times `decay` for every layer below it,
    and weight decay for matrices only."""
    layers, groups = model.config.num_hidden_layers, {}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        depth = layers + 1
        if "embeddings" in parts:
            depth = 0
        elif "layers" in parts:
            depth = int(parts[parts.index("layers") + 1]) + 1
        weight_decay = args.weight_decay if weight.dim() > 1 and "cls_token" not in parts else 0.0
        group = {"params": [], "lr": args.learning_rate * decay ** (layers + 1 - depth), "weight_decay": weight_decay}
        groups.setdefault((depth, weight_decay), group)["params"].append(weight)
    return list(groups.values())


def make_model(slide_args: SlideArguments) -> LongNetForSlideClassification:
    """A classifier by the cls token, whose attention can then be drawn."""
    recipe = dict(
        embedding_dropout=slide_args.dropout, hidden_dropout=slide_args.dropout, drop_path_rate=slide_args.drop_path
    )
    if slide_args.encoder is not None:
        return AutoModelForImageClassification.from_pretrained(slide_args.encoder, num_labels=2, **recipe)
    config = LongNetSlideConfig(
        feature_size=slide_args.feature_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        segment_lengths=[1024, 4096],
        dilation_rates=[1, 4],
        use_sub_norm=False,
        initializer_range=0.1,
        pooling="cls",
        **recipe,
    )
    return LongNetForSlideClassification(config)


@torch.no_grad()
def heat_map(model: LongNetForSlideClassification, slide: dict) -> np.ndarray:
    """How much attention the cls token pays to every tile, `[N]`: the sum over layers and heads."""
    batch = collate_slides([slide])
    features, coords = (batch[name].to(model.device) for name in ("inputs_embeds", "coords"))
    maps = model.eval().model.attention_maps(features.to(model.dtype), coords)
    return torch.stack(maps).float().sum((0, 1, 2)).cpu().numpy()


def rank_of_sign(heat: np.ndarray, sign: np.ndarray) -> float:
    """How often a tile of the sign is hotter than another tile: 1 where the heat finds the sign, 0.5 by chance."""
    return float((heat[sign][:, None] > heat[~sign]).mean())


def draw(slides: list[dict], heats: list[np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(4.5 * len(slides), 4.5), layout="constrained")
    for axes, slide, heat in zip(figure.subplots(1, len(slides), squeeze=False)[0], slides, heats, strict=True):
        x, y = slide["coords"].T
        image = axes.scatter(x, y, c=heat / heat.mean(), marker="s", s=24, cmap="inferno")
        axes.scatter(*slide["coords"][slide["sign"]].T, marker="s", s=30, facecolors="none", edgecolors="cyan")
        axes.set(aspect="equal", title=f"{len(x)} tiles; framed: the sign", xlabel="x (pixels)", ylabel="y (pixels)")
        axes.invert_yaxis()
        figure.colorbar(image, ax=axes, label="attention, in multiples of the mean", shrink=0.7)
    figure.savefig(path, dpi=120)


def main():
    parser = HfArgumentParser((SlideArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    slide_args, args = parser.parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    settings = asdict(slide_args) | {name: getattr(args, name) for name in RESUME_WITH_SAME}
    check_settings(folder / "settings.json", settings)
    set_seed(args.seed)
    model = make_model(slide_args)
    size = model.config.feature_size
    slides = [
        make_slide(index, size, slide_args.tiles, slide_args.strength)
        for index in range(slide_args.slides + slide_args.held_out)
    ]
    training, held_out = slides[: slide_args.slides], slides[slide_args.slides :]
    optimizer = torch.optim.AdamW(layer_decay_groups(model, args, slide_args.layer_decay), lr=args.learning_rate)
    trainer = Trainer(
        model,
        args,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=collate_slides,
        optimizers=(optimizer, None),
    )
    train_on(trainer, folder)
    predictions = trainer.predict(held_out)
    trainer.save_model(str(folder / "model"))
    if not trainer.is_world_process_zero():
        return

    signed = [slide for slide in held_out if slide["labels"] == 1]
    heats = [heat_map(model, slide) for slide in signed]
    ranks = [rank_of_sign(heat, slide["sign"]) for heat, slide in zip(heats, signed, strict=True)]
    results = {
        "accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean()),
        "heat_finds_sign": float(np.mean(ranks)),
    }
    write(folder / "results.json", results)
    draw(signed[:3], heats[:3], folder / "heat_map.png")
    print(f"\n{len(held_out)} held-out slides: {results['accuracy']:.0%} are classified rightly.")
    print(f"A tile of the sign is hotter than another tile in {results['heat_finds_sign']:.0%} of all pairs.")
    print(f"The model, the picture heat_map.png and results.json are in {folder}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from the last checkpoint.")
