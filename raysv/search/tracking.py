"""Tune's hooks that keep MLflow: one run per trial below one per study, written by Tune's driver alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysv.search.cards import StudyCard, TrialCard
from raysv.search.mlflow_store import check
from raysv.search.outbox import Outbox
from raysv.search.results import error_in, outcome
from raysv.search.runs import StudyRuns


class MLflowTracking(Callback):
    """Tune's hooks: what happened, put in order into MLflow.

    MLflow is the record: whatever a restored study has to know of its earlier life it looks up there, by the trials'
    ids. Results are written as they come; while MLflow does not answer they wait, and the study goes on.
    """

    def __init__(self, card: StudyCard) -> None:
        self._card = card
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"_card": self._card}  # a client has locks, which do not travel in Tune's snapshots

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._card = state["_card"]
        self._open()

    def _open(self) -> None:
        self._runs = StudyRuns(self._card)
        self._outbox = Outbox(self._runs.recover)

    def setup(self, *args: Any, **info: Any) -> None:
        """Find or make the study's run.

        Raises: ValueError when MLflow cannot be used, before any trial has started.
        """
        check(self._card.tracking_uri)
        self._runs.open()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A run for a trial, or the one it had before it was interrupted."""
        self._outbox.put(partial(self._runs.start, TrialCard.of(trial, self._card.kind)))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The metrics of an epoch."""
        self._outbox.put(partial(self._runs.add_result, TrialCard.of(trial, self._card.kind), dict(result)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The outcome of a trial that returned or was stopped."""
        end, reason = outcome(trial.last_result or {}, self._card.epochs)
        self._finish(trial, end, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """What a trial died of."""
        report = Path(trial.error_file) if trial.error_file else None
        self._finish(trial, "error", error_in(report), report)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Close what is still open, and say so if something could not be written."""
        self._outbox.put(partial(self._runs.close, [trial.trial_id for trial in trials]))
        self._outbox.put(self._runs.summarise)
        self._outbox.empty()

    def _finish(self, trial: Any, end: str, reason: str, report: Path | None = None) -> None:
        card = TrialCard.of(trial, self._card.kind)
        self._outbox.put(partial(self._runs.finish, card, end, reason))
        self._outbox.put(self._runs.summarise)
        self._outbox.put(partial(self._runs.upload, card, report))
