"""Draw which query attends to which key: the picture of the README.

python examples/draw_pattern.py --output docs/pattern.png
"""

import argparse

import matplotlib
import numpy as np

from longnet_hf import DilatedPattern


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


LENGTH, HEADS = 64, 4
LENGTHS, RATES = [16, 32, 64], [1, 2, 4]
PANELS = {
    "head 0": (DilatedPattern(LENGTHS, RATES), [0]),
    "head 1": (DilatedPattern(LENGTHS, RATES), [1]),
    "any of 4 heads": (DilatedPattern(LENGTHS, RATES), range(HEADS)),
    "any head, shifted grid (odd layers)": (DilatedPattern(LENGTHS, RATES, shift=True), range(HEADS)),
    'head 0, branch type "window"': (DilatedPattern(LENGTHS, RATES, ["window"] * 3), [0]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="pattern.png", help="where to save the picture")
    output = parser.parse_args().output

    n, m = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(17, 4), sharey=True, layout="constrained")
    colors = matplotlib.colors.ListedColormap(["#f4f4f4", "#9ecae1", "#4292c6", "#084594"])
    for axis, (title, (pattern, heads)) in zip(axes, PANELS.items(), strict=True):
        count = np.max([pattern.multiplicity(n, m, head, HEADS) for head in heads], axis=0)
        image = axis.imshow(count, cmap=colors, vmin=-0.5, vmax=3.5, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("key position")
        axis.set_xticks(range(0, LENGTH + 1, 16)), axis.set_yticks(range(0, LENGTH + 1, 16))
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, ticks=range(4), label="branches that join the pair", shrink=0.8)
    figure.suptitle(f"Dilated attention, segment lengths {LENGTHS}, dilation rates {RATES}")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
