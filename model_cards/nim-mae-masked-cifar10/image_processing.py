"""The image processor that is saved beside every model, and the one conversion of image files to 8-bit RGB."""

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .checks_nim import MAX_SIDE_PIXELS


BICUBIC = 3
CHANNELS = "RGB"  # Pillow's mode of every image that is read; "RGBA" would keep alpha as a fourth channel

# Fewer pixels than this on a side hold nothing to reconstruct or to recognize (tracking pixels, broken downloads).
MIN_SIDE_PIXELS = 8


def check_image_size(height: int, width: int) -> None:
    """Raises ValueError for an image with too few pixels to show anything, or with so many that memory runs out."""
    if min(height, width) < MIN_SIDE_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels, fewer than {MIN_SIDE_PIXELS} on a side")
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):  # the limit at which Pillow itself gives up
        raise ValueError(f"it has {width}x{height} pixels, more than {2 * Image.MAX_IMAGE_PIXELS}")


def rgb_image(image: Image.Image) -> Image.Image:
    """The upright RGB image with 8 bits a channel: for training, evaluation and the pipeline alike.

    EXIF rotations are applied. 16-bit gray levels are scaled from 0..65535, float levels from 0..1; Pillow alone would
    clip both at 255, so that almost everything became white or black. Alpha is dropped, an animation gives its first
    picture.

    Raises ValueError when the levels have no meaning (NaN, floats outside 0..1, 32-bit integers) or `check_image_size`
    refuses the size, and whatever Pillow raises for a damaged file.
    """
    check_image_size(image.height, image.width)
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image.load()
    with suppress(Exception):  # Pillow raises many types for damaged EXIF; the pixels are intact
        image = ImageOps.exif_transpose(image)
    if is_16_bit:
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert(CHANNELS)
    if image.mode == "I":
        raise ValueError("its levels are 32-bit integers, whose white is unknown; store 8 or 16 bits a channel")
    if image.mode == "F":
        levels = np.asarray(image)
        if not ((levels >= 0) & (levels <= 1)).all():  # NaN fails, too
            where = "NaN or infinite" if not np.isfinite(levels).all() else f"{levels.min():g} to {levels.max():g}"
            raise ValueError(f"its float levels must be in 0..1, got {where}; store 8 bits a channel")
        return Image.fromarray(np.rint(levels * 255).astype(np.uint8)).convert(CHANNELS)
    return image.convert(CHANNELS)


def image_processor_for(config: PreTrainedConfig) -> ViTImageProcessorPil:
    """The processor that turns PIL images into the `pixel_values` of a model with this configuration.

    From 64 pixels on it is ImageNet's evaluation transform: shortest edge to size * 256 / 224 (bicubic), center crop.
    Smaller models see the whole image, resized to a square. A purifier with a `tile_stride` of its own takes
    photographs in tiles, and they keep their size. A defense resizes and crops as its classifier's own processor does,
    where that is known (`image_geometry`). Mean and standard deviation are the configuration's.
    """
    size = config.image_size
    in_tiles = getattr(config, "tile_stride", None) is not None
    crop = size >= 64 and not in_tiles
    geometry = getattr(config, "image_geometry", None)
    if not isinstance(geometry, dict):
        geometry = {
            "size": {"shortest_edge": round(size * 256 / 224)} if crop else {"height": size, "width": size},
            "resample": BICUBIC,
            "do_center_crop": crop,
            "crop_size": {"height": size, "width": size} if crop else None,
        }
    return ViTImageProcessorPil(
        do_convert_rgb=CHANNELS == "RGB",
        do_resize=not in_tiles,
        **geometry,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )


@dataclass(frozen=True)
class ImageSettings:
    """What a classifier expects of its images: side in pixels, mean and standard deviation of [0, 1] images, and how
    its processor resizes and crops to that side; None for each that is not known."""

    size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    geometry: dict[str, Any] | None = None


def image_settings_of(config: PreTrainedConfig) -> ImageSettings:
    """What a classifier's configuration, and the image processor saved with it, tell of its images.

    The configuration comes first. A processor is asked what it does to a black and to a white picture, so that every
    factor and offset counts, whatever its fields are called.
    """
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0] if len(set(size)) == 1 else None
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    processor = None
    if config.name_or_path:
        with suppress(Exception):  # weights without a processor, or one that is remote code or damaged
            processor = AutoImageProcessor.from_pretrained(config.name_or_path)
    if processor is None:
        return ImageSettings(size, mean, std)
    levels = [
        np.asarray(processor(Image.new(CHANNELS, sides, color), return_tensors="np")["pixel_values"][0], np.float64)
        for color, sides in (("black", (640, 480)), ("white", (480, 400)))
    ]  # (3, H, W) each
    black, white = (level.mean(axis=(1, 2)) for level in levels)
    if size is None:
        edges = {min(level.shape[1:]) for level in levels}  # of a processor that does not crop, the shortest edge
        size = edges.pop() if len(edges) == 1 else None  # two: images keep their own size
    if mean is None or std is None:
        # (x - mean) / std at x = 0 and x = 1
        # six digits, since the processor works in float32; + 0.0 turns -0.0 into 0.0
        mean, std = (
            [float(f"{value:.6g}") + 0.0 for value in values]
            for values in (-black / (white - black), 1 / (white - black))
        )
    return ImageSettings(size, mean, std, None if size is None else _geometry(processor, size))


def _geometry(processor: Any, side: int) -> dict[str, Any] | None:
    """The processor's resizing and cropping in a ViT processor's words; None where they do not end in that square."""
    if not getattr(processor, "do_resize", False):
        return None
    size, square = processor.size, {"height": side, "width": side}
    crop, shortest_edge = getattr(processor, "crop_size", None), size.get("shortest_edge")
    crops = bool(getattr(processor, "do_center_crop", False) and crop)
    cropped_to = (crop["height"], crop["width"]) if crops else (shortest_edge, shortest_edge)
    crop_share = getattr(processor, "crop_pct", None)
    geometry = {"resample": int(processor.resample), "do_center_crop": False, "crop_size": None}
    if not crops and (size.get("height"), size.get("width")) == (side, side):
        return geometry | {"size": square}
    if shortest_edge is None or cropped_to != (side, side):
        return None
    if crop_share and shortest_edge >= 384:  # ConvNeXt's processor squeezes large images into the square
        return geometry | {"size": square}
    if crop_share:
        shortest_edge = int(shortest_edge / crop_share)
    return geometry | {"size": {"shortest_edge": shortest_edge}, "do_center_crop": True, "crop_size": square}


def check_processor_fields(processor: Any) -> None:
    """Raises ValueError for sizes that no image has, or that take all memory, and numbers that make no pixel values.

    A field that the image processor has not is not asked for.
    """
    fields = getattr(processor, "__dict__", {})
    for name in ("size", "crop_size"):
        if (size := fields.get(name)) is None:
            continue
        try:
            size = {key: side for key, side in dict(size).items() if not key.endswith("_pixels")}
            sides = list(size.values())
        except (TypeError, ValueError):  # no mapping
            sides = [size]
        if not all(side is None or (type(side) is int and 1 <= side <= MAX_SIDE_PIXELS) for side in sides):
            raise ValueError(
                f"the image processor: {name} must be whole numbers of pixels from 1 to {MAX_SIDE_PIXELS}, got {size}; "
                "write it again with image_processor_for(model.config).save_pretrained(DIRECTORY)"
            )
    for name, lowest in (("image_mean", -math.inf), ("image_std", 0), ("rescale_factor", 0)):
        numbers = fields.get(name)
        numbers = numbers if isinstance(numbers, (list, tuple)) else [] if numbers is None else [numbers]
        if not all(
            isinstance(number, (int, float)) and math.isfinite(number) and number > lowest for number in numbers
        ):
            raise ValueError(
                f"the image processor: {name} must be finite numbers{' above 0' if lowest == 0 else ''}, "
                f"got {fields[name]!r}"
            )


def check_processor_file(folder: str | os.PathLike | None) -> None:
    """ValueError where a model directory's preprocessor_config.json is damaged: transformers names it not."""
    path = os.path.join(folder or "", "preprocessor_config.json")
    if folder is None or not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} is no JSON ({error}); make or download it again, or delete it") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("image_processor_type", ""), str):
        raise ValueError(
            f"{path!r} must be a mapping with a text image_processor_type, got {str(fields)[:100]}; make or download "
            "it again, or delete it"
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
