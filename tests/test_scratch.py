import os
import signal
import subprocess
import sys
import tempfile
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


def age(folder: Path, seconds: float = 120) -> None:
    then = folder.stat().st_mtime - seconds
    os.utime(folder, (then, then))


def test_a_folder_is_there_while_it_is_used() -> None:
    with scratch() as folder:
        assert folder.is_dir()
        age(folder)
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
        assert [folder.is_dir() for folder in folders] == [True, True]  # too new to be sure of
        for folder in folders:
            age(folder)
        sweep()
        assert [folder.is_dir() for folder in folders] == [True, False]
    finally:
        for process in (living, killed):
            process.kill()
            process.communicate()


def test_only_folders_of_ours_are_removed(temporary: Path) -> None:
    for name in (f"{SCRATCH}x", "other"):
        (temporary / name).mkdir()
        age(temporary / name)
    (temporary / f"{SCRATCH}file").touch()
    age(temporary / f"{SCRATCH}file")
    sweep()
    assert sorted(path.name for path in temporary.iterdir()) == ["other", f"{SCRATCH}file"]
