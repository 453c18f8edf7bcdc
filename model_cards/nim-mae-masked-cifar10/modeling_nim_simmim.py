"""NIM-SimMIM and SimMIM (the other framework of Table 1) on transformers' BEiT."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.beit.modeling_beit import (
    BeitAttention,
    BeitEmbeddings,
    BeitLayer,
    BeitModel,
    BeitPreTrainedModel,
    BeitRelativePositionBias,
)
from transformers.utils.generic import can_return_tuple

from .configuration_nim import NIMSimMIMClassifierConfig, NIMSimMIMConfig
from .image_processing import ImageProcessorMixin
from .loading_nim import LoadedAsBuiltMixin
from .modeling_nim import classification_loss
from .pretraining_nim import NIMForPreTrainingOutput, NIMPreTrainingMixin


def resize_relative_positions(table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """Interpolates a table of relative positions in its two dimensions; the three entries of CLS stay as they are.

    Args:
        table: `((2h - 1) * (2w - 1) + 3, heads)` of a square window.
        window_size: height and width of the new window, in patches.

    Returns:
        `((2h' - 1) * (2w' - 1) + 3, heads)`.
    """
    side = math.isqrt(table.shape[0] - 3)
    if side * side != table.shape[0] - 3:
        raise ValueError(f"a table of {table.shape[0]} relative positions is not that of a square window")
    new_sides = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
    if new_sides == (side, side):
        return table
    distances = table[:-3].T.reshape(1, -1, side, side)  # (1, heads, 2h - 1, 2w - 1)
    distances = nn.functional.interpolate(distances, size=new_sides, mode="bicubic", align_corners=False)
    return torch.cat([distances.flatten(2)[0].T, table[-3:]])


def relative_position_index(window_size: tuple[int, int]) -> torch.Tensor:
    """Row of the table for each pair of tokens, `(1 + N, 1 + N)`, CLS first.

    Patch i sees patch j at (row_i - row_j, column_i - column_j), counted from the most negative distance; the table's
    last three rows are CLS to patch, patch to CLS and CLS to CLS.
    """
    height, width = window_size
    with torch.device("cpu"):  # also while a model is built on the meta device
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)  # (N,)
        rows = row[:, None] - row[None, :] + height - 1
        columns = column[:, None] - column[None, :] + width - 1
        index = torch.empty(1 + height * width, 1 + height * width, dtype=torch.long)
        num_distances = (2 * height - 1) * (2 * width - 1)
        index[1:, 1:] = rows * (2 * width - 1) + columns
        index[0, 1:], index[1:, 0], index[0, 0] = num_distances, num_distances + 1, num_distances + 2
    return index


class NIMSimMIMRelativePositionBias(BeitRelativePositionBias):
    """BEiT's relative position bias without what it recomputes in every forward pass: the index is a buffer, and a
    table that already fits is not interpolated."""

    def __init__(self, config: NIMSimMIMConfig | NIMSimMIMClassifierConfig):
        super().__init__(config)
        self.register_buffer("relative_position_index", relative_position_index(self.window_size), persistent=False)

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> torch.Tensor:
        table, index = self.relative_position_bias_table, self.relative_position_index
        if tuple(window_size) != self.window_size:  # the model allows this only with interpolation
            table = resize_relative_positions(table, window_size)
            index = relative_position_index(window_size).to(table.device)
        return table[index].permute(2, 0, 1).unsqueeze(0)  # (1, heads, 1 + N, 1 + N)


class NIMSimMIMLayer(BeitLayer):
    """A BEiT layer that knows its depth, which its initialization needs."""

    def __init__(self, config: NIMSimMIMConfig | NIMSimMIMClassifierConfig, layer_id: int, drop_path_rate: float):
        super().__init__(config, drop_path_rate=drop_path_rate)
        self.layer_id = layer_id  # 1, 2, ...
        if config.use_relative_position_bias:
            self.relative_position_bias = NIMSimMIMRelativePositionBias(config)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        # Reentrant checkpointing tracks positional arguments alone, and the mask holds the shared table of positions.
        # As a keyword argument, every layer would go backward through a graph that the first one has freed.
        return super().__call__(hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs)


class NIMSimMIMDecoder(nn.Conv2d):
    """SimMIM's decoder: one linear layer per patch, then pixels in place of channels."""

    def __init__(self, config: NIMSimMIMConfig):
        super().__init__(config.hidden_size, config.patch_size**2 * config.num_channels, kernel_size=1)
        self.patch_size = config.patch_size

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(super().forward(feature_map), self.patch_size)  # (B, C, H, W)


class NIMSimMIMPreTrainedModel(ImageProcessorMixin, LoadedAsBuiltMixin, BeitPreTrainedModel):
    """Initialization as in SimMIM's reference code, and loading from its pre-trained models."""

    config_class = NIMSimMIMConfig
    base_model_prefix = "beit"
    _no_split_modules = ["NIMSimMIMLayer"]
    _can_record_outputs = {"hidden_states": NIMSimMIMLayer, "attentions": BeitAttention}

    def _truncated_normal(self, tensor: torch.Tensor, std: float) -> None:
        # The reference cuts pre-training's draws at one standard deviation. Its classifier is drawn with a cut-off of
        # 2.0 before it is scaled: a hundred standard deviations, so no cut at all.
        cutoff = 1.0 if self.config.use_mask_token else 100.0
        init.trunc_normal_(tensor, std=std, a=-cutoff * std, b=cutoff * std)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, NIMSimMIMDecoder):
            # The reference leaves the decoder as PyTorch makes it: weight and bias uniform within 1 / sqrt(fan_in).
            bound = 1 / math.sqrt(module.in_channels)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            self._truncated_normal(module.weight, std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BeitEmbeddings):
            self._truncated_normal(module.cls_token, std)
            if module.mask_token is not None:
                self._truncated_normal(module.mask_token, std)
        elif isinstance(module, NIMSimMIMRelativePositionBias):
            init.zeros_(module.relative_position_bias_table)
            init.copy_(module.relative_position_index, relative_position_index(module.window_size))
        elif isinstance(module, NIMSimMIMLayer):
            super()._init_weights(module)
            for linear in (module.attention.o_proj, module.mlp.fc2):
                self._truncated_normal(linear.weight, std / math.sqrt(2 * module.layer_id))
        else:
            super()._init_weights(module)

    def _check_image_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
        height, width = pixel_values.shape[-2:]
        size, patch = self.config.image_size, self.config.patch_size
        if interpolate_pos_encoding and height % patch == 0 and width % patch == 0:
            return
        if (height, width) != (size, size):
            raise ValueError(
                f"the images are {height}x{width}, the model was made for {size}x{size}: resize them, or pass "
                f"interpolate_pos_encoding=True with sides that are multiples of {patch}"
            )


class NIMSimMIMModel(NIMSimMIMPreTrainedModel, BeitModel):
    """SimMIM's ViT: patches to tokens, CLS first; the last layer norm belongs to pre-training only."""

    def __init__(self, config: NIMSimMIMConfig | NIMSimMIMClassifierConfig):
        # BeitModel's constructor is skipped: the layers must know their depth before they are initialized.
        super(BeitModel, self).__init__(config)
        self.embeddings = BeitEmbeddings(config)
        shared = config.use_shared_relative_position_bias
        self.shared_position_bias = NIMSimMIMRelativePositionBias(config) if shared else None
        drop_path_rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(
            [NIMSimMIMLayer(config, layer_id, rate) for layer_id, rate in enumerate(drop_path_rates, start=1)]
        )
        self.layernorm = (
            nn.Identity() if config.use_mean_pooling else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        )
        self.pooler = None
        self.post_init()


class NIMSimMIMForPreTraining(NIMPreTrainingMixin, NIMSimMIMPreTrainedModel):
    """NIM-SimMIM: degrade, reconstruct (`degradation="noise"`), or SimMIM itself (`degradation="mask"`)."""

    def __init__(self, config: NIMSimMIMConfig):
        super().__init__(config)
        self.beit = NIMSimMIMModel(config)
        self.decoder = NIMSimMIMDecoder(config)
        # Without masks the token is outside the graph; a parameter without a gradient stops distributed training.
        self.beit.embeddings.mask_token.requires_grad_(config.hides_patches)
        self.post_init()

    def reconstruct(
        self,
        degraded: torch.Tensor,
        hidden: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> NIMForPreTrainingOutput:
        """Reconstructs degraded images.

        Args:
            degraded, hidden: the two results of `degrade`; `hidden` `(B, N)` is 1 where a patch is hidden.
            pixel_values: not needed; NIM-MAE takes its patches' statistics from the images before the degradation.
            interpolate_pos_encoding: accept images of another size, the relative positions being interpolated.

        Returns:
            [`NIMForPreTrainingOutput`] without `loss`; its `logits` are the reconstruction cut into patches.
        """
        self._check_image_size(degraded, interpolate_pos_encoding)
        patch = self.config.patch_size
        grid = (degraded.shape[-2] // patch, degraded.shape[-1] // patch)
        encoded = self.beit(
            degraded, bool_masked_pos=hidden, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        patches = encoded.last_hidden_state[:, 1:]  # (B, N, D)
        feature_map = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, H / patch, W / patch)
        reconstruction = self.decoder(feature_map)  # (B, C, H, W)
        return NIMForPreTrainingOutput(
            logits=self.patchify(reconstruction),
            mask=hidden,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            reconstruction=reconstruction,
            degraded_pixel_values=self.hide(degraded, hidden, interpolate_pos_encoding),
        )

    def forward_loss(self, pixel_values: torch.Tensor, output: NIMForPreTrainingOutput) -> torch.Tensor:
        """The mean error (`reconstruction_loss`) of `output.reconstruction` against clean images `(B, C, H, W)`: over
        every pixel (Eq. 4), or over the hidden ones (Eq. 2)."""
        error = self._error(output.reconstruction, pixel_values)
        if output.mask is None:
            return error.mean()
        mask = self._pixel_mask(output.mask, error)
        # The 1e-5 is the reference's, so that its losses are reproduced.
        return (error * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels

    @property
    def mask_square_size(self) -> int:
        """Side, in pixels, of what is hidden whole: a square of several patches."""
        return self.config.mask_patch_size

    def _hidden_from_noise(self, noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Hides `mask_ratio` of the squares, rounded up: those with the largest noise."""
        side = self.mask_square_size
        num_squares = noise.shape[1]
        num_hidden = math.ceil(num_squares * self.config.mask_ratio)
        rank = noise.argsort(dim=1).argsort(dim=1)
        mask = (rank >= num_squares - num_hidden).view(-1, height // side, width // side)
        scale = side // self.config.patch_size
        return mask.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2).flatten(1)  # (B, N)

    def _hidden_from_mask(self, mask: torch.Tensor) -> torch.Tensor:
        return mask

    def _mask_from_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class NIMSimMIMForImageClassification(NIMSimMIMPreTrainedModel):
    """SimMIM's classifier: the mean over patch tokens, `fc_norm`, a linear head.

    `from_pretrained` also takes the directory of a [`NIMSimMIMForPreTraining`] and starts fine-tuning from it: every
    layer gets a copy of the shared table of relative positions, interpolated if `image_size` differs; only `fc_norm`
    and `classifier` are fresh.
    """

    config_class = NIMSimMIMClassifierConfig
    # Weights of a pre-trained model that a classifier does not have.
    _keys_to_ignore_on_load_unexpected = [
        r"relative_position_index",
        r"^decoder\.",
        r"^beit\.layernorm\.",
        r"^beit\.embeddings\.mask_token$",
    ]

    def __init__(self, config: NIMSimMIMClassifierConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.beit = NIMSimMIMModel(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            self._truncated_normal(module.weight, 2e-5)  # 0.02 scaled by 0.001: it hardly disturbs the encoder
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Classifies normalized images.

        Args:
            pixel_values: `(B, C, H, W)`, normalized.
            labels: adds `loss`, see `classification_loss`.
            interpolate_pos_encoding: accept images of another size, the relative positions being interpolated.

        Raises:
            ValueError: images of another size without `interpolate_pos_encoding`.
        """
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        outputs = self.beit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        features = self.fc_norm(outputs.last_hidden_state[:, 1:].mean(dim=1))  # (B, D)
        logits = self.classifier(features)  # (B, num_labels)
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CopySharedRelativePositions(ConversionOps):
    """The shared table of pre-training, copied to every layer of the classifier."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        model: PreTrainedModel,
        full_layer_name: str,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        (tables,) = input_dict.values()
        # The part that owns the table: inside a purified model it is not the whole model.
        config = model.get_submodule(full_layer_name.partition(".layers.0.")[0]).config
        side = config.image_size // config.patch_size
        table = resize_relative_positions(tables[0] if isinstance(tables, list) else tables, (side, side))
        names = [target_patterns[0].replace(".0.", f".{layer}.") for layer in range(config.num_hidden_layers)]
        return {name: table.clone() for name in names}


register_checkpoint_conversion_mapping(
    "NIMSimMIMForImageClassification",
    [
        WeightConverter(
            "shared_position_bias.relative_position_bias_table",
            "layers.0.relative_position_bias.relative_position_bias_table",
            operations=[CopySharedRelativePositions()],
        )
    ],
    overwrite=True,  # the Hub's copy of this file may be imported beside the package
)
