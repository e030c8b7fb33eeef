"""Who proposes: Optuna's samplers, set up for studies of a few dozen trials."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from raysv.search.space import Range

USUAL_STARTUP_TRIALS = 10  # Optuna's own number of random trials before a model is used


def make_sampler(kind: str, ranges: Mapping[str, Range], seed: int | None = None) -> BaseSampler:
    """The sampler of a study.

    Args:
        kind: see `SearchConfig.sampler`.
        seed: with several trials at a time the order of their results plays a part too.

    TPE models all keys together, those that a choice opens in a model of their own, and takes running trials for bad
    ones, so that trials side by side differ. Where little is searched the models take over sooner.
    """
    startup = min(USUAL_STARTUP_TRIALS, 2 * len(ranges) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # what raysv rests on its tests try
        if kind == "gp":
            return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if kind == "random":
            return RandomSampler(seed)
        if kind == "quasirandom":
            return QMCSampler(qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False)
        if kind == "grid":
            return _Grid({key: span.all_values() or [] for key, span in ranges.items()}, seed)
        grouped = any(span.when for span in ranges.values())
        return TPESampler(multivariate=True, group=grouped, constant_liar=True, n_startup_trials=startup, seed=seed)


class _Grid(GridSampler):
    """Optuna's grid where Tune counts the trials: at the last one Optuna's would stop a loop that is not there."""

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing."""
