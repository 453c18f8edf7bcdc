"""Checks that labels are whole numbers from 0 up, before a wrong one sets the number of classes."""

from collections.abc import Sequence
from typing import Any


# A label that is at least this and at least ten times the number of images is no class (a hash, an id, a year).
_MANY_CLASSES = 1000


def check_label(label: Any, class_names: Sequence[str] | None, num_images: int, where: str) -> int:
    """Returns the label, or raises ValueError that says `where` it stands and what is wrong.

    It must be the number of one of `class_names`; where classes have no names, one that `num_images` images may have.
    """
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"{where}: label {label!r} ({type(label).__name__}) must be a whole number, 0 and up")
    if label < 0:
        raise ValueError(
            f"{where}: label {label} must be 0 or more; -1 marks images without a label: take another split"
        )
    if class_names is not None and label >= len(class_names):
        raise ValueError(f"{where}: label {label} has no name, there are {len(class_names)} classes from 0 up")
    if class_names is None and label >= max(_MANY_CLASSES, 10 * num_images):
        raise ValueError(
            f"{where}: label {label} would make {label + 1} classes of {num_images} images; number the "
            "classes 0, 1, 2, ..."
        )
    return label


def counted_class_names(labels: Sequence[int]) -> list[str]:
    """Numbers as names for classes without names, up to the highest label; all labels were checked."""
    return [str(label) for label in range(max(labels, default=-1) + 1)]
