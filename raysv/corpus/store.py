"""Recordings decoded once and memory-mapped by every worker and trial of the node.

A store is a folder of the cache, named by the hash of what it was made from (paths, sizes, times of change). It holds
`samples.i16`, one recording behind the other; `lengths.npy`, `starts.npy` and `usable.npy`; and `store.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from raysv.corpus.audio import BadAudio, Waveform, read_audio
from raysv.corpus.cache import make_once, mapped
from raysv.corpus.groups import Indices

FORMAT = 2  # a new number makes every store anew
THREADS = min(8, os.cpu_count() or 1)
# Decoded ahead of the recording that is written are this many, but no more once they have so many samples (0.1 GB);
# with two for each thread that may come on top, that bounds the memory of building.
AHEAD, AHEAD_SAMPLES = 64, 50_000_000

Progress = Callable[[int, int], None]
Decoding = Future[Waveform | BadAudio]


class WaveformStore:
    """The samples of a list of recordings, in its order; everything that grows with the list is mapped from disk.

    Attributes:
        lengths: `(recordings,)` samples of each; 0 for one that could not be used.
        usable: indices of the recordings that could be used.
        problems: why the others could not, by their path.
        digest: hash of all samples.

    Raises: FileNotFoundError when the folder is not there, or not whole.
    """

    def __init__(self, folder: Path) -> None:
        description = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.digest: str = description["digest"]
        self.problems: dict[str, str] = description["problems"]
        self.lengths: Indices = mapped(folder / "lengths.npy")
        self.usable: Indices = mapped(folder / "usable.npy")
        self._starts: Indices = mapped(folder / "starts.npy")
        file = folder / "samples.i16"
        # a plain array on the map: slices of a memmap go through Python
        self._samples = (
            np.memmap(file, np.int16, "r").view(np.ndarray) if file.stat().st_size else np.zeros(0, np.int16)
        )

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
    folder = store_folder(paths, cache)
    make_once(folder, lambda aside: _build(paths, aside, progress))
    return WaveformStore(folder)


def store_folder(paths: Sequence[Path], cache: Path) -> Path:
    """Where the store of these recordings, as they are now, lies once it is built."""
    return cache / f"waveforms-{_fingerprint(paths)}"


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


def _build(paths: Sequence[Path], folder: Path, progress: Progress | None) -> None:
    lengths, problems, digest = np.zeros(len(paths), np.int64), {}, hashlib.sha256()
    with (folder / "samples.i16").open("wb") as file:
        for index, outcome in enumerate(_decoded(paths)):
            if isinstance(outcome, BadAudio):
                problems[str(paths[index])] = str(outcome)
            else:
                lengths[index] = len(outcome)
                file.write(outcome.tobytes())
                digest.update(outcome.tobytes())
            if progress:
                progress(index + 1, len(paths))
    digest.update(lengths.tobytes())
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "starts.npy", np.cumsum(lengths) - lengths)
    np.save(folder / "usable.npy", np.flatnonzero(lengths))
    description = {"digest": digest.hexdigest(), "problems": problems}
    (folder / "store.json").write_text(json.dumps(description), encoding="utf-8")


def _decoded(paths: Sequence[Path]) -> Iterator[Waveform | BadAudio]:
    """Every recording in order, decoded by threads a little ahead: libsndfile works outside the interpreter's lock."""

    def decode(path: Path) -> Waveform | BadAudio:
        try:
            return read_audio(path)
        except BadAudio as problem:
            return problem

    with ThreadPoolExecutor(THREADS) as pool:
        remaining, waiting = iter(paths), deque[Decoding]()
        while True:
            while _may_decode(waiting) and (path := next(remaining, None)) is not None:
                waiting.append(pool.submit(decode, path))
            if not waiting:
                return
            yield waiting.popleft().result()


def _may_decode(waiting: Collection[Decoding]) -> bool:
    """Whether another recording may be decoded ahead of these."""
    done = [each.result() for each in waiting if each.done()]
    samples = sum(len(outcome) for outcome in done if not isinstance(outcome, BadAudio))
    return len(waiting) < AHEAD and len(waiting) - len(done) < 2 * THREADS and samples < AHEAD_SAMPLES
