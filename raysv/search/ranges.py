"""What one key of a search space may be, as YAML opens it and as Optuna takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

RANGES = ("uniform", "loguniform", "int", "choice")
WHEN = "when"


@dataclass(frozen=True)
class Range:
    """The values that one key may take.

    Attributes:
        kind: one of `RANGES`.
        values: lower and upper end, or for `choice` all of them.
        when: which values of other keys, choices themselves, it depends on; it is open where all of them fit.
    """

    kind: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def is_open(self, values: Mapping[str, Any]) -> bool:
        """Whether the key is searched where other keys have these values."""
        return all(values.get(key) in wanted for key, wanted in self.when.items())

    def suggest(self, trial: Trial, key: str) -> Any:
        """What a trial of Optuna takes for the key."""
        if self.kind == "choice":
            return trial.suggest_categorical(key, self.values)
        if self.kind == "int":
            return trial.suggest_int(key, *self.values)
        return trial.suggest_float(key, *self.values, log=self.kind == "loguniform")

    @property
    def count(self) -> int | None:
        """How many values it has; None where there is one between any two."""
        if self.kind == "choice":
            return len(set(self.values))
        return self.values[1] - self.values[0] + 1 if self.kind == "int" else None

    def all_values(self) -> Sequence[Any]:
        """Every value of a range that has an end of them."""
        return range(self.values[0], self.values[1] + 1) if self.kind == "int" else tuple(dict.fromkeys(self.values))

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

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it."""
        depends = {WHEN: {key: list(wanted) for key, wanted in self.when.items()}} if self.when else {}
        return {self.kind: list(self.values)} | depends

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
        depends = "".join(f", where {key} is {' or '.join(map(str, wanted))}" for key, wanted in self.when.items())
        if self.kind == "choice":
            return f"one of {', '.join(map(str, self.values))}{depends}"
        return f"{self.values[0]:g} to {self.values[1]:g}{' (log)' if self.kind == 'loguniform' else ''}{depends}"


def combinations(ranges: Mapping[str, Range]) -> int | None:
    """How many there are of all values of some ranges; None where there is no end of them or one depends on another."""
    counts = [span.count for span in ranges.values()]
    if None in counts or any(span.when for span in ranges.values()):
        return None
    return math.prod(count or 0 for count in counts)


def read_range(key: str, opened: dict[str, Any]) -> Range:
    """The range that YAML opens a key with.

    Raises: ValueError naming the key.
    """
    ((kind, values),) = ((name, value) for name, value in opened.items() if name != WHEN)
    when = _conditions(key, opened.get(WHEN, {}))
    if kind == "choice":
        if not isinstance(values, list) or not values or any(isinstance(value, (list, dict)) for value in values):
            raise ValueError(f"{key}: choice takes a list of texts or numbers, got {values!r}.")
        return Range(kind, tuple(values), when)
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
    return Range(kind, (low, high), when)


def _conditions(key: str, when: Any) -> dict[str, tuple[Any, ...]]:
    lists = when.values() if isinstance(when, dict) else [None]
    if not all(isinstance(wanted, list) and wanted for wanted in lists):
        raise ValueError(
            f"{key}.{WHEN} takes other keys and lists of their values, such as {{loss.kind: [aam]}}; got {when!r}."
        )
    return {str(other): tuple(wanted) for other, wanted in when.items()}
