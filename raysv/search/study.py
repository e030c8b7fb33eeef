"""What a finished or broken-off study holds: its trials, as data."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from raysv.config import config_to_dict, read_yaml, write_yaml
from raysv.search.commands import shown
from raysv.search.confirmation import Candidate, Confirmation, candidates, points, read_confirmation
from raysv.search.records import TrialRecord, read_records
from raysv.search.results import SECOND
from raysv.search.space import Space, space_from_dict
from raysv.search.wording import columns, short_names, show_value
from raysv.verification.metrics import INTERVAL_LEVEL

SPACE_FILE = "space.yaml"
STARTED_FILE = "started.yaml"  # how it was started, for whoever resumes it
BEST_FILE = "best_config.yaml"
TRIALS_FILE = "trials.csv"
LOCK_FILE = "driver.lock"  # held by the driver of a study as long as it lives
TUNE_FOLDER, CONFIRM_FOLDER = "tune", "confirm"  # Tune's own records of search and confirmation


@dataclass(frozen=True)
class Study:
    """A search space, the trials made in it, and which configuration was best.

    Attributes:
        chosen: what was noted to be confirmed when that began: trials that are repeated later do not change it.
        confirming: runs of the best configurations from new seeds, as far as there are any.
        confirmation: what these came to.
        inconclusive: why that cannot be said, although all runs have ended.
    """

    space: Space
    trials: list[TrialRecord]
    chosen: list[Candidate] = field(default_factory=list)
    confirming: list[TrialRecord] = field(default_factory=list)
    confirmation: Confirmation | None = None
    inconclusive: str = ""

    @property
    def best(self) -> TrialRecord | None:
        """The trial with the lowest EER at the end of all epochs; what was stopped early was not seen to the end."""
        complete = [trial for trial in self.trials if trial.outcome == "complete"]
        return min(complete, key=lambda trial: trial.eer, default=None)

    @property
    def front(self) -> list[TrialRecord]:
        """With two objectives, the trials that none other is better than in both; the lowest EER first."""
        if not (second := self.space.second):
            return []
        complete = [trial for trial in self.trials if trial.outcome == "complete" and second in trial.metrics]
        front: list[TrialRecord] = []
        for trial in sorted(complete, key=lambda trial: (trial.eer, trial.metrics[second])):
            if not front or trial.metrics[second] < front[-1].metrics[second]:
                front.append(trial)
        return front

    @property
    def best_values(self) -> dict[str, Any] | None:
        """What the study found: the values of the confirmed winner, or where there is none of the best trial."""
        if self.confirmation:
            return self.confirmation.winner.values
        return self.best.values if self.best else None

    @property
    def unsearched(self) -> int:
        """Trials that the search was asked for and has not seen the end of."""
        # of Tune's several files one may be older than the others after a kill: there can be a trial too many
        return max(0, self.space.search.trials - _ended(self.trials))

    @property
    def candidates(self) -> list[Candidate]:
        """What is to be confirmed, once the search has come to its end."""
        return self.chosen or ([] if self.unsearched else candidates(self.space, self.trials))

    @property
    def unfinished(self) -> int:
        """Trials and confirming runs that the study has not seen the end of."""
        to_confirm = len(self.confirming) if self.confirmation else len(points(self.space, self.candidates))
        return self.unsearched + max(0, to_confirm - _ended(self.confirming))

    @property
    def broken(self) -> int:
        """Trials that died of an accident: going on repeats them. One that diverged would do so again."""
        return _broken(self.trials)

    @property
    def unconfirmed(self) -> bool:
        """Whether there is something to confirm: runs to be made or to be repeated, or to draw the conclusion from."""
        if self.unsearched or not self.candidates:
            return False
        open_runs = _broken(self.confirming) or _ended(self.confirming) < len(self.confirming)
        return bool(open_runs) or (self.confirmation is None and not self.inconclusive)

    def table(self) -> str:
        """All trials, best first, as text in columns."""
        return columns(self.rows())

    def rows(self) -> list[list[str]]:
        """All trials, best first, below a head, as text."""
        keys = list(self.space.ranges)
        order = {"complete": 0, "pruned": 1, "error": 2, "unfinished": 3}
        ranked = sorted(self.trials, key=lambda trial: (order[trial.outcome], -trial.epoch, trial.eer))
        cost, front = SECOND["cost"], self.front
        costs = self.space.second == cost
        head = ["trial", *short_names(keys), "epochs", "EER %", "minDCF .01", *["s/epoch"] * costs, "outcome"]
        rows = [
            [
                trial.name,
                *(show_value(trial.values.get(key, "–")) for key in keys),
                str(trial.epoch),
                f"{100 * trial.eer:.2f}" if trial.epoch else "",
                f"{trial.metrics['dev/min_dcf_0.01']:.3f}" if "dev/min_dcf_0.01" in trial.metrics else "",
                *[f"{trial.metrics[cost]:.1f}" if cost in trial.metrics else ""] * costs,
                _ending(trial) + (", on the front" if trial in front else ""),
            ]
            for trial in ranked
        ]
        return [head, *rows]

    def confirmed_table(self) -> str:
        """What was confirmed, best first, as text in columns."""
        return columns(self.confirmed_rows())

    def confirmed_rows(self) -> list[list[str]]:
        """What was confirmed, best first, below a head, as text; nothing where nothing was."""
        if self.confirmation is None:
            return []
        keys = list(self.space.ranges)
        reference = " (paper)" if self.confirmation.reference == "the paper's setting" else " (nearest to the paper)"
        rows = [
            [
                standing.name + (reference if standing.name == self.confirmation.paper else ""),
                *(show_value(standing.values.get(key, "–")) for key in keys),
                f"{100 * standing.estimate.mean:.2f}",
                f"{100 * standing.estimate.low:.2f} to {100 * standing.estimate.high:.2f}",
                "  ".join(f"{100 * eer:.2f}" for eer in standing.eers),
            ]
            for standing in self.confirmation.standings
        ]
        head = ["trial", *short_names(keys), "mean EER %", f"{100 * INTERVAL_LEVEL:g} % interval", "by seed"]
        return [head, *rows]

    def best_config(self) -> dict[str, Any]:
        """The best configuration's tree, with the resources it had.

        Raises: ValueError when no trial has come to its end.
        """
        if self.best_values is None:
            raise ValueError(f"Study {self.space.name} has no best configuration: no trial has come to its end.")
        config = config_to_dict(self.space.config(self.best_values))
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
                + [trial.values.get(key, "") for key in keys]
                + [trial.checkpoint]
                for trial in self.trials
            )
        if self.best:
            how = (
                self.confirmation.verdict()
                if self.confirmation
                else f"trial {self.best.name} ({self.best.trial_id}), EER {100 * self.best.eer:.2f} % on the dev pairs."
            )
            header = (
                f"The best of {len(self.trials)} trials of study {self.space.name}: {how}\n"
                f"Train it alone with: python -m raysv.train {shown(folder / BEST_FILE)}"
            )
            write_yaml(self.best_config(), folder / BEST_FILE, header)


def _ending(trial: TrialRecord) -> str:
    return f"{trial.outcome}: {trial.reason.splitlines()[0][:60]}" if trial.reason else trial.outcome


def _broken(runs: Sequence[TrialRecord]) -> int:
    return sum(run.outcome == "error" and not run.metrics.get("failure") for run in runs)


def _ended(runs: Sequence[TrialRecord]) -> int:
    return sum(run.outcome != "unfinished" for run in runs)


def read_study(folder: Path) -> Study:
    """A study as its folder holds it: finished, broken off or still running.

    Raises: ValueError when the folder is no study, or what Tune noted of it cannot be read.
    """
    space = load_space(folder)
    trials, confirming = (read_records(folder / stage, space.epochs) for stage in (TUNE_FOLDER, CONFIRM_FOLDER))
    start = started(folder)
    chosen = [Candidate(**one) for one in start.get("candidates", [])]
    confirmation = read_confirmation(folder)
    return Study(space, trials, chosen, confirming, confirmation, start.get("inconclusive", ""))


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


def study_id(folder: Path) -> str:
    """What tells a study from others of its name, in MLflow."""
    return str(started(folder).get("id") or folder.name)


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
