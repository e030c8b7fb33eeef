"""How a search stands: what its trials came to, and whose run in MLflow is marked as the best."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlflow.entities import Run

from raysv.search.mlflow_store import TRIAL
from raysv.search.results import METRIC

OUTCOME, BEST = "raysv.outcome", "raysv.best"  # tags
ENDS = ("complete", "pruned", "error")


@dataclass(frozen=True)
class Ended:
    """A trial that ended.

    Attributes:
        eer: its last one; infinite if it has none.
        searched: what it tried, by dotted key, as shown.
    """

    run_id: str
    trial_id: str
    name: str
    outcome: str
    eer: float
    searched: dict[str, str]


class Standings:
    """What MLflow held when it was asked, and what was written since: asking again at the end of each trial would take
    longer with every trial.

    Attributes:
        run_ids: of every trial, by the trial's id.
        ended: by the trial's id.
        marked: the runs that have the tag of the best.
    """

    def __init__(self, runs: Iterable[Run], searched: Sequence[str]) -> None:
        self.run_ids: dict[str, str] = {}
        self.ended: dict[str, Ended] = {}
        self.marked: set[str] = set()
        for run in runs:
            tags, run_id = run.data.tags, run.info.run_id
            self.run_ids[tags[TRIAL]] = run_id
            if BEST in tags:
                self.marked.add(run_id)
            if tags.get(OUTCOME) in ENDS:
                values = {key: run.data.params.get(key, "") for key in searched}
                eer = run.data.metrics.get(METRIC, math.inf)
                self.ended[tags[TRIAL]] = Ended(
                    run_id, tags[TRIAL], run.info.run_name.split()[0], tags[OUTCOME], eer, values
                )

    def counts(self) -> dict[str, int]:
        """How many trials ended how."""
        counted = Counter(trial.outcome for trial in self.ended.values())
        return {end: counted[end] for end in ENDS}

    def ranked(self, most: int) -> list[Ended]:
        """The best of those that came to their end, best first."""
        complete = (trial for trial in self.ended.values() if trial.outcome == "complete" and math.isfinite(trial.eer))
        return heapq.nsmallest(most, complete, key=lambda trial: trial.eer)
