"""Draw which query attends to which key: the picture of the README.

python examples/draw_pattern.py --output docs/pattern.png
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from longnet_hf import DilatedPattern


LENGTH, HEADS = 64, 4
LENGTHS, RATES = [16, 32, 64], [1, 2, 4]
PANELS = {
    "head 0": (DilatedPattern(LENGTHS, RATES), [0]),
    "head 1": (DilatedPattern(LENGTHS, RATES), [1]),
    "any of 4 heads": (DilatedPattern(LENGTHS, RATES), range(HEADS)),
    "any head, shifted grid (odd layers)": (DilatedPattern(LENGTHS, RATES, shift=True), range(HEADS)),
    'head 0, branch type "window"': (DilatedPattern(LENGTHS, RATES, ["window"] * 3), [0]),
}


@dataclass
class Arguments:
    """Where the picture goes."""

    output: str = field(default="runs/pattern.png", metadata={"help": "Where to save the picture."})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    n, m = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    figure = Figure(figsize=(17, 4), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    colors = ListedColormap(["#f4f4f4", "#9ecae1", "#4292c6", "#084594"])
    for axis, (title, (pattern, heads)) in zip(axes, PANELS.items(), strict=True):
        count = np.max([pattern.multiplicity(n, m, head, HEADS) for head in heads], axis=0)
        image = axis.imshow(count, cmap=colors, vmin=-0.5, vmax=3.5, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("key position")
        axis.set_xticks(range(0, LENGTH + 1, 16)), axis.set_yticks(range(0, LENGTH + 1, 16))
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, ticks=range(4), label="branches that join the pair", shrink=0.8)
    figure.suptitle(f"Dilated attention, segment lengths {LENGTHS}, dilation rates {RATES}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
