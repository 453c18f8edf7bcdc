"""The image processor that is saved beside every model, and the one conversion of image files to 8-bit RGB."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers import PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


BICUBIC = 3

# Fewer pixels than this on a side hold nothing to reconstruct or to recognize (tracking pixels, broken downloads).
MIN_SIDE_PIXELS = 8


def check_image_size(height: int, width: int) -> None:
    """Raises ValueError for an image with too few pixels to mean anything, or so many that it is an attack on memory."""
    if min(height, width) < MIN_SIDE_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels, fewer than {MIN_SIDE_PIXELS} on a side")
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):  # the limit at which Pillow itself gives up
        raise ValueError(f"it has {width}x{height} pixels, more than {2 * Image.MAX_IMAGE_PIXELS}")


def rgb_image(image: Image.Image) -> Image.Image:
    """The upright RGB image with 8 bits a channel: for training, evaluation and the pipeline alike.

    EXIF rotations are applied. 16-bit grey levels are scaled from 0..65535, float levels from 0..1; Pillow alone would clip
    both at 255, so that almost everything became white or black. Alpha is dropped, an animation gives its first picture.

    Raises ValueError when the levels have no meaning (NaN, floats outside 0..1, 32-bit integers) or the size is senseless,
    and whatever Pillow raises for a damaged file.
    """
    check_image_size(image.height, image.width)
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image.load()
    with suppress(Exception):  # Pillow raises many things for damaged EXIF, and the picture itself is sound
        image = ImageOps.exif_transpose(image)
    if is_16_bit:
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise ValueError("its levels are 32-bit integers, whose white is unknown; store 8 or 16 bits a channel")
    if image.mode == "F":
        levels = np.asarray(image)
        if not ((levels >= 0) & (levels <= 1)).all():  # NaN is in no range
            where = "NaN or infinite" if not np.isfinite(levels).all() else f"{levels.min():g} to {levels.max():g}"
            raise ValueError(f"its float levels must be in 0..1, got {where}; store 8 bits a channel")
        return Image.fromarray(np.rint(levels * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def image_processor_for(config: PreTrainedConfig) -> ViTImageProcessorPil:
    """The processor that turns PIL images into the `pixel_values` of a model with this configuration.

    From 64 pixels on it is ImageNet's evaluation transform: shortest edge to size * 256 / 224 (bicubic), centre crop.
    Smaller models see the whole image, resized to a square. Mean and standard deviation are the configuration's.
    """
    size = config.image_size
    crop = size >= 64
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": round(size * 256 / 224)} if crop else {"height": size, "width": size},
        resample=BICUBIC,
        do_center_crop=crop,
        crop_size={"height": size, "width": size} if crop else None,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )


class ImageProcessorMixin:
    """Makes `save_pretrained` and `push_to_hub` of a model write its image processor too, unless the folder has one."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """As transformers', and always under this package's key names, whatever names the weights were loaded from."""
        kwargs.setdefault("save_original_format", False)
        folder = Path(save_directory)
        # First the processor: the parent may upload the folder before it returns.
        if is_main_process and not (folder / "preprocessor_config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            image_processor_for(self.config).save_pretrained(folder)
        return super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
