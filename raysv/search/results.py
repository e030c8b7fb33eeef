"""What a trial's results are called, what a trial is called, and how one ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRIC = "dev/eer"  # what a search minimises, a fraction; 0.5 is chance
TIME = "epoch"  # its time axis, from 1; Tune's training_iteration restarts at 1 whenever a trial is resumed


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


def trial_name(trial: Any) -> str:
    """Short and in the order in which Tune made the trials: `t000`, `t001`."""
    number = str(trial.experiment_tag or "").partition("_")[0]  # Tune counts from 1
    return f"t{int(number) - 1:03d}" if number.isdigit() else str(trial.trial_id)


def last_line(text: str) -> str:
    """The last line of a traceback, which is the exception itself."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else text
