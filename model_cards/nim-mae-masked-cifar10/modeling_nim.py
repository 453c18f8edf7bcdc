"""NIM-MAE: ViT-MAE whose pre-training task is a choice between denoising (NIM) and filling masks (MAE).

Equations and sections are those of "Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense".
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEAttention,
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    ViTMAEForPreTraining,
    ViTMAELayer,
    ViTMAEModel,
    ViTMAEModelOutput,
    ViTMAEPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from .configuration_nim import NIMClassifierConfig, NIMConfig
from .image_processing import ImageProcessorMixin
from .loading_nim import LoadedAsBuiltMixin
from .pretraining_nim import NIMForPreTrainingOutput, NIMPreTrainingMixin


PATCH_VARIANCE_FLOOR = 1e-6  # added to a patch's variance before the root, as MAE does


def sincos_position_table(grid_size: int, dim: int) -> torch.Tensor:
    """The frozen 2-D sin-cos positions of MAE, `(1, 1 + grid_size**2, dim)`, float32; the class token's row is zero.

    The first half of each row encodes the column of the patch, the second half its row; each half is `dim / 4` sines
    followed by `dim / 4` cosines with wavelengths from 2 pi to 10000 * 2 pi. The published weights have this order.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (D/4,)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (G, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, D/2)
    columns = axis[None, :, :].expand(grid_size, -1, -1)  # (G, G, D/2)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    patches = torch.cat([columns, rows], dim=-1).reshape(grid_size**2, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches])[None].float()


def resize_position_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Interpolates a `(1, 1 + G*G, D)` position table to another grid in two dimensions (bicubic); row 0 is kept."""
    old = int((table.shape[1] - 1) ** 0.5)
    if (old, old) == tuple(grid):
        return table
    patches = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    patches = nn.functional.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table)], dim=1)


class ResizePositions(ConversionOps):
    """Fits a loaded position table to the model's own, for fine-tuning at another image size than pre-training's."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        ((table,),) = input_dict.values()
        # The size comes from the table, not from the configuration: a purified model has two configurations.
        side = int((model.get_parameter(full_layer_name).shape[1] - 1) ** 0.5)
        return {target_patterns[0]: resize_position_table(table, (side, side))}


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples, in training only (Huang et al. 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return hidden_states
        kept = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * kept.to(hidden_states.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def require_image_size(pixel_values: torch.Tensor, size: tuple[int, int]) -> None:
    """ValueError for what is no batch of images, and for images of another height and width than the model's."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4:
        shape = getattr(pixel_values, "shape", None)
        found = type(pixel_values).__name__ if shape is None else f"{type(pixel_values).__name__} {tuple(shape)}"
        raise ValueError(f"pixel_values must be normalized images (B, C, H, W) in a tensor, got {found}")
    height, width = pixel_values.shape[-2:]
    if (height, width) != tuple(size):
        raise ValueError(
            f"the images are {height}x{width}, the model takes {size[0]}x{size[1]}: resize them with the model's image "
            "processor, or pass interpolate_pos_encoding=True where the model allows it"
        )


def patch_mean_and_std(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, `(B, N, 1)` each, as `norm_pix_loss` uses them (unbiased variance)."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + PATCH_VARIANCE_FLOOR).sqrt()


class NIMConvolutionalProjection(nn.Sequential):
    """Overlapping patches: 3x3 convolutions of stride 2 with GELU between them, until each patch is one pixel.

    The width doubles from step to step and ends at `hidden_size`. Takes `(B, C, H, W)`, returns
    `(B, hidden_size, H / patch, W / patch)` as the linear projection does ("Early Convolutions Help Transformers See
    Better", Xiao et al. 2021).
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int):
        steps = patch_size.bit_length() - 1
        widths = [num_channels, *(hidden_size >> (steps - 1 - step) for step in range(steps))]
        layers = []
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers[:-1])


class NIMEmbeddings(ViTMAEEmbeddings):
    """Patch embeddings plus positions; hides patches only when it is given the order to hide them in."""

    def __init__(self, config):
        super().__init__(config)
        if config.patch_embedding == "convolutional":
            self.patch_embeddings.projection = NIMConvolutionalProjection(
                config.num_channels, config.hidden_size, config.patch_size
            )

    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not interpolate_pos_encoding:
            require_image_size(pixel_values, self.image_size)
        height, width = pixel_values.shape[-2:]
        tokens = self.patch_embeddings(pixel_values)  # (B, N, D)
        grid = (height // self.patch_size, width // self.patch_size)
        positions = resize_position_table(self.position_embeddings, grid)  # (1, 1 + N, D)
        tokens = tokens + positions[:, 1:]
        mask = ids_restore = None
        if noise is not None:
            tokens, mask, ids_restore = self.random_masking(tokens, noise)  # (B, N * (1 - mask_ratio), D)
        cls_token = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([cls_token, tokens], dim=1), mask, ids_restore


class NIMPreTrainedModel(ImageProcessorMixin, LoadedAsBuiltMixin, ViTMAEPreTrainedModel):
    """Base class of the NIM models: it initializes as MAE does, nested models too, and never changes loaded weights."""

    config_class = NIMConfig
    base_model_prefix = "vit"
    _no_split_modules = ["NIMEmbeddings", "NIMLayer", "ViTMAEDecoder"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            if self._is_attention_input(module):
                fan_out *= 3  # the reference holds q, k and v in one matrix, and Xavier's bound counts all of it
            bound = (6 / (fan_in + fan_out)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # The patch projection is a linear map of a patch, and is drawn as one; its bias keeps torch's default.
            fan_in = module.weight[0].numel()
            bound = (6 / (fan_in + module.weight.shape[0])) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, ViTMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            self._fill_positions(module.position_embeddings)
        elif isinstance(module, ViTMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            self._fill_positions(module.decoder_pos_embed)

    def _is_attention_input(self, linear: nn.Linear) -> bool:
        attentions = (module for module in self.modules() if isinstance(module, ViTMAEAttention))
        return any(linear is part for a in attentions for part in (a.q_proj, a.k_proj, a.v_proj))

    @staticmethod
    def _fill_positions(table: nn.Parameter):
        init.copy_(table, sincos_position_table(int((table.shape[1] - 1) ** 0.5), table.shape[2]))


class NIMLayer(ViTMAELayer):
    """ViT-MAE's layer with stochastic depth on both of its branches."""

    def __init__(self, config: NIMConfig | NIMClassifierConfig, drop_path_rate: float = 0.0):
        super().__init__(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = self.drop_path(self.dropout(attended)) + hidden_states
        expanded = self.mlp(self.layernorm_after(hidden_states))
        return self.drop_path(self.dropout(expanded)) + hidden_states


class NIMModel(NIMPreTrainedModel, ViTMAEModel):
    """The encoder. Unlike its parent it sees every patch unless it is given the order in which to hide them.

    With `add_final_norm=False` it ends without a norm, for a classifier that pools first. `drop_path_rate` of the
    configuration, where it has one, rises linearly from 0 at the first layer.
    """

    def __init__(self, config: NIMConfig | NIMClassifierConfig, add_final_norm: bool = True):
        NIMPreTrainedModel.__init__(self, config)
        self.embeddings = NIMEmbeddings(config)
        rate, last = getattr(config, "drop_path_rate", 0.0), max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            [NIMLayer(config, rate * index / last) for index in range(config.num_hidden_layers)]
        )
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else nn.Identity()
        )
        self.post_init()


class NIMForPreTraining(NIMPreTrainingMixin, NIMPreTrainedModel):
    r"""
    Encoder and decoder, trained to undo a degradation: noise (Eq. 3-4), a mask (Eq. 1-2; MAE itself), or both.

    Example:

    ```python
    >>> from modeling_nim import NIMConfig, NIMForPreTraining
    >>> model = NIMForPreTraining(NIMConfig(sigma="gamma(25, 3)"))
    >>> loss = model(pixel_values).loss  # sigma ~ gamma(25, 3), one per image
    >>> purified = model.purify(pixel_values, sigma=30)
    ```
    """

    def __init__(self, config: NIMConfig):
        super().__init__(config)
        self.vit = NIMModel(config)
        self.decoder = ViTMAEDecoder(config, num_patches=self.vit.embeddings.patch_embeddings.num_patches)
        for layer in self.decoder.decoder_layers:
            layer.attention.config = config  # it has a copy, which `set_attn_implementation` would not reach
        # Without masks the token is outside the graph; a trainable parameter without a gradient stops DDP.
        self.decoder.mask_token.requires_grad_(config.hides_patches)
        self.post_init()

    unpatchify = ViTMAEForPreTraining.unpatchify

    def reconstruct(
        self,
        degraded: torch.Tensor,
        hidden: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> NIMForPreTrainingOutput:
        """What the network makes of degraded images of the configured size.

        Args:
            degraded, hidden: the two results of `degrade`; `hidden` `(B, N)` is the order in which patches are hidden.
            pixel_values: `(B, C, H, W)`, the images before that; `patch_statistics="input"` takes its statistics from
                them.
            interpolate_pos_encoding: refused when true, since the decoder's positions hold for the configured size
                alone.

        Returns:
            [`NIMForPreTrainingOutput`] without `loss`.
        """
        self._check_image_size(degraded, interpolate_pos_encoding)
        encoded: ViTMAEModelOutput = self.vit(degraded, noise=hidden, **kwargs)
        logits = self._decode(encoded.last_hidden_state, encoded.ids_restore)  # (B, N, patch * patch * C)
        predicted = logits
        if self.config.norm_pix_loss:
            mean, std = self._target_statistics(pixel_values, degraded)
            predicted = logits * std + mean  # Eq. 9 leaves this step out; the authors' code has it
        return NIMForPreTrainingOutput(
            logits=logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            reconstruction=self.unpatchify(predicted),  # (B, C, H, W)
            degraded_pixel_values=self.hide(degraded, hidden),
        )

    def forward_loss(self, pixel_values: torch.Tensor, output: NIMForPreTrainingOutput) -> torch.Tensor:
        """The mean error (`reconstruction_loss`) of `output.logits` against clean images `(B, C, H, W)`: over every
        patch where there is noise (Eq. 4), else over the hidden ones (Eq. 2)."""
        target = self.patchify(pixel_values)  # (B, N, patch * patch * C)
        if self.config.norm_pix_loss:
            mean, std = self._target_statistics(pixel_values, output.degraded_pixel_values)
            target = (target - mean) / std
        loss_per_patch = self._error(output.logits, target).mean(dim=-1)  # (B, N)
        if output.mask is None or self.config.adds_noise:
            return loss_per_patch.mean()
        return (loss_per_patch * output.mask).sum() / output.mask.sum()

    def _target_statistics(
        self, pixel_values: torch.Tensor | None, degraded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.patch_statistics == "noisy":
            return patch_mean_and_std(self.patchify(degraded))
        if pixel_values is None:
            raise ValueError('patch_statistics="input" are those of the images before the noise: pass pixel_values')
        return patch_mean_and_std(self.patchify(pixel_values))

    def _check_image_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
        size = self.config.image_size
        if interpolate_pos_encoding:
            raise ValueError(
                f"interpolate_pos_encoding: the decoder reconstructs {size}x{size} images only, resize the images"
            )
        require_image_size(pixel_values, (size, size))

    @property
    def mask_square_size(self) -> int:
        """Side, in pixels, of what is hidden whole: a patch."""
        return self.config.patch_size

    def _hidden_from_noise(self, noise: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return noise

    def _mask_from_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        num_seen = int(hidden.shape[1] * (1 - self.config.mask_ratio))
        return hidden.argsort(dim=1).argsort(dim=1) >= num_seen

    def _hidden_from_mask(self, mask: torch.Tensor) -> torch.Tensor:
        num_patches = mask.shape[1]
        num_hidden = num_patches - int(num_patches * (1 - self.config.mask_ratio))
        if (mask.bool().sum(dim=1) != num_hidden).any():
            raise ValueError(
                f"bool_masked_pos must hide {num_hidden} of {num_patches} patches of each image (mask_ratio "
                f"{self.config.mask_ratio}), got {mask.bool().sum(dim=1).tolist()}"
            )
        return mask.float()  # hidden patches come last in this order

    def _decode(self, latent: torch.Tensor, ids_restore: torch.Tensor | None) -> torch.Tensor:
        if ids_restore is not None:
            return self.decoder(latent, ids_restore).logits
        # Every patch was seen: no mask tokens and nothing to put back in order, so the gathers are skipped.
        hidden_states = self.decoder.decoder_embed(latent) + self.decoder.decoder_pos_embed  # (B, 1 + N, D')
        for layer in self.decoder.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.decoder.decoder_pred(self.decoder.decoder_norm(hidden_states))[:, 1:]


class NIMForImageClassification(NIMPreTrainedModel):
    r"""
    The encoder with a classification head, as MAE fine-tunes it: mean over the patch tokens, `fc_norm`, linear.

    `NIMForImageClassification.from_pretrained(PRE_TRAINED_DIR, num_labels=...)` starts fine-tuning: the encoder is
    loaded, `fc_norm` and the head are fresh.
    """

    config_class = NIMClassifierConfig
    # Weights of a pre-trained model that a classifier does not have.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^vit\.layernorm\."]

    def __init__(self, config: NIMClassifierConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = NIMModel(config, add_final_norm=False)  # fc_norm takes the norm's place, after the pooling
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        # MAE's fine-tuning trains the table of positions; only pre-training freezes it.
        self.vit.embeddings.position_embeddings.requires_grad_()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self.classifier:
            init.trunc_normal_(module.weight, std=2e-5)  # MAE starts its fine-tuning from a head of almost zero
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
        r"""
        Args:
            pixel_values: `(B, 3, H, W)`, normalized.
            labels: adds `loss`, see `classification_loss`. Soft targets belong in the training loop.
            interpolate_pos_encoding: takes other image sizes, with positions interpolated in two dimensions.

        Returns:
            `ImageClassifierOutput` with `logits` `(B, num_labels)`.
        """
        encoded = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        pooled = encoded.last_hidden_state[:, 1:].mean(dim=1)  # (B, D)
        logits = self.classifier(self.fc_norm(pooled))  # (B, num_labels)
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """Cross-entropy of class indices `(B,)`, or what `problem_type` of the configuration asks for by name.

    `"regression"` is the mean squared error to labels of the logits' shape (or `(B,)` for one output), and
    `"multi_label_classification"` the binary cross-entropy to labels `(B, num_labels)`.

    Raises:
        ValueError: without a problem type, the labels are no `(B,)` integers; soft targets would otherwise turn
            silently into another loss.
    """
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels.to(logits).view_as(logits))
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits))
    is_tensor = isinstance(labels, torch.Tensor)
    if not is_tensor or labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.ndim != 1:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
        raise ValueError(
            f"labels must be class indices of shape (batch,) in a tensor of integers, got {found}: "
            "compute the loss of soft targets from the logits, or set problem_type in the configuration"
        )
    return nn.functional.cross_entropy(logits, labels)
