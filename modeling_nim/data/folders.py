"""Folders of images, listed once: 1.28 million files cost minutes on a network disk, in every process."""

import hashlib
import json
import os
import stat
import time

from ..runs.files import WriteError, write_text
from .base import IMAGE_SUFFIXES, ImageSource, file_bytes


KEEP_FROM_FILES = 10_000
_SETTLED_AFTER_NS = 2 * 10**9  # a folder that changed just now may change again within one tick of its clock


class FolderSource(ImageSource):
    """`path/split/class/image`, the classes in sorted order; names that begin with a dot are left out.

    The listing of a large folder is kept in the user's cache and used again while the modification times of all its
    folders are the same. So added, removed and renamed files are noticed, but not a file that is overwritten in place.
    """

    def __init__(self, path: str, split: str):
        self.root = os.path.join(path, split)
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f"there is no folder {self.root!r}; data.path must hold {split!r}/CLASS/IMAGE")
        listing = _kept_listing(self.root) or _make_listing(self.root)
        self.class_names = listing["class_names"]
        self.files, self.labels = listing["files"], listing["labels"]
        if not self.files:
            raise FileNotFoundError(
                f"no images under {self.root!r}; it must hold one folder per class with files ending in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        self.fingerprint = f"folder:{split}:{len(self)}:{listing['digest']}"

    def __len__(self):
        return len(self.files)

    def stored(self, index):
        return file_bytes(os.path.join(self.root, self.files[index]), self.files[index]), self.labels[index]

    def image_id(self, index):
        return self.files[index]


def _make_listing(root: str) -> dict:
    """Names, labels, the digest of names and sizes, and when each folder changed; a large one is kept."""
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    files, labels, digest = [], [], hashlib.sha256()
    changed_ns = {"": os.stat(root).st_mtime_ns}
    for label, name in enumerate(class_names):
        for folder, subfolders, names in os.walk(os.path.join(root, name)):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            relative = os.path.relpath(folder, root)
            changed_ns[relative] = os.stat(folder).st_mtime_ns
            for file in sorted(names):
                if file.lower().endswith(IMAGE_SUFFIXES) and file[0] != ".":
                    files.append(os.path.join(relative, file))
                    labels.append(label)
                    status = os.stat(os.path.join(folder, file))
                    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
                        raise ValueError(f"{os.path.join(folder, file)!r} is no file; take it out of the images")
                    digest.update(os.fsencode(f"{files[-1]}:{status.st_size}\n"))
    listing = {"class_names": class_names, "files": files, "labels": labels, "digest": digest.hexdigest()[:16]}
    if len(files) >= KEEP_FROM_FILES and max(changed_ns.values()) < time.time_ns() - _SETTLED_AFTER_NS:
        try:
            write_text(_listing_path(root), json.dumps(listing | {"changed_ns": changed_ns}))
        except WriteError:
            pass  # no room in the cache: the folder is listed again the next time
    return listing


def _kept_listing(root: str) -> dict | None:
    """The listing of an earlier start, if no folder has changed since."""
    try:
        with open(_listing_path(root), encoding="utf-8") as file:
            listing = json.load(file)
        unchanged = all(
            os.stat(os.path.join(root, folder)).st_mtime_ns == then for folder, then in listing["changed_ns"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return listing if unchanged else None


def _listing_path(root: str) -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:32]
    return os.path.join(cache, "modeling_nim", "listings", f"{name}.json")
