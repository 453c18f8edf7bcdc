"""What all sources of images share: the `data` section of a recipe, the interface, the names of files."""

import glob
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from ..runs.bounds import Bounds, Count, Seed, check_fields
from .decode import BadImageError, decode_rgb


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")

# What `data.source` may be, and the class of this folder that opens it: a new source is its own file and a row here.
SOURCES = {
    "digits": "sources.DigitsSource",
    "parquet": "tables.TableSource",
    "folder": "folders.FolderSource",
    "webdataset": "tars.TarSource",
    "hub": "tables.TableSource",
}
STREAMED = ("parquet", "folder", "webdataset", "hub")


@dataclass
class DataRecipe:
    """The `data` section of a recipe.

    - `source: digits`: scikit-learn's handwritten digits, 32x32, 1,437 for training and 360 for the test; no `path`.
    - `source: parquet`: `path` is a folder of shards named `SPLIT-*.parquet` (or `SPLIT/*.parquet`).
    - `source: folder`: `path/SPLIT/CLASS/IMAGE`; classes are the sorted folder names.
    - `source: webdataset`: `path` is a folder of `SPLIT-*.tar` (or `SPLIT/*.tar`) whose samples are `KEY.jpg` +
      `KEY.cls`.
    - `source: hub`: `path` is the data set's id, e.g. `ILSVRC/imagenet-1k`, `config_name` its configuration if it has
      any.

    `train_split` and `test_split` are the source's own names of the two splits. `validation_fraction` of the training
    split is held out, always the same images for the same `split_seed`, so that choices never touch the test split.
    """

    source: Literal[tuple(SOURCES)] = "digits"  # how the images are stored
    path: str | None = None  # the folder, or the data set's id on the Hub; digits need none
    config_name: str | None = None  # of a data set on the Hub that has several configurations
    train_split: str = "train"  # the source's own name of the training split
    test_split: str = "test"  # the source's own name of the test split
    image_column: str = "image"  # of parquet and Hub data
    label_column: str = "label"  # of parquet and Hub data
    # share of the training split that is held out for choices
    validation_fraction: Annotated[float, Bounds(least=0, below=1)] = 0.0
    split_seed: Seed = 0  # which images are held out
    # hold the decoded images of a small data set in memory, uint8
    cache_in_memory: bool = False
    # read training data front to back through a shuffle buffer instead of at random, for disks smaller than the data; a
    # resumed run reads its epoch again up to where it was, with the same number of processes and workers
    streaming: bool = False
    # images among which a stream draws the next one
    shuffle_buffer: Annotated[int, Bounds(least=1, most=10_000_000)] = 10_000
    # images in the training split, for a stream that does not tell their number
    num_images: Count | None = None
    on_bad_image: Literal["raise", "skip"] = "raise"  # of a file that is no image; attacks refuse it
    num_workers: Annotated[int, Bounds(least=0, most=1024)] = 0  # processes that load images, per training process

    def __post_init__(self):
        check_fields(self, "data.")
        if self.source != "digits" and not self.path:
            raise ValueError(f"data.source {self.source!r} needs data.path")
        if self.path and self.source == "digits":
            raise ValueError(
                f"data.path is {self.path!r} and data.source digits, which need none: name how the images are stored, "
                "such as data.source=folder"
            )
        if self.streaming and self.source not in STREAMED:
            raise ValueError(f"data.streaming is for {', '.join(STREAMED)}; {self.source} are in memory anyway")
        if self.streaming and (self.cache_in_memory or self.validation_fraction):
            raise ValueError("data.streaming has no random access: unset data.cache_in_memory and validation_fraction")


class ImageSource:
    """Images with labels at random access.

    `source[i]` is `(PIL.Image in RGB, int label)` and raises `BadImageError` for an image that cannot be read;
    `image_id(i)` names the image; `class_names` are the labels' names in order; `fingerprint` says which data this is.
    `bad_images` are the messages of images that opening the source left out. `classes_are_counted` where the labels
    have no names: there are classes up to the highest label, and may be more.
    """

    class_names: list[str]
    bad_images: Sequence[str] = ()
    classes_are_counted: bool = False
    fingerprint: str

    @classmethod
    def from_recipe(cls, recipe: DataRecipe, split: str, is_test: bool) -> "ImageSource":
        """The source of one split, named as the data name it; `is_test` says whether it is the test split."""
        return cls(recipe.path, split)

    def __len__(self) -> int:
        raise NotImplementedError

    def stored(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """The image as it is stored, encoded bytes or (H, W, 3) uint8 pixels, and its label."""
        raise NotImplementedError

    def label(self, index: int) -> int:
        """The label alone, without reading the image where the source has all `labels`."""
        labels = getattr(self, "labels", None)
        return self.stored(index)[1] if labels is None else int(labels[index])

    def image_id(self, index: int) -> str:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        stored, label = self.stored(index)
        if isinstance(stored, np.ndarray):
            return Image.fromarray(stored), label
        return decode_rgb(stored, self.image_id(index)), label


def shard_files(path: str, split: str, suffix: str) -> list[str]:
    """The shards of a split: `path/split-*.suffix`, `path/split.suffix` or `path/split/*.suffix`, in sorted order."""
    patterns = (f"{split}-*{suffix}", f"{split}{suffix}", os.path.join(split, f"*{suffix}"))
    files = sorted(file for pattern in patterns for file in glob.glob(os.path.join(glob.escape(path), pattern)))
    if not files:
        raise FileNotFoundError(
            f"no {suffix} files of split {split!r} in {path!r}; expected {split}-*{suffix} or {split}/*{suffix} "
            "(data.train_split and data.test_split name the splits)"
        )
    return files


def file_roots(recipe: DataRecipe) -> list[str]:
    """The folders that rows may name files in: that of the data, for the Hub the caches that it is downloaded to."""
    if recipe.source != "hub" or os.path.isdir(recipe.path):
        return [recipe.path]
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return [str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.DOWNLOADED_DATASETS_PATH), HF_HUB_CACHE]


def cell_bytes(cell: dict[str, Any] | None, roots: Sequence[str], image_id: str) -> bytes:
    """The encoded image of a table's cell `{"bytes", "path"}`; a path is relative to one of `roots` and stays in it.

    Raises BadImageError for an empty cell, a file outside of `roots` (data from elsewhere may name any file of this
    machine) and one that cannot be read.
    """
    cell = cell or {}
    if (encoded := cell.get("bytes")) is not None:
        return encoded
    path = cell.get("path")
    if path is None:
        raise BadImageError(f"image {image_id!r} is missing: its cell is empty")
    for root in map(os.path.realpath, roots):
        inside = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, inside]) == root and os.path.isfile(inside):
            return file_bytes(inside, image_id)
    raise BadImageError(f"image {image_id!r} names {path!r}, which is no file inside {', '.join(map(repr, roots))}")


def file_bytes(path: str, image_id: str) -> bytes:
    """The content of a file, or BadImageError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"cannot read image {image_id!r}: {error.strerror}") from None


def load_hub_dataset(recipe: DataRecipe, split: str, streaming: bool = False):
    """`datasets.load_dataset` of a Hub id, with the remedy in the error for data sets behind a license."""
    import datasets

    try:
        return datasets.load_dataset(recipe.path, recipe.config_name, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, PermissionError, ConnectionError) as error:
        raise ValueError(
            f"cannot load {recipe.path!r} from the Hub ({' '.join(str(error).split())}); if it is gated, accept its "
            f"terms at https://huggingface.co/datasets/{recipe.path} and run `hf auth login`"
        ) from None


def files_digest(files: list[str]) -> str:
    """Names, sizes and last kilobytes (a parquet file ends in the offsets and statistics of all it holds)."""
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 65536))
            digest.update(f"{os.path.basename(name)}:{size}\n".encode() + file.read())
    return digest.hexdigest()[:16]
