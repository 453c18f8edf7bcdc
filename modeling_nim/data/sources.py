"""Where images come from: one `data` section of the recipe, one `ImageSource` whatever stands behind it."""

import glob
import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from ..runs.bounds import Bounds, Count, Seed, check_fields
from .decode import BadImageError, decode_rgb


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


@dataclass
class DataRecipe:
    """The `data` section of a recipe.

    - `source: digits`: scikit-learn's handwritten digits, 32x32, 1,437 for training and 360 for the test; no `path`.
    - `source: parquet`: `path` is a folder of shards named `SPLIT-*.parquet` (or `SPLIT/*.parquet`).
    - `source: folder`: `path/SPLIT/CLASS/IMAGE`; classes are the sorted folder names.
    - `source: webdataset`: `path` is a folder of `SPLIT-*.tar` (or `SPLIT/*.tar`) whose samples are `KEY.jpg` + `KEY.cls`.
    - `source: hub`: `path` is the data set's id, e.g. `ILSVRC/imagenet-1k`, `config_name` its configuration if it has any.

    `train_split` and `test_split` are the source's own names of the two splits. `validation_fraction` of the training
    split is held out, always the same images for the same `split_seed`, so that choices never touch the test split.
    """

    source: Literal["digits", "parquet", "folder", "webdataset", "hub"] = "digits"
    path: str | None = None
    config_name: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    validation_fraction: Annotated[float, Bounds(least=0, below=1)] = 0.0
    split_seed: Seed = 0
    # hold the decoded images of a small data set in memory, uint8
    cache_in_memory: bool = False
    # read training data front to back through a shuffle buffer instead of at random, for disks smaller than the data; a
    # resumed run then sees other images than the unbroken one would have
    streaming: bool = False
    shuffle_buffer: Annotated[int, Bounds(least=1, most=10_000_000)] = 10_000
    # images in the training split, for a stream that does not know
    num_images: Count | None = None
    on_bad_image: Literal["raise", "skip"] = "raise"
    num_workers: Annotated[int, Bounds(least=0, most=1024)] = 0

    def __post_init__(self):
        check_fields(self, "data")
        if self.source != "digits" and not self.path:
            raise ValueError(f"data.source {self.source!r} needs data.path")
        if self.streaming and self.source == "digits":
            raise ValueError("data.streaming is for data on disk or on the Hub; digits are in memory anyway")
        if self.streaming and (self.cache_in_memory or self.validation_fraction):
            raise ValueError("data.streaming has no random access: unset data.cache_in_memory and validation_fraction")


class ImageSource:
    """Images with labels at random access.

    `source[i]` is `(PIL.Image in RGB, int label)` and raises `BadImageError` for an image that cannot be read;
    `image_id(i)` names the image; `class_names` are the labels' names in order; `fingerprint` says which data this is.
    `bad_images` are the messages of images that opening the source left out. `classes_are_counted` where the labels have no
    names: there are classes up to the highest label, and may be more.
    """

    class_names: list[str]
    bad_images: Sequence[str] = ()
    classes_are_counted: bool = False
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError

    def stored(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """The image as it is kept, encoded bytes or (H, W, 3) uint8 pixels, and its label."""
        raise NotImplementedError

    def image_id(self, index: int) -> str:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        stored, label = self.stored(index)
        if isinstance(stored, np.ndarray):
            return Image.fromarray(stored), label
        return decode_rgb(stored, self.image_id(index)), label


def load_source(recipe: DataRecipe, split: Literal["train", "validation", "test"]) -> "ImageSource | StreamSource":
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
    if recipe.source == "digits":
        return DigitsSource(is_test)
    if recipe.source == "folder":
        return FolderSource(recipe.path, split)
    if recipe.source == "webdataset":
        return TarSource(recipe.path, split)
    return TableSource(recipe, split)


class DigitsSource(ImageSource):
    """scikit-learn's 1,797 handwritten digits in three channels, enlarged from 8x8 to 32x32 (bilinear)."""

    def __init__(self, is_test: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
        self.indices = np.sort(test if is_test else train)
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), the pixels are 0..16
        resized = [Image.fromarray(grey[i]).resize((32, 32), Image.Resampling.BILINEAR) for i in self.indices]
        self.pixels = np.stack([np.asarray(image.convert("RGB")) for image in resized])  # (N, 32, 32, 3)
        self.labels = digits.target[self.indices]
        self.class_names = [str(name) for name in digits.target_names]
        digest = hashlib.sha256(self.pixels.tobytes() + self.labels.astype(np.int64).tobytes()).hexdigest()
        self.fingerprint = f"digits:{'test' if is_test else 'train'}:{len(self)}:{digest[:16]}"

    def __len__(self):
        return len(self.indices)

    def stored(self, index):
        return self.pixels[index], int(self.labels[index])

    def image_id(self, index):
        return f"digits/{self.indices[index]:04d}"


class FolderSource(ImageSource):
    """`path/split/class/image`, the classes in sorted order."""

    def __init__(self, path: str, split: str):
        self.root = os.path.join(path, split)
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"there is no folder {self.root!r}; data.path must hold {split!r}/CLASS/IMAGE")
        self.class_names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        self.files, self.labels = [], []
        digest = hashlib.sha256()
        for label, name in enumerate(self.class_names):
            for folder, subfolders, files in os.walk(os.path.join(self.root, name)):
                subfolders.sort()
                for file in sorted(files):
                    if file.lower().endswith(IMAGE_SUFFIXES):
                        full = os.path.join(folder, file)
                        self.files.append(os.path.relpath(full, self.root))
                        self.labels.append(label)
                        digest.update(f"{self.files[-1]}:{os.path.getsize(full)}\n".encode())
        if not self.files:
            raise FileNotFoundError(
                f"no images under {self.root!r}; it must hold one folder per class with files ending in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        self.fingerprint = f"folder:{split}:{len(self)}:{digest.hexdigest()[:16]}"

    def __len__(self):
        return len(self.files)

    def stored(self, index):
        with open(os.path.join(self.root, self.files[index]), "rb") as file:
            return file.read(), self.labels[index]

    def image_id(self, index):
        return self.files[index]


def shard_files(path: str, split: str, suffix: str) -> list[str]:
    """The shards of a split: `path/split-*.suffix`, `path/split.suffix` or `path/split/*.suffix`, in sorted order."""
    patterns = (f"{split}-*{suffix}", f"{split}{suffix}", os.path.join(split, f"*{suffix}"))
    files = sorted(file for pattern in patterns for file in glob.glob(os.path.join(glob.escape(path), pattern)))
    if not files:
        raise FileNotFoundError(
            f"no {suffix} files of split {split!r} in {path!r}; expected {split}-*{suffix} or {split}/*{suffix} "
            f"(data.train_split and data.test_split name the splits)"
        )
    return files


class TableSource(ImageSource):
    """Rows of parquet shards or of a Hub data set, memory-mapped by `datasets` and decoded by us."""

    def __init__(self, recipe: DataRecipe, split: str):
        import datasets

        self.table_name = f"{os.path.basename(os.path.normpath(recipe.path))}/{split}"
        if recipe.source == "parquet":
            files = shard_files(recipe.path, split, ".parquet")
            rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
            provenance = _files_digest(files)
        else:
            rows = load_hub_dataset(recipe, split)
            provenance = rows._fingerprint
        for column in (recipe.image_column, recipe.label_column):
            if column not in rows.column_names:
                raise ValueError(f"{recipe.path!r} has no column {column!r}; its columns: {rows.column_names}")
        label_feature = rows.features[recipe.label_column]
        labels = np.asarray(rows.with_format("arrow")[recipe.label_column])
        self.classes_are_counted = getattr(label_feature, "names", None) is None
        self.class_names = list(getattr(label_feature, "names", None) or map(str, range(int(labels.max()) + 1)))
        self.labels = labels.astype(np.int64)
        # the raw {bytes, path} column: our own decoder turns it into pixels
        rows = rows.select_columns([recipe.image_column])
        self.images = rows.cast_column(recipe.image_column, datasets.Image(decode=False)).with_format("arrow")
        self.image_column = recipe.image_column
        self.fingerprint = f"{recipe.source}:{self.table_name}:{len(self)}:{provenance}"

    def __len__(self):
        return len(self.labels)

    def stored(self, index):
        cell = self.images[int(index)][self.image_column][0]
        encoded = cell["bytes"].as_py()
        if encoded is None:
            with open(cell["path"].as_py(), "rb") as file:
                encoded = file.read()
        return encoded, int(self.labels[index])

    def image_id(self, index):
        return f"{self.table_name}/{int(index):08d}"


def load_hub_dataset(recipe: DataRecipe, split: str, streaming: bool = False):
    """`datasets.load_dataset` of a Hub id, with the remedy in the error for data sets behind a licence."""
    import datasets

    try:
        return datasets.load_dataset(recipe.path, recipe.config_name, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, PermissionError, ConnectionError) as error:
        raise ValueError(
            f"cannot load {recipe.path!r} from the Hub ({' '.join(str(error).split())}); if it is gated, accept its terms "
            f"at https://huggingface.co/datasets/{recipe.path} and run `hf auth login`"
        ) from None


def _files_digest(files: list[str]) -> str:
    """Names, sizes and last kilobytes (a parquet file ends in the offsets and statistics of all it holds)."""
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 65536))
            digest.update(f"{os.path.basename(name)}:{size}\n".encode() + file.read())
    return digest.hexdigest()[:16]


class TarSource(ImageSource):
    """WebDataset shards at random access: the headers are read once, the images with one positioned read each."""

    classes_are_counted = True

    def __init__(self, path: str, split: str):
        self.shards = shard_files(path, split, ".tar")
        self.keys, shards, offsets, sizes, labels = [], [], [], [], []
        for number, shard in enumerate(self.shards):
            images, classes = {}, {}
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        key, _, suffix = member.name.partition(".")
                        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                            images[key] = (member.offset_data, member.size)
                        elif suffix == "cls":
                            classes[key] = int(tar.extractfile(member).read())
            except (tarfile.TarError, ValueError) as error:
                raise ValueError(f"cannot read {shard!r} ({error}); it must be a tar of KEY.jpg + KEY.cls") from None
            for key, (offset, size) in images.items():
                if key not in classes:
                    raise ValueError(f"sample {key!r} of {shard!r} has no label; expected {key}.cls beside the image")
                self.keys.append(key)
                shards.append(number)
                offsets.append(offset)
                sizes.append(size)
                labels.append(classes[key])
        self.shard, self.offset, self.size, self.labels = map(np.asarray, (shards, offsets, sizes, labels))
        self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)] if labels else []
        self.files = None
        self.fingerprint = f"webdataset:{split}:{len(self)}:{_files_digest(self.shards)}"

    def __len__(self):
        return len(self.keys)

    def stored(self, index):
        if self.files is None:
            self.files = [os.open(shard, os.O_RDONLY) for shard in self.shards]
        # pread has no file position, so forked workers may share the descriptors
        encoded = os.pread(self.files[self.shard[index]], int(self.size[index]), int(self.offset[index]))
        return encoded, int(self.labels[index])

    def image_id(self, index):
        return f"{os.path.basename(self.shards[self.shard[index]])}/{self.keys[index]}"


class StreamSource:
    """The training split as a stream of `(encoded bytes, label, image id)`; it has a length but no random access."""

    bad_images: Sequence[str] = ()

    def __init__(self, recipe: DataRecipe):
        import datasets

        split, self.image_column, self.label_column = recipe.train_split, recipe.image_column, recipe.label_column
        if recipe.source == "hub":
            rows = load_hub_dataset(recipe, split, streaming=True)
        else:
            if recipe.source == "folder":
                builder, files = "imagefolder", {"data_dir": os.path.join(recipe.path, split)}
                self.image_column, self.label_column, split = "image", "label", "train"
            else:
                suffix = ".parquet" if recipe.source == "parquet" else ".tar"
                builder, files = recipe.source, {"data_files": {split: shard_files(recipe.path, split, suffix)}}
            try:
                rows = datasets.load_dataset(builder, split=split, streaming=True, **files)
            except tarfile.TarError as error:
                raise ValueError(f"a tar of split {split!r} in {recipe.path!r} cannot be read ({error})") from None
        if recipe.source == "webdataset":
            columns = rows.column_names or []
            self.image_column = next((name for name in columns if f".{name}" in IMAGE_SUFFIXES), "jpg")
            self.label_column = "cls"
        for column in (self.image_column, self.label_column):
            if column not in (rows.column_names or []):
                raise ValueError(f"{recipe.path!r} has no column {column!r}; its columns: {rows.column_names}")
        known = rows.info.splits[split].num_examples if rows.info.splits and split in rows.info.splits else None
        self.num_images = recipe.num_images or known
        if not self.num_images:
            raise ValueError(f"how many images {recipe.path!r} streams is not known; set data.num_images")
        # None where the labels are bare numbers: how many there are, a stream cannot tell
        self.class_names = getattr(rows.features[self.label_column], "names", None)
        self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self.shuffle_buffer = recipe.shuffle_buffer
        self.fingerprint = f"stream:{recipe.source}:{recipe.path}/{split}:{self.num_images}"

    def __len__(self):
        return self.num_images

    def epochs(self, seed: int, rank: int, num_processes: int) -> Iterator[tuple[bytes, int, str]]:
        """This process's share, epoch after epoch without end, shuffled; loader workers share it further."""
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        if num_processes > 1:
            rows = split_dataset_by_node(rows, rank, num_processes)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            number = -1
            for number, row in enumerate(rows):
                image = row[self.image_column]
                encoded = image["bytes"]
                if encoded is None:
                    with open(image["path"], "rb") as file:
                        encoded = file.read()
                yield encoded, int(row[self.label_column]), image["path"] or f"epoch {epoch}, row {number}"
            if number < 0:  # more workers than shards: nothing for this one
                return


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
