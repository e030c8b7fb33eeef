"""A fault that hits every trial ends the study, instead of burning the cluster."""

from __future__ import annotations

import re
import signal
from typing import Any

from ray.tune import Callback

from raysv.search.results import error_in

FEW = 3  # trials in a row


class CommonFault(Callback):
    """Interrupts a study, as Ctrl-C does, when trial after trial dies of the same cause.

    Counted are trials that die one after the other with the same exception, whatever paths, numbers and ids it names.
    One that comes to its end, is stopped early or gives itself up breaks the row; and as long as a trial lives that has
    reported since the row began, the fault is not everybody's.
    """

    def __init__(self) -> None:
        self._cause, self._row = "", 0
        self._well: set[str] = set()  # trials that have reported since the row began, and live

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A trial that trains."""
        self._well.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that ended otherwise."""
        self._cause, self._row = "", 0

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that died for good."""
        told = error_in(trial.error_file)
        cause = re.sub(r"\S*/\S*|\b\w*\d\w*\b", "#", told)
        if cause != self._cause:
            self._cause, self._row = cause, 0
            self._well.clear()
        self._row += 1
        self._well.discard(trial.trial_id)
        if self._row >= FEW and not self._well:
            print(f"Stopping: {self._row} trials in a row died of the same cause. Mend it and go on.", flush=True)
            print(f"  {told}", flush=True)
            self._row = 0
            signal.raise_signal(signal.SIGINT)
