"""WebDataset shards: tar files of KEY.jpg + KEY.cls."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .base import IMAGE_SUFFIXES, ImageSource, files_digest, shard_files
from .labels import check_label, counted_class_names


@contextmanager
def whole_tar(path: str) -> Iterator[tarfile.TarFile]:
    """An open tar whose members are all read in the block. ValueError names one that is damaged, in the middle too.

    `tarfile` takes a header that it cannot read for the end: the files after it would be missing without an error.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"no header at byte {tar.offset}, where the next file begins")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}); it must be a tar of KEY.jpg + KEY.cls") from None


def check_tar(path: str) -> None:
    """ValueError naming a damaged tar; only the headers are read."""
    with whole_tar(path) as tar:
        for _ in tar:
            pass


class TarSource(ImageSource):
    """WebDataset shards at random access: the headers are read once, the images with one positioned read each."""

    classes_are_counted = True

    def __init__(self, path: str, split: str):
        self.shards = shard_files(path, split, ".tar")
        self.keys, shards, offsets, sizes, labels = [], [], [], [], []
        for number, shard in enumerate(self.shards):
            images, classes = {}, {}
            with whole_tar(shard) as tar:
                for member in tar:
                    folder, name = os.path.split(member.name)
                    key, _, suffix = name.partition(".")  # of the name alone: `tar cf shard.tar .` writes ./KEY.jpg
                    key = os.path.join(folder, key)
                    if not member.isfile():
                        continue
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        if key in images:
                            raise ValueError(f"sample {key!r} has two images")
                        images[key] = (member.offset_data, member.size)
                    elif suffix == "cls":
                        classes[key] = int(tar.extractfile(member).read())
            for key, (offset, size) in images.items():
                if key not in classes:
                    raise ValueError(f"sample {key!r} of {shard!r} has no label; expected {key}.cls beside the image")
                self.keys.append(key)
                shards.append(number)
                offsets.append(offset)
                sizes.append(size)
                labels.append(classes[key])
        for number, (key, label) in zip(shards, zip(self.keys, labels, strict=True), strict=True):
            check_label(label, None, len(labels), f"sample {key!r} of {self.shards[number]!r}")
        self.shard, self.offset, self.size, self.labels = map(np.asarray, (shards, offsets, sizes, labels))
        self.class_names = counted_class_names(labels)
        self.files = None
        self.fingerprint = f"webdataset:{split}:{len(self)}:{files_digest(self.shards)}"

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
