"""Which key/value heads of a pretrained model need what is far away: found by one forward pass over a user's own text.

A few heads of a language model do its copying from afar ("induction" or "retrieval heads": arXiv 2209.11895,
2404.15574); those keep full attention where the others are given a window. DuoAttention (arXiv 2410.10819) trains
gates to find them. Here they are seen at work: spans of the text are repeated at its end, and a head's score is the
weight with which the tokens of a repeated span attend to where they stood first.
"""

import contextlib
import json
import numbers
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .dilated_interface import (
    DILATED,
    check_model,
    evaluation,
    num_key_value_heads,
    refuse_what_is_not_computed,
    same_size,
    set_implementation,
    unwrap_mask,
)
from .dilated_operator import dilated_attention
from .dilated_pattern import DilatedPattern
from .input_checks import check_ids, check_integer


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The first tokens of a repeated span cannot be known to be a repetition
_LEAD = 8
_SHARES = (0.05, 0.1, 0.2, 0.33)


@dataclass(frozen=True)
class HeadRanking:
    """The scores of a model's key/value heads, see [`rank_heads`].

    Args:
        scores: for every layer with attention (its index), the score of every key/value head: the mean weight of a
            repeated token's attention to where it stood first, of the best query head of the group.
    """

    scores: dict[int, list[float]]

    @property
    def ranked(self) -> list[tuple[int, int]]:
        """(layer, head) of all heads, the best first."""
        heads = [(layer, head) for layer, of_layer in self.scores.items() for head in range(len(of_layer))]
        return sorted(heads, key=lambda at: -self.scores[at[0]][at[1]])

    def best(self, share: float) -> dict[int, list[int]]:
        """The heads to keep, for `full_attention_heads`: the best `share` of all, at least one.

        Raises:
            ValueError: if `share` does not lie in (0, 1].
        """
        best: dict[int, list[int]] = {}
        for layer, head in self.ranked[: self._count(share)]:
            best.setdefault(layer, []).append(head)
        return {layer: sorted(heads) for layer, heads in sorted(best.items())}

    def mass(self, share: float) -> float:
        """How much of all scores the best `share` of the heads has, from 0 to 1."""
        scores = [self.scores[layer][head] for layer, head in self.ranked]
        return sum(scores[: self._count(share)]) / max(sum(scores), 1e-30)

    def _count(self, share: float) -> int:
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
            raise ValueError(f"`share` must lie in (0, 1], got {share!r}.")
        return max(1, round(share * len(self.ranked)))

    def __str__(self) -> str:
        masses = ", ".join(f"{share:.0%}: {self.mass(share):.0%}" for share in _SHARES)
        return f"{len(self.ranked)} key/value heads; share of the copying that the best do: {masses}"

    def draw(self) -> "Figure":
        """A heat map of the scores, layers by heads. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`draw` needs matplotlib: pip install matplotlib") from error
        heads = max(map(len, self.scores.values()))
        rows = [of_layer + [float("nan")] * (heads - len(of_layer)) for of_layer in self.scores.values()]
        figure = Figure(figsize=(1.5 + max(2.0, 0.35 * heads), 1.2 + 0.2 * len(rows)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
        axes.set(xlabel="key/value head", ylabel="layer", title="copying from afar")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(len(rows)), [str(layer) for layer in self.scores])
        figure.colorbar(image, ax=axes, label="attention to the first occurrence")
        return figure

    def save(self, file: str | os.PathLike) -> None:
        """Write the scores as JSON."""
        Path(file).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | os.PathLike) -> "HeadRanking":
        """Read what [`save`] wrote.

        Raises:
            ValueError: if the file holds anything else.
        """
        try:
            scores = json.loads(Path(file).read_text())["scores"]
            if not all(isinstance(of_layer, list) and np.isfinite(of_layer).all() for of_layer in scores.values()):
                raise ValueError("scores must be lists of finite numbers")
            return cls({int(layer): [float(score) for score in of_layer] for layer, of_layer in scores.items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"`file` holds no ranking of heads: {os.fspath(file)!r}.") from error


@torch.no_grad()
def rank_heads(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    span_length: int = 64,
    num_spans: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadRanking:
    """Find the key/value heads of a causal model that copy from afar, by one forward pass with full attention.

    The end of every row is replaced by spans from anywhere in the rest of it. A head's score is the attention weight
    of their tokens, from the ninth of a span on, to the token's first occurrence and to the token behind that, on
    average, for the best query head of the group. Memory is linear in N.

    Args:
        model: any model that [`set_dilated_attention`] takes, or a LongNet: whatever its pattern, it is run with full
            attention here, and is afterwards what it was.
        input_ids: `[B, N]`, text of the kind and length that the model is meant for, without padding. Of several rows
            the scores are the mean. The heads belong to the model more than to the text: one row will do.
        span_length: tokens of a span, more than 9.
        num_spans: how many spans; default: as many as fit into a quarter of the row.
        seed: of the choice of the spans.
        progress: show a progress bar.

    Raises:
        ValueError: if the model is not of the kind, or if the text is too short.

    ```python
    >>> ranking = rank_heads(model, tokenizer(text, return_tensors="pt").input_ids)
    >>> print(ranking)
    >>> longnet = LongNetForCausalLM.from_llama(
    ...     model, segment_lengths=[2048], dilation_rates=[1], branch_types=["window"], sink_tokens=4,
    ...     full_attention_heads=ranking.best(0.2),
    ... )
    ```"""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` must be a model of Transformers, got {type(model).__name__}. (Of a PEFT model give "
            "`get_base_model()`, and of a compiled one what was compiled.)"
        )
    config = model.config.get_text_config()
    if not hasattr(config, "layer_patterns"):
        check_model(model, config)
    check_ids("input_ids", input_ids, getattr(model.get_input_embeddings(), "num_embeddings", config.vocab_size))
    check_integer("span_length", span_length, at_least=_LEAD + 2)
    check_integer("num_spans", num_spans, at_least=1, or_none=True)
    check_integer("seed", seed, at_least=0)
    batch_size, length = input_ids.shape
    num_spans = length // 4 // span_length if num_spans is None else num_spans
    text = length - num_spans * span_length
    if num_spans < 1 or text < 2 * span_length:
        # By default the spans take a quarter
        least = 4 * span_length if num_spans < 1 else (num_spans + 2) * span_length
        raise ValueError(
            f"`input_ids` must have at least {least} tokens per row for {max(1, num_spans)} spans of {span_length} "
            f"(`num_spans`, `span_length`) and the text before them, got {length}."
        )
    with torch.device("cpu"):  # whatever the default is
        starts = torch.randint(text - span_length, (num_spans,), generator=torch.Generator().manual_seed(seed))
        first = starts[:, None] + torch.arange(span_length)  # where the tokens of the spans stood first
        columns = (text + torch.arange(num_spans * span_length)).view(num_spans, span_length)[:, _LEAD:].flatten()
    repeated = torch.cat((input_ids[:, :text], input_ids[:, first.flatten().to(input_ids.device)]), dim=1)
    first = first[:, _LEAD:].flatten()

    heads, totals = num_key_value_heads(config), {}
    with logging.tqdm(total=batch_size * config.num_hidden_layers, unit=" layers", disable=not progress) as bar:

        def observed(module, query, key, value, attention_mask=None, scaling=None, is_causal=None, **kwargs):
            if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
                raise ValueError(f"`model` must be causal, and a {type(model).__name__} attends both ways.")
            refuse_what_is_not_computed(kwargs)
            # (A LongNet gives the layout of its batch here.)
            if torch.is_tensor(attention_mask) and unwrap_mask(attention_mask, 1, key.shape[2]) is not None:
                raise ValueError(f"{type(model).__name__} has a mask of its own, under which heads cannot be ranked.")
            output, scores = _attend_and_score(query, key, value, scaling, columns, first)
            totals[module.layer_idx] = totals.get(module.layer_idx, 0.0) + scores
            bar.update()
            return output[..., : value.shape[-1]], None

        with evaluation(model), _attention_replaced(model, config, observed):
            for row in repeated:
                try:
                    model.base_model(input_ids=row[None].to(model.device), use_cache=False)
                except IndexError as error:
                    raise ValueError(
                        f"`input_ids` must have no more tokens per row than {type(model).__name__} has learned "
                        f"positions, got {length}."
                    ) from error
    if not totals:
        raise ValueError(f"{type(model).__name__} does not call the attention function that is set.")
    lost = [layer for layer, total in sorted(totals.items()) if not total.isfinite().all()]
    if lost:
        raise ValueError(
            f"`model` computes numbers that are not finite: the heads of layers {lost} cannot be ranked. See that its "
            f"weights are whole, and that its `dtype` ({model.dtype}) holds what it computes."
        )
    return HeadRanking(
        {layer: (total / batch_size).view(heads, -1).amax(1).tolist() for layer, total in sorted(totals.items())}
    )


def _attend_and_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    columns: torch.Tensor,
    first: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention `[1, N, H, D]` of one row, and the score of every query head `[H]`: the mean weight of attention
    from `columns` to the keys at `first` and behind them."""
    query, key, value = same_size(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, lse = dilated_attention(query, key, value, DilatedPattern.full(), scale=scaling, return_lse=True)
    q, lse = query[0][:, columns].to(lse.dtype), lse[0][:, columns]
    weights = torch.zeros_like(lse)
    for where in (first, first + 1):
        k = key[0][:, where].repeat_interleave(len(q) // key.shape[1], dim=0).to(lse.dtype)
        weights += ((q * k).sum(-1) * scaling - lse).exp()
    return output.transpose(1, 2), weights.mean(1).double().cpu()


@contextlib.contextmanager
def _attention_replaced(model: PreTrainedModel, config: PreTrainedConfig, function: Callable) -> Iterator[None]:
    """Inside, all layers of a model call `function` for their attention."""
    # A LongNet has a table of its own, and so has the copy of its code that came with a model from the Hub
    own = vars(sys.modules[type(model).__module__]).get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    register = AttentionInterface.register if own is ALL_ATTENTION_FUNCTIONS else own.__setitem__
    before, function_before = config._attn_implementation, own[DILATED]
    register(DILATED, function)
    try:
        set_implementation(model, config, DILATED)
        yield
    finally:
        register(DILATED, function_before)
        set_implementation(model, config, before)


__all__ = ["HeadRanking", "rank_heads"]
