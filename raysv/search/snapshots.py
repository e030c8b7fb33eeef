"""Tune's record of its trials, which it writes over in place every second, and a copy should its driver die then.

Tune takes the files that are last by name, and names them by the time at which their driver began.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import re
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import ray.cloudpickle
from ray.tune import Callback, ExperimentAnalysis

TRIALS, COUNTER = "experiment_state-*.json", "search_gen_state-*.json"
KINDS = (TRIALS, COUNTER, "searcher-state-*.pkl", "callback-states-*.pkl")  # one of each by a driver
TUNER = "tuner.pkl"
BEGAN = "%Y-%m-%d_%H-%M-%S"
PATIENCE_SECONDS = 60  # for a clock that was set back


def newest(folder: Path) -> Path | None:
    """The newest snapshot of the trials in Tune's folder, of its spare where that is torn; none where there is none.

    Raises: ValueError when it is torn and there is no spare.
    """
    file = _last(folder)
    if file is None or _is_whole(file.read_bytes()):
        return file
    spare = _spare(folder)
    if spare is None:
        raise _torn(file)
    return _last(spare)


def mend(folder: Path) -> str:
    """Before Tune goes on: put the spare in the place of a record that is torn, or whose files are of two moments.

    The spare's files replace those of the last driver one by one, so that one that is broken off can be begun again.

    Args:
        folder: Tune's, of a stage.

    Returns: what was done, empty if there was nothing to do.
    Raises: ValueError when the record is torn and there is no spare.
    """
    last = max((file for kind in KINDS for file in folder.glob(kind)), key=_session, default=None)
    if last is None:
        return ""
    contents = _contents(folder, _session(last))
    if contents and _of_one_moment(contents, _session(last)):
        return ""
    spare = _spare(folder)
    if spare is None:
        if not contents:
            raise _torn(last)
        return ""  # Tune then has a trial less than its search has counted: better than nothing
    ours = _last(spare)
    assert ours is not None
    for kind in KINDS:
        _write(folder / kind.replace("*", _session(last)), (spare / kind.replace("*", _session(ours))).read_bytes())
    _write(folder / TUNER, (spare / TUNER).read_bytes())
    return f"Tune's record in {folder} was torn when its driver was killed; the study goes on from a copy of it."


def await_clock(folder: Path) -> None:
    """Wait until the last driver has begun by this machine's clock: Tune would take what comes now for the older.

    Raises: ValueError when that takes longer than a minute.
    """
    last = _last(folder)
    if last is None:
        return
    began = datetime.strptime(_session(last), BEGAN)
    ahead = (began - datetime.now()).total_seconds()
    if ahead > PATIENCE_SECONDS:
        raise ValueError(
            f"By this machine's clock and time zone it is {datetime.now():%Y-%m-%d %H:%M:%S}, but the study's last "
            f"driver began at {began:%Y-%m-%d %H:%M:%S}, and Tune tells by this which record is the newer. Wait until "
            "then, set the clock, or set TZ to the time zone of that driver's machine."
        )
    if ahead >= 0:
        print(f"Waiting {ahead + 1:.0f} s: the study's last driver began at {began:%H:%M:%S}.", flush=True)
        time.sleep(ahead + 1)


def forget_staging(folder: Path) -> None:
    """Remove what a driver left on this machine to be sent to storage; on a standing cluster Tune would read it first.

    Only after Ray is connected.
    """
    snapshot = newest(folder)
    trials = ExperimentAnalysis(str(snapshot)).trials if snapshot else None
    if trials:
        shutil.rmtree(trials[0].storage.experiment_driver_staging_path, ignore_errors=True)


def remove_spares(folder: Path) -> None:
    """Remove the spares of a stage that starts anew."""
    shutil.rmtree(_home(folder), ignore_errors=True)


class Spare(Callback):
    """Puts a copy of Tune's record aside now and then, beside Tune's folder, and refuses to go on without the record.

    Args:
        folder: Tune's, of the stage.
        every_seconds: between copies; at most a hundredth of the time goes into them.
    """

    def __init__(self, folder: Path, every_seconds: float = 2.0) -> None:
        self._folder, self._every = folder, every_seconds

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the clock of this driver; the first copy is made as soon as there is something to be copied."""
        self._due = 0.0
        self._first, self._complained = True, False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune says nothing when it cannot restore a study, and would begin it anew over what there is."""
        first, self._first = self._first, False
        if first and not trials and _trials_in(self._folder):
            raise RuntimeError(
                f"Tune could not restore the trials in {self._folder}; nothing was changed there. Run the study's "
                "last revision of raysv, or start a new study."
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Copy what the driver has just written and is about to send to storage: it is whole, and of one moment."""
        began = time.monotonic()
        if began < self._due or not trials:
            return
        done = False
        try:
            done = set_aside(Path(trials[0].storage.experiment_driver_staging_path), self._folder)
        except OSError as error:
            if not self._complained:
                print(f"No copy of Tune's record can be made beside {self._folder}: {error}.", flush=True)
            self._complained = done = True  # and is tried again later
        if done:
            ended = time.monotonic()
            self._due = ended + max(self._every, 100 * (ended - began))


def set_aside(staging: Path, folder: Path) -> bool:
    """Copy the last driver's files to the spares of Tune's folder, and remove the spares before.

    Returns: whether all of them were there and whole.
    """
    last = _last(staging)
    contents = _contents(staging, _session(last), tuner=folder) if last else {}
    if not contents:
        return False
    before = _spares(folder)
    aside = _home(folder) / f"{(before[-1] if before else 0) + 1}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in contents.items():
        _write(aside / name, content)
    aside.rename(aside.with_suffix(""))
    for other in before:
        shutil.rmtree(_home(folder) / str(other), ignore_errors=True)
    return True


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


def _spares(folder: Path) -> list[int]:
    """Numbers of the spares, the newest last."""
    return sorted(int(spare.name) for spare in _home(folder).glob("*") if spare.name.isdigit())


def _spare(folder: Path) -> Path | None:
    spares = _spares(folder)
    return _home(folder) / str(spares[-1]) if spares else None


def _last(folder: Path) -> Path | None:
    return max(folder.glob(TRIALS), default=None)


def _trials_in(folder: Path) -> int:
    snapshot = newest(folder)
    return len(json.loads(snapshot.read_bytes())["trial_data"]) if snapshot else 0


def _contents(folder: Path, session: str, tuner: Path | None = None) -> dict[str, bytes]:
    """A driver's files and Tune's own, by name; nothing unless all are there and whole."""
    files = [folder / kind.replace("*", session) for kind in KINDS] + [(tuner or folder) / TUNER]
    contents: dict[str, bytes] = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            contents[file.name] = file.read_bytes()
    return contents if len(contents) == len(files) and all(map(_is_whole, contents.values())) else {}


def _of_one_moment(contents: dict[str, bytes], session: str) -> bool:
    """Whether the search has counted no more trials than Tune has: with more it would end before all are made."""
    trials, counter = (contents[kind.replace("*", session)] for kind in (TRIALS, COUNTER))
    try:
        counted = ray.cloudpickle.loads(counter)["counter"]
    except (AttributeError, ImportError, KeyError, TypeError):
        return True  # of another revision: Tune is to say whether it can read it
    return bool(counted <= len(json.loads(trials)["trial_data"]))


def _is_whole(content: bytes) -> bool:
    """Whether it is no beginning of a file: a pickle that comes to its last code, or JSON that can be read."""
    try:
        if content.startswith(b"\x80"):  # also in files that are called json
            for _ in pickletools.genops(content):
                pass
        else:
            json.loads(content)
    except ValueError:
        return False
    return True


def _write(target: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    aside = target.with_name(f".{target.name}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(target)
