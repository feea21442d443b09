"""A cache that keeps the keys that some branch can still ask for, and no others: decoding in constant time and memory.

Every head has a ring of slots in every branch. The branch keeps every r-th key, numbered 0, 1, ... from the start of
the document, and key number k lies in slot k mod C of the ring. All that a query can ask for are consecutive numbers,
those of the open segment or of the last w positions, and C is chosen so that they fit. So a key leaves the cache when
the key C numbers later takes its slot: in `DilatedLayer.update`, which writes to the slots of `_Rings.slot`.

A key that several branches keep lies in a slot of each. The softmax over all slots that a query may see is then the
pattern's own, over its multiset of keys: one masked attention, whatever the branches (see
`DilatedPattern.multiplicity`).

The file reads from top to bottom: new tokens, the cache, a layer of it, the arithmetic of its slots.
Shapes: B batch, H query heads, Hkv key/value heads, L new tokens, D head size, S slots of all branches together.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .dilated_operator import dilated_attention
from .dilated_past import PastTile, attend_to_past, past_tiles
from .dilated_pattern import Branch, DilatedPattern
from .dilated_tiles import TileKernel
from .documents import check_padding_mask


# The length of a window's only segment
_UNBOUNDED = 1 << 60
# Most new tokens that attend to all slots at once where there is no GPU, which would rather do more work in one go
_BLOCK_ON_CPU = 1

# What a saved cache calls itself, and the names of tensors in its file: those of the attributes when it was defined
_FORMAT = "longnet_hf.DilatedCache 1"
_STATE = {"columns": "columns", "positions": "positions", "furthest": "max_positions", "last_real": "last_real"}


def is_dilated_cache(past_key_values: Cache | None) -> bool:
    """Whether a model was given a [`DilatedCache`], be it of this module or of the copy in code from the Hub."""
    return getattr(past_key_values, "is_dilated_cache", False)


def is_pruned(past_key_values: Cache | None, layer_idx: int) -> bool:
    """Whether a layer of a cache keeps only the keys that its pattern can still ask for."""
    return past_key_values is not None and getattr(past_key_values.layers[layer_idx], "is_pruned", False)


def is_empty(past_key_values: Cache | None) -> bool:
    """Whether a model has no earlier tokens to attend to. Of a [`DilatedCache`] it learns so without waiting for the
    GPU, which holds the counts."""
    if past_key_values is None:
        return True
    if is_dilated_cache(past_key_values):
        return past_key_values.positions is None
    return past_key_values.get_seq_length() == 0


class Continuation(NamedTuple):
    """Rows of a batch whose new tokens continue their documents from one position, for attention in one call."""

    rows: slice
    columns: torch.Tensor | None  # of the real tokens; `None`: all are
    position: int  # of the first real token


class NewTokens:
    """New tokens `[B, L]` of a batch, for the layers of a cache: which are real, where they lie in their documents.

    Args:
        is_first: whether the cache was empty before.
        has_padding: whether some of the tokens may not be real.
        real: `[B, L]` bool.
        positions_before: `[B]`, position of the next real token before these came.
    """

    def __init__(self, is_first: bool, has_padding: bool, real: torch.Tensor, positions_before: torch.Tensor):
        count = real.cumsum(1)
        self.is_first, self.has_padding, self.real = is_first, has_padding, real
        self.positions_before = positions_before
        self.positions = (positions_before[:, None] + count - 1).clamp(min=0)  # [B, L]
        self.positions_after = positions_before + count[:, -1]  # [B]
        self._of_pattern: dict[tuple, object] = {}
        self._on_device: dict[torch.device, NewTokens] = {}

    def on(self, device: torch.device) -> "NewTokens":
        """The same tokens for the layers of a model that lie on another device."""
        if device == self.real.device:
            return self
        if device not in self._on_device:
            real, positions_before = self.real.to(device), self.positions_before.to(device)
            self._on_device[device] = NewTokens(self.is_first, self.has_padding, real, positions_before)
        return self._on_device[device]

    def once_per_pattern(self, method: Callable, layer: "DilatedLayer", *args):
        """`method(layer, self, *args)`, computed by the first of the layers that share a pattern, for all of them."""
        key = method.__name__, layer.pattern_index, *args
        if key not in self._of_pattern:
            self._of_pattern[key] = method(layer, self, *args)
        return self._of_pattern[key]

    @functools.cached_property
    def continuations(self) -> list[Continuation]:
        """The rows that attention can take together: all in one, or each by itself. Rows of padding are left out."""
        positions, length = self.positions_before.tolist(), self.real.shape[1]
        counts = self.real.sum(1).tolist()
        if min(counts) == length and min(positions) == max(positions):
            return [Continuation(slice(None), None, positions[0])]
        continuations = []
        for row, (position, count) in enumerate(zip(positions, counts, strict=True)):
            columns = None if count == length else self.real[row].nonzero()[:, 0]
            if count:
                continuations.append(Continuation(slice(row, row + 1), columns, position))
        return continuations


class DilatedCache(Cache):
    """The cache of a LongNet: at most `sum(w / r)` live keys per head, at any length, in storage of fixed size.

    `generate`, and the model with `use_cache=True`, make one by themselves. A pattern with a window without bound (the
    full-attention layers of a hybrid stack) keeps everything, in Transformers' own dynamic layer.

    What was dropped is gone: only the last `reserve` tokens can be taken back, by `crop` or by a mask that makes
    padding of them. No gradients flow into the keys and values of earlier calls; asking for them is an error. A
    `DynamicCache` has none of these limits, and can be given in its place.

    Args:
        config: configuration of the model.
        reserve: how many tokens can be taken back. Each costs one key in r of every branch.
        offloading: keep the layers on the CPU, but for those in use.

    Raises:
        ValueError: if `reserve` is negative, or if `config` has no dilated patterns.
    """

    is_dilated_cache = True

    def __init__(self, config: PreTrainedConfig, reserve: int = 255, offloading: bool = False):
        if not hasattr(config, "layer_patterns"):
            raise ValueError(f"`config` must be that of a LongNet, got {type(config).__name__}.")
        if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0:
            raise ValueError(f"`reserve` must be an integer of at least 0, got {reserve!r}.")
        self.reserve, self.patterns = reserve, [pattern.canonical() for pattern in config.layer_patterns]
        options = {"offload_only_non_sliding": False} if offloading else {}
        super().__init__(layers=self._make_layers(), offloading=offloading, **options)
        self._forget()

    def _make_layers(self) -> list[CacheLayerMixin]:
        return [
            DynamicLayer()
            if pattern.max_live_keys() is None
            else DilatedLayer(pattern, self.reserve, self.patterns.index(pattern))
            for pattern in self.patterns
        ]

    def _forget(self) -> None:
        self.columns: torch.Tensor | None = None  # [], tokens taken so far, padding included
        self.positions: torch.Tensor | None = None  # [B], real tokens among them: the position of the next
        self.max_positions: torch.Tensor | None = None  # [B], the largest that `positions` has been
        # [B, 2 * reserve], which of the last tokens are real: `reserve` of them are known after `crop`, too
        self.last_real: torch.Tensor | None = None

    def _start(self, batch_size: int, device: torch.device | str) -> None:
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_positions = torch.zeros_like(self.positions)
        self.last_real = torch.zeros(batch_size, 2 * self.reserve, dtype=torch.bool, device=device)
        if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
            for name in _STATE.values():
                torch._dynamo.mark_static_address(getattr(self, name))

    @property
    def is_fully_pruned(self) -> bool:
        """Whether no layer holds all keys: then none asks for a mask of tokens that came before."""
        return all(is_pruned(self, layer_idx) for layer_idx in range(len(self.layers)))

    def fits(self, patterns: list[DilatedPattern]) -> bool:
        """Whether the layers of a model have the patterns (`canonical()`) of the cache."""
        # Not the patterns themselves: code from the Hub has its own copy of their class
        return [pattern.to_json() for pattern in patterns] == [pattern.to_json() for pattern in self.patterns]

    def count_tokens(
        self, batch_size: int, length: int, device: torch.device | str, real: torch.Tensor | None = None
    ) -> NewTokens:
        """Count new tokens `[B, L]`, once per forward pass: every layer then takes them with [`update`] or [`attend`].

        Args:
            real: `[B, L]`, nonzero where there is no padding; default: everywhere.
        """
        if real is not None and real.shape != (batch_size, length):
            expected = batch_size, length
            raise ValueError(f"The mask of the new tokens must have shape {expected}, got {tuple(real.shape)}.")
        is_first = self.positions is None
        if is_first:
            self._start(batch_size, device)
        elif len(self.positions) != batch_size:
            raise ValueError(f"`past_key_values` holds a batch of {len(self.positions)} rows, got {batch_size} rows.")
        has_padding = real is not None
        if real is None:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        real = (real != 0).to(self.positions.device)
        tokens = NewTokens(is_first, has_padding, real, self.positions.clone())
        self.columns += length
        self.positions.copy_(tokens.positions_after)
        self.max_positions.copy_(torch.maximum(self.max_positions, tokens.positions_after))
        self.last_real.copy_(torch.cat((self.last_real, real), dim=1)[:, length:])
        return tokens

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        tokens: NewTokens,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Take new keys and values, and attend to what the pattern joins of them and of all before them.

        Args:
            query: `[B, H, L, D]`.
            key, value: `[B, Hkv, L, D]`.
            tokens: from [`count_tokens`].

        Returns:
            `[B, H, L, D]`, zeros at padding and at queries that no branch joins to any key.
        """
        layer, tokens = self.layers[layer_idx], tokens.on(query.device)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        longest_block = self.reserve + 1 if query.is_cuda else min(self.reserve + 1, _BLOCK_ON_CPU)
        with torch.no_grad():
            if query.shape[2] <= longest_block:
                keys, values = self.update(key, value, layer_idx, tokens)
                output = layer.attend_to_slots(query, keys, values, tokens, scale, dropout)
            else:  # the last of the new keys may take the slots of keys that the first of the new queries see
                if self.offloading:
                    torch.cuda.default_stream(key.device).wait_stream(self.prefetch_stream)
                output = layer.attend_before_update(query, key, value, tokens, scale, dropout)
                self.update(key, value, layer_idx, tokens)
        return _NoGradient.apply(output, query, key, value) if torch.is_grad_enabled() else output

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        tokens: NewTokens | None = None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values `[B, Hkv, L, D]`, of tokens that [`count_tokens`] counted (default: counts them
        here, as the only layer's, without padding).

        Returns the slots of a pruned layer, where [`attend`] finds them, and all keys and values of others.
        """
        if not is_pruned(self, layer_idx):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if tokens is None:
            tokens = self.count_tokens(key_states.shape[0], key_states.shape[2], key_states.device)
        return super().update(key_states.detach(), value_states.detach(), layer_idx, tokens.on(key_states.device))

    def update_collected(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        tokens: NewTokens,
        length: int,
        collect: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Take the first tokens, without padding, of a sequence that is split over processes. All processes call this,
        and each of them then holds what is kept of the whole sequence.

        Args:
            key_states, value_states: `[B, Hkv, N / P, D]`, of the tokens of this process.
            tokens: from [`count_tokens`], of the whole sequence.
            length: of the whole sequence.
            collect: gives the rows `[B, Hkv, K, D]` of `key_states` or `value_states` of all processes, for positions
                `[B, Hkv, K]` in the whole sequence; zeros where a position is below 0.
        """
        if not is_pruned(self, layer_idx):
            positions = torch.arange(length, device=key_states.device).expand(*key_states.shape[:2], -1)
            super().update(collect(key_states, positions), collect(value_states, positions), layer_idx)
            return
        layer = self.layers[layer_idx]
        layer.lazy_initialization(key_states, value_states)
        positions = layer.slots.positions_held(tokens.on(key_states.device).positions_after)
        layer.keys[:, :, :-1] = collect(key_states, positions)
        layer.values[:, :, :-1] = collect(value_states, positions)

    def check_mask(self, attention_mask: torch.Tensor, length: int) -> None:
        """Learn from the mask of all tokens, `[B, columns + length]`, which of those in the cache have become padding.
        They must be the last of their rows, and are taken back. A mask of the new tokens alone says nothing of them.

        Raises:
            ValueError: if the shape is another, or if the mask contradicts the cache otherwise.
        """
        if attention_mask.dim() == 2 and attention_mask.shape[1] == length:
            return
        columns = self.get_seq_length()
        batch_size = attention_mask.shape[0] if self.positions is None else len(self.positions)
        shape = batch_size, columns + length
        check_padding_mask(attention_mask, shape, "(batch, cached and new tokens)")
        real = attention_mask[:, :columns].to(self.positions.device) != 0
        known = min(columns, self.reserve)
        is_real, was_real = real[:, columns - known :], self.last_real[:, 2 * self.reserve - known :]
        is_masked = was_real & ~is_real
        is_wrong = real.sum(1) + is_masked.sum(1) != self.positions
        is_wrong |= (is_real & ~was_real).any(1)
        is_wrong |= ((is_masked.cumsum(1) > 0) & is_real).any(1)  # not the last of their row
        if bool(is_wrong.any()):
            row = int(is_wrong.int().argmax())
            raise ValueError(
                f"`attention_mask` makes {int(real[row].sum())} of the tokens in row {row} of `past_key_values` real, "
                f"of which {int(self.positions[row])} were when they were cached. A DilatedCache drops keys for good: "
                f"only the last {self.reserve} tokens of a row can become padding afterwards "
                "(`DilatedCache(config, reserve=...)`). A DynamicCache has no such limit."
            )
        if bool(is_masked.any()):
            self._go_back(self.positions - is_masked.sum(1))
            self.last_real[:, 2 * self.reserve - known :] = is_real

    def _go_back(self, positions: torch.Tensor) -> None:
        distance = int((self.max_positions - positions).max())
        if distance > self.reserve:
            raise ValueError(
                f"Cannot go back {distance} tokens: keys that are then needed are dropped. A "
                f"`DilatedCache(config, reserve=...)` can go back `reserve` tokens, this one {self.reserve}."
            )
        self.positions.copy_(positions)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: `-tokens_to_remove` of them, at most `reserve`.

        Raises:
            ValueError: if there are not so many, or if keys that are then needed are dropped already.
        """
        columns = self.get_seq_length()
        if tokens_to_remove > 0:  # how many to keep, as Transformers had it before 5.18
            tokens_to_remove = min(0, tokens_to_remove - columns)
        count = -tokens_to_remove
        if count == 0 or columns == 0:
            return
        if count > columns:
            raise ValueError(f"`tokens_to_remove` is {tokens_to_remove}, and the cache holds {columns} tokens.")
        self._go_back(self.positions - (self.last_real[:, -count:].sum(1) if count <= self.reserve else count))
        for layer in self.layers:
            layer.crop(tokens_to_remove)
        self.columns -= count
        self.last_real.copy_(self.last_real.roll(count, dims=1))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.positions is not None:
            self.positions, self.max_positions = function(self.positions), function(self.max_positions)
            self.last_real = function(self.last_real)

    def reset(self) -> None:
        self.layers[:] = self._make_layers()
        self._forget()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.columns is None else int(self.columns)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def save(self, file: str | os.PathLike, model: PreTrainedModel) -> None:
        """Write the cache to a safetensors file; what was there before is replaced once the new file is whole.

        Args:
            model: whose keys these are. Patterns and weights are checked on loading.
        """
        if self.positions is None:
            raise ValueError("The cache is empty: there is nothing to save.")
        tensors = {name: getattr(self, attribute) for name, attribute in _STATE.items()}
        for layer_idx, layer in enumerate(self.layers):
            tensors |= {f"layers.{layer_idx}.keys": layer.keys, f"layers.{layer_idx}.values": layer.values}
        metadata = {
            "format": _FORMAT,
            "patterns": json.dumps([pattern.to_json() for pattern in self.patterns]),
            "reserve": str(self.reserve),
            "model": _fingerprint(model),
        }
        unfinished = f"{os.fspath(file)}.unfinished"
        save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata)
        os.replace(unfinished, file)

    @classmethod
    def load(cls, file: str | os.PathLike, model: PreTrainedModel) -> "DilatedCache":
        """The cache in a file that [`save`] wrote, on the devices of `model`.

        Raises:
            ValueError: if it is no such file, or if the cache was filled by another model or with other patterns.
        """
        with safe_open(file, framework="pt") as saved:
            metadata = saved.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"`file` holds no DilatedCache: {os.fspath(file)!r}.")
            cache = cls(model.config, reserve=int(metadata["reserve"]))
            if json.loads(metadata["patterns"]) != [pattern.to_json() for pattern in cache.patterns]:
                raise ValueError(f"The cache in {os.fspath(file)!r} has other patterns than `model`.")
            if metadata["model"] != _fingerprint(model):
                raise ValueError(
                    f"The cache in {os.fspath(file)!r} was filled by another model: `model` has other weights, or the "
                    "same in another dtype."
                )
            for name, attribute in _STATE.items():
                setattr(cache, attribute, saved.get_tensor(name).to(model.device))
            for layer_idx, (layer, module) in enumerate(zip(cache.layers, model.base_model.layers, strict=True)):
                device = next(module.parameters()).device
                keys, values = (saved.get_tensor(f"layers.{layer_idx}.{name}") for name in ("keys", "values"))
                layer.lazy_initialization(keys[:, :, :0].to(device), values[:, :, :0].to(device))
                if is_pruned(cache, layer_idx):
                    layer.keys.copy_(keys)
                    layer.values.copy_(values)
                else:
                    layer.keys, layer.values = keys.to(device), values.to(device)
        return cache


class DilatedLayer(CacheLayerMixin):
    """The slots of one layer, and attention to them: keys and values `[B, Hkv, S + 1, D]`. The last slot takes new
    keys that no branch keeps."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    is_pruned = True

    def __init__(self, pattern: DilatedPattern, reserve: int, pattern_index: int = 0):
        super().__init__()
        self.pattern, self.reserve = pattern, reserve
        self.pattern_index = pattern_index  # the same for all layers of the model that have this pattern

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.num_heads = key_states.dtype, key_states.device, key_states.shape[1]
        self.slots = _slots(self.pattern, self.num_heads, self.reserve, self.device)
        batch, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.slots.count + 1, size)
        self.values = torch.zeros_like(self.keys)
        if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: NewTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values `[B, Hkv, L, D]`; returns those in the slots. What lay in a slot before is
        overwritten: so keys leave the cache. If L exceeds `reserve` + 1, the last of the new keys may overwrite what
        the first of the new queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        pairs = (self.keys, key_states), (self.values, value_states)
        with torch.no_grad():
            if key_states.shape[2] <= self.reserve + 1:  # no two of the new keys have one slot
                index = tokens.once_per_pattern(DilatedLayer._slots_of_new_keys, self)
                for stored, new in pairs:
                    # torch.compile does this in place, unlike scatter_
                    stored.index_put_(index, new[:, :, :, None].to(stored.dtype))
            else:
                column, is_new = tokens.once_per_pattern(DilatedLayer._new_keys_of_slots, self)
                column = column[..., None].expand(-1, -1, -1, key_states.shape[-1])
                for stored, new in pairs:
                    stored[:, :, :-1] = torch.where(is_new[..., None], new.gather(2, column), stored[:, :, :-1])
        return self.keys, self.values

    def _slots_of_new_keys(self, tokens: NewTokens) -> tuple[torch.Tensor, ...]:
        """Row, head and slot of new keys, `[B, Hkv, L, branches]`; the last slot where a branch does not keep one."""
        rings, position = self.slots.rings, tokens.positions[..., None, None]
        is_kept = rings.keeps(position) & tokens.real[..., None, None]
        slot = torch.where(is_kept, rings.slot(position), self.slots.count).transpose(1, 2)
        row, head = (torch.arange(size, device=slot.device) for size in slot.shape[:2])
        return row[:, None, None, None], head[:, None, None], slot

    def _new_keys_of_slots(self, tokens: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of the new key that a slot takes, and whether it takes any, `[B, Hkv, S]` each."""
        positions = self.slots.positions_held(tokens.positions_after)
        number = positions - tokens.positions_before[:, None, None]  # among the new tokens that are real
        real_first = torch.argsort(~tokens.real, dim=1, stable=True)
        column = real_first[:, None].expand(-1, self.num_heads, -1).gather(2, number.clamp(min=0))
        return column, number >= 0

    def attend_to_slots(self, query, keys, values, tokens: NewTokens, scale: float, dropout: float) -> torch.Tensor:
        """Attention of new queries to what [`update`] returned, which holds their keys: one masked attention."""
        mask, sees_any = tokens.once_per_pattern(DilatedLayer._slots_seen, self)
        heads, length = keys.shape[1], query.shape[2]
        queries_per_key = query.shape[1] // heads
        output = F.scaled_dot_product_attention(
            query.unflatten(1, (heads, queries_per_key)).flatten(2, 3),
            keys[:, :, :-1].to(query.dtype),
            values[:, :, :-1].to(query.dtype),
            mask if length == 1 else mask.repeat(1, 1, queries_per_key, 1),
            dropout,
            scale=scale,
        )
        output = output.unflatten(2, (queries_per_key, length))
        if sees_any is not None:
            output = torch.where(sees_any[:, :, None], output, 0.0)
        return output.flatten(1, 2)

    def _slots_seen(self, tokens: NewTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which slots new queries see, `[B, Hkv, L, S]`, and which of them see any, `[B, Hkv, L, 1]` (`None`: all)."""
        seen = self.slots.rings.numbers_seen(tokens.positions[..., None, None])
        first, stop = (x.transpose(1, 2)[..., self.slots.branch] for x in seen)
        held = self.slots.numbers_held(tokens.positions_after)[:, :, None]
        mask = (held >= first) & (held < stop)
        if not tokens.has_padding and 1 in self.pattern.dilation_rates:
            return mask, None
        mask &= tokens.real[:, None, :, None]
        sees_any = mask.any(-1, keepdim=True)
        return mask | ~sees_any, sees_any  # no softmax over nothing

    def attend_before_update(self, query, key, value, tokens: NewTokens, scale: float, dropout: float) -> torch.Tensor:
        """Attention of new queries to their own keys, and then to earlier ones in the slots, branch by branch."""
        self.prefetch()
        result = torch.zeros_like(query)
        for rows, columns, position in tokens.continuations:
            q, k, v = (x[rows] if columns is None else x[rows, :, columns] for x in (query, key, value))
            pattern = self.pattern.at(position)
            output, lse = dilated_attention(q, k, v, pattern, scale=scale, dropout=dropout, return_lse=True)
            output = output.to(lse.dtype)
            seed = torch.randint(2**62, (1,)) if dropout > 0 else None
            past = tokens.once_per_pattern(DilatedLayer._past_tiles, self, position, q.shape[2])
            kernel = TileKernel(q, scale, dropout, seed)
            attend_to_past(output, lse, q, self.keys[rows], self.values[rows], past, self.num_heads, kernel)
            result[(rows,) if columns is None else (rows, slice(None), columns)] = output.to(result.dtype)
        return result

    def _past_tiles(self, tokens: NewTokens, position: int, length: int) -> list[PastTile]:
        """What `length` new tokens from `position` on see of the slots."""

        def find(branch: int, heads: np.ndarray, positions: np.ndarray) -> tuple[slice, np.ndarray, np.ndarray]:
            rings = _Rings(*(field[torch.from_numpy(heads), branch] for field in self.slots.rings_on_cpu))
            slots = rings.slot(torch.from_numpy(positions)).numpy()
            return slice(None), *np.broadcast_arrays(heads, slots)

        return past_tiles(self.pattern, self.num_heads, position, length, find, self.device)

    def get_seq_length(self) -> int:
        raise NotImplementedError("Ask the DilatedCache, which counts for all layers.")

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("A dilated layer has no dense mask.")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))

    reorder_cache = batch_select_indices

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: keys at or behind the cache's position are not seen, and then overwritten."""


class _Rings(NamedTuple):
    """The rings of a pattern, one per key/value head and branch: integer tensors `[Hkv, branches]`.

    Positions are put on the grid of a branch by adding `shift`. A window's grid has a single segment. A `position`
    must broadcast with the fields.
    """

    is_segment: torch.Tensor  # or a window
    length: torch.Tensor  # w
    rate: torch.Tensor  # r
    phase: torch.Tensor
    shift: torch.Tensor
    segment_length: torch.Tensor  # of the grid
    keys_per_segment: torch.Tensor
    capacity: torch.Tensor  # slots of the ring
    first_slot: torch.Tensor

    @classmethod
    def of(cls, pattern: DilatedPattern, num_heads: int, reserve: int) -> "_Rings":
        rings, first_slot = [], 0  # one ring of plain numbers after the other
        for branch in pattern.branches:
            w, r, is_segment = branch.length, branch.rate, branch.type == "segment"
            for head in range(num_heads):
                phase = pattern.phase(branch, head, num_heads)
                ring = cls(
                    is_segment=is_segment,
                    length=w,
                    rate=r,
                    phase=phase,
                    shift=pattern.grid_shift(branch),
                    segment_length=w if is_segment else _UNBOUNDED,
                    keys_per_segment=max(0, -(-(w - phase) // r)) if is_segment else _UNBOUNDED,
                    capacity=_capacity(branch, reserve),
                    first_slot=first_slot,
                )
                rings.append(ring)
            first_slot += _capacity(branch, reserve)
        shape = len(pattern.branches), num_heads
        return cls(*(torch.tensor(field).view(shape).T.contiguous() for field in zip(*rings, strict=True)))

    def keeps(self, position: torch.Tensor) -> torch.Tensor:
        """Whether the key at `position` is kept."""
        return (position + self.shift) % self.segment_length % self.rate == self.phase

    def slot(self, position: torch.Tensor) -> torch.Tensor:
        """The slot of the key at `position`, where that is kept."""
        return self.first_slot + self.count_before(position) % self.capacity

    def count_before(self, position: torch.Tensor) -> torch.Tensor:
        """How many keys below `position` are kept. That is the number of the next one."""
        segment, inside = (position + self.shift) // self.segment_length, (position + self.shift) % self.segment_length
        count = (-(-(inside - self.phase) // self.rate)).clamp(min=0).minimum(self.keys_per_segment)
        return segment * self.keys_per_segment + count

    def numbers_seen(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the keys that the query at `position` sees: the first, and the one behind the last."""
        stop = self.count_before(position + 1)
        first_of_segment = (position + self.shift) // self.segment_length * self.segment_length - self.shift
        first_of_window = position - self.length + 1
        first = self.count_before(torch.where(self.is_segment, first_of_segment, first_of_window).clamp(min=0))
        return first, torch.where(self.is_segment & ~self.keeps(position), first, stop)


def _capacity(branch: Branch, reserve: int) -> int:
    """Slots of a branch's ring: for the keys that a query sees, and for those of `reserve` later positions at most."""
    w, r = branch.length, branch.rate
    if branch.type == "window":
        return -(-w // r) + -(-reserve // r)
    return -(-w // r) * (1 + reserve // w) + -(-(reserve % w) // r)


class _Slots(NamedTuple):
    """All slots of the rings of a pattern, and which keys lie in them, for every layer of that pattern."""

    rings: _Rings
    rings_on_cpu: _Rings
    branch: torch.Tensor  # [S]
    number_in_ring: torch.Tensor  # [S]

    @property
    def count(self) -> int:
        return len(self.branch)

    def numbers_held(self, positions_after: torch.Tensor) -> torch.Tensor:
        """The number of the key in every slot, `[B, Hkv, S]`, once all tokens below `positions_after` `[B]` are there.
        Below 0 where there is none."""
        last = self.rings.count_before(positions_after[:, None, None])[..., self.branch] - 1
        return last - (last - self.number_in_ring) % self.rings.capacity[:, self.branch]

    def positions_held(self, positions_after: torch.Tensor) -> torch.Tensor:
        """The position of the key in every slot, likewise."""
        number = self.numbers_held(positions_after)
        rings = _Rings(*(field[:, self.branch] for field in self.rings))  # [Hkv, S]
        keys_per_segment = rings.keys_per_segment.clamp(min=1)
        segment, inside = number // keys_per_segment, number % keys_per_segment
        position = segment * rings.segment_length - rings.shift + rings.phase + inside * rings.rate
        return torch.where((number >= 0) & (rings.keys_per_segment > 0), position, -1)


@functools.lru_cache(maxsize=256)
def _slots(pattern: DilatedPattern, num_heads: int, reserve: int, device: torch.device) -> _Slots:
    """The slots that all layers with a pattern share."""
    rings = _Rings.of(pattern, num_heads, reserve)
    capacities = rings.capacity[0]
    branch = torch.arange(len(capacities)).repeat_interleave(capacities)
    number_in_ring = torch.cat([torch.arange(capacity) for capacity in capacities.tolist()])
    rings_on_device = _Rings(*(field.to(device) for field in rings))
    return _Slots(rings_on_device, rings, branch.to(device), number_in_ring.to(device))


class _NoGradient(torch.autograd.Function):
    """Gives the output of attention to a cache, and an error instead of gradients: what flows into cached keys is
    lost, and zeros would be wrong without anybody noticing."""

    @staticmethod
    def forward(ctx, output, *inputs):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "No gradients flow through a DilatedCache that holds earlier tokens: give a DynamicCache as "
            "`past_key_values` to train through a cache."
        )


def _fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the names, shapes and dtypes of all weights, and of 64 numbers of each."""
    checksum = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
        checksum.update(f"{name} {tuple(weight.shape)} {weight.dtype} {sample.double().tolist()}".encode())
    return checksum.hexdigest()


__all__ = ["DilatedCache"]
