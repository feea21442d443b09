"""PyTorch LongNet: a Transformers decoder (or encoder) whose attention is dilated.

Reads from top to bottom like any model of Transformers: rotary positions, attention, MLP, layer, model, heads.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_longnet import LongNetConfig
from .context_parallel import (
    SequenceSplit,
    SplitBatch,
    active_split,
    is_distributed,
    split_attention,
    split_sequence,
    whole_rows,
)
from .dilated_cache import DilatedCache, Step, is_dilated
from .dilated_operator import dilated_attention, dilated_attention_reference, find_documents
from .model_card_longnet import prepare_model_card, write_model_card


try:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
except ImportError:
    LORA_TARGETS = None


logger = logging.get_logger(__name__)

# Most logits that the loss holds at a time (512 MiB in float32). Fewer make the products with a large vocabulary slow.
_MAX_LOGITS = 1 << 27
# How many tokens assisted decoding can take back
ASSISTED_RESERVE = 1023
# What this version of Transformers calls a cache: it was renamed in 5.24
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, kwargs: dict) -> Cache | None:
    """`past_key_values`, or what `kwargs` hold under the other name, which is taken out."""
    cache = kwargs.pop("cache", None)
    if cache is None:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return cache


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


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, document_ids=None, is_causal=None, **kwargs
):
    """`attn_implementation="eager"`: the dense oracle, which can return its weights `[B, H, Nq, N]`."""
    output, weights = dilated_attention_reference(
        query,
        key,
        value,
        module.pattern,
        is_causal=module.is_causal if is_causal is None else is_causal,
        scale=scaling,
        dropout=dropout,
        attention_mask=attention_mask,
        document_ids=document_ids,
        return_weights=True,
    )
    return output.transpose(1, 2), weights


def dilated_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, document_ids=None, is_causal=None, **kwargs
):
    """`attn_implementation="sdpa"`: the fast operator."""
    output = dilated_attention(
        query,
        key,
        value,
        module.pattern,
        is_causal=module.is_causal if is_causal is None else is_causal,
        scale=scaling,
        dropout=dropout,
        attention_mask=attention_mask,
        document_ids=document_ids,
    )
    return output.transpose(1, 2), None


# This module's own mapping: what "sdpa" means here. Others' registered functions know nothing of the pattern.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = dilated_attention_forward


def make_norm(config: LongNetConfig, size: int) -> nn.Module:
    norm = LlamaRMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
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
        self.attention_dropout = config.attention_dropout
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
        document_ids: torch.Tensor | None = None,
        cache_step: Step | None = None,
        split_batch: SplitBatch | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, N, hidden_size]`.
            position_embeddings: cosines and sines of [`LongNetRotaryEmbedding`]; without them no positions are
                encoded.
            attention_mask: padding mask `[B, past + N]`, nonzero at real tokens.
            past_key_values: cache that holds the earlier keys and values, and takes the new ones.
            document_ids: `[B, past + N]` from [`find_documents`], in place of `attention_mask`.
            cache_step: what `past_key_values.begin` gave for these tokens, if it is a [`DilatedCache`].
            split_batch: how the sequence is split of which these are this process's tokens.

        Returns:
            The output `[B, N, hidden_size]`, and the weights `[B, H, N, past + N]` with `attn_implementation="eager"`.
        """
        past_key_values = one_cache(past_key_values, kwargs)
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)

        if split_batch is not None:
            qkv = query_states, key_states, value_states
            attn_output = split_attention(*qkv, self.pattern, split_batch, self.scaling).transpose(1, 2)
            if past_key_values is not None:
                past_key_values.update_split(*qkv[1:], self.layer_idx, cache_step, split_batch.split)
            return self.o_proj(self.attn_sub_norm(attn_output.flatten(2))), None

        # What is seen of a cache depends on the position: for more than a token, torch.compile leaves that alone
        is_compilable = cache_step is None or input_shape[1] == 1
        attend = self.attend if is_compilable else self.attend_uncompiled
        attn_output, attn_weights = attend(
            query_states,
            key_states,
            value_states,
            attention_mask,
            past_key_values=past_key_values,
            document_ids=document_ids,
            cache_step=cache_step,
            **kwargs,
        )
        return self.o_proj(self.attn_sub_norm(attn_output.flatten(2))), attn_weights

    def attend(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        document_ids: torch.Tensor | None,
        cache_step: Step | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output `[B, N, H, D]` of the attention to these and cached keys, and the weights if there are any."""
        implementation = self.config._attn_implementation or "sdpa"  # no model has chosen one if used alone
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                '`attn_implementation` of LongNet must be "sdpa" (the dilated operator) or "eager" (its dense '
                f"reference), got {implementation!r}."
            )
        dropout = self.attention_dropout if self.training else 0.0
        if is_dilated(past_key_values, self.layer_idx):
            if cache_step is None:
                batch, length = query_states.shape[0], query_states.shape[2]
                real = None if attention_mask is None else attention_mask[:, -length:]
                cache_step = past_key_values.begin(batch, length, query_states.device, real)
            if not cache_step.is_first:
                qkv = query_states, key_states, value_states
                attn_output = past_key_values.attend(
                    *qkv, self.layer_idx, cache_step, scale=self.scaling, dropout=dropout
                )
                return attn_output.transpose(1, 2), None
            past_key_values.update(key_states, value_states, self.layer_idx, cache_step)
        elif past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout,
            document_ids=document_ids,
            **kwargs,
        )

    attend_uncompiled = torch.compiler.disable(attend)


class LongNetMLP(nn.Module):
    """Two or, gated, three projections; MAGNETO's inner norm stands before the last.

    With `config.chunk_size_feed_forward`, so many tokens at a time, which the backward pass recomputes: of a long
    sequence, activations of `intermediate_size` are what takes most memory.
    """

    def __init__(self, config: LongNetConfig):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
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
        if not 0 < self.chunk_size < x.shape[-2]:
            return self.forward_chunk(x)
        chunks = x.split(self.chunk_size, dim=-2)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self.forward_chunk, chunk, use_reentrant=False) for chunk in chunks], dim=-2)
        return torch.cat([self.forward_chunk(chunk) for chunk in chunks], dim=-2)

    def forward_chunk(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            x = self.act_fn(self.up_proj(x))
        else:
            x = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_sub_norm(x))


class LongNetDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LongNetAttention(config, layer_idx)
        self.mlp = LongNetMLP(config)
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@dataclass
class LongNetChunkOutput:
    """What [`~LongNetPreTrainedModel.forward_chunks`] yields.

    Args:
        last_hidden_state: `[B, L, hidden_size]`, of this chunk.
        loss: mean over the labels of all chunks so far, if there are any.
        past_key_values: the cache, which holds what comes next needs of all chunks so far.
    """

    last_hidden_state: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    past_key_values: Cache | None = None


class LongNetPreTrainedModel(PreTrainedModel):
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

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "init_std"):
            init.normal_(module.weight, std=module.init_std)
            # A slice loses the mark of weights that were loaded, hence the check
            if getattr(module, "padding_idx", None) is not None and not getattr(
                module.weight, "_is_hf_initialized", False
            ):
                init.zeros_(module.weight[module.padding_idx])

    @torch.no_grad()
    def forward_chunks(
        self,
        input_ids: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        chunk_size: int = 1 << 16,
        progress: bool = True,
    ) -> Iterator[LongNetChunkOutput]:
        """The forward pass over a sequence of any length, in memory that does not grow with it: a generator.

        A chunk attends to what a [`DilatedCache`] keeps of all chunks before it, so that the outputs are those of the
        whole sequence. To go on after an interruption, give the cache, and the tokens that it does not hold yet.

        Args:
            input_ids: integers `[B, N]` on any device; memory-mapped ones are read chunk by chunk.
            labels: `[B, N]`, -100 where there is nothing to predict; shifted inside. For causal language models.
            attention_mask: `[B, N]`, nonzero at real tokens.
            past_key_values: what was read before; by default a new [`DilatedCache`].
            chunk_size: tokens of a row to take at a time. Multiples of the segment lengths are fastest.
            progress: show a progress bar.

        Yields:
            [`LongNetChunkOutput`]: the hidden states of a chunk, and the loss and the cache up to its end.

        ```python
        >>> book = torch.randint(model.config.vocab_size, (1, 1_000_000))
        >>> for chunk in model.forward_chunks(book, labels=book):
        ...     pass
        >>> chunk.loss, chunk.past_key_values  # of the whole book
        ```"""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"`input_ids` must be of shape [B, N] with N > 0, got {tuple(input_ids.shape)}.")
        for name, x in (("labels", labels), ("attention_mask", attention_mask)):
            if x is not None and x.shape != input_ids.shape:
                raise ValueError(f"`{name}` must be of shape {tuple(input_ids.shape)}, got {tuple(x.shape)}.")
        if labels is not None and not hasattr(self, "chunked_loss"):
            raise ValueError(f"`labels` are for causal language models, and this is a {type(self).__name__}.")
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"`chunk_size` must be an integer of at least 1, got {chunk_size!r}.")
        if past_key_values is None:
            past_key_values = DilatedCache(self.config)
        length, total, count = input_ids.shape[1], 0.0, 0
        knows_padding = getattr(past_key_values, "is_compileable", False)  # all layers are dilated
        with logging.tqdm(total=length, unit=" tokens", unit_scale=True, disable=not progress) as bar:
            for start in range(0, length, chunk_size):
                stop = min(start + chunk_size, length)
                mask = None if attention_mask is None else attention_mask[:, start * knows_padding : stop]
                output = LongNetChunkOutput(past_key_values=past_key_values)
                output.last_hidden_state = self.base_model(
                    input_ids[:, start:stop].to(self.device, torch.long),
                    attention_mask=None if mask is None else mask.to(self.device),
                    past_key_values=past_key_values,
                ).last_hidden_state
                if labels is not None:
                    shift_labels = labels[:, start + 1 : stop + 1].to(self.device, torch.long)
                    shift_labels = F.pad(shift_labels, (0, stop - start - shift_labels.shape[1]), value=-100)
                    total += self.chunked_loss(output.last_hidden_state, shift_labels, num_items_in_batch=1).double()
                    count += (shift_labels != -100).sum()
                    output.loss = (total / count.clamp(min=1)).float()
                bar.update(stop - start)
                yield output

    @torch.no_grad()
    def prefill_split(
        self,
        input_ids: torch.Tensor,
        *,
        group: torch.distributed.ProcessGroup | None = None,
        layout: str = "head_tail",
    ) -> DilatedCache:
        """Read a prompt that is split over processes, and give every one of them the cache that one would have filled.

        All processes call this with the whole prompt; each computes its part. The last token is left to `generate`,
        which then goes on on one process or on all of them.

        Args:
            input_ids: `[B, N]`, the same on all processes: rows of one length N > 1, without padding.
            group: of the processes; default: all.
            layout: see [`split_sequence`].

        ```python
        >>> cache = model.prefill_split(input_ids)
        >>> model.generate(input_ids, past_key_values=cache, max_new_tokens=100)
        ```"""
        if input_ids.dim() != 2 or input_ids.shape[1] < 2:
            raise ValueError(f"`input_ids` must be of shape [B, N] with N > 1, got {tuple(input_ids.shape)}.")
        if not is_distributed():
            raise ValueError("`prefill_split` needs a process group: call `torch.distributed.init_process_group`.")
        world_size = torch.distributed.get_world_size(group)
        padding = -input_ids.shape[1] % (2 * world_size)
        split = SequenceSplit(
            input_ids.shape[1] + padding, world_size, torch.distributed.get_rank(group), layout, group
        )
        mine = F.pad(input_ids, (0, padding))[:, split.positions(input_ids.device)]
        cache = DilatedCache(self.config, reserve=max(255, padding + 1))
        with split_sequence(group, layout):
            self.base_model(mine.to(self.device), past_key_values=cache)
        cache.crop(-padding - 1)
        return cache

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers. The code travels with the weights, for every Auto class, and so does a model card."""
        self.config.auto_map = dict(AUTO_MAP)
        wrapped = type(self)
        try:
            # FSDP2 puts a class of PyTorch's in front of ours, whose code Transformers would save in place of ours
            self.__class__ = next(base for base in wrapped.__mro__ if not base.__module__.startswith("torch."))
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = wrapped
        if kwargs.get("is_main_process", True):
            write_model_card(self.config, self._auto_class, save_directory)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Both ways of pushing come here
        where = (kwargs.get("revision"), kwargs.get("token"))
        prepare_model_card(self.config, self._auto_class, working_dir, repo_id, *where)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class LongNetModel(LongNetPreTrainedModel):
    """The stack of layers, without a head."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_scale = 1.0
        if config.scale_embedding:  # unit variance to begin with, or the branches' outputs drown the embeddings
            self.embed_scale = math.sqrt(config.hidden_size)
            self.embed_tokens.init_std = 1 / self.embed_scale
        self.layers = nn.ModuleList([LongNetDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = LongNetRotaryEmbedding(config)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids: `[B, N]`; or `inputs_embeds`, `[B, N, hidden_size]`.
            attention_mask: padding mask `[B, past + N]`. Positions count real tokens only.
            position_ids: `[B, N]`. Where they do not grow from one real token to the next, a new document starts that
                sees nothing of the ones before. `cu_seq_lens_q`/`cu_seq_lens_k` and `seq_idx` say the same.
            past_key_values: a [`DilatedCache`], which is made where `use_cache` asks for one, or an ordinary
                `DynamicCache`. To a `DilatedCache`, which knows its tokens, `attention_mask` may also be given for the
                new ones alone, `[B, N]`.
        """
        past_key_values = one_cache(past_key_values, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        batch_size, length, device = *inputs_embeds.shape[:2], inputs_embeds.device
        split_batch, active = None, active_split()
        split = None if active is None else active.sequence(length, device)
        if split is not None:
            self.check_split(past_key_values, attention_mask, **kwargs)
            cu_seq_lens = [kwargs.pop(name, None) for name in ("cu_seq_lens_k", "cu_seq_lens_q")]
            split_batch = split.find_documents(
                batch_size,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seq_lens=next((x for x in cu_seq_lens if x is not None), None),
                seq_idx=kwargs.pop("seq_idx", None),
            )
            if past_key_values is not None and split_batch is not whole_rows(split, batch_size):
                raise ValueError("`past_key_values` cannot take a row of several packed documents: give one per row.")
            if position_ids is None:
                position_ids = split.positions(device)[None]
            attention_mask, use_cache = None, False  # what follows a token does not change its output
        is_causal = self.config.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
        if past_key_values is not None:
            self.check_cache(past_key_values, is_causal)
            if attention_mask is not None and hasattr(past_key_values, "begin"):
                past_key_values.check_mask(attention_mask, length)

        packing = {name: kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")}
        inputs = inputs_embeds, past_key_values, attention_mask, position_ids
        document_ids = None if split is not None else self.get_document_ids(*inputs, **packing)
        if is_packed(document_ids):  # what follows could continue only one of the documents
            if past_key_values is not None:
                raise ValueError("`past_key_values` cannot take a row of several packed documents: give one per row.")
        elif use_cache and is_causal and past_key_values is None:
            past_key_values = self.make_cache()

        cache_step = None
        if hasattr(past_key_values, "begin"):
            real = None if attention_mask is None else attention_mask[:, -length:]
            cache_step = past_key_values.begin(batch_size, length if split is None else split.length, device, real)
        if position_ids is None and cache_step is not None:
            position_ids = cache_step.position
        elif position_ids is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if attention_mask is None:
                position_ids = torch.arange(past_length, past_length + length, device=device)[None]
            else:
                position_ids = (attention_mask != 0).long().cumsum(-1)[:, past_length:].sub(1).clamp(min=0)

        hidden_states = inputs_embeds * self.embed_scale
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                document_ids=document_ids,
                cache_step=cache_step,
                split_batch=split_batch,
                **{CACHE: past_key_values},  # the name by which gradient checkpointing knows it
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})

    def check_split(self, past_key_values: Cache | None, attention_mask: torch.Tensor | None, **kwargs) -> None:
        """Refuse what a sequence that is split over processes does not allow."""
        if past_key_values is not None:
            if not hasattr(past_key_values, "begin") or not is_empty(past_key_values) or torch.is_grad_enabled():
                raise ValueError(
                    "`past_key_values` of a sequence that is split over processes must be an empty DilatedCache, and "
                    "gradients disabled (`torch.no_grad()`)."
                )
            if attention_mask is not None:
                raise ValueError(
                    "`attention_mask` cannot be used with `past_key_values` in a sequence that is split over "
                    "processes: take padding back with `past_key_values.crop`."
                )
        if not self.config.is_causal or kwargs.get("is_causal") is False:
            raise ValueError("A sequence can be split over processes in causal attention only (`is_causal=True`).")
        if self.config._attn_implementation == "eager":
            raise ValueError('`attn_implementation="eager"` cannot attend to a sequence that is split over processes.')
        if self.training and self.config.attention_dropout > 0:
            raise ValueError(
                "A sequence cannot be split over processes in training with `attention_dropout` above 0, got "
                f"{self.config.attention_dropout}."
            )

    def make_cache(self) -> Cache:
        """The cache that the model makes by itself: one through which gradients flow in training."""
        if self.training or self.config._attn_implementation == "eager":
            return DynamicCache(config=self.config)
        return DilatedCache(self.config)

    def check_cache(self, past_key_values: Cache, is_causal: bool) -> None:
        """Refuse caches that do not hold what the pattern asks for."""
        layers = getattr(past_key_values, "layers", None)
        is_dynamic = layers is not None and all(type(layer) is DynamicLayer for layer in layers)
        if not is_dynamic and not hasattr(past_key_values, "begin"):
            kinds = sorted({type(layer).__name__ for layer in layers or ()}) or [type(past_key_values).__name__]
            raise ValueError(
                "`past_key_values` must be a DilatedCache, or a DynamicCache that keeps all keys, got "
                f"{', '.join(kinds)}. Static, quantized, sliding-window and paged caches (continuous "
                "batching) are not supported."
            )
        if not is_causal:
            raise ValueError(
                "`past_key_values` needs causal attention, and this model attends both ways (`is_causal=False`)."
            )
        if is_dynamic:
            return
        if not past_key_values.fits([layer.self_attn.pattern for layer in self.layers]):
            raise ValueError("`past_key_values` is a DilatedCache for other patterns or another number of layers.")
        if self.config._attn_implementation == "eager":
            raise ValueError(
                '`past_key_values` must be a DynamicCache where `attn_implementation` is "eager", got a DilatedCache.'
            )

    def get_document_ids(
        self, inputs_embeds, past_key_values, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx
    ) -> torch.Tensor | None:
        """Document of every token, cached ones included; `None` if each row is one document without padding, or if
        nothing asks for it: dilated layers count for themselves what follows their first tokens."""
        batch_size, length = inputs_embeds.shape[:2]
        if not is_empty(past_key_values):
            if any(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, seq_idx)):
                raise ValueError(
                    "`cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` cannot be used with `past_key_values`."
                )
            if length > 1 and position_ids is not None and not torch.compiler.is_compiling():
                new_mask = None if attention_mask is None else attention_mask[:, -length:]
                documents = find_documents(batch_size, length, attention_mask=new_mask, position_ids=position_ids)
                if is_packed(documents):
                    raise ValueError("`position_ids` restart: several documents cannot continue `past_key_values`.")
            if all(is_dilated(past_key_values, layer_idx) for layer_idx in range(len(self.layers))):
                return None
            past_length = past_key_values.get_seq_length()
            return find_documents(batch_size, past_length + length, attention_mask=attention_mask)

        documents = find_documents(
            batch_size,
            length,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k,
        )
        if seq_idx is not None:
            documents = seq_idx if documents is None else seq_idx.masked_fill(documents < 0, -1)
        return documents


def is_packed(document_ids: torch.Tensor | None) -> bool:
    """Whether any row `[B, N]` holds more than one document (not looked at under `torch.compile`)."""
    if document_ids is None or torch.compiler.is_compiling():
        return False
    first = document_ids.masked_fill(document_ids < 0, torch.iinfo(document_ids.dtype).max).amin(1)
    return bool((document_ids.amax(1) > first).any())


def is_empty(past_key_values: Cache | None) -> bool:
    if hasattr(past_key_values, "begin"):  # without asking the GPU
        return past_key_values.positions is None
    return past_key_values is None or past_key_values.get_seq_length() == 0


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `[B, N, D]` that Transformers' `logits_to_keep` names: the last so many (0: all), indices `[K]`
    or `[B, K]`, or a boolean mask `[B, N]`, which gives `[kept, D]`."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """LongNet with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongNetConfig):
        if not config.is_causal:
            raise ValueError("`is_causal=False` makes an encoder; LongNetForCausalLM needs `is_causal=True`.")
        super().__init__(config)
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
            labels: `[B, N]`, -100 where there is nothing to predict; shifted inside.
            logits_to_keep: compute the logits of these positions only, as in Transformers.
            shift_labels: `[B, N]`, labels that are already shifted, in place of `labels`.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels. Where a sequence is
                split over P processes: by P times this, as Trainer means it.
            skip_logits: leave out the logits. Default: where there are labels, no `logits_to_keep`, and
                `config.skip_logits` holds. The loss itself never holds the logits of all positions.

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
            loss_kwargs["num_items_in_batch"] = num_items_in_batch
        has_labels = labels is not None or shift_labels is not None
        split = active_split() if has_labels else None
        if split is not None and shift_labels is None:
            raise ValueError(
                "`labels` of a sequence that is split over processes cannot be shifted on one of them: give "
                "`shift_labels`, as Trainer does."
            )
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
        own_loss = hasattr(self, "_loss_function")  # set by the user, who expects it to be given all logits
        if skip_logits is None:
            all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
            skip_logits = self.config.skip_logits and has_labels and all_logits and not own_loss
            if skip_logits and not self.training and not torch.compiler.is_compiling():
                logger.warning_once(
                    "The logits are left out because there are labels. If something reads them (`compute_metrics` or "
                    "`predict` of Trainer), set `model.config.skip_logits = False`."
                )
        logits = None if skip_logits else self.lm_head(keep_positions(hidden_states, logits_to_keep))

        loss = None
        if split is not None and num_items_in_batch is None:
            count = split.sum((shift_labels != loss_kwargs.get("ignore_index", -100)).sum())
            loss_kwargs["num_items_in_batch"] = count.clamp(min=1) / split.world_size
        if has_labels and own_loss:
            if shift_labels is not None:
                loss_kwargs["shift_labels"] = shift_labels
            loss = self.loss_function(
                logits=self.lm_head(hidden_states) if logits is None else logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **loss_kwargs,
                **kwargs,
            )
        elif has_labels:
            if shift_labels is None:
                shift_labels = F.pad(labels, (0, 1), value=loss_kwargs.get("ignore_index", -100))[..., 1:]
            loss = self.chunked_loss(hidden_states, shift_labels, **loss_kwargs)
        if loss is not None and split is not None:
            loss = split.average(loss)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def chunked_loss(
        self,
        hidden_states: torch.Tensor,
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """Cross-entropy over chunks of positions whose logits are recomputed in the backward pass.

        Each chunk goes through the module `lm_head`, so that whatever wraps it (LoRA, FSDP) takes part.
        """
        hidden_states = hidden_states.flatten(0, -2)
        shift_labels = shift_labels.flatten().to(hidden_states.device)
        size = max(1, _MAX_LOGITS // self.config.vocab_size)

        def chunk_loss(hidden_states, labels):
            return F.cross_entropy(
                self.lm_head(hidden_states).float(), labels, ignore_index=ignore_index, reduction="sum"
            )

        losses = []
        for chunk in zip(hidden_states.split(size), shift_labels.split(size), strict=True):
            if torch.is_grad_enabled():
                losses.append(checkpoint(chunk_loss, *chunk, use_reentrant=False))
            else:
                losses.append(chunk_loss(*chunk))
        loss = torch.stack(losses).sum()
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum().clamp(min=1)
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full", "offloaded"):
            raise ValueError(f'`cache_implementation` of LongNet must be "dynamic" or "offloaded", got {kind!r}.')
        is_given = model_kwargs.get(CACHE) is not None or generation_config.use_cache is False
        is_eager = self.config._attn_implementation == "eager"
        if is_given or is_eager or kind in ("dynamic", "dynamic_full"):
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        reserve = {"reserve": ASSISTED_RESERVE} if is_assisted else {}
        model_kwargs[CACHE] = DilatedCache(self.config, offloading=kind == "offloaded", **reserve)

    def create_masks_for_generate(
        self, attention_mask, inputs_embeds, past_key_values=None, is_first_iteration=False, **kwargs
    ) -> torch.Tensor | None:
        """Called by `generate` where the shapes of a cache do not change: a mask of unchanging shape, too."""
        if attention_mask is None or is_first_iteration or is_empty(one_cache(past_key_values, kwargs)):
            return attention_mask
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Transformers compiles for every cache that allows it. Compiling takes a minute: only if it is asked for.
        asked = generation_config.compile_config is not None
        return asked and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "LongNet does not support continuous batching (`generate_batch`): its paged cache knows no pattern."
        )

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
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in LongNetConfig.__annotations__}
        fields |= {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
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
        model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
        misfits = {name: sorted(map(str, info[name])) for name in info if name.endswith("_keys") and info[name]}
        if misfits:
            raise ValueError(f"The weights of {path or type(model_or_path).__name__} do not fit LongNet: {misfits}.")
        if path is None and getattr(model_or_path, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(model_or_path.generation_config)
        # PEFT would write the source's name into adapters, and load them on the source, with its dense attention
        model.name_or_path = None
        return model


def refuse_split(model: nn.Module, *args) -> None:
    """A hook for heads that look at a sequence as a whole."""
    if active_split() is not None:
        raise ValueError(f"{type(model).__name__} cannot take a sequence that is split over processes.")


class LongNetForSequenceClassification(GenericForSequenceClassification, LongNetPreTrainedModel):
    """LongNet that classifies a sequence by its last token that is not padding."""

    def __init__(self, config: LongNetConfig):
        # Not through the mixin, whose AutoModel knows no classes that came from the Hub
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()


class LongNetForTokenClassification(GenericForTokenClassification, LongNetPreTrainedModel):
    """LongNet that classifies every token."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LongNetModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)  # Transformers' default
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()


class LongNetForQuestionAnswering(GenericForQuestionAnswering, LongNetPreTrainedModel):
    """LongNet that finds the first and last token of an answer."""

    def __init__(self, config: LongNetConfig):
        LongNetPreTrainedModel.__init__(self, config)
        self.model = LongNetModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()


AUTO_CLASSES = {
    "AutoModel": LongNetModel,
    "AutoModelForCausalLM": LongNetForCausalLM,
    "AutoModelForSequenceClassification": LongNetForSequenceClassification,
    "AutoModelForTokenClassification": LongNetForTokenClassification,
    "AutoModelForQuestionAnswering": LongNetForQuestionAnswering,
}
# Saved with every model, so that code which comes from the Hub serves all Auto classes, not only the one that was
# saved.
AUTO_MAP = {"AutoConfig": "configuration_longnet.LongNetConfig"} | {
    auto_class: f"modeling_longnet.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES.items()
}
LongNetConfig.register_for_auto_class()
# By this table Trainer knows whose labels its label smoothing has to shift. Auto classes do not read it for our type.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LongNetConfig.model_type] = LongNetForCausalLM.__name__
for _auto_class, _model_class in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)
# What `LoraConfig` adapts where it names no `target_modules`: as of Llama
if LORA_TARGETS is not None:
    LORA_TARGETS[LongNetConfig.model_type] = ["q_proj", "v_proj"]


__all__ = [
    "LongNetPreTrainedModel",
    "LongNetAttention",
    *(model_class.__name__ for model_class in AUTO_CLASSES.values()),
]
