"""Rows of tables: parquet shards and data sets of the Hub, through `datasets`."""

import os
import shutil
import sys

import numpy as np

from .base import (
    DataRecipe,
    ImageSource,
    cell_bytes,
    file_roots,
    files_digest,
    load_hub_dataset,
    shard_files,
)
from .labels import check_label, counted_class_names


SAY_FROM_BYTES = 2**30


class TableSource(ImageSource):
    """Rows of parquet shards or of a Hub data set, memory-mapped by `datasets` and decoded as `data.decode` does."""

    @classmethod
    def from_recipe(cls, recipe, split, is_test):
        return cls(recipe, split)

    def __init__(self, recipe: DataRecipe, split: str):
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
        names = getattr(rows.features[recipe.label_column], "names", None)
        self.labels = _checked_labels(rows, recipe, names)
        self.classes_are_counted = names is None
        self.class_names = counted_class_names(self.labels.tolist()) if names is None else list(names)
        # the raw {bytes, path} column: `data.decode` turns it into pixels
        self.images = undecoded(
            rows.select_columns([recipe.image_column]), recipe.image_column, recipe.path
        ).with_format("arrow")
        self.image_column, self.roots = recipe.image_column, file_roots(recipe)
        self.fingerprint = f"{recipe.source}:{self.table_name}:{len(self)}:{provenance}"

    def __len__(self):
        return len(self.labels)

    def stored(self, index):
        cell = self.images[int(index)][self.image_column][0].as_py()
        return cell_bytes(cell, self.roots, self.image_id(index)), int(self.labels[index])

    def image_id(self, index):
        return f"{self.table_name}/{int(index):08d}"


def undecoded(rows, column: str, path: str):
    """Rows, mapped or streamed, whose image column is `{"bytes", "path"}`; ValueError for a column of anything else."""
    import datasets
    import pyarrow as pa

    if not isinstance(rows.features[column], datasets.Image):
        kind = cell = rows.features.arrow_schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            cell = kind.field("bytes").type
        is_null = cell is not kind and pa.types.is_null(cell)  # every row names a file
        encoded = pa.types.is_binary(cell) or pa.types.is_large_binary(cell) or pa.types.is_string(cell)
        if not encoded and not is_null:
            raise ValueError(
                f"column {column!r} of {path!r} holds {kind}, no images; it must hold encoded files "
                "(PNG, JPEG, ...) as bytes or as datasets.Image: name another column in data.image_column"
            )
    return rows.cast_column(column, datasets.Image(decode=False))


def _checked_labels(rows, recipe: DataRecipe, names: list[str] | None) -> np.ndarray:
    """(N,) int64, or ValueError naming the column, or the first row that holds no label."""
    import pyarrow as pa

    column, where = rows.data.column(recipe.label_column), f"column {recipe.label_column!r} of {recipe.path!r}"
    if not pa.types.is_integer(column.type) and not pa.types.is_boolean(column.type):
        raise ValueError(f"{where} holds {column.type}; labels must be whole numbers, 0 and up (datasets.ClassLabel)")
    if len(column) == 0:
        raise ValueError(f"{where} has no rows: the split is empty")
    if column.null_count:
        row = next(row for row, value in enumerate(column) if not value.is_valid)
        raise ValueError(f"{where}: row {row} has no label; leave such rows out")
    labels = column.to_numpy()
    for row in (labels.argmin(), labels.argmax()):
        check_label(int(labels[row]), names, len(labels), f"{where}, row {row}")
    return labels.astype(np.int64)


def _open_parquet(files: list[str], split: str):
    """The rows, memory-mapped from an Arrow copy in the cache of `datasets`: parquet has no random access to a row.

    Prints a line before a long copy. Raises ValueError naming both sizes where the copy has no room.
    """
    import datasets
    import pyarrow.parquet

    footers = []
    for file in files:
        try:
            footers.append(pyarrow.parquet.read_metadata(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file!r} is no parquet file or damaged ({error})") from None
    if sum(footer.num_rows for footer in footers) == 0:
        raise ValueError(f"{files[0]!r} and all other shards of split {split!r} have no rows")
    builder = datasets.load_dataset_builder("parquet", data_files={split: files})
    if not os.path.exists(builder.cache_dir):
        needed = sum(map(_bytes_in_memory, footers))
        place = builder.cache_dir
        while not os.path.exists(place):
            place = os.path.dirname(place)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"{os.path.dirname(files[0])!r} is copied to {place!r} before the first step, which takes "
                f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; set HF_DATASETS_CACHE to another "
                "disk, or data.streaming=true to read the shards where they are"
            )
        if needed >= SAY_FROM_BYTES:
            print(f"copying {needed / 2**30:.1f} GiB of parquet to {place}, once", file=sys.stderr)
    try:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(
            f"the shards of split {split!r} in {os.path.dirname(files[0])!r} cannot be read: {reason}"
        ) from None


def _bytes_in_memory(metadata) -> int:
    """Uncompressed bytes of all row groups of a parquet file."""
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
