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

SCRATCH = "raysv-checkpoint-"  # temporary folders, in which a checkpoint is made before it is kept
ABANDONED_SECONDS = 60  # from when on a folder that nobody holds is taken for left behind


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, held for as long as it is used; where there are no locks, nobody removes it either."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_held(Path(folder)))
        yield Path(folder)


def sweep() -> None:
    """Remove the temporary folders that killed processes left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):  # held, another user's, or gone meanwhile
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                with _held(folder):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, until the end of this process if it is killed.

    Raises: OSError when another process holds it.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
