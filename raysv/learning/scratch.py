"""Temporary folders of processes that may be killed: the next one removes what they leave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SCRATCH = "raysv-checkpoint-"  # temporary folders, in which a checkpoint is made before it is kept


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, held for as long as it is used; where there are no locks, nobody removes it either."""
    with contextlib.ExitStack() as stack:
        yield _new_folder(stack)


def sweep() -> None:
    """Remove the temporary folders that killed processes left: those that nobody holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), _held(folder):  # held, another user's, or gone meanwhile
            shutil.rmtree(folder)


def _new_folder(stack: contextlib.ExitStack) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        try:
            stack.enter_context(_held(folder))
        except (BlockingIOError, FileNotFoundError):
            continue  # swept between its making and its holding
        except OSError:
            pass
        if folder.exists():
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, until the end of this process if it is killed.

    Raises: BlockingIOError when another process holds it; OSError.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
