"""How a study puts things to people: values, durations, errors and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def show_value(value: Any, digits: int = 3) -> str:
    """A value as short as it can be told from its neighbours."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def short_names(keys: Iterable[str]) -> list[str]:
    """`loss.margin` as `margin`: the last part says enough where few keys are searched; all in full if two agree."""
    whole = list(keys)
    leaves = [key.rpartition(".")[2] for key in whole]
    return leaves if len(set(leaves)) == len(leaves) else whole


def describe_values(values: Mapping[str, Any]) -> str:
    """`{"loss.margin": 0.21, "loss.scale": 30}` as `margin 0.21  scale 30`."""
    names = short_names(values)
    return "  ".join(f"{name} {show_value(value)}" for name, value in zip(names, values.values(), strict=True))


def duration(seconds: float) -> str:
    """`1:05` for a minute and five seconds, `2:01:05` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def first_line(error: Exception) -> str:
    """What an exception says, without the pages that some libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns, for a terminal."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text below a head, as a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
