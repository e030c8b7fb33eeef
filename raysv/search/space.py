"""YAML with ranges in it: what a study searches, and the configuration that each point of it stands for.

A search space is a configuration with some values left open, a single run is one with none left open:

    loss:    {margin: {uniform: [0.1, 0.5]}, temperature: {loguniform: [0.03, 0.3]}, scale: 32}
    search:  {trials: 40}

A range may depend on a choice; where that falls otherwise, the key keeps its default and is not searched:

    loss:
      kind: {choice: [aam, aam_supcon]}
      temperature: {loguniform: [0.03, 0.3], when: {loss.kind: [aam_supcon]}}
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysv.config import (
    LOSS_KEYS,
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
from raysv.search.ranges import RANGES, WHEN, Range, combinations, read_range
from raysv.search.results import SECOND

# the setting of Li & Mak's public code, arXiv 2210.16636, with the field's usual augmentation
PAPER = {
    "loss.kind": "aam_supcon",
    "loss.margin": 0.2,
    "loss.scale": 30.0,
    "loss.temperature": 0.07,
    "augment.strength": 0.5,
}
# and others that are worth a trial before anything is known; where only the loss of the paper is searched, what they
# have of it
PUBLISHED = {
    "paper": PAPER,
    "wespeaker": PAPER | {"loss.kind": "aam", "loss.scale": 32.0},
    "3D-Speaker": PAPER | {"loss.kind": "aam", "loss.margin": 0.3, "loss.scale": 32.0},
    "paper, at the temperature that SimCLR takes for speakers": PAPER | {"loss.temperature": 0.03},
    "SpeechBrain": PAPER | {"loss.kind": "aam"},
}


@dataclass(frozen=True)
class SearchConfig(Section):
    """How the study searches; not part of any trial's configuration."""

    trials: int = knob(20, "configurations to try", 1)
    seed: int = knob(0, "seed of the sampler", 0, 2**31 - 1)
    sampler: str = knob(
        "tpe",
        "tpe: a model of good and bad values, all keys at once; gp: a Gaussian process, which learns only from trials "
        "that ended; quasirandom: Sobol's sequence; random; grid: every combination, where only choices and whole "
        "numbers are open",
        choices=("tpe", "gp", "random", "quasirandom", "grid"),
    )
    published: int = knob(
        2, "how many published settings are tried first; the paper's own is the first of them. A grid tries none", 0, 5
    )
    early_stopping: str = knob(
        "asha",
        "asha: of the trials that reach a rung the best go on; hyperband: the same in brackets that begin later and "
        "later; median: what is worse than the median of the others stops; none: all are trained to the end",
        choices=("asha", "hyperband", "median", "none"),
    )
    grace_epochs: int | None = knob(
        None,
        "epochs that every trial gets; none given: a sixth of all, and one more than the learning rate's warm-up takes",
        1,
    )
    reduction_factor: int = knob(
        3, "of the trials that reach a rung, one in so many goes on; rungs are so many times apart", 2
    )
    second_objective: str = knob(
        "none",
        "what is minimised beside the EER: min_dcf, minDCF at 0.01; cost, the seconds of an epoch. Then nothing may be "
        "stopped early, and the study tells the Pareto front",
        choices=("none", *SECOND),
    )
    confirm: int = knob(
        3, "so many of the best configurations are trained again, to the end, from new seeds; 0: the best trial wins", 0
    )
    confirm_seeds: int = knob(3, "how many new seeds", 2)
    concurrent_trials: int | None = knob(None, "trials at a time; none given: as many as the cluster has room for", 1)
    retries: int = knob(
        1,
        "how often a trial is started again, from its last checkpoint, when its process or node dies; more for spot",
        0,
    )


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


def per_trial(workers: int | None, gpus: float | None) -> dict[str, Any]:
    """Settings for what a trial gets in whole; of GPUs alone, each has a worker, and a part of one has one.

    Raises: ValueError when there cannot be so many GPUs.
    """
    if gpus is None:
        return {} if workers is None else {"resources.workers": workers}
    if not 0 <= gpus < math.inf:
        raise ValueError(f"A trial cannot have {gpus:g} GPUs. Give a whole number, or a part of one.")
    if workers is None:
        workers = max(math.ceil(gpus), 1)
    return {"resources.workers": workers, "resources.gpus_per_worker": gpus / max(workers, 1)}


@dataclass(frozen=True)
class Space:
    """What a study searches.

    Attributes:
        tree: the full configuration tree; keys with a range hold their default.
        ranges: the open keys, dotted; those that others depend on come first.
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

    @property
    def confirming_runs(self) -> int:
        """How many runs at most confirm what the search finds: its winners and the reference, from each new seed."""
        return (self.search.confirm + 1) * self.search.confirm_seeds if self.search.confirm and self.ranges else 0

    @property
    def grace_epochs(self) -> int:
        """Epochs that every trial gets before it may be stopped early."""
        given, training = self.search.grace_epochs, self.epochs
        warmup = self.ranges.get("optimizer.warmup_epochs")
        longest = max(warmup.values) if warmup else self.tree["optimizer"]["warmup_epochs"]
        usual = max(math.ceil(training / 6), math.floor(longest) + 1)
        return min(usual if given is None else given, training)

    def corners(self) -> list[Config]:
        """The configuration at the lower ends of all ranges, at the upper ones, and at every choice."""
        points = [{key: span.values[end] for key, span in self.ranges.items()} for end in (0, -1)]
        points += [{key: value} for key, span in self.ranges.items() if span.kind == "choice" for value in span.values]
        return [self.config(point) for point in points]

    @property
    def second(self) -> str | None:
        """The metric that is minimised beside the EER, if any."""
        return SECOND.get(self.search.second_objective)

    def first_points(self) -> list[dict[str, Any]]:
        """What is tried first: published settings, complete and inside the ranges, each once; the paper's leads."""
        points: list[dict[str, Any]] = []
        for published in list(PUBLISHED.values())[: self.search.published] if self.search.sampler != "grid" else ():
            if (point := self._nearest(published)) not in points:
                points.append(point)
        return points

    def paper_point(self) -> dict[str, Any]:
        """The paper's setting, or what of the space is nearest to it."""
        return self._nearest(PAPER)

    def reference(self) -> str:
        """What `paper_point` is to be called: the paper's setting, unless this space leaves no room for it."""
        point = flatten(config_to_dict(self.config(self.paper_point())))
        differing = [f"{key} {point[key]:g}" if isinstance(point[key], float) else f"{key} {point[key]}"
                     for key, value in PAPER.items() if point[key] != value]  # fmt: skip
        if not differing:
            return "the paper's setting"
        return f"what this space has nearest to the paper's setting ({', '.join(differing)})"

    def _nearest(self, published: Mapping[str, Any]) -> dict[str, Any]:
        defaults = flatten(self.tree)
        point: dict[str, Any] = {}
        for key, span in self.ranges.items():
            if span.is_open(point):
                point[key] = span.nearest(published.get(key, defaults[key]))
        return point

    def to_dict(self) -> dict[str, Any]:
        """The tree with its ranges, as YAML holds it."""
        open_keys = {key: span.to_dict() for key, span in self.ranges.items()}
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
            ranges[f"data.{key}"] = dataclasses.replace(span, values=tuple(map(_from_here, span.values)))
    _check_conditions(ranges, complete["loss"]["kind"])
    ranges = dict(sorted(ranges.items(), key=lambda item: bool(item[1].when)))  # a choice before what depends on it
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
    if "training.seed" in ranges:
        raise ValueError(
            "training.seed cannot be searched: the luckiest seed is no setting. How much seeds vary, a study's "
            "confirmation tells (search.confirm_seeds)."
        )
    for config in space.corners():
        check_shares(config.batch, resources.workers)
    for key, span in ranges.items():
        if span.kind == "int":
            space.config({key: span.values[0] + 1})  # between the ends not every whole number need do
    _check_search(space)
    return space


def _check_conditions(ranges: dict[str, Range], default_kind: str) -> None:
    """Refuse conditions that cannot be met, or on what is itself conditional, and open keys that may mean nothing."""
    for key, span in ranges.items():
        for other, wanted in span.when.items():
            parent = ranges.get(other)
            if parent is None or parent.kind != "choice" or parent.when:
                raise ValueError(
                    f"{key}.{WHEN} names {other}, which is no choice that is open everywhere. Open it with choice, or "
                    f"leave {WHEN} away."
                )
            if strangers := [value for value in wanted if value not in parent.values]:
                raise ValueError(f"{key}.{WHEN}: {other} is never {strangers[0]!r}, but one of {parent.values}.")
    kinds = ranges["loss.kind"].values if "loss.kind" in ranges else (default_kind,)
    for belonging, keys in LOSS_KEYS.items():
        for key in ranges.keys() & {f"loss.{name}" for name in keys}:
            open_for = ranges[key].when.get("loss.kind", kinds)
            if lost := [kind for kind in kinds if kind not in belonging and kind in open_for]:
                meant = ", ".join(kind for kind in kinds if kind in belonging)
                mend = f"Add {WHEN}: {{loss.kind: [{meant}]}} to its range." if meant else "Do not open it."
                what = f"{key} means nothing where loss.kind is {lost[0]}"
                raise ValueError(f"{what}: trials that differ in it would be the same. {mend}")


def _check_search(space: Space) -> None:
    if space.search.sampler == "gp" and any(span.when for span in space.ranges.values()):
        raise ValueError(
            f"search.sampler is gp, which would draw keys with {WHEN} by chance. Take tpe for such a space."
        )
    if space.search.second_objective != "none" and space.search.early_stopping != "none":
        raise ValueError(
            f"search.second_objective is {space.search.second_objective}, but {space.search.early_stopping} stops what "
            "lags behind in EER, however good it is otherwise. Set search.early_stopping to none."
        )
    trials, count = space.search.trials, combinations(space.ranges)
    if space.search.sampler == "grid":
        _check_grid(space, count)
    elif space.ranges and count is not None and trials > count:
        raise ValueError(
            f"search.trials is {trials}, but what is open has {count} combinations, and none is tried twice. Set it to "
            f"{count} or less, or open a key for more."
        )


def _check_grid(space: Space, count: int | None) -> None:
    if endless := [key for key, span in space.ranges.items() if span.count is None]:
        raise ValueError(
            f"search.sampler is grid, but {', '.join(endless)} has no end of values. Open it with choice or int."
        )
    if count is None:
        raise ValueError(f"search.sampler is grid, which knows no {WHEN}: name one value of the choice per study.")
    if space.search.trials != count:
        raise ValueError(f"The grid has {count} combinations; set search.trials to that, not to {space.search.trials}.")


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
            if isinstance(value, dict) and section != "data" and not value.keys() <= {*RANGES, WHEN}:
                raise ValueError(f"{section}.{key} is opened with {', '.join(RANGES)}; got {value!r}.")
            if isinstance(value, dict) and len(value.keys() - {WHEN}) == 1 and value.keys() <= {*RANGES, WHEN}:
                ranges[f"{section}.{key}"] = read_range(f"{section}.{key}", value)
                del closed[section][key]
    return closed, ranges
