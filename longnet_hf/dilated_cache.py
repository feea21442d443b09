"""A cache that keeps the keys that some branch can still ask for, and no others: decoding in constant time and memory.

A branch with dilation rate r keeps every r-th key, numbered 0, 1, ... from the start of the document; all that a query
can ask it for are consecutive numbers, the open segment's or those of the last w positions. So each branch has a ring
of slots, where the key with number k lies in slot k mod C. A key that several branches keep lies in a slot of each.
The softmax over all slots that a query may see is then the pattern's own, over its multiset of keys: one masked
attention, whatever the branches (see `DilatedPattern.multiplicity`).

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

from .context_parallel import SequenceSplit
from .dilated_operator import TileKernel, dilated_attention
from .dilated_past import PastTile, attend_to_past, past_tiles
from .dilated_pattern import Branch, DilatedPattern


_UNBOUNDED = 1 << 60
# Most new tokens that attend to all slots at once where there is no GPU, which would rather do more work in one go
_BLOCK_ON_CPU = 1

# Of a file with a cache
_FORMAT = "longnet_hf.DilatedCache 1"
_STATE = ("columns", "positions", "furthest", "last_real")


def _capacity(branch: Branch, reserve: int) -> int:
    """Slots for what a query sees, and for what `reserve` later positions keep at most."""
    w, r = branch.length, branch.rate
    if branch.type == "window":
        return -(-w // r) + -(-reserve // r)
    return -(-w // r) * (1 + reserve // w) + -(-(reserve % w) // r)


class _Rings(NamedTuple):
    """What a pattern keeps, and where: int64 tensors, `[Hkv, branches]` unless said otherwise.

    Positions are put on the grid of a branch by adding `shift`. A window's grid has a single segment.
    """

    is_segment: torch.Tensor
    length: torch.Tensor  # w
    grid: torch.Tensor  # length of a segment
    rate: torch.Tensor
    shift: torch.Tensor
    phase: torch.Tensor
    kept: torch.Tensor  # keys of a segment
    capacity: torch.Tensor
    start: torch.Tensor  # first slot of the ring
    branch_of_slot: torch.Tensor  # [S]
    number_of_slot: torch.Tensor  # [S], in its ring
    of_branch: list[list[tuple[int, ...]]]  # [branches][Hkv], the fields above but for the last two

    @classmethod
    def of(cls, pattern: DilatedPattern, num_heads: int, reserve: int, device: torch.device) -> "_Rings":
        rows, capacities = [], []
        for branch in pattern.branches:
            w, r = branch.length, branch.rate
            is_segment = branch.type == "segment"
            capacities.append(_capacity(branch, reserve))
            start = sum(capacities[:-1])
            phases = [pattern.phase(branch, head, num_heads) for head in range(num_heads)]
            grid, shift = w if is_segment else _UNBOUNDED, pattern.grid_shift(branch)
            kept = [max(0, -(-(w - phase) // r)) if is_segment else _UNBOUNDED for phase in phases]
            rows.append(
                [
                    (is_segment, w, grid, r, shift, s, k, capacities[-1], start)
                    for s, k in zip(phases, kept, strict=True)
                ]
            )
        fields = torch.tensor(rows, device=device).permute(2, 1, 0).contiguous()
        branch = torch.arange(len(capacities)).repeat_interleave(torch.tensor(capacities))
        number = torch.cat([torch.arange(capacity) for capacity in capacities])
        return cls(fields[0].bool(), *fields[1:], branch.to(device), number.to(device), rows)

    def count(self, position: torch.Tensor) -> torch.Tensor:
        """How many keys below `position` `[..., 1, 1]` are kept, or the number of the next, `[..., Hkv, branches]`."""
        on_grid = position + self.shift
        inside = on_grid % self.grid - self.phase
        return on_grid // self.grid * self.kept + (-(-inside // self.rate)).clamp(min=0).minimum(self.kept)

    def keeps(self, position: torch.Tensor) -> torch.Tensor:
        return (position + self.shift) % self.grid % self.rate == self.phase

    def seen(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers that the query at `position` `[..., 1, 1]` sees: the first, and the one behind the last."""
        stop = self.count(position + 1)
        first_of_segment = ((position + self.shift) // self.grid * self.grid - self.shift).clamp(min=0)
        first_of_window = (position - self.length + 1).clamp(min=0)
        first = self.count(torch.where(self.is_segment, first_of_segment, first_of_window))
        return first, torch.where(self.is_segment & ~self.keeps(position), first, stop)

    def held(self, position: torch.Tensor) -> torch.Tensor:
        """The number of the key in every slot once all positions below `position` `[B]` are there, `[B, Hkv, S]`."""
        stop = self.count(position[:, None, None])[..., self.branch_of_slot]
        return stop - 1 - (stop - 1 - self.number_of_slot) % self.capacity[:, self.branch_of_slot]

    def position(self, number: torch.Tensor) -> torch.Tensor:
        """The position of the key with a number `[B, Hkv, S]`, below 0 where there is none."""
        kept, rate, grid, start = (
            x[:, self.branch_of_slot] for x in (self.kept, self.rate, self.grid, self.phase - self.shift)
        )
        segment, inside = number // kept.clamp(min=1), number % kept.clamp(min=1)
        position = segment * grid + inside * rate + start
        return torch.where((number >= 0) & (kept > 0), position, -1)


@functools.lru_cache(maxsize=256)
def _rings(pattern: DilatedPattern, num_heads: int, reserve: int, device: torch.device) -> _Rings:
    return _Rings.of(pattern, num_heads, reserve, device)


class Step:
    """New tokens `[B, L]` of a batch: which of them are real, and where they lie in their documents."""

    def __init__(self, is_first: bool, has_padding: bool, real: torch.Tensor, before: torch.Tensor):
        count = real.cumsum(1)
        self.is_first = is_first  # there were no tokens before
        self.has_padding = has_padding  # or may have
        self.real = real
        self.before = before  # [B], real tokens before these
        self.position = (before[:, None] + count - 1).clamp(min=0)
        self.after = before + count[:, -1]
        self._of_pattern: dict[tuple, object] = {}
        self._copies: dict[torch.device, Step] = {}

    def on(self, device: torch.device) -> "Step":
        """For the layers of a model that lie on another device."""
        if device == self.real.device:
            return self
        if device not in self._copies:
            state = self.real.to(device), self.before.to(device)
            self._copies[device] = Step(self.is_first, self.has_padding, *state)
        return self._copies[device]

    def once(self, function: Callable, layer: "DilatedLayer", *args):
        """`function(layer, self, *args)`, which is the same for all layers of a pattern."""
        key = function.__name__, layer.group, *args
        if key not in self._of_pattern:
            self._of_pattern[key] = function(layer, self, *args)
        return self._of_pattern[key]

    @functools.cached_property
    def parts(self) -> list[tuple[slice, torch.Tensor | None, int]]:
        """Rows that go on from one position, the columns of their real tokens (`None`: all), and the position."""
        before, length = self.before.tolist(), self.real.shape[1]
        counts = self.real.sum(1).tolist()
        if min(counts) == length and min(before) == max(before):
            return [(slice(None), None, before[0])]
        parts = []
        for row, (position, count) in enumerate(zip(before, counts, strict=True)):
            columns = None if count == length else self.real[row].nonzero()[:, 0]
            if count:
                parts.append((slice(row, row + 1), columns, position))
        return parts


class DilatedLayer(CacheLayerMixin):
    """The slots of one layer: keys and values `[B, Hkv, S + 1, D]`. The last slot takes what no branch keeps."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    is_dilated = True  # asked for in place of the class, of which code from the Hub has its own

    def __init__(self, pattern: DilatedPattern, reserve: int, group: int = 0):
        super().__init__()
        self.pattern, self.reserve = pattern, reserve
        self.group = group  # number of the pattern among those of the model

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.num_heads = key_states.dtype, key_states.device, key_states.shape[1]
        self.rings = _rings(self.pattern, self.num_heads, self.reserve, self.device)
        batch, heads, _, size = key_states.shape
        slots = len(self.rings.branch_of_slot)
        self.keys, self.values = (key_states.new_zeros(batch, heads, slots + 1, size) for _ in range(2))
        if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values `[B, Hkv, L, D]`; returns those in the slots. If L exceeds `reserve` + 1, the last
        of them may overwrite what the first of them sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        rings = self.rings
        with torch.no_grad():
            if key_states.shape[2] <= self.reserve + 1:
                index = step.once(_slots_of_new_keys, self)
                for store, x in ((self.keys, key_states), (self.values, value_states)):
                    # torch.compile does this in place, unlike scatter_
                    store.index_put_(index, x[:, :, :, None].to(store.dtype))
            else:
                number = rings.position(rings.held(step.after)) - step.before[:, None, None]  # among the real tokens
                columns = torch.argsort(~step.real, dim=1, stable=True)
                columns = columns[:, None].expand(-1, self.num_heads, -1).gather(2, number.clamp(min=0))
                index = columns[..., None].expand(-1, -1, -1, key_states.shape[-1])
                for store, x in ((self.keys, key_states), (self.values, value_states)):
                    store[:, :, :-1] = torch.where((number >= 0)[..., None], x.gather(2, index), store[:, :, :-1])
        return self.keys, self.values

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

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: what is stored beyond the cache's position is not seen, and then overwritten."""


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
        self.positions: torch.Tensor | None = None  # [B], real tokens among them
        self.furthest: torch.Tensor | None = None  # [B], most there have been
        # [B, 2 * reserve], which of the last tokens are real: `reserve` of them are known after `crop`, too
        self.last_real: torch.Tensor | None = None

    def fits(self, patterns: list[DilatedPattern]) -> bool:
        """Whether the layers of a model have the patterns (`canonical()`) of the cache."""
        # Not the patterns themselves: code from the Hub has its own copy of their class
        return [pattern.to_json() for pattern in patterns] == [pattern.to_json() for pattern in self.patterns]

    def save(self, file: str | os.PathLike, model: PreTrainedModel) -> None:
        """Write the cache to a safetensors file; what was there before is replaced once the new file is whole.

        Args:
            model: whose keys these are. Patterns and weights are checked on loading.
        """
        if self.positions is None:
            raise ValueError("The cache is empty: there is nothing to save.")
        tensors = {name: getattr(self, name) for name in _STATE}
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
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
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
            for name in _STATE:
                setattr(cache, name, stored.get_tensor(name).to(model.device))
            for layer_idx, (layer, module) in enumerate(zip(cache.layers, model.base_model.layers, strict=True)):
                device = next(module.parameters()).device
                keys, values = (stored.get_tensor(f"layers.{layer_idx}.{name}") for name in ("keys", "values"))
                layer.lazy_initialization(keys[:, :, :0].to(device), values[:, :, :0].to(device))
                if is_dilated(cache, layer_idx):
                    layer.keys.copy_(keys)
                    layer.values.copy_(values)
                else:
                    layer.keys, layer.values = keys.to(device), values.to(device)
        return cache

    def reset(self) -> None:
        self.layers[:] = self._make_layers()
        self._forget()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.columns is None else int(self.columns)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def begin(
        self, batch_size: int, length: int, device: torch.device | str, real: torch.Tensor | None = None
    ) -> Step:
        """Count new tokens `[B, L]`, which every layer then takes with [`update`] or [`attend`].

        Args:
            real: `[B, L]`, nonzero where there is no padding; default: everywhere.
        """
        if real is not None and real.shape != (batch_size, length):
            raise ValueError(
                f"The mask of the new tokens must have shape {(batch_size, length)}, got {tuple(real.shape)}."
            )
        is_first = self.positions is None
        if is_first:
            self.columns = torch.zeros((), dtype=torch.int64, device=device)
            self.positions, self.furthest = (torch.zeros(batch_size, dtype=torch.int64, device=device) for _ in "ab")
            self.last_real = torch.zeros(batch_size, 2 * self.reserve, dtype=torch.bool, device=device)
            if not torch.compiler.is_compiling():  # CUDA graphs may write to these in place
                for state in (getattr(self, name) for name in _STATE):
                    torch._dynamo.mark_static_address(state)
        elif len(self.positions) != batch_size:
            raise ValueError(f"`past_key_values` holds a batch of {len(self.positions)} rows, got {batch_size} rows.")
        has_padding = real is not None
        if real is None:
            real = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        real = (real != 0).to(self.positions.device)
        step = Step(is_first, has_padding, real, self.positions.clone())
        self.columns += length
        self.positions.copy_(step.after)
        self.furthest.copy_(torch.maximum(self.furthest, step.after))
        self.last_real.copy_(torch.cat((self.last_real, real), dim=1)[:, length:])
        return step

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        step: Step | None = None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values `[B, Hkv, L, D]`, of tokens that [`begin`] counted (default: counts them here, as
        the only layer's, without padding).

        Returns the slots of a dilated layer, where [`attend`] finds them, and all keys and values of others.
        """
        if not is_dilated(self, layer_idx):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if step is None:
            step = self.begin(key_states.shape[0], key_states.shape[2], key_states.device)
        return super().update(key_states.detach(), value_states.detach(), layer_idx, step.on(key_states.device))

    def update_split(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, step: Step, split: SequenceSplit
    ) -> None:
        """Take keys and values `[B, Hkv, N / P, D]` of this process's part of a sequence: the first that is read, and
        without padding. All processes call this, and all of them get what is kept of the whole."""
        layer, step = self.layers[layer_idx], step.on(key_states.device)
        if not is_dilated(self, layer_idx):
            everywhere = torch.arange(split.length, device=key_states.device).expand(*key_states.shape[:2], -1)
            keys, values = (split.collect(x, everywhere) for x in (key_states, value_states))
            super().update(keys, values, layer_idx)
            return
        layer.lazy_initialization(key_states, value_states)
        positions = layer.rings.position(layer.rings.held(step.after))
        for store, x in ((layer.keys, key_states), (layer.values, value_states)):
            store[:, :, :-1] = split.collect(x, positions)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        step: Step,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Take new keys and values, and attend to what the pattern joins of them and of all before them.

        Args:
            query: `[B, H, L, D]`.
            key, value: `[B, Hkv, L, D]`.
            step: from [`begin`].

        Returns:
            `[B, H, L, D]`, zeros at padding and at queries that no branch joins to any key.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        longest_block = self.reserve + 1 if query.is_cuda else min(self.reserve + 1, _BLOCK_ON_CPU)
        with torch.no_grad():
            if query.shape[2] > longest_block:
                output = self._attend_to_parts(query, key, value, layer_idx, step.on(query.device), scale, dropout)
                self.update(key, value, layer_idx, step)
            else:
                keys, values = self.update(key, value, layer_idx, step)
                output = self._attend_to_slots(query, keys, values, layer_idx, step.on(query.device), scale, dropout)
        return _NoGradient.apply(output, query, key, value) if torch.is_grad_enabled() else output

    def _attend_to_slots(self, query, keys, values, layer_idx, step, scale, dropout) -> torch.Tensor:
        """One masked attention over all slots, which hold the new keys already."""
        layer = self.layers[layer_idx]
        mask, is_joined = step.once(_slots_seen, layer)
        heads, group, length = keys.shape[1], query.shape[1] // keys.shape[1], query.shape[2]
        output = F.scaled_dot_product_attention(
            query.unflatten(1, (heads, group)).flatten(2, 3),
            keys[:, :, :-1].to(query.dtype),
            values[:, :, :-1].to(query.dtype),
            mask if length == 1 else mask.repeat(1, 1, group, 1),
            dropout,
            scale=scale,
        )
        output = output.unflatten(2, (group, length))
        if is_joined is not None:
            output = torch.where(is_joined[:, :, None], output, 0.0)
        return output.flatten(1, 2)

    def _attend_to_parts(self, query, key, value, layer_idx, step, scale, dropout) -> torch.Tensor:
        """The new tokens among themselves, and then with what they see of the slots, branch by branch."""
        layer = self.layers[layer_idx]
        if self.offloading:
            torch.cuda.default_stream(key.device).wait_stream(self.prefetch_stream)
        layer.prefetch()
        result = torch.zeros_like(query)
        for rows, columns, position in step.parts:
            q, k, v = (x[rows] if columns is None else x[rows, :, columns] for x in (query, key, value))
            new = layer.pattern.at(position)
            output, lse = dilated_attention(q, k, v, new, scale=scale, dropout=dropout, return_lse=True)
            output = output.to(lse.dtype)
            seed = torch.randint(2**62, (1,)) if dropout > 0 else None
            past = step.once(_past, layer, position, q.shape[2])
            kernel = TileKernel(q, scale, dropout, seed)
            attend_to_past(output, lse, q, layer.keys[rows], layer.values[rows], past, layer.num_heads, kernel)
            result[(rows,) if columns is None else (rows, slice(None), columns)] = output.to(result.dtype)
        return result

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
        if attention_mask.shape != (batch_size, columns + length):
            raise ValueError(
                f"`attention_mask` must be a 2-D padding mask of shape {(batch_size, columns + length)} (batch, "
                f"cached and new tokens), got {tuple(attention_mask.shape)}."
                + " Masks of more dimensions are not supported: the pattern decides who attends to whom."
                * (attention_mask.dim() > 2)
            )
        device = self.positions.device
        real = attention_mask[:, :columns].to(device) != 0
        known = min(columns, self.reserve)
        last, was = real[:, columns - known :], self.last_real[:, 2 * self.reserve - known :]
        masked = was & ~last
        is_wrong = (real.sum(1) + masked.sum(1) != self.positions) | (last & ~was).any(1)
        is_wrong |= ((masked.cumsum(1) > 0) & last).any(1)
        if bool(is_wrong.any()):
            row = int(is_wrong.int().argmax())
            raise ValueError(
                f"`attention_mask` makes {int(real[row].sum())} of the tokens in row {row} of `past_key_values` real, "
                f"of which {int(self.positions[row])} were when they were cached. A DilatedCache drops keys for good: "
                f"only the last {self.reserve} tokens of a row can become padding afterwards "
                "(`DilatedCache(config, reserve=...)`). A DynamicCache has no such limit."
            )
        if bool(masked.any()):
            self._go_back(self.positions - masked.sum(1))
            self.last_real[:, 2 * self.reserve - known :] = last

    def _go_back(self, positions: torch.Tensor) -> None:
        distance = int((self.furthest - positions).max())
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

    def _map_rows(self, function) -> None:
        if self.positions is not None:
            self.positions, self.furthest = function(self.positions), function(self.furthest)
            self.last_real = function(self.last_real)


def is_dilated(past_key_values: Cache | None, layer_idx: int) -> bool:
    """Whether a layer of a cache keeps the keys of its pattern only."""
    return past_key_values is not None and getattr(past_key_values.layers[layer_idx], "is_dilated", False)


def _fingerprint(model: PreTrainedModel) -> str:
    """A checksum of the names, shapes and dtypes of all weights, and of 64 numbers of each."""
    checksum = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
        checksum.update(f"{name} {tuple(weight.shape)} {weight.dtype} {sample.double().tolist()}".encode())
    return checksum.hexdigest()


def _slots_of_new_keys(layer: DilatedLayer, step: Step) -> tuple[torch.Tensor, ...]:
    """Row, head and slot of the new keys `[B, Hkv, L, branches]`; the last slot where a branch does not keep one."""
    rings, position = layer.rings, step.position[..., None, None]
    slot = rings.start + rings.count(position) % rings.capacity
    is_kept = rings.keeps(position) & step.real[..., None, None]
    slot = torch.where(is_kept, slot, len(rings.branch_of_slot)).transpose(1, 2)
    row, head = (torch.arange(size, device=slot.device) for size in slot.shape[:2])
    return row[:, None, None, None], head[:, None, None], slot


def _slots_seen(layer: DilatedLayer, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which slots the new queries see, `[B, Hkv, L, S]`, and which of them see any, `[B, Hkv, L, 1]` (`None`: all)."""
    rings = layer.rings
    seen = rings.seen(step.position[..., None, None])
    first, stop = (x.transpose(1, 2)[..., rings.branch_of_slot] for x in seen)
    held = rings.held(step.after)[:, :, None]
    mask = (held >= first) & (held < stop)
    if not step.has_padding and 1 in layer.pattern.dilation_rates:
        return mask, None
    mask &= step.real[:, None, :, None]
    is_joined = mask.any(-1, keepdim=True)
    return mask | ~is_joined, is_joined


def _past(layer: DilatedLayer, step: Step, position: int, length: int) -> list[PastTile]:
    """What `length` new tokens from `position` on see of the slots."""

    def find(branch: int, heads: np.ndarray, positions: np.ndarray) -> tuple[slice, np.ndarray, np.ndarray]:
        fields = np.array(layer.rings.of_branch[branch], dtype=np.int64)[heads]  # [n, 1, fields]
        _, _, grid, rate, shift, phase, kept, capacity, start = np.moveaxis(fields, -1, 0)
        segment, inside = np.divmod(positions + shift, grid)
        slots = start + (segment * kept + (inside - phase) // rate) % capacity
        return slice(None), *np.broadcast_arrays(heads, slots)

    return past_tiles(layer.pattern, layer.num_heads, position, length, find, layer.device)


class _NoGradient(torch.autograd.Function):
    """Lets no one take the missing gradients of a cache for zeros."""

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
