"""What earlier studies tried, as trials that a sampler may learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from raysv.config import flatten, with_values
from raysv.search.records import TrialRecord
from raysv.search.results import METRIC, metrics_by_epoch
from raysv.search.space import Space
from raysv.search.study import Study, read_study, started

FREE = (
    "data.root",
    "data.cache",
    "data.loader_workers",
    "training.seed",
)  # may differ: the data's hash says if they do
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


@dataclass(frozen=True)
class Earlier:
    """The trials of an earlier study that fit a space.

    Attributes:
        left_out: how many ended but do not fit, because they lie outside the space or differ in what it holds fixed.
    """

    study: str
    trials: list[FrozenTrial]
    left_out: int

    def __str__(self) -> str:
        left_out = f"; {self.left_out} lie outside this space" if self.left_out else ""
        return f"{len(self.trials)} trials of {self.study}{left_out}"


def earlier_trials(space: Space, folder: Path, data_hash: str) -> Earlier:
    """What a study in a folder tried, as far as this space could have tried it too.

    EERs of other data, or after another number of epochs, would mislead the sampler, which takes them as they are.

    Args:
        data_hash: of the training list, the dev pairs and their recordings.

    Raises: ValueError when the earlier study cannot be compared, or nothing in it fits.
    """
    study = read_study(folder)
    _refuse_other(space, study, folder, data_hash)
    ended = [trial for trial in study.trials if trial.outcome in STATES and trial.epoch]
    fitting = [found for trial in ended if (found := _fitted(space, study, trial, folder.name)) is not None]
    if not fitting:
        raise ValueError(
            f"None of the {len(ended)} trials of study {folder.name} lies in this space: they differ in what it holds "
            "fixed, or lie beyond its ranges. Start without --warm-start, or open what differs."
        )
    return Earlier(folder.name, fitting, len(ended) - len(fitting))


def _refuse_other(space: Space, study: Study, folder: Path, data_hash: str) -> None:
    theirs = started(folder).get("data_hash")
    if theirs != data_hash:
        raise ValueError(
            f"Study {folder.name} learned from other data (data hash {theirs}, here {data_hash}): its error rates "
            "cannot be compared with this one's. Start without --warm-start."
        )
    if study.space.epochs != space.epochs:
        raise ValueError(
            f"Trials of study {folder.name} have {study.space.epochs} epochs, here {space.epochs}: their error rates "
            "cannot be compared. Start without --warm-start, or with the same training.epochs."
        )


def _fitted(space: Space, study: Study, trial: TrialRecord, name: str) -> FrozenTrial | None:
    """A trial as this space would have it; None where it differs in a fixed key or lies beyond a range."""
    theirs, ours = flatten(with_values(study.space.tree, trial.values)), flatten(space.tree)
    if any(theirs.get(key) != ours[key] for key in ours.keys() - space.ranges.keys() - set(FREE)):
        return None
    params: dict[str, Any] = {}
    for key, span in space.ranges.items():
        if span.is_open(params):
            if span.nearest(theirs[key]) != theirs[key]:
                return None
            params[key] = theirs[key]
    if space.second and space.second not in trial.metrics:
        return None
    curve = {epoch: metrics[METRIC] for epoch, metrics in metrics_by_epoch(trial.metrics).items() if METRIC in metrics}
    return create_trial(
        state=STATES[trial.outcome],
        values=[trial.eer, trial.metrics[space.second]] if space.second else [trial.eer],
        params=params,
        distributions={key: space.ranges[key].distribution() for key in params},
        intermediate_values={} if space.second else curve,  # Optuna keeps no curves of two objectives
        user_attrs={"study": name, "trial": trial.name},
    )
