"""What a caller may give for a tensor or a number, which arguments a model takes, and what is said otherwise: the
argument, what was given, and what is accepted. What is wrong here would be ignored, mixed up, truncated or inverted
without a word, or end deep inside.

Shapes are looked at always. Numbers in a tensor only where that does not wait for a GPU, or where the dtype is a rare
one, and not under `torch.compile`.
"""

import math
import numbers

import torch
from transformers import PreTrainedConfig


_KINDS = {
    "numbers": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "integers": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "token ids": (torch.int64, torch.int32),
}
_KINDS["numbers or integers"] = (*_KINDS["numbers"], *_KINDS["integers"])
_KINDS["zeros and ones"] = (torch.bool, *_KINDS["numbers or integers"])


def _describe(x) -> str:
    """What a caller gave, in a few words."""
    if torch.is_tensor(x):
        return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    text = repr(x)
    return f"{text if len(text) < 40 else '...'} ({type(x).__name__})"


def check_tensor(name: str, x, kind: str, *sizes: int | str) -> None:
    """Refuse what is no dense tensor of a `kind` and shape; of a size that is a letter, any will do."""
    is_kind = torch.is_tensor(x) and x.dtype in _KINDS[kind] and x.layout == torch.strided
    fits = is_kind and (
        len(sizes) == 0  # which `torch.compile` can tell of sizes that it does not know
        or x.dim() == len(sizes)
        and all(isinstance(size, str) or size == actual for size, actual in zip(sizes, x.shape, strict=True))
    )
    if not fits:
        shape = f"of shape [{', '.join(map(str, sizes))}], " if sizes else ""
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS[kind])
        raise ValueError(f"`{name}` must be {shape}a tensor of {kind} ({dtypes}), got {_describe(x)}.")


def check_number(
    name: str, x, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> None:
    """Refuse what is no finite number within bounds, bool and tensors among it."""
    is_number = isinstance(x, numbers.Real) and not isinstance(x, bool)
    if not is_number or not (above < x < below and at_least <= x):  # infinite bounds are excluded, and so is NaN
        bounds = [f"above {above}"] * (above > -math.inf) + [f"of at least {at_least}"] * (at_least > -math.inf)
        bounds += [f"below {below}"] * (below < math.inf)
        raise ValueError(f"`{name}` must be a number {' and '.join([*bounds, 'finite'])}, got {x!r}.")


def check_integer(name: str, x, *, at_least: int, at_most: int | None = None, or_none: bool = False) -> None:
    """Refuse what is no int within bounds, bool among it."""
    if x is None and or_none:
        return
    if isinstance(x, bool) or not isinstance(x, int) or x < at_least or (at_most is not None and x > at_most):
        bounds = f"of at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
        raise ValueError(f"`{name}` must be an integer {bounds}{', or None' if or_none else ''}, got {x!r}.")


def check_flag(name: str, x) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"`{name}` must be True or False, got {_describe(x)}.")


def check_mask(name: str, mask) -> None:
    """Refuse what is no padding mask. Floats may be one, but are looked at: added to scores, as other models have
    them, a mask would mean the contrary."""
    check_tensor(name, mask, "zeros and ones")
    if not mask.is_floating_point() or torch.compiler.is_compiling():
        return
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"`{name}` must be 1 at real tokens and 0 at padding, got {_describe(mask)} with numbers from "
            f"{float(mask.min())} to {float(mask.max())}. A mask that is added to scores (0 and -inf) says the "
            "contrary."
        )


def check_ids(name: str, ids, vocab_size: int) -> None:
    """Refuse what are no token ids `[B, N]` of at least one row and token."""
    check_tensor(name, ids, "token ids", "B", "N")
    check_not_empty(name, ids)
    _check_range(name, ids, vocab_size, "`vocab_size`")


def check_embeds(name: str, embeds, hidden_size: int) -> None:
    """Refuse what are no embeddings `[B, N, hidden_size]` of at least one row and token."""
    check_tensor(name, embeds, "numbers", "B", "N", hidden_size)
    check_not_empty(name, embeds)


def check_labels(
    name: str, labels, num_classes: int, sizes: tuple[int, ...], ignore_index: int = -100
) -> torch.Tensor:
    """Refuse what are no labels of a shape, each a class or `ignore_index`; returns them in int64."""
    check_tensor(name, labels, "integers", *sizes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(name, labels[labels != ignore_index], num_classes, "the number of classes", ignore_index)
    return labels.long()


def resolve_indices(name: str, indices: torch.Tensor, length: int, bounds: str) -> torch.Tensor:
    """Indices `[R]`, some of which may count from the end of `length`, all from 0 on; `bounds` says where they lie."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"`{name}` must be integers of shape [R], got {indices.dtype} {tuple(indices.shape)}.")
    if bool(((indices < -length) | (indices >= length)).any()):
        raise ValueError(f"`{name}` must lie {bounds}, got {indices.tolist()}.")
    return indices % length


def check_not_empty(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor `[B, N, ...]` without rows or tokens."""
    for size, what in zip(x.shape[:2], ("row", "token per row"), strict=True):
        if size == 0:
            raise ValueError(f"`{name}` must hold at least one {what}, got shape {tuple(x.shape)}.")


def _check_range(name: str, x: torch.Tensor, stop: int, meaning: str, other: int | None = None) -> None:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return
    smallest, largest = x.aminmax()
    if smallest < 0 or largest >= stop:
        others = "" if other is None else f", or be {other}"
        raise ValueError(
            f"`{name}` must lie from 0 to below {meaning} ({stop}){others}, got numbers from {int(smallest)} to "
            f"{int(largest)}."
        )


# Arguments that models of Transformers take beside those that ours name. The first are honoured, the others say
# nothing that is not known otherwise: what a loss is divided by (to a model without one), positions in a cache, sizes
# of documents beside their boundaries, and what decorators of Transformers read.
TAKEN_ARGUMENTS = {
    *("is_causal", "attention_rows", "output_attentions", "output_hidden_states"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"),
    *("use_cache", "num_items_in_batch", "cache_position", "max_length_q", "max_length_k"),
    *("debug_io", "debug_io_dir", "prune_layers"),
}
_INSTEAD = {
    "cu_seqlens": " Give `cu_seq_lens_q` and `cu_seq_lens_k`.",
    "encoder_hidden_states": " It has no cross-attention.",
    "labels": " Only models with a head have a loss.",
    "shift_labels": " Only a causal language model can have its sequences split over processes.",
    "sliding_window": ' Say it with the pattern: `branch_types=["window"]` in the configuration.',
    "token_type_ids": " Its tokens have no types: call the tokenizer with `return_token_type_ids=False`.",
}


def check_arguments(kwargs: dict, config: PreTrainedConfig, attention_rows: torch.Tensor | None = None) -> None:
    """Refuse what a caller asks for and no LongNet does, in place of going on without it.

    `None` and `False` ask for nothing, nor do token types that are all 0, which some tokenizers give with every text.
    """
    wants_attentions = kwargs.get("output_attentions", config.output_attentions)
    if wants_attentions and attention_rows is None and config._attn_implementation != "eager":
        raise ValueError(
            "`output_attentions=True` needs the weights of attention, which the operator never holds: load the model "
            'with `attn_implementation="eager"`, or call `model.set_attn_implementation("eager")`; or ask for those '
            "of some tokens with `attention_rows`."
        )
    for name, value in kwargs.items():
        if value is None or value is False or name in TAKEN_ARGUMENTS:
            continue
        if name != "token_type_ids" or torch.compiler.is_compiling() or bool((value != 0).any()):
            raise ValueError(f"LongNet does not take `{name}`, got {_describe(value)}.{_INSTEAD.get(name, '')}")


def is_captured(device: torch.device) -> bool:
    """Whether what happens on a GPU goes into a CUDA graph (not looked at under `torch.compile`, which would compile
    anew for the answer)."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, reason: str) -> None:
    """A CUDA graph would hold what was so when it was captured, whatever its tensors hold when it is replayed."""
    if is_captured(device):
        raise RuntimeError(f"A CUDA graph is being captured with dilated attention {reason}")


__all__ = [
    "TAKEN_ARGUMENTS", "check_arguments", "check_embeds", "check_flag", "check_ids", "check_integer", "check_labels",
    "check_mask", "check_not_empty", "check_number", "check_tensor", "is_captured", "refuse_capture",
    "resolve_indices",
]  # fmt: skip
