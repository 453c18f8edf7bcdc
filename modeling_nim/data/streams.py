"""The training split as a stream, which resumes exactly where an interrupted run stopped."""

import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .base import IMAGE_SUFFIXES, DataRecipe, cell_bytes, file_roots, load_hub_dataset, shard_files
from .decode import BadImageError
from .labels import check_label
from .tables import undecoded
from .tars import check_tar


@dataclass
class StreamPosition:
    """How far one reader of a stream has come: `number` images into `epoch`, `batches` batches in all."""

    epoch: int = 0
    number: int = 0
    batches: int = 0


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
        # None where classes have no names: a stream does not know how many classes there are
        self.class_names = getattr(rows.features[self.label_column], "names", None)
        self.rows, self.roots = undecoded(rows, self.image_column, recipe.path), file_roots(recipe)
        self.shuffle_buffer = recipe.shuffle_buffer
        self.fingerprint = f"stream:{recipe.source}:{recipe.path}/{split}:{self.num_images}"

    def __len__(self):
        return self.num_images

    def num_readers(self, num_workers: int, num_processes: int) -> int:
        """Loader workers per process that have shards to read, at least one: more of them would idle."""
        shards = self.rows.num_shards
        return min(num_workers, shards // num_processes if shards % num_processes == 0 else shards)

    def epochs(
        self, seed: int, rank: int, num_processes: int, position: StreamPosition
    ) -> Iterator[tuple[bytes | BadImageError, int, str]]:
        """This process's share from `position` on, epoch after epoch without end, shuffled; loader workers split it.

        `position` is advanced. Images before it in its epoch are read again but not decoded: the order of the images
        follows from (seed, epoch).
        A bad image has its error in place of its bytes. Raises ValueError naming a damaged tar, at its first image, or
        a label that is no class.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
        if num_processes > 1:
            rows = split_dataset_by_node(rows, rank, num_processes)
        checked = set()
        while True:
            rows.set_epoch(position.epoch)
            is_empty = True
            for number, row in itertools.islice(enumerate(rows), position.number, None):
                is_empty = False
                url = row.get("__url__")
                if url not in checked and url is not None and os.path.isfile(url):
                    check_tar(url)
                    checked.add(url)
                image = row[self.image_column]
                position.number = number + 1
                name = (image or {}).get("path") or f"epoch {position.epoch}, row {number}"
                label = check_label(row[self.label_column], self.class_names, self.num_images, f"image {name!r}")
                try:
                    encoded = cell_bytes(image, self.roots, name)
                except BadImageError as error:
                    encoded = error
                yield encoded, label, name
            if is_empty and position.number == 0:
                raise ValueError(
                    f"the stream holds no image for process {rank} of {num_processes}; use fewer processes"
                )
            position.epoch, position.number = position.epoch + 1, 0
