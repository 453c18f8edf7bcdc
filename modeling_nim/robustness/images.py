"""The images of an evaluation: of a source, as each model's own processor makes them, or tensors of the caller."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..data import BadImageError, ImageSource, evaluation_batch
from ..data.evaluation import LEAVE_OUT_NONE
from ..image_processing import check_processor_fields, rgb_image
from .draws import evaluation_order


Batch = tuple[torch.Tensor, torch.Tensor, list[str]]  # images_01 (B, 3, H, W), labels (B,), image ids


class SourceImages:
    """The images of a source in the order of evaluation, prepared by one processor per target."""

    def __init__(self, source: ImageSource, processors: Sequence[Any], device: torch.device | str):
        if source.bad_images:  # left out when the source was opened
            raise BadImageError(f"{source.bad_images[0]}; {LEAVE_OUT_NONE}")
        self.source, self.processors, self.device = source, list(processors), device
        for processor in self.processors:
            if not callable(processor):
                raise ValueError(f"processor must be an image processor, got {type(processor).__name__}")
            check_processor_fields(processor)
        self.order = evaluation_order([source.image_id(index) for index in range(len(source))])
        self.class_names, self.fingerprint = list(source.class_names), source.fingerprint
        # an image without a known class count may belong to a model that knows more
        self.classes_are_counted = source.classes_are_counted

    def __len__(self) -> int:
        return len(self.order)

    def image_ids(self, positions: range) -> list[str]:
        """Ids of the images at these places of the order of evaluation."""
        return [self.source.image_id(self.order[position]) for position in positions]

    def labels_at(self, positions: range) -> list[int]:
        """Their labels, which are known without the images."""
        return [self.source.label(self.order[position]) for position in positions]

    def batch(self, target: int, positions: range) -> Batch:
        """Those images as the processor of a target makes them, `(B, 3, H, W)` in [0, 1], with labels and ids."""
        indices = [self.order[position] for position in positions]
        images_01 = evaluation_batch(self.source, indices, self.processors[target]).to(self.device)  # (B, 3, H, W)
        return images_01, torch.tensor(self.labels_at(positions), device=self.device), self.image_ids(positions)


class RowsSource(ImageSource):
    """A split of `datasets` whose rows hold a decoded image and a label."""

    def __init__(self, rows: Any, image_column: str | None = None, label_column: str | None = None):
        names = rows.column_names
        self.image_column = image_column or next((name for name in ("image", "img") if name in names), None)
        self.label_column = label_column or next((name for name in ("label", "labels") if name in names), None)
        if self.image_column is None or self.label_column is None:
            raise ValueError(f"the data have the columns {names}: rename them to 'image' and 'label'")
        if not len(rows):
            raise ValueError("the data hold no image")
        labels = list(rows[self.label_column])
        wrong = next((label for label in labels if not isinstance(label, int)), 0)
        if not isinstance(wrong, int):
            raise ValueError(f"column {self.label_column!r} must hold class indices, got {wrong!r}")
        self.rows, self.labels = rows, list(map(int, labels))
        known = getattr(rows.features[self.label_column], "names", None)
        check_labels(torch.tensor(self.labels), len(rows), None if known is None else len(known))
        self.classes_are_counted = known is None
        self.class_names = list(known or map(str, range(max(self.labels) + 1)))
        self.fingerprint = f"datasets:{len(rows)}:{rows._fingerprint}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return rgb_image(self.rows[int(index)][self.image_column]), self.labels[index]
        except Exception as error:  # Pillow's decoders raise many types for damaged files
            raise BadImageError(
                f"cannot read image {self.image_id(index)!r}: {type(error).__name__}: {error}"
            ) from None

    def stored(self, index: int) -> tuple[Any, int]:
        return self.rows[int(index)][self.image_column], self.labels[index]

    def image_id(self, index: int) -> str:
        return f"{index:08d}"


class TensorImages:
    """Images `(N, C, H, W)` in [0, 1] with labels `(N,)`; `image_ids` name their noise draws.

    Raises ValueError naming what is wrong: pixels outside of [0, 1], another number of labels or ids, ids that are not
    unique, labels that are no class.
    """

    def __init__(
        self,
        images_01: torch.Tensor,
        labels: torch.Tensor | Sequence[int],
        image_ids: Sequence[str] | None = None,
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
    ):
        try:
            self.labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):  # torch's own errors name no argument
            raise ValueError(f"labels must be class indices, got {type(labels).__name__}") from None
        self.images_01, self.device = check_images(images_01), device
        number = len(images_01)
        check_labels(self.labels, number, num_classes)
        self.ids = [f"{index:08d}" for index in range(number)] if image_ids is None else list(image_ids)
        if len(self.ids) != number:
            raise ValueError(f"image_ids names {len(self.ids)} images, there are {number}: give one id per image")
        if len(set(self.ids)) < number:
            repeated = next(name for name in self.ids if self.ids.count(name) > 1)
            raise ValueError(f"image_ids names {repeated!r} more than once: its images would share their noise draws")
        self.order = evaluation_order(self.ids)
        classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.class_names, self.classes_are_counted = [str(label) for label in range(classes)], num_classes is None

    @property
    def fingerprint(self) -> str:
        """Hash of pixels, ids and labels, which records keep to name their images."""
        digest = hashlib.sha256(self.images_01.cpu().contiguous().numpy().tobytes())
        digest.update(repr((self.ids, self.labels.tolist())).encode())
        return f"tensors:{len(self)}:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.ids)

    def image_ids(self, positions: range) -> list[str]:
        return [self.ids[self.order[position]] for position in positions]

    def labels_at(self, positions: range) -> list[int]:
        return [int(self.labels[self.order[position]]) for position in positions]

    def batch(self, target: int, positions: range) -> Batch:
        indices = [self.order[position] for position in positions]
        images_01 = self.images_01[indices].to(self.device)
        return images_01, self.labels[indices].to(self.device), self.image_ids(positions)


def check_images(images_01: torch.Tensor) -> torch.Tensor:
    """Float images of four dimensions in [0, 1], or ValueError naming what they are instead."""
    if not isinstance(images_01, torch.Tensor) or images_01.ndim != 4 or not images_01.is_floating_point():
        found = (
            f"{tuple(images_01.shape)} {images_01.dtype}" if isinstance(images_01, torch.Tensor) else type(images_01)
        )
        raise ValueError(f"images_01 must be a float tensor (N, C, H, W) in [0, 1], got {found}; divide uint8 by 255")
    if not len(images_01):
        raise ValueError("images_01 holds no image")
    low, high = float(images_01.min()), float(images_01.max())
    if not (0 <= low and high <= 1):  # NaN fails both
        raise ValueError(
            f"images_01 has values in [{low:g}, {high:g}]: attacks move in [0, 1], before any normalization; "
            "let the model normalize inside"
        )
    return images_01


def check_labels(labels: torch.Tensor, number: int, num_classes: int | None) -> None:
    """ValueError unless there is one class index per image."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != number:
        raise ValueError(f"labels must be {number} class indices, got {tuple(labels.shape)} {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels holds {wrong}, which is no class: the model tells {num_classes or 'some'} classes apart"
        )
