"""NIM-MAE: ViT-MAE whose pre-training task is a choice between denoising (NIM) and filling masks (MAE).

Equations and sections are those of "Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense".
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    ViTMAEForPreTraining,
    ViTMAEForPreTrainingOutput,
    ViTMAELayer,
    ViTMAEModel,
    ViTMAEModelOutput,
    ViTMAEPreTrainedModel,
)

from .configuration_nim import NIMClassifierConfig, NIMConfig
from .image_processing import ImageProcessorMixin
from .noise_nim import Generators, clamp_to_image_range, degrade, sample_mask_noise


PATCH_VARIANCE_FLOOR = 1e-6  # added to a patch's variance before the root, as MAE does


@dataclass
class NIMForPreTrainingOutput(ViTMAEForPreTrainingOutput):
    """
    Output of [`NIMForPreTraining`].

    Args:
        loss: scalar; mean squared error over all patches (noise, Eq. 4) or over the hidden ones (mask, Eq. 2).
        logits: `(B, N, patch * patch * 3)`, the prediction of every patch, normalised per patch with `norm_pix_loss`; with
            `residual_prediction` the degraded image is in it.
        reconstruction: `(B, 3, H, W)`, the prediction as normalised images, not clamped.
        degraded_pixel_values: `(B, 3, H, W)`, what the encoder saw: the noisy images, or the images with a mask in mask mode.
        mask, ids_restore: `(B, N)`, only with `degradation="mask"`: 1 where a patch was hidden; the shuffling's inverse.
    """

    reconstruction: torch.Tensor | None = None
    degraded_pixel_values: torch.Tensor | None = None


def sincos_position_table(grid_size: int, dim: int) -> torch.Tensor:
    """The frozen 2-D sin-cos positions of MAE, `(1, 1 + grid_size**2, dim)`, float32; the class token's row is zero.

    The first half of each row encodes the column of the patch, the second half its row; each half is `dim / 4` sines
    followed by `dim / 4` cosines with wavelengths from 2 pi to 10000 * 2 pi. This order is that of the published weights.

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
        # The table and not the configuration knows the size: inside a purified model there are two configurations.
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


def patch_mean_and_std(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, `(B, N, 1)` each, as `norm_pix_loss` uses them (unbiased variance)."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + PATCH_VARIANCE_FLOOR).sqrt()


class NIMConvolutionalProjection(nn.Sequential):
    """Overlapping patches: 3x3 convolutions of stride 2 with GELU between them, until one pixel stands for a patch.

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
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != tuple(self.image_size):
            raise ValueError(
                f"the images are {height}x{width}, the model takes {self.image_size[0]}x{self.image_size[1]}: resize them "
                "with the model's image processor, or pass interpolate_pos_encoding=True where the model allows it"
            )
        tokens = self.patch_embeddings(pixel_values)  # (B, N, D)
        grid = (height // self.patch_size, width // self.patch_size)
        positions = resize_position_table(self.position_embeddings, grid)  # (1, 1 + N, D)
        tokens = tokens + positions[:, 1:]
        mask = ids_restore = None
        if noise is not None:
            tokens, mask, ids_restore = self.random_masking(tokens, noise)  # (B, N * (1 - mask_ratio), D)
        cls_token = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([cls_token, tokens], dim=1), mask, ids_restore


class NIMPreTrainedModel(ImageProcessorMixin, ViTMAEPreTrainedModel):
    """Shared base of the NIM models: MAE's initialisation, reached by every nested model, loaded weights left alone."""

    config_class = NIMConfig
    base_model_prefix = "vit"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if getattr(module, "_is_classification_head", False):
            init.trunc_normal_(module.weight, std=2e-5)  # MAE starts its fine-tuning from a head of almost zero
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            if getattr(module, "_is_fused_projection", False):
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

    @staticmethod
    def _fill_positions(table: nn.Parameter):
        init.copy_(table, sincos_position_table(int((table.shape[1] - 1) ** 0.5), table.shape[2]))


class NIMModel(NIMPreTrainedModel, ViTMAEModel):
    """The encoder. Unlike its parent it sees every patch unless it is given the order in which to hide them."""

    def __init__(self, config: NIMConfig | NIMClassifierConfig):
        NIMPreTrainedModel.__init__(self, config)
        self.config = config
        self.embeddings = NIMEmbeddings(config)
        self.layers = nn.ModuleList([ViTMAELayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        _mark_fused_projections(self)
        self.post_init()


def _mark_fused_projections(model: nn.Module):
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module._is_fused_projection = True


class NIMForPreTraining(NIMPreTrainedModel):
    r"""
    Encoder and decoder, trained to undo a degradation: noise (Eq. 3-4) or a mask (Eq. 1-2; MAE itself).

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
        _mark_fused_projections(self.decoder)
        # Without masks the token is outside the graph; a trainable parameter without a gradient stops DDP.
        self.decoder.mask_token.requires_grad_(config.degradation == "mask")
        self.post_init()

    patchify = ViTMAEForPreTraining.patchify
    unpatchify = ViTMAEForPreTraining.unpatchify

    def forward(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> NIMForPreTrainingOutput | tuple:
        r"""
        Degrades the images, reconstructs them, and scores the reconstruction.

        Args:
            pixel_values: `(B, 3, H, W)`, clean and normalised, of the configured size.
            sigma: scale of the noise on 0..255: a number, one per image `(B,)`, a specification such as
                `"uniform(0, 30)"`, or None for the configuration's.
            epsilon: `(B, 3, H, W)`, the standard normal noise of Eq. 3; drawn when None.
            generator: where draws come from: None is the global RNG; one generator is shared by the images, drawn image by
                image (independent of the batch size); a list gives each image its own.
            noise: `(B, N)`, with `degradation="mask"` only: its order decides which patches are hidden, as in ViTMAE.

        Raises:
            ValueError: the image size is not the configured one (the decoder's positions hold for that size alone), sigma is
                negative, or an argument belongs to the other degradation.
        """
        self._check_arguments(sigma, epsilon, noise)
        if kwargs.pop("interpolate_pos_encoding", None):
            size = self.config.image_size
            raise ValueError(
                f"interpolate_pos_encoding: the decoder reconstructs {size}x{size} images only, resize the images"
            )
        if self.config.degradation == "noise":
            sigma = self.config.sigma if sigma is None else sigma
            degraded = degrade(pixel_values, sigma, epsilon, generator, self.config.image_std)  # Eq. 3
        else:
            degraded = pixel_values
            if noise is None:
                shape = (pixel_values.shape[0], self.vit.embeddings.patch_embeddings.num_patches)
                noise = sample_mask_noise(shape, generator, pixel_values.device)

        encoded: ViTMAEModelOutput = self.vit(degraded, noise=noise, **kwargs)
        logits = self._decode(encoded.last_hidden_state, encoded.ids_restore)  # (B, N, patch * patch * 3)

        target = self.patchify(pixel_values)  # (B, N, patch * patch * 3)
        if self.config.residual_prediction:
            logits = logits + self.patchify(degraded)
        predicted = logits
        if self.config.norm_pix_loss:
            noisy_statistics = self.config.patch_statistics == "noisy"
            mean, std = patch_mean_and_std(self.patchify(degraded) if noisy_statistics else target)
            target = (target - mean) / std
            predicted = logits * std + mean  # Eq. 9 leaves this step out; the authors' code has it
        reconstruction = self.unpatchify(predicted)  # (B, 3, H, W)

        loss_per_patch = (logits - target).square().mean(dim=-1)  # (B, N)
        mask = encoded.mask
        if mask is None:
            loss = loss_per_patch.mean()  # Eq. 4: every patch
        else:
            loss = (loss_per_patch * mask).sum() / mask.sum()  # Eq. 2: the hidden patches
            degraded = pixel_values * self._pixel_mask(1 - mask)

        output = NIMForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            reconstruction=reconstruction,
            degraded_pixel_values=degraded,
        )
        return output if return_dict is not False else output.to_tuple()

    def purify(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        The defence's first two steps in Eq. 9: degrade and reconstruct; gradients pass through both.

        Takes the arguments of `forward`. In mask mode the visible patches are pasted back into the reconstruction.

        Returns:
            `(B, 3, H, W)`, normalised, clamped to the range of [0, 1] images.
        """
        output = self(pixel_values, sigma=sigma, epsilon=epsilon, generator=generator, noise=noise, return_dict=True)
        images = output.reconstruction
        if output.mask is not None:
            images = torch.where(self._pixel_mask(output.mask).bool(), images, pixel_values)
        return clamp_to_image_range(images, self.config.image_mean, self.config.image_std)

    def _check_arguments(self, sigma, epsilon, noise):
        if self.config.degradation == "noise" and noise is not None:
            raise ValueError(
                '`noise` orders the patches of degradation="mask"; here the degradation is "noise": use `epsilon`'
            )
        if self.config.degradation == "mask" and (sigma is not None or epsilon is not None):
            raise ValueError(
                '`sigma` and `epsilon` belong to degradation="noise"; this model hides patches: use `noise`'
            )

    def _decode(self, latent: torch.Tensor, ids_restore: torch.Tensor | None) -> torch.Tensor:
        if ids_restore is not None:
            return self.decoder(latent, ids_restore).logits
        # Every patch was seen: no mask tokens and nothing to put back in order, so the gathers are passed by.
        hidden_states = self.decoder.decoder_embed(latent) + self.decoder.decoder_pos_embed  # (B, 1 + N, D')
        for layer in self.decoder.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.decoder.decoder_pred(self.decoder.decoder_norm(hidden_states))[:, 1:]

    def _pixel_mask(self, patch_mask: torch.Tensor) -> torch.Tensor:
        """`(B, N)` of patches to `(B, 3, H, W)` of pixels."""
        values = patch_mask[..., None].expand(-1, -1, self.config.patch_size**2 * self.config.num_channels)
        return self.unpatchify(values)


class NIMForImageClassification(NIMPreTrainedModel):
    r"""
    The encoder with a classification head, as MAE fine-tunes it: mean over the patch tokens, `fc_norm`, linear.

    `NIMForImageClassification.from_pretrained(PRE_TRAINED_DIR, num_labels=...)` starts fine-tuning: the encoder is loaded,
    `fc_norm` and the head are fresh.
    """

    config_class = NIMClassifierConfig
    # What a pre-trained model has and a classifier does not.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^vit\.layernorm\."]

    def __init__(self, config: NIMClassifierConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = NIMModel(config)
        self.vit.layernorm = nn.Identity()  # its place is taken by fc_norm, after the pooling
        last = max(config.num_hidden_layers - 1, 1)
        for index, layer in enumerate(self.vit.layers):
            # A layer applies `dropout` to each branch before its residual sum: stochastic depth belongs right there.
            layer.dropout = nn.Sequential(layer.dropout, DropPath(config.drop_path_rate * index / last))
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier._is_classification_head = True
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | tuple:
        r"""
        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            labels: `(B,)` class indices; adds the cross-entropy as `loss`. Soft targets belong in the training loop.
            interpolate_pos_encoding: takes other image sizes, with positions interpolated in two dimensions.

        Returns:
            `ImageClassifierOutput` with `logits` `(B, num_labels)`.
        """
        encoded = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        pooled = encoded.last_hidden_state[:, 1:].mean(dim=1)  # (B, D)
        logits = self.classifier(self.fc_norm(pooled))  # (B, num_labels)
        output = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if return_dict is not False else output.to_tuple()


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of class indices.

    Raises:
        ValueError: the labels are no `(B,)` integers; soft targets would otherwise turn silently into another loss.
    """
    if labels.dtype.is_floating_point or labels.ndim != 1:
        raise ValueError(
            f"labels must be class indices of shape (batch,), got {labels.dtype} of shape {tuple(labels.shape)}: compute "
            "the loss of soft targets from the logits"
        )
    return nn.functional.cross_entropy(logits, labels)
