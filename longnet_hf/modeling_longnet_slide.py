"""LongNet over the tiles of a slide: a whole image too large to be seen at once, cut into thousands of tiles.

What Prov-GigaPath's slide encoder is (features of tiles, with their coordinates), and LongViT (tiles of pixels,
embedded by a convolution): embeddings, the encoder of modeling_longnet.py, and pooling.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_longnet import LongNetConfig
from .documents import check_padding_mask
from .input_checks import resolve_indices
from .modeling_longnet import (
    LongNetForSequenceClassification,
    LongNetModel,
    LongNetPreTrainedModel,
    refuse_split,
    tell_other_packages,
)
from .torchscale_weights import (
    LONGVIT_SEGMENT_LENGTHS,
    gigapath_segment_lengths,
    read_checkpoint,
    rename_encoder,
    warn_of_rates,
    weights_under,
)


POOLINGS = ("mean", "cls")


@strict
class LongNetSlideConfig(LongNetConfig):
    r"""Configuration of a [`LongNetSlideModel`]: the fields of [`LongNetConfig`] for the encoder, and those of slides.

    The default has the size of Prov-GigaPath's slide encoder. Its weights want further fields, which
    [`LongNetSlideModel.from_gigapath`] sets.

    Args:
        feature_size (`int`): size of a tile's features, the input.
        tile_size (`int`): side of a tile in pixels; a tile at x, y lies in the cell x // tile_size, y // tile_size.
        grid_size (`int`): cells along each side of the largest slide. Coordinates beyond are an error.
        patch_size (`int`, *optional*): take pixels in place of features: a convolution embeds patches of this side,
            with learned positions.
        image_size (`int`): with `patch_size`, side in pixels of the images that the positions are learned for. They
            are resized for others.
        num_channels (`int`): with `patch_size`, channels of the images.
        use_cls_token (`bool`): put a learned token before the tiles.
        pooling (`str`): what stands for the slide: `"mean"` of the tiles, or `"cls"`, the token.
        norm_before_pooling (`bool`): take the mean after the output's norm, as LongViT does, not before.
        output_norm_eps (`float`): epsilon of the output's norm, which follows the encoder's own.
        feature_layers (`list[int]`, *optional*): classify by the pooled states of these layers, side by side (0: the
            embeddings, -1: the last layer), in place of the slide's pooled output.
    """

    model_type = "longnet_slide"

    vocab_size: int = 0
    num_attention_heads: int = 16
    segment_lengths: list[int | None] | tuple[int | None, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 8, 16)
    is_causal: bool = False
    use_rope: bool = False
    scale_embedding: bool = False
    use_cache: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 1048576
    feature_size: int = 1536
    tile_size: int = 256
    grid_size: int = 1000
    patch_size: int | None = None
    image_size: int = 1024
    num_channels: int = 3
    use_cls_token: bool = True
    pooling: str = "mean"
    norm_before_pooling: bool = False
    output_norm_eps: float = 1e-6
    feature_layers: list[int] | tuple[int, ...] | None = None

    def validate_architecture(self):
        """Part of `@strict`-powered validation: checks what concerns several fields."""
        super().validate_architecture()
        sizes = ("image_size", "num_channels", "patch_size") if self.patch_size is not None else ()
        for name in ("feature_size", "tile_size", "grid_size", *sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.is_causal:
            raise ValueError("Tiles have no order: `is_causal` of a slide model must be False, got True.")
        if self.vocab_size:
            raise ValueError(f"A slide model has no vocabulary: `vocab_size` must be 0, got {self.vocab_size}.")
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {POOLINGS}, got {self.pooling!r}.")
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError('`pooling="cls"` needs `use_cls_token=True`.')
        if self.patch_size is None and self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 for positions in two dimensions, got {self.hidden_size}."
            )
        if self.patch_size is not None and self.image_size % self.patch_size:
            raise ValueError(
                f"`image_size` ({self.image_size}) must be a multiple of `patch_size` ({self.patch_size})."
            )
        states = self.num_hidden_layers + 1
        if self.feature_layers is not None and (
            not self.feature_layers or not all(-states <= layer < states for layer in self.feature_layers)
        ):
            raise ValueError(
                f"`feature_layers` must be numbers from {-states} to {states - 1}, got {self.feature_layers}."
            )


@dataclass
class LongNetSlideOutput(ModelOutput):
    """What a [`LongNetSlideModel`] returns for B slides of N tiles.

    Args:
        last_hidden_state: `[B, N, hidden_size]`, each tile in the context of its slide.
        pooler_output: `[B, hidden_size]`, the slide.
        pooled_states: with `output_hidden_states`, the slide after the embeddings and after every layer, each
            `[B, hidden_size]`, through the output's norm but not the encoder's.
        hidden_states: with `output_hidden_states`, the states themselves, `[B, cls token + N, hidden_size]`.
        attentions: with `output_attentions`, see [`LongNetModel`]. The first token is the cls token.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    pooled_states: tuple[torch.Tensor | None, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def collate_slides(slides: Sequence[dict]) -> dict[str, torch.Tensor]:
    """A batch of slides of unequal size, for Trainer and DataLoader.

    Args:
        slides: each with `inputs_embeds` `[N, feature_size]`, `coords` `[N, 2]` and, if they are known, `labels`.

    Returns:
        The same, padded, and their `attention_mask` `[B, longest N]`.
    """
    batch = {}
    for name in ("inputs_embeds", "coords"):
        batch[name] = pad_sequence([torch.as_tensor(slide[name]) for slide in slides], batch_first=True)
    lengths = torch.tensor([len(slide["coords"]) for slide in slides], device=batch["coords"].device)
    columns = torch.arange(batch["coords"].shape[1], device=lengths.device)
    batch["attention_mask"] = (columns < lengths[:, None]).long()
    if "labels" in slides[0]:
        batch["labels"] = torch.stack([torch.as_tensor(slide["labels"]) for slide in slides])
    return batch


def sincos_positions(cells: torch.Tensor, size: int) -> torch.Tensor:
    """Sines and cosines `[..., size]` in float64 for cells x, y `[..., 2]`: the first half encodes y, the second x."""
    dtype = torch.float32 if cells.device.type == "mps" else torch.float64  # MPS has no float64
    frequency = 10000.0 ** (-torch.arange(size // 4, dtype=dtype, device=cells.device) / (size // 4))
    angles = cells.flip(-1)[..., None].to(dtype) * frequency
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class LongNetTileEmbeddings(nn.Module):
    """Features of tiles, projected, with the positions of their cells, which are computed: no table."""

    def __init__(self, config: LongNetSlideConfig):
        super().__init__()
        self.tile_size, self.grid_size = config.tile_size, config.grid_size
        self.projection = nn.Linear(config.feature_size, config.hidden_size)

    def forward(self, features: torch.Tensor, coords: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`[B, N, hidden_size]` of `features` `[B, N, feature_size]`, `coords` `[B, N, 2]` and `mask` `[B, N]`."""
        if features.dim() != 3 or features.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"`inputs_embeds` must hold features of tiles, of shape [B, N, {self.projection.in_features}], got "
                f"{tuple(features.shape)}."
            )
        cells = self.cells(features, coords, mask)
        if mask is not None:  # whatever stands there must not come back as a gradient
            features = features.masked_fill(~mask[..., None], 0.0)
        embeddings = self.projection(features.to(self.projection.weight.dtype))
        # In the weights' dtype: under autocast the residual stream stays in float32
        return embeddings + sincos_positions(cells, embeddings.shape[-1]).to(self.projection.weight.dtype)

    def cells(self, features: torch.Tensor, coords: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The cell of every tile, `[B, N, 2]`; 0 at padding."""
        if coords is None or coords.shape != (*features.shape[:2], 2):
            expected, given = (*features.shape[:2], 2), None if coords is None else tuple(coords.shape)
            raise ValueError(f"`coords` must hold x and y of every tile in pixels, of shape {expected}, got {given}.")
        if coords.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`coords` must be integers, float32 or float64, got {coords.dtype}, which cannot tell pixels apart."
            )
        cells = coords.to(features.device).div(self.tile_size, rounding_mode="floor")
        inside = ((cells >= 0) & (cells < self.grid_size)).all(-1)
        if mask is not None:
            inside = inside | ~mask
        if torch.compiler.is_compiling():
            torch._assert_async(inside.all(), "`coords` must lie on the grid of the configuration.")
        elif not bool(inside.all()):
            slide, tile = (~inside).nonzero()[0].tolist()
            raise ValueError(
                f"`coords` of tile {tile} of slide {slide} are {coords[slide, tile].tolist()}: x and y must lie in "
                f"[0, {self.grid_size * self.tile_size}) pixels, on the grid of {self.grid_size} x {self.grid_size} "
                f"cells of {self.tile_size} pixels."
            )
        return (cells if mask is None else cells.masked_fill(~mask[..., None], 0)).long()


class LongNetPatchEmbeddings(nn.Module):
    """Patches of pixels, embedded by a convolution, with learned positions that are resized to the image."""

    def __init__(self, config: LongNetSlideConfig):
        super().__init__()
        size, patch_size = config.hidden_size, config.patch_size
        self.patch_size, self.side = patch_size, config.image_size // patch_size
        self.projection = nn.Conv2d(config.num_channels, size, kernel_size=patch_size, stride=patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.side**2, size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, patches, hidden_size]`, row by row, of `pixel_values` `[B, num_channels, height, width]`."""
        expected = (self.projection.in_channels, self.patch_size)
        if pixel_values.dim() != 4 or pixel_values.shape[1] != expected[0]:
            raise ValueError(
                f"`pixel_values` must be of shape [B, {expected[0]}, height, width], got {tuple(pixel_values.shape)}."
            )
        height, width = (length // self.patch_size for length in pixel_values.shape[2:])
        if (height * self.patch_size, width * self.patch_size) != tuple(pixel_values.shape[2:]) or not height * width:
            raise ValueError(
                f"Height and width of `pixel_values` must be multiples of `patch_size` ({self.patch_size}), got "
                f"{tuple(pixel_values.shape[2:])}: crop or pad the image."
            )
        embeddings = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        return embeddings + self.positions(height, width)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The positions for an image of so many patches, `[1, height * width, hidden_size]`."""
        positions, side = self.position_embeddings, self.side
        if (height, width) == (side, side):
            return positions
        # As LongViT resizes them: by factors for a tenth of a patch more, lest rounding lose a row
        factors = ((height + 0.1) / side, (width + 0.1) / side)
        table = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.interpolate(table, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


class LongNetSlideEmbeddings(nn.Module):
    """The tokens of a slide: its tiles, after the cls token if there is one."""

    def __init__(self, config: LongNetSlideConfig):
        super().__init__()
        self.tiles = (LongNetTileEmbeddings if config.patch_size is None else LongNetPatchEmbeddings)(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_cls_token else None

    def forward(self, inputs_embeds, coords, attention_mask, pixel_values) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings `[B, cls token + N, hidden_size]`, and which tiles are real `[B, N]`, `None` if all are."""
        tiles, mask = self.embed_tiles(inputs_embeds, coords, attention_mask, pixel_values)
        if self.cls_token is None:
            return tiles, mask
        return torch.cat((self.cls_token.expand(len(tiles), -1, -1), tiles), dim=1), mask

    def count_tiles(self, inputs_embeds, pixel_values) -> int:
        """How many tiles, or patches of pixels, a slide of a batch has."""
        if isinstance(self.tiles, LongNetPatchEmbeddings) and pixel_values is not None:
            return math.prod(length // self.tiles.patch_size for length in pixel_values.shape[2:])
        return (pixel_values if inputs_embeds is None else inputs_embeds).shape[1]

    def embed_tiles(self, inputs_embeds, coords, attention_mask, pixel_values):
        """The same without the cls token."""
        if isinstance(self.tiles, LongNetPatchEmbeddings):
            if pixel_values is None or not (inputs_embeds is coords is attention_mask is None):
                raise ValueError("This model embeds patches of pixels (`patch_size`): give `pixel_values` alone.")
            return self.tiles(pixel_values), None
        if inputs_embeds is None or pixel_values is not None:
            raise ValueError("This model takes features of tiles: give `inputs_embeds` and `coords`.")
        mask = None
        if attention_mask is not None:
            check_padding_mask(attention_mask, tuple(inputs_embeds.shape[:2]), "(slides, tiles)")
            mask = attention_mask != 0
        if inputs_embeds.dim() == 3 and inputs_embeds.shape[1] == 0:
            raise ValueError(f"Slides without tiles: `inputs_embeds` is of shape {tuple(inputs_embeds.shape)}.")
        if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            empty = (~mask.any(1)).nonzero()[:, 0].tolist()
            raise ValueError(f"Slides {empty} of the batch have no tiles: their rows of `attention_mask` are all 0.")
        return self.tiles(inputs_embeds, coords, mask), mask


class LongNetSlidePreTrainedModel(LongNetPreTrainedModel):
    config: LongNetSlideConfig
    main_input_name = "inputs_embeds"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LongNetSlideEmbeddings) and module.cls_token is not None:
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, LongNetPatchEmbeddings):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)


class LongNetSlideModel(LongNetSlidePreTrainedModel, LongNetModel):
    """A slide's encoder: tiles in, each tile in its context and the whole slide out.

    The order of the tiles matters to dilated attention: a head keeps every r-th of them. Keep one order, that of the
    scan for example, in training and afterwards.
    """

    def __init__(self, config: LongNetSlideConfig):
        super().__init__(config)
        self.embeddings = LongNetSlideEmbeddings(config)
        # Out of the encoder, since the pooled states of layers are wanted without it
        self.encoder_norm, self.norm = self.norm, nn.Identity()
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.output_norm_eps)
        self.register_forward_pre_hook(refuse_split)
        self.post_init()

    @property
    def first_tile(self) -> int:
        """How many tokens stand before the tiles."""
        return int(self.config.use_cls_token)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tiles.projection

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.tiles.projection = value

    @can_return_tuple
    def forward(
        self,
        inputs_embeds: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongNetSlideOutput:
        r"""
        Args:
            inputs_embeds: `[B, N, feature_size]`, features of tiles.
            coords: `[B, N, 2]`, x and y of the tiles in pixels.
            attention_mask: `[B, N]`, 1 at real tiles and 0 at padding, where slides are of unequal size. A batch gives
                what its slides give alone.
            pixel_values: `[B, num_channels, height, width]` in place of the others, where `config.patch_size` is set.
            output_hidden_states: `True`, or indices with Transformers 5.24, for `pooled_states` and `hidden_states`.
            output_attentions, attention_rows: see [`LongNetModel`]; easier, [`~LongNetSlideModel.attention_maps`].

        ```python
        >>> from longnet_hf import LongNetSlideConfig, LongNetSlideModel

        >>> model = LongNetSlideModel(LongNetSlideConfig(num_hidden_layers=2))
        >>> features, coords = torch.randn(1, 500, 1536), 256 * torch.randint(100, (1, 500, 2))
        >>> slide = model(features, coords).pooler_output
        ```"""
        for name in ("is_causal", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"A slide model does not take `{name}`: its tiles have no order, a row is one slide.")
        hidden_states, mask = self.embeddings(inputs_embeds, coords, attention_mask, pixel_values)
        encoder_mask = None if mask is None else F.pad(mask, (self.first_tile, 0), value=True)
        kwargs["return_dict"] = True
        outputs = super().forward(inputs_embeds=hidden_states, attention_mask=encoder_mask, **kwargs)

        last_hidden_state = self.encoder_norm(outputs.last_hidden_state)
        states = outputs.hidden_states
        return LongNetSlideOutput(
            last_hidden_state=self.output_norm(last_hidden_state[:, self.first_tile :]),
            pooler_output=self.pool(last_hidden_state, mask),
            pooled_states=states and tuple(None if state is None else self.pool(state, mask) for state in states),
            hidden_states=states,
            attentions=outputs.attentions,
        )

    def pool(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """One state `[B, hidden_size]` for those of cls token and tiles, by the configuration's pooling, normed."""
        if self.config.pooling == "cls":
            return self.output_norm(hidden_states[:, 0])
        tiles = hidden_states[:, self.first_tile :]
        if self.config.norm_before_pooling:
            tiles = self.output_norm(tiles)
        count = tiles.shape[1]
        if mask is not None:
            tiles, count = tiles.masked_fill(~mask[..., None], 0.0), mask.sum(1, keepdim=True)
        # The sum of so many tiles would overflow fp16
        dtype = torch.promote_types(tiles.dtype, torch.float32)
        mean = (tiles.sum(1, dtype=dtype) / count).to(tiles.dtype)
        return mean if self.config.norm_before_pooling else self.output_norm(mean)

    def attention_maps(
        self,
        inputs_embeds: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tiles: Sequence[int] | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """How much attention every head of every layer pays to each tile, exactly, in memory linear in N: what heat
        maps are drawn from.

        Args:
            inputs_embeds, coords, attention_mask, pixel_values: the slides, see `forward`.
            tiles: `[R]`, the tiles that attend; by default the cls token does.

        Returns:
            For every layer `[B, H, N]` of the cls token, or `[B, H, R, N]` of `tiles`. What is missing to a sum of 1
            goes to the cls token and to the padding of segments. A tile that the head does not keep has 0.
        """
        if tiles is None and self.first_tile == 0:
            raise ValueError("This model has no cls token: say which `tiles` attend.")
        rows = torch.zeros(1, dtype=torch.long)
        if tiles is not None and (inputs_embeds is not None or pixel_values is not None):  # else forward refuses
            count = self.embeddings.count_tiles(inputs_embeds, pixel_values)
            rows = resolve_indices("tiles", torch.as_tensor(tiles), count, f"from {-count} to {count - 1}")
            rows = rows + self.first_tile
        outputs = self(
            inputs_embeds=inputs_embeds,
            coords=coords,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            output_attentions=True,
            attention_rows=rows,
            return_dict=True,
        )
        maps = (weights[..., self.first_tile :] for weights in outputs.attentions)
        return tuple(weights[:, :, 0] if tiles is None else weights for weights in maps)

    @classmethod
    def from_gigapath(
        cls, checkpoint: str | os.PathLike | Mapping, *, pooling: str, max_wsi_size: int = 262144, **kwargs
    ) -> "LongNetSlideModel":
        """Prov-GigaPath's slide encoder (`slide_encoder.pth`), its weights unchanged.

        Args:
            checkpoint: the file, or its state dict.
            pooling: `"cls"`, as the original has it if nothing is said, though the token was not trained in
                pretraining; or `"mean"` of the tiles (its `global_pool=True`).
            max_wsi_size: side in pixels of the largest slide, from which the segment lengths follow.
            kwargs: further fields of [`LongNetSlideConfig`] (`tile_size`, `grid_size`, `hidden_dropout`, …); the rest
                goes to `from_pretrained` (`dtype`, `device_map`, …).

        Raises:
            ValueError: if it has weights that this model does not have, or lacks some; they are named.
        """
        weights = read_checkpoint(checkpoint)
        left = [name for name in weights if name.startswith(("mask_token", "decoder"))]
        if left:
            warnings.warn(
                f"Weights of pretraining that the encoder has no use for are left out: {left}.", stacklevel=2
            )
        weights = {name: x for name, x in weights.items() if name not in left and name != "pos_embed"}
        own = {
            "patch_embed.proj.weight": "embeddings.tiles.projection.weight",
            "patch_embed.proj.bias": "embeddings.tiles.projection.bias",
            "cls_token": "embeddings.cls_token",
            "norm.weight": "output_norm.weight",
            "norm.bias": "output_norm.bias",
        }
        segment_lengths = gigapath_segment_lengths(max_wsi_size, kwargs.get("tile_size", cls.config_class.tile_size))
        fields = dict(pooling=pooling, segment_lengths=segment_lengths)
        return cls._from_encoder(weights, own, fields, kwargs)

    @classmethod
    def from_longvit(
        cls, checkpoint: str | os.PathLike | Mapping, *, image_size: int | None = None, **kwargs
    ) -> "LongNetSlideModel":
        """LongViT, pretrained as torchscale's example does it, its weights unchanged. Takes `pixel_values`.

        Args:
            checkpoint: the file, or its state dict.
            image_size: side in pixels of the images that it will see, from which the segment lengths follow: 1024,
                4096, 8192, 16384 or 32768, by default that of pretraining. For others give `segment_lengths`.
            kwargs: further fields of [`LongNetSlideConfig`]; the rest goes to `from_pretrained`.

        Raises:
            ValueError: if it has weights that this model does not have, or lacks some; they are named.
        """
        weights = weights_under(read_checkpoint(checkpoint), "module.backbone.", "backbone.")
        own = {
            "patch_embed.proj.weight": "embeddings.tiles.projection.weight",
            "patch_embed.proj.bias": "embeddings.tiles.projection.bias",
            "pos_embed": "embeddings.tiles.position_embeddings",
            "norm.weight": "output_norm.weight",
            "norm.bias": "output_norm.bias",
        }
        projection, table = (_weight_of(weights, name) for name in ("patch_embed.proj.weight", "pos_embed"))
        fields = dict(
            patch_size=projection.shape[-1],
            num_channels=projection.shape[1],
            image_size=math.isqrt(table.shape[1]) * projection.shape[-1],
            use_cls_token=False,
            pooling="mean",
            norm_before_pooling=True,
        )
        if "segment_lengths" not in kwargs:
            image_size = fields["image_size"] if image_size is None else image_size
            if image_size not in LONGVIT_SEGMENT_LENGTHS:
                raise ValueError(
                    f"`image_size` must be one of {sorted(LONGVIT_SEGMENT_LENGTHS)}, got {image_size}; for others "
                    "give `segment_lengths`."
                )
            fields["segment_lengths"] = LONGVIT_SEGMENT_LENGTHS[image_size]
        return cls._from_encoder(weights, own, fields, kwargs)

    @classmethod
    def _from_encoder(
        cls, weights: dict[str, torch.Tensor], own: dict[str, str], fields: dict, kwargs: dict
    ) -> "LongNetSlideModel":
        """The model of a checkpoint in which `own` weights, by name, stand beside a torchscale encoder."""
        num_heads = kwargs.get("num_attention_heads", cls.config_class.num_attention_heads)
        encoder = {name.removeprefix("encoder."): x for name, x in weights.items() if name not in own}
        encoder = rename_encoder(encoder, num_heads)
        _weight_of(encoder, "layers.0.mlp.up_proj.weight")
        layers = {name.split(".")[1] for name in encoder if name.startswith("layers.")}
        fields = fields | dict(
            hidden_size=encoder["layers.0.mlp.up_proj.weight"].shape[1],
            intermediate_size=encoder["layers.0.mlp.up_proj.weight"].shape[0],
            num_hidden_layers=len(layers),
            use_final_norm="norm.weight" in encoder,
            head_offset="grouped",
            segment_padding="zeros",
        )
        if "patch_size" not in fields:
            fields["feature_size"] = _weight_of(weights, "patch_embed.proj.weight").shape[1]
        chosen = {**fields, **kwargs}
        warn_of_rates(chosen["segment_lengths"], chosen.get("dilation_rates", cls.config_class.dilation_rates))
        renamed = {f"encoder_{name}" if name.startswith("norm.") else name: x for name, x in encoder.items()}
        renamed |= {ours: weights[theirs] for theirs, ours in own.items() if theirs in weights}
        return cls.from_weights(renamed, fields, **kwargs)


class LongNetForSlideClassification(LongNetSlidePreTrainedModel):
    """A slide's encoder with a linear classifier: of the slide's pooled output, or of `config.feature_layers`.

    `config.num_labels` and `config.problem_type` say what `labels` are, as in [`LongNetForSequenceClassification`].
    """

    sequence_loss = LongNetForSequenceClassification.sequence_loss

    def __init__(self, config: LongNetSlideConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongNetSlideModel(config)
        self.score = nn.Linear(config.hidden_size * len(config.feature_layers or [-1]), config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        inputs_embeds: torch.Tensor | None = None,
        coords: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args (the others are those of [`LongNetSlideModel`]):
            labels: `[B]`, classes or, with one label, numbers; `[B, num_labels]` of floats for several at a time.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.
        """
        layers = self.config.feature_layers
        wanted = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        if layers is not None:
            layers = [layer % (self.config.num_hidden_layers + 1) for layer in layers]
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            coords=coords,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            output_hidden_states=True if layers is not None else wanted,
            return_dict=True,
            **kwargs,
        )
        pooled = outputs.pooler_output
        if layers is not None:
            pooled = torch.cat([outputs.pooled_states[layer] for layer in layers], dim=-1)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self.sequence_loss(logits, logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )


def _weight_of(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in weights:
        raise ValueError(f"The checkpoint lacks `{name}`. It has {sorted(weights)[:6]} and others.")
    return weights[name]


SLIDE_AUTO_CLASSES = {"AutoModel": LongNetSlideModel, "AutoModelForImageClassification": LongNetForSlideClassification}
LongNetSlidePreTrainedModel.code_of_auto_classes = {
    "AutoConfig": "modeling_longnet_slide.LongNetSlideConfig",
    **{name: f"modeling_longnet_slide.{model_class.__name__}" for name, model_class in SLIDE_AUTO_CLASSES.items()},
}
LongNetSlideConfig.register_for_auto_class()
for _auto_class, _model_class in SLIDE_AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)
tell_other_packages(LongNetSlideConfig.model_type)


__all__ = [
    "LongNetForSlideClassification",
    "LongNetSlideConfig",
    "LongNetSlideModel",
    "LongNetSlideOutput",
    "LongNetSlidePreTrainedModel",
    "collate_slides",
]
