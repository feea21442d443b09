"""LongNet for Hugging Face Transformers. Importing this package registers it with the Auto classes."""

import transformers
from transformers import AutoConfig

from .configuration_longnet import LongNetConfig
from .context_parallel import SequenceSplit, split_sequence
from .dilated_cache import DilatedCache
from .dilated_interface import ContextParallelTrainerMixin, describe, set_dilated_attention
from .dilated_operator import dilated_attention, dilated_attention_reference
from .dilated_pattern import Branch, DilatedPattern
from .documents import find_documents
from .head_ranking import HeadRanking, rank_heads
from .modeling_longnet import (
    AUTO_CLASSES,
    LongNetAttention,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetModel,
    LongNetPreTrainedModel,
)
from .modeling_longnet_slide import (
    SLIDE_AUTO_CLASSES,
    LongNetForSlideClassification,
    LongNetSlideConfig,
    LongNetSlideModel,
    collate_slides,
)
from .pattern_report import PatternDescription, draw_pattern, reach


for _config, _auto_classes in ((LongNetConfig, AUTO_CLASSES), (LongNetSlideConfig, SLIDE_AUTO_CLASSES)):
    AutoConfig.register(_config.model_type, _config)
    for _auto_class, _model_class in _auto_classes.items():
        getattr(transformers, _auto_class).register(_config, _model_class)

__version__ = "0.1.0"
__all__ = [
    "Branch",
    "ContextParallelTrainerMixin",
    "DilatedCache",
    "DilatedPattern",
    "HeadRanking",
    "LongNetAttention",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForSlideClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "LongNetSlideConfig",
    "LongNetSlideModel",
    "PatternDescription",
    "SequenceSplit",
    "collate_slides",
    "describe",
    "dilated_attention",
    "dilated_attention_reference",
    "draw_pattern",
    "find_documents",
    "rank_heads",
    "reach",
    "set_dilated_attention",
    "split_sequence",
]
