"""Which launch a folder belongs to: a program that its launcher starts again may go on there without being told to."""

from __future__ import annotations

from pathlib import Path

from fastdiff.durable_files import write_files
from fastdiff.processes import launch_id

LAUNCH = ".launch"


def is_of_this_launch(folder: Path) -> bool:
    """Whether the launch that started this program was the last to open the folder."""
    try:
        return launch_id() == (folder / LAUNCH).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def note_launch(folder: Path) -> None:
    """Write the launch down, in place of an earlier one; OSError, which names the file, where that is not possible."""
    identity = launch_id()
    if identity is None:
        forget_launch(folder)
    elif not is_of_this_launch(folder):
        content = identity.encode()
        write_files({folder / LAUNCH: lambda file: file.write(content)})


def forget_launch(folder: Path) -> None:
    """From now on the folder is of no launch."""
    (folder / LAUNCH).unlink(missing_ok=True)
