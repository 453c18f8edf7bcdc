"""Checks of a configuration's fields against one another, before a model is built from them."""

import math
from collections.abc import Sequence

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


MAX_SIDE_PIXELS = 16_384  # of images; a wrong size above it would take all memory before anything fails
MAX_LAYERS = 1_000

# Rules for numbers of a model: one that breaks its rule gives a model that fails later or computes wrong values.
_RULES = (
    (("intermediate_size", "decoder_intermediate_size", "num_channels"), "at least 1", lambda value: value >= 1),
    (("num_hidden_layers",), f"at least 1 and at most {MAX_LAYERS}", lambda value: 1 <= value <= MAX_LAYERS),
    (("decoder_num_hidden_layers",), f"at least 0 and at most {MAX_LAYERS}", lambda value: 0 <= value <= MAX_LAYERS),
    (("layer_norm_eps",), "above 0", lambda value: 0 < value < math.inf),
    (("initializer_range",), "at least 0 and finite", lambda value: 0 <= value < math.inf),
    (("hidden_dropout_prob", "attention_probs_dropout_prob"), "in 0..1", lambda value: 0 <= value <= 1),
)


def check_sizes(config: PreTrainedConfig) -> None:
    """Checks that patches tile the image, that heads divide the width, that mean and standard deviation fit each other,
    and that every number keeps its rule."""
    for names, words, holds in _RULES:
        for name in names:
            if not holds(value := getattr(config, name, 1)):
                raise ValueError(f"{name} must be {words}, got {value}")
    image_size, patch_size = config.image_size, config.patch_size
    sides = isinstance(image_size, int) and isinstance(patch_size, int) and min(image_size, patch_size) > 0
    if not sides or image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} and patch_size {patch_size}: both must be one number, and the image a multiple "
            "of the patch"
        )
    if image_size > MAX_SIDE_PIXELS:
        raise ValueError(
            f"image_size must be at most {MAX_SIDE_PIXELS} pixels, got {image_size}; a purifier takes larger images in "
            "tiles of its own size"
        )
    for prefix in ("", "decoder_"):
        width, heads = (getattr(config, prefix + name, 1) for name in ("hidden_size", "num_attention_heads"))
        if min(width, heads) < 1 or width % heads:
            raise ValueError(
                f"{prefix}hidden_size {width} must be a multiple of {prefix}num_attention_heads {heads}, both above 0"
            )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; use one of {', '.join(ACT2FN)}")
    check_normalization("image_", config.image_mean, config.image_std)


def check_normalization(prefix: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Checks that the fields `prefix`mean and `prefix`std have equally many numbers, those of std above 0."""
    if not all(map(math.isfinite, (*mean, *std))) or len(mean) != len(std) or min(std, default=0) <= 0:
        raise ValueError(
            f"{prefix}mean {list(mean)} and {prefix}std {list(std)}: give one number for each channel, standard "
            "deviations above 0"
        )


def check_patch_embedding(config: PreTrainedConfig) -> None:
    """Checks that steps of stride 2 turn a patch into one pixel, and that doublings end at the model's width."""
    if config.patch_embedding == "linear":
        return
    steps = config.patch_size.bit_length() - 1
    if config.patch_size != 1 << steps or steps < 1 or config.hidden_size % (1 << (steps - 1)):
        raise ValueError(
            f'patch_embedding="convolutional" halves the image {steps} times and doubles the width from step to step: '
            f"patch_size {config.patch_size} must be a power of two above 1, and hidden_size {config.hidden_size} a "
            f"multiple of {1 << max(steps - 1, 0)}"
        )


def check_tiles(config: PreTrainedConfig) -> None:
    """Checks that tiles cover every image of at least their size, and that the border is narrower than the image."""
    size = config.image_size
    stride = size // 2 if config.tile_stride is None else config.tile_stride
    border = size // 4 if config.tile_border is None else config.tile_border
    # The border at the right is up to stride - 1 pixels wider; an image of one tile can reflect size - 1 of its own.
    if stride < 1 or border < 0 or stride + border > size:
        raise ValueError(
            f"tile_stride {config.tile_stride} must be above 0, tile_border {config.tile_border} not below 0, and "
            f"their sum at most image_size {size}"
        )
    if config.tile_batch_size < 1:
        raise ValueError(f"tile_batch_size must be at least 1, got {config.tile_batch_size}")


def check_degradation(config: PreTrainedConfig) -> None:
    """Checks that the mask and noise fields of NIM-MAE agree with its degradation."""
    with_masks = "mask" in config.degradation
    without_masks = config.adds_noise and config.mask_ratio == 0  # else the loss needs hidden patches
    if with_masks and not without_masks and not 0 < config.mask_ratio < 1:
        raise ValueError(f"mask_ratio must be between 0 and 1{', or 0' * config.adds_noise}, got {config.mask_ratio}")
    if config.hides_patches and config.norm_pix_loss and config.patch_statistics == "noisy":
        raise ValueError(
            f'patch_statistics="noisy" has no meaning with degradation="{config.degradation}" and norm_pix_loss=True: '
            'a hidden patch has no statistics of its own. Use patch_statistics="input" or norm_pix_loss=False'
        )
    if with_masks and config.patch_embedding == "convolutional":
        raise ValueError(
            f'patch_embedding="convolutional" has no meaning with degradation="{config.degradation}": its windows '
            'overlap, so that visible patches would show hidden pixels. Use patch_embedding="linear"'
        )
