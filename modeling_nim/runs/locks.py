"""One run at a time in an output directory: two would mix their logs, records and checkpoints."""

import errno
import fcntl
import os
import socket
import threading
import warnings

from accelerate import Accelerator

from .processes import on_main_process


LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems

# The lock belongs to the process, and closing any descriptor of its file gives it up: one descriptor each, kept here,
# with the thread that took it. When that thread locks again, its earlier run has ended, well or with an exception.
_held: dict[str, tuple[int, threading.Thread]] = {}


def lock_directory(directory: str | os.PathLike) -> None:
    """Makes `directory` and takes it for this process until `unlock_directory` or the process's end, a kill too.

    The lock is a POSIX record lock of `directory/.lock`, which NFS passes on to its server. Where the file system has
    no locks, there is a warning instead. Raises ValueError naming host and process of who has it.
    """
    path = os.path.join(os.path.realpath(directory), LOCK_FILE)
    if path in _held:
        if _held[path][1] is threading.current_thread() or not _held[path][1].is_alive():
            return
        raise ValueError(_in_use(directory, f"another thread of process {os.getpid()} on {socket.gethostname()}"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(_in_use(directory, holder or "another process")) from None
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, path) from None
        warnings.warn(f"{path!r} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
        return
    _held[path] = (descriptor, threading.current_thread())
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        unlock_directory(directory)
        raise OSError(error.errno, error.strerror, path) from None


def unlock_directory(directory: str | os.PathLike) -> None:
    """Releases the directory; does nothing if this process does not hold it. The lock's file stays."""
    held = _held.pop(os.path.join(os.path.realpath(directory), LOCK_FILE), None)
    if held is not None:
        os.close(held[0])


def lock_output_dir(accelerator: Accelerator, output_dir: str | os.PathLike) -> None:
    """`lock_directory` in the main process, for all of them; every process must call it, and each is refused."""
    on_main_process(accelerator, lambda: lock_directory(output_dir))


def _in_use(directory: str | os.PathLike, holder: str) -> str:
    return f"{str(directory)!r} is in use by {holder}; wait for it, stop it, or name another output_dir"
