"""What is made once per node and read by all of its processes: folders that are complete as soon as they exist.

A folder's name says what it was made from. It is made aside, under a lock, and moved into place, so that many processes
may ask for it at once and a killed one leaves nothing half-done behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysv.config import DataConfig


def cache_folder(data: DataConfig) -> Path:
    """Where decoded waveforms, read lists and the embedded corpus are kept.

    Raises: ValueError when RAYSV_CACHE is a relative path.
    """
    if data.cache:
        return Path(data.cache).expanduser().absolute()
    chosen = Path(os.environ.get("RAYSV_CACHE") or "~/.cache/raysv").expanduser()
    if not chosen.is_absolute():
        raise ValueError(f"RAYSV_CACHE is {chosen}, but every worker runs in a folder of its own. Make it absolute.")
    return chosen


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill a folder, unless it is there already; another process that makes it is waited for.

    Raises: OSError when it cannot be written, a full disk included; what was written is removed.
    """
    if folder.is_dir():
        return
    try:
        with alone(folder):
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        raise OSError(
            f"{folder.parent} cannot keep decoded recordings and their lists: {error}. Name a folder with room by "
            "data.cache or RAYSV_CACHE."
        ) from error


@contextlib.contextmanager
def alone(path: Path, purpose: str = "") -> Iterator[None]:
    """Only one process of the node at a time is here for this path and purpose; a killed one does not stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}{purpose}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mapped(file: Path) -> npt.NDArray[Any]:
    """An array that `np.save` wrote, mapped: its pages are shared by all processes, and memory to take back at need."""
    array: npt.NDArray[Any] = np.load(file, mmap_mode="c")  # nobody writes, but PyTorch warns of what is read-only
    return array.view(np.ndarray)


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: the lock is ours now
    aside.mkdir()
    try:
        make(aside)
        for path in aside.iterdir():  # a name must not reach the disk before what it stands for
            with path.open("rb") as file:
                os.fsync(file.fileno())
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
