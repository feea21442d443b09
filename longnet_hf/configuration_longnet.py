"""LongNet configuration: the usual fields of a Transformers decoder, and the pattern of dilated attention of every
layer."""

import copy
import warnings

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .dilated_pattern import DilatedPattern, check_segment_padding, heads_of_layers, layer_patterns
from .input_checks import check_integer, check_number
from .pattern_report import pattern_warnings


# Names that torchscale and other models have for fields of ours: Transformers would keep them, and nothing read them
_INSTEAD = {
    "segment_length": "segment_lengths",
    "dilated_ratio": "dilation_rates",
    "dilation_rate": "dilation_rates",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "dropout": "hidden_dropout",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@strict
class LongNetConfig(PreTrainedConfig):
    r"""Configuration of a LongNet model ("Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486).

    The default is the paper's base model: 12 layers, 768 wide, 12 heads, sub-layer norms as in MAGNETO and GELU, with
    rotary positions in place of xPos. With RMSNorm, a gated MLP and no sub-layer norms it is a Llama
    (see [`LongNetForCausalLM.from_llama`]).

    Args:
        segment_lengths (`list[int | None]`): segment length w of every branch, in tokens. A sequence longer than the
            longest is not seen across its boundaries.
        dilation_rates (`list[int]`): dilation rate r of every branch. Cost per token grows with the sum of w / r²
            of segments, and of w / r of windows.
        branch_types (`list[str]`, *optional*): `"segment"` (the paper's; default) or `"window"` (every query attends
            to the kept keys of the last w tokens; w = `None` with r = 1 is full attention) for every branch.
        head_offset (`str`): which rows a head keeps: `"paper"` (head mod r), `"grouped"` (torchscale's, contiguous
            groups of heads) or `"rotating"` ((head + layer * heads) mod r). Heads are key/value heads.
        segment_shift (`bool`): move the segments by half their length in odd layers, which lets information cross the
            segment boundaries of even layers. The paper has none.
        full_attention_layers (`list[int]`, *optional*): indices of layers with full attention (a hybrid stack).
        full_attention_heads (`dict[int, list[int]]`, *optional*): for some layers the key/value heads with full
            attention, in place of all branches (see [`rank_heads`], which finds those that need it).
        sink_tokens (`int`): every query also attends to so many first tokens of its document, where the branches of a
            head do not join them already. Pretrained models that are given windows need one at least.
        segment_padding (`str`): `"zeros"` for encoders whose weights were trained with torchscale (see
            [`LongNetModel.from_torchscale`]), which attend to the zeros that fill up the last segment; `"none"` for
            all others.
        is_causal (`bool`): `False` makes an encoder, which the model for masked tokens asks for, and others
            but the causal one may be.
        vocab_size (`int`): by default the size of the paper's tokenizer, cl100k_base, rounded up to a multiple of 64.
            0: a model without embeddings of tokens, which takes `inputs_embeds` only.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`): sizes, as in Llama.
        num_key_value_heads (`int`, *optional*): fewer than `num_attention_heads` for grouped-query attention.
        head_dim (`int`, *optional*): size of a head, `hidden_size / num_attention_heads` by default.
        hidden_act (`str`): activation of the MLP.
        use_gated_mlp (`bool`): gate the MLP (SwiGLU with `hidden_act="silu"`).
        norm_type (`str`): `"layer_norm"` or `"rms_norm"`.
        norm_eps (`float`): epsilon of the norms.
        use_sub_norm (`bool`): MAGNETO's extra norms before the output projections of attention and MLP (arXiv
            2210.06423), with its initialisation.
        scale_embedding (`bool`): multiply embeddings (`inputs_embeds` too) by the square root of `hidden_size`, and
            start them with variance 1 / `hidden_size`, as in torchscale.
        attention_bias, attention_out_bias, mlp_bias (`bool`): biases of the query, key and value projections, of the
            output projection, and of the MLP.
        use_final_norm (`bool`): norm after the last layer.
        attention_dropout (`float`): dropout of attention weights in training.
        embedding_dropout, hidden_dropout (`float`): dropout of the embeddings, and of what attention and MLP add to
            the hidden states.
        classifier_dropout (`float`, *optional*): dropout before the head of [`LongNetForTokenClassification`]. `None`:
            0.1, as in all of Transformers.
        drop_path_rate (`float`): probability with which the last layer's attention, and its MLP, is left out for a
            whole row in training (stochastic depth, arXiv 1603.09382); it grows linearly from 0 in the first layer.
        use_rope (`bool`): rotary positions; without them attention knows of positions only through the pattern.
        rope_parameters (`dict`, *optional*): rotary positions, as in all of Transformers (`rope_type`, `rope_theta`).
        max_position_embeddings (`int`): the context length meant for the model. Only some `rope_type`s look at it.
        chunk_size_feed_forward (`int`): run the MLPs on so many tokens at a time, 0 for all, which saves memory. In
            training the backward pass recomputes them.
        skip_logits (`bool`): leave out the logits where labels are given and they would be more than 2**27 numbers, so
            that no large `[N, vocabulary]` matrix exists. Set it to `False` if `compute_metrics` of a `Trainer`, or a
            loss of your own, needs them even so.
        initializer_range, use_cache, tie_word_embeddings, bos_token_id, eos_token_id, pad_token_id: as in Llama.

    ```python
    >>> from longnet_hf import LongNetConfig, LongNetForCausalLM

    >>> config = LongNetConfig(segment_lengths=[2048, 8192, 32768], dilation_rates=[1, 4, 12])
    >>> model = LongNetForCausalLM(config)
    ```
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 100288
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "gelu"
    use_gated_mlp: bool = False
    norm_type: str = "layer_norm"
    norm_eps: float = 1e-5
    use_sub_norm: bool = True
    scale_embedding: bool = True
    attention_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    use_final_norm: bool = True
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    drop_path_rate: float | int = 0.0
    segment_lengths: list[int | None] | tuple[int | None, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    branch_types: list[str] | tuple[str, ...] | None = None
    head_offset: str = "paper"
    segment_shift: bool = False
    full_attention_layers: list[int] | tuple[int, ...] | None = None
    full_attention_heads: dict | None = None
    sink_tokens: int = 0
    segment_padding: str = "none"
    is_causal: bool = True
    max_position_embeddings: int = 32768
    use_rope: bool = True
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    skip_logits: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                    f"({self.num_attention_heads}) where `head_dim` is not given."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.full_attention_heads is not None:  # JSON makes text of its keys
            heads = heads_of_layers(self.full_attention_heads, self.num_hidden_layers, self.num_key_value_heads)
            self.full_attention_heads = {layer: list(of_layer) for layer, of_layer in heads.items()}
        super().__post_init__(**kwargs)

    @property
    def layer_patterns(self) -> list[DilatedPattern]:
        """The pattern of every layer, first layer first."""
        return layer_patterns(
            self.num_hidden_layers,
            self.segment_lengths,
            self.dilation_rates,
            self.branch_types,
            self.head_offset,
            self.segment_shift,
            self.full_attention_layers,
            self.full_attention_heads,
            self.sink_tokens,
            num_heads=self.num_key_value_heads,
        )

    @classmethod
    def from_llama(cls, config: PreTrainedConfig, *, segment_lengths, dilation_rates, **kwargs) -> "LongNetConfig":
        """The configuration under which LongNet computes what a Llama-family model computes, but for its attention.

        Args:
            config: configuration of a Llama, Mistral, SmolLM or Qwen2 model.
            segment_lengths, dilation_rates: the pattern.
            kwargs: further fields of `LongNetConfig`.

        Raises:
            ValueError: if the source has something that LongNet does not compute.
        """
        if config.model_type not in ("llama", "mistral", "qwen2"):
            raise ValueError(f"`from_llama` takes models of type llama, mistral and qwen2, got {config.model_type!r}.")
        sliding_window = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if sliding_window or layer_types:
            raise ValueError(
                f"`from_llama` takes models with full attention, got `sliding_window={sliding_window}` and layers of "
                f"type {sorted(layer_types)}. To let the pattern replace them, load the source as a model whose "
                "configuration has neither, and give that."
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "`from_llama` takes weights that are not quantized, and the source has a `quantization_config`: "
                "dequantize it first."
            )
        same = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "hidden_act max_position_embeddings initializer_range attention_dropout use_cache tie_word_embeddings "
            "bos_token_id eos_token_id pad_token_id"
        ).split()
        qkv_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
        fields = {name: getattr(config, name) for name in same} | {
            "rope_parameters": copy.deepcopy(config.rope_parameters),
            "head_dim": getattr(config, "head_dim", None),
            "norm_type": "rms_norm",
            "norm_eps": config.rms_norm_eps,
            "use_gated_mlp": True,
            "use_sub_norm": False,
            "scale_embedding": False,
            "attention_bias": qkv_bias,
            "attention_out_bias": qkv_bias and config.model_type != "qwen2",
            "mlp_bias": getattr(config, "mlp_bias", False),
            "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates,
        }
        return cls(**(fields | kwargs))

    def validate_architecture(self):
        """Part of `@strict`-powered validation: checks what concerns several fields."""
        self._validate_numbers()
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must lie below `vocab_size` ({self.vocab_size}), got {self.pad_token_id}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim % 2 and self.use_rope:
            raise ValueError(f"`head_dim` must be even for rotary positions, got {self.head_dim}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f'`norm_type` must be "layer_norm" or "rms_norm", got {self.norm_type!r}.')
        for name in ("attention_dropout", "embedding_dropout", "hidden_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        patterns = self.layer_patterns  # made anew each time
        for pattern in patterns:
            check_segment_padding(pattern, self.segment_padding, self.is_causal)
        for name, instead in _INSTEAD.items():
            if getattr(self, name, None) is not None:
                raise ValueError(f"LongNet does not read `{name}` (got {getattr(self, name)!r}): give `{instead}`.")
        for name in ("sliding_window", "use_sliding_window", "layer_types"):
            if getattr(self, name, None):
                raise ValueError(
                    f"LongNet does not read `{name}` (got {getattr(self, name)!r}). Say it with the pattern: "
                    '`branch_types=["window"]` is a sliding window of `segment_lengths` tokens, and '
                    "`full_attention_layers` and `full_attention_heads` name what has full attention."
                )
        for text in pattern_warnings(patterns, self.num_key_value_heads, self.is_causal):
            warnings.warn(text, stacklevel=2)

    def _validate_numbers(self) -> None:
        """What concerns one field, and its type does not say."""
        sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
        for name in (*sizes.split(), "max_position_embeddings", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("vocab_size", "chunk_size_feed_forward"):
            check_integer(name, getattr(self, name), at_least=0)
        check_number("norm_eps", self.norm_eps, above=0)
        check_number("initializer_range", self.initializer_range, at_least=0)
        if self.classifier_dropout is not None:
            check_number("classifier_dropout", self.classifier_dropout, at_least=0, below=1)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES} or None, got {self.problem_type!r}.")
        for name in ("bos_token_id", "eos_token_id") if self.vocab_size else ():
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, (list, tuple)) else [ids]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(f"`{name}` must lie from 0 to below `vocab_size` ({self.vocab_size}), got {ids}.")

    def validate_rope(self):
        """Part of `@strict`-powered validation: Transformers only logs most of this."""
        parameters = self.rope_parameters or {}
        rope_types = ["default", *ROPE_INIT_FUNCTIONS]
        if parameters.get("rope_type", "default") not in rope_types:
            raise ValueError(f"`rope_type` must be one of {rope_types}, got {parameters['rope_type']!r}.")
        if parameters.get("rope_theta") is not None:
            check_number("rope_theta", parameters["rope_theta"], above=0)
        if parameters.get("factor") is not None:
            check_number("factor", parameters["factor"], at_least=1)
        share = parameters.get("partial_rotary_factor")
        if share not in (None, 1) and parameters.get("rope_type") != "proportional":
            raise ValueError(f"`partial_rotary_factor` must be 1: LongNet turns all of a head, got {share!r}.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"`rope_parameters` lacks something: {error.args[0]}") from error


__all__ = ["LongNetConfig"]
