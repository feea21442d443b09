"""`attn_implementation="dilated"`: dilated attention in Transformers models of any architecture.

A model keeps its weights, positions, cache and code. Its attention function and mask are exchanged, through the hooks
that Transformers has for that. The pattern lies in the model's configuration, as a dictionary `dilated_attention`.
This module does not travel with weights: whoever loads such a model imports `longnet_hf`.
"""

import contextlib
import copy
import functools
import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import logging

from .batch_layout import AttentionOptions, BatchInputs, BatchLayout, SplitBatch, WholeBatch, new_documents_of
from .context_parallel import ActiveSplit, SplitDocuments, active_split
from .dilated_pattern import DilatedPattern, layer_patterns
from .documents import find_documents, is_packed, running_max
from .hub_longnet import forget_name, with_parts
from .input_checks import check_flag, check_tensor
from .pattern_report import (
    DESCRIBED_LENGTH,
    PatternDescription,
    describe_patterns,
    pattern_warnings,
    sink_warning,
)


logger = logging.get_logger(__name__)

DILATED = "dilated"  # the name of the implementation
_PROBE_LENGTH = 8

# Arguments of an attention function that ask for what the operator does not compute
_NOT_COMPUTED = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "position_bias": "biases by position",
    "head_mask": "a mask of heads",
    "output_attentions": "the weights of attention",
    "cache": "continuous batching",
    "encoder_hidden_states": "attention to the states of an encoder",
    "cu_seqlens": "documents by that name: their boundaries are `cu_seq_lens_q` and `cu_seq_lens_k`",
}


def refuse_what_is_not_computed(kwargs: dict) -> None:
    """Refuse what a model asks an attention function for and no dilated one computes."""
    for name, meaning in _NOT_COMPUTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"Dilated attention does not compute {meaning} (`{name}`), which this call asks for.")


def set_dilated_attention(
    model: PreTrainedModel,
    *,
    segment_lengths: list[int | None],
    dilation_rates: list[int],
    branch_types: list[str] | None = None,
    head_offset: str = "paper",
    segment_shift: bool = False,
    full_attention_layers: list[int] | None = None,
    full_attention_heads: dict[int, list[int]] | None = None,
    sink_tokens: int = 0,
    probe: bool = True,
) -> PreTrainedModel:
    """Exchange the attention of a Transformers model for dilated attention, and note the pattern in its configuration.

    Saved and loaded again, the model has its pattern, wherever `longnet_hf` is imported. It decodes with its ordinary
    cache, which grows with the sequence; a Llama-family model can become a [`LongNetForCausalLM`] in place of that
    (`from_llama`), whose cache does not. Of a model for text and images, the text model is exchanged.

    Args:
        model: any model with self-attention alone whose attention Transformers can exchange; changed in place. Of a
            PEFT model, give the base model.
        segment_lengths, dilation_rates, branch_types, head_offset, segment_shift, full_attention_layers,
        full_attention_heads, sink_tokens: the pattern, as in [`LongNetConfig`].
        probe: run a few tokens through the model, with its own attention and with ours under a pattern that keeps
            everything, and refuse it if ours is not called or the outputs differ. Two packed documents are tried as
            well; a model that mixes them refuses packed rows from then on. Switch it off for a model whose weights are
            not there yet, or whose routing between experts rounding errors may tip.

    Returns:
        `model`.

    Raises:
        ValueError: if the model has anything in its attention that would be lost; it is named. The model is then what
            it was before.

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    >>> window = dict(segment_lengths=[2048], dilation_rates=[1], branch_types=["window"], sink_tokens=4)
    >>> set_dilated_attention(model, **window, full_attention_heads=rank_heads(model, input_ids).best(0.2))
    ```"""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a model of Transformers, got {type(model).__name__}.")
    check_flag("segment_shift", segment_shift)
    check_flag("probe", probe)
    config = model.config.get_text_config()
    check_model(model, config)
    fields = dict(
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        branch_types=branch_types,
        head_offset=head_offset,
        segment_shift=segment_shift,
        full_attention_layers=full_attention_layers,
        full_attention_heads=full_attention_heads,
        sink_tokens=sink_tokens,
    )
    patterns, is_pretrained = _patterns_of(config, fields), bool(model.name_or_path)
    fields = json.loads(json.dumps(fields))  # as a saved configuration has them

    old = getattr(config, "dilated_attention", None)
    _exchange(model, config, old, probe)
    _set_pattern(config, fields)
    _find_patterns(model)
    if old is None or _patterns_of(config, old) != patterns:
        forget_name(model)
        for adapter in getattr(model, "peft_config", {}).values():
            adapter.base_model_name_or_path = None
    for text in pattern_warnings(patterns, num_key_value_heads(config)):
        logger.warning(text)
    context = getattr(config, "max_position_embeddings", None) or DESCRIBED_LENGTH
    text = sink_warning(patterns, num_key_value_heads(config), context)
    if text is not None and is_pretrained and _is_causal(model, config):
        logger.warning_once(text)
    return model


def _is_causal(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    is_causal = getattr(config, "is_causal", None)
    return any(getattr(module, "is_causal", False) for module in model.modules()) if is_causal is None else is_causal


def _exchange(model: PreTrainedModel, config: PreTrainedConfig, old: dict | None, probe: bool) -> None:
    """Let the layers of a model call our attention, and refuse packed rows if it mixes their documents; or leave it
    with the pattern that it had, `old`, if that fails."""
    before, mixing = config._attn_implementation, None
    try:
        if probe:
            mixing = _probe(model, config)
        else:
            set_implementation(model, config, DILATED)
    except Exception:
        _set_pattern(config, None)
        set_implementation(model, config, before)
        _set_pattern(config, old)
        raise
    if mixing:
        config.dilated_attention_mixes = mixing
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                _guard_packing(module)
    elif probe:
        vars(config).pop("dilated_attention_mixes", None)


def describe(model: PreTrainedModel, length: int | None = None) -> PatternDescription:
    """Tell what a model attends to: of every layer and head the branches, pairs per token, the farthest key and the
    keys that a cache has to hold; and what outputs can know through the stack, with blind spots. Reads the
    configuration only.

    Args:
        model: a LongNet, or a model that [`set_dilated_attention`] was given. Its own cache keeps all keys, more than
            `cache_keys` says.
        length: tokens of the sequence; default: the model's context length (`max_position_embeddings`), 32768 at most.
            What is reached takes memory and time that grow with it.

    Returns:
        A description: `print` it, read its fields, or write its `to_dict()` as JSON. Layers without attention that
        can be exchanged (recurrent ones) are left out, also from what is reached.

    Raises:
        ValueError: if the model has no pattern, or one that is not in use (`attn_implementation="sdpa"`), or if
            `length` is no integer of at least 1.

    ```python
    >>> print(describe(LongNetForCausalLM(LongNetConfig()), length=8192))
    ```"""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"`model` must be a model of Transformers, got {type(model).__name__}.")
    config = config.get_text_config()
    fields = getattr(config, "dilated_attention", None)
    if hasattr(config, "layer_patterns"):
        patterns, layers = config.layer_patterns, range(config.num_hidden_layers)
    elif fields is not None and config._attn_implementation in (None, DILATED):
        types = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
        layers = [index for index, kind in enumerate(types) if kind in ("attention", "full_attention")]
        patterns = [_patterns_of(config, fields)[index] for index in layers]
    else:
        raise ValueError(
            "`model` must be a LongNet or have dilated attention (`set_dilated_attention`), and "
            f"{type(model).__name__} has the attention that it came with."
            + (
                f' (Its configuration has a pattern, but `attn_implementation` is "{config._attn_implementation}".)'
                if fields is not None
                else ""
            )
        )
    if length is None:
        length = min(getattr(config, "max_position_embeddings", None) or DESCRIBED_LENGTH, DESCRIBED_LENGTH)
    heads, is_causal = num_key_value_heads(config), _is_causal(model, config)
    return describe_patterns(patterns, heads, length, is_causal=is_causal, layers=layers)


def num_key_value_heads(config: PreTrainedConfig) -> int:
    """Number of key/value heads."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _patterns_of(config: PreTrainedConfig, fields: dict) -> list[DilatedPattern]:
    """The pattern of every layer."""
    return layer_patterns(config.num_hidden_layers, **fields, num_heads=num_key_value_heads(config))


def _set_pattern(config: PreTrainedConfig, fields: dict | None) -> None:
    if fields is not None:
        config.dilated_attention = fields
    else:
        vars(config).pop("dilated_attention", None)


def set_implementation(model: PreTrainedModel, config: PreTrainedConfig, name: str | None) -> None:
    """For the text model alone, if there are others."""
    part = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    model.set_attn_implementation({part[0]: name} if part else name)


def check_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse by its configuration what the operator would get wrong."""
    name = type(model).__name__
    if hasattr(config, "layer_patterns"):
        raise ValueError(f"{name} is dilated already: its pattern is in its configuration.")
    if getattr(config, "vocab_size", None) is None:
        raise ValueError(f"{name} is no model of text: its configuration has no `vocab_size`.")
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"{name} has no attention to exchange: its configuration has no `num_attention_heads`.")
    takes = inspect.signature(model.base_model.forward).parameters
    if "input_ids" not in takes:
        raise ValueError(f"{name} is no model of text: it takes `{next(iter(takes))}` in place of `input_ids`.")
    crossing = [x for x, _ in model.named_modules() if "cross" in x.lower() or x.endswith("encoder_attn")]
    if config.is_encoder_decoder or crossing:
        raise ValueError(f"{name} has cross-attention, which dilated attention has not.")
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None):
        raise ValueError(
            f"{name} has `sliding_window={config.sliding_window}`, which the pattern would replace. To let it, load "
            "the model with a configuration that has none (`sliding_window=None`)."
        )
    limited = {x for x in layer_types or () if "attention" in x} - {"attention", "full_attention", "linear_attention"}
    if limited:
        raise ValueError(
            f"{name} has layers of type {sorted(limited)}, which the pattern would replace. A configuration whose "
            '`layer_types` are "full_attention" there lets it. But in many models (Gemma 3, Cohere 2, EXAONE 4 and '
            "others) the type of a layer chooses its positions, too, and the model would be another one: compare, "
            "before you go on, the outputs with both configurations on a text that is shorter than the window."
        )
    of_types = getattr(config, "rope_parameters", None) or {}
    left = {x for x, parameters in of_types.items() if isinstance(parameters, dict)} - set(layer_types or ())
    if left and layer_types:
        logger.warning(
            f"{name} has positions for layers of type {sorted(left)} (`rope_parameters`), and no such layers "
            "(`layer_types`). If it was trained with them, it is another model now."
        )


@torch.no_grad()
def _probe(model: PreTrainedModel, config: PreTrainedConfig) -> list[str]:
    """Switch the model to our function, and see that it is called and computes what the model's own does. Returns the
    ways of saying where packed documents begin in which the model does not keep them apart."""
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The weights are on the meta device, where they cannot be tried: load them, or `probe=False`."
        )
    ids = torch.arange(1, 1 + _PROBE_LENGTH, device=model.device)[None] % config.vocab_size
    called = set()

    def counted(module, *args, **kwargs):
        called.add(getattr(module, "layer_idx", None))
        return dilated_attention_forward(module, *args, **kwargs)

    _set_pattern(config, None)
    if config._attn_implementation == DILATED:
        set_implementation(model, config, "sdpa" if model._supports_sdpa else "eager")
    with evaluation(model):
        try:
            expected = model.base_model(input_ids=ids, use_cache=False)[0]
        except Exception as error:
            raise ValueError(f"{name} cannot be tried on a few tokens alone: {error}") from error
        _set_pattern(config, dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"]))
        try:
            set_implementation(model, config, DILATED)
        except (KeyError, ValueError) as error:
            raise ValueError(f"The attention of {name} cannot be exchanged: {error}") from error
        AttentionInterface.register(DILATED, counted)
        try:
            output = model.base_model(input_ids=ids, use_cache=False)[0]
        finally:
            AttentionInterface.register(DILATED, dilated_attention_forward)
        mixing = _mixing_packings(model.base_model, ids)
    if not called:
        raise ValueError(
            f"{name} does not call the attention function that is set (`attn_implementation`), and would go on with "
            "its own."
        )
    if len(called) < config.num_hidden_layers:
        logger.warning(
            f"{len(called)} of the {config.num_hidden_layers} layers of {name} are dilated: the others have no "
            "attention that can be exchanged."
        )
    error = _distance(output, expected)
    if not error < _tolerance(expected):
        raise ValueError(
            f"{name} computes something in its attention that dilated attention does not: with a pattern that keeps "
            f"everything its output differs by {error:.1e} of its norm."
        )
    if mixing:
        ways = "; ".join(_PACKINGS[way] for way in mixing)
        logger.warning(f"{name} does not keep packed documents apart by {ways}: it will refuse them.")
    return mixing


def _distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).float().norm() / expected.float().norm())


def _tolerance(expected: torch.Tensor) -> float:
    """Rounding alone gives a few units in the last place; some models compute parts in float32 whatever the dtype."""
    return max(1e-3, 8 * torch.finfo(expected.dtype).eps)


# Ways to say where packed documents begin, and how to give them. Not all models tell their attention all of them.
_PACKINGS = {
    "position_ids": "`position_ids`",
    "position_ids alone": "`position_ids` with `use_cache=False` and without `attention_mask`",
    "cu_seq_lens": "`cu_seq_lens_q` and `cu_seq_lens_k`",
    "boundaries alone": "`cu_seq_lens_q`, `cu_seq_lens_k` or `seq_idx` while `position_ids` go on",
}


def _mixing_packings(model: PreTrainedModel, ids: torch.Tensor) -> list[str]:
    """Try two packed documents in every way. What raises mixes nothing unawares."""
    lengths = 3, _PROBE_LENGTH - 3
    going_on = torch.arange(_PROBE_LENGTH, device=ids.device)[None]
    restarting = torch.cat([going_on[:, :length] for length in lengths], dim=1)
    bounds = torch.tensor([0, lengths[0], _PROBE_LENGTH], dtype=torch.int32, device=ids.device)
    both = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=5, max_length_k=5)
    ways = [
        ("position_ids", restarting, dict(attention_mask=torch.ones_like(ids))),
        ("position_ids alone", restarting, dict(use_cache=False)),
        ("cu_seq_lens", restarting, both),
        ("boundaries alone", going_on, both),
        ("boundaries alone", going_on, dict(seq_idx=(going_on >= lengths[0]).to(torch.int32))),
    ]

    @functools.cache
    def alone(positions: torch.Tensor) -> torch.Tensor:
        documents = zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True)
        return torch.cat([model(input_ids=x, position_ids=p)[0] for x, p in documents], dim=1)

    mixing = []
    for name, positions, given in ways:
        try:
            expected, output = alone(positions), model(input_ids=ids, position_ids=positions, **given)[0]
        except Exception:
            continue
        if name not in mixing and not _distance(output, expected) < _tolerance(expected):
            mixing.append(name)
    return mixing


def _guard_packing(model: PreTrainedModel) -> None:
    """Let a model that mixes packed documents refuse them: its attention is not told that there are several."""
    if not getattr(model, "_guards_packing", False):
        model._guards_packing = True
        model.register_forward_pre_hook(_refuse_mixing, with_kwargs=True)


def _refuse_mixing(model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    parts = [part for part in with_parts(model.config) if part._attn_implementation == DILATED]
    mixing = {name for part in parts for name in getattr(part, "dilated_attention_mixes", ())}
    if not mixing or torch.compiler.is_compiling():
        return
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    position_ids, mask, bounds = (given.get(name) for name in ("position_ids", "attention_mask", "cu_seq_lens_k"))
    bounds = given.get("cu_seq_lens_q") if bounds is None else bounds
    use_cache = given.get("use_cache", getattr(model.config, "use_cache", False))
    name = None
    if bounds is not None and len(bounds) > 2 or is_packed(given.get("seq_idx")):
        name = "boundaries alone"
    if position_ids is not None and position_ids.dim() == 2:
        length = position_ids.shape[1]
        of_new = mask[:, -length:] if torch.is_tensor(mask) and mask.dim() == 2 else None
        rows = len(position_ids if of_new is None else of_new)
        if is_packed(find_documents(rows, length, attention_mask=of_new, position_ids=position_ids)):
            name = "position_ids" if use_cache or mask is not None else "position_ids alone"
            name = name if bounds is None else "cu_seq_lens"
    if name in mixing:
        remedies = [_PACKINGS[other] for other in _PACKINGS if other not in mixing] + ["one document per row"]
        raise ValueError(
            f"{type(model).__name__} with dilated attention does not keep packed documents apart by "
            f"{_PACKINGS[name]}: give {', or '.join(remedies)}."
        )


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def pattern_of(module: torch.nn.Module) -> DilatedPattern:
    """The pattern of an attention module, from its configuration."""
    fields = getattr(module.config, "dilated_attention", None)
    known = vars(module).get("_dilated_pattern")
    if known is None or known[0] != fields:
        known = _find_pattern(module, fields)
    return known[1]


def _find_patterns(model: torch.nn.Module) -> None:
    """Let all modules know their patterns, which `torch.compile` cannot look for."""
    for module in model.modules():
        fields = getattr(getattr(module, "config", None), "dilated_attention", None)
        if fields is not None and getattr(module, "layer_idx", None) is not None:
            pattern_of(module)


@torch.compiler.disable
def _find_pattern(module: torch.nn.Module, fields: dict | None) -> tuple[dict, DilatedPattern]:
    if fields is None:
        raise ValueError(
            f'`attn_implementation="{DILATED}"` needs a pattern, and the configuration of this model '
            f"({type(module.config).__name__}) has none: call `longnet_hf.set_dilated_attention(model, "
            "segment_lengths=..., dilation_rates=...)`."
        )
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"{type(module).__name__} does not know which layer it is in (it has no `layer_idx`).")
    try:
        pattern = _patterns_of(module.config, fields)[module.layer_idx].canonical()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`dilated_attention` of the configuration is {fields!r}, and no pattern: {error}") from error
    module._dilated_pattern = copy.deepcopy(fields), pattern
    return module._dilated_pattern


def dilated_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The function behind `attn_implementation="dilated"`, see Transformers' `AttentionInterface`.

    Args:
        module: an attention module, with `config` and `layer_idx`.
        query: `[B, H, Nq, D]`, the last Nq <= N tokens.
        key: `[B, Hkv, N, D]`, of all tokens, cached ones included.
        value: `[B, Hkv, N, Dv]`.
        attention_mask: documents `[B, 1, 1, N]` from [`dilated_attention_mask`].

    Returns:
        `[B, Nq, H, Dv]`, and `None` for the weights.
    """
    refuse_what_is_not_computed(kwargs)
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if not is_causal and query.shape[2] != key.shape[2]:
        raise ValueError("Dilated attention has no cross-attention, and no cache where it is not causal.")
    pattern = pattern_of(module)
    heads = num_key_value_heads(module.config)
    if key.shape[1] < heads and not pattern.has_equal_heads:
        raise ValueError(
            f"{type(module).__name__} was called with {key.shape[1]} of its {heads} key/value heads. Where heads "
            "are split over processes (tensor parallelism), all must attend alike: every dilation rate must be 1, and "
            "no head may have full attention alone."
        )
    layout = _lay_out(query, key, attention_mask, is_causal, **kwargs)
    scaling, size = query.shape[-1] ** -0.5 if scaling is None else scaling, value.shape[-1]
    options = AttentionOptions(pattern, scaling, dropout)
    output, _ = layout.attend(module, *same_size(query, key, value), options)
    return output[..., :size], None


def _lay_out(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs,
) -> BatchLayout:
    """How the batch of a call lies in its documents, made by the first layer that asks and kept for the others."""
    batch_size, queries, keys = key.shape[0], query.shape[2], key.shape[2]
    documents = unwrap_mask(attention_mask, batch_size, keys)
    bounds = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    split = active_split() or _split_of_checkpoint(position_ids)
    if split is not None:
        if not is_causal or queries != keys:
            raise ValueError(
                "A sequence can be split over processes in causal attention only, without dropout or a cache."
            )
        if position_ids is None:
            raise ValueError(
                "This model does not tell its attention function the `position_ids`, without which the documents of "
                "a sequence that is split over processes are not known."
            )
        told = position_ids, bounds, seq_idx
        documents = _once_per_batch(told, (split, batch_size, queries), _split_documents, *told, batch_size, split)
        return SplitBatch(documents, position_ids)
    of_queries_alone = seq_idx is not None or cu_seq_lens_k is None and cu_seq_lens_q is not None
    if queries != keys and of_queries_alone:
        raise ValueError("`seq_idx` and `cu_seq_lens_q` cannot be given with a cache: they say nothing of its tokens.")
    positions = position_ids if position_ids is not None and position_ids.dim() == 2 and keys > 1 else None
    # Transformers looks for packed documents only where there is neither a mask nor a cache, be it empty
    told, which = (positions, bounds, seq_idx), (batch_size, keys, key.device)
    if queries != keys and bounds is None:
        if positions is not None and not torch.compiler.is_compiling():
            _once_per_batch((attention_mask, *told), which, _check_continuation, positions, documents, keys)
    elif any(x is not None for x in told):
        told = told if queries == keys else (None, bounds, None)  # of all keys
        documents = _once_per_batch((attention_mask, *told), which, _find_documents, *told, documents, *which)
    return WholeBatch(documents, is_causal)


def unwrap_mask(attention_mask: torch.Tensor | None, batch_size: int, keys: int) -> torch.Tensor | None:
    """`[B, 1, 1, N]` -> `[B, N]`"""
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.int32 or attention_mask.dim() != 4:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}. Dilated attention takes padding masks, given "
            "to the model in two dimensions: the pattern decides who attends to whom."
        )
    if attention_mask.shape[-1] == 0:
        raise ValueError(
            "This layer asks for a mask that does more than to hide later tokens and to keep documents apart (a "
            "sliding window, chunks, blocks that see each other both ways). Dilated attention would not honour it."
        )
    if attention_mask.shape != (batch_size, 1, 1, keys):
        raise ValueError(
            f"`attention_mask` must have shape {(batch_size, keys)} (batch, cached and new tokens), got "
            f"{(attention_mask.shape[0], attention_mask.shape[-1])}."
        )
    return attention_mask[:, 0, 0]


def same_size(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Heads of one size: zeros change neither scores nor outputs. Multi-head latent attention has smaller values."""
    size = max(x.shape[-1] for x in tensors)
    return (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in tensors)


# What the first layer finds out of a batch, for the others
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once_per_batch(told: tuple[torch.Tensor | None, ...], which: tuple, function: Callable, *args):
    """`function(*args)`, kept as long as the first tensor of `told` lives, for calls with these tensors, as they are,
    and `which`."""
    tensors = [x for x in told if x is not None]
    if torch.compiler.is_compiling() or any(x.is_inference() for x in tensors):
        return function(*args)
    first, *others = tensors
    key = *which, *(None if x is None else x._version for x in told)
    known = _found.get(first)
    if known is None or known[0] != key or any(x is not y() for x, y in zip(others, known[1], strict=True)):
        known = _found[first] = key, [weakref.ref(x) for x in others], function(*args)
    return known[2]


# The split that positions are of
_split_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _split_of_checkpoint(position_ids: torch.Tensor | None) -> ActiveSplit | None:
    """The split of a layer that is computed again for the backward pass: behind `split_sequence`, or in a thread that
    knows nothing of it."""
    is_again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return _split_of.get(position_ids) if is_again and position_ids is not None else None


def _split_documents(
    position_ids: torch.Tensor,
    bounds: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    batch_size: int,
    split: ActiveSplit,
) -> SplitDocuments:
    _split_of[position_ids] = split
    of_sequence = split.sequence(position_ids.shape[1], position_ids.device)
    if bounds is None and seq_idx is None and split.world_size > 1:
        count = torch.arange(position_ids.shape[1], device=position_ids.device)
        if split.all_agree(bool((position_ids == count).all()), position_ids.device):
            raise ValueError(
                "`position_ids` count from 0 on every process that shares a sequence, as those do that a model makes "
                "by itself: give them, those of the whole sequence (`SequenceSplit.positions()`), or, where each "
                "process has a document of its own, `seq_idx`."
            )
    return of_sequence.find_documents(batch_size, position_ids=position_ids, cu_seq_lens=bounds, seq_idx=seq_idx)


def _find_documents(
    position_ids: torch.Tensor | None,
    bounds: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    documents: torch.Tensor | None,
    batch_size: int,
    keys: int,
    device: torch.device,
) -> torch.Tensor | None:
    """The documents of a batch, by all that is told of them; `documents` are those of the mask."""
    if seq_idx is not None:
        check_tensor("seq_idx", seq_idx, "integers", batch_size, keys)
    real = None if documents is None else documents >= 0
    found = new_documents_of(BatchInputs(batch_size, keys, device, real, position_ids, bounds, seq_idx))
    if documents is None or found is None or seq_idx is not None:
        return documents if found is None else found
    return (found + documents).masked_fill(~real, -1)


def _check_continuation(position_ids: torch.Tensor, documents: torch.Tensor | None, keys: int) -> None:
    """Refuse rows whose last position is less than that of their last token."""
    last, count = position_ids, keys
    if documents is not None:  # tokens of padding have any position
        is_new = documents[:, -position_ids.shape[1] :] >= 0
        last, count = position_ids.masked_fill(~is_new, -1), (documents >= 0).sum(1)
        last = last.where(is_new.any(1, keepdim=True), keys)
    if bool((last.amax(1) + 1 < count).any()):
        raise ValueError(
            f"`position_ids` end at {int(last.amax(1).min())}, and the cache and the new tokens are {keys}. "
            "Packed documents cannot be continued from a cache, nor can rows that are padded on the right."
        )


def dilated_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """What `attn_implementation="dilated"` takes for a mask, see Transformers' `AttentionMaskInterface`.

    Args:
        mask_function: says of any query and key whether they are joined; it may only keep documents apart.
        attention_mask: `[B, N]`, nonzero at real tokens.

    Returns:
        int32 `[B, 1, 1, N]`: the document of every token, numbered in each row, and -1 at padding. (Of four
        dimensions, since models take two for a padding mask to make another mask of.) `None` if every row is one
        document without padding. Empty, `[B, 1, 1, 0]`, if the mask asks for anything else: many models make masks
        that no layer uses, so that it is for the layer to refuse it.

    Raises:
        ValueError: if a cache does not hold all keys.
    """
    if torch.is_tensor(q_offset) or kv_offset != 0 or kv_length != q_offset + q_length:
        raise ValueError(
            'Dilated attention takes a cache that holds all keys and nothing else (`cache_implementation="dynamic"`): '
            "static and sliding-window caches are not supported, nor any in a model that is not causal."
        )
    if active_split() is not None:
        if attention_mask is not None:
            raise ValueError(
                "`attention_mask` cannot be given for a sequence that is split over processes. Pad on the right, "
                "which needs no mask, and use `ContextParallelTrainerMixin` with Trainer."
            )
        return None  # attention finds the documents itself, together with the other processes
    documents = None
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        is_causal = "allow_is_bidirectional_skip" not in kwargs
        documents = _documents_of(mask_function, is_causal, batch_size, kv_length, q_offset, use_vmap, device)
        if documents is None:
            return torch.empty(batch_size, 1, 1, 0, dtype=torch.int32, device=device)
    real = None
    if attention_mask is not None:
        real = attention_mask != 0
        if not torch.compiler.is_compiling() and real.shape[-1] == kv_length and bool(real.all()):
            real = None
    if real is not None:
        documents = torch.zeros_like(real, dtype=torch.int32) if documents is None else documents
        documents = documents.masked_fill(~real, -1)
    return None if documents is None else documents[:, None, None]


def _documents_of(
    mask_function, is_causal: bool, batch_size: int, length: int, q_offset: int, use_vmap: bool, device
) -> torch.Tensor | None:
    """The documents that a mask keeps apart, from a few of its entries per token; `None` if it does anything else."""
    if use_vmap:  # a function of the user's, which may not take tensors
        return None
    row = torch.arange(batch_size, device=device)[:, None]
    index = torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    size = batch_size, length - 1
    sees_last = mask_function(row, head, index[:, 1:], index[:, :-1]).expand(size)
    sees_next = mask_function(row, head, index[:, :-1], index[:, 1:]).expand(size)
    starts = F.pad(~sees_last, (1, 0))
    first = running_max(index.masked_fill(~starts, 0))
    sees_first = mask_function(row, head, index.expand(batch_size, -1), first).expand(batch_size, length)
    is_whole = sees_first[:, q_offset:].all()
    is_whole &= ~sees_next.any() if is_causal else (sees_next == sees_last).all()
    if torch.compiler.is_compiling():
        torch._assert_async(is_whole, "a mask does more than to keep documents apart, see `dilated_attention_mask`")
    elif not bool(is_whole):
        return None
    return starts.cumsum(1, dtype=torch.int32)


class ContextParallelTrainerMixin:
    """Lets Trainer split the sequences of a model with `attn_implementation="dilated"` over processes.

    Put it before `Trainer`, or any class made from it, and configure it as for a LongNet (`ParallelismConfig(cp_size=
    ...)` and FSDP2). Trainer itself allows context parallelism for one name of attention only.

    ```python
    >>> class SplitTrainer(ContextParallelTrainerMixin, Trainer):
    ...     pass
    ```"""

    def _prepare_context_parallel_inputs(self, model, inputs):
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        config = self.accelerator.unwrap_model(model).config
        if parallelism is None or not parallelism.cp_enabled or config._attn_implementation != DILATED:
            return super()._prepare_context_parallel_inputs(model, inputs)
        for name in ("label_smoother", "compute_loss_func"):
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"Trainer's `{name}` takes labels for those of a whole sequence, and cannot be used for one that "
                    "is split over processes."
                )
        mask = inputs.pop("attention_mask", None)  # which says nothing of tokens before it
        if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] > mask[:, :-1]).any())):
            raise ValueError(
                "`attention_mask` of a sequence that is split over processes may have padding on the right only: set "
                '`tokenizer.padding_side = "right"`.'
            )
        config._attn_implementation = "sdpa"
        try:
            return super()._prepare_context_parallel_inputs(model, inputs)
        finally:
            config._attn_implementation = DILATED

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer keeps the loss of a process or two for the last batch: all have that of the whole sequence."""
        mesh = self.accelerator.torch_device_mesh
        is_split = mesh is not None and "cp" in (mesh.mesh_dim_names or ())
        if is_split and not prediction_loss_only:
            raise ValueError(
                "Trainer cannot put the predictions of a sequence together that is split over processes (`predict`, "
                "`compute_metrics`): set `prediction_loss_only=True`, or predict without `cp_size`."
            )
        loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and is_split:
            group = mesh["cp"].get_group()
            torch.distributed.all_reduce(loss, group=group)
            loss /= torch.distributed.get_world_size(group)
        return loss, *others


def _write_implementation(to_dict: Callable) -> Callable:
    """`PreTrainedConfig.to_dict`, which also writes the name of the implementation where it is ours.

    Transformers reads this name in a configuration, but neither writes it nor has a hook for it; without it, a dilated
    model would come back dense. A model that was made dense again has no pattern any more, with which it would come
    back dilated. The dictionaries of all other models stay what they are.
    """

    @functools.wraps(to_dict)
    def wrapped(self) -> dict[str, Any]:
        output, parts = to_dict(self), {key: getattr(self, key, None) for key in self.sub_configs}
        dilated = [key for key, x in parts.items() if getattr(x, "_attn_implementation", None) == DILATED]
        if self._attn_implementation == DILATED:
            output["attn_implementation"] = DILATED
        elif dilated:
            output["attn_implementation"] = dict.fromkeys(dilated, DILATED)
        if self._attn_implementation not in (None, DILATED):
            output.pop("dilated_attention", None)
        return output

    wrapped.writes_dilated = True
    return wrapped


def _guard_loaded(post_init: Callable) -> Callable:
    """`PreTrainedModel.post_init`, after which layers know their patterns, and a model whose configuration says that
    it mixes documents refuses them: what `set_dilated_attention` found out also holds for what is loaded again."""

    @functools.wraps(post_init)
    def wrapped(self, *args, **kwargs):
        post_init(self, *args, **kwargs)
        parts = with_parts(self.config)
        if any(hasattr(part, "dilated_attention") for part in parts):
            _find_patterns(self)
        if any(hasattr(part, "dilated_attention_mixes") for part in parts):
            _guard_packing(self)

    wrapped.guards_packing = True
    return wrapped


def _choose_dilated(check: Callable) -> Callable:
    """`PreTrainedModel._check_and_adjust_attn_implementation`, which chooses ours where nobody chose and there is a
    pattern: many tools give `attn_implementation=None`, which takes away what the configuration says. Whoever does
    choose another is told that it is dense."""

    @functools.wraps(check)
    def wrapped(self, attn_implementation, *args, **kwargs):
        if getattr(self.config, "dilated_attention", None) is not None:
            attn_implementation = DILATED if attn_implementation is None else attn_implementation
            if attn_implementation != DILATED:
                logger.warning(
                    f"{type(self).__name__} has a pattern of dilated attention in its configuration, and will compute "
                    f'full attention: `attn_implementation="{attn_implementation}"`. Give "{DILATED}", or nothing, '
                    "for the model as it was saved."
                )
        return check(self, attn_implementation, *args, **kwargs)

    wrapped.chooses_dilated = True
    return wrapped


AttentionInterface.register(DILATED, dilated_attention_forward)
AttentionMaskInterface.register(DILATED, dilated_attention_mask)
if not getattr(PreTrainedConfig.to_dict, "writes_dilated", False):  # a second import must not wrap it twice
    PreTrainedConfig.to_dict = _write_implementation(PreTrainedConfig.to_dict)
if not getattr(PreTrainedModel.post_init, "guards_packing", False):
    PreTrainedModel.post_init = _guard_loaded(PreTrainedModel.post_init)
if not getattr(PreTrainedModel._check_and_adjust_attn_implementation, "chooses_dilated", False):
    _check = _choose_dilated(PreTrainedModel._check_and_adjust_attn_implementation)
    PreTrainedModel._check_and_adjust_attn_implementation = _check

__all__ = ["ContextParallelTrainerMixin", "describe", "set_dilated_attention"]
