"""Tune's record of its trials, which it writes over in place every second, and a copy should its driver die then.

Tune takes the files that are last by name, and names them by the time at which their driver began.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from ray.tune import Callback

TRIALS = "experiment_state-*.json"
KINDS = (TRIALS, "search_gen_state-*.json", "searcher-state-*.pkl", "callback-states-*.pkl")  # one of each by a driver
TUNER = "tuner.pkl"
BEGAN = "%Y-%m-%d_%H-%M-%S"
PATIENCE_SECONDS = 60  # for a clock that was set back


def newest(folder: Path) -> Path | None:
    """The newest snapshot of the trials in Tune's folder, of its spare where that is torn; none where there is none.

    Raises: ValueError when it is torn and there is no spare.
    """
    file = _last(folder, TRIALS)
    if file is None or _is_whole(file):
        return file
    spare = _spare(folder)
    if spare is None:
        raise _torn(file)
    return _last(spare, TRIALS)


def mend(folder: Path) -> str:
    """Before Tune goes on: put the spare in the place of a record that is torn, all of it, as files belong together.

    Args:
        folder: Tune's, of a stage.

    Returns: what was done, empty if there was nothing to do.
    Raises: ValueError when there is no spare, or by this machine's clock the last driver has not begun yet.
    """
    last = max((file for kind in KINDS for file in folder.glob(kind)), key=_session, default=None)
    if last is None:
        return ""
    _await(datetime.strptime(_session(last), BEGAN))
    if _whole_set(folder, _session(last)):
        return ""
    spare = _spare(folder)
    if spare is None and any(file.stat().st_size for file in folder.glob("*/result.json")):
        raise _torn(last)
    for kind in KINDS:
        for file in folder.glob(kind):
            file.unlink()
    if spare is None:
        return ""  # killed in its first second: it starts anew
    for file in spare.iterdir():
        _copy(file, folder / file.name)
    return f"Tune's record in {folder} was torn when its driver was killed; the study goes on from the copy of it."


def forget(folder: Path) -> None:
    """Remove the spares of a stage that starts anew."""
    shutil.rmtree(_home(folder), ignore_errors=True)


class Spare(Callback):
    """Puts a copy of Tune's record aside now and then, beside Tune's folder.

    Args:
        folder: Tune's, of the stage.
        every_seconds: between copies; at most a hundredth of the time goes into them.
    """

    def __init__(self, folder: Path, every_seconds: float = 2.0) -> None:
        self._folder, self._every = folder, every_seconds

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the clock of this driver; the first copy is made as soon as there is something to be copied."""
        self._due = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Copy what the driver has just written and is about to send to storage: it is whole, and of one moment."""
        began = time.monotonic()
        if began < self._due or not trials:
            return
        if set_aside(Path(trials[0].storage.experiment_driver_staging_path), self._folder):
            ended = time.monotonic()
            self._due = ended + max(self._every, 100 * (ended - began))


def set_aside(staging: Path, folder: Path) -> bool:
    """Copy the last driver's files to the spares of Tune's folder, and remove the spares before.

    Returns: whether all of them were there and whole.
    """
    last = _last(staging, TRIALS)
    files = _whole_set(staging, _session(last), tuner=folder) if last else []
    if not files:
        return False
    before = sorted(_spares(folder))
    number = int(before[-1].name) + 1 if before else 1
    aside = _home(folder) / f"{number:06d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in files:
        _copy(file, aside / file.name)
    aside.rename(aside.with_suffix(""))
    for other in before:
        shutil.rmtree(other)
    return True


def _await(began: datetime) -> None:
    """Wait until a time is over: what the next driver writes would be taken for older than what there is."""
    ahead = (began - datetime.now()).total_seconds()
    if ahead > PATIENCE_SECONDS:
        raise ValueError(
            f"By this machine's clock and time zone it is {datetime.now():%Y-%m-%d %H:%M:%S}, but the study's last "
            f"driver began at {began:%Y-%m-%d %H:%M:%S}. Set the clock, or TZ to the time zone of that machine: Tune "
            "tells by this time which record is the newer."
        )
    if ahead >= 0:
        time.sleep(ahead + 1)


def _torn(file: Path) -> ValueError:
    return ValueError(
        f"{file} cannot be read, or files beside it: a driver was killed while it wrote them, and there is no copy. "
        f"Remove all files *-{_session(file)}.* there: the study then stands where an earlier driver left it, or "
        "starts anew if there was none."
    )


def _session(file: Path) -> str:
    """When the driver of a file began, as its name has it."""
    return re.split("states?-", file.stem)[1]


def _home(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-spare")


def _spares(folder: Path) -> Iterator[Path]:
    return (spare for spare in _home(folder).glob("*") if not spare.suffix)


def _spare(folder: Path) -> Path | None:
    return max(_spares(folder), default=None)


def _last(folder: Path, kind: str) -> Path | None:
    return max(folder.glob(kind), default=None)


def _whole_set(folder: Path, session: str, tuner: Path | None = None) -> list[Path]:
    """A driver's files and Tune's own, none unless all are there and whole."""
    files = [folder / kind.replace("*", session) for kind in KINDS] + [(tuner or folder) / TUNER]
    return files if all(file.is_file() and _is_whole(file) for file in files) else []


def _is_whole(file: Path) -> bool:
    """Whether a file is no beginning of one: a pickle that comes to its last code, or JSON that can be read."""
    content = file.read_bytes()
    if content.startswith(b"\x80"):  # also in files that are called json
        return content.endswith(b".")
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _copy(file: Path, target: Path) -> None:
    """Copy a file, which is there as a whole or not at all."""
    aside = target.with_name(f".{target.name}.partial")
    shutil.copyfile(file, aside)
    with aside.open("rb") as data:
        os.fsync(data.fileno())
    aside.replace(target)
