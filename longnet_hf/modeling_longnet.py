"""PyTorch LongNet: a Transformers decoder (or encoder) whose attention is dilated.

Reads from top to bottom like any model of Transformers: rotary positions, attention, MLP, layer, model, heads.
"""

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .batch_layout import (
    CACHE,
    AttentionOptions,
    BatchInputs,
    BatchLayout,
    check_cache,
    is_exporting,
    lay_out_batch,
    one_cache,
)
from .configuration_longnet import LongNetConfig
from .context_parallel import active_split
from .dilated_cache import DilatedCache, is_dilated_cache
from .dilated_pattern import DilatedPattern
from .documents import find_documents, is_packed
from .generation_longnet import LongNetGenerationMixin, ReadingMixin
from .hub_longnet import MODEL_CLASSES, HubMixin, forget_name
from .input_checks import (
    TAKEN_ARGUMENTS,
    check_arguments,
    check_embeds,
    check_flag,
    check_ids,
    check_labels,
    check_tensor,
    resolve_indices,
)
from .operators import is_watched
from .pattern_report import sink_warning
from .pointwise import RMSNorm, activate, is_plain, rotate
from .recompute import has_room_for, in_chunks
from .token_loss import TokenLossMixin, keep_positions, labels_of_next, loss_divisor, without_padding
from .torchscale_weights import config_fields, read_checkpoint, rename_encoder


try:
    from peft.utils import constants as peft_constants
except ImportError:
    peft_constants = None
try:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as LIGER
except ImportError:
    LIGER = None


logger = logging.get_logger(__name__)


class LongNetRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary positions, with angles that stay right at any length: they are taken in float64, since float32
    misses them by 0.06 rad after a million positions, and the frequencies stay in float32 when the model is cast."""

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[B, N, D]` in the dtype of `x`, for `position_ids` `[B, N]`."""
        dtype = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(x.device, dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return tuple((f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))


def eager_attention_forward(module, query, key, value, layout, scaling, dropout=0.0, past_key_values=None, **kwargs):
    """`attn_implementation="eager"`: the dense reference, which returns its weights `[B, H, N, past + N]`, too."""
    options = AttentionOptions(module.pattern, scaling, dropout, True, module.config.segment_padding)
    return layout.attend(module, query, key, value, options, past_key_values)


def dilated_attention_forward(module, query, key, value, layout, scaling, dropout=0.0, past_key_values=None, **kwargs):
    """`attn_implementation="dilated"`: the fast operator."""
    if not isinstance(module, LongNetAttention):
        raise ValueError(
            f'`attn_implementation="dilated"` of {type(module).__name__} needs the package: `import longnet_hf`.'
        )
    options = AttentionOptions(module.pattern, scaling, dropout, segment_padding=module.config.segment_padding)
    return layout.attend(module, query, key, value, options, past_key_values)


# This module's own mapping: others' registered functions know nothing of the layout. "sdpa" is the name that
# Transformers chooses by itself, and the only one under which Trainer splits sequences.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
if "dilated" not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # code from the Hub, without the package
    AttentionInterface.register("dilated", dilated_attention_forward)
ALL_ATTENTION_FUNCTIONS["dilated"] = ALL_ATTENTION_FUNCTIONS["sdpa"] = dilated_attention_forward


def make_norm(config: LongNetConfig, size: int) -> nn.Module:
    norm = RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm(size, eps=config.norm_eps)


def set_magneto_init(config: LongNetConfig, *projections: nn.Linear | None) -> None:
    """MAGNETO's initialisation (arXiv 2210.06423, section 3): beside sub-layer norms, deep models start larger."""
    for projection in projections:
        if config.use_sub_norm and projection is not None:
            projection.init_std = config.initializer_range * math.sqrt(math.log(2 * config.num_hidden_layers))


class LongNetAttention(nn.Module):
    """Multi-head dilated attention (LongNet, section 2.3), with rotary positions and MAGNETO's inner norm.

    Can be used alone: `LongNetAttention(config, layer_idx=0)(hidden_states)`.
    """

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.pattern = config.layer_patterns[layer_idx].canonical()
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.is_causal

        width = config.num_attention_heads * self.head_dim
        key_value_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.attn_sub_norm = make_norm(config, width) if config.use_sub_norm else nn.Identity()
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_out_bias)
        set_magneto_init(config, self.v_proj, self.o_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        layout: BatchLayout | None = None,
        attention_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, N, hidden_size]`.
            position_embeddings: cosines and sines of [`LongNetRotaryEmbedding`]; without them no positions are
                encoded.
            attention_mask: padding mask `[B, past + N]`, nonzero at real tokens; looked at where there is no `layout`.
            past_key_values: cache that holds the earlier keys and values, and takes the new ones.
            layout: how the tokens lie in their documents, the same for all layers (see [`lay_out_batch`]).
            attention_rows: `[R]`, see [`LongNetModel`].

        Returns:
            The output `[B, N, hidden_size]`, and the weights: `[B, H, R, N]` where `attention_rows` asks for them, or
            `[B, H, N, past + N]` with `attn_implementation="eager"`.
        """
        past_key_values = one_cache(past_key_values, kwargs)
        batch_size, length, _ = hidden_states.shape
        if layout is None:
            check_arguments(kwargs, self.config)
            inputs = BatchInputs(batch_size, length, hidden_states.device, attention_mask)
            layout = lay_out_batch(inputs, self.is_causal, past_key_values)

        hidden_shape = (batch_size, length, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None:
            query_states, key_states = rotate(query_states, key_states, *position_embeddings)

        implementation = self.config._attn_implementation or "dilated"  # no model has chosen one if used alone
        if implementation not in ("dilated", "sdpa", "eager"):
            raise ValueError(
                '`attn_implementation` of LongNet must be "dilated" (or "sdpa", the same operator) or "eager" (its '
                f"dense reference), got {implementation!r}."
            )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            layout,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            past_key_values=past_key_values,
        )
        if attention_rows is not None:
            options = AttentionOptions(self.pattern, self.scaling, segment_padding=self.config.segment_padding)
            attn_weights = layout.weights(query_states, key_states, options, attention_rows)
        return self.o_proj(self.attn_sub_norm(attn_output.flatten(2))), attn_weights


class LongNetMLP(nn.Module):
    """Two or, gated, three projections; MAGNETO's inner norm stands before the last.

    With `config.chunk_size_feed_forward`, so many tokens at a time, which the backward pass recomputes: of a long
    sequence, activations of `intermediate_size` are what takes most memory.
    """

    def __init__(self, config: LongNetConfig):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.intermediate_size = intermediate_size
        self.gate_proj = (
            nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias) if config.use_gated_mlp else None
        )
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.ffn_sub_norm = make_norm(config, intermediate_size) if config.use_sub_norm else nn.Identity()
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk_size = config.chunk_size_feed_forward
        set_magneto_init(config, self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not 0 < self.chunk_size < x.shape[-2] or self.is_better_whole(x):
            return self.forward_chunk(x)
        if torch.is_grad_enabled() and not is_watched(x) and all(map(is_plain, self.children())):
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            return in_chunks(self.forward_chunk, x, self.chunk_size, weights)
        chunks = x.split(self.chunk_size, dim=-2)
        if torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # with dynamic=True numbers that a checkpoint is the first to meet fail
                _ = [getattr(self.ffn_sub_norm, name, 0.0) * 1.0 for name in ("eps", "variance_epsilon")]
            return torch.cat([checkpoint(self.forward_chunk, chunk, use_reentrant=False) for chunk in chunks], dim=-2)
        return torch.cat([self.forward_chunk(chunk) for chunk in chunks], dim=-2)

    def is_better_whole(self, x: torch.Tensor) -> bool:
        """Chunks cost nothing unless compiled, when a checkpoint computes them a third time."""
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return False
        num_bytes = x.shape[:-1].numel() * self.intermediate_size * x.element_size()
        return has_room_for(4 * num_bytes, x.device)  # what comes into the activation and out of it, and gradients

    def forward_chunk(self, x: torch.Tensor) -> torch.Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(activate(self.act_fn, self.ffn_sub_norm, self.up_proj(x), gate))


class LongNetDropPath(nn.Module):
    """Stochastic depth: leaves out, in training, what a layer adds to some rows of a batch (arXiv 1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return x
        return F.dropout(x.new_ones(x.shape[0], 1, 1), self.probability) * x

    def extra_repr(self) -> str:
        return f"p={self.probability:.3g}"


class LongNetDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LongNetAttention(config, layer_idx)
        self.mlp = LongNetMLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = LongNetDropPath(config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1))

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return nn.Module.__call__(self, *args, **kwargs)  # older Transformers would drop the cache of a checkpoint

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attn_output))
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.drop_path(self.dropout(mlp_output))


class LongNetPreTrainedModel(HubMixin, ReadingMixin, PreTrainedModel):
    """What all LongNet models have in common: how they are loaded, saved, converted and given long sequences."""

    config: LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # which in Transformers means: generates with a compiled static cache
    _can_record_outputs = {"hidden_states": LongNetDecoderLayer, "attentions": LongNetAttention}

    def __init__(self, config: LongNetConfig, *inputs, **kwargs):
        # `from_pretrained(path, segment_lengths=...)` sets attributes without checking how they fit together
        config.validate()
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    @functools.wraps(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(cls, *args, **kwargs):
        parallel = kwargs.get("distributed_config")
        parallel = vars(parallel) if hasattr(parallel, "tp_size") else dict(parallel or {})
        for name in ("tp_plan", "tp_size"):
            value = kwargs.get(name, parallel.get(name))
            if value is not None and value != 1:
                raise ValueError(
                    f"`{name}={value!r}`: LongNet has no plan for tensor parallelism: heads keep different keys. "
                    "Split sequences over processes (`ParallelismConfig(cp_size=...)` with Trainer, or "
                    "`split_sequence`), or weights (FSDP2), or place layers (`device_map`)."
                )
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def from_torchscale(cls, checkpoint, args, **kwargs):
        """A LongNet with the weights of a plain decoder or encoder of torchscale, unchanged.

        An encoder attends, as it was trained, to the zeros that fill up its last segments (`segment_padding="zeros"`).

        Args:
            checkpoint: a file of `torch.save` with the state dict of a `LongNetDecoder` or `LongNetEncoder`, or that
                state dict.
            args: its options: torchscale's `DecoderConfig` or `EncoderConfig`, or a dict of what one was made of.
            kwargs: further fields of [`LongNetConfig`]; the rest goes to `from_pretrained` (`dtype`, `device_map`, …).

        Raises:
            ValueError: if it has weights or options that LongNet does not compute; they are named.
        """
        weights = read_checkpoint(checkpoint)
        fields = config_fields(args, weights)
        weights = rename_encoder(weights, fields["num_attention_heads"])
        if not issubclass(cls, LongNetModel):
            weights = {name if name.startswith("lm_head.") else f"model.{name}": x for name, x in weights.items()}
        elif fields["tie_word_embeddings"]:
            del weights["lm_head.weight"]
        return cls.from_weights(weights, fields, **kwargs)

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor], fields: dict, **kwargs):
        """The model with exactly these weights, whose configuration has `fields`, and those that `kwargs` hold beside
        arguments of `from_pretrained`."""
        config = cls.config_class(**fields | cls.pop_fields(kwargs))
        dtype = next(x.dtype for x in weights.values() if x.is_floating_point())
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", dtype))
        return cls.load_exactly(None, config, state_dict=weights, ignore_mismatched_sizes=True, **kwargs)

    @classmethod
    def pop_fields(cls, kwargs: dict) -> dict:
        """Take the fields of the configuration out of `kwargs`, the rest of which goes to `from_pretrained`."""
        known = {field.name for field in dataclasses.fields(cls.config_class)} - {"dtype"}
        return {name: kwargs.pop(name) for name in list(kwargs) if name in known}

    @classmethod
    def load_exactly(cls, path, config, **kwargs):
        """`from_pretrained`, which has to find all weights and no others, and forgets where they came from."""
        model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
        misfits = {name: sorted(map(str, info[name])) for name in info if name.endswith("_keys") and info[name]}
        if misfits:
            raise ValueError(f"The weights do not fit {cls.__name__} and its configuration: {misfits}.")
        warn_of_zeros(model)
        forget_name(model)
        return model

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "init_std"):
            init.normal_(module.weight, std=module.init_std)


class LongNetModel(LongNetPreTrainedModel):
    """The stack of layers, without a head."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.embed_tokens = None
        if config.vocab_size > 0:
            # Without `padding_idx`: nothing attends to padding, and where a text begins with that token, as many do, a
            # row of zeros stays so through every layer, whose norms multiply its gradients by 1 / sqrt(norm_eps) each
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = 1.0
        if config.scale_embedding:  # unit variance to begin with, or the branches' outputs drown the embeddings
            self.embed_scale = math.sqrt(config.hidden_size)
            if self.embed_tokens is not None:
                self.embed_tokens.init_std = 1 / self.embed_scale
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([LongNetDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size) if config.use_final_norm else nn.Identity()
        self.rotary_emb = LongNetRotaryEmbedding(config) if config.use_rope else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        attention_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids: `[B, N]`; or `inputs_embeds`, `[B, N, hidden_size]`.
            attention_mask: padding mask `[B, past + N]`. Positions count real tokens only.
            position_ids: `[B, N]`. Where they do not grow from one real token to the next, a new document starts that
                sees nothing of the ones before. `cu_seq_lens_q`/`cu_seq_lens_k` and `seq_idx` say the same; if several
                are given and differ, `seq_idx` decides, and of the boundaries those of the keys.
            past_key_values: a [`DilatedCache`], which is made where `use_cache` asks for one, or an ordinary
                `DynamicCache`. To a `DilatedCache`, which knows its tokens, `attention_mask` may also be given for the
                new ones alone, `[B, N]`.
            attention_rows: `[R]`, columns of the batch. With it, `output_attentions=True` gives what these tokens pay
                to all others in every layer, `[B, H, R, N]`, exactly and without an N × N matrix. Not with a cache.
        """
        past_key_values = one_cache(past_key_values, kwargs)
        check_arguments(kwargs, self.config, attention_rows)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            if self.embed_tokens is None:
                raise ValueError("This model has no vocabulary (`vocab_size=0`): give `inputs_embeds`.")
            check_ids("input_ids", input_ids, getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size))
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_embeds("inputs_embeds", inputs_embeds, self.config.hidden_size)
        if attention_rows is not None:
            attention_rows = self.check_attention_rows(attention_rows, inputs_embeds, past_key_values, kwargs)
            use_cache = False
        if self.training and self.config.drop_path_rate > 0 and active_split() is not None:
            raise ValueError(
                "A sequence cannot be split over processes in training with `drop_path_rate` above 0, got "
                f"{self.config.drop_path_rate}: each would leave out other layers."
            )

        is_causal = self.config.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        check_flag("is_causal", is_causal)
        if past_key_values is not None:
            is_eager = self.config._attn_implementation == "eager"
            check_cache(past_key_values, self.patterns, is_causal=is_causal, is_eager=is_eager)
            if self.is_checkpointed:
                raise ValueError(
                    "`past_key_values` was given in training with gradient checkpointing, which does without a cache: "
                    "switch one of them off."
                )
        of_queries, of_keys = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
        inputs = BatchInputs(
            *inputs_embeds.shape[:2],
            inputs_embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=of_queries if of_keys is None else of_keys,
            seq_idx=kwargs.pop("seq_idx", None),
        )
        layout = lay_out_batch(inputs, is_causal, past_key_values)
        makes_cache = use_cache and past_key_values is None and layout.can_fill_a_cache
        if makes_cache and not (self.is_checkpointed or is_exporting()):  # which does not follow a DilatedCache
            past_key_values = self.make_cache()
            layout = layout.filling(past_key_values)

        hidden_states = self.embedding_dropout(inputs_embeds * self.embed_scale)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(hidden_states, layout.position_ids)
        layout.keeps_results = self.can_keep_results(hidden_states, layout)
        # So that a cache of which an interruption leaves some layers behind is not taken for a whole one
        is_taking = is_dilated_cache(past_key_values) and not torch.compiler.is_compiling()
        if is_taking:
            past_key_values.unfinished = layout.tokens.real.shape[1]
        for layer in self.running_layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                layout=layout,
                attention_rows=attention_rows,
                **{CACHE: past_key_values},  # the name by which gradient checkpointing knows it
                **kwargs,
            )
        if is_taking:
            past_key_values.unfinished = 0
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})

    @property
    def is_checkpointed(self) -> bool:
        """Whether layers are computed again for the backward pass: without a cache, which they would fill twice."""
        is_checkpointed = any(layer.gradient_checkpointing and layer.training for layer in self.running_layers)
        return is_checkpointed and torch.is_grad_enabled()

    def can_keep_results(self, hidden_states: torch.Tensor, layout: BatchLayout) -> bool:
        """Whether the attention of all layers may be kept for the backward pass, which computes all else again."""
        if torch.compiler.is_compiling() or not (self.is_checkpointed and torch.is_grad_enabled()):
            return False
        if len({layer.self_attn.layer_idx for layer in self.running_layers}) < len(self.running_layers):
            return False  # a layer that runs twice: by its index, its second result would be taken for the first
        config, device = self.config, hidden_states.device
        numbers = hidden_states.shape[:2].numel() * len(self.running_layers) * config.num_attention_heads
        for layer in self.running_layers:
            numbers += 2 * layout.rows_received(layer.self_attn.pattern, config.num_key_value_heads, device)
        fits = has_room_for(numbers * config.head_dim * hidden_states.element_size(), device)
        split = active_split()
        if split is None:
            return fits
        # A policy of the checkpoints (`context_fn`) expects to meet again what it has saved
        checkpoints = [getattr(layer, "_gradient_checkpointing_func", None) for layer in self.running_layers]
        has_policy = any("context_fn" in getattr(checkpoint, "keywords", ()) for checkpoint in checkpoints)
        # Asked by all processes, since all compile or none does
        return split.all_agree(fits and not has_policy and not is_watched(hidden_states), device)

    def check_attention_rows(self, attention_rows, inputs_embeds, past_key_values, kwargs) -> torch.Tensor:
        """`attention_rows` as a tensor of columns from 0 on, or an error that says why they cannot be had."""
        length = inputs_embeds.shape[1]
        rows = torch.as_tensor(attention_rows, device=inputs_embeds.device)
        rows = resolve_indices("attention_rows", rows, length, f"below the length {length}")
        if not kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("`attention_rows` says which attention to return: give `output_attentions=True`, too.")
        if past_key_values is not None or active_split() is not None:
            raise ValueError(
                "`attention_rows` cannot be had with `past_key_values` or of a sequence that is split over processes."
            )
        return rows

    @property
    def running_layers(self) -> nn.ModuleList:
        """All layers, unless something shortens the model through its configuration (early exit in `generate`)."""
        return self.layers[: self.config.num_hidden_layers]

    @property
    def patterns(self) -> list[DilatedPattern]:
        """The pattern of every layer that runs."""
        return [layer.self_attn.pattern for layer in self.running_layers]

    def make_cache(self) -> Cache:
        """The cache that the model makes by itself: one through which gradients flow in training."""
        if self.training or self.config._attn_implementation == "eager":
            return DynamicCache(config=self.config)
        return DilatedCache.for_patterns(self.patterns)


@torch.no_grad()
def warn_of_zeros(model: PreTrainedModel) -> None:
    """Tell of an embedding of zeros, which others keep for padding, and with it out of training."""
    embeddings, token = model.get_input_embeddings(), model.config.pad_token_id
    weight = getattr(embeddings, "weight", None)
    if weight is None or token is None or weight.is_meta or not 0 <= token < len(weight) or weight[token].any():
        return
    logger.warning(
        f"The embedding of token {token} (`pad_token_id`) is zero. Where it stands in a text and not only in padding, "
        "norms multiply its gradients by 1 / sqrt(eps) in every layer, and training fails: give it other weights "
        "before you train, such as the mean of all."
    )


def check_vocabulary(config: LongNetConfig) -> None:
    if config.vocab_size == 0:
        raise ValueError("A language modelling head needs a vocabulary, got `vocab_size=0`.")


class LongNetForCausalLM(TokenLossMixin, LongNetPreTrainedModel, LongNetGenerationMixin):
    """LongNet with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongNetConfig):
        if not config.is_causal:
            raise ValueError("`is_causal=False` makes an encoder; LongNetForCausalLM needs `is_causal=True`.")
        super().__init__(config)
        check_vocabulary(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args (the others are those of [`LongNetModel`]):
            labels: `[B, N]`, -100 where there is nothing to predict; shifted inside. Padding predicts nothing: a row
                that is padded on the left has the loss of its text alone.
            logits_to_keep: compute the logits of these positions only, as in Transformers.
            shift_labels: `[B, N]`, labels that are already shifted, in place of `labels`.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels. Where a sequence is
                split over P processes: by P times this, as Trainer means it.
            skip_logits: leave out the logits. Default: where there are labels, no `logits_to_keep`,
                `config.skip_logits` holds, and there are more logits than 2**27. The loss itself never holds more.

        ```python
        >>> from longnet_hf import LongNetConfig, LongNetForCausalLM

        >>> model = LongNetForCausalLM(LongNetConfig(num_hidden_layers=2))
        >>> input_ids = torch.randint(model.config.vocab_size, (1, 5000))
        >>> loss = model(input_ids, labels=input_ids).loss
        ```"""
        past_key_values = one_cache(past_key_values, kwargs)
        # Not in the signature, where Trainer would take it for labels that every batch must have
        shift_labels = kwargs.pop("shift_labels", None)
        loss_kwargs = {"ignore_index": kwargs.pop("ignore_index")} if "ignore_index" in kwargs else {}
        if num_items_in_batch is not None:
            loss_kwargs["num_items_in_batch"] = loss_divisor(None, num_items_in_batch)
        has_labels = labels is not None or shift_labels is not None
        split = active_split() if has_labels else None
        if split is not None and shift_labels is None:
            raise ValueError(
                "`labels` of a sequence that is split over processes cannot be shifted on one of them: give "
                "`shift_labels`, as Trainer does."
            )
        own_loss = hasattr(self, "_loss_function")  # set by the user, who expects it to be given all logits
        of_loss = {
            name: kwargs.pop(name) for name in list(kwargs) if own_loss and has_labels and name not in TAKEN_ARGUMENTS
        }
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if has_labels and not own_loss:
            options = self.config.vocab_size, hidden_states.shape[:2], loss_kwargs.get("ignore_index", -100)
            if shift_labels is None:
                labels = check_labels("labels", labels, *options)
                is_packed = any(kwargs.get(x) is not None for x in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
                shift_labels = labels_of_next(labels, attention_mask, options[-1], position_ids, is_packed)
            else:
                shift_labels = check_labels("shift_labels", shift_labels, *options)
                shift_labels = without_padding(shift_labels, attention_mask, options[-1])
        if skip_logits is None:
            num_tokens = math.prod(hidden_states.shape[:-1])  # `numel` would fix these for `torch.export`
            skip_logits = has_labels and not own_loss and self.leaves_out_logits(num_tokens, logits_to_keep)
        logits = None if skip_logits else self.lm_head(keep_positions(hidden_states, logits_to_keep))

        loss = None
        if has_labels:
            of_all = logits if own_loss or (isinstance(logits_to_keep, int) and logits_to_keep == 0) else None
            loss = self._loss(hidden_states, of_all, labels, shift_labels, split, loss_kwargs, of_loss | kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden_states, logits, labels, shift_labels, split, loss_kwargs: dict, of_own_loss: dict):
        """Of this process's tokens, or of all if the sequence is split. A user's own loss is given all logits."""
        ignore_index = loss_kwargs.get("ignore_index", -100)
        if split is not None and "num_items_in_batch" not in loss_kwargs:
            count = split.sum((shift_labels != ignore_index).sum())
            loss_kwargs["num_items_in_batch"] = count.clamp(min=1) / split.world_size
        if hasattr(self, "_loss_function"):
            if shift_labels is not None:
                loss_kwargs["shift_labels"] = shift_labels
            loss = self.loss_function(
                logits=self.lm_head(hidden_states) if logits is None else logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **loss_kwargs,
                **of_own_loss,
            )
        else:
            loss = self.token_loss(hidden_states, logits, shift_labels, **loss_kwargs)
        return loss if split is None else split.average(loss)

    @classmethod
    def from_llama(cls, model_or_path, *, segment_lengths, dilation_rates, **kwargs) -> "LongNetForCausalLM":
        """A LongNet with the weights of a Llama, Mistral, SmolLM or Qwen2 model, unchanged.

        With one branch that covers the sequence it computes what the source computes. With others it wants
        fine-tuning.

        Args:
            model_or_path: the source, a model (whose weights are copied), a path or a name on the Hub.
            segment_lengths, dilation_rates: the pattern, see [`LongNetConfig`].
            kwargs: further fields of [`LongNetConfig`] (`branch_types`, `segment_shift`, `rope_parameters`, …); the
                rest goes to `from_pretrained` (`dtype`, `device_map`, `revision`, …).

        Raises:
            ValueError: if the source has anything that LongNet does not compute; it is named.
        """
        if not isinstance(model_or_path, (PreTrainedModel, str, os.PathLike)):
            raise ValueError(
                "`model_or_path` must be a Transformers model, a path or a name on the Hub, got "
                f"{type(model_or_path).__name__}. (Of a PEFT model, give `merge_and_unload()`.)"
            )
        if isinstance(model_or_path, PreTrainedModel) and kwargs.get("state_dict") is not None:
            raise ValueError("`state_dict` cannot be given beside a model, whose weights are taken: give its path.")
        pattern = dict(segment_lengths=segment_lengths, dilation_rates=dilation_rates)
        fields = cls.pop_fields(kwargs) | pattern
        if isinstance(model_or_path, PreTrainedModel):
            source, path = model_or_path.config, None
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype", model_or_path.dtype))
            kwargs["state_dict"] = {
                name: weight.detach().clone() for name, weight in model_or_path.state_dict().items()
            }
        else:
            hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            source = AutoConfig.from_pretrained(
                model_or_path, **{name: kwargs[name] for name in hub if name in kwargs}
            )
            path = model_or_path
        config = LongNetConfig.from_llama(source, **fields)
        model = cls.load_exactly(path, config, **kwargs)
        text = sink_warning(config.layer_patterns, config.num_key_value_heads, config.max_position_embeddings)
        if text is not None and (path is not None or model_or_path.name_or_path):  # weights that were trained
            logger.warning_once(text)
        if path is None and getattr(model_or_path, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(model_or_path.generation_config)
        return model


class LongNetForMaskedLM(TokenLossMixin, LongNetPreTrainedModel):
    """LongNet, as an encoder, that predicts masked tokens: what encoders are pretrained as."""

    _tied_weights_keys = LongNetForCausalLM._tied_weights_keys

    def __init__(self, config: LongNetConfig):
        if config.is_causal:
            raise ValueError("LongNetForMaskedLM predicts from both sides: the configuration needs `is_causal=False`.")
        super().__init__(config)
        check_vocabulary(config)
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args (the others are those of [`LongNetModel`]):
            labels: `[B, N]`, the tokens that were masked, -100 elsewhere, as `DataCollatorForLanguageModeling` gives
                them. Nothing is shifted.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.
            skip_logits: leave out the logits. Default: where there are labels, `config.skip_logits` holds, and there
                are more logits than 2**27. The loss itself never holds more.
        """
        own_loss = hasattr(self, "_loss_function")  # set by the user, who expects it to be given all logits
        takes_more = own_loss and labels is not None
        of_loss = {name: kwargs.pop(name) for name in list(kwargs) if takes_more and name not in TAKEN_ARGUMENTS}
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits is None:
            num_tokens = math.prod(hidden_states.shape[:-1])  # `numel` would fix these for `torch.export`
            skip_logits = labels is not None and not own_loss and self.leaves_out_logits(num_tokens, 0)
        logits = None if skip_logits else self.lm_head(hidden_states)
        loss = None
        if labels is not None and own_loss:
            loss = self.loss_function(
                logits=self.lm_head(hidden_states) if logits is None else logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **of_loss,
            )
        elif labels is not None:
            labels = check_labels("labels", labels, self.config.vocab_size, hidden_states.shape[:2])
            labels = labels.to(hidden_states.device)
            divisor = loss_divisor(labels, num_items_in_batch)
            if logits is None and not torch.compiler.is_compiling():  # where their number would be new in every batch
                is_masked = labels != -100
                hidden_states, labels = hidden_states[is_masked], labels[is_masked]
            loss = self.token_loss(hidden_states, logits, labels, divisor)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def refuse_split(model: nn.Module, *args) -> None:
    """A hook for heads that look at a sequence as a whole."""
    if active_split() is not None:
        raise ValueError(f"{type(model).__name__} cannot take a sequence that is split over processes.")


def last_real_tokens(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """The column of the last token of every row `[B]` that is not padding, of `hidden_states` `[B, N, D]`.

    What is padding, the mask `[B, past + N]` says, whichever tokens stand there. Without a mask it is the ids that
    equal `pad_token_id`, as in Transformers; of embeddings, or if there is no such id, nothing is.
    """
    batch_size, length, device = *hidden_states.shape[:2], hidden_states.device
    if attention_mask is not None:
        real = attention_mask[:, -length:] != 0
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return torch.full((batch_size,), length - 1, device=device)
    return (real.to(device) * torch.arange(length, device=device)).argmax(dim=1)


def has_packed_rows(
    hidden_states, attention_mask, position_ids, cu_seq_lens_q=None, cu_seq_lens_k=None, seq_idx=None, **kwargs
) -> bool:
    """Whether the caller said, in any way, that a row holds several documents (not looked at in `torch.compile`)."""
    bounds = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    if is_packed(seq_idx):
        return True
    if position_ids is None and bounds is None:
        return False
    batch_size, length = hidden_states.shape[:2]
    mask = None if attention_mask is None else attention_mask[:, -length:]
    given = dict(attention_mask=mask, position_ids=position_ids, cu_seq_lens=bounds)
    return is_packed(find_documents(batch_size, length, **given))


class LongNetForSequenceClassification(LongNetPreTrainedModel):
    """LongNet that classifies a sequence by its last token that is not padding."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args (the others are those of [`LongNetModel`]):
            attention_mask: the last token that it calls real stands for the row, on whichever side the padding is.
                Without a mask it is the last whose id is not `config.pad_token_id`.
            labels: `[B]` classes; or `[B]` or `[B, num_labels]` numbers, for regression or for several labels per row.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.
        """
        if attention_mask is None and torch.is_tensor(input_ids) and input_ids.dim() == 2 and input_ids.numel() > 0:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if has_packed_rows(hidden_states, attention_mask, position_ids, **kwargs):
            raise ValueError("A row has one class, and some hold several packed documents: give one per row.")
        last = last_real_tokens(hidden_states, attention_mask, input_ids, self.config.pad_token_id)
        logits = self.score(hidden_states)
        pooled_logits = logits[torch.arange(len(last), device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.sequence_loss(logits, pooled_logits, labels, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def sequence_loss(self, logits, pooled_logits, labels, num_items_in_batch=None) -> torch.Tensor:
        arguments = dict(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        problem = self.config.problem_type
        is_integer = torch.is_tensor(labels) and labels.dtype in (torch.long, torch.int)
        if problem is None and self.num_labels > 1 and is_integer:
            problem = "single_label_classification"
        if hasattr(self, "_loss_function"):  # the user's own
            given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return self.loss_function(**arguments, **given)
        labels = arguments["labels"] = check_labels_of_rows(labels, pooled_logits, problem)
        if problem == "single_label_classification":
            return self.loss_function(**arguments, num_items_in_batch=loss_divisor(labels, num_items_in_batch))
        loss = self.loss_function(**arguments)  # of Transformers, a mean whatever is given
        if num_items_in_batch is None:
            return loss
        return loss * (labels.numel() / loss_divisor(labels, num_items_in_batch))


def check_labels_of_rows(labels, pooled_logits: torch.Tensor, problem: str | None) -> torch.Tensor:
    """Labels of another shape would be stretched to that of the logits `[B, num_labels]`."""
    num_rows, num_labels = pooled_logits.shape
    is_column = torch.is_tensor(labels) and labels.shape == (num_rows, 1)
    if problem == "single_label_classification":
        return check_labels("labels", labels[:, 0] if is_column else labels, num_labels, (num_rows,))
    sizes = (num_rows,) if num_labels == 1 and not is_column else (num_rows, num_labels)
    check_tensor("labels", labels, "numbers or integers", *sizes)
    return labels.to(pooled_logits.dtype)


class LongNetForTokenClassification(LongNetPreTrainedModel):
    """LongNet that classifies every token."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)  # Transformers' default
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args (the others are those of [`LongNetModel`]):
            labels: `[B, N]` classes, -100 where there is nothing to learn.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            if not hasattr(self, "_loss_function"):
                labels = check_labels("labels", labels, self.num_labels, logits.shape[:2])
            divisor = loss_divisor(labels, num_items_in_batch)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=divisor)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LongNetForQuestionAnswering(LongNetPreTrainedModel):
    """LongNet that finds the first and last token of an answer."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.model = LongNetModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        r"""
        Args (the others are those of [`LongNetModel`]):
            start_positions, end_positions: `[B]` columns; those behind the row's end are left out of the loss.
            num_items_in_batch: divide the summed losses by this instead of by the numbers of positions.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        start_logits, end_logits = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(-1))
        loss = None
        if (start_positions is None) != (end_positions is None):
            raise ValueError("`start_positions` and `end_positions` must be given together.")
        if start_positions is not None:
            own_loss = hasattr(self, "_loss_function")  # set by the user
            loss_function = self.loss_function if own_loss else span_loss
            options = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = loss_function(start_logits, end_logits, start_positions, end_positions, **options)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def span_loss(start_logits, end_logits, start_positions, end_positions, num_items_in_batch=None) -> torch.Tensor:
    """Transformers' loss of answers, but for batches in which no answer lies inside its row: theirs is 0 / 0."""
    losses, (num_rows, length) = [], start_logits.shape
    given = ("start_positions", start_logits, start_positions), ("end_positions", end_logits, end_positions)
    for name, logits, positions in given:
        is_column = torch.is_tensor(positions) and positions.shape == (num_rows, 1)
        check_tensor(name, positions, "integers", num_rows, *[1] * is_column)
        positions = positions.to(logits.device).flatten().long().clamp(0, length)
        total = F.cross_entropy(logits.float(), positions, ignore_index=length, reduction="sum")
        losses.append(total / loss_divisor(positions, num_items_in_batch, length))
    return (losses[0] + losses[1]) / 2


def keep_own_kernels(model: PreTrainedModel | None = None) -> None:
    """What Liger is to do with a LongNet: nothing."""
    logger.warning(
        "Liger's kernels are not used: LongNet has its own for what they do (loss, rotary positions, norms and "
        "activations), which are in use without being asked for."
    )


# By the Auto classes that load them
AUTO_CLASSES = {auto_class: globals()[name] for auto_class, name in MODEL_CLASSES.items()}
LongNetConfig.register_for_auto_class()
# By this table Trainer knows whose labels its label smoothing has to shift. Auto classes do not read it for our type.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LongNetConfig.model_type] = LongNetForCausalLM.__name__
for _auto_class, _model_class in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)


def tell_other_packages(model_type: str) -> None:
    """Tell PEFT what adapters adapt where they name no `target_modules`: as of Llama, whose layers have the same
    names. There is a table for each kind of adapter. And Liger what `use_liger_kernel=True` of Trainer is to do."""
    for name, table in vars(peft_constants).items() if peft_constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table[model_type] = copy.copy(table["llama"])
    if LIGER is not None:
        LIGER[model_type] = keep_own_kernels


tell_other_packages(LongNetConfig.model_type)


__all__ = [
    "LongNetPreTrainedModel",
    "LongNetAttention",
    *(model_class.__name__ for model_class in AUTO_CLASSES.values()),
]
