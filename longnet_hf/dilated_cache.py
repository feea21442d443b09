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
import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_file import open_cache, write_cache
from .dilated_operator import dilated_attention, refuse_forward_mode, uses_triton
from .dilated_past import PastTile, attend_to_past, past_tiles
from .dilated_pattern import Branch, DilatedPattern
from .dilated_tiles import TileKernel
from .documents import check_padding_mask
from .input_checks import check_integer


try:
    from .one_token_kernels import attend_one_token
except ImportError:  # PyTorch without Triton: there are no GPUs to run it on
    pass


# The length of a window's only segment
_UNBOUNDED = 1 << 60
# Most new tokens that attend to all slots at once where there is no GPU, which would rather do more work in one go
_BLOCK_ON_CPU = 1
# Most entries of a mask, of new tokens and slots
_MAX_MASK = 1 << 25
# Most slots of a branch and head: no memory has more, and an allocator would not say which branch asks for them
_MAX_SLOTS = 1 << 27
# Slots for all keys of a head are made in multiples of this
_ROOM = 256

# The attributes that hold a cache's counts, by the names of their tensors in a file
_STATE = {
    "columns": "columns",
    "positions": "positions",
    "furthest": "max_positions",
    "last_real": "last_real",
    "known": "known",
}


def _tensor_name(layer_idx: int, name: str, part: int) -> str:
    return f"layers.{layer_idx}.{name}" + (f".{part}" if part else "")


def _check_room(length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(
            f"`max_length` of the DilatedCache is {max_length}, and its heads with full attention are to keep "
            f"{length} tokens."
        )


def is_dilated_cache(past_key_values: Cache | None) -> bool:
    """Whether a model was given a [`DilatedCache`], be it of this module or of the copy in code from the Hub."""
    return getattr(past_key_values, "is_dilated_cache", False)


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
        self.rows = torch.arange(len(real), device=real.device)[:, None, None, None]  # their numbers
        self._found: dict[tuple, object] = {}
        self._on_device: dict[torch.device, NewTokens] = {}

    def on(self, device: torch.device) -> "NewTokens":
        """The same tokens for the layers of a model that lie on another device."""
        if device == self.real.device:
            return self
        if device not in self._on_device:
            real, positions_before = self.real.to(device), self.positions_before.to(device)
            self._on_device[device] = NewTokens(self.is_first, self.has_padding, real, positions_before)
        return self._on_device[device]

    def once(self, method: Callable, part: "LayerPart", *args):
        """`method(part, self, *args)`, computed for the first of the layers whose slots are alike, for all of them."""
        key = method.__name__, part.slots.serial, *args
        if key not in self._found:
            self._found[key] = method(part, self, *args)
        return self._found[key]

    @functools.cached_property
    def max_position_after(self) -> int:
        """How many real tokens the longest row has by now. Waits for the GPU, once per forward pass."""
        return int(self.positions_after.max())

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

    `generate`, and the model with `use_cache=True`, make one by themselves. Heads with full attention keep everything:
    their storage grows, or is of `max_length` tokens, so that decoding can be compiled.

    What was dropped is gone: only the last `reserve` tokens can be taken back, by `crop` or by a mask that makes
    padding of them. No gradients flow into the keys and values of earlier calls; asking for them is an error. A
    `DynamicCache` has none of these limits, and can be given in its place.

    Args:
        config: configuration of the model.
        reserve: how many tokens can be taken back. Each costs one key in r of every branch.
        offloading: keep the layers on the CPU, but for those in use.
        max_length: how many tokens heads with full attention have room for; default: as many as come.

    Raises:
        ValueError: if `reserve` is negative, if `max_length` is below 1, or if `config` has no dilated patterns, or
            some with an `offset`.
    """

    is_dilated_cache = True

    def __init__(
        self,
        config: PreTrainedConfig,
        reserve: int = 255,
        offloading: bool = False,
        max_length: int | None = None,
    ):
        if not hasattr(config, "layer_patterns"):
            raise ValueError(f"`config` must be that of a LongNet, got {type(config).__name__}.")
        check_integer("reserve", reserve, at_least=0, at_most=_MAX_SLOTS)
        check_integer("max_length", max_length, at_least=1, at_most=8 * _MAX_SLOTS, or_none=True)
        if offloading and not torch.cuda.is_available():
            raise ValueError(
                '`offloading` (`cache_implementation="offloaded"`) keeps on the CPU what a GPU does not need at once, '
                "and there is no GPU."
            )
        self.reserve, self.max_length = reserve, max_length
        self.patterns = [pattern.canonical() for pattern in config.layer_patterns]
        for pattern in self.patterns:
            if pattern.offset:
                raise ValueError(
                    f"The patterns of a DilatedCache must begin where a document does, with `offset=0`, got {pattern}."
                )
        self.keeps_all_keys = any(pattern.max_live_keys() is None for pattern in self.patterns)  # of some heads
        options = {"offload_only_non_sliding": False} if offloading else {}
        super().__init__(layers=self._make_layers(), offloading=offloading, **options)
        self._forget()

    @classmethod
    def for_patterns(cls, patterns: list[DilatedPattern], **options) -> "DilatedCache":
        """A cache for layers with these patterns, whatever the configuration of their model says of others."""
        return cls(SimpleNamespace(layer_patterns=patterns), **options)

    def _make_layers(self) -> list[CacheLayerMixin]:
        return [DilatedLayer(pattern, self.reserve, self.max_length) for pattern in self.patterns]

    def _forget(self) -> None:
        self.columns: torch.Tensor | None = None  # [], tokens taken so far, padding included
        self.positions: torch.Tensor | None = None  # [B], real tokens among them: the position of the next
        self.max_positions: torch.Tensor | None = None  # [B], the largest that `positions` has been
        # [B, 2 * reserve], which of the last tokens are real: `reserve` of them are known after `crop`, too
        self.last_real: torch.Tensor | None = None
        self.known: torch.Tensor | None = None  # [], of how many of the last tokens that is known
        self.unfinished = 0  # tokens of a forward pass that is under way, or was interrupted: some layers have them

    @torch.inference_mode(False)  # what is made in inference mode could not be written to outside of it
    def _start(self, batch_size: int, device: torch.device | str) -> None:
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_positions = torch.zeros_like(self.positions)
        self.last_real = torch.zeros(batch_size, 2 * self.reserve, dtype=torch.bool, device=device)
        self.known = torch.zeros_like(self.columns)
        if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
            for name in _STATE.values():
                torch._dynamo.mark_static_address(getattr(self, name))

    def _refuse_unfinished(self) -> None:
        if self.unfinished:
            raise ValueError(
                f"`past_key_values` was left in the middle of a forward pass: some layers hold its {self.unfinished} "
                f"tokens, others do not. Take them back with `crop(-{self.unfinished})`, which a DilatedCache can do "
                f"with the last `reserve` ({self.reserve}) tokens, or with all; or go on from a cache that was saved."
            )

    def fits(self, patterns: list[DilatedPattern]) -> bool:
        """Whether the layers of a model have the patterns (`canonical()`) of the cache, or of its first layers: a
        model that was cut short leaves the others empty."""
        # Not the patterns themselves: code from the Hub has its own copy of their class
        ours = [pattern.to_json() for pattern in self.patterns]
        return [pattern.to_json() for pattern in patterns] == ours[: len(patterns)]

    def count_tokens(
        self, batch_size: int, length: int, device: torch.device | str, real: torch.Tensor | None = None
    ) -> NewTokens:
        """Count new tokens `[B, L]`, once per forward pass: every layer then takes them with [`update`] or [`attend`].

        Args:
            real: `[B, L]`, nonzero where there is no padding; default: everywhere.
        """
        self._refuse_unfinished()
        if real is not None and real.shape != (batch_size, length):
            expected = batch_size, length
            raise ValueError(f"The mask of the new tokens must have shape {expected}, got {tuple(real.shape)}.")
        is_first = self.positions is None
        if not is_first and len(self.positions) != batch_size:
            raise ValueError(f"`past_key_values` holds a batch of {len(self.positions)} rows, got {batch_size} rows.")
        has_padding = real is not None
        if real is None:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        before = torch.zeros(batch_size, dtype=torch.int64, device=device) if is_first else self.positions.clone()
        tokens = NewTokens(is_first, has_padding, (real != 0).to(before.device), before)
        if self.max_length is not None and self.keeps_all_keys and not torch.compiler.is_compiling():
            _check_room(tokens.max_position_after, self.max_length)  # before anything of the cache is changed
        if is_first:
            self._start(batch_size, device)
        self.columns += length
        self.positions.copy_(tokens.positions_after)
        self.max_positions.copy_(torch.maximum(self.max_positions, tokens.positions_after))
        self.last_real.copy_(torch.cat((self.last_real, tokens.real), dim=1)[:, length:])
        self.known.copy_((self.known + length).clamp(max=2 * self.reserve))
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
        refuse_forward_mode(query, key, value)
        layer, tokens = self.layers[layer_idx], tokens.on(query.device)
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        longest_block = self.reserve + 1 if query.is_cuda else min(self.reserve + 1, _BLOCK_ON_CPU)
        if query.shape[2] > 1:
            longest_block = min(longest_block, _MAX_MASK // max((part.slots.count for part in layer.parts), default=1))
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

        Returns the slots, part by part (see [`DilatedLayer`]).
        """
        if tokens is None:
            tokens = self.count_tokens(key_states.shape[0], key_states.shape[2], key_states.device)
        if self.offloading:
            # Not needed from Transformers 5.20 on, which waits itself before it fetches a layer: into memory that
            # attention to another may still read, from where that layer may still be written to
            self.prefetch_stream.wait_stream(torch.cuda.default_stream(key_states.device))
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
        layer, positions_after = self.layers[layer_idx], tokens.on(key_states.device).positions_after
        layer.lazy_initialization(key_states, value_states)
        for part in layer.parts:
            if part.is_growing:
                part.make_room(length)
            positions = part.slots.positions_held(positions_after).expand(-1, len(part.heads), -1)
            part.keys[:, :, :-1] = collect(part.of_heads(key_states), positions)
            part.values[:, :, :-1] = collect(part.of_heads(value_states), positions)

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
        known = min(int(self.known), self.reserve)
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

        Without tokens, which can always be had by taking back all of them, a cache is as new.

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
        if count < self.unfinished:
            self._refuse_unfinished()
        if count == columns:
            return self.reset()
        if count > int(self.known):
            raise ValueError(
                f"`tokens_to_remove` is {tokens_to_remove}, and which tokens were padding is known of the last "
                f"{int(self.known)} only: keys that are then needed may be dropped. A `DilatedCache(config, "
                f"reserve=...)` can go back `reserve` tokens, this one {self.reserve}."
            )
        self._go_back(self.positions - self.last_real[:, -count:].sum(1))
        for layer in self.layers:
            layer.crop(tokens_to_remove)
        self.columns -= count
        self.known -= count
        self.unfinished = 0
        self.last_real.copy_(self.last_real.roll(count, dims=1))

    def _wait_for_copies(self) -> None:
        """Offloaded layers are on their way from or to the CPU until something waits for them."""
        if self.offloading:
            for device in {part.device for layer in self.layers for part in layer.parts}:
                torch.cuda.synchronize(device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._wait_for_copies()
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._wait_for_copies()
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._wait_for_copies()
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    @torch.inference_mode(False)
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
        # LongNet makes no such mask; others would ask here before they attend to slots as if they were all keys
        raise ValueError(
            "A DilatedCache is that of a LongNet, and has no dense mask: other models, those with "
            "`set_dilated_attention` too, take an ordinary cache (leave `past_key_values` out)."
        )

    def save(self, file: str | os.PathLike, model: PreTrainedModel) -> None:
        """Write the cache to a safetensors file; what was there before is replaced once the new file is whole.

        Args:
            model: whose keys these are. Patterns and weights are checked on loading.
        """
        if self.positions is None:
            raise ValueError("The cache is empty: there is nothing to save.")
        self._refuse_unfinished()
        self._wait_for_copies()
        if not self.fits(model.base_model.patterns):
            raise ValueError("The cache has other patterns than `model`, or another number of layers.")
        tensors = {name: getattr(self, attribute) for name, attribute in _STATE.items()}
        length = int(self.positions.max())
        for layer_idx, layer in enumerate(self.layers):
            for number, part in enumerate(layer.parts):
                for name, x in zip(("keys", "values"), part.to_save(length), strict=True):
                    tensors[_tensor_name(layer_idx, name, number)] = x
        write_cache(file, tensors, {"reserve": self.reserve}, model)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, file: str | os.PathLike, model: PreTrainedModel, *, max_length: int | None = None) -> "DilatedCache":
        """The cache in a file that [`save`] wrote, on the devices of `model`, with room for `max_length` tokens in
        heads with full attention (default: for as many as come).

        Raises:
            ValueError: if it is no such file, if anything in it was changed, or if the cache was filled by another
                model: by other weights, or with another configuration; or if `max_length` is wrong, or below what
                the file holds.
            OSError: if the file cannot be read.
        """
        with open_cache(file, model) as saved:
            cache = cls(model.config, reserve=saved.fields["reserve"], max_length=max_length)
            for name, attribute in _STATE.items():
                setattr(cache, attribute, saved[name].to(model.device))
            length = int(cache.positions.max())
            for layer_idx, (layer, module) in enumerate(zip(cache.layers, model.base_model.layers, strict=True)):
                device = next(module.parameters()).device
                names = [[_tensor_name(layer_idx, name, part) for name in ("keys", "values")] for part in (0, 1)]
                heads, size = model.config.num_key_value_heads, model.config.head_dim
                like = saved[names[0][0]].new_empty(len(cache.positions), heads, 0, size, device=device)
                layer.lazy_initialization(like, like)
                for part, of_part in zip(layer.parts, names, strict=False):
                    part.load(*map(saved.__getitem__, of_part), length)
        return cache


class DilatedLayer(CacheLayerMixin):
    """One layer of the cache. Heads whose branches are bounded, and heads with full attention, are parts of their own:
    the slots of the former are of a fixed number, those of the latter grow, or are `max_length`."""

    is_croppable = True
    is_sliding = False

    def __init__(self, pattern: DilatedPattern, reserve: int, max_length: int | None = None):
        self.pattern, self.reserve, self.max_length = pattern, reserve, max_length
        self.is_compileable = max_length is not None or pattern.max_live_keys() is not None
        self.parts: list[LayerPart] = []

    @property
    def is_initialized(self) -> bool:
        return len(self.parts) > 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.num_heads = key_states.shape[1]
        heads = [[], []]
        for head in range(self.num_heads):
            heads[self.pattern.is_unbounded(head)].append(head)
        if self.pattern.without_heads(heads[1], self.num_heads) is None:  # no part is without any branch
            heads = [[], list(range(self.num_heads))]
        for of_part in filter(None, heads):
            part = LayerPart(self.pattern.of_heads(of_part, self.num_heads), of_part, self)
            part.allocate(key_states[:, of_part], self.max_length and -(-self.max_length // _ROOM) * _ROOM)
            self.parts.append(part)
        self.order = None  # where the heads lie among those of all parts; `None`: in order
        order = [head for part in self.parts for head in part.heads]
        if order != sorted(order):
            self.order = torch.tensor([order.index(head) for head in range(self.num_heads)], device=key_states.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: NewTokens) -> tuple[list, list]:
        """Take new keys and values `[B, Hkv, L, D]`; returns those in the slots, part by part. What lay in a slot
        before is overwritten: so keys leave the cache. If L exceeds `reserve` + 1, the last of the new keys may
        overwrite what the first of the new queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        with torch.no_grad():
            for part in self.parts:
                part.update(part.of_heads(key_states), part.of_heads(value_states), tokens)
        return [part.keys for part in self.parts], [part.values for part in self.parts]

    def attend_to_slots(
        self, query: torch.Tensor, keys: list, values: list, tokens: NewTokens, scale: float, dropout: float
    ) -> torch.Tensor:
        """Attention of new queries to what [`update`] returned, which holds their own keys already."""
        outputs = [
            part.attend(part.of_heads(query), *slots, tokens, scale, dropout)
            for part, *slots in zip(self.parts, keys, values, strict=True)
        ]
        joined = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        if self.order is None:
            return joined
        return joined.unflatten(1, (self.num_heads, -1)).index_select(1, self.order).flatten(1, 2)

    def attend_before_update(self, query, key, value, tokens: NewTokens, scale: float, dropout: float) -> torch.Tensor:
        """Attention of new queries to their own keys, and then to earlier ones in the slots, branch by branch. The
        output is not held in float32 meanwhile: few rows see earlier keys, and are rounded as often."""
        self.prefetch()
        result = None
        for rows, columns, position in tokens.continuations:
            q, k, v = (x[rows] if columns is None else x[rows, :, columns] for x in (query, key, value))
            pattern = self.pattern.at(position)
            output, lse = dilated_attention(q, k, v, pattern, scale=scale, dropout=dropout, return_lse=True)
            seed = torch.randint(2**62, (1,)) if dropout > 0 else None
            kernel = TileKernel(q, scale, dropout, seed)
            for part in self.parts:
                past = tokens.once(LayerPart.past_tiles, part, part.pattern, position, q.shape[2])
                attend_to_past(output, lse, q, part.keys[rows], part.values[rows], past, self.num_heads, kernel)
            output = output.to(query.dtype)  # autocast leaves it in another
            if output.shape == query.shape:  # all tokens at once
                return output
            result = torch.zeros_like(query) if result is None else result
            result[(rows,) if columns is None else (rows, slice(None), columns)] = output
        return torch.zeros_like(query) if result is None else result

    def get_seq_length(self) -> int:
        raise NotImplementedError("Ask the DilatedCache, which counts for all layers.")

    def get_max_length(self) -> int:
        return self.max_length or -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("A dilated layer has no dense mask.")

    def offload(self) -> None:
        for part in self.parts:
            part.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for part in self.parts:
            if part.keys.device != part.device:
                part.map(lambda x, part=part: x.to(part.device, non_blocking=True))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.parts:
            part.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for part in self.parts:
            part.map(lambda x: x[indices.to(x.device)])

    reorder_cache = batch_select_indices

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: keys at or behind the cache's position are not seen, and then overwritten."""


class LayerPart:
    """The slots of some key/value heads of a layer, and attention to them: keys and values `[B, heads, S + 1, D]`. The
    last slot takes new keys that no branch keeps.

    Args:
        pattern: of these heads, without the branches that none of them has.
        heads: numbers among all key/value heads of the layer.
        layer: whose part it is.
    """

    def __init__(self, pattern: DilatedPattern, heads: list[int], layer: DilatedLayer):
        self.pattern, self.heads, self.num_heads = pattern, heads, layer.num_heads
        self.reserve, self.max_length = layer.reserve, layer.max_length
        self.is_growing = pattern.max_live_keys() is None
        # Full attention alone, whatever the head: its slots are the positions
        self.is_plain = pattern.segment_lengths == (None,) and all(map(pattern.is_unbounded, heads))
        self.has_key_at_hand = all(
            any(branch.rate == 1 and branch.belongs_to(head) for branch in pattern.branches) for head in heads
        )

    @torch.inference_mode(False)
    def allocate(self, like: torch.Tensor, room: int | None = None) -> None:
        """Slots for a batch and heads as in `like` `[B, heads, ?, D]`: with `room`, of so many positions where all
        keys are kept."""
        self.device, self.room = like.device, room or 1
        self.head_numbers = torch.tensor(self.heads, device=self.device)  # a list would be copied there each time
        self.head_index = torch.arange(len(self.heads), device=self.device)[:, None, None]
        self.slots = self._slots(self.room)
        self.keys, self.values = (
            like.new_zeros(*like.shape[:2], self.slots.count + 1, like.shape[-1]) for _ in range(2)
        )
        if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def _slots(self, room: int) -> "_Slots":
        return _slots(_ring_records(self.pattern, tuple(self.heads), self.num_heads, self.reserve, room), self.device)

    @torch.inference_mode(False)
    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.keys, self.values = function(self.keys), function(self.values)

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Of all heads' tensor `[B, Hkv or H, L, D]`, what belongs to these."""
        if len(self.heads) == self.num_heads:
            return x
        group, first, last = x.shape[1] // self.num_heads, self.heads[0], self.heads[-1]
        if len(self.heads) == last + 1 - first:  # neighbours: a view
            return x[:, first * group : (last + 1) * group]
        return x.unflatten(1, (self.num_heads, group)).index_select(1, self.head_numbers).flatten(1, 2)

    @torch.inference_mode(False)
    def make_room(self, length: int) -> None:
        """Let so many positions have their slots, of heads that keep all keys."""
        if self.max_length is not None:
            _check_room(length, self.max_length)
        if length <= self.room:
            return
        self.room = -(-(length + self.room // 8) // _ROOM) * _ROOM
        slots = self._slots(self.room)
        index = slots.first_slots_of(self.slots)

        def grow(x: torch.Tensor) -> torch.Tensor:
            larger = x.new_zeros(*x.shape[:2], slots.count + 1, x.shape[3])
            larger[:, :, index] = x[:, :, :-1]
            return larger

        self.map(grow)
        self.slots = slots

    def to_save(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the slots, where all are kept without the room for more than `length` positions."""
        index = self._slots_with_room(length)
        return self.keys[:, :, index], self.values[:, :, index]

    def load(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take what [`to_save`] gave."""
        if self.is_growing:
            self.make_room(length)
        index = self._slots_with_room(length)
        self.keys[:, :, index], self.values[:, :, index] = keys, values

    def _slots_with_room(self, length: int) -> torch.Tensor | slice:
        """Where the slots lie that there would be with room for `length` positions only."""
        if self.is_plain or not self.is_growing:  # without a copy
            return slice(length if self.is_plain else self.slots.count)
        return self.slots.first_slots_of(self._slots(max(1, length)))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: NewTokens) -> None:
        if self.is_growing and not torch.compiler.is_compiling():
            self.make_room(tokens.max_position_after)
        elif self.is_growing:
            fits = (tokens.positions_after <= self.max_length).all()
            torch._assert_async(fits, "there are more tokens than `max_length` of the DilatedCache")
        pairs = (self.keys, key_states), (self.values, value_states)
        if key_states.shape[2] <= self.reserve + 1:  # no two of the new keys have one slot
            index = tokens.rows, self.head_index, tokens.once(LayerPart.slots_of_new_keys, self)
            for stored, new in pairs:
                # torch.compile does this in place, unlike scatter_
                stored.index_put_(index, new[:, :, :, None].to(stored.dtype))
        else:
            column, is_new = tokens.once(LayerPart.new_keys_of_slots, self)
            column = column[..., None].expand(-1, len(self.heads), -1, key_states.shape[-1])
            for stored, new in pairs:
                stored[:, :, :-1] = torch.where(is_new[..., None], new.gather(2, column), stored[:, :, :-1])

    def slots_of_new_keys(self, tokens: NewTokens) -> torch.Tensor:
        """`[B, heads or 1, L, branches]`: the last slot where a branch keeps none."""
        if self.is_plain:
            return torch.where(tokens.real, tokens.positions, self.slots.count)[:, None, :, None]
        rings, position = self.slots.rings, tokens.positions[..., None, None]
        is_kept = rings.keeps(position) & tokens.real[..., None, None]
        return torch.where(is_kept, rings.slot(position), self.slots.count).transpose(1, 2)

    def new_keys_of_slots(self, tokens: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of the new key that a slot takes, and whether it takes any, `[B, heads or 1, S]` each."""
        positions = self.slots.positions_held(tokens.positions_after)
        number = positions - tokens.positions_before[:, None, None]  # among the new tokens that are real
        real_first = torch.argsort(~tokens.real, dim=1, stable=True)
        column = real_first[:, None].expand(-1, number.shape[1], -1).gather(2, number.clamp(min=0))
        return column, number >= 0

    def attend(self, query, keys, values, tokens: NewTokens, scale: float, dropout: float) -> torch.Tensor:
        """Attention of new queries `[B, H, L, D]` of these heads to their slots: one masked attention. Of one token on
        a GPU by kernels that share the slots of a head out: PyTorch's has one program for each."""
        count = self.slots.count
        if self.is_plain and not torch.compiler.is_compiling():  # what is filled, in whole pieces
            count = min(count, -(-tokens.max_position_after // _ROOM) * _ROOM)
        heads, length = len(self.heads), query.shape[2]
        keys, values = (x[:, :, :count].to(query.dtype) for x in (keys, values))
        if length == 1 and uses_triton(query, dropout):
            return attend_one_token(query, keys, values, tokens.once(LayerPart.seen_by_one_token, self, count), scale)
        mask, sees_any = tokens.once(LayerPart.softmax_mask, self, count)
        queries_per_key = query.shape[1] // heads
        q = query.unflatten(1, (heads, queries_per_key)).flatten(2, 3)
        mask = mask if length == 1 else mask.repeat(1, 1, queries_per_key, 1)
        output = F.scaled_dot_product_attention(q, keys, values, mask, dropout, scale=scale)
        output = output.unflatten(2, (queries_per_key, length))
        if sees_any is not None:
            output = torch.where(sees_any[:, :, None], output, 0.0)
        return output.flatten(1, 2)

    def seen_by_one_token(self, tokens: NewTokens, count: int) -> torch.Tensor:
        """Which of the first `count` slots the only new token of a row sees, `[B, heads or 1, count]`; or how many of
        them, `[B]`, where positions are slots."""
        if self.is_plain:
            return torch.where(tokens.real[:, 0], tokens.positions[:, 0] + 1, 0)
        return self.slots_seen(tokens, count)[:, :, 0]

    def softmax_mask(self, tokens: NewTokens, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[`slots_seen`], but all of them where there are none: no softmax over nothing; and which of the queries see
        any, `[B, heads or 1, L, 1]` (`None`: all)."""
        mask = self.slots_seen(tokens, count)
        if not tokens.has_padding and self.has_key_at_hand:
            return mask, None
        sees_any = mask.any(-1, keepdim=True)
        return mask | ~sees_any, sees_any

    def slots_seen(self, tokens: NewTokens, count: int) -> torch.Tensor:
        """Which of the first `count` slots new queries see, `[B, heads or 1, L, count]`."""
        if self.is_plain:
            mask = torch.arange(count, device=self.device) <= tokens.positions[:, None, :, None]
        else:
            seen = self.slots.rings.numbers_seen(tokens.positions[..., None, None])
            first, stop = (x.transpose(1, 2)[..., self.slots.branch] for x in seen)
            held = self.slots.numbers_held(tokens.positions_after)[:, :, None]
            mask = (held >= first) & (held < stop)
            mask = self._without_joined_sinks(mask, held, tokens)
        return mask & tokens.real[:, None, :, None] if tokens.has_padding else mask

    def _without_joined_sinks(self, mask: torch.Tensor, held: torch.Tensor, tokens: NewTokens) -> torch.Tensor:
        """The sink joins what no other branch does."""
        for index, branch in enumerate(self.pattern.branches):
            if branch.type == "sink":
                head = self.head_numbers[: len(self.slots.rings.rate), None, None]
                n = tokens.positions[:, None, :, None]
                joins = self.pattern.joins(branch, n, held.clamp(min=0), head, self.num_heads)
                return mask & ((self.slots.branch != index) | joins)
        return mask

    def past_tiles(self, tokens: NewTokens, pattern: DilatedPattern, position: int, length: int) -> list[PastTile]:
        """What `length` new tokens from `position` on see of the slots, by the pattern of these heads."""
        local = np.zeros(self.num_heads, dtype=np.int64)
        local[self.heads] = np.arange(len(self.heads))

        def find(branch: int, heads: np.ndarray, positions: np.ndarray) -> tuple[slice, np.ndarray, np.ndarray]:
            heads = local[heads]
            of_rings = torch.from_numpy(heads).clamp(max=len(self.slots.rings_on_cpu.rate) - 1)
            rings = _Rings(*(field[of_rings, branch] for field in self.slots.rings_on_cpu))
            in_ring = rings.slot(torch.from_numpy(positions)).numpy()
            return slice(None), *np.broadcast_arrays(heads, in_ring)

        return past_tiles(pattern, self.num_heads, position, length, find, self.device)


class _Rings(NamedTuple):
    """The rings of a pattern, one per key/value head and branch: integer tensors `[heads, branches]`, or
    `[1, branches]` if all heads have the same.

    Positions are put on the grid of a branch by adding `shift`. The grids of a window and of a sink have a single
    segment. A `position` must broadcast with the fields.
    """

    is_segment: torch.Tensor  # or a window, or a sink
    length: torch.Tensor  # w; of a window, and of a sink, whose keys stay, without end
    rate: torch.Tensor  # r
    phase: torch.Tensor
    shift: torch.Tensor
    segment_length: torch.Tensor  # of the grid
    keys_per_segment: torch.Tensor  # 0 if the head does not have the branch
    capacity: torch.Tensor  # slots of the ring
    first_slot: torch.Tensor

    def keeps(self, position: torch.Tensor) -> torch.Tensor:
        """Whether the key at `position` is kept."""
        inside = (position + self.shift) % self.segment_length
        return (inside % self.rate == self.phase) & (inside // self.rate < self.keys_per_segment)

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


def _ring_records(
    pattern: DilatedPattern, heads: tuple[int, ...], num_heads: int, reserve: int, room: int
) -> tuple[tuple[int, ...], ...]:
    """How many rows [`_Rings`] has, and its fields of every branch and row, branch by branch: plain numbers, one ring
    after the other."""
    rings, first_slot = [], 0
    for branch in pattern.branches:
        w, r, is_segment = branch.length, branch.rate, branch.type == "segment"
        is_bounded = branch.type == "window" and w is not None
        capacity = _capacity(branch, reserve, room)
        if w is not None and capacity > _MAX_SLOTS:
            raise ValueError(
                f"A DilatedCache needs {capacity} slots per head for the branch with segment length {w} and dilation "
                f"rate {r} (`reserve` is {reserve}), whatever the length of the text. Give that branch full attention "
                "(segment length None, branch type 'window', rate 1), whose storage grows, or use the ordinary cache "
                '(a DynamicCache, `cache_implementation="dynamic"`).'
            )
        rings.append([])
        for head in heads:
            phase = pattern.phase(branch, head, num_heads)
            keys_per_segment = {"segment": max(0, -(-((w or 0) - phase) // r)), "sink": w}.get(branch.type, _UNBOUNDED)
            ring = _Rings(
                is_segment=is_segment,
                length=w if is_segment or is_bounded else _UNBOUNDED,
                rate=r,
                phase=phase,
                shift=pattern.grid_shift(branch),
                segment_length=w if is_segment else _UNBOUNDED,
                keys_per_segment=keys_per_segment if branch.belongs_to(head) else 0,
                capacity=capacity,
                first_slot=first_slot,
            )
            rings[-1].append(tuple(ring))
        first_slot += capacity
    if all(len(set(of_branch)) == 1 for of_branch in rings):
        rings = [of_branch[:1] for of_branch in rings]
    return len(rings[0]), tuple(itertools.chain(*rings))


def _capacity(branch: Branch, reserve: int, room: int) -> int:
    """Slots of a branch's ring: for the keys that a query sees, and for those of `reserve` later positions at most;
    `room` if it keeps all keys."""
    w, r = branch.length, branch.rate
    if w is None:
        return room
    if branch.type == "sink":
        return w
    if branch.type == "window":
        return -(-w // r) + -(-reserve // r)
    return -(-w // r) * (1 + reserve // w) + -(-(reserve % w) // r)


class _Slots(NamedTuple):
    """All slots of the rings of a pattern, and which keys lie in them, for every layer of that pattern."""

    rings: _Rings
    rings_on_cpu: _Rings
    branch: torch.Tensor  # [S]
    serial: int  # the same for slots that are alike

    @property
    def count(self) -> int:
        return len(self.branch)

    @property
    def number_in_ring(self) -> torch.Tensor:
        """`[S]`. Not stored: these are as many as tokens where all keys are kept, and slots are remembered."""
        return torch.arange(self.count, device=self.branch.device) - self.rings.first_slot[0, self.branch]

    def first_slots_of(self, smaller: "_Slots") -> torch.Tensor:
        """Where those of the same rings with fewer slots lie."""
        return self.rings.first_slot[0, smaller.branch] + smaller.number_in_ring

    def numbers_held(self, positions_after: torch.Tensor) -> torch.Tensor:
        """The number of the key in every slot, `[B, heads or 1, S]`, once all tokens below `positions_after` `[B]` are
        there. Below 0 where there is none."""
        last = self.rings.count_before(positions_after[:, None, None])[..., self.branch] - 1
        return last - (last - self.number_in_ring) % self.rings.capacity[:, self.branch]

    def positions_held(self, positions_after: torch.Tensor) -> torch.Tensor:
        """The position of the key in every slot, likewise."""
        number = self.numbers_held(positions_after)
        rings = _Rings(*(field[:, self.branch] for field in self.rings))  # [heads, S]
        keys_per_segment = rings.keys_per_segment.clamp(min=1)
        segment, inside = number // keys_per_segment, number % keys_per_segment
        position = segment * rings.segment_length - rings.shift + rings.phase + inside * rings.rate
        return torch.where((number >= 0) & (rings.keys_per_segment > 0), position, -1)


_serials = itertools.count()


@functools.lru_cache(maxsize=256)
def _slots(records: tuple[int, tuple[tuple[int, ...], ...]], device: torch.device) -> _Slots:
    """The slots that all layers with such rings share."""
    num_rows, rings = records
    fields = (torch.tensor(field, device="cpu") for field in zip(*rings, strict=True))
    rings = _Rings(*(field.view(-1, num_rows).T.contiguous() for field in fields))
    capacities = rings.capacity[0]
    if len(capacities) == 1:  # one number in memory
        branch = torch.zeros(1, dtype=torch.int64, device=device).expand(int(capacities))
    else:
        branch = torch.arange(len(capacities), device="cpu").repeat_interleave(capacities).to(device)
    return _Slots(_Rings(*(field.to(device) for field in rings)), rings, branch, next(_serials))


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


__all__ = ["DilatedCache"]
