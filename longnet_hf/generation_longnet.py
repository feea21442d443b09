"""Reading and writing with LongNet: sequences of any length in chunks, prompts split over processes, `generate`.

The mixins of this file are parts of the models of modeling_longnet.py.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .batch_layout import CACHE, one_cache
from .context_parallel import SequenceSplit, active_split, is_distributed, split_sequence
from .dilated_cache import DilatedCache, is_dilated_cache, is_empty
from .input_checks import check_integer, check_labels, check_mask, check_not_empty, check_tensor
from .token_loss import labels_of_next


# How many tokens assisted decoding can take back
ASSISTED_RESERVE = 1023
# A prompt in chunks is read from its beginning, also beside a cache that holds this already
READS_CHUNKS_TWICE = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21)


@dataclass
class LongNetChunkOutput:
    """What [`~LongNetPreTrainedModel.forward_chunks`] yields.

    Args:
        last_hidden_state: `[B, L, hidden_size]`, of this chunk.
        loss: mean over the labels of all chunks that this call of `forward_chunks` has read so far, if there are any.
        past_key_values: the cache, which holds what comes next needs of all chunks so far.
    """

    last_hidden_state: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    past_key_values: Cache | None = None


class ReadingMixin:
    """Reads sequences that are too long for one forward pass on one device. For every LongNet model."""

    # The loss of hidden states and shifted labels, of models that have a language modelling head
    chunked_loss: Callable[..., torch.Tensor] | None = None

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
        """The forward pass over a sequence of any length, in memory that does not grow with it (but with the keys of
        heads that have full attention): a generator.

        A chunk attends to what a [`DilatedCache`] keeps of all chunks before it, so that the outputs are those of the
        whole sequence. To go on after an interruption, give the cache, and the tokens that it does not hold yet; if it
        came in the middle of a chunk, as the cache then says, a copy that was saved before. The loss is then that of
        the tokens given, of which the first is not predicted: the hidden state before it belongs to the earlier call.

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
        check_tensor("input_ids", input_ids, "integers", "B", "N")
        check_not_empty("input_ids", input_ids)
        if labels is not None:
            check_tensor("labels", labels, "integers", *input_ids.shape)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask)
            check_tensor("attention_mask", attention_mask, "zeros and ones", *input_ids.shape)
        if labels is not None and self.chunked_loss is None:
            raise ValueError(f"`labels` are for causal language models, and this is a {type(self).__name__}.")
        check_integer("chunk_size", chunk_size, at_least=1)
        if past_key_values is None:
            past_key_values = DilatedCache.for_patterns(self.base_model.patterns)
        length, total, count = input_ids.shape[1], 0.0, 0
        shifted = None
        if labels is not None and attention_mask is not None:  # of all, since padding may reach over chunks
            shifted = labels_of_next(labels.long(), attention_mask)
        knows_padding = is_dilated_cache(past_key_values)  # of earlier chunks; other caches are told it again
        with logging.tqdm(total=length, unit=" tokens", unit_scale=True, disable=not progress) as bar:
            for start in range(0, length, chunk_size):
                stop = min(start + chunk_size, length)
                mask = None if attention_mask is None else attention_mask[:, start if knows_padding else 0 : stop]
                output = LongNetChunkOutput(past_key_values=past_key_values)
                output.last_hidden_state = self.base_model(
                    input_ids[:, start:stop].to(self.device, torch.long),
                    attention_mask=None if mask is None else (mask != 0).to(self.device),
                    past_key_values=past_key_values,
                ).last_hidden_state
                if labels is not None:
                    part = labels_of_next(labels[:, start : stop + 1], None) if shifted is None else shifted[:, start:]
                    shift_labels = part[:, : stop - start].to(self.device, torch.long)
                    check_labels("labels", shift_labels, self.config.vocab_size, shift_labels.shape)
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
        check_tensor("input_ids", input_ids, "integers", "B", "N")
        if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            raise ValueError(f"`input_ids` must be of shape [B, N] with N > 1, got {tuple(input_ids.shape)}.")
        if not is_distributed():
            raise ValueError("`prefill_split` needs a process group: call `torch.distributed.init_process_group`.")
        world_size = torch.distributed.get_world_size(group)
        padding = -input_ids.shape[1] % (2 * world_size)
        split = SequenceSplit(
            input_ids.shape[1] + padding, world_size, torch.distributed.get_rank(group), layout, group
        )
        own = F.pad(input_ids, (0, padding))[:, split.positions(input_ids.device)]
        cache = DilatedCache.for_patterns(self.base_model.patterns, reserve=max(255, padding + 1))
        with split_sequence(group, layout):
            self.base_model(own.to(self.device), past_key_values=cache)
        cache.crop(-padding - 1)
        return cache


def soft_prompt_of(model: GenerationMixin) -> str | None:
    """The kind of PEFT's soft prompt that `generate` of a model puts in front of the user's, if any. PEFT does so
    between `generate` and `forward`: it prepares the inputs, and lengthens the mask of all tokens by ones."""
    return getattr(_soft_prompt(model), "peft_type", None)


def _soft_prompt(model: GenerationMixin):
    """PEFT's configuration of it."""
    owner = getattr(model.prepare_inputs_for_generation, "__self__", None)
    adapter = getattr(owner, "active_peft_config", None)
    return adapter if getattr(adapter, "is_prompt_learning", False) else None


def _check_given_cache(model_kwargs: dict, generation_config, generation_mode: GenerationMode) -> None:
    """Refuse, for `generate`, a cache with which Transformers would read the prompt a second time."""
    held, mask = model_kwargs[CACHE].get_seq_length(), model_kwargs.get("attention_mask")
    # As long as the prompt, or as all tokens if the user gave the new ones alone. Transformers drops one of only ones.
    length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", None)
    if held == 0 or length is None:
        return
    if length <= held:
        raise ValueError(
            f"The prompt of `generate` has {length} tokens, and the cache holds {held} already. Give the whole text, "
            "what the cache holds and at least one token more: `torch.cat((read_ids, question_ids), dim=1)`; or the "
            "question alone with an `attention_mask` for all of it. If nothing is to be added, take the last token "
            "back: `cache.crop(-1)`."
        )
    if generation_config.prefill_chunk_size is not None and READS_CHUNKS_TWICE:
        raise ValueError(
            f"The cache holds {held} tokens, and Transformers {transformers.__version__} would read them again in "
            "chunks (`prefill_chunk_size`): leave these out, or take Transformers 5.21 or later."
        )
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"The cache holds {held} tokens, and assisted decoding reads the whole prompt itself: give it no cache, "
            "or an empty one."
        )


def _check_padding_side(attention_mask: torch.Tensor | None) -> None:
    """Refuse prompts that end in padding, from which `generate` would go on."""
    if not torch.is_tensor(attention_mask) or attention_mask.dim() != 2 or attention_mask.shape[1] == 0:
        return
    is_real = attention_mask != 0
    rows = (is_real.any(1) & ~is_real[:, -1]).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"`attention_mask` has padding behind the tokens of rows {rows}, which `generate` would go on from: pad "
            'prompts on the left (`tokenizer.padding_side = "left"`).'
        )


class LongNetGenerationMixin(GenerationMixin):
    """What `generate` has to know of LongNet: its cache, its masks, and what it does not support."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full", "offloaded"):
            raise ValueError(f'`cache_implementation` of LongNet must be "dynamic" or "offloaded", got {kind!r}.')
        if model_kwargs.get(CACHE) is not None:
            _check_given_cache(model_kwargs, generation_config, generation_mode)
        is_given = model_kwargs.get(CACHE) is not None or generation_config.use_cache is False
        is_eager = self.config._attn_implementation == "eager"
        is_ordinary = is_eager or soft_prompt_of(self) in ("PREFIX_TUNING", "CARTRIDGE")  # which are caches themselves
        if is_given or is_ordinary or kind in ("dynamic", "dynamic_full"):
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        drafts = generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens
        options = {"reserve": max(ASSISTED_RESERVE, *(x or 0 for x in drafts))} if is_assisted else {}
        # Storage that does not grow. Drafts go beyond the end before they are taken back, and are not compiled.
        if generation_config.compile_config is not None and not is_assisted:
            max_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            # What Transformers does not know of
            options["max_length"] = max_length + getattr(_soft_prompt(self), "num_virtual_tokens", 0)
        options["offloading"] = kind == "offloaded"
        model_kwargs[CACHE] = DilatedCache.for_patterns(self.base_model.patterns, **options)

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        if active_split() is not None:
            raise ValueError(
                "`generate` takes whole sequences, and is called inside `split_sequence`: read a prompt with "
                "`prefill_split`, and write outside."
            )
        _check_padding_side(kwargs.get("attention_mask"))
        # Drafts by early exit shorten the model through its configuration, and leave it short if anything fails
        num_hidden_layers = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.config.num_hidden_layers = num_hidden_layers

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature is what `generate` accepts
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        # With the cache under its older name: PEFT knows no other, and would take every step for the first, in front
        # of which it puts its soft prompt
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("tokenizer", None)  # given for `stop_strings` and `token_healing`
        inputs["past_key_values"] = one_cache(inputs.pop("past_key_values", None), inputs)
        return inputs

    def create_masks_for_generate(
        self, attention_mask, inputs_embeds, past_key_values=None, is_first_iteration=False, **kwargs
    ) -> torch.Tensor | None:
        """Called by `generate` where the shapes of a cache do not change: a mask of unchanging shape, too."""
        is_first = is_first_iteration or is_empty(one_cache(past_key_values, kwargs))
        if attention_mask is None or is_first or soft_prompt_of(self) is not None:
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


__all__ = ["LongNetChunkOutput", "LongNetGenerationMixin", "ReadingMixin"]
