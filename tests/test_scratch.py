import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from raysv.learning.scratch import SCRATCH, scratch, sweep

HOLD = """
import time
from raysv.learning.scratch import scratch
with scratch() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_there_while_it_is_used() -> None:
    with scratch() as folder:
        assert folder.is_dir()
        sweep()
        assert folder.is_dir()
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(temporary: Path) -> None:
    living, killed = (subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in "ab")
    try:
        folders = [Path(str(process.stdout and process.stdout.readline()).strip()) for process in (living, killed)]
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        sweep()
        assert [folder.is_dir() for folder in folders] == [True, False]
    finally:
        for process in (living, killed):
            process.kill()
            process.communicate()


def test_only_folders_of_ours_are_removed(temporary: Path) -> None:
    for name in (f"{SCRATCH}x", "other"):
        (temporary / name).mkdir()
    (temporary / f"{SCRATCH}file").touch()
    sweep()
    assert sorted(path.name for path in temporary.iterdir()) == ["other", f"{SCRATCH}file"]


def test_a_folder_that_is_swept_before_it_is_held_is_made_again(temporary: Path) -> None:
    ended = threading.Event()

    def sweep_all_the_time() -> None:
        while not ended.is_set():
            sweep()

    sweeper = threading.Thread(target=sweep_all_the_time)
    sweeper.start()
    try:
        for _ in range(300):
            with scratch() as folder:
                (folder / "file").touch()
                assert [path.name for path in folder.iterdir()] == ["file"]
    finally:
        ended.set()
        sweeper.join()
    assert list(temporary.iterdir()) == []
