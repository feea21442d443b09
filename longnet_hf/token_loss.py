"""The losses of models that predict tokens, and what such models do about their logits.

Shapes: B batch, N positions, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from .dilated_tiles import accumulator
from .linear_cross_entropy import is_plain_linear, linear_cross_entropy


logger = logging.get_logger(__name__)

# Most logits that the loss of a wrapped head holds at a time (512 MiB in float32).
_MAX_LOGITS = 1 << 27


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `[B, N, D]` that Transformers' `logits_to_keep` names: the last so many (0: all), indices `[K]`
    or `[B, K]`, or a boolean mask `[B, N]`, which gives `[kept, D]`."""
    if not torch.is_tensor(logits_to_keep):
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            raise ValueError(
                f"`logits_to_keep` must be an integer of at least 0 or a tensor of columns, got {logits_to_keep!r}."
            )
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


def labels_of_next(
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    ignore_index: int = -100,
    position_ids: torch.Tensor | None = None,
    is_packed: bool = False,
) -> torch.Tensor:
    """For every token the label of the next one, `[B, N]`, over any padding that lies between them. Padding has none:
    what stands before a text knows nothing of it, and a row gives what its text gives alone.

    A document that ends before padding, as `position_ids` that do not grow say or else `is_packed`, has the label of
    the next column."""
    labels = F.pad(labels, (0, 1), value=ignore_index)
    if attention_mask is None or is_packed:
        return without_padding(labels[:, 1:], attention_mask, ignore_index)
    length = labels.shape[1] - 1
    real = (attention_mask[:, -length:] != 0).to(labels.device)
    column = torch.arange(length, device=labels.device)
    # From the end on, the last real column that was met; behind the last token of a row, the next column
    found = column.where(real, length).flip(1).cummin(1).values.flip(1)
    following = F.pad(found[:, 1:], (0, 1), value=length)
    is_one_text = following < length
    if position_ids is not None:
        positions = position_ids.to(labels.device).expand_as(following)
        is_one_text &= positions.gather(1, following.clamp(max=length - 1)) > positions
    following = following.where(is_one_text, column + 1)
    return labels.gather(1, following).masked_fill(~real, ignore_index)


def without_padding(
    shift_labels: torch.Tensor, attention_mask: torch.Tensor | None, ignore_index: int = -100
) -> torch.Tensor:
    """Shifted labels `[B, N]`, of which padding has none."""
    if attention_mask is None:
        return shift_labels
    is_padding = attention_mask[:, -shift_labels.shape[1] :] == 0
    return shift_labels.masked_fill(is_padding.to(shift_labels.device), ignore_index)


def loss_divisor(
    labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None, ignore_index: int = -100
) -> torch.Tensor | int:
    """What a summed loss is divided by: the number given, which may count labels of other batches and processes, or
    that of the labels. Not 0, be it given: the loss of no labels is 0, not 0 / 0."""
    if num_items_in_batch is None:
        return (labels != ignore_index).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        return num_items_in_batch.masked_fill(num_items_in_batch == 0, 1)
    return num_items_in_batch or 1


def logits_loss(
    logits: torch.Tensor,
    shift_labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Cross-entropy of few logits `[B, N, vocabulary]` that are there anyway."""
    logits, labels = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return _mean(total, labels, num_items_in_batch, ignore_index)


def _mean(total: torch.Tensor, *labels_and_divisor) -> torch.Tensor:
    """A summed loss, divided by its [`loss_divisor`]."""
    divisor = loss_divisor(*labels_and_divisor)
    return total / (divisor.to(total.device) if torch.is_tensor(divisor) else divisor)


class TokenLossMixin:
    """The loss of a model that predicts tokens, without the logits of all of them. Needs `lm_head` and `config`."""

    def leaves_out_logits(self, num_tokens: int, logits_to_keep: int | torch.Tensor) -> bool:
        """Whether, where there are labels, no logits are returned. A caller who asks for some positions gets them, and
        all are returned while they take no more than the loss may hold at a time."""
        is_asked = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        if is_asked or not self.config.skip_logits or num_tokens * self.config.vocab_size <= _MAX_LOGITS:
            return False
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"The logits of {num_tokens} tokens are left out, since there are labels. If something reads them "
                "(`compute_metrics` or `predict` of Trainer, a loss of your own), set `model.config.skip_logits = "
                "False`."
            )
        return True

    def token_loss(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor | None,
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """Cross-entropy of all positions: from their `logits`, where these are there anyway and few (FSDP wants the
        head to be called once), or else over chunks."""
        if logits is not None and logits.numel() <= _MAX_LOGITS:
            return logits_loss(logits, shift_labels, num_items_in_batch, ignore_index)
        return self.chunked_loss(hidden_states, shift_labels, num_items_in_batch, ignore_index)

    def chunked_loss(
        self,
        hidden_states: torch.Tensor,
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """Cross-entropy over chunks of positions, see [`linear_cross_entropy`]."""
        hidden_states = hidden_states.flatten(0, -2)
        shift_labels = shift_labels.flatten().to(hidden_states.device)
        head = getattr(self.lm_head, "_orig_mod", self.lm_head)  # of Accelerate's regional compilation
        if is_plain_linear(head) and head.weight.device == hidden_states.device:
            loss = linear_cross_entropy(hidden_states, head.weight, shift_labels, ignore_index)
        else:
            loss = self.recomputed_loss(hidden_states, shift_labels, ignore_index)
        return _mean(loss, shift_labels, num_items_in_batch, ignore_index)

    def recomputed_loss(
        self, hidden_states: torch.Tensor, shift_labels: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        """The same, summed, of a head that is more than its weight: each chunk goes through the module `lm_head`, so
        that whatever wraps it (LoRA, FSDP) takes part, and its logits are recomputed in the backward pass."""

        def chunk_loss(hidden_states, labels):
            logits = self.lm_head(hidden_states)
            logits = logits.to(accumulator(logits.dtype))
            return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")

        size = max(1, _MAX_LOGITS // self.config.vocab_size)
        losses = []
        for chunk in zip(hidden_states.split(size), shift_labels.split(size), strict=True):
            if torch.is_grad_enabled():
                losses.append(checkpoint(chunk_loss, *chunk, use_reentrant=False))
            else:
                losses.append(chunk_loss(*chunk))
        return torch.stack(losses).sum()
