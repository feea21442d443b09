"""`attn_implementation="dilated"`: dilated attention in Transformers models of any architecture.

A model keeps its weights, positions, cache and code. Its attention function and mask are exchanged, through the hooks
that Transformers has for that. The pattern lies in the model's configuration, as a dictionary `dilated_attention`.
This module does not travel with weights: whoever loads such a model imports `longnet_hf`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import logging

from .context_parallel import ActiveSplit, SplitBatch, active_split, is_distributed, split_attention
from .dilated_operator import dilated_attention, find_documents
from .dilated_pattern import DilatedPattern, layer_patterns, pattern_warnings


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
    "cache": "continuous batching",
}


def set_dilated_attention(
    model: PreTrainedModel,
    *,
    segment_lengths: list[int | None],
    dilation_rates: list[int],
    branch_types: list[str] | None = None,
    head_offset: str = "paper",
    segment_shift: bool = False,
    full_attention_layers: list[int] | None = None,
    probe: bool = True,
) -> PreTrainedModel:
    """Exchange the attention of a Transformers model for dilated attention, and note the pattern in its configuration.

    Saved and loaded again, the model has its pattern, wherever `longnet_hf` is imported. It decodes with its ordinary
    cache, which grows with the sequence; a Llama-family model can become a [`LongNetForCausalLM`] in place of that
    (`from_llama`), whose cache does not.

    Args:
        model: any model with self-attention alone whose attention Transformers can exchange; changed in place. Of a
            PEFT model, give the base model.
        segment_lengths, dilation_rates, branch_types, head_offset, segment_shift, full_attention_layers: the pattern,
            as in [`LongNetConfig`].
        probe: run a few tokens through the model, with its own attention and with ours under a pattern that keeps
            everything, and refuse it if ours is not called or the outputs differ. Switch it off for a model whose
            weights are not there yet, or whose routing between experts rounding errors may tip.

    Returns:
        `model`.

    Raises:
        ValueError: if the model has anything in its attention that would be lost; it is named. The model is then what
            it was before.

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    >>> set_dilated_attention(model, segment_lengths=[2048, 8192, 32768], dilation_rates=[1, 4, 16])
    ```"""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a model of Transformers, got {type(model).__name__}.")
    config = model.config.get_text_config()
    _check_model(model, config)
    fields = dict(
        segment_lengths=list(segment_lengths),
        dilation_rates=list(dilation_rates),
        branch_types=branch_types and list(branch_types),
        head_offset=head_offset,
        segment_shift=segment_shift,
        full_attention_layers=full_attention_layers and list(full_attention_layers),
    )
    patterns = layer_patterns(config.num_hidden_layers, **fields)

    before, old = model.config._attn_implementation, getattr(config, "dilated_attention", None)
    try:
        if probe:
            _probe(model, config)
        else:
            model.set_attn_implementation(DILATED)
    except Exception:
        model.set_attn_implementation(before)
        _set_pattern(config, old)
        raise
    _set_pattern(config, fields)
    _note_implementation(model.config)
    if fields != old:
        # PEFT would write the model's name into adapters, and load them on what is saved there
        model.name_or_path = None
    for text in pattern_warnings(patterns, getattr(config, "num_key_value_heads", config.num_attention_heads)):
        logger.warning(text)
    return model


def _set_pattern(config: PreTrainedConfig, fields: dict | None) -> None:
    if fields is not None:
        config.dilated_attention = fields
        return
    for name in ("dilated_attention", "attn_implementation"):
        vars(config).pop(name, None)


def _note_implementation(config: PreTrainedConfig) -> None:
    """Transformers does not save the name of an implementation, but reads it: so a model that was saved dilated does
    not come back dense."""
    if getattr(config, "attn_implementation", None) != DILATED:
        config.attn_implementation = DILATED


def _check_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse by its configuration what the operator would get wrong."""
    name = type(model).__name__
    if hasattr(config, "layer_patterns"):
        raise ValueError(f"{name} is dilated already: its pattern is in its configuration.")
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder with a decoder, and dilated attention has no cross-attention.")
    layer_types = getattr(config, "layer_types", None)
    sliding_window = getattr(config, "sliding_window", None) if layer_types is None else None
    others = set(layer_types or ()) - {"full_attention"}
    if sliding_window or others:
        kinds = f"layers of type {sorted(others)}" if others else f"`sliding_window={sliding_window}`"
        raise ValueError(
            f"{name} has {kinds}, which the pattern would replace. To let it, load the model with a configuration "
            'that has full attention only (`sliding_window=None`, `layer_types` of "full_attention").'
        )


@torch.no_grad()
def _probe(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Switch the model to our function, and see that it is called and computes what the model's own does."""
    name, training = type(model).__name__, model.training
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The weights are on the meta device, where they cannot be tried: load them, or `probe=False`."
        )
    ids = torch.arange(1, 1 + _PROBE_LENGTH, device=model.device)[None] % config.vocab_size
    called = set()

    def counted(module, *args, **kwargs):
        called.add(module.layer_idx)
        return dilated_attention_forward(module, *args, **kwargs)

    if model.config._attn_implementation == DILATED:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.eval()
    try:
        expected = model.base_model(input_ids=ids, use_cache=False)[0]
        _set_pattern(config, dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"]))
        try:
            model.set_attn_implementation(DILATED)
        except (KeyError, ValueError) as error:
            raise ValueError(f"The attention of {name} cannot be exchanged: {error}") from error
        AttentionInterface.register(DILATED, counted)
        output = model.base_model(input_ids=ids, use_cache=False)[0]
    finally:
        AttentionInterface.register(DILATED, dilated_attention_forward)
        model.train(training)
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
    # Rounding alone gives a few units in the last place; some models compute parts in float32 whatever their dtype
    error = (output - expected).float().norm() / expected.float().norm()
    if not error < max(1e-3, 8 * torch.finfo(expected.dtype).eps):
        raise ValueError(
            f"{name} computes something in its attention that dilated attention does not: with a pattern that keeps "
            f"everything its output differs by {error:.1e} of its norm."
        )


@torch.compiler.disable
def pattern_of(module: torch.nn.Module) -> DilatedPattern:
    """The pattern of an attention module, from its configuration."""
    fields = getattr(module.config, "dilated_attention", None)
    if fields is None:
        raise ValueError(
            f'`attn_implementation="{DILATED}"` needs a pattern, and the configuration of this model '
            f"({type(module.config).__name__}) has none: call `longnet_hf.set_dilated_attention(model, "
            "segment_lengths=..., dilation_rates=...)`."
        )
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"{type(module).__name__} does not know its layer (`layer_idx`).")
    _note_implementation(module.config)  # which loading takes away
    values = tuple((name, tuple(x) if isinstance(x, list) else x) for name, x in fields.items())
    return _layer_patterns(module.config.num_hidden_layers, values)[module.layer_idx]


@functools.lru_cache(maxsize=64)
def _layer_patterns(num_layers: int, fields: tuple[tuple[str, Any], ...]) -> list[DilatedPattern]:
    return [pattern.canonical() for pattern in layer_patterns(num_layers, **dict(fields))]


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
        key, value: `[B, Hkv, N, D]`, of all tokens, cached ones included.
        attention_mask: documents `[B, N]` from [`dilated_attention_mask`].

    Returns:
        `[B, Nq, H, D]`, and `None` for the weights.
    """
    for name, meaning in _NOT_COMPUTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"Dilated attention does not compute {meaning} (`{name}`), which this model asks for.")
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.int32):
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}. Dilated attention takes padding masks, given "
            "to the model in two dimensions: the pattern decides who attends to whom."
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not is_causal and query.shape[2] != key.shape[2]:
        raise ValueError("Dilated attention has no cross-attention, and no cache where it is not causal.")
    pattern, position_ids = pattern_of(module), kwargs.get("position_ids")
    split = active_split() if is_distributed() else None
    if split is None:
        options = dict(is_causal=is_causal, scale=scaling, dropout=dropout)
        if attention_mask is None and kwargs.get("cu_seq_lens_k") is not None:
            options["cu_seq_lens"] = kwargs["cu_seq_lens_k"]
        elif position_ids is not None and position_ids.dim() == 2 and 1 < query.shape[2] == key.shape[2]:
            # Transformers finds packed documents only where there is neither a mask nor an empty cache
            given, shape = position_ids if attention_mask is None else attention_mask, (key.shape[0], key.shape[2])
            options["document_ids"] = _once(given, shape, _documents, attention_mask, position_ids, *shape)
        else:
            options["document_ids"] = attention_mask
        return dilated_attention(query, key, value, pattern, **options).transpose(1, 2), None
    if not is_causal or dropout > 0 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "A sequence can be split over processes in causal attention only, without dropout and without a cache."
        )
    if position_ids is None:
        raise ValueError(
            "This model does not tell its attention function the `position_ids`, without which the documents of a "
            "sequence that is split over processes are not known."
        )
    shape = query.shape[0], query.shape[2]
    batch = _once(position_ids, (split, *shape), _split_documents, split, *shape, position_ids)
    return split_attention(query, key, value, pattern, batch, scaling).transpose(1, 2), None


# Every layer asks for the documents of one batch
_known = WeakTensorKeyDictionary()


def _once(tensor: torch.Tensor, key: tuple, function: Callable, *args):
    """`function(*args)`, kept as long as `tensor` lives and stays what it is."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return function(*args)
    key = tensor._version, *key
    if tensor not in _known or _known[tensor][0] != key:
        _known[tensor] = key, function(*args)
    return _known[tensor][1]


def _split_documents(split: ActiveSplit, batch_size: int, length: int, position_ids: torch.Tensor) -> SplitBatch:
    return split.sequence(length, position_ids.device).find_documents(batch_size, position_ids=position_ids)


def _documents(mask: torch.Tensor | None, position_ids: torch.Tensor, batch_size: int, length: int):
    if mask is not None and not torch.compiler.is_compiling() and bool((mask > 0).any()):
        return mask  # which keeps documents apart already
    real = None if mask is None else mask >= 0
    return find_documents(batch_size, length, attention_mask=real, position_ids=position_ids)


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
        int32 `[B, N]`: the document of every token, numbered in each row, and -1 at padding. `None` if every row is
        one document without padding.

    Raises:
        ValueError: if the mask, or a cache that does not hold all keys, asks for anything else.
    """
    if torch.is_tensor(q_offset) or kv_offset != 0 or kv_length != q_offset + q_length:
        raise ValueError(
            'Dilated attention takes a cache that holds all keys and nothing else (`cache_implementation="dynamic"`): '
            "static and sliding-window caches are not supported."
        )
    if is_distributed() and active_split() is not None:
        if attention_mask is not None:
            raise ValueError(
                "`attention_mask` cannot be given for a sequence that is split over processes. Pad on the right, "
                "which needs no mask, and use `ContextParallelTrainerMixin` with Trainer."
            )
        return None  # attention finds the documents itself, together with the other processes
    real = None
    if attention_mask is not None:
        real = attention_mask[:, :kv_length] != 0
        if not torch.compiler.is_compiling() and bool(real.all()):
            real = None
    documents = None
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        documents = _documents_of(mask_function, batch_size, kv_length, q_offset, use_vmap, device)
    if real is None:
        return documents
    documents = torch.zeros_like(real, dtype=torch.int32) if documents is None else documents
    return documents.masked_fill(~real, -1)


def _documents_of(mask_function, batch_size, length, q_offset, use_vmap, device) -> torch.Tensor:
    """The documents that a mask keeps apart, from a few of its entries per token."""
    if not use_vmap:
        row = torch.arange(batch_size, device=device)[:, None]
        index = torch.arange(length, device=device)[None]
        head = torch.zeros((), dtype=torch.int64, device=device)
        size = batch_size, length - 1
        sees_last = mask_function(row, head, index[:, 1:], index[:, :-1]).expand(size)
        sees_next = mask_function(row, head, index[:, :-1], index[:, 1:]).expand(size)
        starts = torch.nn.functional.pad(~sees_last, (1, 0))
        first = index.masked_fill(~starts, 0).cummax(dim=1).values
        sees_first = mask_function(row, head, index.expand(batch_size, -1), first).expand(batch_size, length)
        is_whole = sees_first[:, q_offset:].all() & (~sees_next.any() | (sees_next == sees_last).all())
        if torch.compiler.is_compiling() or bool(is_whole):
            return starts.cumsum(1, dtype=torch.int32)
    raise ValueError(
        "This model asks for a mask that does more than to keep documents apart and later tokens hidden (a sliding "
        "window, chunks, blocks that see each other both ways). Dilated attention would not honour it."
    )


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

    def prediction_step(self, *args, **kwargs):
        """Trainer keeps the loss of a process or two for the last batch: all have that of the whole sequence."""
        loss, *others = super().prediction_step(*args, **kwargs)
        mesh = self.accelerator.torch_device_mesh
        if loss is not None and mesh is not None and "cp" in (mesh.mesh_dim_names or ()):
            group = mesh["cp"].get_group()
            torch.distributed.all_reduce(loss, group=group)
            loss /= torch.distributed.get_world_size(group)
        return loss, *others


AttentionInterface.register(DILATED, dilated_attention_forward)
AttentionMaskInterface.register(DILATED, dilated_attention_mask)

__all__ = ["ContextParallelTrainerMixin", "set_dilated_attention"]
