"""Rows of tables: parquet shards and data sets of the Hub, through `datasets`."""

import os
import shutil
import sys

import numpy as np

from .base import DataRecipe, ImageSource, files_digest, load_hub_dataset, shard_files


SAY_FROM_BYTES = 2**30


class TableSource(ImageSource):
    """Rows of parquet shards or of a Hub data set, memory-mapped by `datasets` and decoded by us."""

    def __init__(self, recipe: DataRecipe, split: str):
        import datasets

        self.table_name = f"{os.path.basename(os.path.normpath(recipe.path))}/{split}"
        if recipe.source == "parquet":
            files = shard_files(recipe.path, split, ".parquet")
            rows = _open_parquet(files, split)
            provenance = files_digest(files)
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


def _open_parquet(files: list[str], split: str):
    """The rows, memory-mapped from a copy in Arrow's format in the cache of `datasets`: parquet has no random access to a row.

    Raises ValueError naming both sizes where the copy has no room; what takes long is said first.
    """
    import datasets
    import pyarrow.parquet

    builder = datasets.load_dataset_builder("parquet", data_files={split: files})
    if not os.path.exists(builder.cache_dir):
        needed = sum(_bytes_in_memory(pyarrow.parquet.read_metadata(file)) for file in files)
        place = builder.cache_dir
        while not os.path.exists(place):
            place = os.path.dirname(place)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"{os.path.dirname(files[0])!r} is copied to {place!r} before the first step, which takes "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; set HF_DATASETS_CACHE to another disk, or "
                f"data.streaming=true to read the shards where they are"
            )
        if needed >= SAY_FROM_BYTES:
            print(f"copying {needed / 2**30:.1f} GiB of parquet to {place}, once", file=sys.stderr)
    return datasets.load_dataset("parquet", data_files={split: files}, split=split)


def _bytes_in_memory(metadata) -> int:
    """Uncompressed bytes of all row groups of a parquet file."""
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
