"""Recordings decoded once and memory-mapped by every worker and trial of the node.

A store is a folder named by the hash of what it was made from (paths, sizes, times of change), with `samples.i16`,
`lengths.npy` and `store.json`. It is built aside under a lock and moved into place when it is complete, so that many
processes may ask for it at once and a killed one leaves nothing half-done behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raysv.corpus.audio import BadAudio, Waveform, read_audio

FORMAT = 1  # a new number makes every store anew
AHEAD = 64  # recordings decoded ahead of the one that is written: bounds the memory of building

Progress = Callable[[int, int], None]


class WaveformStore:
    """The samples of a list of recordings, in its order.

    Attributes:
        lengths: `(recordings,)` samples of each; 0 for one that could not be used.
        usable: indices of the recordings that could be used.
        problems: why the others could not, by their path.
        digest: hash of all samples.
    """

    def __init__(self, folder: Path) -> None:
        description = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.digest: str = description["digest"]
        self.problems: dict[str, str] = description["problems"]
        self.lengths: npt.NDArray[np.int64] = np.load(folder / "lengths.npy")
        self.usable: npt.NDArray[np.int64] = np.flatnonzero(self.lengths)
        self._starts = np.cumsum(self.lengths) - self.lengths
        total = int(self.lengths.sum())
        file = folder / "samples.i16"
        self._samples = np.memmap(file, np.int16, "r", shape=(total,)) if total else np.zeros(0, np.int16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Waveform:
        """The samples of one recording, `(samples,)` int16, without copying them."""
        start = self._starts[index]
        return self._samples[start : start + self.lengths[index]]

    def __reduce__(self) -> tuple[Any, ...]:
        return WaveformStore, (self.folder,)  # a copy in another process maps the same file


def open_store(paths: Sequence[Path], cache: Path, progress: Progress | None = None) -> WaveformStore:
    """The store of these recordings, built first where it does not exist yet.

    Args:
        cache: the folder that keeps stores, on a disk of this node.
        progress: called with the number of recordings decoded and their total while building.

    Raises: OSError when the cache cannot be written, a full disk included; what was written is removed.
    """
    folder = cache / f"waveforms-{_fingerprint(paths)}"
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _build(paths, folder, progress)
    except OSError as error:
        raise OSError(
            f"{cache} cannot keep decoded recordings: {error}. Name a folder with room by data.cache or RAYSV_CACHE."
        ) from error
    return WaveformStore(folder)


def _fingerprint(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for path in paths:
        try:
            status = path.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = "missing"
        digest.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(paths: Sequence[Path], folder: Path, progress: Progress | None) -> None:
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: the lock is ours now
    aside.mkdir()
    try:
        lengths, problems, digest = np.zeros(len(paths), np.int64), {}, hashlib.sha256()
        with (aside / "samples.i16").open("wb") as file:
            for index, outcome in enumerate(_decoded(paths)):
                if isinstance(outcome, BadAudio):
                    problems[str(paths[index])] = str(outcome)
                else:
                    lengths[index] = len(outcome)
                    file.write(outcome.tobytes())
                    digest.update(outcome.tobytes())
                if progress:
                    progress(index + 1, len(paths))
            file.flush()
            os.fsync(file.fileno())
        np.save(aside / "lengths.npy", lengths)
        digest.update(lengths.tobytes())
        description = {"digest": digest.hexdigest(), "problems": problems}
        (aside / "store.json").write_text(json.dumps(description), encoding="utf-8")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _decoded(paths: Sequence[Path]) -> Iterator[Waveform | BadAudio]:
    """Every recording in order, decoded by threads a little ahead: libsndfile works outside the interpreter's lock."""

    def decode(path: Path) -> Waveform | BadAudio:
        try:
            return read_audio(path)
        except BadAudio as problem:
            return problem

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        remaining = iter(paths)
        waiting = [pool.submit(decode, path) for path in islice(remaining, AHEAD)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(decode, path) for path in islice(remaining, 1)]
