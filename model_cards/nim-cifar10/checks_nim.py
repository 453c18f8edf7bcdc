"""What the fields of a configuration must fulfill together, so that no model is built that nothing fits."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


def check_sizes(config: PreTrainedConfig) -> None:
    """That patches tile the image, that heads share the width, and that mean and standard deviation fit each other."""
    image_size, patch_size = config.image_size, config.patch_size
    sides = isinstance(image_size, int) and isinstance(patch_size, int) and min(image_size, patch_size) > 0
    if not sides or image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} and patch_size {patch_size}: both must be one number, and the image a multiple "
            "of the patch"
        )
    for prefix in ("", "decoder_"):
        width, heads = (getattr(config, prefix + name, 1) for name in ("hidden_size", "num_attention_heads"))
        if min(width, heads) < 1 or width % heads:
            raise ValueError(
                f"{prefix}hidden_size {width} must be a multiple of {prefix}num_attention_heads {heads}, both above 0"
            )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; use one of {', '.join(ACT2FN)}")
    if len(config.image_mean) != len(config.image_std) or min(config.image_std) <= 0:
        raise ValueError(
            f"image_mean {list(config.image_mean)} and image_std {list(config.image_std)}: give one number for each "
            "channel, standard deviations above 0"
        )


def check_patch_embedding(config: PreTrainedConfig) -> None:
    """That halving the image step by step reaches one pixel for a patch, and doubling the width the model's width."""
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
    """That tiles cover every image of at least their own size, and that its reflected border is narrower than it."""
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
    """That the fields of NIM-MAE which speak of masks and noise agree with its degradation."""
    with_masks = "mask" in config.degradation
    without_masks = config.adds_noise and config.mask_ratio == 0  # masks alone would leave nothing to score
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
