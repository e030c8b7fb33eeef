"""What MLflow is to know of a study and of each trial; plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysv.search.results import trial_name
from raysv.search.wording import short_names, show_value

TRIAL_KIND, CONFIRMING = "trial", "confirmation"  # kinds of a study's runs in MLflow
LETTERS = {TRIAL_KIND: "t", CONFIRMING: "c"}  # what their names begin with


@dataclass(frozen=True)
class StudyCard:
    """What MLflow is to know of a study.

    Attributes:
        tracking_uri: absolute if it names a file.
        name: names the study's run.
        base: the full configuration tree; a trial's values replace some of its leaves.
        resources: of every trial; they go into its `config.yaml` with its configuration.
        space: the whole search space as YAML.
        searched: the dotted keys of the leaves that are open.
        kind: of the runs that are told of, `trial` or `confirmation`.
        epochs: of a trial that is not stopped early.
        study_id: tells the study from others of its name; the name itself if empty.
        tags: of the study and of every trial.
        folder: of the study. A card outlives its driver, but the code may change: revision, data and versions are the
            tags that each driver notes there when it starts, see `started`.
        description: Markdown, what is searched.
        resolve: what a trial's full tree comes to beside its own values, to be logged with them.
    """

    tracking_uri: str
    name: str
    base: dict[str, Any]
    resources: dict[str, Any]
    space: str
    searched: list[str]
    epochs: int
    kind: str = TRIAL_KIND
    study_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    description: str = ""
    experiment: str = "raysv"
    resolve: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class TrialCard:
    """A trial of Tune: `values` are what it tries, by dotted key."""

    trial_id: str
    name: str
    values: dict[str, Any]

    @classmethod
    def of(cls, trial: Any, kind: str = TRIAL_KIND) -> TrialCard:
        """Named by its number, from 0, and what it tries, short: MLflow's column of names is narrow."""
        return cls.named(trial_name(trial, LETTERS[kind]), trial.trial_id, trial.config)

    @classmethod
    def named(cls, name: str, trial_id: str, values: Mapping[str, Any]) -> TrialCard:
        """With what it tries beside its short name."""
        shown = [f"{key}{show_value(value)}" for key, value in _abbreviate(values).items()]
        return cls(trial_id, " ".join([name, *shown]), dict(values))


def _abbreviate(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"loss.margin": 0.2, "loss.scale": 30, "augment.strength": 1}` as `{"m": 0.2, "sc": 30, "st": 1}`."""
    names = short_names(values)

    def shortest(name: str) -> str:
        prefixes = (name[:length] for length in range(1, len(name)))
        return next((prefix for prefix in prefixes if sum(other.startswith(prefix) for other in names) == 1), name)

    return {shortest(name): value for name, value in zip(names, values.values(), strict=True)}
