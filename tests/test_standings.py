import math
from types import SimpleNamespace
from typing import Any

from raysv.search.results import METRIC
from raysv.search.standings import Standings


def run(number: int, outcome: str, eer: float | None, **tags: str) -> Any:
    """What MLflow's client returns, as far as it is looked at."""
    return SimpleNamespace(
        info=SimpleNamespace(run_id=f"run{number}", run_name=f"t{number:03d} m0.2"),
        data=SimpleNamespace(
            tags={"raysv.trial_id": f"id{number}", "raysv.outcome": outcome} | tags,
            metrics={} if eer is None else {METRIC: eer},
            params={"loss.margin": "0.2"},
        ),
    )


def test_the_best_are_the_lowest_of_those_that_came_to_their_end() -> None:
    runs = [run(0, "complete", 0.3), run(1, "pruned", 0.1), run(2, "complete", 0.2), run(3, "complete", 0.25)]
    best = Standings(runs, ["loss.margin", "loss.scale"]).ranked(2)
    assert [(trial.name, trial.eer) for trial in best] == [("t002", 0.2), ("t003", 0.25)]
    assert best[0].searched == {"loss.margin": "0.2", "loss.scale": ""}


def test_trials_that_run_are_known_but_have_not_ended() -> None:
    standings = Standings([run(0, "running", 0.3), run(1, "error", None)], [])
    assert standings.run_ids == {"id0": "run0", "id1": "run1"}
    assert standings.counts() == {"complete": 0, "pruned": 0, "error": 1}
    assert standings.ended["id1"].eer == math.inf


def test_a_trial_without_an_error_rate_is_not_ranked() -> None:
    assert Standings([run(0, "complete", None)], []).ranked(1) == []


def test_a_mark_is_seen_whatever_became_of_the_trial() -> None:
    runs = [run(0, "running", 0.3, **{"raysv.best": "true"}), run(1, "complete", 0.2)]
    assert Standings(runs, []).marked == {"run0"}
