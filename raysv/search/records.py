"""Trials as Tune noted them, read back as data."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import ExperimentAnalysis
from ray.tune.experiment import Trial

from raysv.search.results import METRIC, TIME, error_in, outcome, trial_name
from raysv.search.snapshots import newest

TRIES, TRY_SECONDS = 3, 0.2
ERROR_FILE = "error.txt"  # Tune's report of what a trial died of, in the trial's folder


@dataclass(frozen=True, eq=False)
class TrialRecord:
    """One trial as it ended.

    Attributes:
        name: short, in the order of their start.
        values: what it tried, by dotted key; without those that mean nothing beside the others.
        metrics: its last result.
        outcome: `complete`, `pruned`, `error` or `unfinished`, and `reason` for an error.
        checkpoint: folder of its last checkpoint.
    """

    name: str
    trial_id: str
    values: dict[str, Any]
    metrics: dict[str, Any]
    outcome: str
    reason: str
    checkpoint: str

    @property
    def epoch(self) -> int:
        """Its last epoch, 0 if it finished none."""
        return int(self.metrics.get(TIME, 0))

    @property
    def eer(self) -> float:
        """Its last EER on the dev pairs, chance if it has none."""
        return float(self.metrics.get(METRIC, 0.5))


def read_records(folder: Path, epochs: int) -> list[TrialRecord]:
    """The trials in Tune's newest whole snapshot in a folder; none where there is no snapshot.

    Args:
        epochs: of a trial that is not stopped early.

    Raises: ValueError when no snapshot can be read.
    """
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # a trial may well have no result yet
    for _ in range(TRIES - 1):  # a living driver may write it, or put another copy aside, in this very moment
        with contextlib.suppress(ValueError, FileNotFoundError):
            return _read(folder, epochs)
        time.sleep(TRY_SECONDS)
    return _read(folder, epochs)


def _read(folder: Path, epochs: int) -> list[TrialRecord]:
    snapshot = newest(folder)
    if snapshot is None:
        return []  # broken off before Tune had noted anything
    trials = ExperimentAnalysis(str(snapshot)).trials or []
    return [_record(trial, folder / Path(trial.path).name, epochs) for trial in trials]


def _record(trial: Any, folder: Path, epochs: int) -> TrialRecord:
    metrics = dict(trial.last_result or {})
    end, reason = outcome(metrics, epochs)
    if trial.status == Trial.ERROR:
        end, reason = "error", error_in(folder / ERROR_FILE)  # trial.error_file is only there while Ray runs
    elif trial.status != Trial.TERMINATED:
        end, reason = "unfinished", ""
    return TrialRecord(
        name=trial_name(trial),
        trial_id=trial.trial_id,
        values=dict(trial.config),
        metrics=metrics,
        outcome=end,
        reason=reason,
        checkpoint=str(metrics.get("checkpoint_path", "")),
    )
