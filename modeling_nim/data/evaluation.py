"""Images for evaluation and attacks, prepared by the model's own image processor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .base import ImageSource
from .decode import BadImageError
from .loader import ignore_stop_signals


BAD_IMAGE_LABEL = -1
LEAVE_OUT_NONE = (
    "attacks and certificates leave out no image, with data.on_bad_image=skip either: take it away, or mend it"
)


def evaluation_batch(source: ImageSource, indices: Sequence[int], processor) -> torch.Tensor:
    """The images `indices` in [0, 1], (B, 3, H, W) float32.

    `processor` is the image processor saved with the model; everything it does is done, except the normalization (the
    attacks move in [0, 1], the model normalizes inside). Raises `BadImageError` naming an image that cannot be read.
    """
    try:
        images = [source[int(index)][0] for index in indices]
    except BadImageError as error:
        raise BadImageError(f"{error}; {LEAVE_OUT_NONE}") from None
    return processor(images=images, do_normalize=False, return_tensors="pt")["pixel_values"].float()


class EvaluationImages(Dataset):
    """Items of `images_01` (3, H, W), `labels`, `indices` and `bad_images`.

    The last is "" or says why an image cannot be read; such an image is black and has the label `BAD_IMAGE_LABEL`.
    An error that a loader's worker raises would print a long traceback.
    """

    def __init__(self, source: ImageSource, processor):
        self.source, self.processor = source, processor

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image, label = self.source[index]
        except BadImageError as error:
            side = (self.processor.crop_size or self.processor.size)["height"]
            item = {"images_01": torch.zeros(3, side, side), "labels": BAD_IMAGE_LABEL}
            return item | {"indices": index, "bad_images": str(error)}
        images_01 = self.processor(images=image, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return {"images_01": images_01.float(), "labels": label, "indices": index, "bad_images": ""}


def evaluation_loader(images: EvaluationImages, batch_size: int, num_workers: int) -> DataLoader:
    """Loads every image once, in order; its workers do not change the global random state."""
    settings = {"generator": torch.Generator(), "worker_init_fn": ignore_stop_signals}
    return DataLoader(images, batch_size, num_workers=num_workers, **settings)
