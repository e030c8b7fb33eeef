"""What a finished or broken-off study holds: its trials, as data."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ray.tune import ExperimentAnalysis
from ray.tune.experiment import Trial

from raysv.config import config_to_dict, read_yaml, write_yaml
from raysv.search.results import METRIC, TIME, error_in, outcome, trial_name
from raysv.search.space import Space, space_from_dict
from raysv.search.wording import columns, short_names, show_value, shown

SPACE_FILE = "space.yaml"
STARTED_FILE = "started.yaml"  # how it was started, for whoever resumes it
BEST_FILE = "best_config.yaml"
TRIALS_FILE = "trials.csv"
LOCK_FILE = "driver.lock"  # held by the driver of a study as long as it lives
TUNE_FOLDER = "tune"  # Tune's own record of the study, below the study's folder
TUNE_SNAPSHOTS = "experiment_state-*.json"  # in it, one by each driver
ERROR_FILE = "error.txt"  # Tune's report of what a trial died of, in the trial's folder


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it ended.

    Attributes:
        name: short, in the order of their start.
        values: what it tried, by dotted key.
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


@dataclass(frozen=True)
class Study:
    """A search space, the trials made in it, and which of them was best."""

    space: Space
    trials: list[TrialRecord]

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the lowest EER at the end of all epochs; what was stopped early was not seen to the end."""
        complete = [trial for trial in self.trials if trial.outcome == "complete"]
        return min(complete, key=lambda trial: trial.eer, default=None)

    @property
    def unfinished(self) -> int:
        """Trials that the study was asked for and has not seen the end of."""
        # of Tune's several files one may be older than the others after a kill: there can be a trial too many
        return max(0, self.space.search.trials - sum(trial.outcome != "unfinished" for trial in self.trials))

    @property
    def broken(self) -> int:
        """Trials that died of an accident: going on repeats them. One that diverged would do so again."""
        return sum(trial.outcome == "error" and not trial.metrics.get("failure") for trial in self.trials)

    def table(self) -> str:
        """All trials, best first, as text in columns."""
        keys = list(self.space.ranges)
        order = {"complete": 0, "pruned": 1, "error": 2, "unfinished": 3}
        ranked = sorted(self.trials, key=lambda trial: (order[trial.outcome], -trial.epoch, trial.eer))
        head = ["trial", *short_names(keys), "epochs", "EER %", "minDCF .01", "outcome"]
        rows = [
            [
                trial.name,
                *(show_value(trial.values[key]) for key in keys),
                str(trial.epoch),
                f"{100 * trial.eer:.2f}" if trial.epoch else "",
                f"{trial.metrics['dev/min_dcf_0.01']:.3f}" if "dev/min_dcf_0.01" in trial.metrics else "",
                f"{trial.outcome}: {trial.reason.splitlines()[0][:60]}" if trial.reason else trial.outcome,
            ]
            for trial in ranked
        ]
        return columns([head, *rows])

    def best_config(self) -> dict[str, Any]:
        """The configuration tree of the best trial, with the resources it had.

        Raises: ValueError when no trial has come to its end.
        """
        if self.best is None:
            raise ValueError(f"Study {self.space.name} has no best configuration: no trial has come to its end.")
        config = config_to_dict(self.space.config(self.best.values))
        return config | {"resources": self.space.to_dict()["resources"]}

    def write(self, folder: Path) -> None:
        """Leave `trials.csv` and, once a trial was seen to its end, `best_config.yaml` in the study's folder."""
        keys = list(self.space.ranges)
        with (folder / TRIALS_FILE).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["trial", "trial_id", "outcome", "reason", "epoch", "dev_eer", *keys, "checkpoint"])
            rows.writerows(
                [trial.name, trial.trial_id, trial.outcome, trial.reason, trial.epoch]
                + [trial.eer if trial.epoch else ""]
                + [trial.values[key] for key in keys]
                + [trial.checkpoint]
                for trial in self.trials
            )
        if self.best:
            header = (
                f"The best of {len(self.trials)} trials of study {self.space.name}: trial {self.best.name} "
                f"({self.best.trial_id}), EER {100 * self.best.eer:.2f} % on the dev pairs.\n"
                f"Train it alone with: python -m raysv.train {shown(folder / BEST_FILE)}"
            )
            write_yaml(self.best_config(), folder / BEST_FILE, header)


def read_study(folder: Path) -> Study:
    """A study as its folder holds it: finished, broken off or still running.

    Raises: ValueError when the folder is no study, or what Tune noted of it cannot be read.
    """
    space = load_space(folder)
    newest = max((folder / TUNE_FOLDER).glob(TUNE_SNAPSHOTS), default=None)
    if newest is None:
        return Study(space, [])  # broken off before Tune had noted anything
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # a trial may well have no result yet
    try:
        trials = ExperimentAnalysis(str(newest)).trials or []
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{newest} cannot be read: {error}. A driver was killed while it wrote it. Remove that file: the study "
            "then stands where an earlier driver left it, or starts anew if there was none."
        ) from error
    return Study(space, [_record(trial, space.epochs) for trial in trials])


def _record(trial: Any, epochs: int) -> TrialRecord:
    metrics = dict(trial.last_result or {})
    end, reason = outcome(metrics, epochs)
    if trial.status == Trial.ERROR:
        end, reason = "error", error_in(Path(trial.path, ERROR_FILE))  # trial.error_file is only there while Ray runs
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


def open_study(space: Space, results: Path, tracking_uri: str, name: str | None = None) -> Path:
    """Make the folder of a new study and keep there what it searches and where it is tracked.

    Args:
        name: of the study; the space's name and the time if not given.

    Raises: ValueError when there is a study of that name.
    """
    folder = (results / (name or f"{space.name}-{datetime.now():%m%d-%H%M%S}")).absolute()
    if (folder / SPACE_FILE).exists():
        raise ValueError(f"There is a study {folder} already. Go on with it (--resume), or give another --name.")
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(space.to_dict(), folder / SPACE_FILE, f"What study {folder.name} searches.")
    note_start(folder, id=uuid.uuid4().hex, space=space.name, tracking_uri=tracking_uri)
    return folder


@contextlib.contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Be the one driver of a study: two would train the same trials and remove each other's.

    Raises: ValueError when another one is at it; a killed one is not.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(
                f"Study {folder.name} is being run, by {file.read().strip()}. Wait for it, or end it (Ctrl-C, or kill "
                "with that number) and --resume."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def note_start(folder: Path, **facts: Any) -> None:
    """Keep facts about the start of a study for whoever resumes it; a driver may be killed while it does."""
    aside = folder / f"{STARTED_FILE}.partial"
    write_yaml(started(folder) | facts, aside)
    os.replace(aside, folder / STARTED_FILE)


def started(folder: Path) -> dict[str, Any]:
    """How a study was started: its `id`, its `space`, its `tracking_uri`; and, once it ran, its `concurrent_trials` and
    the `tags` of its runs in MLflow, as its last driver saw them.
    """
    return read_yaml(folder / STARTED_FILE) if (folder / STARTED_FILE).exists() else {}


def find_study(results: Path, name: str) -> Path:
    """The folder of a study: given as such, by its name, or by that of its space: the newest one that has run.

    Raises: ValueError when there is none, listing those there are.
    """
    for folder in (Path(name), results / name):
        if (folder / SPACE_FILE).is_file():
            return folder.absolute()
    studies = sorted(results.glob(f"*/{SPACE_FILE}"), key=lambda file: file.stat().st_mtime)
    starts = {file.parent: started(file.parent) for file in studies}
    # one that was refused by its cluster never ran: it must not stand before those that did
    found = [folder for folder, start in starts.items() if start.get("space") == name and "concurrent_trials" in start]
    if not found:
        there = ", ".join(file.parent.name for file in studies) or "none"
        raise ValueError(f"No study {name} to be found. Studies in {results}: {there}.")
    return found[-1].absolute()


def load_space(folder: Path) -> Space:
    """The space of a study that was started before."""
    file = folder / SPACE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no study: it has no {SPACE_FILE}.")
    return space_from_dict(read_yaml(file), folder.name)
