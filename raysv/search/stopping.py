"""When a trial is stopped early: ASHA with a memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raysv.search.results import METRIC, TIME


class JournaledASHA(ASHAScheduler):
    """ASHA over epochs whose memory survives the driver: a journal of every result and of what was decided on it.

    Ray saves no scheduler's state, so after a restore its ASHA would judge against empty rungs
    (https://github.com/ray-project/ray/issues/30838). Here the journal is replayed before the first trial is added.
    A decision stays made: a trial that was stopped stops again, and an epoch that comes again is not judged again.

    The last epoch is not judged at all: that trial is about to return by itself, and there is nothing left to save.

    Args:
        journal: JSON lines, one per result; written by the driver alone. A new study needs a new journal.
        epochs: of a trial that is not stopped early.
        grace_epochs: no trial stops before it; the first rung.
        reduction_factor: rungs lie at `grace_epochs` times its powers; of the trials that reach a rung, about one in
            `reduction_factor` goes on.

    Raises: ValueError, when the first trial is added, naming the file and line that is not the journal of such a study.
    Source: Li et al. 2020, arXiv 1810.05934.
    """

    def __init__(self, journal: Path, *, epochs: int, grace_epochs: int, reduction_factor: float) -> None:
        super().__init__(
            time_attr=TIME,
            max_t=epochs,
            grace_period=min(grace_epochs, epochs),
            reduction_factor=reduction_factor,
            stop_last_trials=False,
        )
        self._journal = Path(journal)
        self._epochs = epochs
        self._judged: dict[str, int] = {}  # trial → its last epoch in the journal
        self._stopped: set[str] = set()
        self._replayed = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Place a trial, the first time after recalling what earlier drivers decided."""
        if not self._replayed:
            self._replayed = True
            for entry in read_journal(self._journal):
                self._recall(**entry)
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """`STOP` or `CONTINUE`, written to the journal before Tune hears of it."""
        name, epoch = trial.trial_id, int(result[TIME])
        if name in self._stopped:
            return TrialScheduler.STOP
        if epoch <= self._judged.get(name, 0) or epoch >= self._epochs:
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        self._note(name, epoch, stop=decision == TrialScheduler.STOP)
        self._append({"trial": name, "epoch": epoch, "value": float(result[METRIC]), "stop": name in self._stopped})
        return decision

    def _recall(self, trial: str, epoch: int, value: float, stop: bool) -> None:
        controller: Any = None
        stand_in: Any = SimpleNamespace(trial_id=trial)  # all that ASHA wants to know of a trial
        super().on_trial_add(controller, stand_in)
        super().on_trial_result(controller, stand_in, {TIME: epoch, METRIC: value})
        self._note(trial, epoch, stop)

    def _note(self, trial: str, epoch: int, stop: bool) -> None:
        self._judged[trial] = epoch
        if stop:
            self._stopped.add(trial)

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal; a last line that a dying driver tore off is removed from the file.

    Raises: ValueError naming the line that is no entry.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or entry.keys() != {"trial", "epoch", "value", "stop"}:
            raise ValueError(
                f"{path}, line {number}: not an entry of the journal of early stopping: {line[:80]!r}. "
                "Remove that line, or start the study anew under another name."
            )
        entries.append(entry)
    return entries
