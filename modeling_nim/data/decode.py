"""From encoded bytes to pixels: one careful path for evaluation, one fast path for training.

Both apply the EXIF rotation and give RGB whatever the file holds (gray, palette, CMYK, alpha). A file that cannot be
decoded raises `BadImageError`; the caller decides whether that stops the run or skips the image.
"""

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ..image_processing import CHANNELS, check_image_size, rgb_image


EXIF_ORIENTATION_TAG = 0x0112
ORIENTATION_MARKERS = (b"Exif\x00\x00", b"tiff:Orientation")  # the latter in XMP, which Pillow reads as well

cv2.setNumThreads(0)  # the data loader's workers are the parallelism


class BadImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def decode_rgb(encoded: bytes, image_id: str) -> Image.Image:
    """Decode with Pillow and convert as `rgb_image` says: what `pipeline(...)` does with a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pixels with damaged EXIF may be intact; decompression bombs still raise
            return rgb_image(Image.open(io.BytesIO(encoded)))
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its message holds an address that changes
            what = "not an image" if encoded else "empty file"
        raise BadImageError(f"cannot read image {image_id!r} ({len(encoded)} bytes): {what}") from None


def decode_window(encoded: bytes, image_id: str, window, size: int) -> np.ndarray:
    """Decode a window of an image and resize it to `(size, size, 3)` uint8, at no more resolution than that needs.

    `window(height, width)` gives top, left, height and width of the window in the upright image. A JPEG is decoded at a
    half, a quarter or an eighth where that still covers the result (libjpeg's other scales are slower than full size);
    everything else goes through Pillow.
    """
    if not encoded.startswith(b"\xff\xd8"):
        return resize_window(np.asarray(decode_rgb(encoded, image_id)), window, size)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        if colorspace in ("CMYK", "YCCK"):
            raise ValueError("CMYK is left to Pillow")
        check_image_size(height, width)
        orientation = _exif_orientation(encoded)
        upright_height, upright_width = (width, height) if orientation >= 5 else (height, width)
        top, left, window_height, window_width = window(upright_height, upright_width)
        shrink = min(window_height, window_width) // size
        factor = 8 if shrink >= 8 else 4 if shrink >= 4 else 2 if shrink >= 2 else 1
        least = {"min_height": height // factor, "min_width": width // factor} if factor > 1 else {}
        pixels = simplejpeg.decode_jpeg(encoded, colorspace=CHANNELS, fastdct=True, **least)
    except ValueError:  # libjpeg failed: Pillow decides whether the image is damaged
        return resize_window(np.asarray(decode_rgb(encoded, image_id)), window, size)
    pixels = _upright(pixels, orientation)
    scale_y, scale_x = pixels.shape[0] / upright_height, pixels.shape[1] / upright_width
    y0, x0 = round(top * scale_y), round(left * scale_x)
    y1 = max(y0 + 1, round((top + window_height) * scale_y))
    x1 = max(x0 + 1, round((left + window_width) * scale_x))
    return _resize(pixels[y0:y1, x0:x1], size)


def resize_window(pixels: np.ndarray, window, size: int) -> np.ndarray:
    """The same for an image that is already decoded, `(H, W, 3)` uint8."""
    top, left, height, width = window(*pixels.shape[:2])
    return _resize(pixels[top : top + height, left : left + width], size)


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(pixels)
    shrink = min(height, width) / size
    # bicubic to enlarge; to shrink, bilinear while its two taps reach every pixel, then averaging: both anti-aliased
    how = cv2.INTER_CUBIC if shrink < 1 else cv2.INTER_LINEAR if max(height, width) <= 2 * size else cv2.INTER_AREA
    return cv2.resize(pixels, (size, size), interpolation=how)


def _exif_orientation(encoded: bytes) -> int:
    """1..8 as the EXIF standard counts them; 1 is upright."""
    if not any(marker in encoded for marker in ORIENTATION_MARKERS):
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            orientation = Image.open(io.BytesIO(encoded)).getexif().get(EXIF_ORIENTATION_TAG, 1)
        except Exception:  # Pillow raises many types for damaged EXIF; the pixels may be intact
            return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:  # stored with rows and columns exchanged
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels if orientation == 1 else np.ascontiguousarray(pixels)
