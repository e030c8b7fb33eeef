"""YAML with ranges in it: what a study searches, and the configuration that each point of it stands for.

A search space is a configuration with some values left open, a single run is one with none left open:

    loss:    {margin: {uniform: [0.1, 0.5]}, temperature: {loguniform: [0.03, 0.3]}, scale: 32}
    search:  {trials: 40}
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raysv.config import (
    SYNTHETIC,
    Config,
    Section,
    check_shares,
    config_from_dict,
    config_to_dict,
    flatten,
    knob,
    read_yaml,
    section_from_dict,
    unknown_key,
    with_values,
)

RANGES = ("uniform", "loguniform", "int", "choice")

# the setting of Li & Mak's public code, arXiv 2210.16636, with the field's usual augmentation
PAPER = {"loss.margin": 0.2, "loss.scale": 30.0, "loss.temperature": 0.07, "augment.strength": 0.5}
# and the published neighbours that are worth a trial before anything is known
PUBLISHED = (
    PAPER,
    PAPER | {"loss.scale": 32.0},
    PAPER | {"loss.margin": 0.3, "loss.scale": 32.0},
    PAPER | {"loss.temperature": 0.03},
)


@dataclass(frozen=True)
class SearchConfig(Section):
    """How the study searches; not part of any trial's configuration."""

    trials: int = knob(20, "configurations to try", 1)
    seed: int = knob(0, "seed of the sampler", 0, 2**31 - 1)
    published: int = knob(2, "how many published settings are tried first; the paper's own is the first of them", 1, 4)
    early_stopping: str = knob(
        "asha", "asha: stop what lags behind after some epochs; none: train all to the end", choices=("asha", "none")
    )
    grace_epochs: int = knob(1, "epochs that every trial gets", 1)
    reduction_factor: int = knob(
        3, "of the trials that reach a rung, one in so many goes on; rungs are so many times apart", 2
    )
    concurrent_trials: int | None = knob(None, "trials at a time; none given: as many as the cluster has room for", 1)


@dataclass(frozen=True)
class ResourcesConfig(Section):
    """What a trial gets of the cluster."""

    workers: int = knob(1, "DDP workers of a trial; results do not depend on it", 1)
    cpus_per_worker: int = knob(1, "CPU cores of each", 1)
    gpus_per_worker: float | None = knob(
        None, "GPUs of each; a fraction only for a lone worker; none given: 1 where the cluster has GPUs, else 0", 0, 8
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        gpus = self.gpus_per_worker
        if gpus is not None and not gpus.is_integer() and (self.workers > 1 or gpus > 1):
            raise ValueError(
                f"resources.gpus_per_worker is {gpus:g} with {self.workers} workers. Only a lone worker can share a "
                "GPU: NCCL refuses two workers on one. Set it to 1, or resources.workers to 1."
            )


@dataclass(frozen=True)
class Range:
    """The values that one key may take.

    Attributes:
        kind: one of `RANGES`.
        values: lower and upper end, or for `choice` all of them.
    """

    kind: str
    values: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """As Optuna takes it."""
        if self.kind == "choice":
            return CategoricalDistribution(self.values)
        low, high = self.values
        return (
            IntDistribution(low, high)
            if self.kind == "int"
            else FloatDistribution(low, high, log=self.kind == "loguniform")
        )

    def nearest(self, value: Any) -> Any:
        """The value of the range that is closest to one that may lie outside; a choice of words' first."""
        if self.kind == "choice":
            numbers = [choice for choice in self.values if isinstance(choice, (int, float))]
            if len(numbers) == len(self.values) and isinstance(value, (int, float)):
                return min(numbers, key=lambda choice: abs(choice - value))
            return value if value in self.values else self.values[0]
        low, high = self.values
        return min(max(round(value) if self.kind == "int" else value, low), high)

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"one of {', '.join(map(str, self.values))}"
        return f"{self.values[0]:g} to {self.values[1]:g}{' (log)' if self.kind == 'loguniform' else ''}"


@dataclass(frozen=True)
class Space:
    """What a study searches.

    Attributes:
        tree: the full configuration tree; keys with a range hold their default.
        ranges: the open keys, dotted.
    """

    name: str
    tree: dict[str, Any]
    ranges: dict[str, Range]
    search: SearchConfig = field(default_factory=SearchConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def config(self, values: dict[str, Any]) -> Config:
        """The configuration of one point: the tree with the open keys filled in."""
        return config_from_dict(with_values(self.tree, values))

    @property
    def epochs(self) -> int:
        """Epochs of a trial that is not stopped early."""
        return int(self.tree["training"]["epochs"])

    def corners(self) -> list[Config]:
        """The configuration at the lower ends of all ranges, at the upper ones, and at every choice."""
        points = [{key: span.values[end] for key, span in self.ranges.items()} for end in (0, -1)]
        points += [{key: value} for key, span in self.ranges.items() if span.kind == "choice" for value in span.values]
        return [self.config(point) for point in points]

    def first_points(self) -> list[dict[str, Any]]:
        """The published settings, complete and inside the ranges, each once; the paper's is the first."""
        defaults = flatten(self.tree)
        points = []
        for published in PUBLISHED[: self.search.published]:
            point = {key: span.nearest(published.get(key, defaults[key])) for key, span in self.ranges.items()}
            if point not in points:
                points.append(point)
        return points

    def to_dict(self) -> dict[str, Any]:
        """The tree with its ranges, as YAML holds it."""
        open_keys = {key: {span.kind: list(span.values)} for key, span in self.ranges.items()}
        sections = {"search": dataclasses.asdict(self.search), "resources": dataclasses.asdict(self.resources)}
        return with_values(self.tree, open_keys) | sections


def read_space(path: Path, settings: dict[str, Any] | None = None) -> Space:
    """The search space in a YAML file, with some of its keys set otherwise.

    The lower ends of all ranges together, the upper ones together and every choice are tried: most values that cannot
    be trained with are found here, before anything runs.

    Args:
        settings: dotted keys and their values, ranges among them if need be.

    Raises: ValueError naming file and key.
    """
    tree = with_values(read_yaml(path), settings or {})
    try:
        return space_from_dict(tree, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def space_from_dict(tree: dict[str, Any], name: str) -> Space:
    """A checked search space from the tree that YAML holds for it."""
    sections = [item.name for item in dataclasses.fields(Config)] + ["search", "resources"]
    for key in tree:
        if key not in sections:
            raise ValueError(unknown_key(str(key), str(key), sections))
    search = section_from_dict(SearchConfig, tree.get("search"), "search")
    resources = section_from_dict(ResourcesConfig, tree.get("resources"), "resources")
    closed, ranges = _separate({key: tree[key] for key in tree if key not in ("search", "resources")})
    complete = config_to_dict(config_from_dict(closed))
    for key in ("root", "cache"):
        complete["data"][key] = _from_here(complete["data"][key])
        if span := ranges.get(f"data.{key}"):
            ranges[f"data.{key}"] = Range(span.kind, tuple(map(_from_here, span.values)))
    space = Space(name, complete, ranges, search, resources)
    for key, span in ranges.items():
        section, _, knob_name = key.partition(".")
        knobs = space.tree[section]
        if knob_name not in knobs:
            raise ValueError(unknown_key(key, knob_name, list(knobs)))
        default = knobs[knob_name]
        if span.kind != "choice" and not isinstance(default, (float, int)):
            raise ValueError(f"{key} is no number: search it with choice, not with {span.kind}.")
        if span.kind.endswith("uniform") and not isinstance(default, float):
            raise ValueError(f"{key} is a whole number: search it with int or choice, not with {span.kind}.")
    if "training.epochs" in ranges:
        raise ValueError(
            "training.epochs cannot be searched: trials of different lengths cannot be compared at the same epoch."
        )
    for config in space.corners():
        check_shares(config.batch, resources.workers)
    for key, span in ranges.items():
        if span.kind == "int":
            space.config({key: span.values[0] + 1})  # between the ends not every whole number need do
    return space


def _from_here(folder: Any) -> Any:
    """A folder as Ray's workers find it too, who run in folders of their own; what is no text is refused elsewhere."""
    if not isinstance(folder, str) or folder in ("", SYNTHETIC) or folder.startswith("~"):
        return folder
    return os.path.abspath(folder)


def _separate(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Range]]:
    """A tree without its ranges, and the ranges by dotted key."""
    closed: dict[str, Any] = {}
    ranges: dict[str, Range] = {}
    for section, values in tree.items():
        closed[section] = values.copy() if isinstance(values, dict) else values
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, dict) and section != "data" and not value.keys() <= set(RANGES):
                raise ValueError(f"{section}.{key} is opened with {', '.join(RANGES)}; got {value!r}.")
            if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in RANGES:
                ranges[f"{section}.{key}"] = _range(f"{section}.{key}", *next(iter(value.items())))
                del closed[section][key]
    return closed, ranges


def _range(key: str, kind: str, values: Any) -> Range:
    if kind == "choice":
        if not isinstance(values, list) or not values or any(isinstance(value, (list, dict)) for value in values):
            raise ValueError(f"{key}: choice takes a list of texts or numbers, got {values!r}.")
        return Range(kind, tuple(values))
    numbers = values if isinstance(values, list) else []
    wanted = int if kind == "int" else (int, float)
    if len(numbers) != 2 or not all(isinstance(value, wanted) and not isinstance(value, bool) for value in numbers):
        raise ValueError(
            f"{key}: {kind} takes two {'whole ' if kind == 'int' else ''}numbers, lower and upper end; got {values!r}."
        )
    low, high = numbers if kind == "int" else map(float, numbers)
    if not low < high or (kind == "loguniform" and low <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ValueError(f"{key}: {kind} takes a lower and a higher end{above}, got {values!r}.")
    return Range(kind, (low, high))
