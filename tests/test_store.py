import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysv.config import SAMPLE_RATE
from raysv.corpus import store
from raysv.corpus.audio import read_audio
from raysv.corpus.store import open_store


def write(path, seed=0, samples=500):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).integers(-999, 999, samples).astype(np.int16), SAMPLE_RATE)
    return path


@pytest.fixture
def recordings(tmp_path):
    """More than are decoded ahead, of different lengths, with spaces and letters of all kinds in their names."""
    return [write(tmp_path / "aufnahmen é 日本" / f"{number} ä.wav", number, 100 + number) for number in range(80)]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "below"


def test_recordings_come_back_in_order_with_their_own_samples(recordings, cache):
    opened = open_store(recordings[::-1], cache)
    assert len(opened) == 80
    assert opened.lengths.tolist() == list(range(179, 99, -1))
    assert opened.usable.tolist() == list(range(80))
    for waveform, path in zip(opened, recordings[::-1], strict=True):
        np.testing.assert_array_equal(waveform, read_audio(path))


def mapped_file(waveform):
    """The file that an array's memory is a map of."""
    base = waveform
    while not isinstance(base, np.memmap):
        base = base.base
    return base.filename


def test_samples_are_mapped_from_disk_and_cannot_be_changed(recordings, cache):
    opened = open_store(recordings, cache)
    waveform = opened[3]
    assert mapped_file(waveform) == opened.folder / "samples.i16"
    assert not waveform.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        waveform[0] = 1


def test_a_pickled_store_maps_the_same_file(recordings, cache):
    opened = open_store(recordings, cache)
    data = pickle.dumps(opened)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert mapped_file(copy[7]) == mapped_file(opened[7])
    np.testing.assert_array_equal(copy[7], opened[7])


def test_a_store_is_built_once_with_progress_and_then_reused(recordings, cache):
    calls = []
    open_store(recordings, cache, lambda *done: calls.append(done))
    assert calls == [(number, 80) for number in range(1, 81)]
    open_store(recordings, cache, lambda *done: calls.append(done))
    assert len(calls) == 80


def test_a_changed_recording_makes_a_new_store(recordings, cache):
    first = open_store(recordings, cache)
    write(recordings[5], seed=99, samples=105)
    status = recordings[5].stat()
    os.utime(recordings[5], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = open_store(recordings, cache)
    assert second.digest != first.digest
    np.testing.assert_array_equal(second[5], read_audio(recordings[5]))
    assert not np.array_equal(first[5], second[5])


def test_the_digest_follows_the_audio_not_where_it_lies(tmp_path, cache):
    here, there = [[write(tmp_path / place / f"{n}.wav", n) for n in range(3)] for place in ("here", "there")]
    assert open_store(here, cache).digest == open_store(there, cache).digest
    assert open_store(here[::-1], cache).digest != open_store(here, cache).digest
    assert open_store(here[:2], cache).digest != open_store(here, cache).digest


def test_the_digest_knows_where_a_recording_ends(tmp_path, cache):
    samples = np.arange(1, 301, dtype=np.int16)
    digests = set()
    for cut in (100, 200):
        paths = [tmp_path / f"{cut}-{part}.wav" for part in "ab"]
        for path, part in zip(paths, np.split(samples, [cut]), strict=True):
            soundfile.write(path, part, SAMPLE_RATE)
        digests.add(open_store(paths, cache).digest)
    assert len(digests) == 2


def test_bad_recordings_are_listed_and_the_rest_is_kept(tmp_path, cache):
    good = [write(tmp_path / f"{number}.wav", number) for number in range(2)]
    broken, missing = tmp_path / "broken ü.wav", tmp_path / "missing.wav"
    broken.write_bytes(b"no audio")
    opened = open_store([missing, good[0], broken, good[1]], cache)
    assert opened.problems.keys() == {str(broken), str(missing)}
    assert opened.problems[str(missing)] == "there is no such file"
    assert opened.usable.tolist() == [1, 3]
    assert opened.lengths.tolist() == [0, 500, 0, 500]
    assert len(opened[0]) == 0
    np.testing.assert_array_equal(opened[3], read_audio(good[1]))


def test_a_store_of_nothing_but_bad_recordings_can_be_opened(tmp_path, cache):
    opened = open_store([tmp_path / "missing.wav"], cache)
    assert opened.usable.tolist() == []
    assert len(opened[0]) == 0


def test_a_recording_that_was_mended_is_usable(tmp_path, cache):
    path = tmp_path / "a.wav"
    assert open_store([path], cache).problems
    write(path)
    assert not open_store([path], cache).problems


def _open_together(paths, cache, start, calls):
    start.wait()
    count = []
    opened = open_store(paths, cache, lambda *done: count.append(done))
    calls.put((len(count), opened.digest))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_ask_at_once_build_once(recordings, cache, monkeypatch):
    def slowly(path):
        time.sleep(0.01)
        return read_audio(path)

    monkeypatch.setattr(store, "read_audio", slowly)
    context = multiprocessing.get_context("fork")
    start, calls = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_open_together, args=(recordings, cache, start, calls)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [calls.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 0, 80]
    assert len({digest for _, digest in results}) == 1


def test_what_a_killed_build_left_is_no_obstacle(recordings, cache):
    folder = open_store(recordings, cache).folder
    leftover = folder.with_suffix(".partial")
    folder.rename(leftover)
    (leftover / "lengths.npy").unlink()
    (leftover / "samples.i16").write_bytes(b"torn")
    opened = open_store(recordings, cache)
    np.testing.assert_array_equal(opened[79], read_audio(recordings[79]))
    assert not leftover.exists()


def test_an_interrupted_build_removes_what_it_wrote(recordings, cache):
    def interrupt(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(recordings, cache, interrupt)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(open_store(recordings, cache)) == 80


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(recordings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/cache cannot keep.*Name a folder with room by data\.cache"):
        open_store(recordings, tmp_path / "file" / "cache")


def test_a_full_disk_is_named_and_leaves_nothing_behind(recordings, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"{cache} cannot keep decoded recordings and their lists: .*No space left"):
        open_store(recordings, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_paths_need_not_be_absolute(tmp_path, monkeypatch):
    write(tmp_path / "a.wav")
    monkeypatch.chdir(tmp_path)
    assert open_store([Path("a.wav")], Path("cache")).lengths.tolist() == [500]


def test_long_recordings_are_not_decoded_far_ahead(tmp_path, monkeypatch):
    """Of a writer that does not keep up with the threads."""
    decoded, ahead = [], []

    def read(path):
        decoded.append(path)
        return np.zeros(store.AHEAD_SAMPLES // 4, np.int16)

    monkeypatch.setattr(store, "read_audio", read)
    for written, _ in enumerate(store._decoded([tmp_path] * 60)):
        time.sleep(0.01)
        ahead.append(len(decoded) - written)
    assert len(ahead) == len(decoded) == 60
    assert max(ahead) <= 4 + 2 * store.THREADS
