"""Configurations of the NIM models."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import BeitConfig, PreTrainedConfig, ViTMAEConfig

from .checks_nim import check_degradation, check_patch_embedding, check_sizes, check_tiles
from .loading_nim import LoadedConfigMixin
from .noise_nim import parse_sigma


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

# Encoder and MAE decoder of the paper's ViT-B and of its usual relatives; "tiny" and "small" follow DeiT's widths.
MODEL_SIZES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": patch,
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": decoder_depth,
        "decoder_num_attention_heads": decoder_width // 32,
        "decoder_intermediate_size": 4 * decoder_width,
    }
    for name, width, depth, heads, patch, decoder_width, decoder_depth in [
        ("tiny", 192, 12, 3, 16, 128, 4),
        ("small", 384, 12, 6, 16, 256, 4),
        ("base", 768, 12, 12, 16, 512, 8),
        ("large", 1024, 24, 16, 16, 512, 8),
        ("huge", 1280, 32, 16, 14, 512, 8),
    ]
}

# Fields of a pre-training configuration that mean nothing to a classifier made from it.
_PRETRAINING_ONLY = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "degradation",
    "sigma",
    "norm_pix_loss",
    "patch_statistics",
    "reconstruction_loss",
    "tile_stride",
    "tile_border",
    "tile_window",
    "tile_batch_size",
    "mask_ratio",
    "mask_patch_size",
    "use_mask_token",
)


def _with_encoder_in_auto_map(config_dict: dict[str, Any], encoder: str) -> dict[str, Any]:
    """Lets AutoModel find the encoder of a published pre-training model, for its features."""
    auto_map = config_dict.get("auto_map") or {}
    if "AutoModelForPreTraining" in auto_map:
        config_dict["auto_map"] = {"AutoModel": encoder} | auto_map
    return config_dict


class DegradationMixin:
    """Says whether `degradation` has noise, masks or, with `"noise+mask"`, both."""

    @property
    def adds_noise(self) -> bool:
        """Whether the degradation adds noise (Eq. 3); a draw then holds sigma and epsilon."""
        return "noise" in self.degradation

    @property
    def hides_patches(self) -> bool:
        """Whether the degradation hides patches (Eq. 1); a draw then holds their order."""
        return "mask" in self.degradation and self.mask_ratio > 0


@strict
class NIMConfig(LoadedConfigMixin, DegradationMixin, ViTMAEConfig):
    r"""
    Configuration of [`NIMModel`] and [`NIMForPreTraining`]: ViT-MAE's, with the degradation made a choice.

    Args:
        degradation (`"noise"`, `"mask"` or `"noise+mask"`, *optional*, defaults to `"noise"`):
            `"noise"` is noisy image modeling (Eq. 3-4), `"mask"` is MAE itself (Eq. 1-2), `"noise+mask"` shows the
            encoder a share of the noisy patches and scores all of them (DMAE, Wu et al. 2023: sigma 0.25 * 255).
        mask_ratio (`float`, *optional*, defaults to 0.75):
            Share of patches that is hidden. With `"noise+mask"` it may be 0, also for a model that was trained with
            another: `from_pretrained(DIR, mask_ratio=0)` purifies without masks.
        sigma (`str`, *optional*, defaults to `"gamma(25, 3)"`):
            Scale of the noise on 0..255: a number or a distribution (section 2.4; see `parse_sigma`).
        norm_pix_loss (`bool`, *optional*, defaults to `True`):
            Whether the target is each patch with its own mean and variance removed.
        patch_statistics (`"input"` or `"noisy"`, *optional*, defaults to `"input"`):
            Where the statistics that undo `norm_pix_loss` come from. `"input"` is the authors' code: the un-noised,
            possibly attacked image, so a perturbation of patch means by-passes the noise. `"noisy"` makes the
            reconstruction a function of the noisy image alone, which certification needs.
        patch_embedding (`"linear"` or `"convolutional"`, *optional*, defaults to `"linear"`):
            `"linear"` is ViT's projection of patches that do not overlap. `"convolutional"` is a stem of 3x3
            convolutions of stride 2 (Xiao et al. 2021), which learns faster from few images; its windows overlap, so it
            cannot hide patches.
        reconstruction_loss (`"mse"` or `"l1"`, *optional*, defaults to `"mse"`):
            Mean squared or mean absolute error of the reconstruction.
        tile_stride, tile_border (`int`, *optional*):
            How `purify` covers images larger than `image_size`: distance between tiles of that size, and width of the
            reflected border around the image. None is a half and a quarter of `image_size`.
        tile_window (`"hann"` or `"uniform"`, *optional*, defaults to `"hann"`):
            Weight of a tile's pixels where tiles overlap.
        tile_batch_size (`int`, *optional*, defaults to 64):
            Most tiles that are computed, and with a gradient held in memory, at once.
        image_mean, image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Normalization of `pixel_values`; sigma needs it to become a scale of normalized pixels.
    """

    model_type = "nim"

    layer_norm_eps: float = 1e-6
    norm_pix_loss: bool = True
    degradation: Literal["noise", "mask", "noise+mask"] = "noise"
    mask_ratio: float | int = 0.75
    sigma: str | float | int = "gamma(25, 3)"
    patch_statistics: Literal["input", "noisy"] = "input"
    patch_embedding: Literal["linear", "convolutional"] = "linear"
    reconstruction_loss: Literal["mse", "l1"] = "mse"
    tile_stride: int | None = None
    tile_border: int | None = None
    tile_window: Literal["hann", "uniform"] = "hann"
    tile_batch_size: int = 64
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        parse_sigma(self.sigma)
        check_sizes(self)
        check_degradation(self)
        check_patch_embedding(self)
        check_tiles(self)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Also takes transformers' ViT-MAE configurations, which describe a model that fills masks."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == ViTMAEConfig.model_type:
            config_dict = {"degradation": "mask"} | config_dict | {"model_type": cls.model_type}
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        return _with_encoder_in_auto_map(super().to_dict(), "modeling_nim.NIMModel")


@strict
class NIMClassifierConfig(LoadedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`NIMForImageClassification`]: the encoder's fields of [`NIMConfig`] (`patch_embedding` too), and

    Args:
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last layer, rising linearly from 0 at the first (0.1 for ViT-B in the paper's
            recipe).
        image_mean, image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Normalization of `pixel_values`.
    """

    model_type = "nim_classifier"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    patch_embedding: Literal["linear", "convolutional"] = "linear"
    drop_path_rate: float | int = 0.0
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        check_sizes(self)
        check_patch_embedding(self)
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Also takes the configuration of a pre-trained model, for fine-tuning: its decoder's fields are dropped."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return as_classifier_dict(cls, config_dict, from_types=("nim", ViTMAEConfig.model_type)), kwargs


def as_classifier_dict(
    cls: type[PreTrainedConfig], config_dict: dict[str, Any], from_types: tuple[str, ...]
) -> dict[str, Any]:
    """The classifier's share of a pre-trained model's configuration; any other configuration is returned as it is."""
    if config_dict.get("model_type") not in from_types:
        return config_dict
    dropped = (*_PRETRAINING_ONLY, "architectures", "auto_map", "custom_pipelines")
    return {key: value for key, value in config_dict.items() if key not in dropped} | {"model_type": cls.model_type}


# Fields in which SimMIM's ViT differs from BEiT's defaults; its weights depend on them, so a user cannot choose them.
_SIMMIM_PRETRAINING = {
    "use_absolute_position_embeddings": False,
    "use_shared_relative_position_bias": True,
    "use_relative_position_bias": False,
    "use_mean_pooling": False,
    "use_mask_token": True,
}
_SIMMIM_CLASSIFIER = {
    "use_absolute_position_embeddings": False,
    "use_shared_relative_position_bias": False,
    "use_relative_position_bias": True,
    "use_mean_pooling": True,
    "use_mask_token": False,
}


def _fix_simmim_fields(config: BeitConfig, fields: dict[str, bool], kwargs: dict[str, Any]) -> None:
    check_sizes(config)
    for name, value in fields.items():
        setattr(config, name, value)
    for name in [name for name in kwargs if name.startswith("decoder_")]:
        del kwargs[name]  # MODEL_SIZES also sizes MAE's decoder; SimMIM's is one linear layer


@strict
class NIMSimMIMConfig(LoadedConfigMixin, DegradationMixin, BeitConfig):
    r"""
    Configuration of [`NIMSimMIMForPreTraining`]: SimMIM's ViT on BEiT's, and the degradation made a choice. One table
    of relative positions is shared by all layers, there are no absolute positions, and the keys have no bias.

    Args:
        degradation (`"noise"` or `"mask"`, *optional*, defaults to `"noise"`):
            `"noise"` is NIM-SimMIM (Eq. 3-4, L1 over all pixels), `"mask"` is SimMIM itself (L1 over masked pixels).
        sigma (`str`, *optional*, defaults to `"gamma(25, 3)"`):
            Scale of the noise on 0..255: a number or a distribution (section 2.4; see `parse_sigma`).
        mask_ratio (`float`, *optional*, defaults to 0.6):
            Share of the image that is masked; the number of masked squares is rounded up.
        mask_patch_size (`int`, *optional*, defaults to 32):
            Side, in pixels, of the squares that are masked whole.
        reconstruction_loss (`"mse"` or `"l1"`, *optional*, defaults to `"l1"`):
            Mean squared or mean absolute error of the reconstruction.
        tile_stride, tile_border (`int`, *optional*):
            How `purify` covers images larger than `image_size`: distance between tiles of that size, and width of the
            reflected border around the image. None is a half and a quarter of `image_size`.
        tile_window (`"hann"` or `"uniform"`, *optional*, defaults to `"hann"`):
            Weight of a tile's pixels where tiles overlap.
        tile_batch_size (`int`, *optional*, defaults to 64):
            Most tiles that are computed, and with a gradient held in memory, at once.
        image_mean, image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Normalization of `pixel_values`; sigma needs it to become a scale of normalized pixels.
    """

    model_type = "nim_simmim"

    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16
    degradation: Literal["noise", "mask"] = "noise"
    sigma: str | float | int = "gamma(25, 3)"
    mask_ratio: float = 0.6
    mask_patch_size: int = 32
    reconstruction_loss: Literal["mse", "l1"] = "l1"
    tile_stride: int | None = None
    tile_border: int | None = None
    tile_window: Literal["hann", "uniform"] = "hann"
    tile_batch_size: int = 64
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        parse_sigma(self.sigma)
        _fix_simmim_fields(self, _SIMMIM_PRETRAINING, kwargs)
        check_tiles(self)
        if self.degradation == "mask":
            if self.image_size % self.mask_patch_size or self.mask_patch_size % self.patch_size:
                raise ValueError(
                    f"mask_patch_size {self.mask_patch_size} must divide image_size {self.image_size} and be a "
                    f"multiple of patch_size {self.patch_size}"
                )
            if not 0 < self.mask_ratio < 1:
                raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
            num_squares = (self.image_size // self.mask_patch_size) ** 2
            if math.ceil(self.mask_ratio * num_squares) == num_squares:
                raise ValueError(
                    f"mask_ratio {self.mask_ratio} hides all of the {num_squares} squares of mask_patch_size "
                    f"{self.mask_patch_size} in a {self.image_size}x{self.image_size} image: use smaller squares"
                )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        return _with_encoder_in_auto_map(super().to_dict(), "modeling_nim_simmim.NIMSimMIMModel")


@strict
class NIMSimMIMClassifierConfig(LoadedConfigMixin, BeitConfig):
    r"""
    Configuration of [`NIMSimMIMForImageClassification`]: as [`NIMSimMIMConfig`], with a table of relative positions in
    every layer and mean pooling; `drop_path_rate` (defaults to 0.1) is stochastic depth as in BEiT.

    Args:
        image_mean, image_std (`list[float]`, *optional*, defaults to ImageNet's):
            Normalization of `pixel_values`.
    """

    model_type = "nim_simmim_classifier"

    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        _fix_simmim_fields(self, _SIMMIM_CLASSIFIER, kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Also takes the configuration of a pre-trained model, to start fine-tuning."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return as_classifier_dict(cls, config_dict, from_types=("nim_simmim",)), kwargs
