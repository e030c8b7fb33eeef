"""What a trial's results are called and hold, what a trial is called, and how one ended."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from raysv.learning.checkpoint import HISTORY

METRIC = "dev/eer"  # what a search minimises, a fraction; 0.5 is chance
SECOND = {"min_dcf": "dev/min_dcf_0.01", "cost": "speed/epoch_seconds"}  # what may be minimised beside it
NOTICE = "notice"  # a sentence in a result: what its trial met with and mended
TIME = "epoch"  # its time axis, from 1; Tune's training_iteration restarts at 1 whenever a trial is resumed
CHANCE = 0.5  # the EER of an encoder that was not trained: it tells speakers apart by guessing
NO_ROOM = "Out of memory with a batch of"  # what a worker's error says, wherever it is told
BOOKKEEPING = {  # Tune's own numbers in a result; time_total_s is kept
    *("training_iteration", "iterations_since_restore", "time_this_iter_s", "time_since_restore"),
    *("timesteps_total", "episodes_total", "timesteps_since_restore", "timestamp", "pid", TIME),
}


def failure(epoch: int, reason: str) -> dict[str, Any]:
    """The result of a trial that gives itself up in an epoch: as good as guessing, in each objective."""
    return {TIME: epoch, METRIC: CHANCE, SECOND["min_dcf"]: 1.0, "failure": reason}


def metrics_by_epoch(result: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """What a trial measured in the epoch of a result, and in the epochs before as far as its checkpoint tells.

    Args:
        result: with `checkpoint_path` if there is a checkpoint, which may lie out of reach.
    """
    folder = str(result.get("checkpoint_path") or "")
    file = Path(folder, HISTORY)
    told = file.read_text(encoding="utf-8").splitlines() if folder and file.is_file() else []
    lines = (*map(json.loads, told), result)
    return {int(line[TIME]): _numbers(line) for line in lines if TIME in line}


def outcome(result: Mapping[str, Any], epochs: int) -> tuple[str, str]:
    """How a trial that ended without an exception ended, and why if it went wrong.

    Args:
        result: the trial's last result; `failure` in it is the reason of a trial that gave itself up.
        epochs: of a trial that is not stopped early.

    Returns: `complete`, `pruned` or `error`; and the reason of an error, otherwise an empty text.
    """
    if result.get("failure"):
        return "error", str(result["failure"])
    if METRIC not in result or TIME not in result:
        return "error", "The trial ended without reporting a result."
    return ("complete" if result[TIME] >= epochs else "pruned"), ""


def trial_number(trial: Any) -> int:
    """The place of a trial in the order in which Tune made them, from 0."""
    number = str(trial.experiment_tag or "").partition("_")[0]  # Tune counts from 1
    return int(number) - 1 if number.isdigit() else 0


def trial_name(trial: Any, letter: str = "t") -> str:
    """Short and in the order in which Tune made the trials: `t000`, `t001`."""
    return f"{letter}{trial_number(trial):03d}" if trial.experiment_tag else str(trial.trial_id)


def error_in(report: str | Path | None) -> str:
    """The exception that a trial died of: what the last traceback in Tune's report of it ends with."""
    file = Path(report or "")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    told = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in told if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (exceptions or told or ["The trial ended without a report of its error."])[-1]


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a result, without the numbers that Tune keeps its books with."""
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, Real) and not isinstance(value, bool) and key not in BOOKKEEPING
    }
