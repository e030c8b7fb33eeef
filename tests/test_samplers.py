from pathlib import Path

import optuna
import pytest

from raysv.search.proposals import OptunaProposals
from raysv.search.ranges import Range
from raysv.search.results import METRIC, TIME
from raysv.search.samplers import make_sampler

KINDS = ("tpe", "gp", "random", "quasirandom")
SPACE = {
    "loss.kind": Range("choice", ("aam", "aam_supcon")),
    "loss.margin": Range("uniform", (0.0, 0.5)),
    "loss.temperature": Range("loguniform", (0.03, 0.5), {"loss.kind": ("aam_supcon",)}),
}
PLAIN = {"loss.margin": Range("uniform", (0.0, 0.5)), "loss.scale": Range("loguniform", (16.0, 64.0))}
GRID = {"loss.margin": Range("choice", (0.0, 0.2, 0.4)), "batch.views": Range("int", (2, 3))}


def study(storage: str, kind: str, ranges: dict[str, Range], seed: int, trials: int) -> list[dict[str, float]]:
    """The values that a study of one trial at a time proposes; a margin of 0.3 is best."""
    search = OptunaProposals(
        ranges, epochs=1, storage=storage, study_name="study", sampler=make_sampler(kind, ranges, seed)
    )
    seen = []
    for number in range(trials):
        values = search.suggest(str(number))
        assert values is not None
        seen.append(values)
        search.on_trial_complete(str(number), {TIME: 1, METRIC: 0.1 + abs(values["loss.margin"] - 0.3)})
    return seen


@pytest.fixture
def storages(tmp_path: Path) -> list[str]:
    """Two databases."""
    return [f"sqlite:///{tmp_path / name}.db" for name in ("one", "two")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_proposals_twice_and_another_seed_gives_others(storages: list[str], kind: str) -> None:
    first, again = (study(storage, kind, SPACE, 3, 14) for storage in storages)
    assert first == again
    assert study("sqlite://", kind, SPACE, 4, 14) != first
    assert any(values["loss.kind"] == "aam" for values in first)


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_models_propose_near_the_best_once_they_know_something(kind: str) -> None:
    margins = [values["loss.margin"] for values in study("sqlite://", kind, PLAIN, 0, 30)]
    late = [abs(margin - 0.3) for margin in margins[15:]]
    by_chance = (0.3**2 + 0.2**2) / 2 / 0.5
    assert sum(late) / len(late) < 0.7 * by_chance


def test_a_grid_is_tried_out_each_combination_once() -> None:
    seen = study("sqlite://", "grid", GRID, 0, 6)
    assert sorted((values["loss.margin"], values["batch.views"]) for values in seen) == [
        (margin, views) for margin in (0.0, 0.2, 0.4) for views in (2, 3)
    ]


@pytest.mark.parametrize("kind", ["tpe", "gp", "random", "quasirandom"])
def test_where_values_end_none_are_tried_twice(kind: str) -> None:
    seen = [tuple(values.values()) for values in study("sqlite://", kind, GRID, 0, 6)]
    assert len(set(seen)) == 6


def test_no_values_are_tried_twice_after_a_resume_but_those_that_were_lost(storages: list[str], tmp_path: Path) -> None:
    def search() -> OptunaProposals:
        sampler = make_sampler("tpe", GRID, 0)
        return OptunaProposals(GRID, epochs=1, storage=storages[0], study_name="study", sampler=sampler)

    first = search()
    seen = [first.suggest(str(number)) for number in range(3)]
    for number in range(3):
        first.on_trial_complete(str(number), {TIME: 1, METRIC: 0.1})
    first.save(str(tmp_path / "snapshot"))
    lost = first.suggest("lost")
    resumed = search()
    resumed.restore(str(tmp_path / "snapshot"))
    later = [resumed.suggest(f"later {number}") for number in range(3)]
    assert lost in later
    assert len({tuple(values.values()) for values in seen + later if values}) == 6


def test_a_combination_of_a_grid_that_a_killed_driver_lost_is_tried_again(storages: list[str], tmp_path: Path) -> None:
    def search() -> OptunaProposals:
        return OptunaProposals(
            GRID, epochs=1, storage=storages[0], study_name="study", sampler=make_sampler("grid", GRID, 0)
        )

    first = search()
    first.suggest("ended")
    first.on_trial_complete("ended", {TIME: 1, METRIC: 0.1})
    first.save(str(tmp_path / "snapshot"))
    lost = first.suggest("lost")
    resumed = search()
    resumed.restore(str(tmp_path / "snapshot"))
    seen = []
    for number in range(5):
        seen.append(resumed.suggest(str(number)))
        resumed.on_trial_complete(str(number), {TIME: 1, METRIC: 0.1})
    assert seen[0] == lost
    tried = {tuple(trial.params.items()) for trial in optuna.load_study(study_name="study", storage=storages[0]).trials}
    assert len(tried) == 6
