"""A fault that hits every trial ends the study, instead of burning the cluster."""

from __future__ import annotations

import re
import signal
from typing import Any

from ray.tune import Callback

from raysv.search.results import error_in

FEW = 3  # trials in a row, each of them tried twice


class CommonFault(Callback):
    """Interrupts a study, as Ctrl-C does, when trial after trial dies of the same cause.

    Counted are trials that end, one after the other, with the same exception, numbers and ids in it aside. One that
    comes to its end, is stopped early or diverges breaks the row: there the fault is not everybody's.
    """

    def __init__(self) -> None:
        self._cause, self._row = "", 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that ended otherwise."""
        self._cause, self._row = "", 0

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that died for good."""
        told = error_in(trial.error_file)
        cause = re.sub(r"\b(?=\w*\d)\w+\b", "#", told)
        self._row = self._row + 1 if cause == self._cause else 1
        self._cause = cause
        if self._row == FEW:
            print(f"Stopping: {FEW} trials in a row died of the same cause. Mend it and go on.\n  {told}", flush=True)
            signal.raise_signal(signal.SIGINT)
