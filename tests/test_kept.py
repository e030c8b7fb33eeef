import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from learning_fixtures import write_audio, write_corpus

from raysv.config import AugmentConfig, DataConfig
from raysv.corpus import kept, loading
from raysv.corpus.cache import cache_folder
from raysv.corpus.kept import open_kept
from raysv.corpus.loading import load_corpus, open_corpus
from raysv.corpus.sets import arrays

NOISY, QUIET = AugmentConfig(kinds=["noise", "babble", "reverb"]), AugmentConfig(strength=0.0)


@pytest.fixture
def data(tiny_corpus):
    return DataConfig(root=str(tiny_corpus))


@pytest.fixture
def no_reading(monkeypatch):
    """From its call on, no list may be read and no audio looked at."""

    def refuse(*arguments, **options):
        raise AssertionError("it reads")

    def start():
        for name in ("read_utterances", "read_pair_list", "read_clips", "open_store"):
            monkeypatch.setattr(loading, name, refuse)

    return start


def contents(corpus):
    """All that a corpus says, as plain values."""
    sets = {"train": corpus.train, "dev": corpus.dev, **corpus.tests}
    told = {(name, key): array.tolist() for name, part in sets.items() for key, array in arrays(part).items()}
    told |= {name: [store_contents(part.store)] for name, part in sets.items()}
    told |= {kind: store_contents(store) for kind, store in corpus.clips.items()}
    return told | {"speakers": corpus.train.speakers, "left out": corpus.left_out, "digest": corpus.digest}


def store_contents(store):
    return [waveform.tolist() for waveform in store], store.problems, store.digest


def forget(data):
    """Leave the stores and forget the corpora."""
    for folder in cache_folder(data).glob("corpus-*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


@pytest.mark.parametrize("tests", [False, True])
@pytest.mark.parametrize("augment", [NOISY, QUIET])
def test_a_kept_corpus_is_opened_without_reading(tiny_corpus, data, no_reading, augment, tests):
    write_audio(tiny_corpus / "train-0/0.wav", np.zeros(2000))
    data = DataConfig(root=str(tiny_corpus), skip_bad_audio=True)
    loaded = load_corpus(data, augment, tests=tests)
    no_reading()
    opened = open_corpus(data, augment, loaded.digests, tests=tests)
    assert contents(opened) == contents(loaded)
    assert list(opened.left_out.values()) == ["it is silent from beginning to end"]


def test_everything_that_grows_with_the_lists_is_mapped(data):
    corpus = load_corpus(data, NOISY, tests=True)
    held = [array for part in (corpus.train, corpus.dev, corpus.tests["test"]) for array in arrays(part).values()]
    for store in (corpus.train.store, corpus.dev.store, *corpus.clips.values()):
        held += [store.lengths, store.usable, store._starts, store._samples]
    for array in held:
        while not isinstance(array, np.memmap):
            assert isinstance(array.base, np.ndarray)
            array = array.base


def test_a_changed_list_is_noticed_by_a_check_and_kept_beside_the_earlier(tiny_corpus, data, no_reading):
    before = load_corpus(data, QUIET)
    lines = (tiny_corpus / "dev_pairs.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (tiny_corpus / "dev_pairs.txt").write_text("".join(lines[:-1]), encoding="utf-8")
    after = load_corpus(data, QUIET)
    no_reading()
    for corpus, count in ((before, len(lines)), (after, len(lines) - 1)):
        assert len(open_corpus(data, QUIET, corpus.digests).dev.same_speaker) == count


@pytest.mark.parametrize("changed", ["train-0/0.wav", "dev-0/10.wav", "test-3/20.wav", "noise/0.wav"])
def test_changed_audio_is_noticed_by_a_check(tiny_corpus, data, no_reading, changed):
    before = load_corpus(data, NOISY, tests=True)
    write_audio(tiny_corpus / changed, np.linspace(-0.5, 0.5, 3000))
    after = load_corpus(data, NOISY, tests=True)
    no_reading()
    opened = open_corpus(data, NOISY, after.digests, tests=True)
    assert contents(opened) == contents(after) != contents(before)


def test_parts_that_a_configuration_does_not_ask_for_are_left(data):
    checked = load_corpus(data, NOISY, tests=True).digests
    assert contents(open_corpus(data, QUIET, checked)) == contents(load_corpus(data, QUIET))


def test_a_node_that_has_nothing_loads_it_once(data, monkeypatch, tmp_path, no_reading):
    checked = load_corpus(data, NOISY).digests
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "other node"))
    assert open_corpus(data, NOISY, checked).digests == checked
    no_reading()
    assert open_corpus(data, NOISY, checked).digests == checked


def test_a_node_with_other_lists_than_were_checked_is_refused(tiny_corpus, data, monkeypatch, tmp_path):
    checked = load_corpus(data, NOISY).digests
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "another node"))
    pairs = tiny_corpus / "dev_pairs.txt"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[3:]))
    with pytest.raises(ValueError, match=r"dev pairs below .* differ from what was checked"):
        open_corpus(data, NOISY, checked)


def test_without_an_earlier_check_everything_is_checked(tiny_corpus, data):
    load_corpus(data, QUIET)
    write_audio(tiny_corpus / "train-0/0.wav", np.zeros(2000))
    with pytest.raises(ValueError, match="1 recordings cannot be used"):
        open_corpus(data, QUIET, {})


def test_the_same_data_elsewhere_tells_its_own_paths(tiny_corpus, tmp_path):
    write_audio(tiny_corpus / "train-0/0.wav", np.zeros(2000))
    moved = shutil.copytree(tiny_corpus, tmp_path / "moved")
    here, there = (load_corpus(DataConfig(root=str(root), skip_bad_audio=True), QUIET) for root in (tiny_corpus, moved))
    assert here.digests == there.digests
    assert list(there.left_out) == [str(moved / "train-0/0.wav")]


def test_a_store_that_was_deleted_is_made_again(data):
    loaded = load_corpus(data, NOISY)
    told = contents(loaded)
    shutil.rmtree(loaded.clips["reverb"].folder)
    assert open_kept(loaded.digests, cache_folder(data)) is None
    assert contents(open_corpus(data, NOISY, loaded.digests)) == told


def test_a_corpus_that_points_to_a_deleted_store_is_kept_anew(tiny_corpus, data, no_reading):
    loaded = load_corpus(data, QUIET)
    shutil.rmtree(loaded.train.store.folder)
    path = tiny_corpus / "train-0/0.wav"
    os.utime(path, (0, 0))  # the same samples make another store
    again = load_corpus(data, QUIET)
    assert again.digests == loaded.digests
    no_reading()
    assert open_corpus(data, QUIET, again.digests).train.store.folder == again.train.store.folder


def test_a_cache_that_has_everything_need_not_be_written(data, monkeypatch):
    loaded = load_corpus(data, NOISY)

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr("raysv.corpus.cache.alone", refuse)
    monkeypatch.setattr("raysv.corpus.kept.alone", refuse)
    monkeypatch.setattr("raysv.corpus.loading.alone", refuse)
    assert load_corpus(data, NOISY).digests == open_corpus(data, NOISY, loaded.digests).digests == loaded.digests


def test_names_may_have_spaces_and_any_letters(tmp_path, monkeypatch, no_reading):
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "Zwischen lager ü"))
    root = write_corpus(tmp_path / "корпус 日本")
    shutil.move(root / "train-0", root / "träin 0")
    text = (root / "train.csv").read_text(encoding="utf-8").replace("train-0", "träin 0")
    (root / "train.csv").write_text(text, encoding="utf-8")
    data = DataConfig(root=str(root), test_pairs={"a/b ü": "test_pairs.txt"})
    loaded = load_corpus(data, NOISY, tests=True)
    no_reading()
    opened = open_corpus(data, NOISY, loaded.digests, tests=True)
    assert "träin 0" in opened.train.speakers
    assert contents(opened) == contents(loaded)


def test_nothing_is_written_into_the_corpus(tiny_corpus, data):
    def found():
        return {path: path.stat().st_mtime_ns for path in [tiny_corpus, *tiny_corpus.rglob("*")]}

    before = found()
    open_corpus(data, NOISY, load_corpus(data, NOISY, tests=True).digests)
    assert found() == before


def _in_processes(work, count):
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(count), context.Queue()
    processes = [context.Process(target=work, args=(start, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return found


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_several_processes_one_loads_and_the_others_wait(data, monkeypatch):
    checked = load_corpus(data, NOISY).digests
    forget(data)
    load = load_corpus
    loads = []

    def slowly(*arguments, **options):
        loads.append("one")
        time.sleep(0.2)
        return load(*arguments, **options)

    monkeypatch.setattr(loading, "load_corpus", slowly)

    def work(start, answers):
        start.wait()
        answers.put((open_corpus(data, NOISY, checked).digests, len(loads)))

    assert sorted(_in_processes(work, 3), key=str) == [(checked, 0), (checked, 0), (checked, 1)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_killed_while_it_keeps_a_corpus_leaves_no_obstacle(data):
    checked = load_corpus(data, NOISY).digests
    forget(data)

    process = multiprocessing.get_context("fork").Process(target=_killed, args=(data, checked))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    leftover = next(cache_folder(data).glob("corpus-*.partial"))
    assert not (leftover / "corpus.json").exists()
    assert open_corpus(data, NOISY, checked).digests == checked
    assert not leftover.exists()


def _killed(data, checked):
    kept.np.save = _tear  # in this process alone
    open_corpus(data, NOISY, checked)


def _tear(path, array):
    path.write_bytes(b"torn")
    os.kill(os.getpid(), signal.SIGKILL)
