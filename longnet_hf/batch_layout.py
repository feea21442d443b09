"""How the tokens of a batch lie in their documents, and how they attend: decided once per forward pass.

A caller says where documents begin and end in one of several ways (a padding mask, positions that restart, cumulative
lengths), and the keys may be at hand, in a cache, or on other processes. `lay_out_batch` turns all of that into one
object, whose `attend` every layer calls:

- `WholeBatch`: all keys are at hand, those of an ordinary cache included;
- `CachedBatch`: a `DilatedCache` holds what the pattern can still ask for of earlier tokens;
- `SplitBatch`: other processes hold the other parts of the sequence.

LongNet and the attention exchanged in other models (dilated_interface.py) both go this way.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .context_parallel import ActiveSplit, SequenceSplit, SplitDocuments, active_split, split_attention
from .dilated_cache import DilatedCache, NewTokens, is_dilated_cache, is_empty
from .dilated_operator import dilated_attention, dilated_attention_reference, dilated_attention_weights
from .dilated_pattern import DilatedPattern
from .dilated_tiles import accumulator
from .documents import check_position_shape, find_documents, is_packed
from .input_checks import check_mask, check_tensor


# What the installed Transformers calls a cache, renamed in 5.24. This and `one_cache` serve both names.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, kwargs: dict) -> Cache | None:
    """`past_key_values`, or what `kwargs` hold under the other name, which is taken out."""
    cache = kwargs.pop("cache", None)
    if cache is None:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
    return cache


class BatchInputs(NamedTuple):
    """What the caller of a model says of the new tokens of a batch, B rows of N.

    Args:
        batch_size, length, device: B, N, and where the tokens are.
        attention_mask: `[B, past + N]`, nonzero at real tokens.
        position_ids: `[B, N]` or `[1, N]`.
        cu_seq_lens: `[documents + 1]`, boundaries of documents in the flattened batch.
        seq_idx: `[B, N]`, numbers of documents.
    """

    batch_size: int
    length: int
    device: torch.device
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None

    @property
    def new_mask(self) -> torch.Tensor | None:
        """The part of the mask that is about the new tokens, `[B, N]`."""
        return None if self.attention_mask is None else self.attention_mask[:, -self.length :]


class AttentionOptions(NamedTuple):
    """How one layer attends.

    Args:
        pattern: which pairs are joined.
        scale: factor of the scores.
        dropout: probability of dropping a pair; 0 in evaluation.
        is_dense: compute the dense reference, which can return its weights, in place of the operator.
        segment_padding: `"zeros"` to attend to the padding of segments, in a whole batch that is not causal.
    """

    pattern: DilatedPattern
    scale: float
    dropout: float = 0.0
    is_dense: bool = False
    segment_padding: str = "none"


class BatchLayout:
    """How the tokens of a batch lie in their documents, and which keys are at hand.

    With `keeps_results`, layers that a checkpoint computes twice attend once: what they gave is kept here.
    """

    def __init__(self):
        self.keeps_results = False
        self._kept: dict[int, dict] = {}

    def kept_by(self, layer_idx: int) -> dict | None:
        """For the `kept` of a layer's attention."""
        return self._kept.setdefault(layer_idx, {}) if self.keeps_results else None

    def rows_received(self, pattern: DilatedPattern, num_heads: int, device: torch.device) -> int:
        """How many keys of single heads, and as many values, come from other processes, for a layer."""
        return 0


class WholeBatch(BatchLayout):
    """A batch whose keys are all at hand: those of the new tokens, after those that an ordinary cache holds.

    Args:
        document_ids: `[B, past + N]` from `find_documents`, or `None`: one document per row, without padding.
        is_causal: hide later keys.
        inputs: what the caller said of the new tokens, where a model goes on to use it.
        position_ids: `[B, N]` or `[1, N]`, for rotary positions.
    """

    def __init__(
        self,
        document_ids: torch.Tensor | None,
        is_causal: bool,
        inputs: BatchInputs | None = None,
        position_ids: torch.Tensor | None = None,
    ):
        super().__init__()
        self.document_ids, self.is_causal = document_ids, is_causal
        self.inputs, self.position_ids = inputs, position_ids

    @property
    def can_fill_a_cache(self) -> bool:
        """Whether later tokens could continue these rows: packed rows could continue only one of their documents."""
        return self.is_causal and not is_packed(self.document_ids)

    def filling(self, past_key_values: Cache) -> "WholeBatch":
        """The layout of the same batch where an empty cache takes its keys."""
        if is_dilated_cache(past_key_values):
            return CachedBatch(self.document_ids, self.is_causal, self.inputs, past_key_values)
        return self

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let the new tokens attend, for a layer of a model.

        Args:
            module: the attention module, which knows its `layer_idx`.
            query: `[B, H, N, D]`.
            key, value: `[B, Hkv, N, D]`.
            past_key_values: holds earlier keys and values, and takes these.

        Returns:
            The output `[B, N, H, D]`, and the weights `[B, H, N, past + N]` with `options.is_dense`, else `None`.
        """
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        arguments = dict(dropout=options.dropout, **self._arguments(options))
        if options.is_dense:
            arguments["return_weights"] = True
            output, weights = dilated_attention_reference(query, key, value, options.pattern, **arguments)
            return output.transpose(1, 2), weights
        if options.dropout == 0 and not torch.compiler.is_compiling():
            arguments["kept"] = self.kept_by(module.layer_idx)
        return dilated_attention(query, key, value, options.pattern, **arguments).transpose(1, 2), None

    def weights(
        self, query: torch.Tensor, key: torch.Tensor, options: AttentionOptions, rows: torch.Tensor
    ) -> torch.Tensor:
        """The weights `[B, H, R, N]` of the queries in the columns `rows` `[R]`, where there is no cache."""
        query, key = (x.to(accumulator(x.dtype)) for x in (query[:, :, rows], key))
        return dilated_attention_weights(query, key, options.pattern, rows, **self._arguments(options))

    def _arguments(self, options: AttentionOptions) -> dict:
        return dict(
            is_causal=self.is_causal,
            scale=options.scale,
            document_ids=self.document_ids,
            segment_padding=options.segment_padding,
        )


class CachedBatch(WholeBatch):
    """A batch of which a [`DilatedCache`] holds the earlier tokens, or takes the first. Making one counts the new
    tokens in the cache; every layer then takes their keys."""

    def __init__(
        self, document_ids: torch.Tensor | None, is_causal: bool, inputs: BatchInputs, past_key_values: DilatedCache
    ):
        self.tokens: NewTokens = past_key_values.count_tokens(
            inputs.batch_size, inputs.length, inputs.device, inputs.new_mask
        )
        position_ids = self.tokens.positions if inputs.position_ids is None else inputs.position_ids
        super().__init__(document_ids, is_causal, inputs, position_ids)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        past_key_values: DilatedCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # What is seen of a cache depends on the position: for more than a token, torch.compile leaves that alone
        attend = self._attend if query.shape[2] == 1 else self._attend_uncompiled
        return attend(module, query, key, value, options, past_key_values)

    def _attend(self, module, query, key, value, options, past_key_values):
        if self.tokens.is_first:
            past_key_values.update(key, value, module.layer_idx, self.tokens)
            return super().attend(module, query, key, value, options)
        output = past_key_values.attend(
            query, key, value, module.layer_idx, self.tokens, scale=options.scale, dropout=options.dropout
        )
        return output.transpose(1, 2), None

    _attend_uncompiled = torch.compiler.disable(_attend)


class SplitBatch(BatchLayout):
    """A batch of sequences of which this process holds a part, and other processes the others.

    Args:
        documents: which positions the processes hold, and where the documents lie.
        position_ids: `[B, N / P]` or `[1, N / P]`, of this process's tokens in the whole sequence.
        tokens: the whole sequence as a cache counts it, if a cache takes it.

    All processes must have the same `keeps_results`.
    """

    can_fill_a_cache = False  # which the model would make by itself: what follows a token does not change its output

    def __init__(self, documents: SplitDocuments, position_ids: torch.Tensor, tokens: NewTokens | None = None):
        super().__init__()
        self.documents, self.position_ids, self.tokens = documents, position_ids, tokens

    @classmethod
    def of(
        cls, inputs: BatchInputs, active: ActiveSplit, is_causal: bool, past_key_values: Cache | None = None
    ) -> "SplitBatch":
        """The layout of a part of a sequence. Every process calls this, and all of them refuse together."""
        split = active.sequence(inputs.length, inputs.device)
        if past_key_values is not None:
            _check_cache_of_split(past_key_values, inputs.attention_mask)
        if not is_causal:
            raise ValueError("A sequence can be split over processes in causal attention only (`is_causal=True`).")
        documents = split.find_documents(
            inputs.batch_size,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            cu_seq_lens=inputs.cu_seq_lens,
            seq_idx=inputs.seq_idx,
        )
        tokens = None
        if past_key_values is not None:
            if not documents.is_one_per_row:
                raise ValueError(_PACKED_INTO_CACHE)
            tokens = past_key_values.count_tokens(inputs.batch_size, split.length, inputs.device)
        position_ids = inputs.position_ids
        if position_ids is None:
            position_ids = split.positions(inputs.device)[None]
        return cls(documents, position_ids, tokens)

    @property
    def split(self) -> SequenceSplit:
        return self.documents.split

    def rows_received(self, pattern: DilatedPattern, num_heads: int, device: torch.device) -> int:
        return sum(self.documents.exchange(pattern, num_heads, device).receive_splits)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        past_key_values: DilatedCache | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Let this process's tokens attend to those of all processes: see [`WholeBatch.attend`]."""
        if options.is_dense:
            raise ValueError('`attn_implementation="eager"` cannot attend to a sequence that is split over processes.')
        if options.dropout > 0:
            raise ValueError(
                "A sequence cannot be split over processes in training with `attention_dropout` above 0, got "
                f"{options.dropout}."
            )
        output = self._attend(module.layer_idx, query, key, value, options)
        if past_key_values is not None:
            past_key_values.update_collected(
                key, value, module.layer_idx, self.tokens, self.split.length, self.split.collect
            )
        return output.transpose(1, 2), None

    @torch.compiler.disable  # as `split_attention`; what is kept by then would else be another graph for every layer
    def _attend(self, layer_idx: int, query, key, value, options: AttentionOptions) -> torch.Tensor:
        kept = self.kept_by(layer_idx)
        return split_attention(query, key, value, options.pattern, self.documents, options.scale, kept)


def lay_out_batch(inputs: BatchInputs, is_causal: bool, past_key_values: Cache | None = None) -> BatchLayout:
    """Decide, for a forward pass of a model, how its batch is laid out.

    Raises:
        ValueError: if shapes or types do not fit, or if the cache or the split cannot honour what is asked for.
    """
    active = active_split()
    _check_types(inputs, is_split=active is not None)
    if active is not None:
        return SplitBatch.of(inputs, active, is_causal, past_key_values)
    if is_dilated_cache(past_key_values):
        if inputs.attention_mask is not None:
            past_key_values.check_mask(inputs.attention_mask, inputs.length)
        return CachedBatch(_documents_of(inputs, past_key_values), is_causal, inputs, past_key_values)
    document_ids = _documents_of(inputs, past_key_values)
    return WholeBatch(document_ids, is_causal, inputs, _positions_of(inputs, past_key_values))


def _check_types(inputs: BatchInputs, is_split: bool) -> None:
    mask = inputs.attention_mask
    if mask is not None:
        check_mask("attention_mask", mask)
        # A part of a sequence that is split may be padding alone
        may_be_added = mask.is_floating_point() and not (is_split or torch.compiler.is_compiling())
        if may_be_added and not bool(mask.any()):  # which would hide nothing
            raise ValueError(
                "`attention_mask` must be 1 at real tokens and 0 at padding, got floats that are all 0. (A mask that "
                "is added to scores says the contrary. For a batch of padding alone give integers or bool.)"
            )
    if inputs.position_ids is not None:
        check_tensor("position_ids", inputs.position_ids, "integers")
    if inputs.cu_seq_lens is not None:
        check_tensor("cu_seq_lens", inputs.cu_seq_lens, "integers")
    if inputs.seq_idx is not None:
        shape = () if is_split else (inputs.batch_size, inputs.length)  # of a split sequence all may be given
        check_tensor("seq_idx", inputs.seq_idx, "integers", *shape)


def is_exporting() -> bool:
    """Whether `torch.export` follows what happens. To PyTorch 2.11, whatever Dynamo traces is an export."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def check_cache(
    past_key_values: Cache, patterns: list[DilatedPattern], *, is_causal: bool, is_eager: bool = False
) -> None:
    """Refuse, for a model whose layers have `patterns`, a cache that does not hold what these ask for."""
    layers = getattr(past_key_values, "layers", None)
    kinds = {type(layer) for layer in layers or ()}
    made = getattr(past_key_values, "layer_class_to_replicate", None)  # of a cache that makes them when keys come
    if made is not None:
        kinds.add(getattr(made, "func", made))
    is_dynamic = layers is not None and kinds <= {DynamicLayer}
    if not is_dynamic and not is_dilated_cache(past_key_values):
        kinds = sorted(kind.__name__ for kind in kinds) or [type(past_key_values).__name__]
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
    if is_exporting():
        raise ValueError(
            "`torch.export` cannot follow a DilatedCache, whose counts decide what is computed: export with a "
            'DynamicCache (`cache_implementation="dynamic"` in `generate`), or without a cache (`use_cache=False`).'
        )
    if not past_key_values.fits(patterns):
        raise ValueError("`past_key_values` is a DilatedCache for other patterns or another number of layers.")
    if is_eager:
        raise ValueError(
            '`past_key_values` must be a DynamicCache where `attn_implementation` is "eager", got a DilatedCache.'
        )


_PACKED_INTO_CACHE = "`past_key_values` cannot take a row of several packed documents: give one per row."


def _documents_of(inputs: BatchInputs, past_key_values: Cache | None) -> torch.Tensor | None:
    """Document of every token, cached ones included. `None` if each row is one document without padding, or if nothing
    asks for it: a DilatedCache counts for itself what follows its first tokens."""
    if is_empty(past_key_values):
        document_ids = new_documents_of(inputs)
        if past_key_values is not None and is_packed(document_ids):
            raise ValueError(_PACKED_INTO_CACHE)
        return document_ids
    if inputs.cu_seq_lens is not None or inputs.seq_idx is not None:
        raise ValueError("`cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` cannot be used with `past_key_values`.")
    batch_size, length, position_ids = inputs.batch_size, inputs.length, inputs.position_ids
    if position_ids is not None:
        check_position_shape(position_ids, batch_size, length)
    # Of single tokens not on a GPU, for which every step of decoding would wait
    is_looked_at = position_ids is not None and (length > 1 or inputs.device.type == "cpu")
    is_looked_at = is_looked_at and not torch.compiler.is_compiling()
    if is_looked_at:
        new = find_documents(batch_size, length, attention_mask=inputs.new_mask, position_ids=position_ids)
        if is_packed(new):
            raise ValueError("`position_ids` restart: several documents cannot continue `past_key_values`.")
    document_ids = None
    if not is_dilated_cache(past_key_values):
        past_length = past_key_values.get_seq_length()
        document_ids = find_documents(batch_size, past_length + length, attention_mask=inputs.attention_mask)
    if is_looked_at:
        held = _held_tokens(past_key_values, document_ids, batch_size)
        if len(held) == batch_size:  # or else the cache refuses the batch
            _check_continuation(inputs, held)
    return document_ids


def _held_tokens(past_key_values: Cache, document_ids: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """How many tokens of each row a cache holds, without padding, `[B]`."""
    if is_dilated_cache(past_key_values):
        return past_key_values.positions
    past_length = past_key_values.get_seq_length()
    if document_ids is None:
        return torch.full((batch_size,), past_length)
    return (document_ids[:, :past_length] >= 0).sum(1)


def _check_continuation(inputs: BatchInputs, held: torch.Tensor) -> None:
    """Refuse rows whose new tokens begin at a position that their cached ones, `held` `[B]` of them, have passed: the
    positions of a document grow from 0 on."""
    first = inputs.position_ids.long().expand(inputs.batch_size, -1)
    if inputs.new_mask is not None:
        is_padding = inputs.new_mask.to(first.device) == 0
        first = first.masked_fill(is_padding, torch.iinfo(first.dtype).max)
    first, held = first.amin(1), held.to(first.device)
    is_passed = first < held
    if bool(is_passed.any()):
        row = int(is_passed.int().argmax())
        raise ValueError(
            f"`position_ids` of the new tokens begin at {int(first[row])} in row {row}, of which `past_key_values` "
            f"holds {int(held[row])} tokens: they must go on from there. A new document cannot continue a cache."
        )


def new_documents_of(inputs: BatchInputs) -> torch.Tensor | None:
    """Document of every token where none came before."""
    document_ids = find_documents(
        inputs.batch_size,
        inputs.length,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        cu_seq_lens=inputs.cu_seq_lens,
    )
    if inputs.seq_idx is None:
        return document_ids
    return inputs.seq_idx if document_ids is None else inputs.seq_idx.masked_fill(document_ids < 0, -1)


def _positions_of(inputs: BatchInputs, past_key_values: Cache | None) -> torch.Tensor:
    """Position of every new token, `[B, N]` or `[1, N]`: those given, or else real tokens are counted."""
    if inputs.position_ids is not None:
        return inputs.position_ids
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if inputs.attention_mask is None:
        return torch.arange(past_length, past_length + inputs.length, device=inputs.device)[None]
    return (inputs.attention_mask != 0).long().cumsum(-1)[:, past_length:].sub(1).clamp(min=0)


def _check_cache_of_split(past_key_values: Cache, attention_mask: torch.Tensor | None) -> None:
    if not is_dilated_cache(past_key_values) or not is_empty(past_key_values) or torch.is_grad_enabled():
        raise ValueError(
            "`past_key_values` of a sequence that is split over processes must be an empty DilatedCache, and "
            "gradients disabled (`torch.no_grad()`)."
        )
    if attention_mask is not None:
        raise ValueError(
            "`attention_mask` cannot be used with `past_key_values` in a sequence that is split over "
            "processes: take padding back with `past_key_values.crop`."
        )


__all__ = ["AttentionOptions", "BatchInputs", "CachedBatch", "SplitBatch", "WholeBatch", "lay_out_batch"]
