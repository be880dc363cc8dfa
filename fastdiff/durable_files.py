"""Files that are there as a whole or not at all, even after a power failure; a folder that one run has to itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

LOCK = ".lock"


def write_files(writers: Mapping[Path, Callable[[IO[bytes]], object]]) -> None:
    """Let each writer fill its file; the files get their names when all of them are on the disk.

    Raises OSError naming the file that cannot be written; what is not written then leaves nothing behind.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    path: Path | None = None
    try:
        for path, write in writers.items():
            with open(temporaries[path], "wb") as file:
                write(file)
        # only then: one flush of a disk's journal may do for all of them
        for path in writers:
            flush(temporaries[path])
        for path in writers:
            os.replace(temporaries[path], path)
        for folder in {path.parent for path in writers}:
            flush(folder)
    except BaseException as error:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_leftover(path: Path) -> bool:
    """A lock, or of a process that was killed while it wrote."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def alone_in(folder: Path, option: str) -> Iterator[None]:
    """Hold a lock on a folder, which the system frees however the process ends.

    Raises ValueError, naming the process and the option that chose the folder, where another one holds it. Where the
    file system knows no locks, a warning says so.
    """
    path = folder / LOCK
    descriptor = _locked(path, option)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, option: str) -> int:
    """The descriptor of a lock file that is held, and is the one at `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{option} {path.parent} is being written by {holder}: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{path.parent} cannot be locked against a second run: {error.strerror}", stacklevel=4)
            return descriptor
        # its last holder may have removed it meanwhile
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)
