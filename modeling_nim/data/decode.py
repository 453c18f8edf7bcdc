"""From encoded bytes to pixels: one careful path for evaluation, one fast path for training.

Both apply the EXIF rotation and give RGB whatever the file holds (grey, palette, CMYK, alpha). A file that cannot be
decoded raises `BadImageError`; who reads the data decides whether that stops the run or skips the image.
"""

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Fewer pixels than this on a side hold nothing to reconstruct or to recognise (tracking pixels, broken downloads).
MIN_SIDE_PIXELS = 8

cv2.setNumThreads(0)  # the data loader's workers are the parallelism


class BadImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def decode_rgb(encoded: bytes, image_id: str) -> Image.Image:
    """Decode with Pillow, rotate as EXIF says, convert to RGB: what `pipeline(...)` does with a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF is not a damaged image; decompression bombs still raise
            image = Image.open(io.BytesIO(encoded))
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the file makes them trip over
        what = "empty file" if not encoded else f"{type(error).__name__}: {error}"
        raise BadImageError(f"cannot read image {image_id!r} ({len(encoded)} bytes): {what}") from None
    if min(image.size) < MIN_SIDE_PIXELS:
        raise BadImageError(f"image {image_id!r} has {image.width}x{image.height} pixels, fewer than {MIN_SIDE_PIXELS}")
    return image


def to_uint8_array(pixels: bytes | np.ndarray, image_id: str) -> np.ndarray:
    """A whole image, (H, W, 3) uint8: pixels pass through, encoded bytes are decoded as for evaluation."""
    if isinstance(pixels, np.ndarray):
        return pixels
    return np.asarray(decode_rgb(pixels, image_id))
