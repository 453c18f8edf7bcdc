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

from .configuration_nim import NIMSimMIMClassifierConfig, NIMSimMIMConfig
from .image_processing import ImageProcessorMixin
from .modeling_nim import NIMForPreTrainingOutput, classification_loss
from .noise_nim import Generators, clamp_to_image_range, degrade, sample_mask_noise


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

    Patch i sees patch j at (row_i - row_j, column_i - column_j), counted from the most negative distance; the table's last
    three rows are CLS to patch, patch to CLS and CLS to CLS.
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
        if tuple(window_size) != self.window_size:  # the model has refused this unless interpolation was asked for
            table = resize_relative_positions(table, window_size)
            index = relative_position_index(window_size).to(table.device)
        return table[index].permute(2, 0, 1).unsqueeze(0)  # (1, heads, 1 + N, 1 + N)


class NIMSimMIMLayer(BeitLayer):
    """A BEiT layer that knows its depth, which its initialisation needs."""

    def __init__(self, config: NIMSimMIMConfig | NIMSimMIMClassifierConfig, layer_id: int, drop_path_rate: float):
        super().__init__(config, drop_path_rate=drop_path_rate)
        self.layer_id = layer_id  # 1, 2, ...
        if config.use_relative_position_bias:
            self.relative_position_bias = NIMSimMIMRelativePositionBias(config)


class NIMSimMIMDecoder(nn.Conv2d):
    """SimMIM's decoder: one linear layer per patch, then pixels in place of channels."""

    def __init__(self, config: NIMSimMIMConfig):
        super().__init__(config.hidden_size, config.patch_size**2 * config.num_channels, kernel_size=1)
        self.patch_size = config.patch_size

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(super().forward(feature_map), self.patch_size)  # (B, C, H, W)


class NIMSimMIMPreTrainedModel(ImageProcessorMixin, BeitPreTrainedModel):
    """Initialisation as in SimMIM's reference code, and loading from its pre-trained models."""

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
            self._truncated_normal(module.weight, getattr(module, "init_std", std))
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
        # BeitModel's constructor is passed over: the layers must know their depth before they are initialised.
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


class NIMSimMIMForPreTraining(NIMSimMIMPreTrainedModel):
    """NIM-SimMIM: degrade, reconstruct (`degradation="noise"`), or SimMIM itself (`degradation="mask"`)."""

    def __init__(self, config: NIMSimMIMConfig):
        super().__init__(config)
        self.beit = NIMSimMIMModel(config)
        self.decoder = NIMSimMIMDecoder(config)
        # Without masks the token is outside the graph; a parameter that never gets a gradient stops distributed training.
        self.beit.embeddings.mask_token.requires_grad_(config.degradation == "mask")
        self.post_init()

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)` to patches `(B, N, patch * patch * C)`, channels last as in MAE."""
        batch_size, channels, height, width = images.shape
        patch = self.config.patch_size
        patches = images.reshape(batch_size, channels, height // patch, patch, width // patch, patch)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _draw_mask(self, pixel_values: torch.Tensor, noise: torch.Tensor | None, generator: Generators) -> torch.Tensor:
        """Hides `mask_ratio` of the squares of `mask_patch_size` pixels, those with the largest noise; `(B, h, w)`."""
        batch_size, _, height, width = pixel_values.shape
        side = self.config.mask_patch_size
        rows, columns = height // side, width // side
        if noise is None:
            noise = sample_mask_noise((batch_size, rows * columns), generator, pixel_values.device)
        if noise.shape != (batch_size, rows * columns):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}: pass ({batch_size}, {rows * columns}), one number for each "
                f"square of {side}x{side} pixels"
            )
        num_masked = math.ceil(rows * columns * self.config.mask_ratio)
        rank = noise.to(pixel_values.device).argsort(dim=1).argsort(dim=1)
        mask = (rank >= rows * columns - num_masked).view(batch_size, rows, columns)
        scale = side // self.config.patch_size
        return mask.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)  # (B, H / patch, W / patch)

    def _reconstruct(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None,
        epsilon: torch.Tensor | None,
        generator: Generators,
        noise: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        **kwargs,
    ) -> NIMForPreTrainingOutput:
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        patch = self.config.patch_size
        rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        mask = None
        if self.config.degradation == "mask":
            if sigma is not None or epsilon is not None:
                raise ValueError(
                    '`sigma` and `epsilon` belong to degradation="noise"; this model hides patches: use `noise`'
                )
            mask = self._draw_mask(pixel_values, noise, generator) if bool_masked_pos is None else bool_masked_pos
            if mask.shape[0] != pixel_values.shape[0] or mask[0].numel() != rows * columns:
                raise ValueError(
                    f"bool_masked_pos has shape {tuple(mask.shape)}: pass ({pixel_values.shape[0]}, {rows * columns}), "
                    "one value for each patch"
                )
            mask = mask.flatten(1).to(pixel_values.device)  # (B, N)
            degraded = pixel_values  # the mask is laid over the tokens
        else:
            if noise is not None or bool_masked_pos is not None:
                raise ValueError(
                    '`noise` and `bool_masked_pos` belong to degradation="mask"; here it is "noise": use `epsilon`'
                )
            sigma = self.config.sigma if sigma is None else sigma
            degraded = degrade(pixel_values, sigma, epsilon, generator, self.config.image_std)
        outputs = self.beit(degraded, bool_masked_pos=mask, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        patches = outputs.last_hidden_state[:, 1:]  # (B, N, D)
        feature_map = patches.transpose(1, 2).unflatten(2, (rows, columns))  # (B, D, H / patch, W / patch)
        return NIMForPreTrainingOutput(
            reconstruction=self.decoder(feature_map),
            degraded_pixel_values=degraded,
            mask=mask,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pixel_mask(self, mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Patches `(B, N)` to pixels `(B, 1, H, W)`."""
        patch = self.config.patch_size
        mask = mask.to(like.dtype).view(-1, 1, like.shape[-2] // patch, like.shape[-1] // patch)
        return mask.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)

    def forward(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> NIMForPreTrainingOutput | tuple:
        """Degrades clean images and reconstructs them; the loss is against the clean images.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            sigma: noise scale on 0..255: a specification, a number or `(B,)`; None means `config.sigma`.
            epsilon: `(B, C, H, W)` standard normal noise of Eq. 3; drawn when None.
            generator: for the draws, or a list with one per image; the same state gives the same answer whatever the
                batch size. None means the global one.
            noise: `(B, M)` uniform noise over the M squares of `mask_patch_size` pixels; the largest are masked.
                For `degradation="mask"`, drawn when None.
            bool_masked_pos: `(B, N)` or `(B, H / patch, W / patch)`, the mask itself, in place of `noise`.
            interpolate_pos_encoding: accept images of another size, the relative positions being interpolated.

        Returns:
            [`NIMForPreTrainingOutput`]; `logits` `(B, N, patch * patch * C)` are the reconstruction cut into patches,
            channels last as MAE's; in mask mode `mask` is `(B, N)` and the loss that of Eq. 2 with the L1 distance.

        Raises:
            ValueError: a size, mask or noise that does not fit, or an argument of the other degradation.
        """
        outputs = self._reconstruct(
            pixel_values, sigma, epsilon, generator, noise, bool_masked_pos, interpolate_pos_encoding, **kwargs
        )
        error = nn.functional.l1_loss(outputs.reconstruction, pixel_values, reduction="none")
        if outputs.mask is None:
            outputs.loss = error.mean()  # Eq. 4 with the L1 distance
        else:
            mask = self._pixel_mask(outputs.mask, error)
            # Eq. 2; the 1e-5 is the reference's, so that its losses are reproduced
            outputs.loss = (error * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels
            outputs.degraded_pixel_values = pixel_values * (1 - mask)
        outputs.logits = self.patchify(outputs.reconstruction)
        return outputs if return_dict is not False else outputs.to_tuple()

    def purify(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """The defence (Eq. 9 up to the classifier): degrade, reconstruct, clamp to [0, 1]; arguments as in `forward`.

        Gradients pass through the noise draw and the clamp on purpose: a white-box attacker has them. With
        `degradation="mask"` the visible patches are those of the input.

        Returns:
            `(B, C, H, W)`, normalised.
        """
        outputs = self._reconstruct(
            pixel_values, sigma, epsilon, generator, noise, bool_masked_pos, interpolate_pos_encoding
        )
        purified = outputs.reconstruction.to(pixel_values.dtype)
        if outputs.mask is not None:
            mask = self._pixel_mask(outputs.mask, pixel_values)
            purified = purified * mask + pixel_values * (1 - mask)
        return clamp_to_image_range(purified, self.config.image_mean, self.config.image_std)


class NIMSimMIMForImageClassification(NIMSimMIMPreTrainedModel):
    """SimMIM's classifier: the mean over patch tokens, `fc_norm`, a linear head.

    `from_pretrained` also takes the directory of a [`NIMSimMIMForPreTraining`] and starts fine-tuning from it: every
    layer gets a copy of the shared table of relative positions, interpolated if `image_size` differs; only `fc_norm`
    and `classifier` are fresh.
    """

    config_class = NIMSimMIMClassifierConfig
    # What pre-training has and a classifier leaves behind.
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
        self.classifier.init_std = 2e-5  # 0.02 scaled by 0.001: a fresh head hardly disturbs the encoder
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        """Classifies normalised images.

        Args:
            pixel_values: `(B, C, H, W)`, normalised.
            labels: `(B,)` class indices; with them the loss is the cross-entropy.
            interpolate_pos_encoding: accept images of another size, the relative positions being interpolated.

        Raises:
            ValueError: images of another size without `interpolate_pos_encoding`.
        """
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        outputs = self.beit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        features = self.fc_norm(outputs.last_hidden_state[:, 1:].mean(dim=1))  # (B, D)
        logits = self.classifier(features)  # (B, num_labels)
        output = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()


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
        # The part of the model that the table belongs to: it may not be the whole.
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
