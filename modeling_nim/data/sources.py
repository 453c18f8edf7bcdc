"""Where images come from: opens the `ImageSource` that the `data` section of a recipe names."""

import hashlib
from importlib import import_module
from typing import Literal

import numpy as np
from PIL import Image

from ..image_processing import CHANNELS
from .base import SOURCES, DataRecipe, ImageSource
from .decode import BadImageError
from .streams import StreamSource


def load_source(recipe: DataRecipe, split: Literal["train", "validation", "test"]) -> ImageSource | StreamSource:
    """The images of one split.

    "train" leaves out what "validation" holds (`validation_fraction` of the source's training split); "test" is the
    source's test split. With `streaming`, "train" is a `StreamSource`.

    Raises FileNotFoundError or ValueError that name the path and the remedy when there are no images.
    """
    if split == "train" and recipe.streaming:
        return StreamSource(recipe)
    if split == "test":
        source = _open(recipe, recipe.test_split, is_test=True)
    elif split in ("train", "validation"):
        source = _open(recipe, recipe.train_split, is_test=False)
        num_held_out = round(len(source) * recipe.validation_fraction)
        if split == "validation" and num_held_out == 0:
            raise ValueError(
                f"there is no validation split: data.validation_fraction is {recipe.validation_fraction} of "
                f"{len(source)} images; set it to e.g. 0.1"
            )
        if num_held_out:
            order = np.random.default_rng(recipe.split_seed).permutation(len(source))
            kept = order[:num_held_out] if split == "validation" else order[num_held_out:]
            source = SubsetSource(source, np.sort(kept), f"{split} of seed {recipe.split_seed}")
    else:
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    if len(source) == 0:
        raise ValueError(f"no images in split {split!r} of {recipe.path!r}")
    return CachedSource(source, recipe.on_bad_image) if recipe.cache_in_memory else source


def _open(recipe: DataRecipe, split: str, is_test: bool) -> ImageSource:
    module, name = SOURCES[recipe.source].split(".")
    source_class = getattr(import_module(f".{module}", __package__), name)
    return source_class.from_recipe(recipe, split, is_test)


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 handwritten digits in three channels, enlarged from 8x8 to 32x32 (bilinear)."""

    def __init__(self, is_test: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
        self.indices = np.sort(test if is_test else train)
        gray = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), the pixels are 0..16
        resized = [Image.fromarray(gray[i]).resize((32, 32), Image.Resampling.BILINEAR) for i in self.indices]
        self.pixels = np.stack([np.asarray(image.convert(CHANNELS)) for image in resized])  # (N, 32, 32, 3)
        self.labels = digits.target[self.indices]
        self.class_names = [str(name) for name in digits.target_names]
        digest = hashlib.sha256(self.pixels.tobytes() + self.labels.astype(np.int64).tobytes()).hexdigest()
        self.fingerprint = f"digits:{'test' if is_test else 'train'}:{len(self)}:{digest[:16]}"

    @classmethod
    def from_recipe(cls, recipe, split, is_test):
        return cls(is_test)

    def __len__(self):
        return len(self.indices)

    def stored(self, index):
        return self.pixels[index], int(self.labels[index])

    def image_id(self, index):
        return f"digits/{self.indices[index]:04d}"


class SubsetSource(ImageSource):
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: np.ndarray, description: str):
        self.source, self.indices = source, indices
        self.class_names, self.classes_are_counted = source.class_names, source.classes_are_counted
        self.fingerprint = f"{source.fingerprint}[{description}: {len(indices)}]"

    def __len__(self):
        return len(self.indices)

    def stored(self, index):
        return self.source.stored(int(self.indices[index]))

    def label(self, index):
        return self.source.label(int(self.indices[index]))

    def image_id(self, index):
        return self.source.image_id(int(self.indices[index]))


class CachedSource(ImageSource):
    """A small source decoded once: `pixels` are N arrays (H, W, 3) uint8, `labels` (N,)."""

    def __init__(self, source: ImageSource, on_bad_image: str = "raise"):
        self.bad_images = []
        pixels, labels, kept = [], [], []
        for index in range(len(source)):
            try:
                image, label = source[index]
            except BadImageError as error:
                if on_bad_image == "raise":
                    raise
                self.bad_images.append(str(error))
                continue
            pixels.append(np.asarray(image))
            labels.append(label)
            kept.append(index)
        if not kept:
            raise ValueError(f"none of {len(source)} images can be read; the first: {self.bad_images[0]}")
        self.pixels, self.labels = pixels, np.asarray(labels)
        self.source, self.kept = source, kept
        self.class_names, self.classes_are_counted = source.class_names, source.classes_are_counted
        self.fingerprint = source.fingerprint

    def __len__(self):
        return len(self.kept)

    def stored(self, index):
        return self.pixels[index], int(self.labels[index])

    def image_id(self, index):
        return self.source.image_id(self.kept[index])
