"""Tune's record of its trials, which it writes over and over: whole although drivers die, newest whatever the clock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import Callback

TRIALS = "experiment_state-*.json"
KINDS = (TRIALS, "searcher-state-*.pkl", "callback-states-*.pkl", "search_gen_state-*.json")  # one of each by a driver
SPARE = "0"  # in place of the time at which a driver began; Tune takes the last by name, and this is before any time


def newest(folder: Path) -> Path | None:
    """The newest whole snapshot of the trials in Tune's folder; none where there is none.

    Raises: ValueError when there are some and none can be read.
    """
    torn: list[Path] = []
    for file in _newest_first(folder, TRIALS):
        if _is_whole(file):
            return file
        torn.append(file)
    if torn:
        raise ValueError(
            f"{torn[0]} cannot be read: a driver was killed while it wrote it, before there was another. Remove that "
            "file: the study then starts anew."
        )
    return None


def settle(folder: Path) -> None:
    """Leave of each kind the newest whole file alone, under a name that comes before that of any driver.

    A driver whose clock was set back would otherwise write what no later one finds.
    """
    for kind in KINDS:
        files = list(_newest_first(folder, kind))
        for file in files:
            if _is_whole(file):
                file.replace(folder / kind.replace("*", SPARE))
                break
        for file in files:
            if not file.stem.endswith(f"-{SPARE}"):
                file.unlink(missing_ok=True)


class Spare(Callback):
    """Puts a copy of Tune's record aside now and then: Tune overwrites what it has, and can be killed while it does.

    Args:
        folder: Tune's, of the stage.
        every_seconds: between copies; at most a hundredth of the time goes into them.
    """

    def __init__(self, folder: Path, every_seconds: float = 30.0) -> None:
        self._folder, self._every = folder, every_seconds
        self._due = time.monotonic() + every_seconds

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Copy what is whole."""
        began = time.monotonic()
        if began < self._due:
            return
        for kind in KINDS:
            file = next(_newest_first(self._folder, kind), None)
            if file is not None and not file.stem.endswith(f"-{SPARE}"):
                _copy(file, self._folder / kind.replace("*", SPARE))
        ended = time.monotonic()
        self._due = ended + max(self._every, 100 * (ended - began))

    def get_state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """A resumed study starts its own clock."""
        self._due = time.monotonic() + self._every


def _newest_first(folder: Path, kind: str) -> Iterator[Path]:
    return iter(sorted(folder.glob(kind), reverse=True))


def _copy(file: Path, target: Path) -> None:
    """Copy a file unless Tune is writing it just now."""
    aside = target.with_suffix(".partial")
    aside.write_bytes(file.read_bytes())
    if _is_whole(aside, like=file.suffix):
        with aside.open("rb") as data:
            os.fsync(data.fileno())
        aside.replace(target)
    else:
        aside.unlink()


def _is_whole(file: Path, like: str = "") -> bool:
    """Whether a file is no beginning of one: JSON that can be read, or a pickle that comes to its last code."""
    content = file.read_bytes()
    if (like or file.suffix) == ".pkl":
        return content.endswith(b".")
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
