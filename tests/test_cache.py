import errno
import os

import numpy as np
import pytest

from raysv.config import DataConfig
from raysv.corpus.cache import cache_folder, make_once, mapped


def test_the_cache_is_where_the_configuration_or_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAYSV_CACHE", raising=False)
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "raysv"
    monkeypatch.setenv("RAYSV_CACHE", "~/scratch")
    assert cache_folder(DataConfig()) == tmp_path / "home" / "scratch"
    monkeypatch.chdir(tmp_path)
    assert cache_folder(DataConfig(cache="here")) == tmp_path / "here"
    monkeypatch.setenv("RAYSV_CACHE", "here")
    with pytest.raises(ValueError, match="RAYSV_CACHE is here"):
        cache_folder(DataConfig())


def test_a_folder_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        make_once(tmp_path / "cache" / "folder", made.append)
    assert len(made) == 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["folder", "folder.lock"]


def test_a_folder_is_there_when_it_is_complete(tmp_path):
    folder = tmp_path / "folder"

    def make(aside):
        (aside / "one").touch()
        assert not folder.exists()

    make_once(folder, make)
    assert [path.name for path in folder.iterdir()] == ["one"]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_what_could_not_be_completed_is_removed(tmp_path, problem):
    def make(aside):
        (aside / "one").touch()
        raise problem

    with pytest.raises(type(problem)):
        make_once(tmp_path / "folder", make)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.lock"]


@pytest.mark.parametrize("array", [np.arange(5), np.zeros(0, np.int64), np.array([True, False])])
def test_a_mapped_array_is_the_one_that_was_saved(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = mapped(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
    if len(found):
        found[:1] = 7  # a private copy of the page
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
