"""Temporary folders of processes that may be killed: the next one removes what they leave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SCRATCH = "raysv-tmp-"  # what their names begin with; short, for Ray's sockets lie in one
PATIENCE_SECONDS = 10  # with processes that end, and still write there


@contextlib.contextmanager
def scratch(parent: str | None = None) -> Iterator[Path]:
    """A temporary folder, held for as long as it is used; where there are no locks, nobody removes it either.

    Args:
        parent: where to make it; the system's folder for such if not given.
    """
    with contextlib.ExitStack() as stack:
        yield _new_folder(stack, parent)


def sweep(parent: str | None = None) -> None:
    """Remove the temporary folders that killed processes left: those that nobody holds."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), _held(folder):  # held, another user's, or gone meanwhile
            shutil.rmtree(folder)


def _new_folder(stack: contextlib.ExitStack, parent: str | None) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        try:
            stack.enter_context(_held(folder))
        except (BlockingIOError, FileNotFoundError):
            continue  # swept between its making and its holding
        except OSError:
            pass
        if folder.exists():
            stack.callback(_remove, folder)
            return folder


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.1)


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
