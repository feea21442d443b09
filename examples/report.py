"""The report of evaluate.py: its tables in Markdown, and its pictures."""

import math
from pathlib import Path

import matplotlib
import torch
from measurements import key_tokens, long_perplexity, unpack
from record import Results


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


DEPTHS = 10


def mean_and_error(values: list) -> tuple[float, float]:
    """Mean and its standard error, without the texts that have None; NaN where it cannot be known, of too few texts or
    of equal ones."""
    known = torch.tensor([x for x in values if x is not None], dtype=torch.float64)
    if not len(known):
        return math.nan, math.nan
    differ = bool((known != known[0]).any())
    return known.mean().item(), (known.std() / len(known) ** 0.5).item() if differ else math.nan


def said(values: list, form: str = "{:.3f}") -> str:
    """Mean and standard error in words."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "–"
    return form.format(mean) + ("" if math.isnan(error) else " ± " + form.format(error))


def signed(values: list, form: str = "{:+.3f}") -> str:
    """The same of differences, with a sign."""
    return said(values, form).replace("± +", "± ")


def above(values: list, others: list) -> list:
    """Differences, text by text, where both are there."""
    return [None if None in (x, y) else x - y for x, y in zip(values, others, strict=True)]


def by_depth(needles: dict, what: str) -> list[list[float]]:
    """For each tenth of the text, from its start on, the mean of `what` in every text that has numbers there."""
    cells: list[list[float]] = [[] for _ in range(DEPTHS)]
    for depths, values in zip(needles["depth"], needles[what], strict=True):
        places = (torch.tensor(depths) * DEPTHS).long().clamp(max=DEPTHS - 1)
        of_text = torch.tensor(values, dtype=torch.float64)
        for cell in range(DEPTHS):
            if (places == cell).any():
                cells[cell].append(of_text[places == cell].mean().item())
    return cells


def share_in_window(needles: dict, window: int | None) -> float:
    """The share of the numbers that are nearer to their question than a dense window is wide (None: all). In a window
    these are seen directly; of a segment's some lie behind its boundary."""
    distances = torch.tensor(needles["distance"])
    return 1.0 if window is None else (distances < window).double().mean().item()


def table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def environment_of(arms: dict[str, dict]) -> str:
    """Hardware, versions and commit: of all arms, or of each where they differ."""
    words = {
        arm: f"{x['hardware']}, torch {x['torch']}, transformers {x['transformers']}, longnet-hf {x['longnet_hf']}."
        for arm, x in arms.items()
    }
    if len(set(words.values())) == 1:
        return words["model"]
    return " ".join(f"`{arm}`: {of_arm}" for arm, of_arm in words.items())


def write_report(args, words: dict[str, str], results: Results, folder: Path) -> None:
    """Write report.md and its pictures.

    Args:
        args: the arguments of evaluate.py.
        words: of every arm what it is, in the order of the tables.
        results: what report.json holds, read from there: JSON makes text of the keys.
        folder: where to.
    """
    arms = {arm: results[arm] for arm in words if arm in results and "missing" not in results[arm]}
    first = arms["model"]
    parts = [f"# {args.model} in long texts", ""]
    parts += [f"- `{arm}`: {what}" for arm, what in words.items() if arm in arms]
    parts += [f"- `{x}` is left out: {results[x]['missing']}" for x in words if "missing" in results.get(x, {})]
    stretched = [f"`{arm}`" for arm, result in arms.items() if result["stretched"]]
    chance, asks_numbers = math.log(first["vocabulary"]), args.needle_texts > 0
    parts += [
        f"- chance: a loss of {chance:.2f} nats"
        + f"; a number is guessed with probability 1.1e-07, or log-probability {-math.log(9e6):.1f}, by who knows "
        "its form" * asks_numbers,
        "",
        f"{args.texts} texts of {args.lengths[-1]} tokens, "
        + f"{args.needle_texts} texts with 40 numbers at each length, " * asks_numbers
        + f"seed {args.seed}. ± is one standard error over texts; none is given where all are equal, which says "
        "little of other texts. Losses in nats per token. "
        + "There are fewer texts than ones with numbers or of a task, whose haystacks repeat. "
        * (max(args.needle_texts, args.ruler_texts) > args.texts)
        + environment_of(arms)
        + f" Rotary positions of {', '.join(stretched)} are stretched to the longest length with YaRN, at all lengths."
        * bool(stretched),
        "",
    ]

    def cost(result: dict) -> list:
        pairs, window = result["pairs"], result["dense_window"]
        speed, memory = result["losses"]["tokens_per_second"], result["peak_gibibytes"]
        return [
            "its own" if pairs is None else f"{pairs:.0f}",
            "all" if window is None else window,
            speed,
            f"{memory:.2f}",
        ]

    head = ["arm", "pairs per token", "dense window", "tokens/s", "peak memory (GiB)"]
    parts += ["## Cost", "", table(head, [[arm, *cost(result)] for arm, result in arms.items()]), ""]
    if not args.device.startswith("cuda"):
        parts += ["Memory is the most that the process has had until then, earlier arms included.", ""]

    def compare(title: str, column: str, of: dict[str, dict], picture: str) -> None:
        others = [arm for arm in arms if arm != "model"]
        rows = [
            [key, *(said(of[arm][key]) for arm in arms), *(signed(above(of[arm][key], values)) for arm in others)]
            for key, values in of["model"].items()
        ]
        head = [column, *arms, *(f"{arm} - model" for arm in others)]
        parts.extend([f"## {title}", "", table(head, rows), "", f"![{title}]({picture})", ""])

    position = {arm: result["losses"]["position"] for arm, result in arms.items()}
    compare("Loss by position", "positions", position, "loss_by_position.png")
    for context in first["losses"]["copies"]:
        copies = {arm: result["losses"]["copies"][context] for arm, result in arms.items()}
        compare(f"Loss of copies behind {context} tokens", "last seen", copies, f"copies_{context}.png")
        bars(copies, folder / f"copies_{context}.png")

    parts += [f"## Loss of the same {args.target_tokens} tokens after more context", ""]
    parts += [contexts_of(arms), "", "![Loss after context](context.png)", ""]
    if "foreign" not in first["contexts"]:
        parts += [
            "Foreign contexts are left out: `--data` has a text without another that shares no file with it.",
            "",
        ]
    parts += long_perplexity_of(arms)
    parts += needles_of(arms, args.lengths) if args.needle_texts else []
    parts += ruler_of(arms, args.lengths) if args.ruler_texts else []
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    lines(position, folder / "loss_by_position.png")
    context_picture(arms, folder / "context.png")
    if args.needle_texts:
        needle_map(arms, args.lengths, folder / "needles.png")


def contexts_of(arms: dict[str, dict]) -> str:
    """The table of the losses after more and more context of each kind."""
    kinds, rows = list(arms["model"]["contexts"]), []
    head = ["context", "arm", *kinds, "shuffled - true"]
    if "foreign" in kinds:
        head += ["use: foreign - true"] + ["use - model's"] * (len(arms) > 1)
    for prefix in arms["model"]["contexts"]["true"]:
        for arm, result in arms.items():
            of, of_model = ({kind: x["contexts"][kind][prefix] for kind in kinds} for x in (result, arms["model"]))
            row = [prefix, arm, *map(said, of.values()), signed(above(of["shuffled"], of["true"]))]
            if "foreign" in kinds:
                use, of_model = (above(x["foreign"], x["true"]) for x in (of, of_model))
                row += [signed(use)] + ["" if arm == "model" else signed(above(use, of_model))] * (len(arms) > 1)
            rows.append(row)
    return table(head, rows)


def needles_of(arms: dict[str, dict], lengths: list[int]) -> list[str]:
    """The section of the numbers that were found, by length and depth."""
    rows, forms = [], {"found": "{:.1%}", "log_probability": "{:.1f}"}
    for length in lengths:
        means = {
            arm: {what: [sum(x) / len(x) for x in result[f"needles-{length}"][what]] for what in forms}
            for arm, result in arms.items()
        }
        for arm, result in arms.items():
            needles, row = result[f"needles-{length}"], [length, arm]
            for what, form in forms.items():
                of_arm, of_model = means[arm][what], means["model"][what]
                row.append(said(of_arm, form))
                if len(arms) > 1:
                    row.append("" if arm == "model" else signed(above(of_arm, of_model), form.replace(":", ":+")))
            inside = share_in_window(needles, result["dense_window"])
            rows.append([*row, f"{inside:.0%}", *(said(cell, "{:.0%}") for cell in by_depth(needles, "found"))])
    head = ["length", "arm"]
    for what in ("found", "log-probability"):
        head += [what] + [f"{what} - model's"] * (len(arms) > 1)
    head += ["nearer than the dense window", *(f"depth {i / DEPTHS:.0%}" for i in range(DEPTHS))]
    return ["## Numbers found", "", table(head, rows), "", "![Numbers found](needles.png)", ""]


def evaluator_of(arms: dict[str, dict]) -> str | None:
    """The arm that chooses the key tokens for all: the one with full attention, or the model's own where no pattern
    has replaced it; None if there is neither."""
    if "full" in arms:
        return "full"
    return "model" if arms["model"]["pairs"] is None else None


def long_perplexity_of(arms: dict[str, dict]) -> list[str]:
    parts = ["## LongPPL", ""]
    evaluator = evaluator_of(arms)
    if evaluator is None:
        return [*parts, "Left out: an arm with full attention, which chooses the key tokens, is not in `--arms`.", ""]
    prefixes = list(arms["model"]["contexts"]["true"])
    if len(prefixes) == 1:
        reason = f"the short and the long context are the same {prefixes[0]} tokens"
        return [*parts, f"Left out: {reason}. Give longer `--lengths`, or fewer `--target_tokens`.", ""]
    short, long = (unpack(arms[evaluator]["token_losses"][which]) for which in ("short", "long"))
    keys = key_tokens(short, long)

    def perplexity(losses: torch.Tensor, chosen: torch.Tensor) -> str:
        mean, error = long_perplexity(losses, chosen)
        return "–" if math.isnan(mean) else f"{mean:.3f}" + f" ± {error:.3f}" * (error > 0)

    rows = []
    losses = {arm: unpack(result["token_losses"]["long"]) for arm, result in arms.items()}
    for arm, of_arm in losses.items():
        row = [arm]
        for chosen in (keys, torch.ones_like(keys)):
            row.append(perplexity(of_arm, chosen))
            if len(arms) > 1:  # of a ratio of perplexities the loss is a difference
                row.append("" if arm == "model" else perplexity(of_arm - losses["model"], chosen))
        rows.append(row)
    head, targets = ["arm"], keys.shape[1]
    for chosen, column in (("key", "LongPPL"), ("all", "perplexity")):
        head += [f"{chosen} tokens: {column}"] + [f"{column} / model's"] * (len(arms) > 1)
    return [
        *parts,
        f"The perplexity of {int(keys.sum())} key tokens of {keys.numel()}, after {prefixes[-1]} tokens of true "
        f"context. A token is one (arXiv 2410.23771) if its log-probability under `{evaluator}` is above -2 there, "
        f"and more than 2 above that after {prefixes[0]} tokens. So chosen, they favour `{evaluator}`. The first of a "
        f"text's {targets} tokens has such a context, the last {targets - 1} tokens more; the paper's short context "
        "is another, of 4096 tokens.",
        "",
        table(head, rows),
        "",
    ]


def ruler_of(arms: dict[str, dict], lengths: list[int]) -> list[str]:
    rows, others = [], [arm for arm in arms if arm != "model"]
    for task in arms["model"][f"ruler-{lengths[0]}"]:
        for length in lengths:
            right = {arm: result[f"ruler-{length}"][task]["right"] for arm, result in arms.items()}
            chance = mean_and_error(arms["model"][f"ruler-{length}"][task]["chance"])[0]
            differences = [signed(above(right[arm], right["model"]), "{:+.1%}") for arm in others]
            rows.append([task, length, *(said(x, "{:.1%}") for x in right.values()), f"{chance:.1%}", *differences])
    return [
        "## RULER",
        "",
        "Answers whose tokens are all the likeliest, behind the right answers before them. Chance is to draw one of "
        "the numbers, variables or words of the text that is asked about, without those of an example before it.",
        "",
        table(["task", "length", *arms, "chance", *(f"{arm} - model" for arm in others)], rows),
        "",
    ]


# Pictures


def errorbar(axes, x, cells: list[list], label: str, **style) -> None:
    means, errors = zip(*map(mean_and_error, cells), strict=True)
    axes.errorbar(x, means, [0 if math.isnan(error) else error for error in errors], label=label, capsize=2, **style)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines(of_arms: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm, of in of_arms.items():
        errorbar(axes, [int(key.partition("-")[0]) for key in of], list(of.values()), arm)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (from)", ylabel="loss (nats)", title="loss by position")
    axes.legend()
    save(figure, path)


def bars(of_arms: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    width = 1 / (len(of_arms) + 1)
    for i, (arm, of) in enumerate(of_arms.items()):
        means, errors = zip(*map(mean_and_error, of.values()), strict=True)
        x = [place + (i - (len(of_arms) - 1) / 2) * width for place in range(len(of))]
        axes.bar(x, means, width, yerr=errors, label=arm)
    axes.set_xticks(range(len(of)), list(of), rotation=20)
    axes.set(ylabel="loss (nats)", title="loss of copies, by how far back they were seen")
    axes.legend(loc="upper center")
    save(figure, path)


def context_picture(arms: dict[str, dict], path: Path) -> None:
    """Each arm a panel. Texts differ by more than contexts do: what is drawn is how a text's loss changes."""
    figure, panels = plt.subplots(1, len(arms), figsize=(5 * len(arms), 4), sharey=True, layout="constrained")
    for axes, (arm, result) in zip([panels] if len(arms) == 1 else panels, arms.items(), strict=True):
        shortest, start = next(iter(result["contexts"]["true"].items()))
        for kind, of in result["contexts"].items():
            errorbar(axes, list(map(int, of)), [above(values, start) for values in of.values()], kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(map(int, of)), list(of))
        axes.set(xlabel="tokens of context", title=arm)
        axes.set(ylabel=f"loss above that after {shortest} true tokens (nats)")
        axes.legend()
    save(figure, path)


def needle_map(arms: dict[str, dict], lengths: list[int], path: Path) -> None:
    """Depth by length, each arm a panel. Below the line a number is nearer than the dense window is wide."""
    figure, panels = plt.subplots(1, len(arms), figsize=(5 * len(arms), 4), layout="constrained")
    for axes, (arm, result) in zip([panels] if len(arms) == 1 else panels, arms.items(), strict=True):
        cells = [[mean_and_error(x)[0] for x in by_depth(result[f"needles-{n}"], "found")] for n in lengths]
        image = axes.imshow(list(zip(*cells, strict=True)), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        if result["dense_window"] is not None:
            outside = [1 - share_in_window(result[f"needles-{n}"], result["dense_window"]) for n in lengths]
            axes.step(range(len(lengths)), [DEPTHS * x - 0.5 for x in outside], "r", where="mid")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(DEPTHS), [f"{i / DEPTHS:.0%}" for i in range(DEPTHS)])
        axes.set(xlabel="length", ylabel="depth", title=arm)
    figure.colorbar(image, ax=panels, label="numbers found")
    save(figure, path)
