"""Images as evaluation and attacks meet them: exactly what the model's own image processor makes of them."""

from collections.abc import Sequence

import torch

from .sources import ImageSource


def evaluation_batch(source: ImageSource, indices: Sequence[int], processor) -> torch.Tensor:
    """The images `indices` in [0, 1], (B, 3, H, W) float32.

    `processor` is the image processor saved with the model; everything it does is done, except the normalisation (the
    attacks move in [0, 1], the model normalises inside). Raises `BadImageError` naming an image that cannot be read.
    """
    images = [source[int(index)][0] for index in indices]
    return processor(images=images, do_normalize=False, return_tensors="pt")["pixel_values"].float()
