"""What a person sees while a study runs: one plain line per event, fit for a terminal and for a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysv.learning.keeping import latest_checkpoint
from raysv.search.cards import CONFIRMING, LETTERS, TRIAL_KIND
from raysv.search.results import METRIC, NOTICE, TIME, error_in, outcome, trial_name
from raysv.search.wording import describe_values, duration

WORDS = {TRIAL_KIND: "trials", CONFIRMING: "confirming runs"}


class Progress(Callback):
    """Prints which trial tries what, its EER after every epoch, the lowest so far and the time left.

    The lowest EER may be that of an early epoch, or of a trial that is stopped later: the best trial of a study is
    another thing, see `Study.best`.

    Args:
        trials, epochs: of the study, to estimate how long it still takes.
        kept: folder of the trials' checkpoints.
        single: a lone run, whose lines need no name of a trial.
        kind: of the trials, see `StudyCard`; those of a confirmation are runs.
    """

    def __init__(self, trials: int, epochs: int, kept: Path, single: bool = False, kind: str = TRIAL_KIND) -> None:
        self._trials, self._epochs, self._kept, self._single = trials, epochs, kept, single
        self._kind = kind
        self._reached: dict[str, int] = {}  # trial → its last epoch
        self._ended: set[str] = set()
        self._lowest: tuple[float, str] | None = None
        self.setup()

    def setup(self, *args: Any, **info: Any) -> None:
        """Start the clock of this driver."""
        self._started = time.monotonic()
        self._running: dict[str, float | None] = {}  # trial → when this driver last heard of an epoch
        self._seconds: list[float] = []  # from one epoch to the next

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A line with the values that a trial tries."""
        again = latest_checkpoint(self._kept / trial.trial_id) is not None
        self._running[trial.trial_id] = None
        self._ended.discard(trial.trial_id)  # a resumed study tries again what failed
        self._say(trial, f"{'goes on' if again else 'starts'}   {describe_values(trial.config)}".rstrip())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """A line with the error rate after an epoch."""
        if result.get(NOTICE):
            self._say(trial, result[NOTICE])
        if METRIC not in result or result.get("failure"):
            return
        now, before = time.monotonic(), self._running.get(trial.trial_id)
        self._running[trial.trial_id] = now
        if before is not None:  # a first epoch has the start of processes in it
            self._seconds.append(now - before)
        value, epoch = result[METRIC], result[TIME]
        self._reached[trial.trial_id] = epoch
        if self._lowest is None or value < self._lowest[0]:
            self._lowest = value, self._name(trial)
        lowest = "" if self._single else f"   lowest {100 * self._lowest[0]:.2f} % ({self._lowest[1]})"
        left = self._time_left()
        self._say(trial, f"epoch {epoch}/{self._epochs}   EER {100 * value:.2f} %{lowest}{left}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A line on how a trial ended."""
        result = trial.last_result or {}
        end, reason = outcome(result, self._epochs)
        words = {
            "complete": "done",
            "pruned": f"stopped early after epoch {result.get(TIME)}",
            "error": f"failed: {reason}",
        }
        self._end(trial, words[end])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A line on what a trial died of."""
        self._end(trial, f"failed: {error_in(trial.error_file)}")

    def get_state(self) -> dict[str, Any]:
        """What a resumed study still knows."""
        return {"reached": self._reached, "ended": self._ended, "best": self._lowest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on counting where the driver before stopped."""
        self._reached, self._ended, self._lowest = state["reached"], state["ended"], state["best"]

    def _end(self, trial: Any, words: str) -> None:
        self._ended.add(trial.trial_id)
        self._running.pop(trial.trial_id, None)
        count = "" if self._single else f"   {len(self._ended)} of {self._trials} {WORDS[self._kind]} ended"
        self._say(trial, words + count)

    def _time_left(self) -> str:
        """From how long an epoch takes, supposing that other trials run as many of them as those that ended."""
        if not self._seconds:
            return ""
        ended = [self._reached.get(trial, 0) for trial in self._ended]
        usual = sum(ended) / len(ended) if ended else self._epochs
        expected = sum(ended) + (self._trials - len(ended)) * usual
        remaining = max(expected - sum(self._reached.values()), 0)
        seconds = sum(self._seconds) / len(self._seconds) * remaining / len(self._running)
        return f"   about {duration(seconds)} left" if seconds >= 1 else ""

    def _name(self, trial: Any) -> str:
        return trial_name(trial, LETTERS[self._kind])

    def _say(self, trial: Any, text: str) -> None:
        name = "" if self._single else f"{self._name(trial)}  "
        print(f"[{duration(time.monotonic() - self._started):>7}] {name}{text}", flush=True)


class Decoding:
    """Says how far decoding audio has got, every few seconds; silent where it is quick."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._said = math.inf

    def __call__(self, done: int, total: int) -> None:
        """Called after each recording."""
        if done == 1:
            self._said = time.monotonic()
        if time.monotonic() - self._said >= self._every:
            self._said = time.monotonic()
            print(f"decoding audio, once for all trials: {done} of {total}", flush=True)
