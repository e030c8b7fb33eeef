"""Who proposes: Optuna's samplers, set up for studies of a few dozen trials."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from raysv.search.ranges import Range, combinations

USUAL_STARTUP_TRIALS = 10  # Optuna's own number of random trials before a model is used
REPEATS = "repeats"  # attribute of a proposal that was not tried, with the number of the draws before
REDRAWS = 3


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
            return _Grid({key: list(span.all_values()) for key, span in ranges.items()}, seed)
        grouped = any(span.when for span in ranges.values())
        return TPESampler(multivariate=True, group=grouped, constant_liar=True, n_startup_trials=startup, seed=seed)


def draw(study: Study, ranges: Mapping[str, Range], tried: set[tuple[Any, ...]] | None) -> Trial:
    """A new trial of Optuna's, its values drawn; with an end of them, values that were not tried.

    What is tried once more would be the same training with the same seed. A model that is sure of itself proposes it
    all the same: then it draws again, and in the end what has not been tried is guessed. Optuna's storage keeps what
    was drawn and not tried as FAIL, with the attribute `repeats`. Only when all has been tried is something repeated.

    Args:
        study: the samplers of `make_sampler` ignore FAIL.
        tried: values in the order of `ranges`, completed here; None where there is no end of them.
    """
    most = combinations(ranges)
    for number in itertools.count(1):
        trial = study.ask()
        values: dict[str, Any] = {}
        for key, span in ranges.items():
            if span.is_open(values):
                values[key] = span.suggest(trial, key)
        if tried is None or tuple(values.values()) not in tried or len(tried) >= (most or 0):
            break
        trial.set_user_attr(REPEATS, number)
        study.tell(trial, state=TrialState.FAIL)
        if number == REDRAWS + 1:
            study.enqueue_trial(_untried(ranges, tried))
    if tried is not None:
        tried.add(tuple(values.values()))
    return trial


def _untried(ranges: Mapping[str, Range], tried: set[tuple[Any, ...]]) -> dict[str, Any]:
    """Values by chance that were not tried; the chance follows from what was tried, so that a study can be repeated."""
    chance = random.Random(repr(sorted(map(repr, tried))))
    spans = {key: span.all_values() for key, span in ranges.items()}
    if (combinations(ranges) or 0) <= 2 * len(tried):  # guessing would take long
        left = [values for values in itertools.product(*spans.values()) if values not in tried]
        return dict(zip(spans, chance.choice(left), strict=True))
    while True:
        values = {key: chance.choice(span) for key, span in spans.items()}
        if tuple(values.values()) not in tried:
            return values


class _Grid(GridSampler):
    """Optuna's grid where Tune counts the trials: at the last one Optuna's would stop a loop that is not there."""

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing."""
