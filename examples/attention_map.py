"""What some tokens of a text attend to, exactly: pictures, and the passages with most weight.

    python examples/attention_map.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --length 8192
    python examples/attention_map.py --model runs/demo/longnet --text book.txt --rows -1 4000 --layers 2 --heads 0 1

A LongNet is taken as it is; a Llama, Mistral, SmolLM or Qwen2 model with its own full attention; others are refused.
For every row (a token of the text; its attention is that with which it predicts the next one) there is in
`--output_dir`: row_N.png, in which every head is a strip over the text and over the distance; row_N.html, the text,
with tokens coloured by their mean weight; and passages.md. Memory grows with the length, not with its square.
"""

import html
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from training import stretched_positions
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

from longnet_hf import LongNetForCausalLM


PASSAGE = 16  # tokens
PASSAGES = 8
COLUMNS = 128  # of a strip over the text
FULL = dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"])


@dataclass
class Arguments:
    """Which attention of which model to which text."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A LongNet, or a Llama-family model."})
    text: str = field(default="README.md", metadata={"help": "The file of the text."})
    length: int | None = field(default=None, metadata={"help": "Read so many first tokens. Default: all."})
    rows: list[int] = field(
        default_factory=lambda: [-1], metadata={"help": "Tokens that attend: their indices, below 0 from the end."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Indices of layers. Default: all."})
    heads: list[int] | None = field(default=None, metadata={"help": "Indices of attention heads. Default: all."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    output_dir: str = field(default="runs/attention_map", metadata={"help": "Folder of the pictures."})


def load_model(name: str, length: int, device: str) -> PreTrainedModel:
    """A LongNet; another model is made one with full attention, which computes the same."""
    config = AutoConfig.from_pretrained(name)
    if hasattr(config.get_text_config(), "dilated_attention"):
        raise ValueError(
            f"`--model` {name} is a {config.model_type} with dilated attention, of which maps cannot be had: give a "
            "LongNet (`LongNetForCausalLM.from_llama`), or a Llama-family model as it was published."
        )
    fields = {"dtype": torch.bfloat16 if device.startswith("cuda") else torch.float32}
    if hasattr(config, "layer_patterns"):
        model = AutoModelForCausalLM.from_pretrained(name, **fields, **stretched_positions(config, length))
        if not isinstance(model, LongNetForCausalLM):
            raise ValueError(f"`--model` {name} must be a causal language model, got {type(model).__name__}.")
    else:
        try:
            positions = stretched_positions(config, length) if getattr(config, "rope_parameters", None) else {}
            model = LongNetForCausalLM.from_llama(name, **FULL, **positions, **fields)
        except ValueError as error:
            raise ValueError(
                f"`--model` {name} must be a LongNet or what `LongNetForCausalLM.from_llama` takes: {error}"
            ) from error
    return model.to(device).eval()


def chosen(name: str, given: list[int] | None, count: int) -> list[int]:
    """The indices that an argument gives, all by default."""
    wrong = [i for i in given or () if not -count <= i < count]
    if wrong or given == []:
        raise ValueError(f"`--{name}` must be indices from {-count} to {count - 1}, got {given}.")
    return list(range(count)) if given is None else [i % count for i in given]


@torch.no_grad()
def attention_of_rows(model: PreTrainedModel, ids: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """What the tokens `rows` of `ids` `[N]` pay to all others: `[layers, heads, rows, N]`."""
    asked = dict(output_attentions=True, attention_rows=torch.tensor(rows))
    attentions = model.base_model(input_ids=ids[None].to(model.device), **asked).attentions
    return torch.stack([of_layer[0].float().cpu() for of_layer in attentions])


def pieces_of(text: str, tokenizer, length: int | None) -> tuple[torch.Tensor, list[str]]:
    """Tokens `[N]`, and the characters of each: together the text, and the names of tokens that are added to it."""
    if not tokenizer.is_fast:
        raise ValueError("`--model` must have a fast tokenizer, which knows where in the text a token lies.")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, pieces, stop = encoded["input_ids"][:length], [], 0
    for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=False):
        is_added = token in tokenizer.all_special_ids
        # From where the last one ended: several tokens may share a character, and none be given a space
        pieces.append(tokenizer.convert_ids_to_tokens(token) if is_added else text[stop:end])
        stop = max(stop, end)
    return torch.tensor(ids), pieces


def passages_of(weights: torch.Tensor) -> list[tuple[float, range]]:
    """The passages with most weight among `[N]`, which do not overlap, and what they have."""
    size = min(PASSAGE, len(weights))
    sums, found = weights.double().unfold(0, size, 1).sum(-1), []
    for _ in range(PASSAGES):
        start = int(sums.argmax())
        if sums[start] <= 0:
            break
        # Of equal ones the first ends with the weight: let it stand in the middle
        last = start + int((sums[start : start + size] >= sums[start] - 1e-12).long().cumprod(0).sum()) - 1
        start = (start + last) // 2
        found.append((float(sums[start]), range(start, start + size)))
        sums[max(0, start - size + 1) : start + size] = -1
    return found


def strips_of(weights: torch.Tensor, edges: list[int]) -> torch.Tensor:
    """Sums of weights `[..., N]` between neighbouring edges, `[..., len(edges) - 1]`."""
    return torch.stack([weights[..., a:b].sum(-1) for a, b in zip(edges, edges[1:], strict=False)], dim=-1)


def draw(weights: torch.Tensor, row: int, names: list[str], title: str) -> Figure:
    """A strip per head of `weights` `[heads, N]`: by position in the text, and by distance from token `row`."""
    seen = weights[:, : row + 1]
    count = min(COLUMNS, row + 1)
    by_position = strips_of(seen, [i * (row + 1) // count for i in range(count + 1)])
    edges = [0] + [1 << i for i in range(row.bit_length())] + [row + 1]
    edges = sorted(set(edges))
    by_distance = strips_of(seen.flip(-1), edges)
    figure = Figure(figsize=(13, 1.6 + 0.14 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    scale = dict(norm=LogNorm(1e-4, 1, clip=True), cmap="viridis", aspect="auto", interpolation="nearest")
    panels[0].imshow(by_position.numpy(), extent=(0, row + 1, len(names) - 0.5, -0.5), **scale)
    panels[0].set(xlabel="position in the text (tokens)", ylabel="layer.head")
    panels[0].set_title(title, parse_math=False)  # a token may be "$$"
    image = panels[1].imshow(by_distance.numpy(), **scale)
    panels[1].set(xlabel="distance (from)", title="by distance")
    panels[1].set_xticks(range(len(edges) - 1), edges[:-1], rotation=90)
    panels[0].set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=panels, label="attention weight")
    return figure


def coloured(pieces: list[str], weights: torch.Tensor, row: int, title: str) -> str:
    """A page of HTML: the text up to token `row`, each token as dark as its weight (the square root of its share of
    the largest), with the weight as its tooltip."""
    shades = (weights / weights.max().clamp(min=1e-30)).sqrt().tolist()
    spans = []
    for i, (piece, weight, shade) in enumerate(zip(pieces[: row + 1], weights.tolist(), shades, strict=False)):
        border = ";outline:2px solid #d62728" if i == row else ""
        spans.append(
            f'<span style="background:rgba(255,140,0,{shade:.2f}){border}" title="token {i}: {weight:.5f}">'
            f"{html.escape(piece)}</span>"
        )
    return (
        f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n<body>'
        f'<h1>{html.escape(title)}</h1>\n<pre style="white-space:pre-wrap">{"".join(spans)}</pre></body></html>\n'
    )


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.length is not None and args.length < 1:
        raise ValueError(f"`--length` must be at least 1, got {args.length}.")
    ids, pieces = pieces_of(Path(args.text).read_text(encoding="utf-8", errors="replace"), tokenizer, args.length)
    if not len(ids):
        raise ValueError(f"`--text` must be a file with text, got {args.text}, which is empty.")
    rows = chosen("rows", args.rows, len(ids))
    model = load_model(args.model, len(ids), args.device)
    layers = chosen("layers", args.layers, model.config.num_hidden_layers)
    heads = chosen("heads", args.heads, model.config.num_attention_heads)
    attention = attention_of_rows(model, ids, rows)[layers][:, heads].flatten(0, 1)  # [strips, rows, N]
    names = [f"{layer}.{head}" for layer in layers for head in heads]

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# What tokens of {args.text} attend to, in {args.model}", ""]
    for i, row in enumerate(rows):
        title = f"attention of token {row}, {pieces[row]!r}"
        draw(attention[:, i], row, names, title).savefig(folder / f"row_{row}.png", dpi=110)
        mean = attention[:, i].mean(0)
        (folder / f"row_{row}.html").write_text(coloured(pieces, mean, row, title), encoding="utf-8")
        lines += [f"## Token {row}", "", f"![attention](row_{row}.png) [the text, coloured](row_{row}.html)", ""]
        lines += [f"{len(names)} heads (of layers {layers}) on average:", ""]
        for weight, passage in passages_of(mean):
            said = "".join(pieces[passage.start : passage.stop])
            lines.append(f"- {weight:.4f}, tokens {passage.start} to {passage.stop - 1}: <code>{quoted(said)}</code>")
        lines.append("")
    (folder / "passages.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    print(f"Written to {folder}")


def quoted(text: str) -> str:
    """A passage in one line of Markdown, none of which is taken for HTML or Markdown."""
    return html.escape(text.replace("\n", "⏎")).translate({ord(c): f"&#{ord(c)};" for c in "`*_[]|\\~"})


if __name__ == "__main__":
    main()
