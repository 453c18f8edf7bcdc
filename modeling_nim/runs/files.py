"""Files that are complete or absent: written under a temporary name, brought to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


INCOMPLETE = ".incomplete"  # the ending of a temporary name


class WriteError(OSError):
    """What could not be written, why, and what to do."""


@contextmanager
def naming_path(path: str | os.PathLike) -> Iterator[None]:
    """Raises WriteError naming `path` for what cannot be written under it: a full disk, a quota, a read-only directory.

    safetensors and torch have errors of their own for it, without a path.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):  # torch.save's errors name its zip file, not the disk
            if not any(word in reason for word in ("PytorchStreamWriter", "inline_container", "iostream")):
                raise
            reason = "torch.save came to no end; is the disk full?"
        raise WriteError(
            f"cannot write {str(path)!r} ({reason}); what was there before is intact: make room, or make it writable, "
            "and give the same command again"
        ) from error


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path; the file or directory that is written there becomes `path`, or is removed on an error.

    The folder of `path` is made. A file that was at `path` is replaced; a WriteError names it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + INCOMPLETE)
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a run that was killed
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            _sync_one(path.parent)
        except BaseException:
            remove(temporary)
            raise


def remove(path: str | os.PathLike) -> None:
    """Removes a file or a directory, if there is one and it can be removed."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def sync(path: str | os.PathLike) -> None:
    """Brings a file, or all files of a directory, to the disk: no power cut after a rename leaves an empty file."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_one(os.path.join(folder, name))
    _sync_one(path)


def _sync_one(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file in one piece or not at all; its folder is made."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str | os.PathLike, records: Sequence[dict[str, Any]]) -> None:
    """`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_text(path: str | os.PathLike, text: str) -> None:
    """Adds whole lines to a log and brings them to the disk; readers leave out the piece that a killed run wrote."""
    with naming_path(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
