"""Which values to try next: Optuna proposes, and its storage tells the same story as Tune and MLflow."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.experiment import Trial
from ray.tune.search.optuna import OptunaSearch

from raysv.search.ranges import Range, combinations
from raysv.search.results import METRIC, TIME, outcome
from raysv.search.samplers import draw, make_sampler
from raysv.search.snapshots import newest

SQLITE_PATIENCE_SECONDS = 60  # for a lock: a dashboard may be reading


class OptunaProposals(OptunaSearch):
    """Tune's search with Optuna, minimising the EER, that keeps Optuna's storage true.

    | a trial that                        | is in Optuna                                                      |
    |-------------------------------------|-------------------------------------------------------------------|
    | ran all epochs                      | COMPLETE with its last EER                                        |
    | was stopped early                   | PRUNED, its last EER included                                     |
    | gave itself up (`failure`)          | COMPLETE with what it reported; the reason is in a user attribute |
    | raised, or reported nothing         | FAIL; a later success of its retry is added                       |

    With an end of values none are tried twice, see `draw`.

    Steps are epochs. Optuna's storage is written at once but Tune's snapshot now and then, in several files, so after a
    killed driver the storage may know more, and this search more than Tune: results that come again are ignored, trials
    that Tune has forgotten become FAIL, and their values are tried again.

    Args:
        space: dotted key of a configuration and what it may be, keys that others depend on first; empty, every proposal
            is `{}`.
        epochs: of a trial that is not stopped early.
        storage: Optuna's URL of a database, such as `sqlite:////folder/optuna.db`.
        study_name: in that database; a study that is there already goes on.
        second: another metric to be minimised beside the EER; then no trial may be stopped early.
        points: values to try first, complete or in part; a new study takes them, one that goes on had them.
        earlier: trials of other studies that a new one learns from.
        sampler: see `make_sampler`; TPE if not given.
    """

    _tried: set[tuple[Any, ...]] | None = None  # a study that an earlier revision began has none

    def __init__(
        self,
        space: dict[str, Range],
        *,
        epochs: int,
        storage: str,
        study_name: str,
        second: str | None = None,
        points: list[dict[str, Any]] | None = None,
        earlier: Sequence[FrozenTrial] = (),
        sampler: BaseSampler | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._epochs = epochs
        self._ranges = space
        self._objectives = [METRIC, second] if second else [METRIC]
        self._most_at_once = sys.maxsize
        self._live: set[str] = set()
        self._tried = set() if space and combinations(space) else None
        super().__init__(
            {key: span.distribution() for key, span in space.items()},
            metric=self._objectives if second else METRIC,
            mode=["min", "min"] if second else "min",
            sampler=sampler or make_sampler("tpe", space),
            study_name=study_name,
            storage=RDBStorage(storage, engine_kwargs={"connect_args": _patience(storage)}),
        )
        if not space:
            self._setup_study(self._mode)
        if not self._known():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._study.set_metric_names(self._objectives)  # for whoever opens the storage
            for point in points or []:
                self._study.enqueue_trial(point)
            self._study.add_trials(earlier)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing to set: space, metric and mode are ours, and TuneConfig may repeat the latter two."""
        return False

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Count trials here: Tune's own limiter keeps the end of a trial that was retried from its searcher."""
        self._most_at_once = max_concurrent
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The values of a new trial, by dotted key; none while as many run as may."""
        if trial_id not in self._ot_trials:
            if len(self._live) >= self._most_at_once:
                return None
            self._ot_trials[trial_id] = draw(self._study, self._ranges, self._tried)
        self._live.add(trial_id)
        return dict(self._ot_trials[trial_id].params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep the EER of an epoch, unless Optuna has it or is done with the trial."""
        self._live.add(trial_id)
        if len(self._objectives) > 1:
            return  # Optuna keeps no curves of several
        trial = self._find(trial_id)
        if trial is not None and not trial.state.is_finished() and result[TIME] not in trial.intermediate_values:
            self._ot_trials[trial_id].report(float(result[METRIC]), int(result[TIME]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended, once."""
        if error or not result or any(objective not in result for objective in self._objectives):
            result, state, reason = {}, TrialState.FAIL, ""
        else:
            self.on_trial_result(trial_id, result)  # Tune sends the result that a trial was stopped at only here
            end, reason = outcome(result, self._epochs)
            state = TrialState.PRUNED if end == "pruned" else TrialState.COMPLETE
        self._live.discard(trial_id)
        trial = self._find(trial_id)
        if trial is not None and not trial.state.is_finished():
            if reason:
                self._ot_trials[trial_id].set_user_attr("failure", reason)
            self._study.tell(trial.number, self._values(result) if state == TrialState.COMPLETE else None, state)
        elif result and (trial is None or trial.state != state):
            self._add(result, state, reason)

    def restore(self, checkpoint_path: str) -> None:
        """Tune's snapshot, and order in the storage that may be ahead of it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().restore(checkpoint_path)
        if (in_tune := _trials_in_tune(Path(checkpoint_path).parent)) is not None:
            # either file may be the older one
            self._live &= {name for name, (status, _) in in_tune.items() if status not in _OVER}
            for forgotten in self._ot_trials.keys() - in_tune.keys():
                del self._ot_trials[forgotten]
            for name, (status, values) in in_tune.items():
                if name not in self._ot_trials:
                    self._adopt(name, values, over=status in _OVER)
        if self._tried is not None:  # what is lost is not
            claimed = {trial.number for trial in self._ot_trials.values()}
            known = (trial.params for trial in self._known() if trial.number in claimed)
            self._tried = {tuple(values[key] for key in self._ranges) for values in known}
        lost = [trial for trial in self._unclaimed() if trial.state == TrialState.RUNNING]
        for trial in lost:
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params)
        if lost:
            self._study.sampler.reseed_rng()  # as it was saved it would draw the same values once more

    def _unclaimed(self) -> list[FrozenTrial]:
        """Trials that belong to none of Tune's, the newest last."""
        claimed = {trial.number for trial in self._ot_trials.values()}
        return [trial for trial in self._known() if trial.number not in claimed]

    def _adopt(self, name: str, values: dict[str, Any], over: bool) -> None:
        """Find a trial that Tune noted and the older snapshot of the search did not: it is what it is in Tune."""
        for trial in reversed(self._unclaimed()):
            if trial.params == values:
                self._ot_trials[name] = optuna.Trial(self._study, trial._trial_id)
                if not over:
                    self._live.add(name)
                elif not trial.state.is_finished():
                    whole = trial.intermediate_values.get(self._epochs)
                    state = TrialState.PRUNED if whole is None else TrialState.COMPLETE
                    self._study.tell(trial.number, whole, state)
                return

    @property
    def _study(self) -> optuna.Study:
        assert self._ot_study is not None
        return self._ot_study

    def _known(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _find(self, trial_id: str) -> FrozenTrial | None:
        """What Optuna holds of a trial; none of one that is newer than the snapshot this search was restored from."""
        if trial_id not in self._ot_trials:
            return None
        # this one alone: the study would look at all of them, and be slow when there are thousands
        return self._study._storage.get_trial(self._ot_trials[trial_id]._trial_id)

    def _values(self, result: dict[str, Any]) -> list[float]:
        return [float(result[objective]) for objective in self._objectives]

    def _add(self, result: dict[str, Any], state: TrialState, reason: str) -> None:
        """Enter the end of a retry as a trial of its own: Optuna never reopens one that ended."""
        tried = [key for key in self._ranges if f"config/{key}" in result]
        self._study.add_trial(
            create_trial(
                state=state,
                values=self._values(result),
                params={key: result[f"config/{key}"] for key in tried},
                distributions={key: self._ranges[key].distribution() for key in tried},
                user_attrs={"failure": reason} if reason else {},
                intermediate_values={} if len(self._objectives) > 1 else {int(result[TIME]): float(result[METRIC])},
            )
        )


_OVER = (Trial.TERMINATED, Trial.ERROR)


def _trials_in_tune(folder: Path) -> dict[str, tuple[str, dict[str, Any]]] | None:
    """By id, how the trials in Tune's newest snapshot in a folder stand and what they try; none without a snapshot."""
    snapshot = newest(folder)
    if snapshot is None:
        return None
    trials = (json.loads(trial) for trial, _ in json.loads(snapshot.read_text(encoding="utf-8"))["trial_data"])
    return {trial["trial_id"]: (trial["status"], trial.get("config", {})) for trial in trials}


def _patience(storage: str) -> dict[str, Any]:
    return {"timeout": SQLITE_PATIENCE_SECONDS} if storage.startswith("sqlite") else {}
